"""Mixtures: clusters, modes, budgets and candidates by hand and against loops; the program on a
small run.
"""

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.nn import functional as F

from projects.twhin import evaluate, mixtures, modes
from projects.twhin.clusters import Clusters, cluster
from projects.twhin.comparators import Comparator, products
from projects.twhin.config import TwhinConfig
from projects.twhin.evaluate import read_split
from projects.twhin.history import History
from projects.twhin.mixture_report import Tally
from projects.twhin.mixture_retrieval import NONE, Retrieval, budgets, merge, retrieve, turns
from projects.twhin.model import Vectors, build_operators, weight_name
from projects.twhin.modes import NO_CLUSTER, NOBODY, Mixture, Modes, Space
from projects.twhin.operators import Operators
from projects.twhin.retrieval import retrieval
from tml import checkpoint
from tml.config import ConfigError, build_config
from tml.data.parquet import DataError


def ids(*values: int) -> modes.Ids:
    return np.array(values, dtype=np.int64)


def history(num_users: int, num_items: int, *pairs: tuple[int, int]) -> History:
    users, items = ids(*(u for u, _ in pairs)), ids(*(i for _, i in pairs))
    return History.from_edges(users, items, num_users, num_items)


def items_of(found: History) -> list[list[int]]:
    return [found.items[a:b].tolist() for a, b in pairwise(found.offsets)]


# Histories


def test_a_history_counts_doubles_and_leaves_out_what_is_known() -> None:
    found = history(3, 5, (2, 4), (0, 1), (0, 1), (0, 3))
    assert items_of(found) == [[1, 3], [], [4]]
    assert found.counts.tolist() == [2, 1, 1]
    assert found.active().tolist() == [0, 2]
    rows, items = found.pairs(ids(2, 1, 0))
    assert (rows.tolist(), items.tolist()) == ([0, 2, 2], [4, 1, 3])
    left = found.without(history(3, 5, (0, 3), (1, 4), (2, 0)))
    assert items_of(left) == [[1], [], [4]]
    assert items_of(found.without(history(3, 5))) == items_of(found)


def test_a_share_of_each_user_is_held_out() -> None:
    pairs = [(0, i) for i in range(10)] + [(1, 3)] + [(2, i) for i in range(5)]
    whole = history(4, 10, *pairs)
    kept, held = whole.split(0.2, seed=1)
    assert [len(items) for items in items_of(held)] == [2, 0, 1, 0]
    merged = [sorted(a + b) for a, b in zip(items_of(kept), items_of(held), strict=True)]
    assert merged == items_of(whole)
    assert [len(items) for items in items_of(whole.split(1.0, seed=1)[0])] == [1, 1, 1, 0]


# Clusters


@pytest.mark.parametrize("comparator", ["dot", "l2"])
def test_separate_groups_are_found(comparator: Comparator) -> None:
    centres = torch.eye(4) * 5
    group = torch.arange(80) % 4
    noise = torch.randn(80, 4, generator=torch.Generator().manual_seed(1))
    points = centres[group] + 0.3 * noise
    found = cluster(points, 4, comparator, 1, torch.arange(80))
    assert len({(int(a), int(b)) for a, b in zip(group, found.of_items, strict=True)}) == 4
    again = cluster(points, 4, comparator, 1, torch.arange(80))
    assert torch.equal(found.centroids, again.centroids)
    if comparator == "l2":
        expected = torch.stack([points[found.of_items == c].mean(dim=0) for c in range(4)])
        assert torch.allclose(found.centroids, expected, atol=1e-5)


def test_under_dot_and_cosine_only_directions_count() -> None:
    points = torch.tensor([[1.0, 0], [9, 0.1], [0, 1], [0.1, 9]])
    assert cluster(points, 2, "dot", 1, torch.arange(4)).of_items.unique_consecutive().numel() == 2
    found = cluster(points, 2, "dot", 1, torch.arange(4)).of_items.tolist()
    assert found[0] == found[1] != found[2] == found[3]
    far = torch.tensor([[1.0, 0], [0, 1], [9, 0], [9, 1]])
    found = cluster(far, 2, "l2", 1, torch.arange(4)).of_items.tolist()
    assert found[0] == found[1] != found[2] == found[3]


def test_fewer_items_than_clusters() -> None:
    points = torch.tensor([[1.0, 0], [0, 1], [2, 0]])  # two directions
    assert len(cluster(points, 10, "dot", 1, torch.arange(3))) == 2
    assert len(cluster(points, 10, "l2", 1, torch.arange(3))) == 3
    assert len(cluster(points, 10, "l2", 1, torch.tensor([1]))) == 1


# Modes


def space(
    users: torch.Tensor,
    items: torch.Tensor,
    comparator: Comparator = "dot",
    operator: str = "identity",
) -> Space:
    operators = Operators([operator], users.shape[1], 0.5, 3)
    return Space(users, items, operators, 0, comparator)


ITEMS = torch.tensor([[1.0, 0], [3, 0], [0, 2], [0, 4]])
USERS = torch.tensor([[3.0, 4], [1, 1], [1, 2], [-1, 0]])
BY_AXIS = Clusters(torch.eye(2), torch.tensor([0, 0, 1, 1]))
EDGES = history(4, 4, (0, 0), (0, 1), (0, 1), (0, 2), (1, 3), (2, 1), (2, 3))


def test_weights_and_centroids_by_hand() -> None:
    mixture = Mixture(space(USERS, ITEMS, "l2"), EDGES, BY_AXIS)
    alone = mixture.modes(ids(0), ids(1, 2)[None], smoothing=0.0, blend=0.0, num_modes=2)
    # User 0: item 0 once, item 1 twice, item 2 once; centroid of cluster 0 (1 + 3 + 3) / 3.
    assert alone.clusters.tolist() == [[0, 1]]
    assert alone.weights.tolist() == [[0.75, 0.25]]
    assert alone.queries[0].flatten().tolist() == pytest.approx([7 / 3, 0, 0, 2])
    found = mixture.modes(ids(0), ids(1, 2)[None], smoothing=0.5, blend=0.0, num_modes=2)
    # Neighbours: user 1 has item 3 alone, user 2 items 1 and 3: .25 in cluster 0, .75 in cluster 1.
    assert found.weights[0].tolist() == pytest.approx([0.5 * 0.75 + 0.125, 0.5 * 0.25 + 0.375])
    first = (0.125 * 1 + (0.25 + 0.125) * 3) / 0.5
    second = (0.125 * 2 + (0.25 + 0.125) * 4) / 0.5
    assert found.queries[0].flatten().tolist() == pytest.approx([first, 0, 0, second])


def test_the_heaviest_modes_are_kept_and_sum_to_one() -> None:
    mixture = Mixture(space(USERS, ITEMS), EDGES, BY_AXIS)
    found = mixture.modes(ids(0, 1), ids(2, 2)[:, None], smoothing=0.0, blend=0.0, num_modes=1)
    assert found.clusters.tolist() == [[0], [1]]
    assert found.weights.tolist() == [[1.0], [1.0]]
    wide = mixture.modes(ids(1), ids(2)[None], smoothing=0.0, blend=0.0, num_modes=9)
    assert wide.clusters.tolist() == [[1, NO_CLUSTER]]
    assert wide.weights.tolist() == [[1.0, 0.0]]


def test_a_cluster_smoothed_in_has_the_neighbours_centroid() -> None:
    mixture = Mixture(space(USERS, ITEMS, "l2"), EDGES, BY_AXIS)
    found = mixture.modes(ids(1), ids(0)[None], smoothing=0.2, blend=0.0, num_modes=2)
    assert found.weights[0].tolist() == pytest.approx([0.85, 0.15])
    assert found.queries[0, 1].tolist() == pytest.approx([7 / 3, 0])


def test_a_user_without_edges_is_his_neighbours() -> None:
    mixture = Mixture(space(USERS, ITEMS, "l2"), EDGES, BY_AXIS)
    found = mixture.modes(ids(3), ids(0, NOBODY)[None], smoothing=0.0, blend=0.0, num_modes=2)
    assert found.weights[0].tolist() == pytest.approx([0.75, 0.25])
    assert found.queries[0].flatten().tolist() == pytest.approx([7 / 3, 0, 0, 2])


def test_a_user_without_edges_and_neighbours_asks_by_his_own_vector() -> None:
    mixture = Mixture(space(USERS, ITEMS), EDGES, BY_AXIS)
    none = np.empty((2, 0), dtype=np.int64)
    found = mixture.modes(ids(3, 1), none, smoothing=0.9, blend=0.0, num_modes=2)
    assert found.clusters.tolist() == [[NO_CLUSTER, NO_CLUSTER], [1, NO_CLUSTER]]
    assert found.weights.tolist() == [[1, 0], [1, 0]]
    assert found.queries[0, 0].tolist() == [-1, 0]


def test_blends_by_hand() -> None:
    none = np.empty((1, 0), dtype=np.int64)
    by: dict[Comparator, list[float]] = {}
    for comparator in ("dot", "cosine", "l2"):
        mixture = Mixture(space(USERS, ITEMS, comparator), EDGES, BY_AXIS)
        found = mixture.modes(ids(0), none, smoothing=0.0, blend=0.25, num_modes=1)
        by[comparator] = found.queries[0, 0].tolist()
    assert by["dot"] == pytest.approx([0.25 * 3 + 0.75 * 5, 0.25 * 4])  # ‖(3, 4)‖ = 5
    assert by["cosine"] == pytest.approx([0.25 * 0.6 + 0.75, 0.25 * 0.8])
    assert by["l2"] == pytest.approx([0.25 * 3 + 0.75 * 7 / 3, 0.25 * 4])


def test_under_dot_modes_keep_the_relations_offset() -> None:
    none = np.empty((1, 0), dtype=np.int64)
    moved = space(USERS, ITEMS, "dot", "translation")
    offset = moved.operators.get_parameter("translations")[0].detach()
    assert offset.abs().min() > 0
    found = Mixture(moved, EDGES, BY_AXIS).modes(
        ids(0), none, smoothing=0.0, blend=0.0, num_modes=1
    )
    assert found.queries[0, 0].tolist() == pytest.approx((torch.tensor([5.0, 0]) + offset).tolist())
    moved = space(USERS, ITEMS, "l2", "translation")
    found = Mixture(moved, EDGES, BY_AXIS).modes(
        ids(0), none, smoothing=0.0, blend=0.0, num_modes=1
    )
    assert found.queries[0, 0].tolist() == pytest.approx([7 / 3, 0])


def test_neighbours_are_the_nearest_others_with_edges() -> None:
    users = torch.tensor([[1.0, 0], [9, 1], [0, 1], [1, 0.01], [1, 0.2]])
    edges = history(5, 4, (0, 0), (1, 0), (2, 0), (4, 1))  # user 3 has none
    by_direction = Mixture(space(users, ITEMS, "dot"), edges, BY_AXIS)
    assert by_direction.neighbours(ids(0, 3), 2).tolist() == [[1, 4], [0, 1]]
    by_distance = Mixture(space(users, ITEMS, "l2"), edges, BY_AXIS)
    assert by_distance.neighbours(ids(0, 3), 2).tolist() == [[4, 2], [0, 4]]
    assert by_distance.neighbours(ids(0, 3), 9)[0].tolist() == [4, 2, 1, NOBODY]
    assert by_distance.neighbours(ids(0), 0).shape == (1, 0)


def test_blocks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world("dot", seed=2)
    users = np.arange(30)

    def all_of(mixture: Mixture) -> tuple[modes.Ids, Modes]:
        near = mixture.neighbours(users, 6)
        return near, mixture.modes(users, near, smoothing=0.4, blend=0.5, num_modes=3)

    near, found = all_of(made.mixture)
    monkeypatch.setattr(modes, "BLOCK_SIMILARITIES", 70)
    monkeypatch.setattr(modes, "BLOCK_ENTRIES", 50)
    near_too, found_too = all_of(made.mixture)
    assert np.array_equal(near, near_too)
    assert torch.equal(found.clusters, found_too.clusters)
    assert torch.allclose(found.queries, found_too.queries, atol=1e-6)


# Budgets and turns


def test_budgets_by_largest_remainder() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0], [0.96, 0.04, 0]])
    assert budgets(weights, 7).tolist() == [[4, 2, 1], [3, 2, 2], [4, 3, 0], [7, 0, 0]]
    assert budgets(weights, 10).tolist() == [[5, 3, 2], [4, 3, 3], [5, 5, 0], [10, 0, 0]]
    assert budgets(torch.zeros(1, 3), 7).tolist() == [[0, 0, 0]]


def by_remainder(shares: list[int], k: int) -> list[int]:
    """Shares as whole numbers, in exact arithmetic."""
    quotas = [Fraction(share * k, sum(shares)) for share in shares]
    given = [math.floor(quota) for quota in quotas]
    order = sorted(range(len(shares)), key=lambda i: (given[i] - quotas[i], i))
    for i in order[: k - sum(given)]:
        given[i] += 1
    return given


def test_budgets_equal_exact_arithmetic() -> None:
    random = np.random.default_rng(1)
    shares = random.integers(1, 12, (200, 5))
    weights = torch.from_numpy(shares / shares.sum(axis=1, keepdims=True)).float()
    for k in (1, 10, 23):
        assert budgets(weights, k).tolist() == [by_remainder(row.tolist(), k) for row in shares]


def test_turns_are_spread_over_the_list() -> None:
    # Mode 0 at 1/8, 3/8, 5/8, 7/8, mode 1 at 1/4 and 3/4, mode 2 at 1/2.
    assert turns(torch.tensor([[4, 2, 1]]), 7).tolist() == [[0, 1, 0, 2, 0, 1, 0]]
    assert turns(torch.tensor([[1, 1, 1], [0, 0, 0]]), 3).tolist() == [[0, 1, 2], [NONE] * 3]


def merge_by_loop(lists: list[list[int]], order: list[int]) -> list[int]:
    taken: list[int] = []
    for mode in order:
        left = [item for item in lists[mode] if item != NONE and item not in taken]
        taken += left[:1]
    return taken + [NONE] * (len(order) - len(taken))


def test_doubles_are_passed_over_and_refilled() -> None:
    lists = torch.tensor([[[5, 6, 7], [5, 6, 8], [6, 5, 0]]])
    assert merge(lists, torch.tensor([[0, 1, 2]]), 9).tolist() == [[5, 6, 0]]
    assert merge(lists, torch.tensor([[1, 1, 0]]), 9).tolist() == [[5, 6, 7]]
    short = torch.tensor([[[1, 2, NONE, NONE], [2, 1, NONE, NONE]]])
    assert merge(short, torch.tensor([[1, 0, 1, 0]]), 3).tolist() == [[2, 1, NONE, NONE]]


# Candidates


class World:
    """Random vectors and edges of two relations with users and items in different tables."""

    def __init__(self, comparator: Comparator, seed: int, operator: str = "translation") -> None:
        random = np.random.default_rng(seed)
        tables = [
            {"name": name, "num_embeddings": rows, "embedding_dim": 8}
            for name, rows in (("user", 30), ("item", 23))
        ]
        relations = [
            {"name": name, "lhs": "user", "rhs": "item", "operator": operator} for name in "ab"
        ]
        tree: dict[str, Any] = {
            "model": {
                "embeddings": {"tables": tables},
                "relations": relations,
                "comparator": comparator,
                "biases": True,
            },
            "train_data": {"data_root": "none", "global_negatives": 5},
        }
        self.config = build_config(TwhinConfig, tree, "test")
        generator = torch.Generator().manual_seed(seed)
        rows = {t["name"]: torch.randn(t["num_embeddings"], 8, generator=generator) for t in tables}
        biases = {name: torch.randn(len(r), generator=generator) for name, r in rows.items()}
        operators = build_operators(self.config.model)
        for parameter in operators.parameters():
            parameter.data.normal_(generator=generator)
        self.vectors = Vectors(self.config.model, rows, operators, biases)
        self.edges = (random.integers(0, 29, 150), random.integers(0, 23, 150))  # user 29 has none
        self.history = History.from_edges(*self.edges, 30, 23)
        self.space = Space(rows["user"], rows["item"], operators, 1, comparator)
        fitted = torch.from_numpy(np.unique(self.history.items))
        self.clusters = cluster(rows["item"], 5, comparator, 1, fitted)
        self.mixture = Mixture(self.space, self.history, self.clusters)
        self.retrieval = Retrieval(
            rows["item"],
            biases["item"],
            comparator,
            lambda users: self.vectors.score(1, "rhs", users),
        )


def world(comparator: Comparator, seed: int, operator: str = "translation") -> World:
    return World(comparator, seed, operator)


@pytest.mark.parametrize(
    ("comparator", "operator"),
    [("dot", "translation"), ("cosine", "affine"), ("l2", "translation"), ("dot", "affine")],
)
def test_with_blend_1_every_mode_ranks_as_the_single_vector(
    comparator: Comparator, operator: str
) -> None:
    made = world(comparator, 4, operator)
    users = np.arange(30)
    near = made.mixture.neighbours(users, 4)
    found = made.mixture.modes(users, near, smoothing=0.3, blend=1.0, num_modes=3)
    lists = made.retrieval.of_modes(users, found, made.history, 12)
    single = made.retrieval.single(users, made.history, 12)
    assert torch.equal(retrieve(found.weights, lists, 12, 23), single)


@pytest.mark.parametrize("comparator", ["dot", "cosine", "squared_l2"])
def test_candidates_equal_a_loop(comparator: Comparator) -> None:
    made = world(comparator, 5)
    users = np.arange(30)
    near = made.mixture.neighbours(users, 4)
    found = made.mixture.modes(users, near, smoothing=0.3, blend=0.2, num_modes=4)
    lists = made.retrieval.of_modes(users, found, made.history, 23)
    seen = items_of(made.history)
    for k in (1, 7, 23):
        candidates = retrieve(found.weights, lists, k, 23)
        for user in range(30):
            weights = [w for w in found.weights[user].tolist() if w]
            scores = products(comparator, found.queries[user], made.space.items)
            scores = scores + made.vectors.biases["item"]
            ranked = [
                [i for i in row.argsort(descending=True).tolist() if i not in seen[user]]
                for row in scores
            ]
            given = budgets(torch.tensor([weights]), k)
            order = turns(given, k)[0].tolist()
            assert candidates[user].tolist() == merge_by_loop(ranked, order)
            # Everything that is left comes where there is room for it.
            assert k < 23 or (candidates[user] != NONE).sum() == 23 - len(seen[user])


# Measures


def test_measures_equal_loops() -> None:
    generator = torch.Generator().manual_seed(6)
    items = torch.randn(12, 4, generator=generator)
    clusters = Clusters(torch.zeros(3, 4), torch.arange(12) % 3)
    candidates = torch.tensor([[0, 3, 1, 7], [4, 5, NONE, NONE], [2, NONE, NONE, NONE]])
    relevant = ids(0, 0, 1, 2), ids(3, 11, 5, 6)
    tally = Tally(items, clusters, [2, 4])
    for cut, k in enumerate((2, 4)):
        tally.add(cut, candidates[:, :k], relevant)
    found = tally.report()
    assert found["recall@4"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["hit@2"] == pytest.approx(2 / 3)
    second = 1 / math.log2(3)
    assert found["ndcg@2"] == pytest.approx((second / (1 + second) + second + 0) / 3)

    def distance(row: list[int]) -> float:
        pairs = [(a, b) for a in row for b in row if a < b]
        each = [1 - float(F.cosine_similarity(items[a], items[b], dim=0)) for a, b in pairs]
        return float(np.mean(each)) if each else 0.0

    rows = [[i for i in row if i != NONE] for row in candidates.tolist()]
    assert found["distance@4"] == pytest.approx(np.mean([distance(row) for row in rows]), abs=1e-5)
    counts = [Counter(i % 3 for i in row) for row in rows]
    assert found["clusters@4"] == pytest.approx(np.mean([len(count) for count in counts]))
    entropy = [
        -sum(n / len(row) * math.log(n / len(row)) for n in count.values())
        for count, row in zip(counts, rows, strict=True)
    ]
    assert found["entropy@4"] == pytest.approx(np.mean(entropy))
    assert found["coverage@2"] == pytest.approx(5 / 12)
    assert found["coverage@4"] == pytest.approx(7 / 12)


# The program


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random vectors with edges of train, validation and test; an empty relation."""
    folder = tmp_path_factory.mktemp("run")
    made, random = world("dot", 7), np.random.default_rng(8)
    tree = made.config.model_dump(mode="json", exclude_unset=True)
    tree["model"]["relations"].append({"name": "empty", "lhs": "user", "rhs": "item"})
    tree["model"]["embeddings"]["tables"][0]["vocab"] = str(folder / "user.parquet")
    tree["training"] = {"save_dir": str(folder)}
    names = {"id": range(30), "entity": [f"u{i}" for i in range(30)]}
    pq.write_table(pa.table(names), folder / "user.parquet")
    for split, count in (("train", 150), ("validation", 60), ("test", 60)):
        lhs, rhs = made.edges if split == "train" else random.integers(0, (30, 23), (count, 2)).T
        rel = np.ones(count, dtype=np.int64)
        pq.write_table(pa.table({"lhs": lhs, "rel": rel, "rhs": rhs}), folder / f"{split}.parquet")
        tree[f"{split}_data"] = {"data_root": str(folder / f"{split}.parquet")}
    tree["train_data"]["global_negatives"] = 5
    config = build_config(TwhinConfig, tree, "test")
    state = {weight_name(name): rows for name, rows in made.vectors.tables.items()}
    for name, bias in made.vectors.biases.items():
        state[weight_name(f"{name}.bias")] = F.pad(bias.unsqueeze(1), (0, 3))
    translations = made.vectors.operators.get_parameter("translations").detach()
    state["translations"] = torch.cat([translations, torch.zeros(1, 8)])
    checkpoint.save(folder, 3, state, {}, yaml.safe_dump(tree))
    assert config.model.relations[2].name == "empty"
    return folder


def call(run: Path, *flags: str) -> mixtures.Report:
    arguments = ["--run", str(run), "--relation=b", "--clusters=5", "--neighbors=4", "--k=5,2"]
    return mixtures.run(mixtures.build_parser().parse_args([*arguments, *flags]))


def test_the_single_vectors_numbers_are_those_of_evaluation(run_folder: Path) -> None:
    report = call(run_folder)
    from projects.twhin.export import load_vectors, resolve_run

    folder, config = resolve_run(run_folder, None)
    test, train = read_split(config, "test"), read_split(config, "train")
    assert test is not None
    assert train is not None
    sums = retrieval(
        load_vectors(folder, config.model), config.model.relations, test, train, [2, 5]
    )[1]
    assert report["users"] == sums[0]
    names = [f"{metric}@{k}" for metric in ("recall", "ndcg", "hit") for k in (2, 5)]
    expected = dict(zip(names, sums[1:] / sums[0], strict=True))
    assert {name: report["single"][name] for name in names} == pytest.approx(expected)
    same = call(run_folder, "--blend=1")
    assert same["mixture"] == pytest.approx(same["single"])
    assert report["mixture"] != pytest.approx(report["single"])


def test_settings_are_chosen_without_the_test_edges(run_folder: Path, tmp_path: Path) -> None:
    first = call(run_folder, "--tune")
    assert first["tuning"]["on"] == "validation edges"
    best = max(first["tuning"]["tried"], key=lambda row: row["recall"])
    chosen = first["tuning"]["chosen"]
    assert {name: best[name] for name in chosen} == chosen
    assert {name: first["settings"][name] for name in chosen} == chosen
    others = tmp_path / "others.parquet"
    table = pq.read_table(run_folder / "test.parquet")
    pq.write_table(table.set_column(2, "rhs", pa.array(np.arange(60) % 23)), others)
    second = call(run_folder, "--tune", f"--set=test_data.data_root={others}")
    assert second["tuning"] == first["tuning"]
    assert second["single"] != pytest.approx(first["single"])


def test_without_validation_a_share_of_the_training_edges_is_held_out(run_folder: Path) -> None:
    report = call(run_folder, "--tune", "--set=validation_data=null")
    assert report["tuning"]["on"].startswith("20% of the training edges")
    assert report["single"] == pytest.approx(call(run_folder)["single"])


def test_modes_as_files(run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "modes"
    for _ in range(2):  # the folder of an earlier call is replaced
        call(run_folder, "--blend=.5", "--modes=3", f"--output={output}")
    rows = pq.read_table(output / "modes.parquet").to_pylist()
    assert [(row["id"], row["entity"]) for row in rows] == [(i, f"u{i}") for i in range(30)]
    made = world("dot", 7)
    users = np.arange(30)
    near = made.mixture.neighbours(users, 4)
    expected = made.mixture.modes(users, near, smoothing=0.2, blend=0.5, num_modes=3)
    for user, row in enumerate(rows):
        count = len(row["modes"])
        assert count == int((expected.weights[user] > 0).sum())
        clusters = [mode["cluster"] for mode in row["modes"]]
        assert clusters == expected.clusters[user, :count].tolist()
        weights = [mode["weight"] for mode in row["modes"]]
        assert weights == pytest.approx(expected.weights[user, :count].tolist())
        queries = torch.tensor([mode["vector"] for mode in row["modes"]])
        assert torch.allclose(queries, expected.queries[user, :count], atol=1e-5)
    items = pq.read_table(output / "items.parquet").to_pydict()
    assert items["cluster"] == made.clusters.of_items.tolist()
    sizes = pq.read_table(output / "clusters.parquet")["items"].to_pylist()
    assert sizes == torch.bincount(made.clusters.of_items).tolist()
    described = json.loads((output / "mixture.json").read_text())
    assert (described["relation"], described["step"]) == ("b", 3)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_of_other_things_is_left_alone(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "mixture.json").write_text("{}")  # mine stays beside an old mixture, too
    monkeypatch.setattr(mixtures, "compare", None)  # it is said before anything is measured
    with pytest.raises(DataError, match="holds something else than a mixture"):
        call(run_folder, f"--output={tmp_path}")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "mixture.json"}


def test_without_smoothing_neighbours_are_looked_for_only_for_who_has_no_edges(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    search = Mixture.neighbours
    with monkeypatch.context() as patch:
        patch.setattr(mixtures, "neighbours_of", lambda made, users, _: made.neighbours(users, 4))
        everyone = call(run_folder, "--smoothing=0")

    def counted(mixture: Mixture, users: modes.Ids, number: int) -> modes.Ids:
        asked.extend(users.tolist())
        return search(mixture, users, number)

    monkeypatch.setattr(Mixture, "neighbours", counted)
    report = call(run_folder, "--smoothing=0")
    table = pq.read_table(run_folder / "train.parquet")
    assert asked
    assert not set(asked) & set(table.column("lhs").to_pylist())
    assert report["mixture"] == everyone["mixture"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--relation=c", "--relation=c: the model has a, b, empty"),
        ("--relation=empty", "the training edges have none of it"),
        ("--clusters=0", "--clusters=0: give 1 or more"),
        ("--tuning-users=0", "--tuning-users=0: give 1 or more"),
        ("--smoothing=1.5", "--smoothing=1.5: give a number from 0 to 1"),
        ("--set=test_data=null", "the config has no test_data"),
    ],
)
def test_mistakes_are_told(run_folder: Path, flag: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(run_folder, "--split=test", flag)


def test_evaluate_says_on_stderr_what_it_begins(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--run", str(run_folder), "--set=evaluation.max_edges=5", "--json"]
    assert evaluate.main(flags) == 0
    shown, said = capsys.readouterr()
    assert json.loads(shown)["link_prediction"]["protocol"].split("; ")[-1].startswith("5 of ")
    assert said.splitlines()[-1] == "measuring 5 edges of test …"


def test_settings_are_not_measured_where_they_were_chosen(run_folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be measured on them"):
        call(run_folder, "--tune", "--split=validation")


def test_the_command_line_shows_tables(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    flags = ["--run", str(run_folder), "--relation=b", "--tune", "--k=2,5"]
    assert mixtures.main(flags) == 0
    shown, said = capsys.readouterr()
    assert "smoothing 0.2" in shown  # by the name of its flag
    assert "λ" not in shown
    starts = [line.split()[0] for line in said.splitlines()]
    assert starts == ["clustering", "tuning:", "clustering", "measuring"]
    assert all(line.endswith(" …") for line in said.splitlines())
    assert "mixture" in shown
    assert "coverage" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert mixtures.main([*flags, "--relation=c"]) == 2
    assert "the model has a, b, empty" in capsys.readouterr().err
