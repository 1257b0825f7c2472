"""Losses against numbers worked out by hand, and their extremes."""

import math

import pytest
import torch

from tml.losses import logistic, sampled_softmax


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
