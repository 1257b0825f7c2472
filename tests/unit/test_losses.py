"""Losses against numbers worked out by hand, and their extremes."""

import math
from typing import Any

import pytest
import torch

from tml.losses import full_softmax, logistic, margin_ranking, sampled_softmax


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


POSITIVE = torch.tensor([2.0, -1.0])
NEGATIVE = torch.tensor([[0.5, 3.0], [1.0, 0.0]])
NONE_MASKED = torch.zeros(2, 2, dtype=torch.bool)
ONE_MASKED = torch.tensor([[False, True], [False, False]])


def test_logistic_by_hand_negatives_count_as_negatives() -> None:
    expected = -math.log(sigmoid(2.0)) - math.log(sigmoid(-1.0))
    expected -= sum(math.log(sigmoid(-x)) for x in (0.5, 1.0, 0.0))
    assert logistic(POSITIVE, NEGATIVE, ONE_MASKED).item() == pytest.approx(expected, rel=1e-6)


def test_a_step_against_the_gradient_raises_positives_and_lowers_negatives() -> None:
    for loss in (logistic, sampled_softmax):
        positive = POSITIVE.clone().requires_grad_()
        negative = NEGATIVE.clone().requires_grad_()
        loss(positive, negative, ONE_MASKED).backward()
        assert positive.grad is not None
        assert negative.grad is not None
        assert (positive.grad < 0).all()
        assert (negative.grad[~ONE_MASKED] > 0).all()
        assert negative.grad[0, 1] == 0


def test_sampled_softmax_by_hand() -> None:
    first = math.exp(2.0) / (math.exp(2.0) + math.exp(0.5))
    second = math.exp(-1.0) / (math.exp(-1.0) + math.exp(1.0) + math.exp(0.0))
    expected = -math.log(first) - math.log(second)
    found = sampled_softmax(POSITIVE, NEGATIVE, ONE_MASKED)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_temperature_divides_the_scores() -> None:
    found = sampled_softmax(POSITIVE, NEGATIVE, NONE_MASKED, temperature=0.5)
    expected = sampled_softmax(POSITIVE * 2, NEGATIVE * 2, NONE_MASKED)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_no_negatives_left_is_a_loss_without_them() -> None:
    empty = torch.empty(2, 0)
    nothing = torch.empty(2, 0, dtype=torch.bool)
    attracted = -math.log(sigmoid(2.0)) - math.log(sigmoid(-1.0))
    assert logistic(POSITIVE, empty, nothing).item() == pytest.approx(attracted, rel=1e-6)
    assert sampled_softmax(POSITIVE, empty, nothing).item() == 0.0
    assert sampled_softmax(POSITIVE, NEGATIVE, ~NONE_MASKED).item() == 0.0


def test_huge_scores_stay_finite() -> None:
    huge = torch.tensor([1e4, -1e4])
    for loss in (logistic, sampled_softmax):
        positive = huge.clone().requires_grad_()
        value = loss(positive, huge.flip(0).unsqueeze(1), NONE_MASKED[:, :1])
        value.backward()
        assert torch.isfinite(value)
        assert positive.grad is not None
        assert torch.isfinite(positive.grad).all()


def test_no_examples_is_zero() -> None:
    empty = torch.empty(0)
    assert logistic(empty, torch.empty(0, 3), torch.empty(0, 3, dtype=torch.bool)).item() == 0.0


def test_the_mean_of_negatives_counts_as_much_as_the_positive() -> None:
    repelled = -math.log(sigmoid(-0.5)) - (math.log(sigmoid(-1.0)) + math.log(sigmoid(-0.0))) / 2
    expected = -math.log(sigmoid(2.0)) - math.log(sigmoid(-1.0)) + repelled
    found = logistic(POSITIVE, NEGATIVE, ONE_MASKED, negatives="mean")
    assert found.item() == pytest.approx(expected, rel=1e-6)
    nothing_left = logistic(POSITIVE, NEGATIVE, ~NONE_MASKED, negatives="mean")
    assert nothing_left.item() == pytest.approx(-math.log(sigmoid(2.0)) - math.log(sigmoid(-1.0)))


def test_margin_ranking_by_hand() -> None:
    # 1 − 2 + 0.5 < 0; masked; 1 + 1 + 1 = 3; 1 + 1 + 0 = 2
    found = margin_ranking(POSITIVE, NEGATIVE, ONE_MASKED, margin=1.0)
    assert found.item() == 5.0
    # 1 − 2 + 3 = 2 is counted now.
    assert margin_ranking(POSITIVE, NEGATIVE, NONE_MASKED, margin=1.0).item() == 7.0
    assert margin_ranking(POSITIVE, torch.empty(2, 0), NONE_MASKED[:, :0], 1.0).item() == 0.0


def test_full_softmax_is_the_sampled_one_with_all_candidates() -> None:
    scores = torch.tensor([[0.5, 2.0, -1.0], [1.0, 0.0, 3.0]])
    target = torch.tensor([1, 0])
    first = math.exp(2.0) / (math.exp(0.5) + math.exp(2.0) + math.exp(-1.0))
    second = math.exp(1.0) / (math.exp(1.0) + math.exp(0.0) + math.exp(3.0))
    expected = -math.log(first) - math.log(second)
    assert full_softmax(scores, target).item() == pytest.approx(expected, rel=1e-6)
    hits = torch.nn.functional.one_hot(target, 3).bool()
    positive = scores[hits]
    for temperature in (1.0, 0.3):
        for weight in (None, torch.tensor([2.0, 0.5])):
            full = full_softmax(scores, target, temperature, weight)
            sampled = sampled_softmax(positive, scores, hits, temperature, weight)
            assert full.item() == pytest.approx(sampled.item(), rel=1e-6)


def test_weights_multiply_the_examples() -> None:
    weight = torch.tensor([3.0, 0.5])

    def each(loss: Any) -> list[float]:
        return [
            loss(POSITIVE[i : i + 1], NEGATIVE[i : i + 1], ONE_MASKED[i : i + 1]).item()
            for i in range(2)
        ]

    for loss, given in (
        (logistic, {}),
        (sampled_softmax, {"temperature": 1.0}),
        (margin_ranking, {"margin": 1.0}),
    ):
        first, second = each(lambda *a, loss=loss, given=given: loss(*a, **given))
        found = loss(POSITIVE, NEGATIVE, ONE_MASKED, weight=weight, **given).item()
        assert found == pytest.approx(3 * first + 0.5 * second, rel=1e-6)


def test_the_logq_correction_makes_the_sum_over_negatives_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, generator=generator)
    probability = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    positive = 2
    others = [i for i in range(6) if i != positive]
    wanted = scores[others].exp().sum().item()
    draws, k = 20_000, 8
    drawn = torch.multinomial(probability, draws * k, replacement=True, generator=generator)
    drawn = drawn.view(draws, k)
    losses = [
        sampled_softmax(
            scores[positive].view(1),
            scores[row].unsqueeze(0),
            (row == positive).unsqueeze(0),
            log_counts=(k * probability[row]).log().unsqueeze(0),
        )
        for row in drawn[:3000]
    ]
    # loss = log(1 + Σ / e^positive): solved for Σ, which must be right on average.
    sums = (torch.stack(losses).exp() - 1) * scores[positive].exp()
    error = sums.std().item() / len(sums) ** 0.5
    assert sums.mean().item() == pytest.approx(wanted, abs=4 * error)
    uncorrected = scores[drawn].exp().masked_fill(drawn == positive, 0).sum(dim=1).mean().item()
    assert abs(uncorrected - wanted) > 10 * error
