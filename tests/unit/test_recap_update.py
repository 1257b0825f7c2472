"""One update in one process: what it depends on beside its rows."""

from typing import Any

import pytest
import torch

from projects.home.recap.config import RecapConfig
from projects.home.recap.data.batch import Features, RankingBatch
from projects.home.recap.model.build import build_model
from projects.home.recap.optimizer import RecapOptimizer
from projects.home.recap.update import Update
from tml.config import build_config
from tml.distributed import Job

JOB = Job(0, 1, 1, torch.device("cpu"))
FEATURES = Features(tasks=("a",), num_continuous=3)


def make_config(micro_batches: int, **mlp: Any) -> RecapConfig:
    data = {"inputs": "none", "feature_spec": "none", "tasks": {"a": None}}
    tree = {
        "training": {"num_train_steps": 9, "gradient_accumulation": micro_batches},
        "model": {
            "tasks": {"a": {"mlp_config": {"layer_sizes": [8, 1], **mlp}}},
            "backbone": {"mlp_config": {"layer_sizes": [8]}},
            "featurization_config": {"double_norm_log_config": {}},
        },
        "train_data": data,
        "optimizer": {"single_task_learning_rate": {"constant": 0.01}},
    }
    return build_config(RecapConfig, tree, "test")


def make_rows(count: int) -> RankingBatch:
    random = torch.Generator().manual_seed(0)
    return RankingBatch(
        continuous=torch.randn(count, 3, generator=random),
        binary=torch.empty(count, 0),
        discrete=torch.empty(count, 0, dtype=torch.int64),
        labels=torch.randint(0, 2, (count, 1), generator=random).float(),
        weights=torch.ones(count, 1),
    )


def make_update(config: RecapConfig) -> Update:
    model, tables = build_model(config, FEATURES, JOB)
    return Update(config, model, tables, RecapOptimizer(config.optimizer, model), JOB)


def test_dropout_depends_on_the_number_of_the_update_alone() -> None:
    """A run that is taken up at step 5 has drawn other random numbers before than one that was
    never broken.
    """
    config, rows = make_config(1, dropout={"rate": 0.5}), make_rows(16)
    first, second, third = (make_update(config) for _ in range(3))
    one = float(first(rows, 5).loss_sum)
    torch.rand(7)
    assert float(second(rows, 5).loss_sum) == one
    assert float(third(rows, 6).loss_sum) != one


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_the_end_of_an_epoch_makes_fewer_micro_batches_but_none_of_one_row(count: int) -> None:
    """Batch norm in a tower knows nothing to do with one row."""
    update = make_update(make_config(4, batch_norm={"affine": True, "momentum": 0.1}))
    assert update(make_rows(count), 0).num_examples_all == count
