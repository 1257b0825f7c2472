"""How fast the Heavy Ranker reads, trains and evaluates, on published-shape GZIP TFRecords.

    python benchmarks/ranker_throughput.py [--rows 4096] [--seconds 20] [--only training,reader]

Prints one JSON line a measurement, all taken in this call. Training runs main.py's own loop, reader
included; its FLOP rate (6 × the weights of matrix products, an example) is divided by the rate of
the model's largest matrix products, measured in this process, in the same data type, just before
and after: by the clock, and by processor time, which other work on the machine disturbs less.
`bare` is a loop of the same layers written in plain torch, without reader. The published
program reaches 390 examples/s at batch 128 (reference measurement; 2 cores of a Xeon with AMX).
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import nn

from projects.home.recap import main
from projects.home.recap.config import RecapConfig
from projects.home.recap.data.batch import RankingBatch
from projects.home.recap.data.dataset import build_dataset, describe_features
from projects.home.recap.evaluate import evaluate_model
from projects.home.recap.model.build import build_model
from projects.home.recap.model.describe import describe
from projects.home.recap.update import Update
from tml.config import load_config
from tml.data.tfrecord import TFRecordWriter, read_blocks
from tml.distributed import Job
from tml.logs import read_records
from tml.train import StepResult

ROOT = Path(__file__).resolve().parents[1]
LOCAL_PROD = ROOT / "projects/home/recap/config/local_prod.yaml"
PUBLISHED_RATE = 390
SETTINGS = (("fp32", 128), ("fp32", 512), ("bf16", 512), ("bf16", 2048), ("fp32", 2048))
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALONE = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


def say(**record: Any) -> None:
    """One JSON line."""
    print(json.dumps({k: _round(v) for k, v in record.items()}), flush=True)


def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def gemm_rate(kind: str, seconds: float = 1.5) -> tuple[float, float]:
    """FLOP/s of the better of a square product and the first mask layers' own: by the clock, the
    best of many; and per second of processor time, of all of them.
    """
    clock, processor = 0.0, 0.0
    for rows, inputs, outputs in ((2048, 2048, 2048), (512, 2776, 4096)):
        x = torch.randn(rows, inputs, dtype=TYPES[kind])
        weight = torch.randn(outputs, inputs, dtype=TYPES[kind])
        flops, count = 2 * rows * inputs * outputs, 0
        used, end = time.process_time(), time.perf_counter() + seconds / 2
        while time.perf_counter() < end:
            start = time.perf_counter()
            nn.functional.linear(x, weight)
            clock = max(clock, flops / (time.perf_counter() - start))
            count += 1
        processor = max(processor, count * flops / (time.process_time() - used))
    return clock, processor


def make_data_files(folder: Path, rows: int, files: int) -> None:
    """The generator's rows in so many files."""
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "projects/home/recap/data/generate_random_data.py"),
            f"--config_path={LOCAL_PROD}",
            f"--n_examples={rows}",
            f"--n_files={files}",
            f"--output_dir={folder}",
        ],
        check=True,
        stdout=sys.stderr,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def config_of(data: Path, *overrides: str) -> RecapConfig:
    """The published configuration on the data in a folder."""
    more = [f"train_data.inputs={data}/*", "validation_data={}", *overrides]
    return load_config(RecapConfig, LOCAL_PROD, more)


def train(data: Path, kind: str, batch: int, seconds: float, folder: Path) -> tuple[float, float]:
    """Examples/s of main.py's loop after its first steps: by the clock (the median step) and per
    second of processor time.
    """
    guess = 800 if batch >= 512 else 500
    steps = max(8, int(seconds * guess / batch))
    config = config_of(
        data,
        f"train_data.global_batch_size={batch}",
        f"training.num_train_steps={steps}",
        "training.checkpoint_every_n=null",
        f"training.train_log_every_n={steps}",
        f"runtime.enable_amp={kind == 'bf16'}",
    )
    marks: list[tuple[float, float]] = []

    class Marked(Update):
        def __call__(self, batch: RankingBatch, step: int) -> StepResult:
            result = super().__call__(batch, step)
            marks.append((time.perf_counter(), time.process_time()))
            return result

    original, main.Update = main.Update, Marked  # type: ignore[misc]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            main.run(config, folder)
    finally:
        main.Update = original  # type: ignore[misc]
    marks = marks[2:]
    clock = batch / statistics.median(b[0] - a[0] for a, b in pairwise(marks))
    return clock, batch * (len(marks) - 1) / (marks[-1][1] - marks[0][1])


class Bare(nn.Module):
    """The published network in plain torch: no featurisation, ten towers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = nn.ModuleList(
            nn.Sequential(nn.Linear(2776, 1024), nn.ReLU(), nn.Linear(1024, 2776)) for _ in range(4)
        )
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(2776, 1024), nn.LayerNorm(1024)) for _ in range(4)
        )
        self.mlp = nn.Sequential(nn.Linear(4096, 2048), nn.ReLU())
        self.towers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1)
            )
            for _ in range(10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 2776) → (B, 10) logits."""
        pairs = zip(self.masks, self.hidden, strict=True)
        blocks = [hidden(x * mask(x)) for mask, hidden in pairs]
        shared = self.mlp(torch.cat(blocks, dim=1))
        return torch.cat([tower(shared) for tower in self.towers], dim=1)


def bare(kind: str, batch: int, seconds: float) -> float:
    """Examples/s of forward, backward and fused Adam without any reading: the median step."""
    model = Bare()
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    x, y = torch.randn(batch, 2776), (torch.rand(batch, 10) < 0.1).float()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 4:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            logits = model(x)
        nn.functional.binary_cross_entropy_with_logits(logits.float(), y).backward()
        adam.step()
        adam.zero_grad()
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times[1:])


def measure_training(gz: Path, scratch: Path, seconds: float) -> None:
    """Each setting beside the matrix products and the bare loop."""
    flops = describe(config_of(gz).model, describe_features(config_of(gz).train_data))
    for number, (kind, batch) in enumerate(SETTINGS):
        before = gemm_rate(kind)
        rate, processor = train(gz, kind, batch, seconds, scratch / f"run{number}")
        between = gemm_rate(kind)
        plain = bare(kind, batch, seconds / 2)
        gemm, gemm_processor = map(max, zip(before, between, gemm_rate(kind), strict=True))
        say(
            what="training",
            type=kind,
            batch=batch,
            examples_per_s=rate,
            gflops=rate * flops["flops_per_example"] / 1e9,
            gemm_gflops=gemm / 1e9,
            ratio_to_gemm=rate * flops["flops_per_example"] / gemm,
            ratio_by_processor_time=processor * flops["flops_per_example"] / gemm_processor,
            bare_examples_per_s=plain,
            ratio_to_bare=rate / plain,
            ratio_to_published=rate / PUBLISHED_RATE,
            limit_examples_per_s=gemm / flops["flops_per_example"],
        )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, for rates a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read_all(config: RecapConfig) -> int:
    """Rows of one pass, in file order."""
    features = describe_features(config.train_data)
    dataset = build_dataset(config.train_data, features, ALONE, 1, 512, num_epochs=1, shuffle=False)
    return sum(len(batch) for batch, _ in dataset.batches(dataset.start()))


def rate_of(read: Callable[[], int], turns: int = 3) -> tuple[float, float]:
    """Rows a second of the best turn: by the clock, and by processor time of this process."""
    clock, processor = 0.0, 0.0
    for _ in range(turns):
        start, used = time.perf_counter(), time.process_time()
        rows = read()
        clock = max(clock, rows / (time.perf_counter() - start))
        processor = max(processor, rows / (time.process_time() - used))
    return clock, processor


def inflate(folder: Path, rows: int) -> int:
    """Inflate and throw away; the limit of any reader of GZIP files."""
    from isal import igzip

    for path in sorted(folder.glob("*.gz")):
        with igzip.open(path) as file:
            while file.read(1 << 20):
                pass
    return rows


def to_plain(gz: Path, plain: Path) -> None:
    """The same records without compression."""
    plain.mkdir()
    for path in sorted(gz.glob("*.gz")):
        with TFRecordWriter(plain / path.stem, compression=None) as writer:
            for block in read_blocks(path):
                for index in range(len(block)):
                    writer.write(block.record(index))


def to_parquet(config: RecapConfig, folder: Path) -> RecapConfig:
    """The same rows as parquet with a feature spec, as a user would keep them."""
    folder.mkdir()
    features = describe_features(config.train_data)
    dataset = build_dataset(
        config.train_data, features, ALONE, 1, 1024, num_epochs=1, shuffle=False
    )
    tables = []
    for batch, _ in dataset.batches(dataset.start()):
        lists = {"continuous": batch.continuous, **batch.vectors}
        columns: dict[str, Any] = {
            name: pa.FixedSizeListArray.from_arrays(
                pa.array(values.numpy().reshape(-1)), values.shape[1]
            )
            for name, values in lists.items()
        }
        flags = pa.array(batch.binary.numpy().astype(np.int8).reshape(-1))
        columns["binary"] = pa.FixedSizeListArray.from_arrays(flags, batch.binary.shape[1])
        columns |= {
            task: batch.labels[:, number].numpy().astype(np.int8)
            for number, task in enumerate(features.tasks)
        }
        tables.append(pa.table(columns))
    pq.write_table(
        pa.concat_tables(tables), folder / "part-0.parquet", row_group_size=512, compression="none"
    )
    spec = {
        "continuous": [{"column": "continuous", "width": features.num_continuous}],
        "binary": [{"column": "binary", "width": features.num_binary}],
        "vectors": features.vectors,
        "labels": list(features.tasks),
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    data = {
        "inputs": f"{folder}/*.parquet",
        "feature_spec": f"{folder}/spec.yaml",
        "tasks": dict.fromkeys(features.tasks),
    }
    return config.model_copy(update={"train_data": type(config.train_data).model_validate(data)})


def measure_reader(gz: Path, scratch: Path, rows: int) -> None:
    """One process, one thread: files to batches."""
    plain = scratch / "plain"
    to_plain(gz, plain)
    sources = {"gzip": config_of(gz), "plain": config_of(plain)}
    sources["parquet"] = to_parquet(sources["plain"], scratch / "parquet")
    with one_thread():
        limit, _ = rate_of(lambda: inflate(gz, rows))
        for name, config in sources.items():
            clock, processor = rate_of(lambda config=config: read_all(config))  # type: ignore[misc]
            more = {"inflating_alone": limit, "ratio_to_inflating": clock / limit}
            say(
                what="reader",
                format=name,
                examples_per_s=clock,
                examples_per_processor_s=processor,
                **(more if name == "gzip" else {}),
            )


def measure_evaluation(gz: Path, scratch: Path, rows: int, seconds: float) -> None:
    """Forward passes and all metrics against training, same data type and batch."""
    trained, _ = train(gz, "fp32", 512, seconds, scratch / "for_evaluation")
    config = config_of(gz)
    partition = config.train_data.model_copy(update={"global_batch_size": 512})
    training = config.training.model_copy(update={"num_eval_steps": None})
    config = config.model_copy(update={"validation_data": {"all": partition}, "training": training})
    features = describe_features(config.train_data)
    model, _ = build_model(config, features, ALONE)
    clock, _ = rate_of(lambda: _evaluated(config, features, model, rows), turns=2)
    say(what="evaluation", examples_per_s=clock, ratio_to_training=clock / trained)


def _evaluated(config: RecapConfig, features: Any, model: Any, rows: int) -> int:
    evaluate_model(config, features, model, ALONE)
    return rows


def measure_ranks(gz: Path, scratch: Path, batch: int, seconds: float) -> None:
    """Two ranks of one thread against one process of two, each a process of its own, in turns."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    steps = max(12, int(seconds * 800 / batch) // 6 * 6)
    for turn in range(4):
        ranks = 1 + turn % 2
        folder = scratch / f"ranks{turn}"
        command = [sys.executable, "-m", "tml.torchrun", "--standalone", "--nnodes", "1"]
        command += ["--nproc_per_node", str(ranks), str(Path(main.__file__))]
        command += [f"--config_path={LOCAL_PROD}", f"--save_dir={folder}"]
        for override in (
            f"train_data.inputs={gz}/*.gz",
            "validation_data={}",
            f"train_data.global_batch_size={batch}",
            f"training.num_train_steps={steps}",
            "training.checkpoint_every_n=null",
            f"training.train_log_every_n={steps // 6}",
        ):
            command += ["--set", override]
        threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
        found = read_records(folder / "metrics.jsonl")
        rates[ranks].append(
            statistics.median([r["rate"] for r in found if r["kind"] == "train"][1:])
        )
    one, two = max(rates[1]), max(rates[2])
    say(what="ranks", batch=batch, one_process=one, two_ranks=two, ratio=two / one)


def measure_scaling(gz: Path, scratch: Path, rows: int) -> None:
    """Reader's cost an example with file count: the same records in 4 files and in 64."""
    many = scratch / "many"
    make_data_files(many, rows, 64)
    four, _ = rate_of(lambda: read_all(config_of(gz)))
    more, _ = rate_of(lambda: read_all(config_of(many)))
    say(what="files", files_4=four, files_64=more, ratio=more / four)


def run(arguments: argparse.Namespace) -> None:
    """Everything that was asked for, in one call."""
    only = set(arguments.only.split(",")) if arguments.only else None
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    say(what="machine", threads=threads, torch=torch.__version__, load=os.getloadavg()[0])
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        gz = scratch / "gz"
        make_data_files(gz, arguments.rows, 4)
        parts: dict[str, Callable[[], None]] = {
            "reader": lambda: measure_reader(gz, scratch, arguments.rows),
            "files": lambda: measure_scaling(gz, scratch, arguments.rows),
            "training": lambda: measure_training(gz, scratch, arguments.seconds),
            "evaluation": lambda: measure_evaluation(
                gz, scratch, arguments.rows, arguments.seconds
            ),
            "ranks": lambda: measure_ranks(gz, scratch, arguments.ranks_batch, arguments.seconds),
        }
        for part, measure in parts.items():
            if only is None or part in only:
                measure()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Throughput of the Heavy Ranker.")
    parser.add_argument("--rows", type=int, default=4096, help="examples that are generated")
    parser.add_argument("--seconds", type=float, default=20, help="of each training measurement")
    parser.add_argument("--ranks_batch", type=int, default=1024, help="global batch of the ranks")
    parser.add_argument("--only", help="reader,files,training,evaluation,ranks")
    run(parser.parse_args())
