"""The evaluator role (SPEC_TYPE=evaluator): a process that does not train measures each step folder
of a run as it appears.
"""

from pathlib import Path

from rich.console import Console

from projects.twhin.best import Goal, find_best, write_best
from projects.twhin.config import TwhinConfig
from projects.twhin.edges import Edges
from projects.twhin.evaluate import evaluate_split, read_splits
from projects.twhin.export import load_vectors
from projects.twhin.model import Vectors
from projects.twhin.ranking import Report
from projects.twhin.report import render
from projects.twhin.validation import for_training
from tml import distributed, logs
from tml import follow as marks
from tml.config import ConfigError


def follow(config: TwhinConfig, save_dir: Path, *, once: bool = False) -> int | None:
    """Measure each complete step folder of a run on validation_data (test_data where there is none)
    as it appears, until the run is finished; see tml.follow. best.json names the best step so far,
    written by the trainer where it measures itself (evaluation.during_training); what is measured
    here is then the same. Returns None, or the number of the signal that stopped it.
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

        def measure(vectors: Vectors, names: list[str]) -> Report:
            if not edges:  # not before: the trainer may make them
                edges.update(read_splits(config))
            return {name: evaluate_split(config, name, vectors, job, edges) for name in names}

        def tell(step: int, report: Report) -> None:
            best = find_best(save_dir, split, goal)
            assert best is not None
            if not trainer_measures:
                write_best(save_dir, best)
            name = "MRR" if str(goal) == "mrr" else str(goal)
            console.print(
                f"step {step:,}; best so far {best['step']:,}, {name} {best[goal.metric]:.4f}"
            )
            console.print(render(report[split]))

        def load(folder: Path) -> Vectors:
            return load_vectors(folder, config.model)

        return marks.follow(save_dir, [split], load, measure, tell, job, timeout_s, once=once)
