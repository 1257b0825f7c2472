"""Users as mixtures of interests (kNN-Embed, arXiv 2205.06205): candidates by several weighted
modes, measured beside those of the single vector, and the modes as files.

    python projects/twhin/mixtures.py --run=RUN_FOLDER --relation=long_view [--clusters=64]
        [--modes=5] [--neighbors=100] [--smoothing=.2] [--blend=.7] [--tune] [--k=10,20,50]
        [--split=test] [--json] [--output=FOLDER]

Items are clustered (`clusters`), users become modes (`modes`), modes bring candidates in proportion
to their weights (`mixture_retrieval`), candidates are measured (`mixture_report`) and modes written
(`mixture_files`). One process; the largest arrays have a row a user or an item, never both.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from projects.twhin.clusters import Clusters, cluster
from projects.twhin.config import TableConfig, TwhinConfig
from projects.twhin.edges import Edges, Ids
from projects.twhin.evaluate import read_split
from projects.twhin.history import History
from projects.twhin.mixture_report import PROTOCOL, Report, Tally, render
from projects.twhin.mixture_retrieval import Retrieval, retrieve
from projects.twhin.model import Vectors
from projects.twhin.modes import NOBODY, Mixture, Modes, Space
from tml.config import ConfigError
from tml.program import announce

BLOCK_USERS = 2048
HELD_OUT = 0.2
"""The share of each user's training edges that --tune holds out where there is no validation."""
TUNING_USERS = 2000
GRID: dict[str, tuple[Any, ...]] = {
    "blend": (0.0, 0.3, 0.5, 0.7, 0.85),
    "smoothing": (0.0, 0.2, 0.5, 0.8),
    "modes": (2, 3, 5, 10),
}
"""Values that --tune tries, of one setting after the other, at last of the first again."""


@dataclass(frozen=True)
class Settings:
    """How users become mixtures. Raises ConfigError for values that mean nothing."""

    clusters: int = 64
    modes: int = 5
    neighbors: int = 100
    smoothing: float = 0.2
    blend: float = 0.7
    seed: int = 1

    def __post_init__(self) -> None:
        for name, least in (("clusters", 1), ("modes", 1), ("neighbors", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name}={getattr(self, name)}: give {least} or more")
        for name in ("smoothing", "blend"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name}={getattr(self, name)}: give a number from 0 to 1")


class Subject:
    """One relation of a run: its vectors and its edges."""

    def __init__(self, config: TwhinConfig, vectors: Vectors, relation: str) -> None:
        """Raises ConfigError where the model has no such relation, or no training edge of it."""
        relations = config.model.relations
        names = [known.name for known in relations]
        if relation not in names:
            raise ConfigError(f"--relation={relation}: the model has {', '.join(names)}")
        self.config, self.number = config, names.index(relation)
        self.lhs, self.rhs = relations[self.number].lhs, relations[self.number].rhs
        self.space = Space(
            vectors.tables[self.lhs],
            vectors.tables[self.rhs],
            vectors.operators,
            self.number,
            config.model.comparator,
        )
        self.retrieval = Retrieval(
            self.space.items,
            vectors.biases.get(self.rhs),
            config.model.comparator,
            lambda users: vectors.score(self.number, "rhs", users),
        )
        training = self.history("train")
        if training is None or not len(training.items):
            raise ConfigError(
                f"--relation={relation}: the training edges have none of it, so users have no "
                "interests to be known by"
            )
        self.training = training

    def history(self, split: str) -> History | None:
        """The edges of the relation in a split; None where the config has no such data."""
        edges = read_split(self.config, split)
        return None if edges is None else self._of(edges)

    def _of(self, edges: Edges) -> History:
        mine = edges.rel == self.number
        sizes = len(self.space.users), len(self.space.items)
        return History.from_edges(edges.lhs[mine], edges.rhs[mine], *sizes)

    def table(self, name: str) -> TableConfig:
        return next(each for each in self.config.model.embeddings.tables if each.name == name)

    def cluster(self, history: History, settings: Settings) -> Clusters:
        """Clusters of all items, fitted to those that `history` has."""
        announce(f"clustering {len(self.space.items):,} rows of {self.rhs}")
        fitted = torch.from_numpy(np.unique(history.items))
        comparator = self.space.comparator
        return cluster(self.space.items, settings.clusters, comparator, settings.seed, fitted)


class Comparison:
    """Candidates for the same users by both ways: what a user has is `history`, what he is asked
    for is `sought`.
    """

    def __init__(
        self,
        subject: Subject,
        history: History,
        sought: History,
        settings: Settings,
        k: Sequence[int],
        max_users: int | None = None,
    ) -> None:
        """max_users: so many users alone, evenly spaced over their ids."""
        self._subject, self._history, self._k = subject, history, k
        self._sought = sought.without(history)
        users = self._sought.active()
        if not len(users):
            raise ConfigError("no user has an edge to find that is not a training edge")
        if max_users is not None and len(users) > max_users:
            users = users[np.arange(max_users) * len(users) // max_users]
        self.users = users
        self.clusters = subject.cluster(history, settings)
        self._mixture = Mixture(subject.space, history, self.clusters, settings.seed)
        self._neighbours: dict[tuple[int, bool], Ids] = {}

    def single(self) -> dict[str, float]:
        """Metrics of the model's own ranking."""
        tally = self._tally()
        for users in blocks(self.users):
            best = self._subject.retrieval.single(users, self._history, max(self._k))
            for cut, k in enumerate(self._k):
                tally.add(cut, best[:, :k], self._sought.pairs(users))
        return tally.report()

    def mixture(self, settings: Settings) -> dict[str, float]:
        """Metrics of the mixtures; `clusters` and `seed` are those of the comparison."""
        tally, retrieval = self._tally(), self._subject.retrieval
        for start, users in enumerate(blocks(self.users)):
            # Kept: where settings are chosen, the same users are asked for many times.
            key = (start, settings.smoothing > 0)
            if key not in self._neighbours:
                near = neighbours_of(self._mixture, users, settings)
                self._neighbours[key] = near.astype(np.int32)
            modes = modes_of(self._mixture, users, self._neighbours[key], settings)
            lists = retrieval.of_modes(users, modes, self._history, max(self._k))
            for cut, k in enumerate(self._k):
                candidates = retrieve(modes.weights, lists, k, retrieval.num_items)
                tally.add(cut, candidates, self._sought.pairs(users))
        return tally.report()

    def _tally(self) -> Tally:
        return Tally(self._subject.space.items, self.clusters, self._k)


def neighbours_of(mixture: Mixture, users: Ids, settings: Settings) -> Ids:
    """Whom a block of users is smoothed over. Where smoothing is 0, they are looked for for those
    alone who have no edges of their own, whom they stand for.
    """
    if settings.smoothing > 0:
        return mixture.neighbours(users, settings.neighbors)
    is_lost = mixture.history.sizes(users) == 0
    found = mixture.neighbours(users[is_lost], settings.neighbors)
    near = np.full((len(users), found.shape[1]), NOBODY, dtype=np.int64)
    near[is_lost] = found
    return near


def modes_of(mixture: Mixture, users: Ids, neighbours: Ids, settings: Settings) -> Modes:
    """The modes of a block of users."""
    return mixture.modes(
        users,
        neighbours,
        smoothing=settings.smoothing,
        blend=settings.blend,
        num_modes=settings.modes,
    )


def blocks(users: Ids) -> Iterator[Ids]:
    """The users, a block at a time."""
    for start in range(0, len(users), BLOCK_USERS):
        yield users[start : start + BLOCK_USERS]


def tune(
    subject: Subject, settings: Settings, k: Sequence[int], max_users: int = TUNING_USERS
) -> tuple[Settings, Report]:
    """Choose blend, smoothing and modes by Recall, the mean over all K, on validation edges; where
    the config has none, on a share of the training edges that is taken out of the users' histories.
    max_users: so many users alone, evenly spaced over their ids.
    """
    validation, on = subject.history("validation"), "validation edges"
    history = subject.training
    if validation is None or not len(validation.items):
        history, validation = history.split(HELD_OUT, settings.seed)
        on = f"{HELD_OUT:.0%} of the training edges, held out; the vectors have seen them"
    comparison = Comparison(subject, history, validation, settings, k, max_users)
    tried: dict[Settings, Report] = {}
    passes = (*GRID, next(iter(GRID)))
    most = sum(len(GRID[name]) for name in passes)
    announce(f"tuning: up to {most} settings on {len(comparison.users):,} users")
    for name in passes:
        for value in GRID[name]:
            candidate = replace(settings, **{name: value})
            if candidate not in tried:
                tried[candidate] = _brief(comparison.mixture(candidate), k)
        settings = max(tried, key=lambda each: tried[each]["recall"])
    rows = [{name: getattr(each, name) for name in GRID} | tried[each] for each in tried]
    chosen = {name: getattr(settings, name) for name in GRID}
    single = _brief(comparison.single(), k)
    users = len(comparison.users)
    return settings, {"on": on, "users": users, "chosen": chosen, "single": single, "tried": rows}


def _brief(report: dict[str, float], k: Sequence[int]) -> dict[str, float]:
    names = ("recall", "ndcg", "distance", "coverage")
    return {name: float(np.mean([report[f"{name}@{cut}"] for cut in k])) for name in names}


def compare(subject: Subject, settings: Settings, k: Sequence[int], split: str) -> Report:
    """The single vector beside the mixture on the edges of a split."""
    sought = subject.history(split)
    if sought is None:
        raise ConfigError(f"the config has no {split}_data to evaluate on; choose another --split")
    comparison = Comparison(subject, subject.training, sought, settings, k)
    announce(f"measuring {len(comparison.users):,} users of {split}")
    return {
        "relation": subject.config.model.relations[subject.number].name,
        "split": split,
        "protocol": PROTOCOL,
        "users": len(comparison.users),
        "k": list(k),
        "settings": asdict(replace(settings, clusters=len(comparison.clusters))),
        "single": comparison.single(),
        "mixture": comparison.mixture(settings),
    }


def write(subject: Subject, settings: Settings, step: int, folder: Path) -> None:
    """The modes of all users of the relation's left-hand table, from all training edges."""
    from projects.twhin.mixture_files import write_mixture

    clusters = subject.cluster(subject.training, settings)
    announce(f"writing the modes of {len(subject.space.users):,} rows of {subject.lhs}")
    mixture = Mixture(subject.space, subject.training, clusters, settings.seed)
    modes = (
        (users, modes_of(mixture, users, neighbours_of(mixture, users, settings), settings))
        for users in blocks(np.arange(len(subject.space.users)))
    )
    description = {
        "step": step,
        "relation": subject.config.model.relations[subject.number].name,
        "lhs": subject.lhs,
        "rhs": subject.rhs,
        "comparator": subject.space.comparator,
        "settings": asdict(settings),
    }
    lhs, rhs = subject.table(subject.lhs), subject.table(subject.rhs)
    write_mixture(folder, lhs, rhs, clusters, modes, description)


def run(arguments: argparse.Namespace) -> Report:
    """All that the command line asks for; returns the report."""
    from projects.twhin.export import load_vectors, resolve_run

    settings = Settings(**{name: getattr(arguments, name) for name in asdict(Settings())})
    folder, config = resolve_run(arguments.run, arguments.step, arguments.overrides)
    if arguments.tuning_users < 1:
        raise ConfigError(f"--tuning-users={arguments.tuning_users}: give 1 or more")
    split = arguments.split or ("test" if config.test_data else "validation")
    if arguments.tune and split == "validation":
        raise ConfigError(
            "--tune chooses settings on the validation edges and cannot be measured on them; give "
            "--split=test, or the settings in place of --tune"
        )
    if arguments.output is not None:  # now, not after the work
        from projects.twhin.mixture_files import is_ours
        from projects.twhin.output_folder import refuse_others

        refuse_others(arguments.output, is_ours, "a mixture")
    subject = Subject(config, load_vectors(folder, config.model), arguments.relation)
    tuning = None
    if arguments.tune:
        settings, tuning = tune(subject, settings, arguments.k, arguments.tuning_users)
    report = {"step": int(folder.name), **compare(subject, settings, arguments.k, split)}
    if tuning is not None:
        report["tuning"] = tuning
    if arguments.output is not None:
        write(subject, settings, int(folder.name), arguments.output)
        report["output"] = str(arguments.output)
    return report


def build_parser() -> argparse.ArgumentParser:
    """The flags; those of `Settings` have its names and defaults."""
    from projects.twhin.best import STEP_HELP, step_argument
    from tml.program import add_overrides

    parser = argparse.ArgumentParser(
        description="Represent users by several weighted modes; recall and diversity beside the "
        "single vector."
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder (save_dir)")
    parser.add_argument("--step", type=step_argument, help=STEP_HELP)
    parser.add_argument("--relation", required=True, help="users on its left, items on its right")
    helps = {
        "clusters": "clusters of items",
        "modes": "modes a user has at most",
        "neighbors": "users whose edges smooth a user's mixture",
        "smoothing": "their weight, 0 to 1",
        "blend": "share of the user's own vector in each mode, 0 (the paper's) to 1",
        "seed": "of the clusters",
    }
    for name, default in asdict(Settings()).items():
        text = f"{helps[name]}; default {default}"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument(
        "--tune", action="store_true", help="choose modes, smoothing and blend, never on the split"
    )
    parser.add_argument(
        "--tuning-users",
        type=int,
        default=TUNING_USERS,
        metavar="N",
        help=f"users that --tune measures; default {TUNING_USERS}",
    )
    parser.add_argument(
        "--k", type=_cutoffs, default=(10, 20, 50), metavar="K,K", help="numbers of candidates"
    )
    parser.add_argument("--split", choices=("test", "validation"), help="default: test, if any")
    parser.add_argument("--output", type=Path, help="write the modes of all users into this folder")
    add_overrides(parser, "change one setting of the run's config")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _cutoffs(text: str) -> tuple[int, ...]:
    found = tuple(sorted({int(part) for part in text.split(",")}))
    if found[0] < 1:
        raise ValueError(text)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from tml.program import exit_code

    arguments = build_parser().parse_args(argv)
    return exit_code(lambda: _show(arguments), arguments.run)


def _show(arguments: argparse.Namespace) -> None:
    from tml.distributed import join

    with join(timeout_s=60.0):
        report: dict[str, Any] = run(arguments)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    console = Console()
    console.print(render(report))
    if "output" in report:
        console.print(f"modes of all users: {report['output']}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
