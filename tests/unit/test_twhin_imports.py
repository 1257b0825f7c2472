"""What a training run on a processor does not load: it would be there for nothing, and wait for."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from projects.twhin import run
from projects.twhin.config import TwhinConfig
from tml.logs import MetricLog

folder = Path(sys.argv[1])
edges = {"lhs": [0, 1, 2, 3], "rel": [0] * 4, "rhs": [1, 2, 3, 0]}
pq.write_table(pa.table(edges), folder / "edges.parquet")
table = {
    "name": "node",
    "num_embeddings": 4,
    "embedding_dim": 4,
    "optimizer": {"rowwise_adagrad": {"lr": 0.1}},
}
config = TwhinConfig.model_validate({
    "training": {"num_epochs": 1, "train_log_every_n": 1},
    "model": {
        "translation_optimizer": {"adagrad": {"lr": 0.1}},
        "embeddings": {"tables": [table]},
        "relations": [{"name": "r", "lhs": "node", "rhs": "node", "operator": "translation"}],
    },
    "train_data": {
        "data_root": str(folder / "*.parquet"),
        "per_replica_batch_size": 4,
        "global_negatives": 2,
    },
})

def stop(log, record):  # when the first step is done
    print("loaded:", *sys.modules)
    sys.exit()

MetricLog.train = stop
run.run(config, folder / "run")
"""
NEEDLESS = {
    "fbgemm_gpu",
    "pandas",
    "polars",
    "pyarrow.flight",
    "sympy",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torchrec",
}


def test_training_on_a_processor_loads_no_compiler_and_no_other_engine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split("loaded:")[1].split())
    assert "tml.row_tables" in loaded
    assert not loaded & NEEDLESS
