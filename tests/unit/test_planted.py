"""Planted graphs: the same for the same seed, of the probabilities they claim, with an optimum that
is one.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from projects.twhin import planted
from projects.twhin.config import TwhinConfig
from projects.twhin.edges import Edges, join
from projects.twhin.link_prediction import link_prediction
from projects.twhin.planted import PlantedConfig
from tml.config import ConfigError, load_config

SMALL = PlantedConfig(
    num_users=300,
    num_tweets=200,
    num_communities=5,
    edges_per_user={"fav": 20.0, "reply": 10.0},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.ensure(SMALL, tmp_path_factory.mktemp("planted") / "graph")


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_config_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = planted.ensure(SMALL, tmp_path / "again")
    assert files_of(again) == files_of(folder)


def test_another_seed_gives_another_graph(folder: Path, tmp_path: Path) -> None:
    other = planted.ensure(SMALL.model_copy(update={"seed": 2}), tmp_path / "other")
    assert (
        files_of(other)["train/part-00000.parquet"] != files_of(folder)["train/part-00000.parquet"]
    )


def test_a_graph_that_is_there_is_kept_and_one_of_another_config_replaced(tmp_path: Path) -> None:
    folder = planted.ensure(SMALL, tmp_path / "graph")
    inode = folder.stat().st_ino
    planted.ensure(SMALL, folder)
    assert folder.stat().st_ino == inode
    other = SMALL.model_copy(update={"num_users": 200})
    planted.ensure(other, folder)
    assert planted.is_made(other, folder)
    assert pq.read_metadata(folder / "vocab" / "user.parquet").num_rows == 200
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(ConfigError, match="something else"):
        planted.ensure(SMALL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_graph_that_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("half way")

    monkeypatch.setattr(planted, "measure", fail)
    with pytest.raises(RuntimeError, match="half way"):
        planted.ensure(SMALL, tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_make_one_graph(tmp_path: Path) -> None:
    # The lock belongs to an open folder, so threads exclude each other as processes do.
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: planted.ensure(SMALL, tmp_path / "graph"), range(2)))
    assert made == [tmp_path / "graph"] * 2
    assert planted.is_made(SMALL, tmp_path / "graph")
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


def test_probabilities_are_those_of_the_formula() -> None:
    truth = planted.Truth(
        scales=np.array([0.5]),
        affinity=np.array([[2.0, 6.0]]),
        styles=np.array([[1.0, 1 / 3]]),
    )
    assert truth.probabilities(0).tolist() == [[0.5, 0.5]]


def test_expected_degrees_and_affinities_are_those_of_the_config() -> None:
    config = PlantedConfig(num_users=1000, num_tweets=500, activity_spread=0, popularity_spread=0)
    truth = planted.draw_truth(config)
    for number, expected in enumerate(config.edges_per_user.values()):
        degree = truth.probabilities(number).sum(axis=1).mean()
        assert degree == pytest.approx(expected, rel=0.01)
    assert set(np.unique(truth.affinity)) == {1, config.neighbour_affinity, config.own_affinity}
    assert set(np.unique(truth.styles[1])) == {1, 2.5, 6.25}


def test_edges_appear_as_often_as_their_probability_says() -> None:
    truth = planted.draw_truth(SMALL)
    graph = planted.draw_graph(SMALL, truth)
    drawn = np.zeros((2, 300, 200), dtype=bool)
    users, tweets = (
        graph.vocabularies[kind].str.strip_prefix(f"{kind}_").cast(int).to_numpy()
        for kind in ("user", "tweet")
    )
    for columns in graph.splits.values():
        drawn[columns["rel"], users[columns["lhs"]], tweets[columns["rhs"]]] = True
    probabilities = np.stack([truth.probabilities(number) for number in range(2)])
    assert drawn.sum() == sum(len(columns["rel"]) for columns in graph.splits.values())
    for low, high in ((0, 0.01), (0.01, 0.1), (0.1, 0.4), (0.4, 1)):
        chosen = (low <= probabilities) & (probabilities < high)
        expected, seen = probabilities[chosen].sum(), drawn[chosen].sum()
        spread = np.sqrt((probabilities[chosen] * (1 - probabilities[chosen])).sum())
        assert abs(seen - expected) < 5 * spread


def test_splits_have_their_shares_and_ids_go_by_frequency(folder: Path) -> None:
    counts = json.loads((folder / "counts.json").read_text())
    total = sum(counts["edges"].values())
    assert counts["edges"]["test"] == pytest.approx(0.05 * total, abs=1)
    train = pq.read_table(folder / "train").to_pydict()
    degrees = np.bincount(train["rhs"], minlength=200)
    assert (np.diff(degrees) <= 0).all()


def test_the_optimum_is_above_popularity_and_no_noisy_ranking_is_above_it(folder: Path) -> None:
    made = json.loads((folder / planted.PLANTED).read_text())
    optimum = made["optimum"]["mean"]["mrr"]
    assert optimum > 2 * made["popularity"]["mean"]["mrr"]
    truth = planted.draw_truth(SMALL)
    graph = planted.draw_graph(SMALL, truth)
    assert planted.measure(graph, truth)["optimum"] == made["optimum"]
    random = np.random.default_rng(1)
    for noise in (0.5, 1.0):
        noisy = np.exp(random.normal(0, noise, truth.affinity.shape))
        blurred = planted.Truth(truth.scales, truth.affinity * noisy, truth.styles)
        assert planted.measure(graph, blurred)["optimum"]["mean"]["mrr"] < optimum


def test_the_optimum_ranks_an_edge_where_its_probability_stands(folder: Path) -> None:
    truth = planted.draw_truth(SMALL)
    graph = planted.draw_graph(SMALL, truth)
    users, tweets = (
        graph.vocabularies[kind].str.strip_prefix(f"{kind}_").cast(int).to_numpy()
        for kind in ("user", "tweet")
    )
    test = graph.splits["test"]
    lhs, rel, rhs = (int(test[name][0]) for name in ("lhs", "rel", "rhs"))
    probabilities = truth.probabilities(rel)[users][:, tweets]
    known = {
        (int(u), int(t))
        for columns in graph.splits.values()
        for u, r, t in zip(columns["lhs"], columns["rel"], columns["rhs"], strict=True)
        if r == rel
    }
    better = [t for t in range(200) if probabilities[lhs, t] > probabilities[lhs, rhs]]
    rank = 1 + sum((lhs, t) not in known for t in better)
    one = Edges(*(np.array([value]) for value in (lhs, rel, rhs)))
    everything = join([Edges(c["lhs"], c["rel"], c["rhs"]) for c in graph.splits.values()])
    scorer = planted._TruthScorer(graph, truth)
    sums = link_prediction(scorer, graph.relations, one, everything)
    assert sums[rel, 1, 2] == rank


def test_the_folder_is_laid_under_a_config(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {embeddings: {defaults: {embedding_dim: 4}}}\ntrain_data: {global_negatives: 9}"
    )
    config = load_config(TwhinConfig, path, base=folder / "graph.yaml")
    assert [relation.name for relation in config.model.relations] == ["fav", "reply"]
    assert config.train_data.data_root == f"{folder}/train/*.parquet"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"edges_per_user": {"fav": 1500.0}}, "edges_per_user.fav"),
        ({"edges_per_user": {}}, "at least 1"),
    ],
)
def test_impossible_graphs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlantedConfig.model_validate(change)


def test_importing_the_config_loads_neither_torch_nor_polars() -> None:
    code = (
        "import sys; import projects.twhin.planted; print({'torch', 'polars'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
