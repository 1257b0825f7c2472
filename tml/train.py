"""The training loop, the same for every project: batches → updates → records → checkpoints, and a
clean stop.

The loop knows neither model nor data: `update` makes one step of one batch and `save` writes what
is needed to take the run up again. The loss of an interval belongs to the state, so that a resumed
run writes the same records as an unbroken one.
"""

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import psutil
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from tml import distributed
from tml.config import Config
from tml.data.parquet import Position
from tml.distributed import Job
from tml.early_stopping import Best
from tml.logs import MetricLog, Record

BatchT = TypeVar("BatchT")


class TrainingConfig(Config):
    """How long training runs and what it leaves behind."""

    save_dir: str | None = None
    """Run folder: step folders, metrics.jsonl, config.yaml. `--save_dir` takes precedence."""
    num_train_steps: PositiveInt | None = None
    """Training ends after so many steps or after num_epochs, whichever is first. Unset: num_epochs
    alone.
    """
    checkpoint_every_n: PositiveInt | None = None
    """Steps between checkpoints. Unset: one at the end, and one when stopped by a signal."""
    checkpoint_max_to_keep: PositiveInt | None = None
    """Older checkpoints beyond this number are deleted. Unset: all are kept."""
    train_log_every_n: PositiveInt = 10
    """Steps between records in metrics.jsonl and lines on the console."""
    num_eval_steps: PositiveInt | None = None
    """Batches of validation_data in one validation pass. Unset: all of them."""
    eval_log_every_n: PositiveInt | None = None
    """Training steps between validation passes over validation_data. Unset: one, at the
    end.
    """
    eval_timeout_in_s: PositiveFloat = 3600
    """Longest a collective operation may take, in seconds, before the run is given up."""
    initial_checkpoint_dir: str | None = None
    """Step folder whose model (not its optimizer, nor its position) a new run starts from."""
    gradient_accumulation: PositiveInt | None = None
    """Batches that make one update: the reader yields one batch of their joint size, which is the
    same sum.
    """
    seed: NonNegativeInt = 1
    """Decides initial values, order of the data, everything drawn at random."""

    def last_step(self, step: int, left: int) -> int:
        """The number of the last step, `left` steps of the data being left after `step`."""
        wanted = self.num_train_steps
        return step + left if wanted is None else max(step, min(step + left, wanted))


class Place(Protocol):
    """Where reading goes on: a `Position`, or whatever else a reader knows itself by."""

    @property
    def epoch(self) -> int:
        """Number of the pass over the data, from 0."""
        ...

    def to_json(self) -> Any:
        """What meta.json holds of it."""
        ...


class DivergedError(RuntimeError):
    """The loss is no finite number."""


class GivenUpError(Exception):
    """A measurement was left off because a signal came; raised in every process of the job, at the
    same point.
    """


@dataclass(frozen=True)
class StepResult:
    """What one update tells."""

    loss_sum: Tensor
    """Sum of the losses of this process's examples, detached."""
    num_examples_all: int
    """Examples of this step over all processes."""
    learning_rates: dict[str, float]
    """Learning rate of each group of parameters."""


@dataclass
class Progress:
    """How far a run has come: everything that meta.json must hold beside the tensors."""

    step: int = 0
    """Updates done."""
    position: Place = field(default_factory=Position)
    """Where reading goes on."""
    loss_sum: float = 0.0
    """Sum of the losses since the last record: of all processes on the chief, 0 elsewhere, when
    just saved or loaded.
    """
    num_examples: int = 0
    """Examples since the last record, over all processes."""
    examples_seen: int = 0
    """Examples since the start of the run, over all processes."""
    is_measured: bool = False
    """Whether the checkpoint of this step is one that is measured. Measuring follows saving: who
    takes the run up again measures it where that was cut short, and decides the same.
    """
    best: Best = field(default_factory=Best)
    """What was measured before this checkpoint."""
    owes_validation: bool = False
    """Whether the validation of this step was given up at a signal: who takes the run up makes it.
    """

    def to_json(self) -> Record:
        """A JSON object for meta.json."""
        return {
            "step": self.step,
            "data_position": self.position.to_json(),
            "interval": {"loss_sum": self.loss_sum, "num_examples": self.num_examples},
            "examples_seen": self.examples_seen,
            "is_measured": self.is_measured,
            "best": self.best.to_json(),
            "owes_validation": self.owes_validation,
        }

    @classmethod
    def from_json(cls, tree: Record, position: Place, *, chief: bool) -> Self:
        """The inverse of `to_json`; the position is read by who knows its kind."""
        return cls(
            step=tree["step"],
            position=position,
            loss_sum=tree["interval"]["loss_sum"] if chief else 0.0,
            num_examples=tree["interval"]["num_examples"],
            examples_seen=tree["examples_seen"],
            is_measured=tree.get("is_measured", False),
            best=Best.from_json(tree.get("best", {})),
            owes_validation=tree.get("owes_validation", False),
        )


class StopSignal:
    """While entered, SIGTERM and SIGINT are noted instead of ending the process: the loop stops
    after its step, and what is measured may be given up.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came to this process; another process may have got none."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes on a signal that a terminal has already sent to every process: the second
        # is no new wish.
        self.number = self.number or number


@dataclass(frozen=True)
class Loop(Generic[BatchT]):
    """One training run's loop; `run` is told in order of execution."""

    job: Job
    log: MetricLog
    update: Callable[[BatchT, int], StepResult]
    """(batch, number of the update from 0) → result."""
    save: Callable[[Progress], None]
    """Write a checkpoint; every process calls it."""
    total_steps: int | None
    """Unset: until the batches end, in whichever process first."""
    may_end_early: bool = field(default=False, kw_only=True)
    """Whether the batches may end before total_steps, which is the end then too."""
    log_every: int
    unit: str
    """What an example is called: "edges"."""
    checkpoint_every: int | None = None
    validate: Callable[[], Record] | None = None
    """Measures on validation data; every process calls it. It may raise GivenUpError."""
    validate_every: int | None = None
    measure: Callable[[Progress], bool] | None = None
    """Measures the checkpoint that was just saved; whether training ends with it. Every process
    calls it. It may raise GivenUpError: `Progress.is_measured` says what is to be made up.
    """
    measure_every: int | None = None
    """Steps between measured checkpoints; the last step's is always measured."""
    measure_every_examples: int | None = None
    """Examples of all processes between measured checkpoints."""
    stop: StopSignal = field(default_factory=StopSignal, kw_only=True)
    """What `validate` and `measure` may look at, to give up."""

    def run(self, batches: Iterator[tuple[BatchT, Place]], progress: Progress) -> int | None:
        """Train to total_steps; returns None when done, or the number of the signal that stopped
        it.

        `progress` is kept up to date, and saved at the end whichever way it comes.
        """
        upcoming = _Ahead(batches, self.total_steps, may_end_early=self.may_end_early)
        saved_step = progress.step if progress.step else None
        interval_loss = torch.tensor(progress.loss_sum, dtype=torch.float64)
        watch = _Watch(progress.examples_seen)
        with self.stop as stop:
            stopped = self._owes_validation(progress) and not self._validates(progress)
            while not stopped and (entry := upcoming.take(progress.step)) is not None:
                batch, position = entry
                result = self.update(batch, progress.step)
                interval_loss += result.loss_sum.to("cpu", torch.float64)
                progress.step += 1
                progress.position = position
                progress.num_examples += result.num_examples_all
                progress.examples_seen += result.num_examples_all
                last = upcoming.is_last(progress.step)
                progress.is_measured = last or self._is_measured(progress, result)
                progress.is_measured &= self.measure is not None
                if _due(progress.step, self.log_every) or last:
                    self._log_interval(progress, interval_loss, result, watch)
                validates = self.validate is not None and (
                    last or _due(progress.step, self.validate_every)
                )
                if validates:
                    with watch.paused():
                        self._validates(progress)
                stopped = distributed.any_process(stop.number is not None)
                saves = last or stopped or progress.is_measured
                if saves or _due(progress.step, self.checkpoint_every):
                    with watch.paused():
                        self._gather(progress, interval_loss)
                        self.save(progress)
                    saved_step = progress.step
                ends = False
                if progress.is_measured and not stopped:
                    with watch.paused():
                        ends = self._measures(progress)
                    # Before another step: what stops here goes on with this measurement.
                    stopped = distributed.any_process(stop.number is not None)
                if ends and self.validate is not None and not validates:
                    self._validates(progress)
                if ends:
                    break
            # A signal that came after the last look: what follows the loop takes time too.
            stopped = distributed.any_process(stop.number is not None)
        assert saved_step == progress.step or not progress.step
        return (stop.number or signal.SIGTERM) if stopped else None

    def _owes_validation(self, progress: Progress) -> bool:
        """Whether one that was given up, or cut short, is still to be made, by this config too."""
        # Where a measurement ends training the validation comes after the checkpoint.
        ended = progress.is_measured and progress.step == self.total_steps
        is_owed = (progress.owes_validation or ended) and self.validate is not None
        return is_owed and not distributed.any_process(self.log.holds("validation", progress.step))

    def _validates(self, progress: Progress) -> bool:
        """Whether it was not given up; a checkpoint that follows says what is owed."""
        assert self.validate is not None
        try:
            record = self.validate()
        except GivenUpError:
            self._say_given_up(progress.step)
            progress.owes_validation = True
            return False
        progress.owes_validation = False
        self._log_validation(progress.step, record)
        return True

    def _measures(self, progress: Progress) -> bool:
        """Whether training ends with this measurement; not where it was given up."""
        assert self.measure is not None
        try:
            return self.measure(progress)
        except GivenUpError:
            self._say_given_up(progress.step)
            return False

    def _say_given_up(self, step: int) -> None:
        self.log.say(f"validation at step {step:,} given up: made when the run goes on")

    def _is_measured(self, progress: Progress, result: StepResult) -> bool:
        if _due(progress.step, self.measure_every):
            return True
        if self.measure_every_examples is None:
            return False
        before = progress.examples_seen - result.num_examples_all
        return before // self.measure_every_examples < (
            progress.examples_seen // self.measure_every_examples
        )

    def _gather(self, progress: Progress, interval_loss: Tensor) -> None:
        """Move the interval's loss to the chief, in the unbroken run as in the resumed one: same
        sums, same rounding.
        """
        distributed.all_reduce_sum(interval_loss)
        _refuse_divergence(interval_loss, progress.step)
        if not self.job.is_chief:
            interval_loss.zero_()
        progress.loss_sum = float(interval_loss)

    def _log_interval(
        self, progress: Progress, interval_loss: Tensor, result: StepResult, watch: "_Watch"
    ) -> None:
        distributed.all_reduce_sum(interval_loss)
        _refuse_divergence(interval_loss, progress.step)
        rate = (progress.examples_seen - watch.examples_before) / watch.lap(progress.examples_seen)
        left_s = None
        if self.total_steps is not None:
            per_step = progress.examples_seen / progress.step
            left_s = (self.total_steps - progress.step) * per_step / rate
        self.log.train(
            {
                "step": progress.step,
                "total_steps": self.total_steps,
                "epoch": progress.position.epoch,
                "loss": float(interval_loss) / max(1, progress.num_examples),
                "lr": result.learning_rates,
                "rate": rate,
                "unit": self.unit,
                "examples_seen": progress.examples_seen,
                "memory_bytes": psutil.Process().memory_info().rss,
                "left_s": left_s,
            }
        )
        interval_loss.zero_()
        progress.num_examples = 0

    def _log_validation(self, step: int, record: Record) -> None:
        self.log.write("validation", {"step": step, **record})
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        shown = "  ".join(f"{name} {value:.6f}" for name, value in numbers.items())
        if numbers:
            self.log.say(f"validation at step {step:,}: {shown}")


class _Ahead(Generic[BatchT]):
    """The batches up to total_steps; where they may end before, one batch is looked at ahead, so
    that the last is known as such, by all processes at the same step.
    """

    def __init__(
        self,
        batches: Iterator[tuple[BatchT, Place]],
        total_steps: int | None,
        *,
        may_end_early: bool,
    ) -> None:
        self._batches = batches
        self._total_steps = total_steps
        self._looks = total_steps is None or may_end_early
        self._next: tuple[BatchT, Place] | None = None
        if self._looks:
            self._look()

    def take(self, step: int) -> tuple[BatchT, Place] | None:
        """The batch after `step` updates; None at the end."""
        if self._total_steps is not None and step >= self._total_steps:
            return None
        if self._looks:
            entry = self._next
            if entry is not None:
                self._look()
            return entry
        entry = next(self._batches, None)
        assert entry is not None, "the reader ended before total_steps"
        return entry

    def is_last(self, step: int) -> bool:
        """Whether nothing follows the batch that was taken."""
        if self._looks and self._next is None:
            return True
        return self._total_steps is not None and step >= self._total_steps

    def _look(self) -> None:
        entry = next(self._batches, None)
        self._next = None if distributed.any_process(entry is None) else entry


class _Watch:
    """Seconds between laps, pauses left out."""

    def __init__(self, examples_before: int) -> None:
        self._start = time.perf_counter()
        self.examples_before = examples_before
        """Examples seen at the start of the lap; an interval may have begun before this process."""

    def lap(self, examples_seen: int) -> float:
        now = time.perf_counter()
        elapsed = now - self._start
        self._start = now
        self.examples_before = examples_seen
        return max(elapsed, 1e-9)

    def paused(self) -> "_Pause":
        return _Pause(self)

    def shift(self, seconds: float) -> None:
        self._start += seconds


class _Pause:
    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._watch.shift(time.perf_counter() - self._began)


def _refuse_divergence(loss: Tensor, step: int) -> None:
    """Every process sees the same sum, so all stop before anything of it is saved."""
    if not torch.isfinite(loss):
        raise DivergedError(
            f"the loss is {float(loss)} by step {step:,}: training has diverged; lower the "
            "learning rates and start again, from the last complete checkpoint, or anew with "
            "--overwrite_save_dir"
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
