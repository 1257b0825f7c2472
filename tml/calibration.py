"""Learned calibration: monotone maps from a model's probability to one that holds, fitted on rows
that the model was not trained on.

`fit_isotonic` and `fit_platt` take predicted probabilities p (N,), labels y (N,) of 0 and 1 and
optional weights (N,), and give a `Calibration`: straight lines between at most 256 knots, which a
model can keep as two buffers of fixed size.

    learned = fit_platt(p, y)
    learned.apply(p); x, mapped = learned.knots(256)

`cross_fitted` calibrates every row by a map fitted without it, so that the result can be measured
on the same rows.
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tml import binary_metrics
from tml.binary_metrics import Tally

logger = logging.getLogger(__name__)

MAX_KNOTS = 256
KINDS = ("isotonic", "platt")
EPSILON = 1e-7  # logits are those of probabilities in [EPSILON, 1 − EPSILON]
END_SLOPE = 0.01  # relative rise of an isotonic map beyond its first and its last block
MIN_SLOPE = 1e-3  # of a Platt map: what is fitted lower would lose the order of scores
RIDGE = 1e-9  # of the Platt fit's slope, per row: keeps it finite if a score parts the classes
MAX_NEWTON_STEPS = 100  # ten are enough in ordinary cases
VECTOR_PASSES = 30  # of pooling, before a loop takes over
OUTER_KNOTS = 7  # of a Platt map's knots on each side of the scores that it was fitted on

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """A strictly increasing map of [0, 1] as straight lines between knots."""

    kind: str
    """isotonic or platt."""
    x: Array
    """(K,) predicted probabilities, 2 ≤ K ≤ 256, increasing from 0 to 1; values of float32."""
    y: Array
    """(K,) calibrated probabilities in [0, 1], not decreasing; values of float32."""
    max_error: float = 0.0
    """Largest distance between this map and the fitted one that it stands for, over the scores it
    was fitted on.
    """
    facts: dict[str, float] = field(default_factory=dict)
    """platt: slope and intercept; isotonic: number of blocks."""

    def __post_init__(self) -> None:
        wanted = len(self.x) == len(self.y) >= 2 and self.x[0] == 0 and self.x[-1] == 1
        if not wanted or not (np.diff(self.x) > 0).all():
            raise ValueError("knots need an x that increases from 0 to 1 and a y for each")
        if not (np.diff(self.y) >= 0).all() or self.y[0] < 0 or self.y[-1] > 1:
            raise ValueError("the y of knots must not decrease and lie in [0, 1]")

    def apply(self, p: ArrayLike) -> Array:
        """Calibrated probabilities, of the shape of p."""
        return np.asarray(np.interp(np.asarray(p, dtype=np.float64), self.x, self.y))

    def knots(self, n: int = MAX_KNOTS) -> tuple[Array, Array]:
        """The map as exactly n knots: x (n,) strictly increasing from 0 to 1, y (n,); both survive
        the way through float32.

        More than there are: points of the same lines are put in the middle of the widest gaps, so
        the map stays. Fewer: those that matter least are dropped. Raises ValueError for n < 2.
        """
        if n < 2:
            raise ValueError(f"{n} knots; a map from 0 to 1 needs at least 2")
        if n < len(self.x):
            kept = _most_telling(self.x, self.y, n)
            return self.x[kept], self.y[kept]
        # Every gap is cut into equal parts, as many as it takes for the widest part to be small.
        gaps = np.diff(self.x)
        parts = np.ones(len(gaps), dtype=np.int64)
        for _ in range(n - len(self.x)):
            parts[np.argmax(gaps / parts)] += 1
        places = np.repeat(np.arange(len(gaps)), parts)
        within = np.arange(len(places)) - np.repeat(np.cumsum(parts) - parts, parts)
        x = _to_float32(np.append(self.x[places] + gaps[places] * within / parts[places], 1.0))
        return x, _to_float32(self.apply(x))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to the same map, to the last bit."""
        return {
            "kind": self.kind,
            "x": self.x.tolist(),
            "y": self.y.tolist(),
            "max_error": self.max_error,
            "facts": self.facts,
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """What `to_json` wrote. Raises ValueError for knots that are no map."""
        x, y = (np.asarray(tree[name], dtype=np.float64) for name in ("x", "y"))
        return cls(tree["kind"], x, y, tree["max_error"], tree["facts"])


# Isotonic


def fit_isotonic(p: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> Calibration:
    """The monotone map of least squared error (Zadrozny and Elkan 2002), made strictly increasing.

    Adjacent scores are pooled into blocks of one mean label (PAV). Taken as a step function this
    ties all scores of a block, which costs AUC on other rows; so the map goes in straight lines
    through the blocks' centres (mean score, mean label) and, half-way between two blocks, their
    mean by size: a large block stays flat beside a small one. Beyond the outermost it rises by
    END_SLOPE of its distance to 0 or 1. What that costs is the exact mean in each block; the sum is
    put right again by one shift of all logits: Σ apply(p) = Σ y. A first block without positives is
    given ½ a positive row, and a last one without negatives ½ a negative: finite data proves no
    certainty. Blocks beyond MAX_KNOTS are left out where a line between others comes closest;
    `max_error` says how far the map is from the blocks after all of this.

    Needs thousands of positives to be better than `fit_platt`. Raises ValueError if one class is
    absent.
    """
    rows = _tally(p, y, weights)
    weight = rows.positives + rows.negatives
    starts, means = pool_adjacent_violators(rows.positives / weight, weight)
    x, mapped = _through_blocks(starts, means, rows.scores, weight)
    kept = _most_telling(x, mapped, MAX_KNOTS)
    shifted = _to_float32(_match_sum(x[kept], mapped[kept], rows))
    max_error = float(np.abs(np.interp(x, x[kept], shifted) - mapped).max())
    return Calibration("isotonic", x[kept], shifted, max_error, {"blocks": float(len(starts))})


def pool_adjacent_violators(
    values: ArrayLike, weights: ArrayLike
) -> tuple[NDArray[np.int64], Array]:
    """Isotonic regression: the non-decreasing sequence of least Σ w (value − fitted)², as blocks:
    (places where they start, their values, strictly increasing).

    values, weights: (n,), n ≥ 1, weights positive. Whole runs of values that fall or stay are
    pooled at once, pass after pass; a loop ends what would take too many passes, in O(n) time
    (Ayer et al. 1955; pooling in any order gives the same).
    """
    values = np.asarray(values, dtype=np.float64)
    sizes = np.asarray(weights, dtype=np.float64)
    starts, sums = np.arange(len(values)), values * sizes
    for _ in range(VECTOR_PASSES):
        is_first = np.append(True, values[1:] > values[:-1])
        if is_first.all():
            return starts, values
        firsts = np.flatnonzero(is_first)
        starts, sums = starts[firsts], np.add.reduceat(sums, firsts)
        sizes = np.add.reduceat(sizes, firsts)
        values = sums / sizes
    return _pool_one_by_one(starts, sums, sizes)


def _pool_one_by_one(
    starts: NDArray[np.int64], sums: Array, sizes: Array
) -> tuple[NDArray[np.int64], Array]:
    """The same for blocks with these sums and sizes, on a stack."""
    own_starts: list[int] = []
    own_sums: list[float] = []
    own_sizes: list[float] = []
    for start, total, size in zip(starts.tolist(), sums.tolist(), sizes.tolist(), strict=True):
        first, value = start, total / size
        while own_sums and own_sums[-1] / own_sizes[-1] >= value:
            total, size = total + own_sums.pop(), size + own_sizes.pop()
            first, value = own_starts.pop(), total / size
        own_starts.append(first)
        own_sums.append(total)
        own_sizes.append(size)
    return np.array(own_starts), np.array(own_sums) / np.array(own_sizes)


def _through_blocks(
    starts: NDArray[np.int64], means: Array, scores: Array, weight: Array
) -> tuple[Array, Array]:
    """Knots from 0 to 1 through blocks, strictly increasing.

    starts, means: (blocks,); scores, weight: (K,), the distinct scores and their weight.
    """
    sizes = np.add.reduceat(weight, starts)
    centres = np.add.reduceat(scores * weight, starts) / sizes
    means = means.copy()
    if means[0] == 0:
        means[0] = min(0.5 / sizes[0], means[1] / 2)
    if means[-1] == 1:
        means[-1] = max(1 - 0.5 / sizes[-1], (1 + means[-2]) / 2)
    between = (scores[starts[1:] - 1] + scores[starts[1:]]) / 2
    totals = means * sizes
    shared = (totals[:-1] + totals[1:]) / (sizes[:-1] + sizes[1:])
    x, y = np.empty(2 * len(means) - 1), np.empty(2 * len(means) - 1)
    x[::2], x[1::2], y[::2], y[1::2] = centres, between, means, shared
    # Scores that float32 cannot tell apart share a knot.
    x, firsts = np.unique(_to_float32(x), return_index=True)
    y = y[firsts]
    fall, rise = END_SLOPE * y[0], END_SLOPE * min(y[-1], 1 - y[-1])
    for end in (_to_float32(scores[0]), 0.0):
        if end < x[0]:
            x, y = np.append(end, x), np.append(y[0] - fall, y)
    for end in (_to_float32(scores[-1]), 1.0):
        if end > x[-1]:
            x, y = np.append(x, end), np.append(y, y[-1] + rise)
    return x, y


def _match_sum(x: Array, y: Array, rows: Tally) -> Array:
    """y with all logits shifted by one number, so that the map's sum over the rows is that of the
    labels.
    """
    # The map is linear in y: each row's weight falls on the knots on both sides of it.
    weight = rows.positives + rows.negatives
    place = np.clip(np.searchsorted(x, rows.scores, side="right") - 1, 0, len(x) - 2)
    share = (rows.scores - x[place]) / (x[place + 1] - x[place])
    on_knot = np.bincount(place, weight * (1 - share), len(x))
    on_knot += np.bincount(place + 1, weight * share, len(x))
    wanted = float(rows.positives.sum())
    logits = _logit(y, 1e-300)
    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        if float((_sigmoid(logits + middle) * on_knot).sum()) < wanted:
            low = middle
        else:
            high = middle
    return _sigmoid(logits + high)


# Platt


def fit_platt(
    p: ArrayLike,
    y: ArrayLike,
    weights: ArrayLike | None = None,
    prior_correction: bool = True,
) -> Calibration:
    """Logistic regression on the logit: sigmoid(slope · logit(p) + intercept), by Newton's method
    with the exact gradient and Hessian.

    prior_correction: whether the labels 0 and 1 are replaced by 1/(N₋ + 2) and (N₊ + 1)/(N₊ + 2)
    (Platt 1999, section 2.2; N: weight of the rows of a class), which keeps the fit finite where a
    score parts the classes and moves it little elsewhere. A slope below MIN_SLOPE (scores that
    rank backwards) is raised to it, with a warning. Raises ValueError if one class is absent.
    """
    rows = _tally(p, y, weights)
    slope, intercept = _fit_logistic(rows, prior_correction)
    if slope < MIN_SLOPE:
        logger.warning(
            "the scores rank backwards or not at all (slope %.3g): calibration gives nearly the "
            "mean label to every row",
            slope,
        )
        slope, intercept = _fit_logistic(rows, prior_correction, fixed_slope=MIN_SLOPE)
    x = _platt_grid(rows.scores[0], rows.scores[-1])
    mapped = _platt(x, slope, intercept)
    difference = np.interp(rows.scores, x, mapped) - _platt(rows.scores, slope, intercept)
    facts = {"slope": slope, "intercept": intercept}
    return Calibration("platt", x, _to_float32(mapped), float(np.abs(difference).max()), facts)


def _fit_logistic(
    rows: Tally, prior_correction: bool, fixed_slope: float | None = None
) -> tuple[float, float]:
    """Slope and intercept of least log-loss."""
    positive, negative = float(rows.positives.sum()), float(rows.negatives.sum())
    high = (positive + 1) / (positive + 2) if prior_correction else 1.0
    low = 1 / (negative + 2) if prior_correction else 0.0
    weight = rows.positives + rows.negatives
    wanted = rows.positives * high + rows.negatives * low
    inputs = _logit(rows.scores)
    if fixed_slope is None:
        design = np.stack([inputs, np.ones_like(inputs)], axis=1)  # (K, 2)
        slope, intercept = _newton(design, np.zeros_like(inputs), wanted, weight, np.array([1, 0]))
        return float(slope), float(intercept)
    design = np.ones((len(inputs), 1))
    (intercept,) = _newton(design, fixed_slope * inputs, wanted, weight, np.zeros(1))
    return fixed_slope, float(intercept)


def _newton(
    design: Array, offset: Array, wanted: Array, weight: Array, start: NDArray[Any]
) -> Array:
    """The θ (d,) of least Σ weight · log(1 + e^z) − wanted · z, z = design θ + offset, plus a ridge
    towards `start`.

    design: (K, d); offset, wanted, weight: (K,).
    """
    ridge = RIDGE * float(weight.sum())

    def loss(theta: Array) -> float:
        z = design @ theta + offset
        own = float((weight * np.logaddexp(0, z) - wanted * z).sum())
        return own + ridge / 2 * float(((theta - start) ** 2).sum())

    theta = start.astype(np.float64)
    current = loss(theta)
    for _ in range(MAX_NEWTON_STEPS):
        q = _sigmoid(design @ theta + offset)
        gradient = design.T @ (weight * q - wanted) + ridge * (theta - start)
        hessian = (design.T * (weight * q * (1 - q))) @ design + ridge * np.eye(len(theta))
        step = np.linalg.solve(hessian, gradient)
        decrease = float(gradient @ step)
        if decrease <= 1e-14 * float(weight.sum()):
            break
        # Halving keeps Newton from leaping over the optimum where the curvature is small.
        length = 1.0
        while loss(theta - length * step) > current - 1e-4 * length * decrease and length > 1e-9:
            length /= 2
        theta = theta - length * step
        current = loss(theta)
    return theta


def _platt(p: Array, slope: float, intercept: float) -> Array:
    """The map at the probabilities p; 0 and 1 stay."""
    mapped = _sigmoid(slope * _logit(p) + intercept)
    return np.where(p == 0, 0.0, np.where(p == 1, 1.0, mapped))


def _platt_grid(lowest: float, highest: float) -> Array:
    """Probabilities from 0 to 1, evenly apart as logits, closer between `lowest` and `highest`."""
    low, high = _logit(np.array([lowest, highest]))
    end = float(_logit(np.array([1 - EPSILON]))[0])
    num_inner = MAX_KNOTS - 2 - 2 * OUTER_KNOTS
    logits = [
        *np.linspace(-end, low, OUTER_KNOTS, endpoint=False),
        *np.linspace(low, high, num_inner),
        *np.linspace(high, end, OUTER_KNOTS + 1)[1:],
    ]
    return np.unique(_to_float32(np.array([0.0, *_sigmoid(np.array(logits)), 1.0])))


# What both share


def cross_fitted(
    p: ArrayLike,
    y: ArrayLike,
    folds: int,
    seed: int,
    kind: str,
    weights: ArrayLike | None = None,
) -> Array:
    """Calibrated probabilities (N,), each by a map fitted on the other folds.

    Rows are dealt to `folds` parts at random, each class evenly. The order of rows of different
    folds comes from different maps, which costs some AUC (0.001 with 5,000 positives and isotonic)
    that one map does not. Raises ValueError for another kind
    than isotonic or platt, fewer than two folds, or folds that leave a class without a row.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of calibration {kind!r}; known: {', '.join(KINDS)}")
    if folds < 2:
        raise ValueError(f"{folds} folds; at least 2 are needed to leave one out")
    p, labels = np.asarray(p, dtype=np.float64), np.asarray(y)
    w = None if weights is None else np.asarray(weights, dtype=np.float64)
    fit = fit_isotonic if kind == "isotonic" else fit_platt
    fold = _deal(labels != 0, folds, seed)
    calibrated = np.empty(len(p))
    for number in range(folds):
        own = fold == number
        learned = fit(p[~own], labels[~own], None if w is None else w[~own])
        calibrated[own] = learned.apply(p[own])
    return calibrated


def _deal(labels: NDArray[np.bool_], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each row; in each class, folds differ by at most one row."""
    generator = np.random.default_rng(seed)
    fold = np.empty(len(labels), dtype=np.int64)
    for rows in (np.flatnonzero(labels), np.flatnonzero(~labels)):
        fold[generator.permutation(rows)] = np.arange(len(rows)) % folds
    return fold


def _tally(p: ArrayLike, y: ArrayLike, weights: ArrayLike | None) -> Tally:
    """The rows at each distinct score; ValueError if they cannot be fitted."""
    rows = binary_metrics.tally(p, y, weights)
    positive, negative = float(rows.positives.sum()), float(rows.negatives.sum())
    if not positive or not negative:
        absent = "positive" if not positive else "negative"
        raise ValueError(
            f"no {absent} row among those given (weight {positive + negative:g}): there is nothing "
            "to calibrate by; leave this task as it is or take more rows"
        )
    if rows.scores[0] < 0 or rows.scores[-1] > 1:
        raise ValueError(
            f"scores from {rows.scores[0]:.6g} to {rows.scores[-1]:.6g} are no probabilities"
        )
    return rows


def _most_telling(x: Array, y: Array, n: int) -> NDArray[np.int64]:
    """At most n places of knots, in order, the first and the last among them: again and again the
    one that lies farthest from the line between its kept neighbours.

    Distance is that of logits, to first order: 0.001 is little beside ½ and much beside 0.001.
    """
    if len(x) <= n:
        return np.arange(len(x))
    scale = np.maximum(y * (1 - y), EPSILON)
    kept = [0, len(x) - 1]
    farthest = {0: _farthest(x, y, scale, 0, len(x) - 1)}  # by the left end of a stretch
    ends = {0: len(x) - 1}
    while len(kept) < n:
        left = max(farthest, key=lambda start: farthest[start][0])
        place, end = farthest[left][1], ends[left]
        kept.append(place)
        for start, stop in ((left, place), (place, end)):
            farthest[start], ends[start] = _farthest(x, y, scale, start, stop), stop
    return np.sort(np.array(kept))


def _farthest(x: Array, y: Array, scale: Array, start: int, stop: int) -> tuple[float, int]:
    """Distance and place of the knot between start and stop that is farthest from their line."""
    if stop - start < 2:
        return -math.inf, start
    inner = slice(start + 1, stop)
    line = y[start] + (y[stop] - y[start]) * (x[inner] - x[start]) / (x[stop] - x[start])
    distance = np.abs(y[inner] - line) / scale[inner]
    place = int(np.argmax(distance))
    return float(distance[place]), start + 1 + place


def _logit(p: Array, epsilon: float = EPSILON) -> Array:
    p = np.clip(p, epsilon, 1 - max(epsilon, 1e-16))
    return np.log(p) - np.log1p(-p)


def _sigmoid(z: Array) -> Array:
    # exp of nothing above 0: no overflow on either side.
    small = np.exp(-np.abs(z))
    return np.asarray(np.where(z >= 0, 1, small) / (1 + small))


def _to_float32(values: ArrayLike) -> Array:
    """The nearest float32 values, as float64."""
    return np.asarray(values, dtype=np.float32).astype(np.float64)
