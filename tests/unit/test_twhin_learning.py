"""Each family of operators learns what it can represent, and not what it cannot."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from projects.twhin.config import DataConfig, ModelConfig
from projects.twhin.data import EdgeLayout, to_batch
from projects.twhin.model import (
    TwhinModel,
    Vectors,
    build_relation_optimizer,
    seed_dropout,
    table_specs,
)
from tml.distributed import Job
from tml.embeddings import build_tables

JOB = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
NODES, DIM = 60, 32
ALL = {"all_negatives": True}
SAMPLED = {"global_negatives": 30, "chunk_size": 100}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small cost less than handing them to a second thread."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def fit(
    edges: np.ndarray, operator: str, data: dict[str, Any], steps: int = 60, **model: Any
) -> Vectors:
    """Vectors after `steps` batches of all `edges` (n, 2) of one relation."""
    config = ModelConfig.model_validate(
        {
            "embeddings": {
                "tables": [
                    {
                        "name": "e",
                        "num_embeddings": NODES,
                        "embedding_dim": DIM,
                        "optimizer": {"adagrad": {"lr": 0.2}},
                    }
                ]
            },
            "relations": [{"name": "r", "lhs": "e", "rhs": "e", "operator": operator}],
            "translation_optimizer": {"adagrad": {"lr": 0.2}},
            "loss": {"softmax": {}},
            "init_scale": 0.1,
            "relation_init_scale": 0.1,
            **model,
        }
    )
    settings = DataConfig.model_validate({"data_root": "x", **data})
    tables = build_tables(table_specs(config), JOB, seed=1, as_a_whole=settings.all_negatives)
    trained = TwhinModel(config, tables, seed=1)
    optimizer, _ = build_relation_optimizer(config, trained)
    layout = EdgeLayout(config)
    columns = {"lhs": edges[:, 0], "rel": np.zeros(len(edges), int), "rhs": edges[:, 1]}
    for step in range(steps):
        seed_dropout(1, step, JOB)
        generator = np.random.default_rng(step)
        batch = to_batch(columns, layout, settings, generator, len(edges))
        (trained(batch, settings) / len(edges)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Vectors.from_saved(config, {**tables.state(), **trained.relation_parameters()})


def tournament() -> np.ndarray:
    """For every pair of nodes one direction, drawn at random."""
    first, second = np.triu_indices(NODES, 1)
    swap = np.random.default_rng(0).random(len(first)) < 0.5
    return np.stack([np.where(swap, second, first), np.where(swap, first, second)], axis=1)


def told_apart(vectors: Vectors, edges: np.ndarray, side: str) -> float:
    """Share of edges scored above their reverse."""
    scores = vectors.score(0, side, torch.arange(NODES))
    if side == "lhs":
        scores = scores.T
    forth, back = scores[edges[:, 0], edges[:, 1]], scores[edges[:, 1], edges[:, 0]]
    margin = (forth - back).double()
    return ((margin > 1e-4).double() + 0.5 * (margin.abs() <= 1e-4)).mean().item()


@pytest.mark.parametrize("data", [ALL, SAMPLED], ids=["all", "sampled"])
@pytest.mark.parametrize("operator", ["linear", "affine", "complex_diagonal"])
def test_directions_are_learned_by_operators_that_have_one(
    operator: str, data: dict[str, Any]
) -> None:
    edges = tournament()
    vectors = fit(edges, operator, data, steps=150)
    for side in ("lhs", "rhs"):
        assert told_apart(vectors, edges, side) > 0.9


@pytest.mark.parametrize("operator", ["identity", "diagonal"])
def test_symmetric_operators_cannot_tell_directions_apart(operator: str) -> None:
    edges = tournament()
    assert told_apart(fit(edges, operator, ALL), edges, "rhs") == 0.5


def test_reciprocal_relations_tell_directions_apart_for_both_sides() -> None:
    edges = tournament()
    vectors = fit(edges, "complex_diagonal", ALL, steps=150, reciprocal=True)
    for side in ("lhs", "rhs"):
        assert told_apart(vectors, edges, side) > 0.9


def mean_reciprocal_rank(scores: Tensor, true: Tensor) -> float:
    return (
        (1 / (1 + (scores > scores.gather(1, true.view(-1, 1))).sum(dim=1)).double()).mean().item()
    )


def chain() -> np.ndarray:
    return np.stack([np.arange(NODES - 1), np.arange(1, NODES)], axis=1)


@pytest.mark.parametrize("comparator", ["l2", "squared_l2"])
@pytest.mark.parametrize("loss", [{"softmax": {}}, {"margin_ranking": {"margin": 1.0}}])
def test_a_translation_steps_along_a_chain_and_the_identity_does_not(
    comparator: str, loss: dict[str, Any]
) -> None:
    edges = torch.from_numpy(chain())
    found = {}
    for operator in ("translation", "identity"):
        vectors = fit(chain(), operator, SAMPLED, steps=300, comparator=comparator, loss=loss)
        sides = []
        for side, asking, true in (("lhs", 1, 0), ("rhs", 0, 1)):
            scores = vectors.score(0, side, edges[:, asking])
            scores.scatter_(1, edges[:, asking, None], -torch.inf)  # an entity is not its answer
            sides.append(mean_reciprocal_rank(scores, edges[:, true]))
        found[operator] = sum(sides) / 2
    # The nodes before and after are alike to the identity: ranks 1 and 2 by turns, 3/4 on average.
    assert found["identity"] < 0.8
    assert found["translation"] > 0.8


@pytest.mark.parametrize(
    ("operator", "model"),
    [
        ("identity", {}),
        ("translation", {"comparator": "cosine", "loss": {"softmax": {"temperature": 0.1}}}),
        ("diagonal", {"loss": {"logistic": {"negatives": "mean"}}}),
        ("complex_diagonal", {"regularization": {"n3": 0.001}, "embedding_dropout": 0.1}),
        ("identity", {"biases": True}),
    ],
)
def test_communities_are_learned_by_all(operator: str, model: dict[str, Any]) -> None:
    same = np.arange(NODES)[:, None] % 6 == np.arange(NODES)[None] % 6
    edges = np.stack(np.nonzero(same), axis=1)
    chosen = np.random.default_rng(0).random(len(edges)) < 0.7
    vectors = fit(edges[chosen], operator, SAMPLED, steps=100, **model)
    held_out = edges[~chosen]
    scores = vectors.score(0, "rhs", torch.arange(NODES))
    picked = torch.from_numpy(held_out)
    inside = scores[picked[:, 0], picked[:, 1]]
    outside = scores.masked_fill(torch.from_numpy(same), -torch.inf).max(dim=1).values
    assert (inside > outside[picked[:, 0]]).double().mean().item() > 0.95


def test_biases_learn_how_popular_an_entity_is() -> None:
    generator = np.random.default_rng(0)
    popularity = np.exp(generator.normal(0, 1.5, NODES))
    tails = generator.choice(NODES, size=2000, p=popularity / popularity.sum())
    edges = np.stack([generator.integers(NODES, size=2000), tails], axis=1)
    vectors = fit(edges, "identity", ALL, steps=60, biases=True)
    degree = np.bincount(tails, minlength=NODES)
    learned = np.argsort(np.argsort(vectors.biases["e"].numpy()))
    assert np.corrcoef(learned, np.argsort(np.argsort(degree)))[0, 1] > 0.8
