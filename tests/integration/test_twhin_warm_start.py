"""Warm start of two processes: each fills the rows and accumulators of its own shards."""

from pathlib import Path

import torch

from projects.twhin.run import run
from tests import programs
from tests.unit import test_twhin_warm_start as one_process
from tml.config import to_yaml

SCRIPT = Path(__file__).parents[2] / "projects" / "twhin" / "run.py"


def test_two_processes_start_from_the_rows_and_accumulators_of_one(tmp_path: Path) -> None:
    one_process.write_graph(tmp_path / "old", one_process.OLD_USERS, one_process.OLD_ITEMS)
    one_process.write_graph(tmp_path / "new", one_process.NEW_USERS, one_process.NEW_ITEMS)
    run(one_process.old_config(tmp_path / "old"), tmp_path / "run")
    # A step that moves nothing: a rate of 0. Accumulators of the rows that it looks up grow.
    still = {"rowwise_adagrad": {"lr": 0.0}}
    config = one_process.new_config(
        tmp_path / "new",
        tmp_path / "run",
        optimizer=still,
        optimizer_state=True,
        model={"translation_optimizer": {"sgd": {"lr": 0.0}}},
        training={"num_train_steps": 1},
    )
    data = {"per_replica_batch_size": 2, "global_negatives": 1}
    config = config.model_copy(update={"train_data": config.train_data.model_copy(update=data)})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    given = [f"--config_yaml_path={tmp_path}/config.yaml", f"--save_dir={tmp_path}/2"]
    done = programs.run(*programs.torchrun(2), str(SCRIPT), *given)
    assert done.returncode == 0, done.stderr[-3000:]
    before, now = one_process.saved(tmp_path / "run"), one_process.saved(tmp_path / "2")
    assert torch.equal(now["translations"], before["translations"])
    for table, was, names in (
        ("user", one_process.OLD_USERS, one_process.NEW_USERS),
        ("item", one_process.OLD_ITEMS, one_process.NEW_ITEMS),
    ):
        for kind in ("weight", "accumulator"):
            known = one_process.by_entity(before[f"tables.{table}.{kind}"], was)
            found = one_process.by_entity(now[f"tables.{table}.{kind}"], names)
            matched = [name for name in names if name in known]
            moved = [name for name in matched if not found[name].equal(known[name])]
            # Two processes with two edges and one negative a side.
            assert len(moved) <= (6 if kind == "accumulator" else 0)
            assert all((found[name] >= known[name]).all() for name in moved)
