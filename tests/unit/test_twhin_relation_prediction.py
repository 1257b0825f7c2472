"""Relation prediction: its losses and gradients are those of scoring every relation of every edge,
on all paths of the model.
"""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from projects.twhin import one_vs_all
from projects.twhin.anchors import Anchors
from projects.twhin.comparators import Comparator
from projects.twhin.config import DataConfig, ModelConfig, RelationConfig, TwhinConfig
from projects.twhin.data import EdgeLayout, to_batch
from projects.twhin.model import TwhinModel, build_prediction, build_scoring, table_specs
from projects.twhin.operators import Operator, Operators
from projects.twhin.relation_prediction import Ends, RelationPrediction, competitors
from projects.twhin.scoring import Entities, Scoring
from tml.config import ConfigError, build_config
from tml.distributed import Job
from tml.embeddings import build_tables

JOB = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
ROWS, DIM = 6, 8
SHARE, TEMPERATURE = 0.7, 0.5


def relations_of(*operators: Operator) -> list[RelationConfig]:
    """Relations between one table and itself."""
    return [
        RelationConfig(name=str(number), lhs="e", rhs="e", operator=operator)
        for number, operator in enumerate(operators)
    ]


def test_one_edge_and_two_relations_by_hand() -> None:
    # s = 1, t = i, c_0 = i log 2, c_1 = 0: Re(c s t̄) is log 2 and 0, probabilities 2/3 and 1/3. The
    # edge is of relation 1, counts 3, and λ is 1/2.
    relations = relations_of("complex_diagonal", "complex_diagonal")
    operators = Operators(["complex_diagonal"] * 2, 2)
    log_2 = math.log(2)
    with torch.no_grad():
        operators.get_parameter("complex_diagonals").copy_(torch.tensor([[0.0, log_2], [0.0, 0.0]]))
    s = torch.tensor([[1.0, 0.0]], requires_grad=True)
    t = torch.tensor([[0.0, 1.0]], requires_grad=True)
    prediction = RelationPrediction(
        relations, operators, "dot", weight=0.5, temperature=1.0, reciprocal=False
    )
    loss = prediction.loss(
        ("e", "e"), "rhs", torch.tensor([1]), Ends(s), Ends(t), torch.tensor([3.0])
    )
    loss.backward()
    assert loss.item() == pytest.approx(1.5 * math.log(3))
    # ∂f is 1.5 · (2/3, −2/3); ∂c = ∂f s̄ t, ∂s = ∂f c̄ t, ∂t = ∂f c s.
    found = operators.get_parameter("complex_diagonals").grad
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    torch.testing.assert_close(s.grad, torch.tensor([[log_2, 0.0]]))
    torch.testing.assert_close(t.grad, torch.tensor([[0.0, log_2]]))


def one_by_one(
    scoring: Scoring,
    competing: list[int],
    side: str,
    relation: Tensor,
    asking: Tensor,
    answering: Tensor,
    temperature: float,
) -> Tensor:
    """Each edge's term, every relation being scored as edges are: (n,)."""
    scores = []
    for number in competing:
        queries = scoring.queries(side, Entities(asking), torch.full_like(relation, number))
        scores.append(scoring.pairs(queries, Entities(answering)))
    targets = torch.tensor([competing.index(r) for r in relation.tolist()], dtype=torch.int64)
    return F.cross_entropy(torch.stack(scores, dim=1) / temperature, targets, reduction="none")


@pytest.mark.parametrize("side", ["lhs", "rhs"])
@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize(
    ("comparator", "kinds"),
    [
        ("dot", ["complex_diagonal"] * 3),
        ("dot", ["diagonal"] * 3),
        ("dot", ["translation"] * 3),
        ("dot", ["translation", "complex_diagonal", "identity", "diagonal", "translation"]),
        ("l2", ["translation", "identity", "translation"]),
        ("squared_l2", ["translation"] * 3),
    ],
)
def test_gradients_are_those_of_scoring_each_relation_by_autograd(
    comparator: Comparator,
    kinds: list[Operator],
    reciprocal: bool,
    side: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(one_vs_all, "BLOCK_SCORES", {"cpu": 4 * len(kinds)})  # 4, 4, 1 edges
    relations = relations_of(*kinds)
    operators = Operators(kinds * (1 + reciprocal), DIM, 0.5, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(n, DIM, generator=generator).double().requires_grad_() for n in (4, 5)]
    places = [torch.randint(n, (9,), generator=generator) for n in (4, 5)]
    relation = torch.randint(len(kinds), (9,), generator=generator).sort().values
    weight = torch.rand(9, generator=generator).double()
    leaves = [*rows, *operators.parameters()]

    scoring = Scoring(relations, operators, comparator, reciprocal=reciprocal)
    asking, answering = (own[place] for own, place in zip(rows, places, strict=True))
    competing = list(range(len(kinds)))
    each = one_by_one(scoring, competing, side, relation, asking, answering, TEMPERATURE)
    expected = SHARE * (weight * each).sum()
    gradients = torch.autograd.grad(expected, leaves)

    prediction = RelationPrediction(
        relations,
        operators,
        comparator,
        weight=SHARE,
        temperature=TEMPERATURE,
        reciprocal=reciprocal,
    )
    first, second = (Ends(own, place) for own, place in zip(rows, places, strict=True))
    for written in (True, False):
        found = prediction.loss(("e", "e"), side, relation, first, second, weight, written=written)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, leaves, materialize_grads=True), gradients
        )


def typed(relation_weight: float | None, **extra: Any) -> ModelConfig:
    """Of e-e, three relations compete, of e-f two, of f-e none."""
    table = {"num_embeddings": ROWS, "embedding_dim": DIM, "optimizer": {"sgd": {"lr": 1}}}
    joined = ["ee", "ef", "ee", "fe", "ef", "ee"]
    kinds = ["complex_diagonal", "translation", "diagonal"] * 2
    softmax = {"temperature": TEMPERATURE}
    tree = {
        "embeddings": {"tables": [{"name": "e", **table}, {"name": "f", **table}]},
        "relations": [
            {
                "name": f"{pair}{n}",
                "lhs": pair[0],
                "rhs": pair[1],
                "operator": kind,
                "weight": 1 + n,
            }
            for n, (pair, kind) in enumerate(zip(joined, kinds, strict=True))
        ],
        "loss": {"softmax": softmax | {"relation_weight": relation_weight or 0.0}},
        "init_scale": 1.0,
        "relation_init_scale": 0.5,
    }
    return ModelConfig.model_validate({**tree, **extra})


def columns() -> dict[str, Any]:
    generator = np.random.default_rng(1)
    return {name: generator.integers(ROWS, size=50) for name in ("lhs", "rel", "rhs")}


def learn(
    config: ModelConfig,
    data: DataConfig,
    passes: int = 1,
    *,
    written: bool = True,
    by_edge: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the first passes over the same edges, and its gradients."""
    tables = build_tables(table_specs(config), JOB, seed=3, as_a_whole=data.all_negatives)
    model = TwhinModel(config, tables, seed=2)
    model.writes_gradients = written
    if by_edge:  # a warm start looks rows up edge by edge
        model.anchors = Anchors(Path(), [], 0.0, freeze=False)
    before = {name: tensor.clone() for name, tensor in tables.state().items()}
    batches = [
        to_batch(columns(), EdgeLayout(config), data, np.random.default_rng(0), 50, epoch)
        for epoch in range(passes)
    ]
    value = torch.stack([model(batch, data) for batch in batches]).sum()
    value.backward()
    gradients = {name: before[name] - tensor for name, tensor in tables.state().items()}
    for name, parameter in model.relation_parameters().items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return value.detach(), gradients


def expected_term(config: ModelConfig, sides: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """What relation prediction adds to the loss of all edges, and to its gradients."""
    tables = build_tables(table_specs(config), JOB, seed=3, as_a_whole=True)
    model = TwhinModel(config, tables, seed=2)
    leaves = {
        name: tensor.detach().clone().requires_grad_() for name, tensor in tables.state().items()
    }
    edges = {name: torch.from_numpy(column) for name, column in columns().items()}
    scoring = build_scoring(config, model.operators)
    total = torch.zeros(())
    for (lhs, rhs), competing in competitors(config.relations).items():
        mine = torch.isin(edges["rel"], torch.tensor(competing))
        relation = edges["rel"][mine]
        heads = leaves[f"tables.{lhs}.weight"][edges["lhs"][mine]]
        tails = leaves[f"tables.{rhs}.weight"][edges["rhs"][mine]]
        for side in sides if config.reciprocal else ("rhs",):
            asking, answering = (tails, heads) if side == "lhs" else (heads, tails)
            each = one_by_one(scoring, competing, side, relation, asking, answering, TEMPERATURE)
            total = total + SHARE * ((1 + relation) * each).sum()
    parameters = model.relation_parameters()
    wanted = leaves | parameters
    found = torch.autograd.grad(total, list(wanted.values()), materialize_grads=True)
    return total.detach(), dict(zip(wanted, found, strict=True))


DRAWN = {"global_negatives": 4, "in_batch_negatives": 3, "chunk_size": 10}
GROUPED = {"all_negatives": True, "grouped": True}


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize(
    ("data", "passes", "how"),
    [
        ({"all_negatives": True}, 1, {}),
        ({"all_negatives": True}, 1, {"written": False}),
        (GROUPED, 2, {}),
        (GROUPED, 2, {"by_edge": True}),
        (GROUPED | {"asks": "lhs"}, 1, {}),
        ({"all_negatives": True, "asks": "rhs"}, 1, {}),
        (DRAWN, 1, {}),
        (DRAWN, 1, {"written": False}),
    ],
)
def test_every_path_adds_the_same_to_loss_and_gradients(
    data: dict[str, Any], passes: int, how: dict[str, Any], reciprocal: bool
) -> None:
    settings = DataConfig(data_root="x", **data)
    extra = {"reciprocal": reciprocal, "regularization": {"n3": 0.1}}
    off = learn(typed(None, **extra), settings, passes, **how)
    on = learn(typed(SHARE, **extra), settings, passes, **how)
    sides = ("lhs", "rhs") if settings.asks == "both" else (settings.asks,)
    term, gradients = expected_term(typed(SHARE, **extra), sides)
    torch.testing.assert_close(on[0] - off[0], term, rtol=1e-4, atol=1e-3)
    assert term > 10
    for name, gradient in gradients.items():
        difference = on[1][name] - off[1][name]
        torch.testing.assert_close(difference, gradient, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("settings", [{"all_negatives": True}, DRAWN])
def test_a_validation_counts_relations_and_no_penalty(settings: dict[str, Any]) -> None:
    data = DataConfig(data_root="x", **settings)
    found = {}
    for weight in (None, SHARE):
        config = typed(weight, regularization={"n3": 0.1})
        tables = build_tables(table_specs(config), JOB, seed=3, as_a_whole=data.all_negatives)
        batch = to_batch(columns(), EdgeLayout(config), data, np.random.default_rng(0), 50)
        with torch.no_grad():
            found[weight] = TwhinModel(config, tables, seed=2)(batch, data)
    term, _ = expected_term(typed(SHARE), ("lhs", "rhs"))
    torch.testing.assert_close(found[SHARE] - found[None], term, rtol=1e-4, atol=1e-3)


def test_without_a_weight_nothing_is_predicted() -> None:
    operators = Operators(["identity"] * 6, DIM)
    assert build_prediction(typed(None), operators) is None
    assert build_prediction(typed(SHARE), operators) is not None
    logistic = typed(None).model_dump(exclude={"loss"}) | {"loss": {"logistic": {}}}
    assert build_prediction(ModelConfig.model_validate(logistic), operators) is None


@pytest.mark.parametrize(
    ("kinds", "comparator", "said"),
    [
        (["diagonal", "linear"], "dot", "relation 'r1' has linear with dot"),
        (["affine", "linear"], "dot", "relation 'r0' has affine with dot"),
        (["translation", "diagonal"], "l2", "relation 'r1' has diagonal with l2"),
        (["identity", "translation"], "cosine", "relation 'r0' has identity with cosine"),
        (["identity", "identity"], "cosine", None),  # nothing competes
        (["translation", "identity"], "squared_l2", None),
    ],
)
def test_what_is_not_predicted_is_refused(
    kinds: list[str], comparator: str, said: str | None
) -> None:
    tree = {
        "model": {
            "embeddings": {"tables": [{"name": "e", "num_embeddings": 3, "embedding_dim": 8}]},
            "relations": [
                {"name": f"r{n}", "lhs": "e", "rhs": "e", "operator": kind}
                for n, kind in enumerate(kinds)
            ],
            "comparator": comparator,
            "loss": {"softmax": {"relation_weight": 0.1}},
        },
        "train_data": {"data_root": "x", "global_negatives": 1},
    }
    if said is None:
        build_config(TwhinConfig, tree, "test")
        return
    with pytest.raises(ConfigError, match=said) as caught:
        build_config(TwhinConfig, tree, "test")
    assert "model: loss.softmax.relation_weight: relations are predicted" in str(caught.value)


def test_a_weight_without_effect_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    def announce(relations: list[RelationConfig]) -> str:
        caplog.clear()
        operators = Operators([relation.operator for relation in relations], DIM)
        RelationPrediction(
            relations, operators, "dot", weight=1.0, temperature=1.0, reciprocal=False
        )
        return caplog.text

    caplog.set_level(logging.WARNING)
    said = "model.loss.softmax.relation_weight has no effect: no two tables are joined by several"
    assert said in announce(relations_of("translation"))
    assert said in announce(relations_of("identity", "identity"))
    other = RelationConfig(name="x", lhs="e", rhs="f", operator="diagonal")
    assert said in announce([*relations_of("diagonal"), other])
    assert not announce(relations_of("identity", "translation"))
