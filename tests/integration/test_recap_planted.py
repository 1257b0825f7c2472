"""A small planted world, by the command that a user types: generated, learned, measured against the
best possible.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECAP = ROOT / "projects" / "home" / "recap"
ROWS, BATCH, EPOCHS = 60_000, 512, 3


@pytest.mark.slow
def test_a_small_planted_world_is_learned_and_the_run_says_how_well(tmp_path: Path) -> None:
    rows, run = tmp_path / "rows", tmp_path / "run"
    steps = ROWS * EPOCHS // BATCH
    settings = [
        f"planted.num_rows={ROWS}",
        "planted.num_validation_rows=20000",
        # As many rows a user, an item and a tag as in the large world.
        "planted.num_users=40",
        "planted.num_items=30",
        "planted.num_tags=10",
        f"train_data.inputs={rows}/train/*.parquet",
        f"train_data.feature_spec={rows}/spec.yaml",
        f"train_data.global_batch_size={BATCH}",
        f"training.num_epochs={EPOCHS}",
        f"validation_data.validation.inputs={rows}/validation/*.parquet",
        f"validation_data.validation.feature_spec={rows}/spec.yaml",
        f"optimizer.single_task_learning_rate.linear_ramp_to_cosine.final_num_steps={steps}",
    ]
    command = [sys.executable, str(RECAP / "main.py"), f"--save_dir={run}"]
    command += [f"--config_path={RECAP}/config/planted.yaml"]
    command += [f"--set={one}" for one in settings]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "of the best possible auc" in done.stdout
    report = json.loads((run / "metrics.json").read_text())["partitions"]["validation"]
    for task in ("click", "like", "reply"):
        measured, best = report["tasks"][task], report["best"][task]
        # Nothing but luck beats the true probabilities, and luck is small on 20,000 rows.
        assert 0.98 < measured["auc"] / best["auc"] < 1.005
        assert 0.9 < measured["rce"] / best["rce"] < 1.02
        assert 0.9 < measured["calibration"] < 1.1
