"""The evaluator role (SPEC_TYPE=evaluator): a process that does not train measures each step folder
of a run as it appears.
"""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

from rich.console import Console

from projects.twhin.best import MEASURED_WITH, Goal, find_best, write_best
from projects.twhin.config import TwhinConfig
from projects.twhin.edges import Edges
from projects.twhin.evaluate import evaluate_split, read_splits
from projects.twhin.export import load_vectors
from projects.twhin.measured import measured_with
from projects.twhin.model import Vectors
from projects.twhin.ranking import Report
from projects.twhin.report import render
from projects.twhin.validation import for_training
from tml import distributed, logs, run_folder
from tml import follow as marks
from tml.checkpoint import is_complete
from tml.config import ConfigError

logger = logging.getLogger(__name__)


def follow(config: TwhinConfig, save_dir: Path, *, once: bool = False) -> int | None:
    """Measure each complete step folder of a run on validation_data (test_data where there is none)
    as it appears, until the run is finished; see tml.follow. best.json names the best step so far,
    written by the trainer where it measures itself (evaluation.during_training); what is measured
    here is then the same. A step that was measured with something else (other edges, other
    candidates) is measured anew. Returns None, or the number of the signal that stopped it.
    """
    split = "validation" if config.validation_data else "test"
    if getattr(config, f"{split}_data") is None:
        raise ConfigError("an evaluator (SPEC_TYPE) needs validation_data or test_data")
    goal = Goal.of(config.evaluation)
    trainer_measures = config.evaluation.during_training is not None
    if trainer_measures:
        config = for_training(config)
    elif not config.evaluation.link_prediction:
        raise ConfigError(
            "an evaluator (SPEC_TYPE) goes by the MRR: set evaluation.link_prediction"
        )
    console = Console(soft_wrap=True, highlight=False)
    timeout_s = config.training.eval_timeout_in_s
    with distributed.join(timeout_s) as job:
        logs.set_up(job.rank)
        edges: dict[str, Edges | None] = {}

        @cache
        def with_what() -> str:  # not before there is a step: the trainer may make the edges
            edges.update(read_splits(config))
            asked = edges[split]
            assert asked is not None
            return measured_with(config, asked)

        def measure(vectors: Vectors, names: list[str]) -> Report:
            mark = {MEASURED_WITH: with_what()}
            return {n: evaluate_split(config, n, vectors, job, edges) | mark for n in names}

        def tell(step: int, report: Report) -> None:
            best = find_best(save_dir, split, goal, with_what())
            if best is not None and not trainer_measures:
                write_best(save_dir, best)
            console.print(_line(step, best, goal, is_there=is_complete(save_dir / str(step))))
            console.print(render(report[split]))

        def load(folder: Path) -> Vectors:
            return load_vectors(folder, config.model)

        counts = _Marks(with_what).counts
        return marks.follow(
            save_dir, [split], load, measure, tell, job, timeout_s, once=once, counts=counts
        )


class _Marks:
    """Which marks are of what is measured now; each is read once."""

    def __init__(self, with_what: Callable[[], str]) -> None:
        self._with_what = with_what
        self._counted: dict[Path, int] = {}
        """Mark that counts → when it was written."""
        self._said = False

    def counts(self, path: Path) -> bool:
        """Whether there is a mark, measured with the same."""
        try:
            written = path.stat().st_mtime_ns
            if self._counted.get(path) == written:
                return True
        except FileNotFoundError:
            return False
        mark = run_folder.read_json(path)
        if mark is None:  # gone, or not whole
            return False
        before = mark.get(MEASURED_WITH)
        if before != self._with_what():
            if not self._said:
                logger.info(
                    "what is measured has changed (%s → %s): steps are measured anew",
                    before or "unknown",
                    self._with_what(),
                )
            self._said = True
            return False
        self._counted[path] = written
        return True


def _line(step: int, best: Report | None, goal: Goal, *, is_there: bool) -> str:
    """`step 200; best so far 100, MRR 0.3105`."""
    gone = "" if is_there else " (removed meanwhile; raise training.checkpoint_max_to_keep)"
    name = "MRR" if str(goal) == "mrr" else str(goal)
    place = "none left of those that were measured"
    if best is not None:
        place = f"best so far {best['step']:,}, {name} {best[goal.metric]:.4f}"
    return f"step {step:,}{gone}; {place}"
