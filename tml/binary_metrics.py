"""Metrics of predicted probabilities of yes/no labels; what predicted them is not known here.

The functions take one task's rows: scores (N,), labels (N,) of 0 and 1, optional weights (N,) of
at least 0, as arrays, lists or CPU tensors, and compute in float64. A row of weight w counts as w
rows; rows of weight 0 do not exist. What cannot be said (AUC with a class absent, anything without
rows) is NaN, never an error; scores that are NaN, labels other than 0 and 1 and negative weights
are a ValueError.

`BinaryMetrics` takes the batches of an evaluation and gives the same numbers for every task and
stratum, exact, and to the last bit the same on any number of processes:

    metrics = BinaryMetrics(["is_like", "is_click"], which=["auc", "rce"])
    for batch in …: metrics.update(probabilities, labels, weights, users, {"new_users": mask})
    report = metrics.compute()      # on every process
    report.tasks["is_like"]["auc"], report.strata["is_like"]["new_users"]["auc"]
    console.print(render(report)); json.dumps(report.to_json())

Almost all of these metrics depend on nothing but how much weight of positives and of negatives lies
at each distinct score: rows are sorted once into such a `Tally`.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from rich.console import RenderableType
from torch import Tensor

from tml import layout
from tml.config import ConfigError

EPSILON = 1e-7  # probabilities are clamped to [EPSILON, 1 − EPSILON] before their logarithm
NUM_BINS = 20  # of the expected calibration error
CHUNK_ROWS = 1 << 22  # values sent at once between processes
MAX_NAME_SHOWN = 22  # characters of a task in a terminal's table

Array = NDArray[np.float64]
Values = dict[str, float]


def auc(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the ROC curve: the probability that a positive row scores above a negative one,
    ties ½ (Hanley and McNeil 1982). Any real scores. NaN when a class is absent.
    """
    return _auc(_sort(scores, labels, weights).tally())


def pr_auc(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Average precision: Σ (recall_k − recall_{k−1}) · precision_k over the distinct scores from
    above, without interpolation. Any real scores. NaN without positives.
    """
    return _pr_auc(_sort(scores, labels, weights).tally())


def log_loss(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean of −ln(probability given to what happened), in nats; probabilities clamped by
    EPSILON.
    """
    return _log_loss(_sort(scores, labels, weights).tally())


def ctr(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean label: the share of positive rows."""
    return _ctr(_sort(scores, labels, weights).tally())


def calibration(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Σ predicted / Σ label: 1 is right, 2 is twice too many predicted. NaN without positives."""
    return _calibration(_sort(scores, labels, weights).tally())


def rce(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Relative cross entropy: percent of the cross entropy of the best constant prediction, the
    mean label, that the predictions save: 100 · (CE_ref − CE) / CE_ref (the RecSys Challenge 2020's
    metric). 100 is perfect, 0 no better than the constant, negative worse. NaN when a class is
    absent.
    """
    return _rce(_sort(scores, labels, weights).tally())


def nrce(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """RCE of the predictions times the one factor that makes their mean the mean label: what is
    left when the level of the predictions is forgiven. NaN as `rce`, and if all predictions are 0.
    """
    return _nrce(_sort(scores, labels, weights).tally())


def expected_calibration_error(
    scores: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    num_bins: int = NUM_BINS,
) -> float:
    """Σ_b W_b/W · |mean prediction − mean label| over `num_bins` bins of equal weight, in order of
    the score (Naeini et al. 2015, with the equal-mass bins of Nguyen and O'Connor 2015).

    Rows of one score are never parted: they go where the middle of their weight lies, so bins may
    be uneven or empty.
    """
    return _expected_calibration_error(_sort(scores, labels, weights).tally(), num_bins)


def grouped_auc(
    scores: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    weights: ArrayLike | None = None,
    by_rows: bool = False,
) -> float:
    """Mean of the AUCs within each group, such as a user's rows; groups with one class are left out
    (GAUC; Zhu et al. 2017, arXiv 1703.02091).

    groups: (N,) whole numbers. by_rows: whether a group counts in proportion to the weight of its
    rows, as in that paper, and not each as one. NaN when no group has both classes.
    """
    return _mean_auc(*_group_aucs(_sort(scores, labels, weights, groups)), by_rows)


# Rows in order


@dataclass(frozen=True)
class Tally:
    """Weight of positive and of negative rows at each of K distinct scores."""

    scores: Array
    """(K,) ascending."""
    positives: Array
    """(K,)"""
    negatives: Array
    """(K,)"""


@dataclass(frozen=True)
class _Rows:
    """N rows of positive weight in ascending order of the score."""

    scores: NDArray[Any]
    labels: NDArray[np.bool_]
    weights: NDArray[Any] | None
    groups: NDArray[Any] | None
    """Numbers from 0 in the order of the groups."""

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, index: NDArray[Any]) -> "_Rows":
        """The rows at `index`: positions or a mask; the caller keeps them in order."""
        return _Rows(
            self.scores[index],
            self.labels[index],
            None if self.weights is None else self.weights[index],
            None if self.groups is None else self.groups[index],
        )

    def tally(self) -> Tally:
        starts = _starts(self.scores)
        positives, negatives = self.sum_classes(starts)
        return Tally(self.scores[starts].astype(np.float64), positives, negatives)

    def sum_classes(self, starts: NDArray[np.int64]) -> tuple[Array, Array]:
        """Weight of positives and of negatives in each run of rows that begins at `starts`."""
        if self.weights is None:  # whole numbers: exact
            sizes = np.diff(starts, append=len(self)).astype(np.float64)
            positives = _sum_runs(self.labels.astype(np.float64), starts)
            return positives, sizes - positives
        weights = self.weights.astype(np.float64)
        return (
            _sum_runs(weights * self.labels, starts),
            _sum_runs(weights * ~self.labels, starts),
        )


def tally(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Tally:
    """Rows added up at each distinct score."""
    return _sort(scores, labels, weights).tally()


def _sort(
    scores: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None,
    groups: ArrayLike | None = None,
) -> _Rows:
    """Checked rows, sorted."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    weights = None if weights is None else np.asarray(weights, dtype=np.float64)
    numbers = None if groups is None else _number(np.asarray(groups))
    for name, column in (("labels", labels), ("weights", weights), ("groups", numbers)):
        if column is not None and column.shape != scores.shape:
            raise ValueError(f"{name} of shape {column.shape} beside scores of {scores.shape}")
    check_scores(scores, "the data")
    check_labels(labels, "the data")
    if weights is not None:
        check_weights(weights, "the data")
    rows = _Rows(scores, labels.astype(np.bool_), weights, numbers)
    if weights is not None and not weights.all():
        rows = rows.take(weights > 0)
    return rows.take(np.argsort(rows.scores))


def _sort_exactly(
    scores: NDArray[np.float32],
    labels: NDArray[np.bool_],
    weights: NDArray[np.float32] | None,
) -> NDArray[np.int64]:
    """The order of rows by (score, weight, label), all of which are at least 0: rows that differ
    come in the same order however they were given.

    The bits of floats that are not negative sort as the floats do, so that one whole number stands
    for all three. Rows of weight 0 come not at all.
    """
    keys = scores.view(np.uint32).astype(np.uint64) << np.uint64(32)
    if weights is not None:
        keys |= weights.view(np.uint32).astype(np.uint64) << np.uint64(1)
    keys |= labels
    if weights is None or weights.all():
        return np.argsort(keys)
    kept = np.flatnonzero(weights)
    return kept[np.argsort(keys[kept])]


def _number(groups: NDArray[Any]) -> NDArray[np.int64]:
    """Groups as numbers from 0, in order."""
    return np.unique(groups, return_inverse=True)[1]


def _starts(values: NDArray[Any]) -> NDArray[np.int64]:
    """Where each run of equal values begins."""
    is_start = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=is_start[1:])
    return np.flatnonzero(is_start)


def _sum_runs(values: Array, starts: NDArray[np.int64]) -> Array:
    # reduceat refuses to add up nothing.
    return np.add.reduceat(values, starts) if len(starts) else np.empty(0)


# Metrics of a tally


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def _total(tally: Tally) -> tuple[float, float]:
    """Weight of all positives, of all negatives."""
    return float(tally.positives.sum()), float(tally.negatives.sum())


def _auc(tally: Tally) -> float:
    positive, negative = _total(tally)
    below = np.cumsum(tally.negatives) - tally.negatives
    pairs = float((tally.positives * (below + tally.negatives / 2)).sum())
    return _ratio(pairs, positive * negative)


def _pr_auc(tally: Tally) -> float:
    found = np.cumsum(tally.positives[::-1])
    precision = found / (found + np.cumsum(tally.negatives[::-1]))
    return _ratio(float((tally.positives[::-1] * precision).sum()), _total(tally)[0])


def _log_loss(tally: Tally, scale: float = 1.0) -> float:
    """Log-loss of the probabilities times `scale`."""
    _refuse_other_than_probabilities(tally)
    p = np.clip(tally.scores * scale, EPSILON, 1 - EPSILON)
    lost = tally.positives * np.log(p) + tally.negatives * np.log1p(-p)
    return -_ratio(float(lost.sum()), sum(_total(tally)))


def _ctr(tally: Tally) -> float:
    return _ratio(_total(tally)[0], sum(_total(tally)))


def _predicted(tally: Tally) -> float:
    """Σ weight · probability."""
    _refuse_other_than_probabilities(tally)
    return float((tally.scores * (tally.positives + tally.negatives)).sum())


def _calibration(tally: Tally) -> float:
    return _ratio(_predicted(tally), _total(tally)[0])


def _rce(tally: Tally, scale: float = 1.0) -> float:
    positive, negative = _total(tally)
    if not positive or not negative:
        return math.nan
    mean = positive / (positive + negative)
    reference = -mean * math.log(mean) - (1 - mean) * math.log1p(-mean)
    return 100 * (reference - _log_loss(tally, scale)) / reference


def _nrce(tally: Tally) -> float:
    predicted = _predicted(tally)
    return _rce(tally, _total(tally)[0] / predicted) if predicted else math.nan


def _expected_calibration_error(tally: Tally, num_bins: int = NUM_BINS) -> float:
    _refuse_other_than_probabilities(tally)
    if num_bins < 1:
        raise ValueError(f"{num_bins} bins; at least 1 is needed")
    weight = tally.positives + tally.negatives
    if not len(weight):
        return math.nan
    middle = np.cumsum(weight) - weight / 2
    total = float(weight.sum())
    bins = np.minimum((middle / total * num_bins).astype(np.int64), num_bins - 1)
    too_much = np.bincount(bins, weights=tally.scores * weight - tally.positives)
    return float(np.abs(too_much).sum()) / total


def _group_aucs(rows: _Rows) -> tuple[Array, Array]:
    """AUC and weight of each group that has both classes, in the order of the groups.

    One more sort, by (group, place in the order of scores), then sums over runs.
    """
    assert rows.groups is not None
    assert len(rows) < 1 << 32, "places must fit into 32 bits"
    keys = rows.groups.astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(rows), dtype=np.uint64)
    keys.sort()
    ordered = rows.take((keys & np.uint64(0xFFFFFFFF)).astype(np.int64))
    assert ordered.groups is not None
    is_start = np.ones(len(rows), dtype=np.bool_)
    is_start[1:] = ordered.scores[1:] != ordered.scores[:-1]
    is_start[1:] |= ordered.groups[1:] != ordered.groups[:-1]
    starts = np.flatnonzero(is_start)
    positives, negatives = ordered.sum_classes(starts)
    firsts = _starts(ordered.groups[starts])
    below = np.cumsum(negatives) - negatives
    below -= np.repeat(below[firsts], np.diff(firsts, append=len(starts)))
    pairs = _sum_runs(positives * (below + negatives / 2), firsts)
    positive, negative = _sum_runs(positives, firsts), _sum_runs(negatives, firsts)
    both = (positive > 0) & (negative > 0)
    return pairs[both] / (positive[both] * negative[both]), (positive + negative)[both]


def _mean_auc(areas: Array, weights: Array, by_rows: bool) -> float:
    shares = weights if by_rows else np.ones(len(areas))
    return _ratio(float((areas * shares).sum()), float(shares.sum()))


def _refuse_other_than_probabilities(tally: Tally) -> None:
    if len(tally.scores) and not 0 <= tally.scores[0] <= tally.scores[-1] <= 1:
        raise ValueError(
            f"scores from {tally.scores[0]:.6g} to {tally.scores[-1]:.6g} are no probabilities; "
            "apply the sigmoid to logits first"
        )


# Checks


def check_scores(scores: NDArray[Any], owner: str) -> None:
    """ValueError if a score is NaN. owner: the task, for the message."""
    if np.isnan(scores).any():
        raise ValueError(
            f"{int(np.isnan(scores).sum())} of {scores.size} scores of {owner} are NaN; the model "
            "gives NaN: look for NaN in its inputs and weights, train with a smaller learning rate "
            "or go back to an earlier checkpoint"
        )


def check_labels(labels: NDArray[Any], owner: str) -> None:
    """ValueError if a label is neither 0 nor 1."""
    is_wrong = (labels != 0) & (labels != 1)
    if is_wrong.any():
        raise ValueError(
            f"{int(is_wrong.sum())} of {labels.size} labels of {owner} are neither 0 nor 1, the "
            f"first is {labels[is_wrong][0]}; mend the data or rectify its labels"
        )


def check_weights(weights: NDArray[Any], owner: str) -> None:
    """ValueError if a weight is negative, infinite or NaN."""
    is_wrong = ~((weights >= 0) & (weights < np.inf))
    if is_wrong.any():
        raise ValueError(
            f"{int(is_wrong.sum())} of {weights.size} weights of {owner} are negative or not "
            f"finite, the first is {weights[is_wrong][0]}; a weight says how many rows this one is"
        )


# A whole evaluation

OF_TALLY: dict[str, Callable[[Tally], float]] = {
    "auc": _auc,
    "rce": _rce,
    "nrce": _nrce,
    "log_loss": _log_loss,
    "ctr": _ctr,
    "calibration": _calibration,
    "ece": _expected_calibration_error,
    "pr_auc": _pr_auc,
}
OF_GROUPS = {"gauc": False, "gauc_by_rows": True}
NAMES = (*OF_TALLY, *OF_GROUPS)


@dataclass(frozen=True)
class BinaryReport:
    """Metrics by name: those asked for, and `rows` and `positives`, the numbers of rows of positive
    weight. What cannot be said is NaN.
    """

    tasks: dict[str, Values]
    """Task → metric → value."""
    strata: dict[str, dict[str, Values]]
    """Task → stratum → metric → value; empty where no strata were given."""

    def to_json(self) -> dict[str, Any]:
        """{"tasks": {task: {metric: value or null}}, "strata": {task: {stratum: {…}}}}."""
        return {
            "tasks": {task: _no_nan(values) for task, values in self.tasks.items()},
            "strata": {
                task: {name: _no_nan(values) for name, values in strata.items()}
                for task, strata in self.strata.items()
            },
        }


def _no_nan(values: Values) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def check_names(which: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of metrics, in lower case; ConfigError for one that is not known."""
    if which is None:
        return None
    names = tuple(dict.fromkeys(name.lower() for name in which))
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"unknown metric {name!r}; known: {', '.join(NAMES)}")
    return names


class BinaryMetrics:
    """Metrics of several tasks over the batches of an evaluation.

    Every row is kept, for exactness, in 5 bytes a task (float32 score, bool label), 4 more where
    weights are not all 1, 8 for its group and 1 for each stratum. `compute` takes about 60 bytes a
    row more, a task at a time.
    """

    def __init__(self, tasks: Sequence[str], which: Sequence[str] | None = None) -> None:
        """tasks: names of the columns of what `update` is given. which: names of metrics, in any
        case. Unset: all that the data allows. Raises ConfigError for a name not in NAMES.
        """
        self.tasks = tuple(tasks)
        self.which = check_names(which)
        self._scores: list[NDArray[np.float32]] = []  # each (T, B)
        self._labels: list[NDArray[np.bool_]] = []
        self._weights: list[NDArray[np.float32] | None] = []
        self._groups: list[NDArray[np.int64]] = []
        self._strata: dict[str, list[NDArray[np.bool_]]] = {}

    def update(
        self,
        scores: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        groups: Tensor | None = None,
        strata: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add B rows of T tasks.

        scores: (B, T) probabilities; labels: (B, T) 0 or 1; weights: (B, T), at least 0; groups:
        (B,) int64, the user of each row; strata: name → (B,) bool. Any device and float type.
        Groups and the names of strata must be given in every update or in none. Raises ValueError
        naming the task for NaN, scores outside [0, 1], other labels, bad weights; ConfigError for
        metrics that need groups where there are none.
        """
        masks = strata or {}
        self._check_shapes(scores, labels, weights, groups, masks)
        self._check_presence(groups, masks)
        self._append(scores, labels, weights)
        if groups is not None:
            self._groups.append(groups.detach().cpu().numpy().astype(np.int64))
        for name, mask in masks.items():
            self._strata.setdefault(name, []).append(mask.detach().cpu().numpy().astype(np.bool_))

    def _check_shapes(
        self,
        scores: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        groups: Tensor | None,
        strata: Mapping[str, Tensor],
    ) -> None:
        wanted = (len(scores), len(self.tasks))
        columns = {"scores": scores, "labels": labels, "weights": weights}
        rows = {"groups": groups, **{f"stratum {name}": mask for name, mask in strata.items()}}
        for shape, tensors in ((wanted, columns), (wanted[:1], rows)):
            for name, tensor in tensors.items():
                if tensor is not None and tuple(tensor.shape) != shape:
                    raise ValueError(
                        f"{name} have the shape {tuple(tensor.shape)}; {shape} is wanted for the "
                        f"tasks {', '.join(self.tasks)}"
                    )

    def _check_presence(self, groups: Tensor | None, strata: Mapping[str, Tensor]) -> None:
        grouped = [name for name in OF_GROUPS if self.which is not None and name in self.which]
        if groups is None and grouped:
            raise ConfigError(
                f"the metrics {', '.join(grouped)} need the user of each row, which this data "
                "lacks; leave them out or give the data an id to group by"
            )
        if self._scores and (groups is not None) != bool(self._groups):
            raise ValueError("groups are given in some updates and not in others")
        if self._scores and set(strata) != set(self._strata):
            raise ValueError(
                f"the strata {sorted(strata)} differ from the earlier {sorted(self._strata)}"
            )

    def _append(self, scores: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        # Copies in any case, for the caller may write over what it gave; + 0.0 turns −0 into 0.
        own_scores = _columns(scores) + np.float32(0)
        own_labels = _columns(labels)
        own_weights = None if weights is None else _columns(weights) + np.float32(0)
        for number, task in enumerate(self.tasks):
            check_scores(own_scores[number], f"task {task}")
            is_outside = (own_scores[number] < 0) | (own_scores[number] > 1)
            if is_outside.any():
                raise ValueError(
                    f"{int(is_outside.sum())} of {is_outside.size} scores of task {task} are no "
                    f"probabilities, the first is {own_scores[number][is_outside][0]}; give "
                    "probabilities, not logits"
                )
            check_labels(own_labels[number], f"task {task}")
            if own_weights is not None:
                check_weights(own_weights[number], f"task {task}")
        self._scores.append(own_scores)
        self._labels.append(own_labels != 0)
        all_one = own_weights is None or bool((own_weights == 1).all())
        self._weights.append(None if all_one else own_weights)

    def compute(self) -> BinaryReport:
        """The metrics of all rows of all processes; every process calls this and gets the same.

        Each task is computed by one process, to which the others send their rows of it; the tasks
        go round. Rows travel as CPU tensors: the process group needs a backend for them (gloo), as
        `tml.distributed.join` makes it. Raises ValueError on every process if some of them were
        given groups or strata and others not.
        """
        shares = _exchange(self._share())
        rank = dist.get_rank() if dist.is_initialized() else 0
        agreed = self._agree(shares)
        is_grouped, strata = agreed.is_grouped, agreed.strata
        is_weighted = any(share.is_weighted for share in shares)
        counts = [share.num_rows for share in shares]
        groups, masks = None, {}
        for to in range(len(shares)):
            own_groups = _gather(_join(self._groups, np.int64), counts, to) if is_grouped else None
            own_masks = {name: _gather(self._mask(name), counts, to) for name in strata}
            if to == rank:
                groups = None if own_groups is None else _number(own_groups)
                masks = {name: mask for name, mask in own_masks.items() if mask is not None}
        found: dict[str, dict[str, Values]] = {}
        for number, task in enumerate(self.tasks):
            to = number % len(shares)
            scores = _gather(self._column(self._scores, number, np.float32), counts, to)
            labels = _gather(self._column(self._labels, number, np.bool_), counts, to)
            weights = _gather(self._weight(number), counts, to) if is_weighted else None
            if scores is not None and labels is not None:
                found[task] = self._measure(scores, labels, weights, groups, masks)
        everything = {task: own[task] for own in _exchange(found) for task in own}
        return BinaryReport(
            tasks={task: everything[task][""] for task in self.tasks},
            strata={task: {s: everything[task][s] for s in strata} for task in self.tasks}
            if strata
            else {},
        )

    def _measure(
        self,
        scores: NDArray[np.float32],
        labels: NDArray[np.bool_],
        weights: NDArray[np.float32] | None,
        groups: NDArray[np.int64] | None,
        masks: Mapping[str, NDArray[np.bool_]],
    ) -> dict[str, Values]:
        """Stratum → metrics of one task; the stratum of all rows is named ""."""
        order = _sort_exactly(scores, labels, weights)
        rows = _Rows(scores, labels, weights, groups).take(order)
        measured = {"": self._values(rows)}
        for name, mask in masks.items():
            measured[name] = self._values(rows.take(mask[order]))
        return measured

    def _values(self, rows: _Rows) -> Values:
        names = NAMES if self.which is None else self.which
        tally = rows.tally()
        values = {name: OF_TALLY[name](tally) for name in names if name in OF_TALLY}
        grouped = [name for name in names if name in OF_GROUPS]
        areas, weights = np.empty(0), np.empty(0)
        if grouped and rows.groups is not None:
            areas, weights = _group_aucs(rows)
        values |= {name: _mean_auc(areas, weights, by_rows=OF_GROUPS[name]) for name in grouped}
        return values | {"rows": len(rows), "positives": int(np.count_nonzero(rows.labels))}

    def _share(self) -> "_Share":
        return _Share(
            num_rows=sum(scores.shape[1] for scores in self._scores),
            is_grouped=bool(self._groups),
            is_weighted=any(weights is not None for weights in self._weights),
            strata=tuple(self._strata),
        )

    def _agree(self, shares: "Sequence[_Share]") -> "_Share":
        """A share that says for all whether there are groups and which strata; processes without
        rows have no say.
        """
        given = [share for share in shares if share.num_rows]
        if len({(share.is_grouped, frozenset(share.strata)) for share in given}) > 1:
            raise ValueError(f"the processes were given different groups or strata: {given}")
        return given[0] if given else shares[0]

    @staticmethod
    def _column(parts: Sequence[NDArray[Any]], number: int, dtype: Any) -> NDArray[Any]:
        return _join([part[number] for part in parts], dtype)

    def _weight(self, number: int) -> NDArray[np.float32]:
        pairs = zip(self._scores, self._weights, strict=True)
        parts = [np.ones_like(s[number]) if w is None else w[number] for s, w in pairs]
        return _join(parts, np.float32)

    def _mask(self, name: str) -> NDArray[np.bool_]:
        return _join(self._strata.get(name, []), np.bool_)


@dataclass(frozen=True)
class _Share:
    """What one process has."""

    num_rows: int
    is_grouped: bool
    is_weighted: bool
    strata: tuple[str, ...]


def _columns(tensor: Tensor) -> NDArray[np.float32]:
    """(B, T) → (T, B) on the CPU."""
    return np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy().T)


def _join(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts])


def _exchange(value: Any) -> list[Any]:
    """The values of all processes, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _gather(own: NDArray[Any], counts: Sequence[int], to: int) -> NDArray[Any] | None:
    """The arrays of all processes end to end on process `to`; None on the others.

    counts: length of each process's array.
    """
    if not dist.is_initialized():
        return own
    rank = dist.get_rank()
    if rank != to:
        for chunk in torch.from_numpy(own.view(np.uint8)).split(CHUNK_ROWS * own.itemsize):
            if len(chunk):
                dist.send(chunk, to)
        return None
    everything = np.empty(sum(counts), own.dtype)
    parts = np.split(everything, np.cumsum(counts)[:-1])
    for source, part in enumerate(parts):
        if source == rank:
            part[:] = own
        else:
            for chunk in torch.from_numpy(part.view(np.uint8)).split(CHUNK_ROWS * own.itemsize):
                if len(chunk):
                    dist.recv(chunk, source)
    return everything


# What a person sees

# Together less than 60 characters wide: on a terminal of 80 there is room for names of tasks.
_SHOWN = {
    "auc": ("auc", ".4f"),
    "pr_auc": ("pr_auc", ".4f"),
    "gauc": ("gauc", ".4f"),
    "rce": ("rce", ".2f"),
    "ctr": ("ctr", ".4f"),
    "calibration": ("calib", ".3f"),
    "ece": ("ece", ".4f"),
    "rows": ("rows", ",.0f"),
}


def render(report: BinaryReport, title: str | None = None) -> RenderableType:
    """A table of a row a task, its strata below it, for a terminal of 80 columns: the metrics that
    tell most; "–" for what cannot be said. Metrics that no task has are left out, and so is what
    the names of all tasks begin with.
    """
    present = [
        name
        for name in _SHOWN
        if any(name in v and not math.isnan(v[name]) for v in report.tasks.values())
    ]
    table = layout.table(["task"], [_SHOWN[name][0] for name in present])
    common = _common_words(list(report.tasks))
    for task, values in report.tasks.items():
        strata = report.strata.get(task, {})
        table.add_row(_shown_name(task.removeprefix(common)), *_cells(values, present))
        for stratum, own in strata.items():
            table.add_row(f"  {_shown_name(stratum)}", *_cells(own, present))
        if strata:
            table.add_section()
    return table if title is None else layout.titled(title, table)


def _cells(values: Values, names: Sequence[str]) -> list[str]:
    """Numbers of fixed decimals, so that points stand below points; no zero in front of one."""
    cells = []
    for name in names:
        value = values.get(name, math.nan)
        text = "–" if math.isnan(value) else format(value, _SHOWN[name][1])
        cells.append(text[1:] if text.startswith("0.") else text)
    return cells


def _shown_name(name: str) -> str:
    """The name, or beginning and end of a long one."""
    half = (MAX_NAME_SHOWN - 1) // 2
    return name if len(name) <= MAX_NAME_SHOWN else f"{name[:half]}…{name[-half:]}"


def _common_words(names: Sequence[str]) -> str:
    """What dotted names have in common at their beginning: "recap.engagement."."""
    if not names:
        return ""
    pairs = zip(min(names), max(names), strict=False)
    common = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return common[: common.rfind(".") + 1]
