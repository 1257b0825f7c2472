"""How long TwHIN takes to PyTorch-BigGraph's final quality on FB15k-237.

    python benchmarks/twhin_time_to_quality.py --data DIR [--work FOLDER] [--epochs 50]

DIR holds train, valid and test.tsv.gz. PBG 1.0.0 trains ComplEx with what it publishes for FB15k
(benchmarks/biggraph.py), 2 workers; the vectors of every fifth epoch are ranked on the validation
edges by TwHIN's own evaluation: same candidates, same filter. Then TwHIN trains with
config/fb15k237_complex.yaml, validates every two passes, and is stopped once it has passed PBG's
last validation MRR. PBG's minutes are those of its training alone, by its log, without loading,
saving or evaluation; TwHIN's go from the command to the record that passes, all included. Prints
JSON lines; the bar: half of PBG's minutes. (PYTHONPATH=. of the repository)
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import biggraph  # type: ignore[import-not-found]
import torch

from projects.twhin.config import TwhinConfig
from projects.twhin.data import COLUMNS
from projects.twhin.evaluate import evaluate_split
from projects.twhin.model import Vectors, weight_name
from projects.twhin.validation import RECORD
from tml import distributed
from tml.config import load_config
from tml.data.parquet import read_columns
from tml.logs import read_records

ROOT = Path(__file__).resolve().parents[1]
TWHIN = ROOT / "projects/twhin"
CONFIG = TWHIN / "config/fb15k237_complex.yaml"
EVERY = 5
"""Epochs of PBG between points of its curve."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def say(**record: Any) -> None:
    """One JSON line."""
    record["load"] = os.getloadavg()[0]
    shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
    print(json.dumps(shown), flush=True)


def prepare(data: Path, graph: Path) -> None:
    """The graph as TwHIN reads it."""
    command = [sys.executable, str(TWHIN / "prepare.py"), "--entity-type", "entity"]
    for split in ("train", "valid", "test"):
        command += [f"--{split}", str(data / f"{split}.tsv.gz")]
    command += ["--output", str(graph)]
    subprocess.run(command, check=True, stdout=sys.stderr, env=ENVIRONMENT)


def as_vectors(found: dict[str, Any], config: TwhinConfig) -> Vectors:
    """PBG's vectors as TwHIN's model with reciprocal relations.

    With dynamic relations, PBG's operators of the left side make the vectors that ask for tails,
    ⟨c_r ⊙ s, t⟩, and those of the right side the ones that ask for heads, ⟨c′_r ⊙ t, s⟩. Seen by
    ranking after two epochs: the MRR is .265 so, and .117 or less with sides or signs exchanged.
    """
    sides = []
    for side in ("lhs", "rhs"):
        parts = (
            torch.from_numpy(found[f"relations.0.operator.{side}.{part}"])
            for part in ("real", "imag")
        )
        sides.append(torch.cat(list(parts), dim=1))
    (table,) = config.model.embeddings.tables
    saved = {
        weight_name(table.name): torch.from_numpy(found["embeddings"]),
        "complex_diagonals": torch.cat(sides),
    }
    return Vectors.from_saved(config.model, saved)


def measure(vectors: Vectors, config: TwhinConfig) -> float:
    """Filtered MRR of the validation edges."""
    with distributed.join(3600.0) as job:
        report = evaluate_split(config, "validation", vectors, job)
    found: float = report["link_prediction"]["mean"]["mrr"]
    return found


def measure_biggraph(work: Path, graph: Path, num_epochs: int) -> tuple[float, float]:
    """PBG's final validation MRR, and its minutes of training."""
    python = biggraph.environment(work)
    dim = biggraph.FB15K["dimension"]
    config = load_config(
        TwhinConfig,
        CONFIG,
        [f"model.embeddings.defaults.embedding_dim={dim}"],
        graph / "graph.yaml",
    )
    (table,) = config.model.embeddings.tables
    columns = read_columns(config.train_data.data_root, COLUMNS)
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name) / "graph"
        biggraph.write_graph(python, folder, columns, table.num_embeddings)
        (folder / "dynamic_rel_count.txt").write_text(f"{len(config.model.relations)}\n")
        settings = {
            **biggraph.FB15K,
            "num_epochs": num_epochs,
            "dynamic_relations": True,
            "checkpoint_preservation_interval": EVERY,
        }
        relations = [{"name": "all_edges", "operator": "complex_diagonal"}]
        epochs = biggraph.train(python, folder, settings, relations)
        mrr = 0.0
        for version in sorted({*range(EVERY, num_epochs, EVERY), num_epochs}):
            vectors = as_vectors(biggraph.read_vectors(python, folder, version), config)
            mrr = measure(vectors, config)
            minutes = sum(epoch.seconds for epoch in epochs[:version]) / 60
            say(what="biggraph", epoch=version, minutes=minutes, validation_mrr=mrr)
    return mrr, sum(epoch.seconds for epoch in epochs) / 60


def measure_own(graph: Path, target: float) -> float | None:
    """Minutes until validation MRR is above the target; None where it never is."""
    with tempfile.TemporaryDirectory() as name:
        save_dir = Path(name) / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
        command += ["--nproc_per_node=1", str(TWHIN / "run.py"), f"--config_yaml_path={CONFIG}"]
        command += [f"--graph={graph}", f"--save_dir={save_dir}", "--no_evaluation"]
        command += ["--set", "evaluation.during_training.every_n_epochs=2"]
        began = time.time()
        seen = 0
        with subprocess.Popen(command, stdout=sys.stderr, env=ENVIRONMENT) as process:
            while True:
                ended = process.poll() is not None
                path = save_dir / "metrics.jsonl"
                found = (
                    [r for r in read_records(path) if r["kind"] == RECORD] if path.exists() else []
                )
                for record in found[seen:]:
                    minutes: float = (record["time"] - began) / 60
                    say(
                        what="tml",
                        step=record["step"],
                        minutes=minutes,
                        validation_mrr=record["mrr"],
                    )
                    if record["mrr"] > target:
                        process.send_signal(signal.SIGTERM)
                        return minutes
                seen = len(found)
                if ended:
                    return None
                time.sleep(0.2)


def run(data: Path, work: Path, num_epochs: int) -> None:
    """Both, one after the other."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        graph = Path(name) / "graph"
        prepare(data, graph)
        mrr, minutes = measure_biggraph(work, graph, num_epochs)
        own = measure_own(graph, mrr)
    ratio = None if own is None else own / minutes
    say(what="time to quality", validation_mrr=mrr, biggraph=minutes, tml=own, ratio=ratio)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time to PyTorch-BigGraph's quality.")
    parser.add_argument("--data", type=Path, required=True, help="folder of FB15k-237's TSV files")
    parser.add_argument("--work", type=Path, help="keeps PBG's environment")
    parser.add_argument("--epochs", type=int, default=biggraph.FB15K["num_epochs"], help="of PBG")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        run(arguments.data, work, arguments.epochs)


if __name__ == "__main__":
    main()
