"""Measure a ranker on validation partitions: during training, after it, or by a process that
follows the checkpoints of a run.

    python projects/home/recap/evaluate.py --run ~/tmp/runs/recap [--step N] [--partition NAME]

The result for one partition at one step is in `<save_dir>/evaluation/<partition>/<step>.json`; a
partition is done at a step when that file is there. Rows are weighted by the sampling rates of the
partition, so that metrics are those of the unsampled stream.
"""

import argparse
import json
import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from projects.home.recap.config import RecapConfig
from projects.home.recap.data import planted
from projects.home.recap.data.batch import Features, RankingBatch, empty_batch
from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.dataset import build_dataset, describe_features
from projects.home.recap.model.build import load_model, read_config, resolve_step
from projects.home.recap.model.config import StratifierConfig
from projects.home.recap.model.model import RankingModel
from tml import calibration, distributed, logs, program, run_folder
from tml import follow as marks
from tml.binary_metrics import BinaryMetrics, BinaryReport, check_names, render
from tml.config import ConfigError
from tml.distributed import Job
from tml.train import DivergedError

logger = logging.getLogger(__name__)

EVALUATION_ROWS = 4096
"""Rows scored at once, over all processes."""
GROUP_FEATURES = ("meta__user_id", "user_id")

_INPUTS = ("num_continuous", "num_binary", "num_discrete", "vectors", "categorical", "bags")

Report = dict[str, Any]
"""Partition → {"tasks": {task: {metric: value}}, "strata": …, "out_of_fold": …, "best": …}."""
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """Rows of one process."""

    tasks: tuple[str, ...]
    scores: Tensor
    """(N, T) probabilities, float32 on the CPU."""
    labels: Tensor
    """(N, T) 0 or 1."""
    weights: Tensor
    """(N, T)."""
    groups: Tensor | None
    """(N,) int64: the user of each row."""
    strata: dict[str, Tensor]
    """Name → (N,) bool."""


def check_partitions(config: RecapConfig, features: Features) -> None:
    """Say what is wrong with the validation data before training, not after it."""
    check_names(config.metric_names())
    for name, partition in config.validation_data.items():
        own = describe_features(partition)
        for kind in _INPUTS:
            if getattr(own, kind) != getattr(features, kind):
                raise ConfigError(
                    f"validation_data.{name}: {kind} is {getattr(own, kind)}, that of train_data "
                    f"{getattr(features, kind)}; give both the same schema and preprocessing"
                )
        if config.group_by is not None and config.group_by not in own.ids:
            raise ConfigError(
                f"group_by: {config.group_by!r} is no id feature of validation_data.{name}; there "
                f"are {', '.join(own.ids) or 'none'}"
            )
        for stratifier in config.model.stratifiers or ():
            _column_of(stratifier, empty_batch(own))


def evaluate_model(
    config: RecapConfig,
    features: Features,
    model: RankingModel,
    job: Job,
    only: Collection[str] | None = None,
    *,
    fits: bool = False,
    fitted_on: str | None = None,
) -> Report:
    """Metrics on each partition (of `only`, where given); all processes call this and get the same.

    fits: the learned calibration that the config asks for is fitted and set in the model; the
    partition it is fitted on is measured without it and, out of fold, with it.
    fitted_on: the partition that the model's learned calibration was fitted on; it is measured in
    the same way, and the model keeps what it has.
    """
    report: Report = {}
    was_training = model.training
    model.eval()
    if fits and config.calibration is not None:
        fitted_on = config.calibration.partition
    if fitted_on is not None and (fits or only is None or fitted_on in only):
        learned = {name: value.clone() for name, value in model.calibration.state_dict().items()}
        model.reset_calibration()
        predictions = predict_partition(config, fitted_on, model, job)
        report[fitted_on] = _measure(config, predictions)
        if measured := _calibrate(config, model, predictions, job):
            report[fitted_on]["out_of_fold"] = measured
        if not fits:
            model.calibration.load_state_dict(learned)
    for name in config.validation_data:
        if name not in report and (only is None or name in only):
            report[name] = _measure(config, predict_partition(config, name, model, job))
    for name, one in report.items():
        if best := _best_possible(config, config.validation_data[name]):
            one["best"] = best
    model.train(was_training)
    return report


def _best_possible(config: RecapConfig, partition: RecapDataConfig) -> Report:
    """Task → metrics of the true probabilities, on the validation rows of a planted world."""
    if config.planted is None or partition.inputs is None:
        return {}
    folder = config.planted_folder()
    if Path(partition.inputs).parent != folder / "validation":
        return {}
    best = json.loads((folder / planted.PLANTED).read_text())["best"]
    return {task: {name: values[name] for name in ("auc", "rce")} for task, values in best.items()}


@torch.no_grad()
def predict_partition(config: RecapConfig, name: str, model: RankingModel, job: Job) -> Predictions:
    """Probabilities of this process's rows of a partition, for the tasks measured on it."""
    partition = config.validation_data[name]
    own = describe_features(partition)
    tasks = tuple(partition.evaluation_tasks or model.tasks)
    columns = torch.tensor([model.tasks.index(task) for task in tasks])
    label_columns = torch.tensor([own.tasks.index(task) for task in tasks])
    group_by = config.group_by or next((g for g in GROUP_FEATURES if g in own.ids), None)
    stratifiers = config.model.stratifiers or []
    scores, labels, weights, groups = [], [], [], []
    strata: dict[str, list[Tensor]] = {one.name: [] for one in stratifiers}
    for batch in _batches(config, partition, own, model, job):
        on_device = batch.to(job.device)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=config.runtime.enable_amp):
            logits = model(on_device, model.lookup(on_device))
        scores.append(model.probabilities(logits.float()).cpu()[:, columns])
        labels.append(batch.labels[:, label_columns])
        weights.append(batch.weights[:, label_columns])
        if group_by is not None:
            groups.append(batch.ids[group_by])
        for one in stratifiers:
            strata[one.name].append(_column_of(one, batch) == one.value)
    none = torch.empty(0, len(tasks))
    if distributed.any_process(any(bool(part.isnan().any()) for part in scores)):
        raise DivergedError(f"the model gives NaN on validation_data.{name}: training has diverged")
    return Predictions(
        tasks=tasks,
        scores=torch.cat([none, *scores]),
        labels=torch.cat([none, *labels]),
        weights=torch.cat([none, *weights]),
        groups=None
        if group_by is None
        else torch.cat([torch.empty(0, dtype=torch.int64), *groups]),
        strata={
            name: torch.cat([torch.empty(0, dtype=torch.bool), *m]) for name, m in strata.items()
        },
    )


def _batches(
    config: RecapConfig, partition: RecapDataConfig, own: Features, model: RankingModel, job: Job
) -> Iterator[RankingBatch]:
    """This process's rows, up to num_eval_steps · global_batch_size of all; where large tables make
    a forward pass collective, every process gets equally many batches, some without rows.
    """
    limit = None
    if config.training.num_eval_steps is not None:
        rows = config.training.num_eval_steps * partition.global_batch_size
        limit = rows // job.world_size + (job.rank < rows % job.world_size)
    rows_at_once = max(1, min(EVALUATION_ROWS // job.world_size, limit or EVALUATION_ROWS))
    dataset = build_dataset(
        partition, own, job, config.training.seed, rows_at_once, num_epochs=1, shuffle=False
    )
    batches = (batch for batch, _ in dataset.batches(dataset.start()))
    seen = 0
    in_step = model.has_large_tables and job.world_size > 1
    while True:
        batch = next(batches, None) if limit is None or seen < limit else None
        if in_step and distributed.any_process(batch is not None):
            batch = batch if batch is not None else empty_batch(own)
        if batch is None:
            break
        if limit is not None:
            batch = batch.slice(0, min(len(batch), limit - seen))
        seen += len(batch)
        yield batch
    if dataset.num_errors:
        logger.warning("%s records could not be read and were left out", dataset.num_errors)


def _column_of(stratifier: StratifierConfig, batch: RankingBatch) -> Tensor:
    """(B,) int64: what the stratifier compares with its value. Raises ConfigError."""
    where = f"model.stratifiers: {stratifier.name!r}"
    if stratifier.feature == "discrete":
        width = batch.discrete.shape[1]
        if stratifier.index is None or stratifier.index >= width:
            raise ConfigError(
                f"{where}: index {stratifier.index} is no column of discrete, which has {width}"
            )
        return batch.discrete[:, stratifier.index]
    found = {**batch.categorical, **batch.ids}.get(stratifier.feature)
    if found is None:
        raise ConfigError(
            f"{where}: {stratifier.feature!r} is neither discrete nor a categorical or id feature; "
            f"there are {', '.join([*batch.categorical, *batch.ids]) or 'none'}"
        )
    return found


def _measure(config: RecapConfig, predictions: Predictions) -> Report:
    metrics = BinaryMetrics(predictions.tasks, config.metric_names())
    metrics.update(
        predictions.scores,
        predictions.labels,
        predictions.weights,
        predictions.groups,
        predictions.strata,
    )
    return metrics.compute().to_json()


def _calibrate(
    config: RecapConfig, model: RankingModel, predictions: Predictions, job: Job
) -> Report:
    """Fit a map a task on the rows of all processes, set it in the model, and measure those that
    can be out of fold; {} where there is none.
    """
    learned = config.calibration
    assert learned is not None
    parts = distributed.gather(
        tuple(t.numpy() for t in (predictions.scores, predictions.labels, predictions.weights))
    )
    scores, labels, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    fit = {"isotonic": calibration.fit_isotonic, "platt": calibration.fit_platt}[learned.kind]
    out_of_fold = scores.copy()
    columns = []
    for column, task in enumerate(predictions.tasks):
        p, y, w = (array[:, column].astype(np.float64) for array in (scores, labels, weights))
        if not 0 < (y * w).sum() < w.sum():
            if job.is_chief:
                logger.warning("calibration of %s is left out: its rows have one label only", task)
            continue
        x, mapped = fit(p, y, w).knots(model.num_calibration_knots)
        model.set_calibration(task, torch.from_numpy(x), torch.from_numpy(mapped))
        if learned.folds > 1:
            try:
                out_of_fold[:, column] = calibration.cross_fitted(
                    p, y, learned.folds, config.training.seed, learned.kind, w
                )
                columns.append(column)
            except ValueError as error:  # a fold without one of the labels
                if job.is_chief:
                    logger.warning("%s cannot be measured out of fold: %s", task, error)
    if not columns:
        return {}
    # Every process holds all rows here, and metrics are computed over processes: one gives them.
    groups = None
    if predictions.groups is not None:
        groups = torch.from_numpy(np.concatenate(distributed.gather(predictions.groups.numpy())))
    rows = slice(None) if job.is_chief else slice(0, 0)
    tasks = [predictions.tasks[column] for column in columns]
    measured = BinaryMetrics(tasks, config.metric_names())
    measured.update(
        torch.from_numpy(out_of_fold[rows][:, columns]),
        torch.from_numpy(labels[rows][:, columns]),
        torch.from_numpy(weights[rows][:, columns]),
        None if groups is None else groups[rows],
    )
    return measured.compute().to_json()


def show(report: Report, console: Console) -> None:
    """Print a table for each partition; those of one task share one."""
    singles = {name: one for name, one in report.items() if len(one["tasks"]) == 1}
    if len(singles) < 2 or any(
        one.get("strata") or "out_of_fold" in one for one in singles.values()
    ):
        singles = {}
    for name, one in report.items():
        if name not in singles:
            _show_partition(name, one, console)
    if singles:
        tasks = {name: next(iter(one["tasks"].values())) for name, one in singles.items()}
        console.print(_table({"tasks": tasks}, "partitions of one task"))


def _show_partition(name: str, one: Report, console: Console) -> None:
    console.print(_table(one, name))
    if "out_of_fold" in one:
        console.print(_table(one["out_of_fold"], f"{name}, calibrated (out of fold)"))
    for task, best in one.get("best", {}).items():
        values = one["tasks"].get(task, {})
        shares = [
            f"{values[metric] / value:.1%} of the best possible {metric} ({value:.4g})"
            for metric, value in best.items()
            if values.get(metric) is not None
        ]
        console.print(f"{task}: {', '.join(shares)}", markup=False)


def _table(one: Report, title: str) -> Any:
    def numbers(values: dict[str, Any]) -> dict[str, float]:
        return {k: float("nan") if v is None else v for k, v in values.items()}

    tasks = {task: numbers(values) for task, values in one["tasks"].items()}
    strata = {
        task: {name: numbers(values) for name, values in own.items()}
        for task, own in one.get("strata", {}).items()
    }
    return render(BinaryReport(tasks=tasks, strata=strata), title)


def write_metrics(save_dir: Path, step: int) -> None:
    """Write metrics.json, which says that the run has ended at `step`, from the marks."""
    result = {"step": step, "partitions": marks.read_marks(save_dir, step)}
    run_folder.write_json(save_dir / run_folder.METRICS, result)


def follow(config: RecapConfig, save_dir: Path, *, once: bool = False) -> int | None:
    """Evaluate each complete step folder of a run as it appears, until the run is finished, and
    complete its metrics.json; see tml.follow. Returns None, or the number of the signal that
    stopped it. Raises ConfigError where there is nothing to evaluate on.
    """
    if not config.validation_data:
        raise ConfigError("an evaluator (SPEC_TYPE) needs validation_data; there is none")
    console = Console(soft_wrap=True, highlight=False)
    timeout_s = config.training.eval_timeout_in_s
    with distributed.join(timeout_s) as job:
        logs.set_up(job.rank)

        def load(folder: Path) -> tuple[RankingModel, Features]:
            return load_model(folder, config, job)

        def measure(loaded: tuple[RankingModel, Features], names: list[str]) -> Report:
            model, features = loaded
            return evaluate_model(config, features, model, job, names)

        def tell(step: int, report: Report) -> None:
            console.print(f"step {step:,}")
            show(report, console)

        partitions = list(config.validation_data)
        stopped_by = marks.follow(
            save_dir, partitions, load, measure, tell, job, timeout_s, once=once
        )
        if stopped_by is None and job.is_chief and run_folder.is_finished(save_dir):
            end = json.loads((save_dir / run_folder.METRICS).read_text())["step"]
            write_metrics(save_dir, end)
        return stopped_by


def _fitted_on(folder: Path, config: RecapConfig, model: RankingModel) -> str | None:
    """The partition of the config whose rows the learned calibration of a step folder has seen."""
    then = read_config(folder)
    if not config.calibration or not then.calibration or not model.calibration.learned.any():
        return None
    name = then.calibration.partition
    return name if config.validation_data.get(name) == then.validation_data[name] else None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure a ranker on its validation partitions.")
    parser.add_argument("--run", type=Path, required=True, help="run folder (save_dir)")
    parser.add_argument("--step", type=int, help="step folder; default: the newest complete one")
    parser.add_argument(
        "--partition", action="append", help="partition of validation_data; default: all"
    )
    program.add_overrides(parser, "change one setting of the run's config")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)

    def evaluate() -> None:
        folder = resolve_step(arguments.run, arguments.step)
        config = read_config(folder, tuple(arguments.overrides))
        for name in arguments.partition or ():
            if name not in config.validation_data:
                raise ConfigError(
                    f"--partition {name!r} is not in validation_data; there are "
                    f"{', '.join(config.validation_data) or 'none'}"
                )
        with distributed.join(config.training.eval_timeout_in_s) as job:
            logs.set_up(job.rank)
            model, features = load_model(folder, config, job)
            fitted_on = _fitted_on(folder, config, model)
            report = evaluate_model(
                config, features, model, job, arguments.partition, fitted_on=fitted_on
            )
        if not job.is_chief:
            return
        if arguments.json:
            print(json.dumps(report, indent=2))
        else:
            show(report, Console(soft_wrap=True, highlight=False))

    return program.exit_code(evaluate, arguments.run)


if __name__ == "__main__":
    sys.exit(main())
