"""Run by torchrun from test_twhin_ranks.py: one step of TwHIN on this job's processes; the chief
saves what came out.

torchrun … twhin_step.py OUTPUT.pt OPTIMIZER
"""

import sys

import numpy as np
import torch

from projects.twhin.config import DataConfig, ModelConfig
from projects.twhin.data import EdgeBatch, EdgeLayout, to_batch
from projects.twhin.model import TwhinModel, table_specs
from tml import checkpoint, distributed
from tml.embeddings import build_tables

DATA = DataConfig(data_root="x", in_batch_negatives=4, global_negatives=6, chunk_size=5)
EDGES = (23, 0, 17)
"""Edges of each process's batch; of one process, the first is all."""


def model_config(optimizer: str) -> ModelConfig:
    """Three tables; the third has fewer rows than there are blocks to cut, the relations join two
    pairs. With row-wise Adagrad also biases, whose tables are narrower.
    """
    tables = [
        {
            "name": name,
            "num_embeddings": rows,
            "embedding_dim": 8,
            # Ramps that start alike: TorchRec must still keep the tables' rates apart.
            "optimizer": {
                optimizer: {"lr": lr},
                "learning_rate": {
                    "linear_ramp_to_constant": {"learning_rate": lr, "num_ramp_steps": 1}
                },
            },
        }
        for name, rows, lr in (("user", 31, 0.5), ("tweet", 20, 0.25), ("author", 3, 1.0))
    ]
    relations = [
        {"name": "fav", "lhs": "user", "rhs": "tweet"},
        {"name": "wrote", "lhs": "author", "rhs": "tweet"},
    ]
    return ModelConfig.model_validate(
        {
            "embeddings": {"tables": tables},
            "relations": relations,
            "init_scale": 1.0,
            "biases": optimizer == "rowwise_adagrad",
        }
    )


def make_batch(config: ModelConfig, rank: int, num_edges_all: int) -> EdgeBatch:
    """The batch of process `rank`; process 1 has none of relation 1, and where there are three, no
    edge at all.
    """
    generator = np.random.default_rng(rank)
    n = EDGES[rank]
    rel = generator.integers(2 if rank == 0 else 1, size=n)
    columns = {
        "lhs": generator.integers(3, size=n),
        "rel": rel,
        "rhs": generator.integers(20, size=n),
    }
    return to_batch(columns, EdgeLayout(config), DATA, generator, num_edges_all)


def main(output: str, optimizer: str) -> None:
    """Two steps of the same batches, so that the second meets a used accumulator."""
    config = model_config(optimizer)
    with distributed.join(60) as job:
        tables = build_tables(table_specs(config), job, seed=4)
        model = TwhinModel(config, tables)
        torch.nn.init.ones_(model.translations)
        total = sum(EDGES[: job.world_size])
        batch = make_batch(config, job.rank, total)
        for step in range(2):
            rates = tables.set_learning_rates(step + 1)
            assert rates["user"] == 0.5
            model.translations.grad = None
            loss = model(batch, DATA)
            (loss * (job.world_size / total)).backward()
            distributed.average_gradients([model.translations])
        gradient = model.translations.grad
        folder = checkpoint.save(
            distributed_path(output),
            job.world_size,
            {**tables.state(), "t_gradient": gradient},
            {},
            "",
        )
        if job.is_chief:
            torch.save(checkpoint.load_whole(folder), output)
        distributed.barrier()


def distributed_path(output: str):  # type: ignore[no-untyped-def]
    """Folder of the step folder beside `output`."""
    from pathlib import Path

    return Path(output).with_suffix("")


if __name__ == "__main__":
    main(*sys.argv[1:])
