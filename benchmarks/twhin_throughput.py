"""How fast TwHIN trains, beside PyTorch-BigGraph 1.0.0 and bare loops; its memory, its start.

    python benchmarks/twhin_throughput.py [--part throughput reader memory scaling start]
        [--work FOLDER] [--rounds 3] [--epochs 4]                (PYTHONPATH=. of the repository)

The graph is made here: 500,000 nodes, 1 M edges, 4 relations (translation); D = 128, batches of
10,000 edges, 100 uniform negatives a side shared by chunks of 100, softmax, row-wise Adagrad.
Prints one JSON line a measurement and one with the medians of each part.

    throughput  In turns, each in a process of its own: run.py's own program, reading included, by
                its records from the second to the last; PBG with 2 workers, by its log, which
                leaves its loading and saving out; and two loops over the same shapes in plain
                autograd that neither read nor update: `bare` gathers rows by torch, and `fbgemm`
                by FBGEMM's table-batched embedding. Then where a step's time goes, and the rate
                that memory traffic alone would allow: the bytes that a step must move by the rate
                at which rows are gathered here, in the same process.
    reader      Batches from parquet on one core, without and with the drawing of negatives.
    memory      Resident memory over 10 M edges, above tables and optimizer state.
    scaling     Cost of an edge in runs over 10^5, 10^6 and 10^7 edges.
    start       From the command to the first step done.

Rates are by the clock and, `per_processor_s`, by the processor time of all threads, which other
work on the machine disturbs less; `load` is what was waiting for processors.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import biggraph  # type: ignore[import-not-found]
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from projects.twhin import run as program
from projects.twhin.config import TwhinConfig
from projects.twhin.data import EdgeLayout, build_reader, read_batches
from projects.twhin.model import TwhinModel, build_relation_optimizer, table_specs
from tml.data.parquet import Position
from tml.distributed import Job
from tml.embeddings import build_tables
from tml.logs import MetricLog, read_records
from tml.memory import keep_freed_memory
from tml.row_tables import RowTables

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "projects/twhin/run.py"
NODES, EDGES, RELATIONS, DIM = 500_000, 1_000_000, 4, 128
BATCH, NEGATIVES = 10_000, 100
PARTS = ("throughput", "reader", "memory", "scaling", "start")
ALONE = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


def say(**record: Any) -> None:
    """One JSON line."""
    record["load"] = os.getloadavg()[0]
    shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
    print(json.dumps(shown), flush=True)


def make_edges(num_edges: int) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Uniform edges: hardly a row is there twice in a batch."""
    random = np.random.default_rng(1)
    high = {"lhs": NODES, "rel": RELATIONS, "rhs": NODES}
    return {name: random.integers(0, number, num_edges) for name, number in high.items()}


def write_parquet(folder: Path, num_edges: int) -> Path:
    """The edges in a file, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{num_edges}.parquet"
    if not path.exists():
        pq.write_table(pa.table(make_edges(num_edges)), path, row_group_size=1 << 16)
    return path


def config_of(path: Path, num_epochs: int, log_every: int) -> dict[str, Any]:
    """The config of run.py."""
    table = {
        "name": "node",
        "num_embeddings": NODES,
        "embedding_dim": DIM,
        "optimizer": {"rowwise_adagrad": {"lr": 0.1}},
    }
    relations = [
        {"name": f"r{number}", "lhs": "node", "rhs": "node", "operator": "translation"}
        for number in range(RELATIONS)
    ]
    return {
        "training": {"num_epochs": num_epochs, "train_log_every_n": log_every},
        "model": {
            "translation_optimizer": {"adagrad": {"lr": 0.1}},
            "loss": {"softmax": {}},
            "init_scale": 0.001,
            "embeddings": {"tables": [table]},
            "relations": relations,
        },
        "train_data": {
            "data_root": str(path),
            "per_replica_batch_size": BATCH,
            "global_negatives": NEGATIVES,
            "chunk_size": 100,
        },
    }


# What runs in a process of its own.


def train(path: str, num_epochs: int, log_every: int) -> dict[str, Any]:
    """run.py's program, by its records from the second on."""
    marks: list[tuple[float, float, int, int]] = []
    original = MetricLog.train

    def marked(self: MetricLog, record: Any) -> None:
        original(self, record)
        seen, memory = record["examples_seen"], record["memory_bytes"]
        marks.append((time.perf_counter(), time.process_time(), seen, memory))

    MetricLog.train = marked  # type: ignore[method-assign]
    tree = config_of(Path(path), num_epochs, log_every)
    with tempfile.TemporaryDirectory() as folder:
        program.run(TwhinConfig.model_validate(tree), Path(folder) / "run")
    first, last = marks[0], marks[-1]
    edges = last[2] - first[2]
    return {
        "edges_per_s": edges / (last[0] - first[0]),
        "edges_per_processor_s": edges / (last[1] - first[1]),
        "memory": [mark[3] for mark in marks],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def bare(seconds: float) -> dict[str, Any]:
    """Forward and backward by autograd on rows that torch gathers."""
    weight = torch.randn(NODES, DIM) * 0.001
    return autograd_loop(lambda ids: [weight.index_select(0, one) for one in ids], seconds)


def fbgemm(seconds: float) -> dict[str, Any]:
    """The same on rows that FBGEMM looks up."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        EmbeddingLocation,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(NODES, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
    )
    table.init_embedding_weights_uniform(-0.001, 0.001)
    offsets = torch.arange(4 * BATCH + 1)  # bags of one

    @torch.no_grad()
    def look_up(ids: Sequence[Tensor]) -> Sequence[Tensor]:
        rows: Tensor = table(torch.cat(list(ids)), offsets)
        return [piece.detach() for piece in rows.split([len(one) for one in ids])]

    return autograd_loop(look_up, seconds)


def autograd_loop(
    look_up: Callable[[Sequence[Tensor]], Sequence[Tensor]], seconds: float
) -> dict[str, Any]:
    """Steps without a reader and without an update; look_up: ids, (n,) each → rows, (n, D) each."""
    translations = torch.zeros(RELATIONS, DIM, requires_grad=True)
    chunks = BATCH // 100
    lengths = [BATCH, BATCH, chunks * NEGATIVES, chunks * NEGATIVES]

    def step() -> None:
        found = look_up([torch.randint(NODES, (length,)) for length in lengths])
        lhs, rhs, lhs_negatives, rhs_negatives = (one.requires_grad_() for one in found)
        relation = torch.randint(RELATIONS, (BATCH,)).sort().values
        moved = lhs + torch.nn.functional.embedding(relation, translations)
        positive = (moved * rhs).sum(dim=1, keepdim=True)
        total = torch.zeros(())
        for queries, drawn in ((moved, rhs_negatives), (rhs, lhs_negatives)):
            together = queries.view(chunks, -1, DIM)
            scores = torch.bmm(together, drawn.view(chunks, -1, DIM).transpose(1, 2))
            joined = torch.cat([positive, scores.flatten(0, 1)], dim=1)
            total = total - joined.log_softmax(dim=1)[:, 0].sum()
        (total / BATCH).backward()
        translations.grad = None

    for _ in range(5):
        step()
    start, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < start + seconds:
        step()
        count += 1
    clock, processor = time.perf_counter() - start, time.process_time() - used
    return {
        "edges_per_s": count * BATCH / clock,
        "edges_per_processor_s": count * BATCH / processor,
    }


def breakdown(path: str, steps: int) -> dict[str, Any]:
    """Milliseconds of a step's parts, medians, and the limit that memory traffic sets."""
    keep_freed_memory()
    spent: dict[str, list[float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent.setdefault(name, []).append(1e3 * (time.perf_counter() - start))

    config = TwhinConfig.model_validate(config_of(Path(path), 100, 10))
    layout = EdgeLayout(config.model)
    tables = build_tables(table_specs(config.model), ALONE, 1)
    assert isinstance(tables, RowTables)
    (table,) = tables._tables.values()
    for owner, method, name in ((tables, "forward", "gather"), (table, "update_rows", "update")):
        original = getattr(owner, method)

        def wrapped(*given: Any, act: Callable[..., Any] = original, name: str = name) -> Any:
            with timed(name):
                return act(*given)

        setattr(owner, method, wrapped)
    model = TwhinModel(config.model, tables)
    optimizer, _ = build_relation_optimizer(config.model, model)
    reader = build_reader(config.train_data, layout, ALONE, 1, 100, 1)
    batches = read_batches(reader, layout, config.train_data, ALONE, 1, Position(), 0)
    for _ in range(steps):
        with timed("read and draw"):
            batch, _ = next(batches)
        with timed("whole"):
            (model(batch, config.train_data) / batch.num_edges_all).backward()
            optimizer.step()
            optimizer.zero_grad()
    found = {name: statistics.median(values[5:]) for name, values in spent.items()}
    found["products and gradients"] = found.pop("whole") - found["gather"] - found["update"]
    rows = 4 * BATCH  # both ends and the negatives of both sides
    # Rows read and copied, copies read and gradients written, gradients and rows read and rows
    # written: what caches hold between them is not left out.
    moved = 7 * rows * DIM * 4
    rate = gather_rate(table.weight)
    return {
        "milliseconds": {name: round(value, 2) for name, value in found.items()},
        "moved_bytes": moved,
        "gather_bytes_per_s": rate,
        "limit_edges_per_s": BATCH * rate / moved,
    }


def gather_rate(weight: Tensor) -> float:
    """Bytes/s of gathering random rows, read and written ones counted; the best of many."""
    out = torch.empty(4 * BATCH, DIM)
    best = 0.0
    for _ in range(40):
        ids = torch.randint(len(weight), (len(out),))
        start = time.perf_counter()
        torch.index_select(weight, 0, ids, out=out)
        best = max(best, 2 * out.numel() * 4 / (time.perf_counter() - start))
    return best


def read(path: str, num_epochs: int) -> dict[str, Any]:
    """Edges/s of the reader alone and with negatives, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    config = TwhinConfig.model_validate(config_of(Path(path), num_epochs, 10))
    layout = EdgeLayout(config.model)
    data = config.train_data
    reader = build_reader(data, layout, ALONE, 1, num_epochs, 1)
    found: dict[str, Any] = {}
    for name, batches in (
        ("reader", reader.batches(Position())),
        ("with_negatives", read_batches(reader, layout, data, ALONE, 1, Position(), 0)),
    ):
        start, used = time.perf_counter(), time.process_time()
        steps = sum(1 for _ in batches)
        edges = min(steps * BATCH, reader.num_rows * num_epochs)
        found[f"{name}_edges_per_s"] = edges / (time.perf_counter() - start)
        found[f"{name}_edges_per_processor_s"] = edges / (time.process_time() - used)
    return found


CHILDREN = {one.__name__: one for one in (train, bare, fbgemm, breakdown, read)}


def in_child(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function of CHILDREN returns in a fresh process with a thread a processor."""
    given = json.dumps([function.__name__, *arguments])
    command = [sys.executable, __file__, "--child", given]
    threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return found


# The parts.


def measure_throughput(work: Path, rounds: int, num_epochs: int) -> None:
    """tml, PBG and the bare loops in turns."""
    path = write_parquet(work / "graphs", EDGES)
    python = biggraph.environment(work)
    relations = [{"name": f"r{number}", "operator": "translation"} for number in range(RELATIONS)]
    settings = {**biggraph.SETTINGS, "num_epochs": num_epochs}
    names = ("tml", "biggraph", "bare", "fbgemm")
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        graph = Path(folder) / "graph"
        biggraph.write_graph(python, graph, make_edges(EDGES), NODES)
        for _ in range(rounds):
            made = in_child(train, str(path), num_epochs, 20)
            rates["tml"].append({k: v for k, v in made.items() if k.startswith("edges")})
            epochs = biggraph.train(python, graph, settings, relations)
            edges = sum(epoch.edges for epoch in epochs)
            rates["biggraph"].append(
                {
                    "edges_per_s": edges / sum(epoch.seconds for epoch in epochs),
                    "edges_per_processor_s": edges / sum(epoch.processor_s for epoch in epochs),
                }
            )
            for loop in (bare, fbgemm):
                rates[loop.__name__].append(in_child(loop, 5.0))
            for name, each in rates.items():
                say(what="training", by=name, **each[-1])
    medians = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for name, each in rates.items()
    }
    parts = in_child(breakdown, str(path), 60)
    own = medians["tml"]
    say(what="step", **parts, share_of_limit=own["edges_per_s"] / parts["limit_edges_per_s"])
    say(
        what="throughput",
        rounds=rounds,
        **{name: each["edges_per_s"] for name, each in medians.items()},
        **{
            f"{name}_per_processor_s": each["edges_per_processor_s"]
            for name, each in medians.items()
        },
        **{
            f"ratio_to_{name}{suffix}": own[key] / medians[name][key]
            for name in names[1:]
            for suffix, key in (("", "edges_per_s"), ("_by_processor", "edges_per_processor_s"))
        },
    )


def measure_reader(work: Path, rounds: int) -> None:
    """Bar: 5 M edges/s of the reader alone on one core."""
    path = write_parquet(work / "graphs", EDGES)
    found = [in_child(read, str(path), 10) for _ in range(rounds)]
    say(what="reader", **{key: statistics.median(one[key] for one in found) for key in found[0]})


def measure_memory(work: Path) -> None:
    """Bar: at most 500 MB above tables and optimizer state, and flat."""
    found = in_child(train, str(write_parquet(work / "graphs", 10 * EDGES)), 1, 50)
    held = NODES * (DIM + 1) * 4
    memory = found["memory"]
    say(
        what="memory",
        edges=10 * EDGES,
        tables_and_state_bytes=held,
        after_the_first_twentieth=memory[0],
        highest_while_training=max(memory),
        at_the_end=memory[-1],
        above_tables_and_state=max(memory) - held,
        growth_from_first_record=memory[-1] - memory[0],
        highest_with_saving_and_export=found["peak"],
    )


def measure_scaling(work: Path, rounds: int) -> None:
    """Bar: flat from 10^5 to 10^7 edges. In turns; as many steps of each size as make sense."""
    sizes = {EDGES // 10: 20, EDGES: 3, 10 * EDGES: 1}
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size, num_epochs in sizes.items():
            path = write_parquet(work / "graphs", size)
            found[size].append(in_child(train, str(path), num_epochs, 10))
    for key in ("edges_per_s", "edges_per_processor_s"):
        costs = {
            size: 1e6 / statistics.median(one[key] for one in each) for size, each in found.items()
        }
        say(
            what="scaling",
            by=key,
            microseconds_an_edge={str(size): round(cost, 3) for size, cost in costs.items()},
            highest_to_lowest=max(costs.values()) / min(costs.values()),
        )


def measure_start(work: Path, rounds: int) -> None:
    """Bar: 8 s from the command to the first step done, for 1 M edges."""
    path = write_parquet(work / "graphs", EDGES)
    launchers = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nnodes=1"],
        "tml.torchrun": ["-m", "tml.torchrun", "--standalone", "--nnodes=1"],
        "python": [],
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    times: dict[str, list[float]] = {name: [] for name in launchers}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(json.dumps(config_of(path, 1, 10)))  # JSON is YAML
        for number in range(rounds):
            for name, launcher in launchers.items():
                own = ["--nproc_per_node=1"] if launcher else []
                save_dir = Path(folder) / f"{name}{number}"
                command = [sys.executable, *launcher, *own, str(RUN), f"--save_dir={save_dir}"]
                command += [f"--config_yaml_path={config}", "--set", "training.num_train_steps=1"]
                start = time.perf_counter()
                with subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=environment,
                ) as process:
                    assert process.stdout is not None
                    for line in process.stdout:
                        if "first step done" in line:
                            times[name].append(time.perf_counter() - start)
                assert not process.returncode, f"{' '.join(command)} failed"
                assert read_records(save_dir / "metrics.jsonl")
    for name, each in times.items():
        say(what="start", launcher=name, seconds=statistics.median(each), each=each)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed and memory of TwHIN.")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--work", type=Path, help="keeps PBG's environment and graphs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of 1 M edges, of each turn")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, *given = json.loads(arguments.child)
        out = sys.stdout
        sys.stdout = sys.stderr
        print(json.dumps(CHILDREN[name](*given)), file=out)
        return
    say(what="machine", processors=len(os.sched_getaffinity(0)), torch=torch.__version__)
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Callable[[], None]] = {
            "throughput": lambda: measure_throughput(work, arguments.rounds, arguments.epochs),
            "reader": lambda: measure_reader(work, arguments.rounds),
            "memory": lambda: measure_memory(work),
            "scaling": lambda: measure_scaling(work, arguments.rounds),
            "start": lambda: measure_start(work, arguments.rounds),
        }
        for name in arguments.part:
            parts[name]()


if __name__ == "__main__":
    main()
