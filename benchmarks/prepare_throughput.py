"""Speed and memory of projects/twhin/prepare.py on a file of string edges, made here.

    python benchmarks/prepare_throughput.py [--edges 10000000] [--repeats 1]

Prints a JSON line for each repeat: wall seconds and peak resident memory of the whole process,
edges/s, and the ratio of its time to that of a process that only reads the same file with polars,
run right after it. The bar, on 2 cores: 10 M edges in under 60 s and under 4 GiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[1]
RELATIONS = ("fav", "reply", "retweet", "magic_recs")
READ = (
    "import polars, sys; "
    "polars.read_csv(sys.argv[1], separator='\\t', has_header=False, infer_schema=False)"
)


def write_edges(path: Path, num_edges: int) -> None:
    """TSV of user, relation, tweet; users and tweets fall off as 1/rank."""
    random = np.random.default_rng(1)
    num_users, num_tweets = max(2, num_edges // 10), max(2, num_edges // 20)

    def draw(number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        rank = (number ** random.random(num_edges)).astype(np.int64)
        # Frequent entities are not those of small numbers.
        return (rank * 2_654_435_761) % number

    # Half of the users are drawn evenly, so that there are many of few edges.
    users = np.where(
        random.random(num_edges) < 0.5, draw(num_users), random.integers(0, num_users, num_edges)
    )
    columns = {"u": users, "r": random.integers(0, 4, num_edges), "t": draw(num_tweets)}
    pl.DataFrame(columns).select(
        pl.format("user_{}", "u"),
        pl.col("r").replace_strict(range(4), RELATIONS),
        pl.format("tweet_{}", "t"),
    ).write_csv(path, separator="\t", include_header=False)


def measure(command: Sequence[str]) -> tuple[float, float]:
    """Wall seconds and peak resident memory (GiB) of a command that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed with wait status {status}")
    return wall_s, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edges.tsv"
        write_edges(path, arguments.edges)
        prepare = [sys.executable, str(ROOT / "projects/twhin/prepare.py"), "--overwrite"]
        prepare += ["--train", str(path), "--output", str(Path(folder) / "graph")]
        prepare += [f"--relation={name}=user:tweet" for name in RELATIONS]
        for _ in range(arguments.repeats):
            wall_s, peak_gib = measure(prepare)
            read_s, _ = measure([sys.executable, "-c", READ, str(path)])
            counts = json.loads((Path(folder) / "graph" / "counts.json").read_text())
            record = {
                "benchmark": "prepare_throughput",
                "edges": arguments.edges,
                "file_mb": round(path.stat().st_size / 1e6),
                "users": counts["entities"]["user"]["all"],
                "tweets": counts["entities"]["tweet"]["all"],
                "wall_s": round(wall_s, 1),
                "peak_gib": round(peak_gib, 2),
                "edges_per_s": round(arguments.edges / wall_s),
                "polars_read_s": round(read_s, 1),
                "ratio_to_read": round(wall_s / read_s, 1),
                "cores": len(os.sched_getaffinity(0)),
                "load": round(os.getloadavg()[0], 1),
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
