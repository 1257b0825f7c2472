"""Calibration maps against pooling by hand, against known logistic curves and against
scikit-learn's isotonic regression.
"""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tml import binary_metrics, calibration
from tml.calibration import Calibration, cross_fitted, fit_isotonic, fit_platt
from tml.calibration import pool_adjacent_violators as pool


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def make_world(
    n: int, slope: float, intercept: float, mean: float = -2, seed: int = 0
) -> tuple[Any, Any, Any]:
    """n rows: predictions, labels, and the true probabilities sigmoid(slope · logit(p) +
    intercept).
    """
    generator = np.random.default_rng(seed)
    logits = generator.normal(mean, 1.2, n)
    truth = sigmoid(slope * logits + intercept)
    return sigmoid(logits), (generator.random(n) < truth).astype(float), truth


FITS = pytest.mark.parametrize("fit", [fit_isotonic, fit_platt])


# Pooling


def test_pooling_makes_the_blocks_found_by_hand() -> None:
    starts, values = pool([1, 0, 1, 0, 1], np.ones(5))
    # 1 0 → ½, again 1 0 → ½, equal: one block of four.
    assert (starts.tolist(), values.tolist()) == ([0, 4], [0.5, 1])
    # 3 1 → 2; 2 2 are equal; 5 4 → 4½.
    starts, values = pool([0, 3, 1, 2, 5, 4], np.ones(6))
    assert (starts.tolist(), values.tolist()) == ([0, 1, 4], [0, 2, 4.5])
    # −9 pulls everything down with it: 1 2 3 −9 → −¾.
    starts, values = pool([1, 2, 3, -9], np.ones(4))
    assert (starts.tolist(), values.tolist()) == ([0], [-0.75])


def test_pooling_weighs() -> None:
    starts, values = pool([1, 0, 1], [1, 3, 1])
    assert (starts.tolist(), values.tolist()) == ([0, 2], [0.25, 1])


def test_pooling_gives_what_scikit_learn_gives() -> None:
    # scikit-learn 1.9.1: IsotonicRegression().fit_transform(arange(12), y, sample_weight=w)
    y = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1])
    w = (np.arange(12) % 5 + 1) / 2
    starts, values = pool(y, w)
    fitted = np.repeat(values, np.diff(starts, append=12))
    expected = [1 / 3] * 2 + [3 / 7] * 2 + [0.6] * 5 + [5 / 6] * 2 + [1]
    assert fitted == pytest.approx(np.array(expected), rel=1e-13)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(1, 3)), min_size=1, max_size=30))
def test_pooling_in_passes_is_pooling_one_by_one(rows: list[tuple[int, int]]) -> None:
    values, weights = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    starts, found = pool(values, weights)
    one_by_one = calibration._pool_one_by_one(np.arange(len(rows)), values * weights, weights)
    assert starts.tolist() == one_by_one[0].tolist()
    assert found == pytest.approx(one_by_one[1], rel=1e-12, abs=1e-12)
    # The minimax formula of isotonic regression (Robertson et al. 1988, 1.4).
    sums = np.append(0, np.cumsum(values * weights))
    sizes = np.append(0, np.cumsum(weights))
    fitted = np.repeat(found, np.diff(starts, append=len(rows)))
    for i in range(len(rows)):
        best = max(
            min((sums[j + 1] - sums[k]) / (sizes[j + 1] - sizes[k]) for j in range(i, len(rows)))
            for k in range(i + 1)
        )
        assert fitted[i] == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_pooling_is_quick_where_every_pass_pools_one_pair() -> None:
    starts, values = pool(np.append(np.arange(100_000.0), -1e12), np.ones(100_001))
    assert starts.tolist() == [0]
    assert values[0] == pytest.approx((99_999 * 50_000 - 1e12) / 100_001)


# Isotonic


def test_isotonic_goes_through_its_blocks_and_half_way_between() -> None:
    # .2 positive, .3 and .4 not: pooled with .1 into nothing, as 0 < ⅓; so 0 | 1 0 0 | 1 1 0 | 1.
    p = [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9]
    learned = fit_isotonic(p, [0, 1, 0, 0, 1, 1, 0, 1])
    assert learned.facts["blocks"] == 4
    assert learned.x == pytest.approx([0, 0.1, 0.15, 0.3, 0.5, 0.7, 0.85, 0.9, 1])
    # 0 becomes min(½, ⅓/2) = ⅙ and 1 likewise ⅚; between: (⅙ + 3·⅓)/4, (⅓ + ⅔)/2. All of it is
    # symmetric: no shift.
    expected = [1 / 6, 7 / 24, 1 / 3, 1 / 2, 2 / 3, 17 / 24, 5 / 6]
    assert learned.y[1:-1] == pytest.approx(expected, abs=1e-6)
    assert learned.y[[0, -1]] == pytest.approx([0.99 / 6, 1 - 0.99 / 6], abs=1e-6)


def test_a_large_block_stays_flat_beside_a_small_one() -> None:
    # 1 of 3 positive up to .9, and one positive above: lines between the centres would climb all
    # the way from .45.
    p = np.arange(1, 901) / 1000
    learned = fit_isotonic([*p, 0.95], [*np.tile([1, 0, 0], 300), 1])
    assert learned.facts["blocks"] == 2
    assert learned.apply(0.9) - learned.apply(0.45) < 0.001
    assert learned.apply(0.95) > 0.6


def test_isotonic_never_says_never() -> None:
    # Blocks 0 of weight 3 and 1 of weight 2: ½ a row of the other class in each.
    learned = fit_isotonic([0.1, 0.2, 0.3, 0.7, 0.8], [0, 0, 0, 1, 1])
    mapped = learned.apply([0, 0.1, 0.3, 0.7, 0.8, 1])
    assert 0.1 < mapped[0] < mapped[-1] < 0.85
    assert (np.diff(mapped) > 0).all()


@FITS
def test_the_sum_of_predictions_becomes_the_sum_of_labels(fit: Any) -> None:
    for mean in (-4, -2, 1):
        p, y, _ = make_world(40_000, 1.7, -0.8, mean)
        assert abs(binary_metrics.calibration(fit(p, y).apply(p), y) - 1) < 1e-3
        w = np.where(y == 1, 1, 20.0)
        assert abs(binary_metrics.calibration(fit(p, y, w).apply(p), y, w) - 1) < 1e-3
    assert abs(binary_metrics.calibration(fit_isotonic(p, y).apply(p), y) - 1) < 1e-6


@FITS
def test_the_order_of_scores_and_so_the_auc_stays(fit: Any) -> None:
    p, y, _ = make_world(20_000, 1.7, -0.8)
    mapped = fit(p, y).apply(p)
    assert (np.diff(mapped[np.argsort(p)]) > 0).all()
    assert binary_metrics.auc(mapped, y) == binary_metrics.auc(p, y)


@FITS
def test_the_map_comes_close_to_the_truth(fit: Any) -> None:
    p, y, truth = make_world(200_000, 1.7, -0.8)
    mapped = fit(p, y).apply(p)
    assert np.abs(p - truth).mean() > 0.05
    assert np.abs(mapped - truth).mean() < 0.004
    assert binary_metrics.log_loss(mapped, y) < binary_metrics.log_loss(truth, y) + 1e-4
    assert binary_metrics.expected_calibration_error(mapped, y) < 0.003


@FITS
def test_what_is_calibrated_stays_nearly_as_it_is(fit: Any) -> None:
    p, y, _ = make_world(200_000, 1, 0)
    assert np.abs(fit(p, y).apply(p) - p).mean() < 0.005
    once = fit(p, y).apply(p)
    assert np.abs(fit(once, y).apply(once) - once).mean() < 0.001


def test_isotonic_learns_what_a_line_of_logits_cannot() -> None:
    generator = np.random.default_rng(1)
    p = generator.random(100_000)
    truth = np.where(p < 0.5, 0.1, 0.6) + 0.05 * p
    y = generator.random(100_000) < truth
    bent, straight = fit_isotonic(p, y).apply(p), fit_platt(p, y).apply(p)
    assert np.abs(bent - truth).mean() < 0.01 < 0.05 < np.abs(straight - truth).mean()


def test_many_blocks_are_thinned_with_the_stated_error() -> None:
    # Every row is a block of its own: the label's share grows with the score.
    p = np.arange(1, 2001) / 2001
    x = np.repeat(p, 2)
    weights = np.stack([p**3, 1 - p**3], axis=1).ravel()
    learned = fit_isotonic(x, np.tile([1, 0], 2000), weights)
    assert learned.facts["blocks"] == 2000
    assert len(learned.x) == 256
    error = np.abs(learned.apply(p) - p**3).max()
    assert error == pytest.approx(learned.max_error, rel=0.01)  # which sees points between too
    assert 0 < error < 1e-4


# Platt


def test_platt_recovers_slope_and_intercept() -> None:
    p, y, _ = make_world(400_000, 1.7, -0.8)
    facts = fit_platt(p, y).facts
    assert facts["slope"] == pytest.approx(1.7, abs=0.02)
    assert facts["intercept"] == pytest.approx(-0.8, abs=0.03)


def test_platt_solves_two_scores_exactly() -> None:
    # p = ¼ with 1 of 10 positive, p = ¾ with 6 of 10: two equations, logits ∓ ln 3.
    p = np.repeat([0.25, 0.75], 10)
    y = np.r_[1, np.zeros(9), np.ones(6), np.zeros(4)]
    learned = fit_platt(p, y, prior_correction=False)
    low, high = math.log(1 / 9), math.log(6 / 4)
    assert learned.facts["slope"] == pytest.approx((high - low) / (2 * math.log(3)), rel=1e-6)
    assert learned.facts["intercept"] == pytest.approx((high + low) / 2, rel=1e-6)
    assert learned.apply([0.25, 0.75]) == pytest.approx([0.1, 0.6], rel=1e-5)
    # With the prior the labels are 8/9 and 1/15.
    learned = fit_platt(p, y)
    expected = [(1 * 8 / 9 + 9 / 15) / 10, (6 * 8 / 9 + 4 / 15) / 10]
    assert learned.apply([0.25, 0.75]) == pytest.approx(expected, rel=1e-5)


def test_platt_stays_finite_where_a_score_parts_the_classes() -> None:
    p, y = [0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]
    # Platt's labels are ¼ and ¾: the middle of each pair goes near them.
    mapped = fit_platt(p, y).apply(p)
    assert mapped.mean() == pytest.approx(0.5)
    assert mapped[0] < 0.25 < mapped[1] < mapped[2] < 0.75 < mapped[3]
    facts = fit_platt(p, y, prior_correction=False).facts
    assert 5 < facts["slope"] < 100
    assert np.isfinite(fit_platt([0.0, 1.0], y[1:3]).apply([0.0, 0.5, 1.0])).all()


def test_platt_with_one_score_gives_the_mean_label() -> None:
    learned = fit_platt([0.3] * 10, [1] + [0] * 9, prior_correction=False)
    assert learned.apply(0.3) == pytest.approx(0.1, rel=1e-6)


def test_platt_never_turns_the_order_round(caplog: pytest.LogCaptureFixture) -> None:
    learned = fit_platt([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1])
    assert learned.facts["slope"] == calibration.MIN_SLOPE
    assert learned.apply([0.1, 0.9]) == pytest.approx([0.5, 0.5], abs=0.003)
    assert (np.diff(learned.apply([0.1, 0.5, 0.9])) > 0).all()
    assert "rank backwards" in caplog.text
    learned = fit_platt([0.9, 0.8, 0.7, 0.2, 0.1], [0, 0, 0, 0, 1], prior_correction=False)
    assert learned.apply([0.1, 0.9]) == pytest.approx([0.2, 0.2], abs=0.003)


# Both


@FITS
def test_a_weight_is_a_number_of_equal_rows(fit: Any) -> None:
    p, y, _ = make_world(3000, 1.7, -0.8)
    w = np.arange(3000) % 4
    weighted, repeated = fit(p, y, w), fit(np.repeat(p, w), np.repeat(y, w))
    assert weighted.apply(p) == pytest.approx(repeated.apply(p), rel=1e-5)


@FITS
@pytest.mark.parametrize(("labels", "absent"), [([0, 0], "positive"), ([1, 1], "negative")])
def test_one_class_is_nothing_to_fit(fit: Any, labels: list[int], absent: str) -> None:
    with pytest.raises(ValueError, match=f"no {absent} row .*nothing to calibrate by"):
        fit([0.1, 0.2], labels)
    with pytest.raises(ValueError, match=f"no {absent} row"):
        fit([0.1, 0.2, 0.3], [*labels, 1 - labels[0]], [1, 1, 0])


@FITS
def test_logits_are_refused(fit: Any) -> None:
    with pytest.raises(ValueError, match=r"from -2 to 3 are no probabilities"):
        fit([-2, 3], [0, 1])


@FITS
@pytest.mark.parametrize("p", [[0.0, 0.0, 1.0, 1.0], [0.5] * 4, [0.0, 1e-12, 1e-9, 1.0]])
def test_scores_at_the_ends_and_close_together_give_a_map(fit: Any, p: list[float]) -> None:
    learned = fit(p, [0, 1, 0, 1])
    x, y = learned.knots(256)
    assert (np.diff(x.astype(np.float32)) > 0).all()
    assert ((y >= 0) & (y <= 1)).all()


@FITS
@pytest.mark.parametrize("n", [2, 7, 40, 256, 300])
def test_knots_are_as_many_as_wanted_and_cover_everything(fit: Any, n: int) -> None:
    p, y, _ = make_world(20_000, 1.7, -0.8)
    learned = fit(p, y)
    x, mapped = learned.knots(n)
    assert len(x) == len(mapped) == n
    assert (x[0], x[-1]) == (0, 1)
    assert (np.diff(x.astype(np.float32)) > 0).all()
    assert (np.diff(mapped) >= 0).all()
    if n >= 256:
        assert np.interp(p, x, mapped) == pytest.approx(learned.apply(p), rel=1e-5)
    elif n == 40:
        assert np.interp(p, x, mapped) == pytest.approx(learned.apply(p), rel=0.2)


def test_knots_of_few_are_points_of_the_same_lines() -> None:
    learned = Calibration("isotonic", np.array([0, 0.5, 1]), np.array([0, 0.125, 1]))
    x, y = learned.knots(5)
    assert x.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert y.tolist() == [0, 0.0625, 0.125, 0.5625, 1]
    with pytest.raises(ValueError, match="1 knots"):
        learned.knots(1)


@FITS
def test_json_keeps_every_bit(fit: Any) -> None:
    p, y, _ = make_world(5000, 1.7, -0.8)
    learned = fit(p, y)
    again = Calibration.from_json(json.loads(json.dumps(learned.to_json(), allow_nan=False)))
    assert (again.apply(p) == learned.apply(p)).all()
    assert again.to_json() == learned.to_json()


@pytest.mark.parametrize(
    ("x", "y"), [([0, 0.5], [0, 1]), ([0, 0, 1], [0, 0, 1]), ([0, 1], [0.6, 0.5]), ([0, 1], [0, 2])]
)
def test_knots_that_are_no_map_are_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="knots"):
        Calibration("platt", np.array(x), np.array(y))


# Cross-fitting


@pytest.mark.parametrize("kind", ["isotonic", "platt"])
def test_rows_are_calibrated_by_maps_fitted_without_them(kind: str) -> None:
    p, y, _ = make_world(4000, 1.7, -0.8)
    first = cross_fitted(p, y, 4, 0, kind)
    assert abs(binary_metrics.calibration(first, y) - 1) < 0.02
    assert (first == cross_fitted(p, y, 4, 0, kind)).all()
    assert (first != cross_fitted(p, y, 4, 1, kind)).any()
    # What is changed in a fold's rows moves all other rows, and none of that fold.
    fold = calibration._deal(y != 0, 4, 0)
    weights = np.where((fold == 2) & (y == 1), 3.0, 1.0)
    moved = cross_fitted(p, y, 4, 0, kind, weights) != first
    assert not moved[fold == 2].any()
    assert moved[fold != 2].mean() > 0.9


def test_folds_hold_each_class_evenly() -> None:
    labels = np.arange(103) % 10 == 0
    fold = calibration._deal(labels, 5, 0)
    assert np.bincount(fold[labels]).tolist() == [3, 2, 2, 2, 2]
    assert np.bincount(fold[~labels]).tolist() == [19, 19, 18, 18, 18]


def test_noise_that_is_learned_shows_out_of_fold_only() -> None:
    generator = np.random.default_rng(2)
    p, y = generator.random(1000), generator.random(1000) < 0.3
    inside = binary_metrics.rce(fit_isotonic(p, y).apply(p), y)
    assert inside > 0 > binary_metrics.rce(cross_fitted(p, y, 5, 0, "isotonic"), y)


def test_cross_fitting_refuses_what_cannot_be_done() -> None:
    with pytest.raises(ValueError, match="unknown kind of calibration 'beta'; known: isotonic, pl"):
        cross_fitted([0.1, 0.2], [0, 1], 2, 0, "beta")
    with pytest.raises(ValueError, match="1 folds"):
        cross_fitted([0.1, 0.2], [0, 1], 1, 0, "platt")
    with pytest.raises(ValueError, match="no positive row"):
        cross_fitted([0.1, 0.2, 0.3], [0, 0, 1], 2, 0, "platt")
