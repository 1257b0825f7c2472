"""TwHIN's evaluator as a process beside a trainer: SPEC_TYPE=evaluator run.py, same arguments."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from projects.twhin.best import choose_step
from tests import programs
from tml import checkpoint

SCRIPT = str(Path(__file__).parents[2] / "projects" / "twhin" / "run.py")
STEPS = (5, 10, 15, 20)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps, a checkpoint each 5."""
    folder = tmp_path_factory.mktemp("edges")
    generator = np.random.default_rng(0)
    for split, count in (("train", 2000), ("valid", 200)):
        lhs = generator.integers(100, size=count)
        rhs = lhs % 10 + 10 * generator.integers(8, size=count)
        table = pa.table({"lhs": lhs, "rel": np.zeros(count, np.int64), "rhs": rhs})
        pq.write_table(table, folder / f"{split}.parquet")
    tables = [
        {"name": name, "num_embeddings": rows, "embedding_dim": 8}
        for name, rows in (("user", 100), ("tweet", 80))
    ]
    tree: dict[str, Any] = {
        "training": {"checkpoint_every_n": 5},
        "model": {
            "embeddings": {"tables": tables},
            "relations": [{"name": "fav", "lhs": "user", "rhs": "tweet"}],
        },
        "train_data": {
            "data_root": str(folder / "train.parquet"),
            "per_replica_batch_size": 100,
            "global_negatives": 5,
        },
        "validation_data": {"data_root": str(folder / "valid.parquet")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def start(role: str, config: Path, save_dir: Path, *extra: str, ranks: int = 1) -> programs.Program:
    given = [SCRIPT, f"--config_yaml_path={config}", f"--save_dir={save_dir}", *extra]
    return programs.start(*programs.torchrun(ranks), *given, SPEC_TYPE=role)


def ended(process: programs.Program, code: int = 0) -> str:
    """What it said; it has ended with this exit status."""
    output = "".join(process.communicate(300))
    assert process.returncode == code, output
    return output


def marks(save_dir: Path) -> dict[int, Any]:
    paths = (save_dir / "evaluation" / "validation").glob("*.json")
    return {int(path.stem): json.loads(path.read_text()) for path in paths}


def test_the_evaluator_measures_each_checkpoint_and_names_the_best(
    config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    evaluator = start("evaluator", config, run)
    ended(start("chief", config, run))
    output = ended(evaluator)
    found = marks(run)
    assert tuple(sorted(found)) == STEPS, output
    mrr = {step: found[step]["link_prediction"]["mean"]["mrr"] for step in found}
    assert len(set(mrr.values())) > 1
    best = json.loads((run / "evaluation" / "best.json").read_text())
    assert (best["mrr"], best["split"]) == (max(mrr.values()), "validation")
    assert mrr[best["step"]] == best["mrr"]
    # The trainer's own numbers of its end.
    metrics = json.loads((run / "metrics.json").read_text())
    end = {**metrics, "step": 20, **found[20]}
    assert end == {**metrics, "measured_with": best["measured_with"]}

    # Both once more, together: the finished run is moved aside, the new one is followed.
    evaluator = start("evaluator", config, run, "--repeat")
    ended(start("chief", config, run, "--repeat"))
    assert "step 20" in ended(evaluator)
    assert marks(run) == marks(tmp_path / "run.1") == found

    # Nobody trains: nothing is left to do, or what has no mark.
    (run / "evaluation" / "validation" / "10.json").unlink()
    output = ended(start("evaluator", config, run, "--once", ranks=2))
    assert "step 10" in output
    assert "step 5;" not in output
    near = marks(run)[10]["link_prediction"]["mean"]["mrr"]
    assert near == pytest.approx(mrr[10])


def test_steps_that_are_deleted_do_no_harm_and_a_run_without_evaluation_ends(
    config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    extra = ("--no_evaluation", "--set", "training.checkpoint_every_n=1")
    extra += ("--set", "training.checkpoint_max_to_keep=1")
    evaluator = start("evaluator", config, run, *extra)
    ended(start("chief", config, run, *extra))
    output = ended(evaluator)
    assert 20 in marks(run), output
    assert checkpoint.complete_steps(run) == [20]


def test_a_run_that_replaces_a_finished_one_and_is_killed_is_followed_to_its_end(
    config: Path, tmp_path: Path, until: Any
) -> None:
    run = tmp_path / "run"
    ended(start("chief", config, run))  # another run of before, of steps 5 to 20
    evaluator = start("evaluator", config, run)
    # Two hundred checkpoints, so that both are in the middle of them; few are kept.
    anew = ["--overwrite_save_dir", "--no_evaluation", "--set=training.num_epochs=10"]
    anew += ["--set=training.checkpoint_every_n=1", "--set=training.checkpoint_max_to_keep=3"]
    trainer = start("chief", config, run, *anew)
    until(lambda: max(checkpoint.complete_steps(run), default=0) >= 40, timeout_s=120)
    trainer.kill()
    killed_at = checkpoint.complete_steps(run)[-1]
    assert killed_at < 200
    assert min(checkpoint.complete_steps(run)) > 20, "nothing is left of the run before"
    assert evaluator.poll() is None, "it waits for what comes"
    ended(start("chief", config, run, *anew[1:]))
    output = ended(evaluator)
    found = marks(run)
    assert max(found) == 200, output
    assert output.count("step 200;") == 1
    best = json.loads((run / "evaluation" / "best.json").read_text())
    there = {step: found[step] for step in checkpoint.complete_steps(run) if step in found}
    mrr = {step: one["link_prediction"]["mean"]["mrr"] for step, one in there.items()}
    assert best["mrr"] == max(mrr.values()), "of steps that are there, or it could not be exported"
    # What programs read by default, though the trainer exported its last step.
    chosen, _ = choose_step(run, None)
    assert chosen == best["step"]


def test_a_stopped_evaluator_ends_at_once(config: Path, tmp_path: Path, until: Any) -> None:
    evaluator = start("evaluator", config, tmp_path / "run")
    until(lambda: evaluator.catches(signal.SIGTERM), 200)
    began = time.monotonic()
    evaluator.terminate()
    ended(evaluator, 143)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("validation_data=null", "needs validation_data or test_data"),
        ("evaluation.link_prediction=false", "set evaluation.link_prediction"),
        ("training.eval_timeout_in_s=0.5", "is the trainer running"),
    ],
)
def test_what_an_evaluator_cannot_do_is_said(
    setting: str, message: str, config: Path, tmp_path: Path
) -> None:
    output = ended(start("evaluator", config, tmp_path / "run", "--set", setting), 2)
    assert message in output
    assert "Traceback" not in output


def test_a_role_that_there_is_not_is_refused(config: Path, tmp_path: Path) -> None:
    output = ended(start("boss", config, tmp_path / "run"), 2)
    assert "SPEC_TYPE='boss'" in output
    assert "Traceback" not in output
