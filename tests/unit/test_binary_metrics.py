"""Metrics of probabilities against numbers worked out by hand, against a loop over all pairs and
against scikit-learn's.
"""

import io
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tml import binary_metrics
from tml.binary_metrics import BinaryMetrics
from tml.config import ConfigError

LN2 = math.log(2)

# Five rows for a pencil. Positives at .9 .4 .4, negatives at .8 .4.
SCORES = [0.9, 0.8, 0.4, 0.4, 0.4]
LABELS = [1, 0, 1, 1, 0]


def test_auc_counts_pairs_and_halves_ties() -> None:
    # .9 beats .8 and .4: 2; each positive .4 ties with one negative: ½ + ½. 3 of 6 pairs.
    assert binary_metrics.auc(SCORES, LABELS) == 0.5
    assert binary_metrics.auc([0.1, 0.2, 0.3], [0, 0, 1]) == 1
    assert binary_metrics.auc([0.1, 0.2, 0.3], [1, 0, 0]) == 0
    assert binary_metrics.auc([0.1, 0.2, 0.3], [0, 1, 0]) == 0.5


def test_auc_weighs_a_pair_by_the_product_of_its_weights() -> None:
    # Pairs: .9 over .8: 2·3, .9 over .4: 2·1, ties at .4: (1+1)·1/2. 9 of (2+1+1)·(3+1) = 16.
    assert binary_metrics.auc(SCORES, LABELS, [2, 3, 1, 1, 1]) == 9 / 16


def test_auc_takes_any_scores() -> None:
    assert binary_metrics.auc([-math.inf, -3.5, 700, math.inf], [0, 1, 0, 1]) == 0.75
    # Next to each other as doubles, the same as floats.
    assert binary_metrics.auc([0.5, 0.5 + 1e-15], [0, 1]) == 1


def test_all_scores_equal_is_an_auc_of_a_half() -> None:
    assert binary_metrics.auc([0.3] * 7, [1, 0, 0, 1, 0, 0, 0]) == 0.5


def test_pr_auc_adds_precision_where_recall_grows() -> None:
    # Threshold .9: precision 1, recall 1/3; .8: recall the same; .4: precision 3/5, recall 1.
    assert binary_metrics.pr_auc(SCORES, LABELS) == pytest.approx(1 / 3 + 2 / 3 * 3 / 5)
    assert binary_metrics.pr_auc([0.2, 0.7], [1, 1]) == 1


def test_log_loss_is_the_mean_logarithm() -> None:
    # ½ for the first, ¼ for what happened of the second.
    assert binary_metrics.log_loss([0.5, 0.75], [1, 0]) == pytest.approx((LN2 + 2 * LN2) / 2)
    assert binary_metrics.log_loss([0.5, 0.75], [1, 0], [3, 1]) == pytest.approx(5 * LN2 / 4)


def test_certain_and_wrong_costs_the_logarithm_of_the_clamp() -> None:
    assert binary_metrics.log_loss([0.0], [1]) == pytest.approx(-math.log(1e-7))
    assert binary_metrics.log_loss([1.0], [0]) == pytest.approx(-math.log(1e-7))
    assert binary_metrics.log_loss([0.0, 1.0], [0, 1]) == pytest.approx(1e-7, rel=1e-6)
    assert binary_metrics.log_loss([1e-30], [1]) == pytest.approx(-math.log(1e-7))


def test_ctr_and_calibration_are_ratios_of_sums() -> None:
    assert binary_metrics.ctr(SCORES, LABELS) == 0.6
    assert binary_metrics.calibration(SCORES, LABELS) == pytest.approx(2.9 / 3)
    assert binary_metrics.ctr(SCORES, LABELS, [1, 3, 0, 0, 1]) == 0.2
    assert binary_metrics.calibration(SCORES, LABELS, [1, 3, 0, 0, 1]) == pytest.approx(3.7)


def test_rce_is_zero_for_the_mean_label_and_positive_for_better() -> None:
    assert binary_metrics.rce([0.25] * 4, [0, 0, 1, 0]) == pytest.approx(0, abs=1e-12)
    # Reference: ln 2 a row. ¾ given to what happened, each time: −ln ¾.
    right = [0.75, 0.25, 0.75, 0.25]
    expected = 100 * (LN2 + math.log(0.75)) / LN2
    assert binary_metrics.rce(right, [1, 0, 1, 0]) == pytest.approx(expected)
    assert binary_metrics.rce([1 - p for p in right], [1, 0, 1, 0]) == pytest.approx(
        100 * (LN2 + math.log(0.25)) / LN2
    )
    assert binary_metrics.rce([1.0, 0.0], [1, 0]) == pytest.approx(100, abs=1e-4)


def test_nrce_forgives_the_level() -> None:
    right = np.array([0.75, 0.25, 0.75, 0.25])
    labels = [1, 0, 1, 0]
    assert binary_metrics.nrce(right, labels) == binary_metrics.rce(right, labels)
    assert binary_metrics.nrce(right / 4, labels) == pytest.approx(
        binary_metrics.rce(right, labels)
    )
    assert binary_metrics.rce(right / 4, labels) < 0
    # Scaled by 2 the first would be 1.6: clamped.
    assert binary_metrics.nrce([0.8, 0.2, 0.0, 0.0], [1, 1, 0, 0]) == pytest.approx(
        100 * (4 * LN2 + math.log(0.4)) / (4 * LN2), abs=1e-4
    )
    assert math.isnan(binary_metrics.nrce([0.0, 0.0], [1, 0]))


def test_calibration_error_is_the_mean_gap_of_equal_bins() -> None:
    scores, labels = [0.1, 0.3, 0.6, 0.8], [0, 1, 1, 1]
    # Two bins: mean .2 against .5, mean .7 against 1.
    assert binary_metrics.expected_calibration_error(scores, labels, num_bins=2) == pytest.approx(
        0.3
    )
    # One bin: 1.8 against 3; four bins: .1, .7, .4, .2.
    assert binary_metrics.expected_calibration_error(scores, labels, num_bins=1) == pytest.approx(
        0.3
    )
    assert binary_metrics.expected_calibration_error(scores, labels, num_bins=4) == pytest.approx(
        0.35
    )
    # Gaps of both signs cancel within a bin only.
    assert binary_metrics.expected_calibration_error([0.2, 0.8], [1, 0], num_bins=1) == 0
    assert binary_metrics.expected_calibration_error([0.2, 0.8], [1, 0]) == pytest.approx(0.8)


def test_rows_of_one_score_stay_in_one_bin() -> None:
    for labels in itertools.permutations([1, 1, 0, 0]):
        assert binary_metrics.expected_calibration_error([0.5] * 4, labels, num_bins=4) == 0


def test_rows_of_one_score_go_where_their_middle_lies() -> None:
    # Middles at ½ and 2½ of 4: one in each half, gaps .2 and 3 · .2.
    found = binary_metrics.expected_calibration_error(
        [0.2, 0.8, 0.8, 0.8], [0, 1, 1, 1], num_bins=2
    )
    assert found == pytest.approx(0.2)


def test_a_bin_is_needed() -> None:
    with pytest.raises(ValueError, match="0 bins"):
        binary_metrics.expected_calibration_error(SCORES, LABELS, num_bins=0)


def test_grouped_auc_is_the_mean_over_groups_with_both_classes() -> None:
    #                   7: ½ (tie)      −3: 1              7   5: one class
    scores = np.array([0.5, 0.5, 0.1, 0.9, 0.3, 0.2, 0.7])
    labels = np.array([1, 0, 0, 1, 0, 0, 1])
    groups = np.array([7, 7, -3, -3, -3, -3, 5])
    assert binary_metrics.grouped_auc(scores, labels, groups) == 0.75
    assert binary_metrics.grouped_auc(scores, labels, groups, by_rows=True) == pytest.approx(
        (2 * 0.5 + 4 * 1) / 6
    )
    assert math.isnan(binary_metrics.grouped_auc(scores, labels, np.arange(7)))
    huge = groups * (1 << 60) // 8
    assert binary_metrics.grouped_auc(scores, labels, huge) == 0.75


def test_a_class_absent_or_no_rows_is_nan_and_no_error() -> None:
    nothing: list[float] = []
    for function in (binary_metrics.auc, binary_metrics.rce, binary_metrics.nrce):
        assert math.isnan(function([0.5, 0.7], [1, 1]))
        assert math.isnan(function([0.5, 0.7], [0, 0]))
        assert math.isnan(function([0.5], [1]))
        assert math.isnan(function([0.5, 0.7], [0, 1], [0, 1]))
    assert math.isnan(binary_metrics.calibration([0.5], [0]))
    assert math.isnan(binary_metrics.pr_auc([0.5], [0]))
    assert math.isnan(binary_metrics.grouped_auc(nothing, nothing, nothing))
    assert math.isnan(binary_metrics.expected_calibration_error(nothing, nothing))
    for function in (
        *(binary_metrics.auc, binary_metrics.pr_auc, binary_metrics.log_loss, binary_metrics.ctr),
        *(binary_metrics.calibration, binary_metrics.rce, binary_metrics.nrce),
    ):
        assert math.isnan(function(nothing, nothing))


def test_numbers_are_those_of_scikit_learn() -> None:
    # scikit-learn 1.9.1: roc_auc_score(y, s), average_precision_score(y, s),
    # log_loss(y, .05 + .9 s), each without and with sample_weight=w.
    i = np.arange(200)
    s, y, w = (i * 37) % 101 / 100, (i * i * 7 + i * 3) % 11 < 4, (i % 5 + 1) / 2
    p = 0.05 + 0.9 * s
    assert binary_metrics.auc(s, y) == pytest.approx(0.5368484726282892, rel=1e-13)
    assert binary_metrics.auc(s, y, w) == pytest.approx(0.5298352066633828, rel=1e-13)
    assert binary_metrics.pr_auc(s, y) == pytest.approx(0.5949881191934012, rel=1e-13)
    assert binary_metrics.pr_auc(s, y, w) == pytest.approx(0.5870182613896657, rel=1e-13)
    assert binary_metrics.log_loss(p, y) == pytest.approx(0.86410828257158, rel=1e-13)
    assert binary_metrics.log_loss(p, y, w) == pytest.approx(0.8667842705761795, rel=1e-13)


ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1e-9, 0.1, 0.25, 0.5, 0.75, 1 - 1e-9, 1.0]) | st.floats(0, 1),
        st.booleans(),
        st.integers(0, 3),
        st.sampled_from([-5, 0, 3]),
    ),
    min_size=1,
    max_size=25,
)


def count_pairs(scores: Any, labels: Any, weights: Any) -> float:
    """AUC by looking at every pair."""
    won = total = 0.0
    for i, j in itertools.product(range(len(scores)), repeat=2):
        if labels[i] and not labels[j]:
            pair = float(weights[i] * weights[j])
            total += pair
            won += pair * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
    return won / total if total else math.nan


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_auc_is_what_counting_all_pairs_gives(rows: list[tuple[float, bool, int, int]]) -> None:
    s, y, w, g = (np.array(column) for column in zip(*rows, strict=True))
    expected = count_pairs(s, y, w)
    assert binary_metrics.auc(s, y, w) == pytest.approx(expected, nan_ok=True)
    areas, sizes = [], []
    for group in np.unique(g):
        own = g == group
        area = count_pairs(s[own], y[own], w[own])
        if not math.isnan(area):
            areas.append(area)
            sizes.append(w[own].sum())
    mean = np.mean(areas) if areas else math.nan
    assert binary_metrics.grouped_auc(s, y, g, w) == pytest.approx(mean, nan_ok=True)
    by_rows = np.average(areas, weights=sizes) if areas else math.nan
    found = binary_metrics.grouped_auc(s, y, g, w, by_rows=True)
    assert found == pytest.approx(by_rows, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_a_weight_is_a_number_of_equal_rows(rows: list[tuple[float, bool, int, int]]) -> None:
    s, y, w, g = (np.array(column) for column in zip(*rows, strict=True))
    repeated = [np.repeat(column, w) for column in (s, y, g)]
    for function in (
        *(binary_metrics.auc, binary_metrics.pr_auc, binary_metrics.log_loss, binary_metrics.ctr),
        *(binary_metrics.calibration, binary_metrics.rce, binary_metrics.nrce),
        binary_metrics.expected_calibration_error,
    ):
        expected = function(repeated[0], repeated[1])
        assert function(s, y, w) == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)
    for by_rows in (False, True):
        expected = binary_metrics.grouped_auc(*repeated, by_rows=by_rows)
        found = binary_metrics.grouped_auc(s, y, g, w, by_rows=by_rows)
        assert found == pytest.approx(expected, nan_ok=True)


def test_bad_rows_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="1 of 2 scores of the data are NaN"):
        binary_metrics.auc([0.5, math.nan], [0, 1])
    with pytest.raises(ValueError, match=r"1 of 2 labels of the data are neither 0 nor 1.* 2"):
        binary_metrics.auc([0.5, 0.1], [0, 2])
    with pytest.raises(ValueError, match=r"1 of 2 weights of the data are negative.* -1"):
        binary_metrics.auc([0.5, 0.1], [0, 1], [-1, 1])
    with pytest.raises(ValueError, match=r"labels of shape \(1,\) beside scores of \(2,\)"):
        binary_metrics.auc([0.5, 0.1], [0])
    with pytest.raises(ValueError, match=r"from -1\.5 to 0.5 are no probabilities"):
        binary_metrics.log_loss([-1.5, 0.5], [0, 1])


# BinaryMetrics

TASKS = ("like", "report")


def make_rows(n: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """n rows of two tasks with many ties, the second label rare."""
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.rand(n, 2, generator=generator) * torch.tensor([1.0, 0.1]) * 50).round() / 50
    labels = (torch.rand(n, 2, generator=generator) < scores).float()
    return {
        "scores": scores,
        "labels": labels,
        "weights": torch.rand(n, 2, generator=generator) * (torch.arange(n) % 7 > 0)[:, None],
        "groups": torch.randint(0, 9, (n,), generator=generator) - 4,
        "old": torch.rand(n, generator=generator) < 0.3,
    }


def fill(metrics: BinaryMetrics, rows: dict[str, torch.Tensor], batch: int) -> BinaryMetrics:
    for start in range(0, len(rows["scores"]), batch):
        part = {name: column[start : start + batch] for name, column in rows.items()}
        strata = {"old": part.pop("old")}
        metrics.update(**part, strata=strata)
    return metrics


def test_batches_give_what_the_functions_give_for_all_rows() -> None:
    rows = make_rows(500)
    report = fill(BinaryMetrics(TASKS), rows, batch=64).compute()
    functions = {
        "auc": binary_metrics.auc,
        "rce": binary_metrics.rce,
        "nrce": binary_metrics.nrce,
        "log_loss": binary_metrics.log_loss,
        "ctr": binary_metrics.ctr,
        "calibration": binary_metrics.calibration,
        "ece": binary_metrics.expected_calibration_error,
        "pr_auc": binary_metrics.pr_auc,
    }
    everything = torch.ones(500, dtype=torch.bool)
    for number, task in enumerate(TASKS):
        for stratum, mask in (("", everything), ("old", rows["old"])):
            found = report.strata[task][stratum] if stratum else report.tasks[task]
            s, y, w = (rows[name][mask, number] for name in ("scores", "labels", "weights"))
            expected = {name: function(s, y, w) for name, function in functions.items()}
            for name, by_rows in (("gauc", False), ("gauc_by_rows", True)):
                g = rows["groups"][mask]
                expected[name] = binary_metrics.grouped_auc(s, y, g, w, by_rows)
            expected |= {"rows": int((w > 0).sum()), "positives": int(y[w > 0].sum())}
            assert found == pytest.approx(expected, rel=1e-12)


def test_neither_batches_nor_the_order_of_rows_change_a_bit() -> None:
    rows = make_rows(700)
    # Of such different sizes that every order of addition rounds otherwise.
    rows["weights"] *= 10 ** (torch.arange(700) % 30 - 15.0)[:, None]
    # Many rows that differ in the label alone.
    rows["scores"] = (rows["scores"] * 3).round() / 3
    rows["weights"][::2] = torch.tensor([0.1, 1 / 3, 1e9 / 7, 3e5 / 11]).repeat(175).view(-1, 2)
    shuffled = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    first = fill(BinaryMetrics(TASKS), rows, batch=700).compute()
    other = {name: column[shuffled] for name, column in rows.items()}
    assert fill(BinaryMetrics(TASKS), other, batch=33).compute() == first


def test_what_the_caller_writes_afterwards_changes_nothing() -> None:
    rows = make_rows(50)
    expected = fill(BinaryMetrics(TASKS), rows, batch=50).compute()
    metrics = fill(BinaryMetrics(TASKS), rows, batch=50)
    for column in rows.values():
        column.zero_()
    assert metrics.compute() == expected


def test_weights_of_one_are_no_weights() -> None:
    rows = make_rows(60)
    plain, weighted = BinaryMetrics(TASKS), BinaryMetrics(TASKS)
    plain.update(rows["scores"], rows["labels"])
    weighted.update(rows["scores"], rows["labels"], torch.ones(60, 2))
    expected = pytest.approx(plain.compute().tasks["like"], rel=1e-13, nan_ok=True)
    assert weighted.compute().tasks["like"] == expected
    weighted.update(rows["scores"], rows["labels"], torch.full((60, 2), 2.0))
    assert weighted.compute().tasks["like"]["auc"] == pytest.approx(expected.expected["auc"])


def test_only_the_metrics_asked_for_are_given_in_any_case_of_letters() -> None:
    metrics = BinaryMetrics(["like"], which=["RCE", "auc"])
    metrics.update(torch.tensor([[0.5], [0.25]]), torch.tensor([[1], [0]]))
    values = metrics.compute().tasks["like"]
    assert list(values) == ["rce", "auc", "rows", "positives"]


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown metric 'acc'; known: auc, rce, .*, gauc"):
        BinaryMetrics(["like"], which=["auc", "acc"])


def test_without_rows_everything_is_nan_and_null_in_json() -> None:
    report = BinaryMetrics(TASKS).compute()
    tree = report.to_json()
    values = tree["tasks"]["like"]
    assert set(values) == {*binary_metrics.NAMES, "rows", "positives"}
    assert values.pop("rows") == values.pop("positives") == 0
    assert set(values.values()) == {None}
    json.dumps(report.to_json(), allow_nan=False)


def test_an_empty_stratum_is_nan() -> None:
    metrics = BinaryMetrics(["like"])
    none = torch.zeros(2, dtype=torch.bool)
    metrics.update(torch.tensor([[0.5], [0.25]]), torch.tensor([[1], [0]]), strata={"none": none})
    tree = metrics.compute().to_json()
    assert tree["strata"]["like"]["none"]["auc"] is None
    assert tree["strata"]["like"]["none"]["rows"] == 0
    assert tree["tasks"]["like"]["auc"] == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": torch.tensor([[0.5, math.nan]])}, "1 of 1 scores of task report are NaN"),
        (
            {"scores": torch.tensor([[0.5, 1.5]])},
            "scores of task report are no prob.* first is 1.5",
        ),
        ({"labels": torch.tensor([[3, 0]])}, "labels of task like are neither 0 nor 1.* is 3"),
        ({"weights": torch.tensor([[1, math.inf]])}, "weights of task report are negative or not"),
        ({"labels": torch.tensor([[1]])}, r"labels have the shape \(1, 1\); \(1, 2\) is wanted"),
        ({"groups": torch.tensor([1, 2])}, r"groups have the shape \(2,\); \(1,\) is wanted"),
        ({"groups": None}, "metrics gauc need the user of each row"),
    ],
)
def test_bad_batches_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    good = {"scores": torch.tensor([[0.5, 0.1]]), "labels": torch.tensor([[1, 0]])}
    metrics = BinaryMetrics(TASKS, which=["gauc"])
    with pytest.raises(ValueError, match=message):
        metrics.update(**{**good, "groups": torch.tensor([4]), **changed})


def test_groups_and_strata_come_with_every_update_or_none() -> None:
    batch = (torch.tensor([[0.5, 0.1]]), torch.tensor([[1, 0]]))
    metrics = BinaryMetrics(TASKS)
    metrics.update(*batch, groups=torch.tensor([4]), strata={"a": torch.tensor([True])})
    with pytest.raises(ValueError, match="groups are given in some updates and not in others"):
        metrics.update(*batch, strata={"a": torch.tensor([True])})
    with pytest.raises(ValueError, match=r"the strata \['b'\] differ from the earlier \['a'\]"):
        metrics.update(*batch, groups=torch.tensor([4]), strata={"b": torch.tensor([True])})


def test_negative_zero_is_zero() -> None:
    metrics = BinaryMetrics(["like"])
    metrics.update(torch.tensor([[-0.0], [0.0], [0.5]]), torch.tensor([[1], [0], [0]]))
    assert metrics.compute().tasks["like"]["auc"] == 0.25


def test_the_table_shows_a_row_a_task_and_its_strata() -> None:
    console = Console(width=160, file=io.StringIO())
    report = fill(BinaryMetrics(TASKS), make_rows(500), 64).compute()
    with console.capture() as shown:
        console.print(binary_metrics.render(report))
    lines = [line.split() for line in shown.get().splitlines()]
    assert lines[0][:4] == ["task", "auc", "pr_auc", "gauc"]
    assert [line[0] for line in lines[2:] if line] == ["like", "old", "report", "old"]
    # Rows 0, 7, …, 497 have no weight.
    assert lines[2][-1] == "428"
    assert lines[2][1] == f"{report.tasks['like']['auc']:.4f}"[1:]


def test_the_table_leaves_out_what_no_task_has() -> None:
    metrics = BinaryMetrics(["like"])
    metrics.update(torch.tensor([[0.5], [0.25]]), torch.tensor([[0], [0]]))
    table = binary_metrics.render(metrics.compute())
    headings = [str(column.header) for column in table.columns]
    assert headings == ["task", "ctr", "ece", "rows"]


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    tasks = ["recap.engagement.is_good_clicked_convo_desc_v2", "recap.engagement.is_replied"]
    metrics = BinaryMetrics(tasks)
    random = np.random.default_rng(0)
    scores, labels = torch.from_numpy(random.random((2, 900, 2))).unbind()
    metrics.update(scores, (labels < scores).int(), groups=torch.arange(900) % 9)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(binary_metrics.render(metrics.compute(), "validation"))
    text = shown.get()
    assert "is_replied" in text
    assert "is_good_cl…vo_desc_v2" in text
    assert "recap.engagement" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
