"""Losses and probabilities: by hand, by name, and against the published fault."""

from typing import Any

import pytest
import torch

from projects.home.recap.data.batch import Features, RankingBatch
from projects.home.recap.model.config import ModelConfig
from projects.home.recap.model.model import RankingModel
from tml.config import ConfigError

DATA_TASKS = ("x", "b.like", "y", "a.reply")


def model(data_tasks: tuple[str, ...] = DATA_TASKS, **tower: Any) -> RankingModel:
    tasks = {
        name: {"mlp_config": {"layer_sizes": [3, 1]}, **tower} for name in ("a.reply", "b.like")
    }
    config = {"tasks": tasks, "featurization_config": {"log1p_abs_config": {}}}
    torch.manual_seed(0)
    features = Features(tasks=data_tasks, num_continuous=2)
    return RankingModel(ModelConfig.model_validate(config), features)


def batch(labels: Any, weights: Any = None) -> RankingBatch:
    values = torch.as_tensor(labels, dtype=torch.float32)
    rows = len(values)
    return RankingBatch(
        continuous=torch.arange(rows * 2, dtype=torch.float32).reshape(rows, 2) - 3,
        binary=torch.zeros(rows, 0),
        discrete=torch.zeros(rows, 0, dtype=torch.int64),
        labels=values,
        weights=torch.ones_like(values) if weights is None else torch.as_tensor(weights),
    )


def test_losses_are_weighted_sums_by_hand() -> None:
    module = model(pos_weight=3.0)
    # Columns of the data: x, b.like, y, a.reply.
    rows = batch([[1, 0, 1, 1], [1, 1, 1, 0]], [[9.0, 0.5, 9.0, 2.0], [9.0, 4.0, 9.0, 1.0]])
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    losses = module.losses(logits, rows)
    # a.reply: 2·3·log 2 + 1·log(1 + e²); b.like: .5·log(1 + e) + 4·3·log(1 + e).
    assert losses[0].item() == pytest.approx(6 * 0.693147 + 2.126928, abs=1e-5)
    assert losses[1].item() == pytest.approx(12.5 * 1.313262, abs=1e-4)


def test_huge_logits_give_finite_losses() -> None:
    losses = model().losses(torch.tensor([[1e4, -1e4]]), batch([[0, 1, 0, 0]]))
    assert losses.tolist() == [1e4, 1e4]


def test_the_order_of_the_datas_tasks_changes_nothing() -> None:
    labels = torch.randint(0, 2, (8, 4)).float()
    weights = torch.rand(8, 4)
    logits = torch.randn(8, 2)
    expected = model().losses(logits, batch(labels, weights))
    order = [3, 0, 2, 1]
    shuffled = model(tuple(DATA_TASKS[i] for i in order))
    found = shuffled.losses(logits, batch(labels[:, order], weights[:, order]))
    assert torch.equal(found, expected)


def test_each_tower_learns_its_own_label() -> None:
    """The published version takes labels by position: the first tower learned the first label."""
    module = model()
    labels = torch.zeros(32, 4)
    labels[:, DATA_TASKS.index("a.reply")] = 1.0
    rows = batch(labels)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(100):
        optimizer.zero_grad()
        (module.losses(module(rows), rows).mean() / 32).backward()
        optimizer.step()
    probabilities = module.probabilities(module(rows)).mean(0)
    assert probabilities[0] > 0.8
    assert probabilities[1] < 0.2


def test_a_task_that_the_data_lacks_is_refused_with_both_lists() -> None:
    with pytest.raises(
        ConfigError, match=r"no label a\.reply.*model: a\.reply, b\.like.*Labels: x, b\.like"
    ):
        model(("x", "b.like"))


def test_an_affine_map_moves_the_logit() -> None:
    rows = batch([[0, 0, 0, 0], [1, 1, 1, 1]])
    plain, mapped = model(), model(affine_map={"scale": 2.0, "bias": -1.0})
    torch.testing.assert_close(mapped(rows), 2 * plain(rows) - 1)


def test_sampling_is_undone_as_published() -> None:
    module = model()
    logits = torch.tensor([[0.5, -2.0], [-9.0, 3.0]])
    p = torch.sigmoid(logits)
    assert torch.equal(module.probabilities(logits), p)
    module.set_sampling_ratios({"b.like": 0.01 / 0.8387})
    found = module.probabilities(logits)
    r = 0.01 / 0.8387
    assert torch.equal(found[:, 0], p[:, 0])
    torch.testing.assert_close(found[:, 1], p[:, 1] * r / (1 - p[:, 1] + r * p[:, 1]))
    with pytest.raises(ValueError, match=r"'like' is no task of the model; there are a\.reply"):
        module.set_sampling_ratios({"like": 1.0})


def test_a_learned_map_is_a_line_through_its_points_and_is_saved() -> None:
    module = model()
    module.set_calibration(
        "a.reply", torch.tensor([0.1, 0.3, 0.3, 0.9]), torch.tensor([0.0, 0.2, 0.4, 1.0])
    )
    p = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.6, 0.95])
    logits = torch.logit(p)[:, None].expand(6, 2)
    expected = torch.tensor([0.0, 0.0, 0.1, 0.4, 0.7, 1.0])
    again = model()
    again.load_state_dict(module.state_dict())
    for one in (module, again):
        found = one.probabilities(logits)
        # .3 is a step: rounding decides the side.
        assert found[3, 0].item() == pytest.approx(0.3, abs=0.1001)
        keep = [0, 1, 2, 4, 5]
        torch.testing.assert_close(found[keep, 0], expected[keep], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[:, 1], p)
    again.reset_calibration()
    torch.testing.assert_close(again.probabilities(logits)[:, 0], p)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0.2, 0.1], [0.0, 1.0], "must not fall"),
        ([0.1, 0.2], [0.0, 1.5], "must lie in 0"),
        ([0.1], [0.0, 1.0], "one length"),
        ([0.5] * 257, [0.5] * 257, "from 1 to 256"),
    ],
)
def test_a_map_that_is_none_is_refused(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().set_calibration("a.reply", torch.tensor(x), torch.tensor(y))
