"""Ranks among sampled candidates: the full protocol where all are drawn, and the distribution that
drawing gives.
"""

import numpy as np
import pytest
import torch

from projects.twhin import sampled
from projects.twhin.config import ModelConfig, RelationConfig
from projects.twhin.edges import Edges, Side, join
from projects.twhin.link_prediction import link_prediction, link_prediction_report
from projects.twhin.model import Vectors, build_operators
from projects.twhin.sampled import sampled_link_prediction
from tests.table_scorer import TableScorer, random_edges

ONE = [RelationConfig(name="r0", lhs="u", rhs="v")]


@pytest.mark.parametrize("number", [40, 1000])
def test_with_as_many_candidates_as_entities_it_is_the_full_protocol(number: int) -> None:
    torch.manual_seed(0)
    # Few distinct scores: ties, too, are the same.
    scorer = TableScorer(*(torch.randint(0, 9, (30, 40)).float() for _ in range(2)))
    relations = [*ONE, RelationConfig(name="r1", lhs="u", rhs="v")]
    test = random_edges(600, 30, 2, 40, seed=1)
    known = join([test, random_edges(300, 30, 2, 40, seed=2)])
    full = link_prediction(scorer, relations, test, known)
    found = sampled_link_prediction(scorer, relations, test, known, number, seed=3)
    assert found == pytest.approx(full, rel=1e-12)


def test_the_expected_rank_is_that_of_a_uniform_draw() -> None:
    # 101 tails of different scores; the true one has 30 better ones among 100 others, so among 20
    # candidates 20 · 30/101 better ones are expected. Many edges, as many draws as there may be.
    scorer = TableScorer(torch.arange(101.0).repeat(4096, 1))
    count = 4096
    heads = np.arange(count, dtype=np.int64)
    test = Edges(heads, np.zeros(count, np.int64), np.full(count, 70))
    sums = sampled_link_prediction(scorer, ONE, test, test, 20, seed=0)
    mean_rank = sums[0, 1, 2] / count
    # A draw's count is hypergeometric; 64 draws.
    deviation = np.sqrt(20 * (30 / 101) * (71 / 101) * (81 / 100) / 64)
    assert sums[0, 1, 0] == count
    assert abs(mean_rank - (1 + 20 * 30 / 101)) < 4 * deviation
    again = sampled_link_prediction(scorer, ONE, test, test, 20, seed=0)
    assert (again == sums).all()
    other = sampled_link_prediction(scorer, ONE, test, test, 20, seed=1)
    assert other[0, 1, 2] != sums[0, 1, 2]


def test_draws_differ_between_edges_sides_and_relations() -> None:
    scorer = TableScorer(*(torch.rand(500, 500) for _ in range(2)))
    # 128 edges a relation, all of head 7 and tail 7: two draws a side.
    count = 256
    same = np.full(count, 7, dtype=np.int64)
    test = Edges(same, np.arange(count) % 2, same)
    relations = [*ONE, RelationConfig(name="r1", lhs="u", rhs="v")]
    sampled_link_prediction(scorer, relations, test, test, 50, seed=0)
    assert len(scorer.drawn) == 8
    assert len(set(scorer.drawn)) == 8
    assert all(50 <= len(set(draw)) == len(draw) <= 51 for draw in scorer.drawn)


def test_shares_of_processes_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    scorer = TableScorer(torch.rand(30, 40), torch.rand(30, 40))
    relations = [*ONE, RelationConfig(name="r1", lhs="u", rhs="v")]
    test = random_edges(500, 30, 2, 40, seed=1)
    whole = sampled_link_prediction(scorer, relations, test, test, 7, seed=3)
    shares = [
        sampled_link_prediction(scorer, relations, test, test, 7, 3, (rank, 3)) for rank in range(3)
    ]
    assert sum(shares) == pytest.approx(whole, rel=1e-12)


def test_what_is_known_to_be_true_does_not_compete() -> None:
    scorer = TableScorer(torch.tensor([[0.0, 5.0, 6.0, 7.0]]))
    test = Edges(*(np.array([value]) for value in (0, 0, 0)))
    known = Edges(np.zeros(3, np.int64), np.zeros(3, np.int64), np.array([0, 1, 3]))
    sums = sampled_link_prediction(scorer, ONE, test, known, 4, seed=0)
    assert sums[0, 1, 2] == 2  # below tail 2 alone


def test_memory_does_not_grow_with_the_table() -> None:
    scorer = TableScorer(torch.rand(600, 20_000))
    test = random_edges(600, 600, 1, 20_000, seed=1)
    sampled_link_prediction(scorer, ONE, test, test, 100, seed=3)
    limit = sampled.BLOCK_QUERIES * (100 + sampled.BLOCK_QUERIES)
    assert 0 < scorer.largest <= limit < 600 * 20_000


def test_a_model_scores_given_candidates_as_it_does_among_all() -> None:
    tree = {
        "embeddings": {
            "tables": [
                {"name": name, "num_embeddings": rows, "embedding_dim": 8}
                for name, rows in (("u", 12), ("v", 17))
            ]
        },
        "relations": [{"name": "r0", "lhs": "u", "rhs": "v", "operator": "affine"}],
        "biases": True,
        "comparator": "cosine",  # candidates go through the operator
        "relation_init_scale": 0.5,
    }
    config = ModelConfig.model_validate(tree)
    torch.manual_seed(0)
    tables = {"u": torch.randn(12, 8), "v": torch.randn(17, 8)}
    biases = {"u": torch.randn(12), "v": torch.randn(17)}
    vectors = Vectors(config, tables, build_operators(config, seed=1), biases)
    candidates = torch.tensor([11, 0, 3])
    for side, rows in ((Side.LHS, 12), (Side.RHS, 17)):
        assert vectors.num_candidates(0, side) == rows
        whole = vectors.score(0, side, torch.tensor([4, 2]))
        some = vectors.score(0, side, torch.tensor([4, 2]), candidates)
        assert some.shape == (2, 3)
        torch.testing.assert_close(some, whole[:, candidates])


def test_the_report_says_that_it_is_sampled() -> None:
    text = link_prediction_report(ONE, np.zeros((1, 2, 6)), sampled.protocol(1000))["protocol"]
    assert "1,000 sampled candidates: not comparable with the full protocol" in text
