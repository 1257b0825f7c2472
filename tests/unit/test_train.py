"""The training loop's end: total_steps or the end of the batches, whichever is first, or a signal,
also one that comes during a validation.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tml.data.parquet import Position
from tml.distributed import Job
from tml.logs import MetricLog, read_records
from tml.train import GivenUpError, Loop, Progress, StepResult, StopSignal


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


class Interrupted:
    """A run of 6 steps with a validation each 2 and a measurement each 3; SIGTERM comes in the
    middle of one of them, which is given up. `go` starts it, or takes up what was saved last.
    """

    def __init__(
        self, folder: Path, at: tuple[str, int] | None, ends_at: int | None = None
    ) -> None:
        """ends_at: the step whose measurement ends training."""
        self._log, self._at, self._ends_at = MetricLog(folder, 0), at, ends_at
        self.saved: list[dict[str, Any]] = []
        self.measured: list[int] = []
        self.trained: list[int] = []

    def go(self) -> int | None:
        stop, progress = StopSignal(), Progress()
        if self.saved:
            progress = Progress.from_json(self.saved[-1], Position(), chief=True)
            self._log.rewind(progress.step)

        def look(what: str) -> None:
            if (what, progress.step) == self._at:
                os.kill(os.getpid(), signal.SIGTERM)
                self._at = None
            if stop.number is not None:
                raise GivenUpError

        def update(batch: int, step: int) -> StepResult:
            self.trained.append(step)
            return StepResult(torch.tensor(1.0), 1, {"all": 0.1})

        def validate() -> dict[str, Any]:
            look("validate")
            return {"loss": float(progress.step)}

        def measure(progress: Progress) -> bool:
            look("measure")
            self.measured.append(progress.step)
            return progress.step == self._ends_at

        total_steps = 6
        if progress.is_measured and measure(progress):  # as a project does before the loop
            total_steps = progress.step
        loop: Loop[int] = Loop(
            job=Job(0, 1, 1, torch.device("cpu")),
            log=self._log,
            update=update,
            save=lambda progress: self.saved.append(progress.to_json()),
            total_steps=total_steps,
            log_every=10,
            unit="rows",
            validate=validate,
            validate_every=2,
            measure=measure,
            measure_every=3,
            stop=stop,
        )
        return loop.run(batches(6), progress)


@pytest.mark.parametrize(
    ("at", "stops_at"),
    [(("validate", 2), 2), (("measure", 3), 3), (("validate", 6), 6), (("measure", 6), 6)],
)
def test_a_validation_is_given_up_at_a_signal_and_made_when_the_run_goes_on(
    at: tuple[str, int], stops_at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Interrupted(tmp_path, at)
    assert run.go() == signal.SIGTERM
    assert f"validation at step {stops_at} given up" in capsys.readouterr().out
    assert run.saved[-1]["step"] == stops_at == len(run.trained)
    assert run.saved[-1]["owes_validation"] == (at[0] == "validate")
    resumed = Interrupted(tmp_path, None)
    resumed.saved = run.saved
    assert resumed.go() is None
    assert run.trained + resumed.trained == list(range(6))
    assert run.measured + resumed.measured == [3, 6]
    records = read_records(tmp_path / "metrics.jsonl")
    losses = [one["loss"] for one in records if one["kind"] == "validation"]
    assert losses == [2, 4, 6]
    # Killed before the next checkpoint, it is made up once.
    resumed.saved = [one for one in resumed.saved if one["step"] == stops_at][:1]
    assert resumed.go() is None
    records = read_records(tmp_path / "metrics.jsonl")
    assert [one["loss"] for one in records if one["kind"] == "validation"] == losses


def test_a_validation_given_up_after_a_measurement_that_ended_training_is_made_up(
    tmp_path: Path,
) -> None:
    run = Interrupted(tmp_path, ("validate", 3), ends_at=3)
    assert run.go() == signal.SIGTERM
    for _ in range(2):  # the second time there is nothing left to do
        resumed = Interrupted(tmp_path, None, ends_at=3)
        resumed.saved = run.saved[-1:]
        assert resumed.go() is None
        assert not resumed.trained
        records = read_records(tmp_path / "metrics.jsonl")
        assert [one["loss"] for one in records if one["kind"] == "validation"] == [2, 3]


def test_a_signal_after_a_measurement_stops_before_the_next_step(tmp_path: Path) -> None:
    run = Interrupted(tmp_path, None)
    run.measured = SignalAt(3)
    assert run.go() == signal.SIGTERM
    assert run.trained == [0, 1, 2]
    assert run.saved[-1]["step"] == 3


class SignalAt(list[int]):
    """Sends SIGTERM when it is given a number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def append(self, value: int) -> None:
        super().append(value)
        if value == self._number:
            os.kill(os.getpid(), signal.SIGTERM)
