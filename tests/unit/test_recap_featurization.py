"""How features become inputs: against numbers worked out in numpy, and with bad values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from projects.home.recap.data.batch import Features, RankingBatch
from projects.home.recap.model.config import FeaturizationConfig, LayerNormConfig
from projects.home.recap.model.featurization import Featurization
from projects.home.recap.model.layers import LayerNorm
from tml.config import ConfigError
from tml.data.parquet import DataError

FEATURES = Features(tasks=("a",), num_continuous=3, num_binary=2, vectors={"twhin": 4})


def batch(continuous: Any, binary: Any = None, twhin: Any = None) -> RankingBatch:
    values = torch.tensor(continuous, dtype=torch.float32)
    rows = len(values)
    return RankingBatch(
        continuous=values,
        binary=torch.zeros(rows, 2) if binary is None else torch.tensor(binary),
        discrete=torch.zeros(rows, 0, dtype=torch.int64),
        labels=torch.zeros(rows, 1),
        weights=torch.ones(rows, 1),
        vectors={"twhin": torch.zeros(rows, 4) if twhin is None else torch.tensor(twhin)},
    )


def featurization(**config: Any) -> Featurization:
    return Featurization(FeaturizationConfig.model_validate(config), FEATURES)


def signed_log(x: Any) -> Any:
    return np.sign(x) * np.log1p(np.abs(x))


X = [[1.0, -20.0, 0.5], [3.0, 4.0, -0.5], [0.0, 100.0, 7.0], [-2.0, 1.0, 0.0]]


def test_double_norm_log_is_the_published_order_of_steps() -> None:
    torch.manual_seed(0)
    module = featurization(
        double_norm_log_config={"clip_magnitude": 1.2, "layer_norm_config": {"epsilon": 0.0}}
    )
    binary = np.array([[0, 1], [1, 1], [0, 0], [1, 0]], np.float32)
    twhin = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    norm: Any = module.batch_norm
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    first, vector = module(batch(X, binary, twhin), None)
    logs = signed_log(np.array(X))
    normed = (logs - logs.mean(0)) / np.sqrt(logs.var(0) + 1e-5)
    scaled = np.clip(normed * [0.5, 1.0, 2.0] + [0.1, 0.2, 0.3], -1.2, 1.2)
    assert (np.abs(scaled) == 1.2).any()  # the clip is at work
    row = np.concatenate([scaled, binary], axis=1)
    expected = (row - row.mean(1, keepdims=True)) / row.std(1, keepdims=True)
    np.testing.assert_allclose(first.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    expected = (twhin - twhin.mean(1, keepdims=True)) / twhin.std(1, keepdims=True)
    np.testing.assert_allclose(vector.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_move_once_an_update_as_torch_moves_them() -> None:
    module = featurization(double_norm_log_config={"batch_norm_config": {"momentum": 0.25}})
    rows = batch(X)
    statistics = module.statistics(rows)
    for part in rows.split(2):
        module(part, statistics)
    reference = torch.nn.BatchNorm1d(3, momentum=0.25)
    reference(torch.tensor(signed_log(np.array(X)), dtype=torch.float32))
    norm: Any = module.batch_norm
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)


def test_in_eval_mode_the_running_statistics_are_used_and_left_alone() -> None:
    module = featurization(double_norm_log_config={"layer_norm_config": None})
    norm: Any = module.batch_norm
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(4.0)
    module.eval()
    assert module.statistics(batch(X)) is None
    first, _ = module(batch(X), None)
    expected = np.clip((signed_log(np.array(X)) - 0.5) / np.sqrt(4 + 1e-5), -5, 5)
    np.testing.assert_allclose(first.detach().numpy()[:, :3], expected, rtol=1e-5, atol=1e-6)
    assert (norm.running_mean == 0.5).all()


def test_the_other_featurisations(tmp_path: Path) -> None:
    x = np.array(X)
    np.testing.assert_allclose(
        featurization(log1p_abs_config={})(batch(X), None)[0][:, :3], signed_log(x), rtol=1e-6
    )
    clipped = featurization(clip_log1p_abs_config={"clip_magnitude": 2.5})(batch(X), None)[0]
    np.testing.assert_allclose(clipped[:, :3], signed_log(np.clip(x, -2.5, 2.5)), rtol=1e-6)
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"mean": [1.0, 0.0, -1.0], "std": [2.0, 0.5, 0.0]}))
    config = {"statistics_path": str(path), "clip_magnitude": 3.0}
    scored = featurization(z_score_log_config=config)(batch(X), None)[0]
    expected = np.clip((signed_log(x) - [1.0, 0.0, -1.0]) / [2.0, 0.5, 1.0], -3, 3)
    np.testing.assert_allclose(scored[:, :3], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["{", '{"mean": [0]}', '{"mean": [0, 0], "std": [1, 1]}'])
def test_statistics_of_another_shape_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"statistics\.json"):
        featurization(z_score_log_config={"statistics_path": str(path)})


@pytest.mark.parametrize("kind", ["double_norm_log_config", "log1p_abs_config"])
def test_nan_and_infinity_count_as_zero(kind: str) -> None:
    bad = [[float("nan"), float("inf"), -float("inf")], *X]
    zero = [[0.0, 0.0, 0.0], *X]
    vector = np.ones((5, 4), np.float32) * np.arange(4, dtype=np.float32)
    broken = vector.copy()
    broken[0] = [np.nan, 1, np.inf, 3]
    vector[0] = [0, 1, 0, 3]
    binary = np.zeros((5, 2), np.float32)
    module = featurization(**{kind: {}})
    found = torch.cat(module(batch(bad, binary, broken), None), dim=1)
    expected = torch.cat(module(batch(zero, binary, vector), None), dim=1)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_a_constant_row_under_layer_norm_gives_the_shift_and_no_gradient(value: float) -> None:
    norm = LayerNorm(LayerNormConfig(epsilon=0.0), 7)
    with torch.no_grad():
        norm.bias.copy_(torch.arange(7.0))  # type: ignore[union-attr]
    torch.manual_seed(0)
    other = torch.randn(7)
    x = torch.stack([torch.full((7,), value), other]).requires_grad_()
    out = norm(x)
    assert torch.equal(out[0], torch.arange(7.0))
    (out * torch.randn(2, 7)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0], torch.zeros(7))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in norm.parameters())
    with torch.no_grad():
        torch.testing.assert_close(norm(x), out)


@pytest.mark.parametrize("row", [[0.0, 1e-25, 2e-25], [3e38, 3e38, -1e38], [1e-40, 0.0, 0.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_beyond_what_floats_hold_under_layer_norm_gives_finite_numbers(
    row: list[float], dtype: torch.dtype
) -> None:
    norm = LayerNorm(LayerNormConfig(epsilon=0.0), 3)
    x = torch.tensor([row, [1.0, 2.0, 4.0]], dtype=dtype, requires_grad=True)
    out = norm(x)
    alone = norm(x[1:])
    assert out.isfinite().all()
    assert torch.equal(out[1:], alone)
    (out.float() * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in norm.parameters())


def test_other_rows_are_what_epsilon_0_makes_of_them() -> None:
    torch.manual_seed(0)
    norm = LayerNorm(LayerNormConfig(epsilon=0.0), 9)
    reference = torch.nn.LayerNorm(9, eps=0.0)
    for scale in (1e-12, 1.0, 1e6):
        x = (torch.randn(4, 9) * scale).requires_grad_()
        y = x.detach().clone().requires_grad_()
        weights = torch.randn(4, 9)
        (norm(x) * weights).sum().backward()
        (reference(y) * weights).sum().backward()
        assert torch.equal(norm(x), reference(y))
        torch.testing.assert_close(x.grad, y.grad)


def test_batch_norm_of_one_row_says_what_to_do() -> None:
    module = featurization(double_norm_log_config={})
    with pytest.raises(DataError, match=r"1 row.*global_batch_size"):
        module.statistics(batch(X[:1]))


def test_a_vector_can_be_concatenated_before_the_layer_norm() -> None:
    module = featurization(double_norm_log_config={}, feature_names_to_concat=["twhin", "binary"])
    parts: list[Tensor] = module(batch(X), None)
    assert [part.shape[1] for part in parts] == [9]
    assert module.width == 9
    with pytest.raises(ConfigError, match=r"'meta' is neither binary nor a vector.*twhin"):
        featurization(log1p_abs_config={}, feature_names_to_concat=["meta"])
