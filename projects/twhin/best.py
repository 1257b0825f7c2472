"""The best step of a run by what was measured of its checkpoints, named in evaluation/best.json.

The file is written by the trainer where evaluation.during_training is set, else by the evaluator
role: {"step", "split", "metric", "relation", <metric>: its value, "measured_with"}. Programs that
read a run take the step that it names by default, and the trainer keeps that step folder.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from projects.twhin.evaluation_config import EvaluationConfig
from projects.twhin.ranking import Report
from tml import checkpoint, follow, run_folder
from tml.checkpoint import CheckpointError
from tml.machines import container

BEST = "best.json"
"""Below evaluation/."""
MEASURED_WITH = "measured_with"
"""Key of what `measured.measured_with` says, in marks and in best.json."""


@dataclass(frozen=True)
class Goal:
    """The number that steps are compared by; larger is better."""

    metric: str = "mrr"
    relation: str | None = None

    @classmethod
    def of(cls, config: EvaluationConfig) -> "Goal":
        """That of during_training; the MRR where that is unset."""
        during = config.during_training
        return cls() if during is None else cls(during.metric, during.relation)

    def __str__(self) -> str:
        return self.metric + (f" of {self.relation}" if self.relation else "")

    def value(self, report: Report) -> float | None:
        """The number in a report; None where nothing of the kind was measured."""
        is_link = "link_prediction" in report and self.metric in report["link_prediction"]["mean"]
        part = report.get("link_prediction" if is_link else "retrieval", {})
        if self.relation is not None:
            part = part.get("relations", {}).get(self.relation, {})
        found: float | None = {**part, **part.get("mean", {})}.get(self.metric)
        return found


def find_best(
    save_dir: Path, split: str, goal: Goal, measured_with: str | None = None
) -> Report | None:
    """The step whose mark has the largest number, the first of equals, as best.json names it.

    Steps count whose folder is still there, and whose mark was `measured_with` the same.
    """
    measured: dict[int, float] = {}
    for step in checkpoint.complete_steps(save_dir):
        mark = follow.read_mark(save_dir, split, step)
        if mark is None or mark.get(MEASURED_WITH) != measured_with:
            continue
        value = goal.value(mark)
        if value is not None:
            measured[step] = value
    if not measured:
        return None
    step = max(measured, key=lambda step: measured[step])
    return describe(step, split, goal, measured[step], measured_with)


def describe(
    step: int, split: str, goal: Goal, value: float, measured_with: str | None = None
) -> Report:
    """What best.json holds."""
    report: Report = {"step": step, "split": split, "metric": goal.metric, goal.metric: value}
    if goal.relation is not None:
        report["relation"] = goal.relation
    return report if measured_with is None else {**report, MEASURED_WITH: measured_with}


def write_best(save_dir: Path, best: Report) -> None:
    """Write evaluation/best.json."""
    path = save_dir / follow.EVALUATION / BEST
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(path, best)


def read_best(save_dir: Path) -> Report | None:
    """What evaluation/best.json holds; None where there is none. Raises CheckpointError where it
    cannot be read.
    """
    path = save_dir / follow.EVALUATION / BEST
    try:
        best: Report = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not whole ({error}); remove it: who measures the run writes it again"
        ) from error
    return best


def best_step(save_dir: Path) -> int:
    """The step that best.json names. Raises CheckpointError where there is none."""
    best = read_best(save_dir)
    if best is None:
        raise CheckpointError(
            f"{save_dir} names no best step ({follow.EVALUATION}/{BEST}): set "
            "evaluation.during_training in its config, or let an evaluator (SPEC_TYPE=evaluator) "
            "measure its steps; or give the number of a step"
        )
    step = best["step"]
    assert isinstance(step, int)
    return step


STEP_HELP = (
    "step folder: its number, best or newest; default: the best by validation where there is one, "
    "else the newest"
)
LISTED_STEPS = 12
"""Steps that an error names."""


def step_argument(text: str) -> int | str:
    """--step of a program: a number, "best" or "newest"; "last" is another word for it."""
    if text in ("best", "newest", "last"):
        return "newest" if text == "last" else text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no step: give a number, best or newest")


def choose_step(run: Path, asked: int | str | None) -> tuple[int, str | None]:
    """The step of a run folder that `step_argument` asks for, and a line to say where the default
    (None) was a choice between the best and the newest.

    The default is the best by validation where its folder is complete, else the newest. A step that
    was chosen on the test edges is taken on demand alone: measured on them, it looks better than it
    is. Raises CheckpointError where there is no such step.
    """
    if not run.is_dir():
        raise CheckpointError(f"--run: there is no folder {run}{container.outside(run)}")
    steps = checkpoint.complete_steps(run)
    if asked == "best":
        return best_step(run), None
    if isinstance(asked, int):
        if not (run / str(asked)).is_dir():
            raise CheckpointError(f"--step: {run} has no step {asked}; {_listed(steps)}")
        return asked, None
    if not steps:
        raise CheckpointError(f"{run} holds no complete step folder; train first")
    best, newest = read_best(run), steps[-1]
    if asked == "newest" or best is None or best["step"] == newest:
        return newest, None
    step, split = best["step"], best["split"]
    if step not in steps:
        return newest, f"step {newest}, the newest (the best by {split}, {step}, is gone)"
    if split != "validation":
        return newest, f"step {newest}, the newest (--step={step} is the best by {split})"
    return step, f"step {step}, the best by validation (--step={newest} is the newest)"


def _listed(steps: list[int]) -> str:
    if not steps:
        return "none is complete; train first"
    more = f"{len(steps) - LISTED_STEPS} earlier ones, " if len(steps) > LISTED_STEPS else ""
    return f"complete are {more}{', '.join(map(str, steps[-LISTED_STEPS:]))}"


def forget_marks(save_dir: Path, step: int) -> None:
    """Remove the marks of steps after `step`, and name the best of those before it."""
    follow.forget_marks(save_dir, step)
    best = read_best(save_dir)
    if best is not None and best["step"] > step:
        (save_dir / follow.EVALUATION / BEST).unlink()
        goal = Goal(best.get("metric", "mrr"), best.get("relation"))
        left = find_best(save_dir, best["split"], goal, best.get(MEASURED_WITH))
        if left is not None:
            write_best(save_dir, left)
