"""Started under torchrun by test_recap_update.py: three updates of a small ranker on this process's
share of fixed rows, for each variant (micro-batches, norm that gradients are clipped to; 0: not);
the chief writes losses, parameters and running statistics of all.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from projects.home.recap.config import RecapConfig
from projects.home.recap.data.batch import Bag, Features, RankingBatch
from projects.home.recap.model.build import build_model, model_state
from projects.home.recap.optimizer import RecapOptimizer
from projects.home.recap.update import Update
from tml import distributed
from tml.config import build_config
from tml.distributed import Job

ROWS, STEPS = 48, 3
FEATURES = Features(
    tasks=("c", "b", "a"),
    num_continuous=6,
    num_binary=2,
    vectors={"author": 4},
    categorical={"item": 9, "user": 30},
    bags={"tags": 5},
)


def make_config(micro_batches: int, **optimizer: float) -> RecapConfig:
    """A MaskNet with embeddings held whole and a large table, no batch norm in towers."""
    tower = {"mlp_config": {"layer_sizes": [8, 1]}}
    block = {"output_size": 8, "aggregation_size": 4}
    large = {"name": "users", "embedding_dim": 4, "features": ["user"]}
    tree = {
        "training": {"num_train_steps": STEPS, "gradient_accumulation": micro_batches, "seed": 3},
        "model": {
            "tasks": {"a": tower, "b": {**tower, "pos_weight": 2.0}},
            "backbone": {"mask_net_config": {"mask_blocks": [block, block]}},
            "featurization_config": {"double_norm_log_config": {}},
            "small_embeddings": {"default_dim": 4},
            "large_embeddings": {
                "tables": [large],
                "optimizer": {"rowwise_adagrad": {"lr": 0.1}},
            },
        },
        "train_data": {
            "inputs": "none",
            "feature_spec": "none",
            "tasks": dict.fromkeys(FEATURES.tasks),
        },
        "optimizer": {"single_task_learning_rate": {"constant": 0.01}, **optimizer},
    }
    return build_config(RecapConfig, tree, "test")


def make_rows(step: int) -> RankingBatch:
    """All rows of an update."""
    random = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 4, (ROWS,), generator=random)
    return RankingBatch(
        continuous=torch.randn(ROWS, 6, generator=random) * 3,
        binary=torch.randint(0, 2, (ROWS, 2), generator=random).float(),
        discrete=torch.empty(ROWS, 0, dtype=torch.int64),
        labels=torch.randint(0, 2, (ROWS, 3), generator=random).float(),
        weights=torch.rand(ROWS, 3, generator=random) + 0.5,
        vectors={"author": torch.randn(ROWS, 4, generator=random)},
        categorical={
            "item": torch.randint(0, 9, (ROWS,), generator=random),
            "user": torch.randint(0, 30, (ROWS,), generator=random),
        },
        bags={
            "tags": Bag(
                torch.randint(0, 5, (int(lengths.sum()),), generator=random),
                torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            )
        },
    )


def train(job: Job, micro_batches: int, clip: float) -> dict[str, Any]:
    """Train in this process, one of the job's."""
    optimizer = {"clip_grad_norm": clip} if clip else {}
    config = make_config(micro_batches, **optimizer)
    model, tables = build_model(config, FEATURES, job)
    update = Update(config, model, tables, RecapOptimizer(config.optimizer, model), job)
    # Uneven shares where there are several processes.
    cuts = [0, ROWS] if job.world_size == 1 else [0, ROWS // 3, ROWS]
    start, stop = cuts[job.rank], cuts[job.rank + 1]
    losses = []
    for step in range(STEPS):
        result = update(make_rows(step).slice(start, stop), step)
        losses.append(float(distributed.all_reduce_sum(result.loss_sum.double())))
        assert result.num_examples_all == ROWS
    users = model.lookup(make_rows(0).slice(start, stop))["user"].detach()
    return {
        "losses": losses,
        "state": {name: value.clone() for name, value in model_state(model, None).items()},
        "users": torch.cat(distributed.gather(users)),
    }


if __name__ == "__main__":
    variants = [(int(m), float(c)) for m, c in (text.split(":") for text in sys.argv[2:])]
    with distributed.join(60) as this:
        found = {variant: train(this, *variant) for variant in variants}
        if this.is_chief:
            torch.save(found, Path(sys.argv[1]))
