"""One update of the ranker is the same on any number of micro-batches and of processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import programs

SCRIPT = Path(__file__).with_name("recap_update.py")


VARIANTS = [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0), (8, 0.0), (1, 0.001), (4, 0.001)]
"""(micro-batches, norm that gradients are clipped to; 0: not)."""


def updated(output: Path, ranks: int) -> Any:
    """Variant → losses and model after three updates."""
    variants = [f"{m}:{clip}" for m, clip in VARIANTS]
    done = programs.run(*programs.torchrun(ranks, always=True), str(SCRIPT), str(output), *variants)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return updated(tmp_path_factory.mktemp("update") / "one.pt", 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return updated(tmp_path_factory.mktemp("update") / "two.pt", 2)


def assert_same(found: Any, expected: Any) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=2e-4, atol=2e-5, msg=name)
    torch.testing.assert_close(found["users"], expected["users"], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("micro_batches", [2, 3, 4, 8])
def test_micro_batches_are_one_batch(micro_batches: int, one: Any) -> None:
    assert_same(one[micro_batches, 0.0], one[1, 0.0])


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 8])
def test_two_processes_with_uneven_shares_are_one(micro_batches: int, one: Any, two: Any) -> None:
    assert_same(two[micro_batches, 0.0], one[1, 0.0])


def test_clipping_sees_the_gradient_of_the_whole_update(one: Any, two: Any) -> None:
    clipped = one[1, 0.001]
    assert clipped["losses"][1:] != pytest.approx(one[1, 0.0]["losses"][1:], rel=1e-5)
    assert_same(one[4, 0.001], clipped)
    assert_same(two[4, 0.001], clipped)
