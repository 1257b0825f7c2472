"""Recall and diversity of mixtures beside the single vector on a run's test edges.

    python benchmarks/twhin_mixtures.py --run=RUN_FOLDER --relation=long_view
        [--clusters=64] [--tuning-users=2000] [--k=20,50]

Prints JSON lines: what was tried where settings are chosen (validation edges, or training edges
held out where the run has none; never the test edges), then on the test edges the single vector,
the mixture with the chosen settings, and the same asked by centroids alone (blend 0, as in
kNN-Embed, arXiv 2205.06205), each with the seconds it took.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from projects.twhin.export import load_vectors, resolve_run
from projects.twhin.mixtures import TUNING_USERS, Comparison, Settings, Subject, tune


def timed(measure: Callable[[], Any]) -> tuple[Any, float]:
    """What `measure` returns, and how long it took in seconds."""
    start = time.perf_counter()
    return measure(), round(time.perf_counter() - start, 1)


def tell(what: str, seconds: float, values: dict[str, Any]) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"what": what, "seconds": seconds, **rounded}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--relation", required=True)
    parser.add_argument("--clusters", type=int, default=Settings.clusters)
    parser.add_argument("--tuning-users", type=int, default=TUNING_USERS)
    parser.add_argument("--k", default="20,50")
    arguments = parser.parse_args()
    k = sorted(int(part) for part in arguments.k.split(","))
    folder, config = resolve_run(arguments.run, None)
    subject = Subject(config, load_vectors(folder, config.model), arguments.relation)
    (settings, tuning), seconds = timed(
        lambda: tune(subject, Settings(clusters=arguments.clusters), k, arguments.tuning_users)
    )
    for row in tuning.pop("tried"):
        tell("tried", 0.0, row)
    tell("tuning", seconds, {**tuning, "threads": torch.get_num_threads()})
    sought = subject.history("test")
    if sought is None:
        raise SystemExit("the run has no test_data")
    comparison = Comparison(subject, subject.training, sought, settings, k)
    single, seconds = timed(comparison.single)
    tell("single", seconds, {"users": len(comparison.users), **single})
    for name, chosen in (("mixture", settings), ("centroids", replace(settings, blend=0.0))):
        found, seconds = timed(lambda chosen=chosen: comparison.mixture(chosen))
        tell(name, seconds, {**asdict(chosen), **found})


if __name__ == "__main__":
    main()
