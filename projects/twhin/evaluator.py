"""The evaluator role (SPEC_TYPE=evaluator): a process that does not train measures each step folder
of a run as it appears.
"""

from pathlib import Path

from rich.console import Console

from projects.twhin.best import write_best
from projects.twhin.config import TwhinConfig
from projects.twhin.edges import Edges
from projects.twhin.evaluate import evaluate_split, read_splits
from projects.twhin.export import load_vectors
from projects.twhin.model import Vectors
from projects.twhin.ranking import Report
from projects.twhin.report import render
from tml import distributed, logs
from tml import follow as marks
from tml.config import ConfigError


def follow(config: TwhinConfig, save_dir: Path, *, once: bool = False) -> int | None:
    """Measure each complete step folder of a run on validation_data (test_data where there is none)
    as it appears, until the run is finished; see tml.follow. best.json names the best step so far.
    Returns None, or the number of the signal that stopped it.
    """
    split = "validation" if config.validation_data else "test"
    if getattr(config, f"{split}_data") is None:
        raise ConfigError("an evaluator (SPEC_TYPE) needs validation_data or test_data")
    if not config.evaluation.link_prediction:
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
            best = write_best(save_dir, split)
            console.print(f"step {step:,}; best so far {best['step']:,}, MRR {best['mrr']:.4f}")
            console.print(render(report[split]))

        def load(folder: Path) -> Vectors:
            return load_vectors(folder, config.model)

        return marks.follow(save_dir, [split], load, measure, tell, job, timeout_s, once=once)
