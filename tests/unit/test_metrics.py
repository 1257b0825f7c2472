"""Ranking metrics against numbers worked out by hand, and against a loop that counts."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tml import metrics


def no_pairs() -> tuple[Tensor, Tensor]:
    return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)


def rank(scores: list[float], target: int, known: tuple[int, ...] = ()) -> float:
    rows = torch.zeros(len(known), dtype=torch.int64)
    pairs = (rows, torch.tensor(known, dtype=torch.int64))
    first = torch.tensor([0])
    return metrics.filtered_ranks(
        torch.tensor([scores]), first, torch.tensor([target]), pairs
    ).item()


def test_rank_is_one_more_than_the_number_of_better_candidates() -> None:
    assert rank([0.1, 0.9, 0.5, 0.7], target=2) == 3


def test_ties_are_at_their_mean_rank() -> None:
    # 0.5 three times: the places 2, 3, 4, whose mean is 3.
    assert rank([0.9, 0.5, 0.5, 0.5, 0.1], target=2) == 3
    assert rank([0.5, 0.5], target=0) == 1.5


def test_a_model_that_scores_all_alike_gets_the_middle_rank() -> None:
    assert rank([0.0] * 101, target=7) == 51


def test_known_candidates_do_not_compete_and_the_target_may_be_among_them() -> None:
    scores = [0.9, 0.8, 0.7, 0.7]
    assert rank(scores, target=2) == 3.5
    assert rank(scores, target=2, known=(0,)) == 2.5
    assert rank(scores, target=2, known=(0, 2)) == 2.5
    assert rank(scores, target=2, known=(0, 1, 2, 3)) == 1


def test_a_known_candidate_given_twice_is_left_out_once() -> None:
    assert rank([0.9, 0.8, 0.7], target=2, known=(0, 0)) == 2


def test_infinite_scores_are_ranked() -> None:
    assert rank([math.inf, 1.0, -math.inf], target=2) == 3
    assert rank([math.inf, 1.0, math.inf], target=0) == 1.5
    assert rank([-math.inf, -math.inf, 0.0], target=0, known=(2,)) == 1.5


def test_scores_whose_sum_overflows_are_ranked() -> None:
    assert rank([3e38, 3e38, 3.1e38], target=0) == 2.5


@pytest.mark.parametrize("place", [0, 2])
def test_nan_is_an_error_and_not_the_first_rank(place: int) -> None:
    scores = [0.1, 0.2, 0.3]
    scores[place] = math.nan
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        rank(scores, target=0)
    with pytest.raises(ValueError, match="NaN"):
        metrics.top_columns(torch.tensor([scores]), 2)


def test_several_edges_may_share_a_row() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    rows, targets = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    known = (torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert metrics.filtered_ranks(scores, rows, targets, known).tolist() == [1, 1, 2]


def test_one_edge_a_row_in_another_order_than_the_rows() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    rows, targets = torch.tensor([1, 0]), torch.tensor([0, 0])
    assert metrics.filtered_ranks(scores, rows, targets, no_pairs()).tolist() == [3, 1]


def test_ranks_equal_those_of_a_loop_that_counts() -> None:
    random = np.random.default_rng(3)
    scores = random.integers(0, 6, (40, 25)).astype(np.float32)  # many ties
    rows, targets = random.integers(0, 40, 200), random.integers(0, 25, 200)
    known = random.random((40, 25)) < 0.3
    expected = []
    for row, target in zip(rows, targets, strict=True):
        others = [c for c in range(25) if c != target and not known[row, c]]
        better = sum(scores[row, c] > scores[row, target] for c in others)
        equal = sum(scores[row, c] == scores[row, target] for c in others)
        expected.append(1 + better + equal / 2)
    known_rows, known_columns = (torch.from_numpy(index) for index in known.nonzero())
    ranks = metrics.filtered_ranks(
        torch.from_numpy(scores),
        torch.from_numpy(rows),
        torch.from_numpy(targets),
        (known_rows, known_columns),
    )
    assert ranks.tolist() == expected


def test_reciprocal_ranks_and_hits() -> None:
    ranks = torch.tensor([1.0, 2.5, 4.0, 10.0], dtype=torch.float64)
    assert metrics.reciprocal_ranks(ranks).tolist() == [1, 0.4, 0.25, 0.1]
    assert metrics.hits(ranks, 1).tolist() == [1, 0, 0, 0]
    assert metrics.hits(ranks, 3).tolist() == [1, 1, 0, 0]
    assert metrics.hits(ranks, 10).tolist() == [1, 1, 1, 1]


def test_top_columns_come_best_first() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    assert metrics.top_columns(scores, 2).tolist() == [[1, 2]]
    assert metrics.top_columns(scores, 9).tolist() == [[1, 2, 3, 0]]


def test_equal_scores_are_not_put_in_the_order_of_their_columns() -> None:
    best = metrics.top_columns(torch.zeros(1, 10_000), 100)
    assert len(set(best[0].tolist())) == 100
    assert 3000 < best.double().mean() < 7000
    assert torch.equal(best, metrics.top_columns(torch.zeros(1, 10_000), 100))


def test_a_tie_at_the_last_place_is_broken_at_random_and_better_ones_stay() -> None:
    scores = torch.zeros(1, 1000)
    scores[0, 500] = 1
    best = metrics.top_columns(scores, 2)[0].tolist()
    assert best[0] == 500
    assert best[1] != 0


def test_retrieval_metrics_by_hand() -> None:
    # Two users, five items. The first wants 1 and 4, the second 0, 1 and 2.
    best = torch.tensor([[4, 0, 1], [3, 2, 4]])
    relevant = (torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 4, 0, 1, 2]))
    is_found = metrics.found(best, relevant, 5)
    assert is_found.tolist() == [[True, False, True], [False, True, False]]
    num_relevant = torch.tensor([2, 3])
    assert metrics.recall_at(is_found, num_relevant, 2).tolist() == [1 / 2, 1 / 3]
    assert metrics.recall_at(is_found, num_relevant, 3).tolist() == [1, 1 / 3]
    assert metrics.hit_at(is_found, 1).tolist() == [1, 0]
    assert metrics.hit_at(is_found, 2).tolist() == [1, 1]
    second, third = 1 / math.log2(3), 1 / 2
    expected = [(1 + third) / (1 + second), second / (1 + second + third)]
    assert metrics.ndcg_at(is_found, num_relevant, 3).tolist() == pytest.approx(expected)
    # At 2, the ideal order has min(3, 2) hits.
    expected = [1 / (1 + second), second / (1 + second)]
    assert metrics.ndcg_at(is_found, num_relevant, 2).tolist() == pytest.approx(expected)


def test_retrieval_of_more_than_there_are_candidates() -> None:
    is_found = metrics.found(torch.tensor([[1, 0]]), (torch.tensor([0]), torch.tensor([0])), 2)
    num_relevant = torch.tensor([1])
    assert metrics.recall_at(is_found, num_relevant, 10).tolist() == [1]
    assert metrics.ndcg_at(is_found, num_relevant, 10).tolist() == pytest.approx([1 / math.log2(3)])
    assert metrics.hit_at(is_found, 10).tolist() == [1]


def test_counts_are_the_same_with_and_without_numpy() -> None:
    mask = torch.rand(7, 300) < 0.4
    assert torch.equal(metrics.count_true(mask), mask.sum(dim=1))
