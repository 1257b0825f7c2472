"""The training loop's end: total_steps or the end of the batches, whichever is first."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tml.data.parquet import Position
from tml.distributed import Job
from tml.logs import MetricLog
from tml.train import Loop, Progress, StepResult


def batches(count: int) -> Iterator[tuple[int, Position]]:
    for number in range(count):
        yield number, Position(number)


def run(
    folder: Path, count: int, total_steps: int | None, *, may_end_early: bool
) -> tuple[list[int], list[int], list[int]]:
    """Batches that were trained on; steps that were saved, and validated."""
    taken: list[int] = []
    saved: list[int] = []
    validated: list[int] = []
    progress = Progress()

    def update(batch: int, step: int) -> StepResult:
        taken.append(batch)
        return StepResult(torch.tensor(1.0), 1, {"all": 0.1})

    def validate() -> dict[str, float]:
        validated.append(progress.step)
        return {}

    loop: Loop[int] = Loop(
        job=Job(0, 1, 1, torch.device("cpu")),
        log=MetricLog(folder, 0),
        update=update,
        save=lambda progress: saved.append(progress.step),
        total_steps=total_steps,
        log_every=10,
        unit="rows",
        checkpoint_every=2,
        validate=validate,
        may_end_early=may_end_early,
    )
    assert loop.run(batches(count), progress) is None
    return taken, saved, validated


@pytest.mark.parametrize(
    ("count", "total_steps", "steps", "saved"),
    [(3, 5, 3, [2, 3]), (5, 3, 3, [2, 3]), (4, 4, 4, [2, 4]), (3, None, 3, [2, 3]), (0, 5, 0, [])],
)
def test_training_ends_after_total_steps_or_with_the_batches_whichever_is_first(
    count: int, total_steps: int | None, steps: int, saved: list[int], tmp_path: Path
) -> None:
    taken, found, validated = run(tmp_path, count, total_steps, may_end_early=True)
    assert taken == list(range(steps))
    assert found == saved
    assert validated == saved[-1:], "the last step is known as such"


def test_batches_that_end_before_they_may_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the reader ended before total_steps"):
        run(tmp_path, 3, 5, may_end_early=False)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"measure_every": 3}, [3, 6, 7]),
        ({"measure_every_examples": 10}, [3, 5, 7]),  # 4, 8, 12, 16, 20, 24, 28 examples
        ({"measure_every_examples": 100}, [7]),
    ],
)
def test_checkpoints_are_measured_when_due_and_at_the_end(
    settings: dict[str, int], measured: list[int], tmp_path: Path
) -> None:
    found = measured_run(tmp_path, end_at=None, **settings)
    assert [step for what, step in found if what == "measured"] == measured
    # Saved just before, told in the checkpoint that it is measured.
    before = [found[number - 1] for number, (what, _) in enumerate(found) if what == "measured"]
    assert before == [("saved to be measured", step) for step in measured]
    assert ("saved", 4) in found


def test_training_ends_with_a_measurement_that_says_so(tmp_path: Path) -> None:
    found = measured_run(tmp_path, end_at=4, measure_every=2)
    assert found[-3:] == [("saved to be measured", 4), ("measured", 4), ("validated", 4)]


def measured_run(folder: Path, end_at: int | None, **settings: int) -> list[tuple[str, int]]:
    """What a run of 7 steps of 4 examples does, with a checkpoint at least each 4 steps."""
    done: list[tuple[str, int]] = []
    progress = Progress()

    def save(progress: Progress) -> None:
        what = "saved to be measured" if progress.to_json()["is_measured"] else "saved"
        done.append((what, progress.step))

    def measure(progress: Progress) -> bool:
        done.append(("measured", progress.step))
        return progress.step == end_at

    def validate() -> dict[str, float]:
        done.append(("validated", progress.step))
        return {}

    loop: Loop[int] = Loop(
        job=Job(0, 1, 1, torch.device("cpu")),
        log=MetricLog(folder, 0),
        update=lambda batch, step: StepResult(torch.tensor(1.0), 4, {"all": 0.1}),
        save=save,
        total_steps=7,
        log_every=10,
        unit="rows",
        checkpoint_every=4,
        validate=validate,
        measure=measure,
        **settings,
    )
    assert loop.run(batches(7), progress) is None
    return done
