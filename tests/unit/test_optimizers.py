"""Schedules against numbers worked out by hand; dense optimizers against torch's formulas."""

import pytest
import torch

from tml.config import Config, ConfigError, build_config
from tml.dense_optimizer import DenseOptimizer
from tml.optimizers import (
    LearningRate,
    OptimizerConfig,
    build_dense_optimizer,
    dense_state,
    end_schedules,
    is_optimizer_state,
)


def rate(tree: dict[str, object]) -> LearningRate:
    return LearningRate.model_validate(tree)


def test_constant() -> None:
    assert rate({"constant": 0.05}).at(10**6) == 0.05


def test_piecewise_constant_changes_at_its_boundaries() -> None:
    schedule = rate(
        {
            "piecewise_constant": {
                "learning_rate_boundaries": [10, 20],
                "learning_rate_values": [1.0, 0.5, 0.1],
            }
        }
    )
    assert [schedule.at(step) for step in (0, 9, 10, 19, 20, 99)] == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]


def test_linear_ramp_to_constant() -> None:
    schedule = rate({"linear_ramp_to_constant": {"learning_rate": 0.4, "num_ramp_steps": 4}})
    assert [schedule.at(step) for step in (0, 1, 4, 100)] == pytest.approx([0.0, 0.1, 0.4, 0.4])


def test_linear_ramp_to_cosine_passes_the_middle_half_way_down() -> None:
    ramp = {
        "learning_rate": 1.0,
        "final_learning_rate": 0.2,
        "num_ramp_steps": 10,
        "final_num_steps": 30,
    }
    schedule = rate({"linear_ramp_to_cosine": ramp})
    found = [schedule.at(step) for step in (5, 10, 20, 30, 99)]
    assert found == pytest.approx([0.5, 1.0, 0.6, 0.2, 0.2])


def test_a_cosine_without_an_end_ends_with_training() -> None:
    ramp = {"learning_rate": 1.0, "final_learning_rate": 0.2, "num_ramp_steps": 10}
    open_end = OptimizerConfig.model_validate(
        {"adagrad": {}, "learning_rate": {"linear_ramp_to_cosine": ramp}}
    )
    found = [end_schedules(open_end, 30).learning_rate_at(step) for step in (5, 10, 20, 30)]
    assert found == pytest.approx([0.5, 1.0, 0.6, 0.2])
    own = OptimizerConfig.model_validate(
        {"adagrad": {}, "learning_rate": {"linear_ramp_to_cosine": {**ramp, "final_num_steps": 50}}}
    )
    assert end_schedules(own, None) == own
    path = r"^model\.learning_rate\.linear_ramp_to_cosine\.final_num_steps: .* set it, or training"
    with pytest.raises(ConfigError, match=path):
        end_schedules(open_end, None, "model")


def test_a_ramp_longer_than_training_is_shortened_to_a_tenth_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ramp = {"learning_rate": 1.0, "final_learning_rate": 0.2, "num_ramp_steps": 20}
    tree = {"adagrad": {}, "learning_rate": {"linear_ramp_to_cosine": ramp}}
    open_end = OptimizerConfig.model_validate(tree)
    short = end_schedules(open_end, 20, "model.optimizer")
    found = [short.learning_rate_at(step) for step in (0, 1, 2, 11, 20)]
    assert found == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])
    [record] = caplog.records
    assert record.getMessage() == (
        "training has 20 steps: the ramp of the learning rate is shortened to 2, a tenth: "
        "model.optimizer.learning_rate.linear_ramp_to_cosine.num_ramp_steps (was 20)"
    )
    caplog.clear()
    few = [end_schedules(open_end, steps) for steps in (1, 2)]
    assert [one.learning_rate_at(step) for one in few for step in (0, 1)] == [0.0, 1.0] * 2
    caplog.clear()
    enough = end_schedules(open_end, 21).learning_rate
    assert enough is not None
    assert enough.linear_ramp_to_cosine is not None
    assert enough.linear_ramp_to_cosine.num_ramp_steps == 20
    assert not caplog.records


def test_all_shortened_ramps_are_in_one_warning_by_their_paths(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Two(Config):
        one: OptimizerConfig
        others: list[OptimizerConfig]
        named: dict[str, OptimizerConfig]

    ramp = {"learning_rate": 1.0, "final_learning_rate": 0.2, "num_ramp_steps": 20}
    tree = {"adagrad": {}, "learning_rate": {"linear_ramp_to_cosine": ramp}}
    config = Two.model_validate({"one": tree, "others": [tree], "named": {"a": tree}})
    ended = end_schedules(config, 10)
    assert [o.learning_rate_at(1) for o in (ended.one, *ended.others, ended.named["a"])] == [
        1.0
    ] * 3
    [record] = caplog.records
    for path in ("one", "others.0", "named.a"):
        assert f" {path}.learning_rate.linear_ramp_to_cosine.num_ramp_steps (was 20)" in (
            record.getMessage()
        )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sgd": {}, "adam": {}}, "exactly one of sgd, adagrad, rowwise_adagrad, adam"),
        ({"sgd": {"lr": -1}}, "sgd.lr"),
        ({"sgd": {}, "learning_rate": {}}, "exactly one of constant"),
        (
            {
                "sgd": {},
                "learning_rate": {
                    "piecewise_constant": {
                        "learning_rate_boundaries": [1],
                        "learning_rate_values": [1],
                    }
                },
            },
            "needs 2 values for 1 boundaries, has 1",
        ),
    ],
)
def test_wrong_settings_are_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(OptimizerConfig, tree, "test")


def test_a_schedule_takes_the_place_of_the_optimizers_own_rate() -> None:
    tree = {"sgd": {"lr": 9.0}, "learning_rate": {"constant": 0.5}}
    config = OptimizerConfig.model_validate(tree)
    assert config.learning_rate_at(3) == 0.5
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = build_dense_optimizer(config, [parameter])
    parameter.grad = torch.tensor([2.0])
    optimizer.step()
    assert parameter.item() == 1.0 - 0.5 * 2.0


def test_rowwise_adagrad_is_refused_for_dense_parameters() -> None:
    config = OptimizerConfig.model_validate({"rowwise_adagrad": {}})
    with pytest.raises(ValueError, match="embedding tables"):
        build_dense_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("sgd", []),
        ("adagrad", ["a_accumulator"]),
        ("adam", ["a_m", "a_v", "a_step"]),
    ],
)
def test_an_optimizer_goes_on_from_its_saved_state(kind: str, names: list[str]) -> None:
    config = OptimizerConfig.model_validate({kind: {"lr": 0.1}})

    def start(value: torch.Tensor) -> tuple[torch.nn.Parameter, DenseOptimizer]:
        parameter = torch.nn.Parameter(value.clone())
        return parameter, build_dense_optimizer(config, [parameter])

    def step(parameter: torch.nn.Parameter, optimizer: DenseOptimizer, by: float) -> None:
        parameter.grad = torch.tensor([by, -1.0])
        optimizer.step()

    parameter, optimizer = start(torch.ones(2))
    state = dense_state(optimizer, {"a": parameter})
    assert list(state) == names
    assert all(is_optimizer_state(name) for name in names)
    step(parameter, optimizer, 3.0)
    saved = {name: tensor.clone() for name, tensor in state.items()}
    resumed, other = start(parameter.data)
    for name, tensor in dense_state(other, {"a": resumed}).items():
        tensor.copy_(saved[name])
    step(parameter, optimizer, 0.5)
    step(resumed, other, 0.5)
    assert resumed.data.equal(parameter.data)


def test_which_saved_names_are_those_of_optimizers() -> None:
    states = ("tables.user.accumulator", "tables.user.m", "tables.user.step", "translation_v")
    weights = ("tables.user.weight", "tables.m.weight", "translations", "matrices")
    assert all(is_optimizer_state(name) for name in states)
    assert not any(is_optimizer_state(name) for name in weights)
