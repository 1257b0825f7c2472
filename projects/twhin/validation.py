"""Validation by ranking during training: each checkpoint it is told of is measured on
validation_data, the best one is kept, and training ends when none has been better for long enough.

What is measured are the vectors of the step folder just saved, so that sharded tables are whole and
the numbers are those of `evaluate.py --step`. The best step so far and the waiting are part of the
checkpoint (`Progress.best`), as they were before its own measurement: a run that is taken up again
measures what was not, and decides what the unbroken one does.
"""

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from projects.twhin import best
from projects.twhin.best import Goal
from projects.twhin.config import TwhinConfig
from projects.twhin.edges import Edges, Side
from projects.twhin.evaluate import evaluate_split, read_split, read_splits
from projects.twhin.export import load_vectors
from projects.twhin.measured import measured_with
from projects.twhin.ranking import CandidateScorer, Report
from tml import checkpoint, distributed, follow
from tml.config import ConfigError
from tml.distributed import Job
from tml.early_stopping import Best
from tml.logs import MetricLog
from tml.train import GivenUpError, Progress, StopSignal

SPLIT = "validation"
RECORD = "ranking"
"""The kind of a record in metrics.jsonl."""


class Validation:
    """Measures the checkpoints of one run; all processes make one and call it alike."""

    def __init__(
        self, config: TwhinConfig, save_dir: Path, job: Job, log: MetricLog, stop: StopSignal
    ) -> None:
        """Reads validation_data. Raises ConfigError where it holds nothing to go by. stop: what is
        being measured is given up at a signal.
        """
        during = config.evaluation.during_training
        assert during is not None
        self._config = config
        self._during = during
        self._goal = Goal.of(config.evaluation)
        self._save_dir, self._job, self._log, self._stop = save_dir, job, log, stop
        self._edges: dict[str, Edges | None] = {}
        edges = read_split(config, SPLIT)
        assert edges is not None
        self._refuse_nothing(edges)
        self._measured_with = measured_with(for_training(config), edges)

    def _refuse_nothing(self, edges: Edges) -> None:
        if not len(edges):
            raise ConfigError("evaluation.during_training: validation_data has no edges")
        if (name := self._goal.relation) is not None:
            numbers = {r.name: number for number, r in enumerate(self._config.model.relations)}
            if not (edges.rel == numbers[name]).any():
                raise ConfigError(
                    f"evaluation.during_training.relation: validation_data has no edge of {name!r}"
                )

    def resume(self, progress: Progress) -> bool:
        """Take up what was decided before; whether training has ended with the checkpoint that the
        run goes on from.
        """
        if (reason := self._why_anew(progress)) is not None:
            if progress.best.step is not None:
                self._log.say(
                    f"{reason}: the best step is chosen anew, from step {progress.step:,} on"
                )
            progress.best = Best(goal=self._described())
        if progress.is_measured:
            return self.measure(progress)
        self._name_best(progress.best)
        return False

    def _why_anew(self, progress: Progress) -> str | None:
        """Why what was measured before no longer counts; None where it does."""
        before, described = progress.best, self._described()
        if before.goal == self._described_before():
            before.goal = described
        if before.goal != described:
            return f"what is validated has changed ({before.goal} → {described})"
        if before.step is None:
            return None
        folder = self._save_dir / str(before.step)
        named = best.read_best(self._save_dir)
        # Named before it made way for the measurement of this step, which was better.
        gave_way = named is not None and named["step"] == progress.step
        # As the chief sees it: what follows is done together.
        is_lost = distributed.gather(not gave_way and not checkpoint.is_complete(folder))[0]
        return f"the best step so far, {folder}, is gone" if is_lost else None

    def measure(self, progress: Progress) -> bool:
        """Measure the checkpoint of progress.step, or read what was measured of it; whether
        training ends with it. Raises GivenUpError at a signal.
        """
        began = time.perf_counter()
        step = progress.step
        mark = follow.read_mark(self._save_dir, SPLIT, step) if self._job.is_chief else None
        report = distributed.gather(mark)[0]
        value = None if report is None else self._goal.value(report)
        is_known = value is not None and report.get(best.MEASURED_WITH) == self._measured_with
        if not is_known:
            report = self._rank(self._save_dir / str(step))
            # The chief's number: the same bits decide everywhere.
            value = distributed.gather(self._goal.value(report))[0]
            follow.mark_done(self._save_dir, step, {SPLIT: report}, self._job)
        if value is None:
            raise ConfigError(
                f"evaluation.during_training.metric: there is no {self._goal} on validation_data; "
                "none of its edges can be ranked"
            )
        is_best = progress.best.note(step, value, self._during.min_delta)
        if self._job.is_chief:
            self._name_best(progress.best)
            if not (is_known and self._log.holds(RECORD, step)):
                seconds = time.perf_counter() - began
                self._write_record(step, report, progress.best, seconds, is_best)
            keep = self._config.training.checkpoint_max_to_keep
            checkpoint.remove_old(self._save_dir, keep, kept_steps(self._save_dir))
        ends = progress.best.is_given_up(self._during.patience)
        if ends:
            self._log.say(self._farewell(progress.best))
        return ends

    def _rank(self, folder: Path) -> Report:
        if not self._edges:
            self._edges = read_splits(self._config)
        config = for_training(self._config)
        scorer = _Stoppable(load_vectors(folder, config.model), self._stop)
        report = evaluate_split(config, SPLIT, scorer, self._job, self._edges)
        return {**report, best.MEASURED_WITH: self._measured_with}

    def _name_best(self, found: Best) -> None:
        if self._job.is_chief and found.step is not None and found.value is not None:
            named = (found.step, SPLIT, self._goal, found.value, self._measured_with)
            best.write_best(self._save_dir, best.describe(*named))

    def _write_record(
        self, step: int, report: Report, found: Best, seconds: float, is_best: bool
    ) -> None:
        """A record and its line."""
        record: dict[str, Any] = {"step": step, **_means(report, self._goal)}
        record |= {"best_step": found.step, "waited": found.waited, "seconds": round(seconds, 3)}
        self._log.write(RECORD, record)
        self._log.say(_line(record, self._goal, is_best=is_best))

    def _described(self) -> str:
        """What makes measurements comparable."""
        return f"{self._goal}: {self._measured_with}"

    def _described_before(self) -> str:
        """As a checkpoint says it that was made before the edges were part of it: its best step
        counts as long as all that it does say is the same.
        """
        settings = self._config.evaluation.for_training()
        parts = [str(self._goal)]
        if settings.max_edges is not None:
            parts.append(f"{settings.max_edges:,} edges")
        if settings.relations is not None:
            parts.append(" ".join(settings.relations))
        if settings.sampled_candidates is not None:
            parts.append(f"{settings.sampled_candidates:,} sampled candidates")
        return ", ".join(parts)

    def _farewell(self, found: Best) -> str:
        assert found.step is not None
        assert found.value is not None
        plural = "" if found.waited == 1 else "s"
        return (
            f"no better validation {self._goal} for {found.waited} validation{plural} (best "
            f"{_short(found.value)} at step {found.step:,}): training ends"
        )


class _Stoppable:
    """Scores that are given up at a signal, between two blocks of queries."""

    def __init__(self, scorer: CandidateScorer, stop: StopSignal) -> None:
        self._scorer, self._stop = scorer, stop

    def score(
        self, relation: int, side: Side, entities: Tensor, candidates: Tensor | None = None
    ) -> Tensor:
        """See CandidateScorer. Raises GivenUpError once a signal has come to this process."""
        if self._stop.number is not None:
            raise GivenUpError
        return self._scorer.score(relation, side, entities, candidates)

    def num_candidates(self, relation: int, side: Side) -> int:
        """See CandidateScorer."""
        return self._scorer.num_candidates(relation, side)


def for_training(config: TwhinConfig) -> TwhinConfig:
    """The config whose evaluation is what is measured during training."""
    return config.model_copy(update={"evaluation": config.evaluation.for_training()})


def kept_steps(save_dir: Path) -> list[int]:
    """The steps that stay beside those of checkpoint_max_to_keep: the best one."""
    named = best.read_best(save_dir)
    return [] if named is None else [named["step"]]


def _means(report: Report, goal: Goal) -> dict[str, float]:
    """The means over all relations, and the goal's own number under its name."""
    part = report.get("link_prediction") or report["retrieval"]
    means: dict[str, float] = dict(part["mean"])
    value = goal.value(report)
    return means if value is None else {**means, str(goal): value}


def _line(record: dict[str, Any], goal: Goal, *, is_best: bool) -> str:
    """`validation at step 1,200: mrr .3523  hits@10 .5402  7.1 s  best so far`: 80 columns, unless
    the goal is of a relation; the record has the other numbers.
    """
    cut = f"@{goal.metric.partition('@')[2]}"
    is_link = "mrr" in record
    others = ("mrr", "hits@10") if is_link else (f"recall{cut}", f"ndcg{cut}")
    names = dict.fromkeys((str(goal), *others))
    numbers = "  ".join(f"{name} {_short(record[name])}" for name in names)
    place = "best so far" if is_best else f"best at {record['best_step']:,}"
    seconds = record["seconds"]
    took = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
    return f"validation at step {record['step']:,}: {numbers}  {took}  {place}"


def _short(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")
