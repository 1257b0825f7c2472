"""A run's vectors measured on the edges of its config: link prediction and retrieval.

From the command line, on the best step of a run by validation, or else its newest:

    python projects/twhin/evaluate.py --run=RUN_FOLDER [--step=N|best|newest] [--split=test]
        [--json]
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from projects.twhin import planted
from projects.twhin.config import TwhinConfig
from projects.twhin.edges import Edges, count_unseen, join, of_relations, spread, spread_users
from projects.twhin.link_prediction import link_prediction, link_prediction_report
from projects.twhin.ranking import CandidateScorer, Report, Sums
from projects.twhin.report import render
from projects.twhin.retrieval import retrieval, retrieval_report
from projects.twhin.sampled import protocol, sampled_link_prediction
from tml.config import ConfigError
from tml.distributed import Job
from tml.train import GivenUpError


def evaluate_split(
    config: TwhinConfig,
    split: str,
    vectors: CandidateScorer,
    job: Job,
    all_edges: Mapping[str, Edges | None] | None = None,
) -> Report:
    """Measure `vectors` on the config's "test", "validation" or "train" edges, a share a process.

    all_edges: what `read_splits` gives; read here where None. Returns the same report on every
    process; its shape is what `render` and metrics.json know. Raises GivenUpError on every process
    where the scores of one did.
    """
    all_edges = all_edges or read_splits(config)
    asked = all_edges[split]
    if asked is None:
        raise ConfigError(f"the config has no {split}_data to evaluate on")
    known = join([edges for edges in all_edges.values() if edges is not None])
    training = all_edges["train"]
    assert training is not None
    settings, relations = config.evaluation, config.model.relations
    if settings.relations is not None:
        wanted = [i for i, r in enumerate(relations) if r.name in settings.relations]
        asked = of_relations(asked, wanted)
    shard = (job.rank, job.world_size)
    measured = [r.name for r in relations if r.name in (settings.relations or [r.name])]
    with_edges = {relations[number].name for number in np.unique(asked.rel)}
    report: Report = {
        "split": split,
        "edges": len(asked),
        "unseen": count_unseen(asked, training, relations),
        "empty_relations": [name for name in measured if name not in with_edges],
    }
    if settings.link_prediction:
        ranked = spread(asked, settings.max_edges)
        report["link_prediction"] = _link_prediction(config, vectors, ranked, known, shard)
        report["link_prediction"]["protocol"] += _share(ranked, asked)
    if settings.retrieval is not None:
        k = settings.retrieval.k
        ranked = spread_users(asked, settings.max_edges)
        sums = _over_all(lambda: retrieval(vectors, relations, ranked, training, k, shard))
        report["retrieval"] = retrieval_report(relations, sums, k)
        report["retrieval"]["protocol"] += _share(ranked, asked)
    if config.planted is not None and split == "test" and settings.sampled_candidates is None:
        folder = planted.folder_of(config.train_data.data_root)
        report["planted"] = json.loads((folder / planted.PLANTED).read_text())["optimum"]
    return report


def read_splits(config: TwhinConfig) -> dict[str, Edges | None]:
    """Split → its edges, for all splits there can be."""
    return {name: read_split(config, name) for name in ("train", "validation", "test")}


def read_split(config: TwhinConfig, split: str) -> Edges | None:
    """All edges of one of the config's data sections, checked; None where there is none."""
    from projects.twhin.data import COLUMNS, EdgeLayout
    from tml.data.parquet import read_columns

    data = getattr(config, f"{split}_data")
    if data is None:
        return None
    check = EdgeLayout(config.model).check
    columns = read_columns(data.data_root, COLUMNS, data.offset, data.limit, check)
    return Edges(columns["lhs"], columns["rel"], columns["rhs"])


def _link_prediction(
    config: TwhinConfig,
    vectors: CandidateScorer,
    ranked: Edges,
    known: Edges,
    shard: tuple[int, int],
) -> Report:
    relations, number = config.model.relations, config.evaluation.sampled_candidates
    if number is None:
        sums = _over_all(lambda: link_prediction(vectors, relations, ranked, known, shard))
        return link_prediction_report(relations, sums)
    seed = config.training.seed
    sums = _over_all(
        lambda: sampled_link_prediction(vectors, relations, ranked, known, number, seed, shard)
    )
    return link_prediction_report(relations, sums, protocol(number))


def _share(ranked: Edges, asked: Edges) -> str:
    return f"; {len(ranked):,} of {len(asked):,} edges" if len(ranked) < len(asked) else ""


def _over_all(measure: Callable[[], Sums]) -> Sums:
    """The sums of all processes; where one gives up its share, all do, and none waits for it."""
    from tml import distributed

    sums: Sums | None = None
    with suppress(GivenUpError):
        sums = measure()
    if distributed.any_process(sums is None):
        raise GivenUpError
    assert sums is not None
    return distributed.all_reduce_sum(torch.from_numpy(sums)).numpy()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from projects.twhin.best import STEP_HELP, step_argument
    from projects.twhin.export import load_vectors, resolve_run
    from tml.checkpoint import CheckpointError
    from tml.data.parquet import DataError
    from tml.distributed import join as join_job
    from tml.program import add_overrides, announce

    parser = argparse.ArgumentParser(description="Measure the vectors of a run.")
    parser.add_argument("--run", type=Path, required=True, help="run folder (save_dir)")
    parser.add_argument("--step", type=step_argument, help=STEP_HELP)
    parser.add_argument("--split", default="test", choices=("test", "validation", "train"))
    add_overrides(parser, "change one setting of the run's config")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    try:
        folder, config = resolve_run(arguments.run, arguments.step, arguments.overrides)
        with join_job(config.training.eval_timeout_in_s) as job:
            vectors = load_vectors(folder, config.model)
            all_edges = read_splits(config)
            if job.is_chief and (asked := all_edges[arguments.split]) is not None:
                most = min(config.evaluation.max_edges or len(asked), len(asked))
                some = "up to " if config.evaluation.relations is not None else ""
                announce(f"measuring {some}{most:,} edges of {arguments.split}")
            report = evaluate_split(config, arguments.split, vectors, job, all_edges)
            if job.is_chief:
                _show(report, as_json=arguments.json)
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _show(report: Report, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        Console().print(render(report))


if __name__ == "__main__":
    sys.exit(main())
