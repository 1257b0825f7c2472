"""Evaluation of vectors on held-out edges: link prediction and retrieval, as sums that add up over
processes.

A model is seen through `Scorer`. `link_prediction` and `retrieval` go through one process's share
of the queries and return arrays of sums; the arrays of all processes are added, and
`link_prediction_report`, `retrieval_report` turn them into a JSON-able report, which `render` shows
as tables.

    sums = link_prediction(scorer, relations, test, known, shard=(rank, world_size))
    report = link_prediction_report(relations, sums)        # after an all_reduce of sums

From the command line, on the newest step folder of a run:

    python projects/twhin/evaluate.py --run=RUN_FOLDER [--split=test] [--json]
"""

import argparse
import enum
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from torch import Tensor

from projects.twhin import planted
from projects.twhin.config import RelationConfig, TwhinConfig
from tml import metrics
from tml.config import ConfigError
from tml.distributed import Job

HITS = (1, 3, 10)
LINK_METRICS = ("mrr", "mr", *(f"hits@{k}" for k in HITS))
BEST = "best.json"
"""Below evaluation/: the step with the best MRR that the evaluator has measured."""
BLOCK_SCORES = 1 << 24  # scores held at once: 64 MB of float32
MAX_ROWS_SHOWN = 12  # relations in a terminal's table; a report has all of them
MAX_NAME_SHOWN = 24  # characters of a relation there

Ids = NDArray[np.int64]
Sums = NDArray[np.float64]
Report = dict[str, Any]


class Side(enum.StrEnum):
    """The side of an edge that is asked for."""

    LHS = "lhs"
    """Rank heads: the candidates are the relation's left-hand table, the queries right-hand
    entities.
    """
    RHS = "rhs"
    """Rank tails: the candidates are the relation's right-hand table, the queries left-hand
    entities.
    """

    @property
    def other(self) -> "Side":
        return Side.RHS if self is Side.LHS else Side.LHS


class Relation(Protocol):
    """What evaluation asks of a relation; a RelationConfig is one."""

    @property
    def name(self) -> str: ...


class Scorer(Protocol):
    """What evaluation asks of a model."""

    def score(self, relation: int, side: Side, entities: Tensor) -> Tensor:
        """Scores of all candidates of `side` for each entity of the other side.

        entities: (n,) int64 on the CPU. Returns (n, number of candidates) floats in fresh memory
        that the caller may overwrite, on any device; larger is better.
        """
        ...


@dataclass(frozen=True)
class Edges:
    """Edges as three int64 arrays of one length."""

    lhs: Ids
    rel: Ids
    rhs: Ids

    def __post_init__(self) -> None:
        assert len(self.lhs) == len(self.rel) == len(self.rhs)

    def __len__(self) -> int:
        return len(self.rel)

    def take(self, index: NDArray[Any]) -> "Edges":
        """The edges at `index`: positions or a mask."""
        return Edges(self.lhs[index], self.rel[index], self.rhs[index])

    def entities(self, side: Side) -> Ids:
        return self.lhs if side is Side.LHS else self.rhs


def join(parts: Sequence[Edges]) -> Edges:
    """All edges of all parts, such as those of train, valid and test that `link_prediction` knows
    to be true.
    """
    return Edges(
        np.concatenate([part.lhs for part in parts]),
        np.concatenate([part.rel for part in parts]),
        np.concatenate([part.rhs for part in parts]),
    )


def spread(edges: Edges, max_edges: int | None) -> Edges:
    """At most `max_edges` of the edges, evenly spaced over their order, the same ones in every
    process.
    """
    if max_edges is None or len(edges) <= max_edges:
        return edges
    return edges.take(np.arange(max_edges, dtype=np.int64) * len(edges) // max_edges)


def of_relations(edges: Edges, relations: Sequence[int]) -> Edges:
    """The edges of the relations with these numbers."""
    return edges.take(np.isin(edges.rel, np.asarray(relations, dtype=np.int64)))


# Link prediction


def link_prediction(
    scorer: Scorer,
    relations: Sequence[Relation],
    edges: Edges,
    known: Edges,
    shard: tuple[int, int] = (0, 1),
) -> Sums:
    """Filtered ranks of the true tail among all tails and of the true head among all heads.

    known: true edges (train, valid and test together); those that answer the same query are no
    competitors. shard: (rank, world size); this process ranks each world-size-th edge. Returns
    (number of relations, 2 sides LHS and RHS, 1 + len(LINK_METRICS)): number of edges, then the sum
    of each metric over them.
    """
    _check_relations(edges, relations)
    rank, world_size = shard
    sums = np.zeros((len(relations), len(Side), 1 + len(LINK_METRICS)))
    known_groups = _Groups(known.rel, len(relations))
    for relation, index in _Groups(edges.rel[rank::world_size], len(relations)):
        queries = edges.take(index * world_size + rank)
        truth = known.take(known_groups.members(relation))
        for position, side in enumerate(Side):
            for ranks in _ranks(scorer, relation, side, queries, truth):
                sums[relation, position] += _sum_ranks(ranks)
    return sums


def link_prediction_report(relations: Sequence[Relation], sums: Sums) -> Report:
    """Metrics of each relation and side from the sums of all processes; JSON-able.

    `mean` is over all edges and both sides. A relation without edges is left out.
    """
    return {
        "protocol": "filtered, all candidates, ties at their mean rank",
        "edges": int(sums[:, 0, 0].sum()),
        "mean": _link_means(sums.sum(axis=(0, 1))),
        **{side.value: _link_means(sums[:, i].sum(axis=0)) for i, side in enumerate(Side)},
        "relations": {
            relation.name: {
                "edges": int(sums[number, 0, 0]),
                "mean": _link_means(sums[number].sum(axis=0)),
                **{side.value: _link_means(sums[number, i]) for i, side in enumerate(Side)},
            }
            for number, relation in enumerate(relations)
            if sums[number, 0, 0]
        },
    }


def _ranks(
    scorer: Scorer, relation: int, side: Side, queries: Edges, truth: Edges
) -> Iterator[Tensor]:
    """Ranks of the edges `queries` of one relation, block by block; each query entity is scored
    once or twice.
    """
    asked_all, targets_all = queries.entities(side.other), queries.entities(side)
    # Edges that ask the same question come together, so that a block scores its question once.
    order = np.argsort(asked_all, kind="stable")
    asked_all, targets_all = asked_all[order], targets_all[order]
    lookup = _Lookup(truth.entities(side.other), truth.entities(side))
    for block in _blocks(scorer, relation, side, asked_all):
        asked, rows = np.unique(asked_all[block], return_inverse=True)
        scores = scorer.score(relation, side, torch.from_numpy(asked))
        rows_on, targets, *known = _on(scores, rows, targets_all[block], *lookup.pairs(asked))
        yield metrics.filtered_ranks(scores, rows_on, targets, (known[0], known[1]))


def _sum_ranks(ranks: Tensor) -> Sums:
    values = [torch.ones_like(ranks), metrics.reciprocal_ranks(ranks), ranks]
    values += [metrics.hits(ranks, k) for k in HITS]
    return torch.stack(values).sum(dim=1).cpu().numpy()


def _link_means(sums: Sums) -> dict[str, float]:
    return _divide(sums, LINK_METRICS)


# Retrieval


def retrieval(
    scorer: Scorer,
    relations: Sequence[Relation],
    edges: Edges,
    training_edges: Edges,
    k: Sequence[int],
    shard: tuple[int, int] = (0, 1),
) -> Sums:
    """The best right-hand entities for each left-hand one, its training edges of the same relation
    left out.

    An edge of `edges` that is a training edge too cannot be found and is not asked for. Users
    without an edge to find are not counted. shard: (rank, world size); this process takes each
    world-size-th user of a relation. Returns (number of relations, 1 + 3·len(k)): number of users,
    then the sums of Recall, NDCG and Hit at each K.
    """
    _check_relations(edges, relations)
    rank, world_size = shard
    sums = np.zeros((len(relations), 1 + 3 * len(k)))
    training_groups = _Groups(training_edges.rel, len(relations))
    for relation, index in _Groups(edges.rel, len(relations)):
        training = training_edges.take(training_groups.members(relation))
        wanted = _new_pairs(edges.take(index), training)
        users = np.unique(wanted.lhs)[rank::world_size]
        seen, sought = _Lookup(training.lhs, training.rhs), _Lookup(wanted.lhs, wanted.rhs)
        for block in _blocks(scorer, relation, Side.RHS, users):
            scores = scorer.score(relation, Side.RHS, torch.from_numpy(users[block]))
            masked, relevant = seen.pairs(users[block]), sought.pairs(users[block])
            sums[relation] += _sum_retrieved(scores, masked, relevant, k)
    return sums


def retrieval_report(relations: Sequence[Relation], sums: Sums, k: Sequence[int]) -> Report:
    """Metrics of each relation from the sums of all processes; JSON-able. `mean` is over all
    (relation, user).
    """
    names = [f"{metric}@{cut}" for metric in ("recall", "ndcg", "hit") for cut in k]
    return {
        "protocol": "all candidates, training edges left out, mean over users with an edge to find",
        "users": int(sums[:, 0].sum()),
        "mean": _divide(sums.sum(axis=0), names),
        "relations": {
            relation.name: {"users": int(sums[number, 0]), **_divide(sums[number], names)}
            for number, relation in enumerate(relations)
            if sums[number, 0]
        },
    }


def _sum_retrieved(
    scores: Tensor, masked: tuple[Ids, Ids], relevant: tuple[Ids, Ids], k: Sequence[int]
) -> Sums:
    num_users, num_candidates = scores.shape
    masked_rows, masked_columns, rows, columns = _on(scores, *masked, *relevant)
    metrics.refuse_nan(scores)
    scores[masked_rows, masked_columns] = -torch.inf
    best = metrics.top_columns(scores, max(k))
    is_found = metrics.found(best, (rows, columns), num_candidates)
    num_relevant = torch.bincount(rows, minlength=num_users)
    values = [torch.ones(num_users, dtype=torch.float64, device=scores.device)]
    values += [metrics.recall_at(is_found, num_relevant, cut) for cut in k]
    values += [metrics.ndcg_at(is_found, num_relevant, cut) for cut in k]
    values += [metrics.hit_at(is_found, cut) for cut in k]
    return torch.stack(values).sum(dim=1).cpu().numpy()


def _new_pairs(edges: Edges, training: Edges) -> Edges:
    """Edges of one relation, doubles dropped, without those that are training edges."""
    width = max((int(part.rhs.max()) for part in (edges, training) if len(part)), default=0) + 1
    pairs = np.unique(edges.lhs * width + edges.rhs)
    if len(training):
        seen = np.sort(training.lhs * width + training.rhs)
        places = np.minimum(np.searchsorted(seen, pairs), len(seen) - 1)
        pairs = pairs[seen[places] != pairs]  # np.isin of numpy 2.4 takes ten times as long
    return Edges(pairs // width, np.full(len(pairs), edges.rel[0]), pairs % width)


# What both share


class _Groups:
    """Positions of each relation's edges, found with one sort."""

    def __init__(self, rel: Ids, num_relations: int) -> None:
        self._order = np.argsort(rel, kind="stable")
        self._starts = np.searchsorted(rel[self._order], np.arange(num_relations + 1))

    def members(self, relation: int) -> Ids:
        return self._order[self._starts[relation] : self._starts[relation + 1]]

    def __iter__(self) -> Iterator[tuple[int, Ids]]:
        for relation in range(len(self._starts) - 1):
            if len(members := self.members(relation)):
                yield relation, members


class _Lookup:
    """From an entity to its neighbours, for many entities at once."""

    def __init__(self, entities: Ids, neighbours: Ids) -> None:
        order = np.argsort(entities, kind="stable")
        self._entities, self._neighbours = entities[order], neighbours[order]

    def pairs(self, asked: Ids) -> tuple[Ids, Ids]:
        """(row, neighbour) of each neighbour of each asked entity; rows count the asked ones."""
        starts = np.searchsorted(self._entities, asked, side="left")
        counts = np.searchsorted(self._entities, asked, side="right") - starts
        rows = np.repeat(np.arange(len(asked)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self._neighbours[starts[rows] + within]


def _blocks(scorer: Scorer, relation: int, side: Side, asked: Ids) -> Iterator[slice]:
    """Slices of the queries `asked` whose scores fit into one block."""
    if len(asked):
        num_candidates = scorer.score(relation, side, torch.from_numpy(asked[:1])).shape[1]
        size = max(1, BLOCK_SCORES // num_candidates)
        yield from (slice(start, start + size) for start in range(0, len(asked), size))


def _on(scores: Tensor, *arrays: Ids) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)).to(scores.device) for array in arrays]


def _divide(sums: Sums, names: Sequence[str]) -> dict[str, float]:
    """Means from a count followed by sums; none where nothing was counted."""
    if not sums[0]:
        return {}
    return {name: float(total / sums[0]) for name, total in zip(names, sums[1:], strict=True)}


def _check_relations(edges: Edges, relations: Sequence[Relation]) -> None:
    if len(edges) and not 0 <= int(edges.rel.min()) <= int(edges.rel.max()) < len(relations):
        raise ValueError(
            f"edges name the relations {int(edges.rel.min())} to {int(edges.rel.max())}; the "
            f"config has {len(relations)}, numbered from 0"
        )


# What a person sees


def render(report: Report) -> RenderableType:
    """Tables of {"link_prediction": …, "retrieval": …}; either may be missing.

    report["planted"], where there is one, is the optimum that a planted graph's generator computed,
    of the shape of a link-prediction report; it is shown beside the model's MRR.
    """
    tables: list[RenderableType] = []
    if "link_prediction" in report:
        tables.append(_link_table(report["link_prediction"], report.get("planted")))
    if "retrieval" in report:
        tables.append(_retrieval_table(report["retrieval"]))
    return Group(*tables)


def _link_table(report: Report, optimum: Report | None) -> Table:
    headings = ["edges", "MRR", "heads", "tails", "MR", *(f"H@{k}" for k in HITS)]
    table = _table("link prediction", report, headings + ["best", "ratio"] * bool(optimum))
    for name, row in _shown_rows(report):
        cells = [f"{row['edges']:,}"]
        if row["mean"]:
            cells += [_short(row[side]["mrr"]) for side in ("mean", "lhs", "rhs")]
            cells += [f"{row['mean']['mr']:.0f}"]
            cells += [_short(row["mean"][f"hits@{k}"]) for k in HITS]
        best = _row_of(optimum, name)
        if row["mean"] and best:
            best_mrr = best["mean"]["mrr"]
            cells += [_short(best_mrr), f"{row['mean']['mrr'] / best_mrr:.1%}"]
        table.add_row(_shown_name(name), *cells, end_section=name == "all")
    return table


def _retrieval_table(report: Report) -> Table:
    table = _table("retrieval", report, ["users", "K", "Recall@K", "NDCG@K", "Hit@K"])
    for name, row in _shown_rows(report):
        values = row["mean"] if name == "all" else row
        cuts = [metric.partition("@")[2] for metric in values if metric.startswith("recall@")]
        for cut in cuts:
            cells = [_short(values[f"{metric}@{cut}"]) for metric in ("recall", "ndcg", "hit")]
            named = [_shown_name(name), f"{row['users']:,}"] if cut == cuts[0] else ["", ""]
            table.add_row(*named, cut, *cells, end_section=name == "all" and cut == cuts[-1])
    return table


def _table(title: str, report: Report, headings: Sequence[str]) -> Table:
    """A table that fits into 80 columns."""
    hidden = len(report["relations"]) - MAX_ROWS_SHOWN
    note = f"\n… {hidden} more relations in metrics.json" if hidden > 0 else ""
    caption = report["protocol"] + note
    table = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    table.pad_edge, table.show_edge, table.collapse_padding = False, False, True
    table.add_column("relation", min_width=8, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _shown_name(name: str) -> str:
    """The name, or the end of a long one: it tells more than the beginning."""
    return name if len(name) <= MAX_NAME_SHOWN else "…" + name[1 - MAX_NAME_SHOWN :]


def _short(value: float) -> str:
    """Four decimals, without the zero in front: .1806."""
    return f"{value:.4f}".removeprefix("0")


def _shown_rows(report: Report) -> Iterator[tuple[str, Report]]:
    yield "all", report
    yield from list(report["relations"].items())[:MAX_ROWS_SHOWN]


def _row_of(report: Report | None, name: str) -> Report | None:
    if report is None:
        return None
    return report if name == "all" else report["relations"].get(name)


# A run's vectors on its data


def evaluate_split(
    config: TwhinConfig,
    split: str,
    vectors: Scorer,
    job: Job,
    all_edges: Mapping[str, Edges | None] | None = None,
) -> Report:
    """Measure `vectors` on the config's "test", "validation" or "train" edges, a share a process.

    all_edges: what `read_splits` gives; read here where None. Returns the same report on every
    process; its shape is what `render` and metrics.json know.
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
    report: Report = {"split": split, "unseen": count_unseen(asked, training, relations)}
    if settings.link_prediction:
        ranked = spread(asked, settings.max_edges)
        sums = link_prediction(vectors, relations, ranked, known, shard)
        report["link_prediction"] = link_prediction_report(relations, _over_all(sums))
        if len(ranked) < len(asked):
            report["link_prediction"]["protocol"] += f"; {len(ranked):,} of {len(asked):,} edges"
    if settings.retrieval is not None:
        k = settings.retrieval.k
        sums = retrieval(vectors, relations, asked, training, k, shard)
        report["retrieval"] = retrieval_report(relations, _over_all(sums), k)
    if config.planted is not None and split == "test":
        folder = planted.folder_of(config.train_data.data_root)
        report["planted"] = json.loads((folder / planted.PLANTED).read_text())["optimum"]
    return report


def follow(config: TwhinConfig, save_dir: Path, *, once: bool = False) -> int | None:
    """Measure each complete step folder of a run on validation_data (test_data where there is none)
    as it appears, until the run is finished; see tml.follow. best.json names the best step so far.
    Returns None, or the number of the signal that stopped it.
    """
    from projects.twhin.export import load_vectors
    from projects.twhin.model import Vectors
    from tml import distributed, logs
    from tml import follow as marks

    split = "validation" if config.validation_data else "test"
    if getattr(config, f"{split}_data") is None:
        raise ConfigError("an evaluator (SPEC_TYPE) needs validation_data or test_data")
    if not config.evaluation.link_prediction:
        raise ConfigError(
            "an evaluator (SPEC_TYPE) goes by the MRR: set evaluation.link_prediction"
        )
    console = Console(soft_wrap=True, highlight=False)
    timeout_s = config.training.eval_timeout_in_s
    with distributed.join(timeout_s) as job:
        logs.set_up(job.rank)
        edges: dict[str, Edges | None] = {}

        def measure(vectors: Vectors, names: list[str]) -> Report:
            if not edges:  # not before: the trainer may make them
                edges.update(read_splits(config))
            return {name: evaluate_split(config, name, vectors, job, edges) for name in names}

        def tell(step: int, report: Report) -> None:
            best = write_best(save_dir, split)
            console.print(f"step {step:,}; best so far {best['step']:,}, MRR {best['mrr']:.4f}")
            console.print(render(report[split]))

        def load(folder: Path) -> Vectors:
            return load_vectors(folder, config.model)

        return marks.follow(save_dir, [split], load, measure, tell, job, timeout_s, once=once)


def write_best(save_dir: Path, split: str) -> Report:
    """Write evaluation/best.json: the step whose mark has the best MRR, the first of equals."""
    from tml import follow as marks
    from tml import run_folder

    measured = {}
    for path in (save_dir / marks.EVALUATION / split).glob("*.json"):
        if path.stem.isdigit():
            mean = json.loads(path.read_text())["link_prediction"]["mean"]
            measured[int(path.stem)] = mean["mrr"]
    step = max(sorted(measured), key=lambda step: measured[step])
    best = {"step": step, "split": split, "mrr": measured[step]}
    run_folder.write_json(save_dir / marks.EVALUATION / BEST, best)
    return best


def forget_marks(save_dir: Path, step: int) -> None:
    """Remove the marks of steps after `step`, and name the best of those before it."""
    from tml import follow as marks

    marks.forget_marks(save_dir, step)
    path = save_dir / marks.EVALUATION / BEST
    if path.exists():
        best = json.loads(path.read_text())
        if best["step"] > step:
            path.unlink()
            if any((save_dir / marks.EVALUATION / best["split"]).glob("*.json")):
                write_best(save_dir, best["split"])


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


def count_unseen(edges: Edges, training: Edges, relations: Sequence[RelationConfig]) -> int:
    """How many of `edges` hold an entity that no training edge holds; scored as all are."""
    parts = [part.entities(side) for part in (edges, training) for side in Side]
    width = max((int(ids.max()) for ids in parts if len(ids)), default=0) + 1
    seen: dict[str, NDArray[np.bool_]] = {}
    groups = _Groups(training.rel, len(relations))
    for number, relation in enumerate(relations):
        of_relation = training.take(groups.members(number))
        for table, ids in ((relation.lhs, of_relation.lhs), (relation.rhs, of_relation.rhs)):
            seen.setdefault(table, np.zeros(width, dtype=bool))[ids] = True
    count = 0
    for number, here in _Groups(edges.rel, len(relations)):
        lhs_seen = seen[relations[number].lhs][edges.lhs[here]]
        rhs_seen = seen[relations[number].rhs][edges.rhs[here]]
        count += int((~(lhs_seen & rhs_seen)).sum())
    return count


def _over_all(sums: Sums) -> Sums:
    """The sums of all processes."""
    from tml import distributed

    return distributed.all_reduce_sum(torch.from_numpy(sums)).numpy()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from projects.twhin.export import load_vectors, resolve_run
    from tml.checkpoint import CheckpointError
    from tml.data.parquet import DataError
    from tml.distributed import join as join_job
    from tml.program import add_overrides

    parser = argparse.ArgumentParser(description="Measure the vectors of a run.")
    parser.add_argument("--run", type=Path, required=True, help="run folder (save_dir)")
    parser.add_argument("--step", type=int, help="step folder; default: the newest complete one")
    parser.add_argument("--split", default="test", choices=("test", "validation", "train"))
    add_overrides(parser, "change one setting of the run's config")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    try:
        folder, config = resolve_run(arguments.run, arguments.step, arguments.overrides)
        with join_job(config.training.eval_timeout_in_s) as job:
            vectors = load_vectors(folder, config.model)
            report = evaluate_split(config, arguments.split, vectors, job)
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
