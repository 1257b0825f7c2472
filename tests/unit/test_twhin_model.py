"""TwHIN's loss and update against a reference that goes edge by edge, and against each published
fault.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from projects.twhin import gradients, translated
from projects.twhin.config import DataConfig, ModelConfig
from projects.twhin.data import EdgeBatch, EdgeLayout, to_batch
from projects.twhin.model import (
    TwhinModel,
    Vectors,
    build_operators,
    build_scoring,
    has_written_gradients,
    seed_dropout,
    table_specs,
)
from tml.distributed import Job
from tml.embeddings import ArrayRows, Tables, build_tables

JOB = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
DIM = 4


def model_config(loss: str = "logistic", optimizer: str = "sgd", **extra: Any) -> ModelConfig:
    tables = [
        {
            "name": name,
            "num_embeddings": rows,
            "embedding_dim": DIM,
            "optimizer": {optimizer: {"lr": lr}},
        }
        for name, rows, lr in (("user", 30, 0.5), ("user_eng", 20, 0.125), ("tweet", 25, 0.25))
    ]
    relations = [
        {"name": "fav", "lhs": "user", "rhs": "tweet"},
        {"name": "eng", "lhs": "user_eng", "rhs": "tweet"},
        {"name": "reply", "lhs": "user", "rhs": "tweet"},
        {"name": "same", "lhs": "user", "rhs": "tweet", "operator": "identity"},
    ]
    return ModelConfig.model_validate(
        {
            "embeddings": {"tables": tables},
            "relations": relations,
            "loss": {loss: {}},
            "translation_optimizer": {"sgd": {"lr": 0.5}},
            "init_scale": 1.0,
            **extra,
        }
    )


def build(config: ModelConfig) -> tuple[TwhinModel, Tables]:
    tables = build_tables(table_specs(config), JOB, seed=3)
    model = TwhinModel(config, tables)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.translations.normal_(generator=generator)
    return model, tables


def make_batch(config: ModelConfig, data: DataConfig, n: int = 90) -> EdgeBatch:
    generator = np.random.default_rng(0)
    rel = generator.integers(4, size=n)
    layout = EdgeLayout(config)
    lhs = generator.integers(8, size=n)
    rhs = generator.integers(6, size=n)
    return to_batch({"lhs": lhs, "rel": rel, "rhs": rhs}, layout, data, generator, n)


def weights(tables: Tables) -> dict[str, Tensor]:
    state = tables.state()
    return {s.name: state[f"tables.{s.name}.weight"].clone() for s in tables.specs}


def reference_loss(
    config: ModelConfig,
    data: DataConfig,
    batch: EdgeBatch,
    w: dict[str, Tensor],
    translations: Tensor,
) -> Tensor:
    """The loss edge by edge from the papers' formulas: no chunks, no matrix products, no
    broadcasting.
    """
    total = torch.zeros(())
    for group in batch.groups:
        left, right = w[group.lhs_table], w[group.rhs_table]
        edges = [
            (int(s), int(r), int(t))
            for s, r, t in zip(group.lhs, group.relation, group.rhs, strict=True)
        ]

        def score(s: int, r: int, t: int, left: Tensor = left, right: Tensor = right) -> Tensor:
            translated = left[s]
            if config.relations[r].operator == "translation":
                translated = translated + translations[r]
            return (translated * right[t]).sum()

        size = data.in_batch_negatives + 1
        for i, (s, r, t) in enumerate(edges):
            heads = [int(x) for x in group.lhs_negatives[i // data.chunk_size] if int(x) != s]
            tails = [int(x) for x in group.rhs_negatives[i // data.chunk_size] if int(x) != t]
            if data.in_batch_negatives:
                chunk = edges[i // size * size : (i // size + 1) * size]
                heads += [s2 for s2, r2, _ in chunk if r2 == r and (s2, r, t) not in chunk]
                tails += [t2 for _, r2, t2 in chunk if r2 == r and (s, r, t2) not in chunk]
            positive = score(s, r, t)
            head_scores = [score(s2, r, t) for s2 in heads]
            tail_scores = [score(s, r, t2) for t2 in tails]
            if config.loss.softmax is not None:
                for negatives in (head_scores, tail_scores):
                    together = torch.stack([positive, *negatives])
                    total = total - torch.log_softmax(together, 0)[0]
            else:
                total = total - torch.nn.functional.logsigmoid(positive)
                for negative in head_scores + tail_scores:
                    total = total - torch.nn.functional.logsigmoid(-negative)
    return total


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
@pytest.mark.parametrize(
    ("in_batch", "global_", "chunk"), [(0, 5, 7), (6, 0, 7), (6, 5, 7), (200, 5, 100)]
)
def test_loss_and_sgd_update_equal_the_reference(
    loss: str, in_batch: int, global_: int, chunk: int
) -> None:
    config = model_config(loss)
    data = DataConfig(
        data_root="x", in_batch_negatives=in_batch, global_negatives=global_, chunk_size=chunk
    )
    model, tables = build(config)
    batch = make_batch(config, data)
    before = {name: w.requires_grad_() for name, w in weights(tables).items()}
    theta = model.translations.detach().clone().requires_grad_()
    expected = reference_loss(config, data, batch, before, theta)
    expected.backward()

    found = model(batch, data)
    found.backward()

    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert theta.grad is not None
    assert model.translations.grad is not None
    torch.testing.assert_close(model.translations.grad, theta.grad, rtol=1e-4, atol=1e-5)
    for spec in tables.specs:
        w = before[spec.name]
        assert w.grad is not None
        updated = w.detach() - spec.optimizer.settings.lr * w.grad
        now = weights(tables)[spec.name]
        torch.testing.assert_close(now, updated, rtol=1e-4, atol=1e-4)


def test_rowwise_adagrad_update_by_hand() -> None:
    config = model_config(optimizer="rowwise_adagrad")
    data = DataConfig(data_root="x", in_batch_negatives=0, global_negatives=5, chunk_size=7)
    model, tables = build(config)
    before = {name: w.requires_grad_() for name, w in weights(tables).items()}
    batch = make_batch(config, data)
    reference_loss(config, data, batch, before, model.translations.detach()).backward()
    model(batch, data).backward()
    for spec in tables.specs:
        w = before[spec.name]
        assert w.grad is not None
        accumulator = w.grad.pow(2).mean(dim=1, keepdim=True)  # one number a row
        step = spec.optimizer.settings.lr * w.grad / (accumulator.sqrt() + 1e-8)
        torch.testing.assert_close(
            weights(tables)[spec.name], (w - step).detach(), rtol=1e-3, atol=1e-4
        )
        saved = tables.state()[f"tables.{spec.name}.accumulator"]
        torch.testing.assert_close(saved.flatten(), accumulator.flatten(), rtol=1e-3, atol=1e-6)


def one_edge(
    config: ModelConfig, relation: int, s: int, t: int, head: int, tail: int
) -> tuple[EdgeBatch, DataConfig]:
    """A batch of one edge with one given negative a side."""
    data = DataConfig(data_root="x", global_negatives=1)
    columns = {"lhs": np.array([s]), "rel": np.array([relation]), "rhs": np.array([t])}
    batch = to_batch(columns, EdgeLayout(config), data, np.random.default_rng(0), 1)
    batch.groups[0].lhs_negatives[:] = head
    batch.groups[0].rhs_negatives[:] = tail
    return batch, data


def test_one_edge_by_hand_translation_on_the_left_of_positive_and_negatives() -> None:
    config = model_config()
    model, tables = build(config)
    batch, data = one_edge(config, 2, s=1, t=2, head=3, tail=4)
    w, theta = weights(tables), model.translations.detach()[2]
    user, tweet = w["user"], w["tweet"]
    positive = (user[1] + theta) @ tweet[2]
    corrupted_head = (user[3] + theta) @ tweet[2]
    corrupted_tail = (user[1] + theta) @ tweet[4]
    expected = (
        -torch.log(torch.sigmoid(positive))
        - torch.log(torch.sigmoid(-corrupted_head))
        - torch.log(torch.sigmoid(-corrupted_tail))
    )
    torch.testing.assert_close(model(batch, data).detach(), expected, rtol=1e-5, atol=1e-6)


def test_relation_vectors_learn_and_identity_has_none() -> None:
    config = model_config()
    model, _ = build(config)
    for relation, learns in ((0, True), (3, False)):
        model.translations.grad = None
        batch, data = one_edge(config, relation, s=1, t=2, head=3, tail=4)
        model(batch, data).backward()
        assert model.translations.grad is not None
        assert bool(model.translations.grad[relation].any()) == learns


def test_a_table_whose_name_begins_like_another_keeps_its_own_rate_and_rows() -> None:
    config = model_config()
    model, tables = build(config)
    before = weights(tables)
    batch, data = one_edge(config, 1, s=1, t=2, head=3, tail=4)
    assert tables.set_learning_rates(0) == {"user": 0.5, "user_eng": 0.125, "tweet": 0.25}
    model(batch, data).backward()
    after = weights(tables)
    assert after["user"].equal(before["user"])
    assert not after["user_eng"].equal(before["user_eng"])


def test_accidental_hits_are_no_negatives() -> None:
    config = model_config()
    model, tables = build(config)
    batch, data = one_edge(config, 0, s=1, t=2, head=1, tail=2)
    w, theta = weights(tables), model.translations.detach()[0]
    positive = (w["user"][1] + theta) @ w["tweet"][2]
    expected = -torch.log(torch.sigmoid(positive))
    torch.testing.assert_close(model(batch, data).detach(), expected, rtol=1e-5, atol=1e-6)


def test_true_pairs_of_the_batch_are_no_in_batch_negatives() -> None:
    # Of the pairs of heads 1, 5 and tails 2, 3 only (5, 3) is not an edge: head 5 is a negative for
    # (1, 3), tail 3
    # for (5, 2), and that is all.
    config = model_config()
    model, tables = build(config)
    data = DataConfig(data_root="x", in_batch_negatives=10)
    columns = {"lhs": np.array([1, 1, 5]), "rel": np.array([0, 0, 0]), "rhs": np.array([2, 3, 2])}
    batch = to_batch(columns, EdgeLayout(config), data, np.random.default_rng(0), 3)
    w, theta = weights(tables), model.translations.detach()[0]

    def score(s: int, t: int) -> Tensor:
        return (w["user"][s] + theta) @ w["tweet"][t]

    positives = [score(1, 2), score(1, 3), score(5, 2)]
    softplus = torch.nn.functional.softplus
    expected = softplus(-torch.stack(positives)).sum() + 2 * softplus(score(5, 3))
    torch.testing.assert_close(model(batch, data).detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_batch_without_edges_is_a_loss_of_zero_that_can_go_backward() -> None:
    config = model_config()
    model, tables = build(config)
    before = weights(tables)
    data = DataConfig(data_root="x", in_batch_negatives=3, global_negatives=3)
    empty = {name: np.empty(0, dtype=np.int64) for name in ("lhs", "rel", "rhs")}
    batch = to_batch(empty, EdgeLayout(config), data, np.random.default_rng(0), 8)
    loss = model(batch, data)
    loss.backward()
    assert loss.item() == 0.0
    assert all(now.equal(before[name]) for name, now in weights(tables).items())


def test_a_lookup_without_gradients_updates_nothing() -> None:
    config = model_config()
    model, tables = build(config)
    before = weights(tables)
    data = DataConfig(data_root="x", global_negatives=3)
    with torch.no_grad():
        model(make_batch(config, data), data)
    assert all(now.equal(before[name]) for name, now in weights(tables).items())


def test_bfloat16_scores_are_close_and_gradients_reach_the_tables() -> None:
    config = model_config()
    data = DataConfig(data_root="x", global_negatives=5, chunk_size=7)
    batch = make_batch(config, data)
    model, tables = build(config)
    exact = model(batch, data).item()
    model._amp = True
    before = weights(tables)
    rounded = model(batch, data)
    rounded.backward()
    assert rounded.item() == pytest.approx(exact, rel=0.02)
    assert rounded.item() != exact
    assert not weights(tables)["user"].equal(before["user"])


def test_vectors_score_like_the_model() -> None:
    config = model_config()
    model, tables = build(config)
    theta = model.translations.detach()
    vectors = Vectors(config, weights(tables), model.operators)
    user, tweet = vectors.tables["user"], vectors.tables["tweet"]
    tails = vectors.score(0, "rhs", torch.tensor([4, 9]))
    torch.testing.assert_close(tails[1, 7], (user[9] + theta[0]) @ tweet[7])
    heads = vectors.score(0, "lhs", torch.tensor([7]))
    full = (user + theta[0]) @ tweet[7]
    torch.testing.assert_close(heads[0], full, rtol=1e-4, atol=1e-4)
    same = vectors.score(3, "rhs", torch.tensor([4]))
    torch.testing.assert_close(same[0, 7], user[4] @ tweet[7])


def test_initial_rows_depend_on_seed_table_and_row_alone() -> None:
    from tml.embeddings import INIT_BLOCK_ROWS, NormalRows

    (spec, *_) = table_specs(model_config())
    spec = type(spec)("big", INIT_BLOCK_ROWS + 100, 2, "fp32", spec.optimizer, 0.5)
    rows = NormalRows(1, 0, spec)
    whole = rows(0, spec.num_rows)
    assert whole.shape == (spec.num_rows, 2)
    seam = rows(INIT_BLOCK_ROWS - 3, INIT_BLOCK_ROWS + 4)
    assert seam.equal(whole[INIT_BLOCK_ROWS - 3 : INIT_BLOCK_ROWS + 4])
    assert whole.std().item() == pytest.approx(0.5, rel=0.02)
    assert not NormalRows(1, 1, spec)(0, 9).equal(whole[:9])
    assert ArrayRows(whole)(2, 4).equal(whole[2:4])


def test_half_precision_tables_hold_halves_and_learn() -> None:
    config = model_config()
    tree = config.model_dump()
    for table in tree["embeddings"]["tables"]:
        table["data_type"] = "fp16"
    model, tables = build(ModelConfig.model_validate(tree))
    batch, data = one_edge(config, 0, s=1, t=2, head=3, tail=4)
    before = weights(tables)
    assert before["user"].dtype == torch.float16
    model(batch, data).backward()
    assert not weights(tables)["user"].equal(before["user"])


def test_weight_decay_on_a_table_is_refused_rather_than_ignored() -> None:
    tree = model_config().model_dump()
    tree["embeddings"]["tables"][0]["optimizer"] = {"sgd": {"lr": 0.1, "weight_decay": 0.5}}
    with pytest.raises(ValueError, match=r"'user': weight_decay 0\.5 would be ignored"):
        build(ModelConfig.model_validate(tree))


def full_config(operator: str, loss: dict[str, Any], **extra: Any) -> ModelConfig:
    """One table, two relations with every option that a score or loss can have."""
    tables = [
        {
            "name": "e",
            "num_embeddings": 9,
            "embedding_dim": 8,
            "optimizer": {"sgd": {"lr": 1.0}},
        }
    ]
    relations = [
        {"name": "a", "lhs": "e", "rhs": "e", "operator": operator, "weight": 0.5},
        {"name": "b", "lhs": "e", "rhs": "e", "operator": operator},
    ]
    return ModelConfig.model_validate(
        {
            "embeddings": {"tables": tables},
            "relations": relations,
            "loss": loss,
            "init_scale": 1.0,
            "relation_init_scale": 0.5,
            **extra,
        }
    )


def full_batch(config: ModelConfig, data: DataConfig, n: int = 7) -> EdgeBatch:
    generator = np.random.default_rng(1)
    columns = {"lhs": generator.integers(9, size=n), "rhs": generator.integers(9, size=n)}
    columns["rel"] = generator.integers(2, size=n)
    return to_batch(columns, EdgeLayout(config), data, generator, n)


def expected_loss(
    config: ModelConfig, batch: EdgeBatch, w: Tensor, b: Tensor, c: Tensor, *, everyone: bool
) -> Tensor:
    """Edge by edge, complex_diagonal: w (N, D), biases b (N,), c (R or 2R, D)."""

    def to_complex(x: Tensor) -> Tensor:
        return torch.complex(x[..., :4], x[..., 4:])

    def score(start: int, row: int, end: int) -> Tensor:
        moved = to_complex(w[start]) * to_complex(c[row])
        return (moved * to_complex(w[end]).conj()).real.sum() + b[start] + b[end]

    (group,) = batch.groups
    total = torch.zeros(())
    for i, (s, r, t) in enumerate(
        zip(group.lhs.tolist(), group.relation.tolist(), group.rhs.tolist(), strict=True)
    ):
        heads = range(9) if everyone else group.lhs_negatives[i // 3].tolist()
        tails = range(9) if everyone else group.rhs_negatives[i // 3].tolist()
        head_scores = {}
        if config.reciprocal:
            positives = (score(t, r + 2, s), score(s, r, t))
            head_scores = [score(t, r + 2, h) for h in heads if h != s]
        else:
            positives = (score(s, r, t), score(s, r, t))
            head_scores = [score(h, r, t) for h in heads if h != s]
        sides = (head_scores, [score(s, r, e) for e in tails if e != t])
        weight = config.relations[r].weight
        for positive, negatives in zip(positives, sides, strict=True):
            together = torch.stack([positive, *negatives])
            if (softmax := config.loss.softmax) is not None:
                loss = -torch.log_softmax(together / softmax.temperature, 0)[0]
            elif (ranking := config.loss.margin_ranking) is not None:
                loss = torch.relu(ranking.margin - positive + together[1:]).sum()
            else:
                half = 1.0 if config.reciprocal else 0.5  # of one positive term for both sides
                loss = half * torch.nn.functional.softplus(-positive)
                loss = loss + torch.nn.functional.softplus(together[1:]).sum()
            total = total + weight * loss
        directions = (r, r + 2) if config.reciprocal else (r,)
        for row in directions:
            for x in (w[s], c[row], w[t]):
                total = total + config.regularization.l2 * x.square().sum()
                total = total + config.regularization.n3 * to_complex(x).abs().pow(3).sum()
    return total


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize(
    "loss", [{"softmax": {"temperature": 0.5}}, {"logistic": {}}, {"margin_ranking": {"margin": 2}}]
)
def test_loss_penalties_biases_and_weights_together_equal_the_formula_and_its_update(
    loss: dict[str, Any], reciprocal: bool, everyone: bool
) -> None:
    config = full_config(
        "complex_diagonal",
        loss,
        reciprocal=reciprocal,
        biases=True,
        regularization={"l2": 0.1, "n3": 0.2},
    )
    data = DataConfig(
        data_root="x", global_negatives=0 if everyone else 4, all_negatives=everyone, chunk_size=3
    )
    tables = build_tables(table_specs(config), JOB, seed=3, as_a_whole=everyone)
    tables.fill("e.bias", ArrayRows(torch.randn(9, 4, generator=torch.Generator().manual_seed(1))))
    model = TwhinModel(config, tables, seed=2)
    batch = full_batch(config, data)
    before = weights(tables)
    w, biases = before["e"].requires_grad_(), before["e.bias"][:, 0].clone().requires_grad_()
    (parameter,) = model.relation_parameters().values()
    c = parameter.detach().clone().requires_grad_()
    expected = expected_loss(config, batch, w, biases, c, everyone=everyone)
    found = model(batch, data)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)

    expected.backward()
    found.backward()
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, c.grad, rtol=1e-4, atol=1e-4)
    for name, one in (("e", w), ("e.bias", biases)):
        assert one.grad is not None
        now = weights(tables)[name] if name == "e" else weights(tables)[name][:, 0]
        torch.testing.assert_close(now, (one - one.grad).detach(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # what is validated is the objective without its penalties
        bare = config.model_copy(update={"regularization": type(config.regularization)()})
        now = weights(tables)
        rest = expected_loss(
            bare, batch, now["e"], now["e.bias"][:, 0], parameter, everyone=everyone
        )
        assert model(batch, data).item() == pytest.approx(rest.item(), rel=1e-4)


@pytest.mark.parametrize("operator", ["identity", "translation", "diagonal", "linear", "affine"])
def test_penalties_of_real_operators(operator: str) -> None:
    names = ["l2", "n3"]
    config = full_config(
        operator, {"softmax": {}}, regularization=dict.fromkeys(names, 0.5), reciprocal=True
    )
    data = DataConfig(data_root="x", global_negatives=2)
    tables = build_tables(table_specs(config), JOB, seed=3)
    model = TwhinModel(config, tables, seed=2)
    batch = full_batch(config, data)
    w = weights(tables)["e"]
    with torch.no_grad():
        bare = model(batch, data).item()
    (group,) = batch.groups
    expected = 0.0
    for s, r, t in zip(group.lhs, group.relation, group.rhs, strict=True):
        for row in (int(r), int(r) + 2):
            vectors = [w[s], w[t]]
            if operator != "identity":
                vectors += [p.detach()[row] for p in model.relation_parameters().values()]
            for x in vectors:
                expected += 0.5 * (x.square().sum() + x.abs().pow(3).sum()).item()
    assert model(batch, data).item() - bare == pytest.approx(expected, rel=1e-4)


def test_dropout_depends_on_seed_step_and_rank_and_is_off_without_gradients() -> None:
    config = model_config(embedding_dropout=0.5)
    data = DataConfig(data_root="x", global_negatives=5, chunk_size=7)
    batch = make_batch(config, data)
    model, _ = build(config)
    other = Job(rank=1, world_size=2, local_world_size=2, device=torch.device("cpu"))
    found = []
    for seed, step, job in ((1, 5, JOB), (1, 5, JOB), (1, 6, JOB), (2, 5, JOB), (1, 5, other)):
        seed_dropout(seed, step, job)
        found.append(model(batch, data).item())
    assert found[0] == found[1]
    assert len(set(found)) == 4
    with torch.no_grad():
        kept = model(batch, data).item()
        assert model(batch, data).item() == kept
    assert kept not in found


def test_dropout_keeps_the_mean() -> None:
    config = full_config("identity", {"softmax": {}}, embedding_dropout=0.25)
    tables = build_tables(table_specs(config), JOB, seed=3)
    tables.fill("e", ArrayRows(torch.ones(9, 8)))
    model = TwhinModel(config, tables)
    data = DataConfig(data_root="x", global_negatives=500)
    rows = model._dropped_out(model._look_up(full_batch(config, data)))["e"]
    assert rows.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert rows.mean().item() == pytest.approx(1.0, abs=0.05)


def test_adam_learns_in_one_process() -> None:
    config = model_config(optimizer="adam")
    model, tables = build(config)
    data = DataConfig(data_root="x", global_negatives=5, chunk_size=7)
    batch = make_batch(config, data)
    first = model(batch, data)
    first.backward()
    assert model(batch, data).item() < first.item()
    assert tables.state()["tables.user.step"].item() == 1


@pytest.mark.parametrize(
    "operator", ["identity", "translation", "diagonal", "linear", "affine", "complex_diagonal"]
)
@pytest.mark.parametrize("comparator", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_what_is_evaluated_scores_as_what_is_trained(
    operator: str, comparator: str, reciprocal: bool
) -> None:
    config = full_config(
        operator, {"softmax": {}}, comparator=comparator, reciprocal=reciprocal, biases=True
    )
    data = DataConfig(data_root="x", all_negatives=True)
    tables = build_tables(table_specs(config), JOB, seed=3, as_a_whole=True)
    tables.fill("e.bias", ArrayRows(torch.randn(9, 4, generator=torch.Generator().manual_seed(1))))
    model = TwhinModel(config, tables, seed=2)
    batch = full_batch(config, data)
    saved = {**tables.state(), **model.relation_parameters()}
    vectors = Vectors.from_saved(config, saved)
    (group,) = batch.groups
    expected = 0.0
    for s, r, t in zip(group.lhs, group.relation, group.rhs, strict=True):
        weight = config.relations[int(r)].weight
        for side, asking, true in (("lhs", t, s), ("rhs", s, t)):
            scores = vectors.score(int(r), side, asking.view(1))
            assert scores.shape == (1, 9)
            expected -= weight * torch.log_softmax(scores[0], 0)[true].item()
    # Where an entity is compared with itself, rounding shows in the distance of 0.
    assert model(batch, data).item() == pytest.approx(expected, rel=1e-4)


def test_half_precision_that_overflows_ends_as_a_loss_that_is_no_number() -> None:
    tree = model_config().model_dump()
    for table in tree["embeddings"]["tables"]:
        table |= {"data_type": "fp16", "optimizer": {"sgd": {"lr": 1e9}}}
    model, tables = build(ModelConfig.model_validate(tree))
    data = DataConfig(data_root="x", global_negatives=5)
    batch = make_batch(model._config, data)
    model(batch, data).backward()
    assert not torch.isfinite(weights(tables)["user"]).all()
    # tml.train refuses to go on, or to save, with such a loss: DivergedError.
    assert not torch.isfinite(model(batch, data))


def gradients_both_ways(
    config: ModelConfig, data: DataConfig, n: int = 11
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of all tables and parameters: written out, and by autograd."""
    batch = full_batch(config, data, n=n)
    found = []
    for written in (True, False):
        tables = build_tables(table_specs(config), JOB, seed=3, as_a_whole=True)
        if config.biases:
            start = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
            tables.fill("e.bias", ArrayRows(start))
        model = TwhinModel(config, tables, seed=2)
        model.writes_gradients = written
        before = weights(tables)
        value = model(batch, data)
        (value * 0.5).backward()
        gradients = {name: before[name] - after for name, after in weights(tables).items()}
        for name, parameter in model.relation_parameters().items():
            assert parameter.grad is not None
            gradients[name] = parameter.grad
        found.append((value.detach(), gradients))
        with torch.no_grad():
            model(batch, data)
    return found


def assert_equal_both_ways(found: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
    (value, written_out), (expected, by_autograd) = found
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in by_autograd.items():
        torch.testing.assert_close(written_out[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("comparator", ["dot", "cosine", "l2", "squared_l2"])
@pytest.mark.parametrize(
    "loss", [{"softmax": {"temperature": 0.5}}, {"logistic": {}}, {"margin_ranking": {"margin": 1}}]
)
@pytest.mark.parametrize(("drawn", "in_batch"), [(4, 0), (0, 3), (4, 3)])
def test_written_gradients_of_sampled_negatives_are_those_of_autograd(
    comparator: str, loss: dict[str, Any], drawn: int, in_batch: int
) -> None:
    operator = "identity" if comparator == "cosine" else "translation"
    config = full_config(operator, loss, comparator=comparator, biases=True)
    data = DataConfig(
        data_root="x", global_negatives=drawn, in_batch_negatives=in_batch, chunk_size=3
    )
    scoring = build_scoring(config, build_operators(config))
    assert has_written_gradients(config.loss, scoring, data)
    assert_equal_both_ways(gradients_both_ways(config, data))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize(
    "operator", ["identity", "translation", "diagonal", "affine", "complex_diagonal"]
)
@pytest.mark.parametrize(
    ("loss", "everyone"),
    [
        ({"softmax": {"temperature": 0.5}}, True),
        ({"softmax": {"temperature": 0.5, "log_q": True}}, False),
        ({"logistic": {}}, True),
        ({"logistic": {}}, False),
    ],
    ids=["softmax-all", "softmax-drawn", "logistic-all", "logistic-drawn"],
)
def test_written_gradients_are_those_of_autograd(
    loss: dict[str, Any], everyone: bool, operator: str, reciprocal: bool, biases: bool
) -> None:
    config = full_config(operator, loss, reciprocal=reciprocal, biases=biases)
    data = DataConfig(
        data_root="x", global_negatives=0 if everyone else 4, all_negatives=everyone, chunk_size=3
    )
    assert_equal_both_ways(gradients_both_ways(config, data))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "loss", [{"softmax": {"temperature": 0.5}}, {"margin_ranking": {"margin": 1}}]
)
@pytest.mark.parametrize(("drawn", "in_batch"), [(4, 0), (4, 3)])
def test_both_sides_of_translated_edges_have_the_gradients_of_autograd(
    loss: dict[str, Any],
    drawn: int,
    in_batch: int,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = []
    kept = translated.translated_loss
    monkeypatch.setattr(
        translated, "translated_loss", lambda *given: done.append(1) or kept(*given)
    )
    if not compiled:  # as where there is no C compiler
        for module in (gradients, translated):
            monkeypatch.setattr(module, "load_kernels", lambda: None)
    config = full_config("translation", loss)
    data = DataConfig(
        data_root="x", global_negatives=drawn, in_batch_negatives=in_batch, chunk_size=3
    )
    for n in (11, 1):
        assert_equal_both_ways(gradients_both_ways(config, data, n))
    assert bool(done) == compiled


def test_written_gradients_of_huge_scores_stay_finite() -> None:
    config = full_config("identity", {"softmax": {}}, init_scale=1e4)
    tables = build_tables(table_specs(config), JOB, seed=3)
    model = TwhinModel(config, tables)
    data = DataConfig(data_root="x", global_negatives=4, chunk_size=3)
    value = model(full_batch(config, data), data)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(weights(tables)["e"]).all()


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_bfloat16_gradients_are_close_to_those_of_float32(written: bool, everyone: bool) -> None:
    config = full_config("complex_diagonal", {"softmax": {}}, reciprocal=True)
    data = DataConfig(
        data_root="x", global_negatives=0 if everyone else 4, all_negatives=everyone, chunk_size=3
    )
    batch = full_batch(config, data)
    updates = []
    for amp in (False, True):
        tables = build_tables(table_specs(config), JOB, seed=3, as_a_whole=True)
        model = TwhinModel(config, tables, seed=2, amp=amp)
        model.writes_gradients = written
        before = weights(tables)["e"]
        model(batch, data).backward()
        updates.append(before - weights(tables)["e"])
    exact, rounded = updates
    assert not rounded.equal(exact)
    assert (rounded - exact).norm() < 0.02 * exact.norm()
