"""Metrics over processes are those of one process, to the last bit, on every process."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import programs

SCRIPT = Path(__file__).with_name("binary_metrics_rows.py")


def run(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """What each process saved."""
    folder = folder / str(world_size)
    folder.mkdir()
    launch = programs.torchrun(world_size, always=True)
    done = programs.run(*launch, str(SCRIPT), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (only,) = run(tmp_path_factory.mktemp("alone"), 1)
    return only


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_give_the_bits_of_one(
    tmp_path: Path, alone: dict[str, Any], world_size: int
) -> None:
    found = run(tmp_path, world_size)
    assert sum(one["own"] for one in found) == alone["own"] == 5000
    assert found[-1]["own"] == 0
    for one in found:
        assert one["report"] == alone["report"]
    tasks, strata = alone["report"]["tasks"], alone["report"]["strata"]
    assert list(tasks) == ["like", "share", "report"]
    assert 0.7 < tasks["report"]["gauc"] < 0.9
    assert strata["like"]["odd"]["rows"] == 2500
    assert strata["like"]["none"]["auc"] is None
