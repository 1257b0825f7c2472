"""run.py with the options of other graph systems: a run that is taken up again equals the unbroken
one, its vectors are exported and measured.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from projects.twhin.config import TwhinConfig
from tests import programs
from tml import checkpoint
from tml.config import build_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "projects" / "twhin" / "run.py"
NUM_ROWS, NUM_EDGES, DIM = 120, 1500, 16
STEPS = 10
"""Of 150 edges: one epoch, or two grouped passes over half the edges."""

COMPLEX: dict[str, Any] = {
    "operator": "complex_diagonal",
    "reciprocal": True,
    "relation_init_scale": 0.1,
    "regularization": {"n3": 0.01},
    "embedding_dropout": 0.1,
    "loss": {"softmax": {}},
    "translation_optimizer": {"adagrad": {"lr": 0.1}},
}
AFFINE: dict[str, Any] = {
    "operator": "affine",
    "biases": True,
    "loss": {"softmax": {"log_q": True, "temperature": 0.5}},
    "translation_optimizer": {"adam": {"lr": 0.01}},
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], set[str]]] = {
    "complex": (
        COMPLEX,
        {"optimizer": {"adagrad": {"lr": 0.1}}},
        {"all_negatives": True, "grouped": True, "limit": NUM_EDGES // 2},
        {
            "tables.entity.weight",
            "tables.entity.accumulator",
            "complex_diagonals",
            "complex_diagonal_accumulator",
        },
    ),
    "affine": (
        AFFINE,
        {"optimizer": {"adam": {"lr": 0.05}}, "data_type": "bf16"},
        {"global_negatives": 30, "degree_power": 0.5},
        {f"tables.entity{table}.{name}" for table in ("", ".bias") for name in ("weight", "m")}
        | {f"tables.entity{table}.{name}" for table in ("", ".bias") for name in ("v", "step")}
        | {"translations", "matrices"}
        | {f"{name}_{part}" for name in ("translation", "matrix") for part in ("m", "v", "step")},
    ),
}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edges within and between 6 communities."""
    folder = tmp_path_factory.mktemp("graph")
    generator = np.random.default_rng(0)
    for split, count in (("train", NUM_EDGES), ("valid", 200)):
        lhs = generator.integers(NUM_ROWS, size=count)
        rel = generator.integers(2, size=count)
        rhs = (lhs + rel) % 6 + 6 * generator.integers(NUM_ROWS // 6, size=count)
        (folder / split).mkdir()
        table = pa.table({"lhs": lhs, "rel": rel, "rhs": rhs})
        pq.write_table(table, folder / split / "part-0.parquet", row_group_size=400)
    return folder


def config_tree(graph: Path, variant: str) -> dict[str, Any]:
    model, table, data, _ = VARIANTS[variant]
    return {
        "training": {"num_epochs": 2 if "grouped" in data else 1, "train_log_every_n": 5},
        "model": {
            "embeddings": {
                "tables": [
                    {
                        "name": "entity",
                        "num_embeddings": NUM_ROWS,
                        "embedding_dim": DIM,
                        **table,
                    }
                ]
            },
            "relations": [{"name": r, "lhs": "entity", "rhs": "entity"} for r in ("a", "b")],
            **model,
        },
        "train_data": {
            "data_root": f"{graph}/train/*.parquet",
            "per_replica_batch_size": NUM_EDGES // STEPS,
            **data,
        },
        "validation_data": {"data_root": f"{graph}/valid/*.parquet"},
    }


def train(config: Path, save_dir: Path, *extra: str) -> None:
    given = [f"--config_yaml_path={config}", f"--save_dir={save_dir}", *extra]
    done = programs.run(str(SCRIPT), *given)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_taken_up_again_equals_the_unbroken_one(
    variant: str, graph: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_tree(graph, variant)))
    build_config(TwhinConfig, config_tree(graph, variant), "test")
    train(config, tmp_path / "unbroken")
    train(config, tmp_path / "broken", "--set", "training.num_train_steps=4", "--no_evaluation")
    train(config, tmp_path / "broken")
    whole, resumed = (
        checkpoint.load_whole(tmp_path / name / str(STEPS)) for name in ("unbroken", "broken")
    )
    assert set(whole) == set(resumed) == VARIANTS[variant][3]
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name

    report = json.loads((tmp_path / "unbroken" / "metrics.json").read_text())
    chance = sum(1 / rank for rank in range(1, NUM_ROWS + 1)) / NUM_ROWS
    assert report["link_prediction"]["mean"]["mrr"] > 1.5 * chance
    vectors = tmp_path / "unbroken" / "vectors"
    entities = pq.read_table(vectors / "entity.parquet")
    saved = whole["tables.entity.weight"].float().numpy()
    assert (np.stack(entities.column("vector").to_pylist()) == saved).all()
    relations = pq.read_table(vectors / "relations.parquet").to_pydict()
    rows = np.array(relations["vector"])
    if variant == "complex":
        assert relations["relation"] == ["a", "b", "a:inverse", "b:inverse"]
        assert relations["operator"] == ["complex_diagonal"] * 4
        assert (rows == whole["complex_diagonals"].numpy()).all()
    else:
        biases = whole["tables.entity.bias.weight"][:, 0].numpy()
        assert (entities.column("bias").to_numpy() == biases).all()
        assert (rows == whole["translations"].numpy()).all()
        matrices = pq.read_table(vectors / "relation_matrices.parquet").column("vector")
        assert np.array(matrices.to_pylist()).shape == (2, DIM * DIM)
