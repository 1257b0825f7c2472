"""Evaluation of a small graph by hand and against loops that follow the protocol word by word."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from projects.twhin import ranking
from projects.twhin.config import RelationConfig
from projects.twhin.edges import Edges, count_unseen, join, of_relations, spread, spread_users
from projects.twhin.link_prediction import link_prediction, link_prediction_report
from projects.twhin.ranking import Report
from projects.twhin.report import render
from projects.twhin.retrieval import retrieval, retrieval_report
from tests.table_scorer import TableScorer, random_edges


@dataclass(frozen=True)
class Named:
    name: str


def edges(*triples: tuple[int, int, int]) -> Edges:
    lhs, rel, rhs = np.array(triples, dtype=np.int64).reshape(-1, 3).T
    return Edges(lhs, rel, rhs)


def names(number: int) -> list[Named]:
    return [Named(f"r{i}") for i in range(number)]


# Link prediction


SCORES = torch.tensor([[0.9, 0.5, 0.7, 0.5], [0.1, 0.8, 0.2, 0.3], [0.3, 0.6, 0.4, 0.5]])


def test_both_sides_by_hand() -> None:
    test = edges((0, 0, 1))
    # Tails of head 0: .9 and .7 are better, one other is equal: 1 + 2 + 1/2. Heads of tail 1: .8
    # and .6 are better.
    sums = link_prediction(TableScorer(SCORES), names(1), test, test)
    assert sums[0, 0].tolist() == pytest.approx([1, 1 / 3, 3, 0, 1, 1])
    assert sums[0, 1].tolist() == pytest.approx([1, 1 / 3.5, 3.5, 0, 0, 1])


def test_true_edges_of_other_splits_do_not_compete() -> None:
    test, known = edges((0, 0, 1)), edges((0, 0, 0), (1, 0, 1), (0, 0, 1))
    sums = link_prediction(TableScorer(SCORES), names(1), test, known)
    assert sums[0, 0, 2] == 2  # head 1 is known
    assert sums[0, 1, 2] == 2.5  # tail 0 is known


def test_true_edges_of_other_relations_do_compete() -> None:
    test, known = edges((0, 1, 1)), edges((0, 0, 0), (1, 0, 1), (0, 1, 1))
    sums = link_prediction(TableScorer(SCORES, SCORES), names(2), test, known)
    assert sums[0].sum() == 0
    assert (sums[1, 0, 2], sums[1, 1, 2]) == (3, 3.5)


def test_edges_that_are_not_among_the_known_are_no_competitors_of_themselves() -> None:
    sums = link_prediction(TableScorer(SCORES), names(1), edges((0, 0, 1)), edges())
    assert sums[0, 1, 2] == 3.5


def by_loop(
    matrices: Sequence[Tensor], test: Edges, known: Edges
) -> dict[tuple[int, str], list[float]]:
    truth = set(zip(known.lhs, known.rel, known.rhs, strict=True))
    ranks: dict[tuple[int, str], list[float]] = {}
    for h, r, t in zip(test.lhs, test.rel, test.rhs, strict=True):
        matrix = matrices[r]
        tails = [matrix[h, c] for c in range(matrix.shape[1]) if c != t and (h, r, c) not in truth]
        heads = [matrix[c, t] for c in range(matrix.shape[0]) if c != h and (c, r, t) not in truth]
        for side, others in (("lhs", heads), ("rhs", tails)):
            better = sum(bool(score > matrix[h, t]) for score in others)
            equal = sum(bool(score == matrix[h, t]) for score in others)
            ranks.setdefault((int(r), side), []).append(1 + better + equal / 2)
    return ranks


@pytest.mark.parametrize("block_scores", [1, 37, 1 << 24])
def test_report_equals_a_loop_over_all_edges(
    block_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "BLOCK_SCORES", block_scores)
    random = torch.Generator().manual_seed(1)
    matrices = [
        torch.randint(0, 9, (12, 17), generator=random).float(),
        torch.randint(0, 9, (12, 17), generator=random).float(),
    ]
    test, train = random_edges(60, 12, 2, 17, seed=1), random_edges(80, 12, 2, 17, seed=2)
    known = join([train, test])
    scorer = TableScorer(*matrices)
    sums = link_prediction(scorer, names(2), test, known)
    report = link_prediction_report(names(2), sums)
    expected = by_loop(matrices, test, known)
    for (relation, side), ranks in expected.items():
        found = report["relations"][f"r{relation}"][side]
        assert found["mr"] == pytest.approx(np.mean(ranks))
        assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
        for k in (1, 3, 10):
            assert found[f"hits@{k}"] == pytest.approx(np.mean([rank <= k for rank in ranks]))
    all_ranks = [rank for ranks in expected.values() for rank in ranks]
    assert report["mean"]["mrr"] == pytest.approx(np.mean([1 / rank for rank in all_ranks]))
    assert report["edges"] == 60
    assert max(scorer.asked) * 12 <= max(block_scores, 12)


def test_shares_of_several_processes_add_up_to_the_whole() -> None:
    matrix = torch.rand(12, 17, generator=torch.Generator().manual_seed(2))
    test, train = random_edges(50, 12, 1, 17, seed=3), random_edges(80, 12, 1, 17, seed=4)
    scorer = TableScorer(matrix)
    whole = link_prediction(scorer, names(1), test, train)
    shares = [link_prediction(scorer, names(1), test, train, (i, 3)) for i in range(3)]
    assert [share[0, 0, 0] for share in shares] == [17, 17, 16]
    assert sum(shares) == pytest.approx(whole)
    whole = retrieval(scorer, names(1), test, train, [5])
    shares = [retrieval(scorer, names(1), test, train, [5], (i, 3)) for i in range(3)]
    assert sum(shares) == pytest.approx(whole)


def test_more_processes_than_edges() -> None:
    test = edges((0, 0, 1))
    sums = link_prediction(TableScorer(SCORES), names(1), test, test, shard=(5, 8))
    assert not sums.any()
    assert link_prediction_report(names(1), sums)["mean"] == {}


def test_broken_vectors_are_an_error() -> None:
    matrix = SCORES.clone()
    matrix[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        link_prediction(TableScorer(matrix), names(1), edges((0, 0, 1)), edges())
    with pytest.raises(ValueError, match="NaN"):
        retrieval(TableScorer(matrix), names(1), edges((0, 0, 1)), edges((0, 0, 0)), [1])


def test_a_relation_that_the_config_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="relations 0 to 3; the config has 1"):
        link_prediction(TableScorer(SCORES), names(1), edges((0, 0, 1), (0, 3, 1)), edges())


# Retrieval


def test_retrieval_by_hand() -> None:
    # User 0 has seen item 0; of the others it is given 2, then 1 or 3. It wants 2 and 3.
    # User 1 wants 3, is given 1. User 2 has nothing to find.
    matrix = torch.tensor([[0.9, 0.5, 0.7, 0.6], [0.1, 0.8, 0.2, 0.3], [0.3, 0.6, 0.4, 0.5]])
    test, train = edges((0, 0, 2), (0, 0, 3), (1, 0, 3)), edges((0, 0, 0), (2, 0, 1))
    sums = retrieval(TableScorer(matrix), names(1), test, train, [1, 2])
    report = retrieval_report(names(1), sums, [1, 2])
    second = 1 / math.log2(3)
    assert report["users"] == 2
    assert report["relations"]["r0"] == pytest.approx(
        {
            "users": 2,
            "recall@1": (1 / 2 + 0) / 2,
            "recall@2": (1 + 1) / 2,
            "ndcg@1": (1 + 0) / 2,
            "ndcg@2": (1 + second) / 2,
            "hit@1": 1 / 2,
            "hit@2": 1,
        }
    )


def test_test_edges_that_are_training_edges_are_not_asked_for() -> None:
    test, train = edges((0, 0, 0), (0, 0, 2), (1, 0, 1)), edges((0, 0, 0), (1, 0, 1))
    sums = retrieval(TableScorer(SCORES), names(1), test, train, [1])
    assert sums[0].tolist() == [1, 1, 1, 1]


def test_a_test_edge_given_twice_counts_once() -> None:
    test = edges((0, 0, 2), (0, 0, 2), (0, 0, 1))
    sums = retrieval(TableScorer(SCORES), names(1), test, edges((0, 0, 0)), [1])
    assert sums[0, 1] == 1 / 2


def test_training_edges_of_other_relations_are_not_left_out() -> None:
    test, train = edges((0, 1, 2)), edges((0, 0, 0))
    sums = retrieval(TableScorer(SCORES, SCORES), names(2), test, train, [1])
    assert sums[1].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("block_scores", [1, 50, 1 << 24])
def test_retrieval_equals_a_loop_over_all_users(
    block_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "BLOCK_SCORES", block_scores)
    matrix = torch.rand(20, 30, generator=torch.Generator().manual_seed(5))
    test, train = random_edges(60, 20, 1, 30, seed=5), random_edges(150, 20, 1, 30, seed=6)
    sums = retrieval(TableScorer(matrix), names(1), test, train, [4])
    recalls, ndcgs = [], []
    for user in range(20):
        seen = set(train.rhs[train.lhs == user])
        wanted = set(test.rhs[test.lhs == user]) - seen
        if not wanted:
            continue
        items = sorted((i for i in range(30) if i not in seen), key=lambda i: -matrix[user, i])
        gains = [1 / math.log2(p + 2) for p, item in enumerate(items[:4]) if item in wanted]
        recalls.append(len(gains) / len(wanted))
        ndcgs.append(sum(gains) / sum(1 / math.log2(p + 2) for p in range(min(4, len(wanted)))))
    assert sums[0, 0] == len(recalls)
    assert sums[0, 1] == pytest.approx(sum(recalls))
    assert sums[0, 2] == pytest.approx(sum(ndcgs))


# Edges and what is shown


def test_spread_takes_edges_from_everywhere() -> None:
    all_edges = edges(*((i, 0, i) for i in range(10)))
    assert spread(all_edges, 4).lhs.tolist() == [0, 2, 5, 7]
    assert spread(all_edges, 10) is all_edges
    assert spread(all_edges, None) is all_edges


def test_spread_users_keeps_all_edges_of_whoever_is_kept() -> None:
    # 6 users of relation 0 with 2 edges each, and the same of relation 1.
    triples = [(user, rel, item) for item in (0, 1) for rel in (0, 1) for user in range(6)]
    all_edges = edges(*triples)
    found = spread_users(all_edges, 8)
    kept = list(zip(found.rel.tolist(), found.lhs.tolist(), found.rhs.tolist(), strict=True))
    assert sorted(kept) == [(r, u, i) for r in (0, 1) for u in (0, 3) for i in (0, 1)]
    assert spread_users(all_edges, 24) is all_edges
    assert len(spread_users(all_edges, 1)) == 2


def test_of_relations_keeps_the_order() -> None:
    all_edges = edges((0, 2, 0), (1, 0, 0), (2, 1, 0), (3, 2, 0))
    assert of_relations(all_edges, [2, 1]).lhs.tolist() == [0, 2, 3]


def test_edges_with_an_entity_unseen_in_training_are_counted() -> None:
    relations = [
        RelationConfig(name="like", lhs="user", rhs="video"),
        RelationConfig(name="follow", lhs="user", rhs="user"),
    ]
    training = edges((0, 0, 0), (1, 1, 2))
    # User 2 is known from the right side of follow, video 1 from nowhere, user 3 from nowhere.
    asked = edges((2, 0, 0), (0, 0, 1), (3, 1, 3), (1, 1, 0))
    assert count_unseen(asked, training, relations) == 2
    assert count_unseen(edges(), training, relations) == 0
    assert count_unseen(asked, edges(), relations) == 4


def shown(report: Report) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_tables_fit_into_80_columns_and_cap_the_relations() -> None:
    relations = [Named(f"/people/person/{'x' * 40}/r{i}") for i in range(40)]
    test = random_edges(4000, 12, 40, 17, seed=1)
    scorer = TableScorer(*(torch.rand(12, 17) for _ in relations))
    sums = link_prediction(scorer, relations, test, test)
    report = {"link_prediction": link_prediction_report(relations, sums)}
    sums = retrieval(scorer, relations, test, edges(), [1, 5])
    report["retrieval"] = retrieval_report(relations, sums, [1, 5])
    assert json.loads(json.dumps(report)) == report
    text = shown(report)
    assert f"{4000:,}" in text
    assert text.count("28 more relations; evaluate --json lists all") == 2
    assert "xx/r3" in text
    assert "r12 " not in text
    rows = [line for line in text.splitlines() if "xx/r" in line]
    assert len(rows) == 24
    assert all(len(row.split()) >= 6 for row in rows)


def test_the_optimum_of_a_planted_graph_stands_beside_the_model() -> None:
    test = edges((0, 0, 1))
    sums = link_prediction(TableScorer(SCORES), names(1), test, test)
    report = link_prediction_report(names(1), sums)
    best = json.loads(json.dumps(report))
    best["mean"]["mrr"] = 2 * report["mean"]["mrr"]
    text = shown({"link_prediction": report, "planted": best})
    assert "best" in text
    assert "50.0%" in text


def test_unseen_entities_and_empty_relations_are_told() -> None:
    test = edges((0, 0, 1))
    sums = link_prediction(TableScorer(SCORES), names(1), test, test)
    report = {"link_prediction": link_prediction_report(names(1), sums), "edges": 12, "unseen": 3}
    report["empty_relations"] = ["a[b]", "c", "d", "e"]
    text = shown(report)
    assert "3 of 12 edges hold an entity unseen in training" in text
    assert "4 relations without an edge here: a[b], c, d, …" in text
    text = shown({**report, "unseen": 0, "empty_relations": ["c"]})
    assert "unseen" not in text
    assert "1 relation without an edge here: c" in text
