"""Train the Heavy Ranker: config and rows in, a model and its metrics out.

    torchrun --standalone --nnodes 1 --nproc_per_node 1 projects/home/recap/main.py \
        --config_path projects/home/recap/config/local_prod.yaml

The run folder (training.save_dir) gets config.yaml (resolved), metrics.jsonl (one record an
interval), a step folder a checkpoint, evaluation/<partition>/<step>.json and metrics.json. Started
again with the same command, a run goes on from its last complete step folder.

SPEC_TYPE=evaluator makes of the same command one that follows the checkpoints of the run, and
SPEC_TYPE=datasetworker one that reads the training data for it (TML_DATASETWORKERS names those).
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from projects.home.recap import evaluate
from projects.home.recap.config import RecapConfig
from projects.home.recap.data import dataset_worker, planted
from projects.home.recap.data.batch import Features, RankingBatch
from projects.home.recap.data.dataset import describe_features
from projects.home.recap.data.dataset_worker import training_rows
from projects.home.recap.model.build import build_model, model_state
from projects.home.recap.model.describe import describe
from projects.home.recap.model.model import RankingModel
from projects.home.recap.model.towers import module_name
from projects.home.recap.optimizer import RecapOptimizer
from projects.home.recap.update import Update
from tml import checkpoint, distributed, logs, program, run_folder
from tml.config import ConfigError, load_config, to_yaml
from tml.data.parquet import DataError
from tml.data.prefetch import prefetch
from tml.distributed import Job
from tml.follow import EVALUATION, forget_marks, mark_done, unmarked
from tml.logs import MetricLog
from tml.machines import container
from tml.memory import keep_freed_memory
from tml.optimizers import end_schedules
from tml.train import DivergedError, Loop, Place, Progress, StepResult

logger = logging.getLogger(__name__)

RUN_FILES = frozenset([EVALUATION])
"""What a run leaves beside step folders, config and metrics."""


def run(
    config: RecapConfig,
    save_dir: Path,
    *,
    overwrite: bool = False,
    repeat: bool = False,
    debug: bool = False,
) -> int | None:
    """Train and evaluate in this process, one of the job's; returns None, or the number of the
    signal that stopped it.

    overwrite: what an earlier run left in save_dir is removed first. repeat: a finished run there
    is moved aside. debug: no thread reads ahead, nothing is compiled, and every backward pass is
    searched for NaN.
    """
    with distributed.join(config.training.eval_timeout_in_s) as job:
        logs.set_up(job.rank)
        keep_freed_memory()
        if job.is_chief:
            _announce_ignored(config)
        if container.vanishes(save_dir):
            logger.warning("warning: %s", container.advice("save_dir", save_dir))
        torch.backends.cuda.matmul.allow_tf32 = config.runtime.enable_tensorfloat32

        # Data. The chief makes what is missing; the others wait.
        if config.planted is not None and job.is_chief:
            planted.ensure(config.planted, config.planted_folder())
        distributed.barrier()
        training = config.training
        features = describe_features(config.train_data)
        evaluate.check_partitions(config, features)
        dataset = training_rows(config, features, job)
        all_steps = _total_steps(config, 0, dataset.steps_from(dataset.start()))
        scheduled = end_schedules(config, all_steps)

        # Model and optimizer; large tables carry theirs.
        model, tables = build_model(scheduled, features, job)
        optimizer = RecapOptimizer(scheduled.optimizer, model)
        large = tables.state() if tables is not None else {}
        state = {**model_state(model, tables), **large, **optimizer.state()}

        # Run folder. What can be wrong with a new run is found before an earlier one is removed.
        log = MetricLog(save_dir, job.rank)
        anew = run_folder.starts_anew(save_dir, overwrite=overwrite, repeat=repeat)
        if anew and training.initial_checkpoint_dir is not None:
            _warm_start(config, model_state(model, tables), log)
        distributed.barrier()
        if job.is_chief:
            run_folder.make_room(save_dir, RUN_FILES, overwrite=overwrite, repeat=repeat)
        distributed.barrier()

        # Resuming is the normal path: a run starts from its last complete step folder where there
        # is one.
        position, progress = dataset.start(), Progress(position=dataset.start())
        if steps := checkpoint.complete_steps(save_dir):
            folder = save_dir / str(steps[-1])
            meta = checkpoint.load_meta(folder)
            position = dataset.resume(meta["data_position"])
            progress = Progress.from_json(meta, position, chief=job.is_chief)
            checkpoint.load(folder, state, strict=True)
            # The config's, which may have changed: sampling is undone once.
            model.set_sampling_ratios(config.sampling_ratios())
            if job.is_chief:
                run_folder.announce_changes(folder, config)
            log.say(f"resuming {save_dir} at step {progress.step:,}")
        log.rewind(progress.step)
        if job.is_chief:
            forget_marks(save_dir, progress.step)
            (save_dir / checkpoint.CONFIG).write_text(to_yaml(config))
        total_steps = _total_steps(config, progress.step, dataset.steps_from(position))
        if job.is_chief and (total_steps is None or progress.step < total_steps):
            (save_dir / run_folder.METRICS).unlink(missing_ok=True)  # of before it was prolonged
        log.say(_describe(config, features, job, model, dataset.num_rows, total_steps))

        compiles = config.runtime.enable_compile and not debug
        updates = Update(scheduled, model, tables, optimizer, job, compiles=compiles)
        progress_at_start = calibrated_at = progress.step

        def update(batch: RankingBatch, step: int) -> StepResult:
            if step == calibrated_at:  # what was fitted to the weights of then
                model.reset_calibration()
            result = updates(batch, step)
            if step == progress_at_start:
                elapsed = run_folder.seconds_since_start()
                log.say(f"first step done {elapsed:.1f} s after the process started")
            return result

        def save(progress: Progress) -> None:
            _refuse_divergence(model, progress.step)
            distributed.average_buffers(model)
            meta = {
                **progress.to_json(),
                "data_position": distributed.gather(progress.position.to_json()),
                **run_folder.provenance(job),
            }
            keep = training.checkpoint_max_to_keep
            checkpoint.save(save_dir, progress.step, state, meta, to_yaml(config), keep)

        def validate() -> dict[str, Any]:
            nonlocal calibrated_at
            _refuse_divergence(model, progress.step)
            distributed.average_buffers(model)
            calibrated_at = progress.step
            report = evaluate.evaluate_model(config, features, model, job, fits=True)
            if job.is_chief:
                evaluate.show(report, log.console)
            mark_done(save_dir, progress.step, report, job)
            return {"partitions": report}

        evaluates = bool(config.validation_data) and training.evaluated_by == "trainer"
        loop: Loop[RankingBatch] = Loop(
            job=job,
            log=log,
            update=update,
            save=save,
            total_steps=total_steps,
            may_end_early=training.num_epochs is not None and dataset.steps_from(position) is None,
            log_every=1 if debug else training.train_log_every_n,
            unit="examples",
            checkpoint_every=training.checkpoint_every_n,
            validate=validate if evaluates else None,
            validate_every=training.validate_every_n or training.checkpoint_every_n,
        )
        with torch.autograd.set_detect_anomaly(debug):
            batches: Iterator[tuple[RankingBatch, Place]] = dataset.batches(position)
            reads_ahead = dataset.is_read_elsewhere or _has_idle_processors(job)
            reads_ahead = reads_ahead and not debug
            with prefetch(batches) if reads_ahead else nullcontext(batches) as ahead:
                stopped_by = loop.run(ahead, progress)
        if num_errors := sum(distributed.gather(dataset.num_errors)):
            log.say(f"{num_errors:,} records could not be read and were left out")
        if stopped_by is not None:
            log.say(
                f"stopped by signal {stopped_by} after step {progress.step:,}; saved, "
                "start again to go on"
            )
            return stopped_by
        if progress.step and progress.step == progress_at_start:
            log.say(
                f"the run is finished, nothing is left to train; --repeat moves {save_dir} aside "
                "and trains anew, --overwrite_save_dir removes it first"
            )
        if not progress.step:
            raise DataError(
                "nothing was trained: the data ended before a whole batch of "
                f"{config.train_data.global_batch_size * (training.gradient_accumulation or 1):,} "
                "rows; lower train_data.global_batch_size, or give it more data"
            )
        left = distributed.gather(unmarked(save_dir, config.validation_data, progress.step))[0]
        if evaluates and left:
            # The run ended at a step of a former one that was not its last.
            report = evaluate.evaluate_model(config, features, model, job, left)
            log.write("validation", {"step": progress.step, "partitions": report})
            if job.is_chief:
                evaluate.show(report, log.console)
            mark_done(save_dir, progress.step, report, job)
        if job.is_chief:
            evaluate.write_metrics(save_dir, progress.step)
            follow = "" if evaluates or not config.validation_data else ", by the evaluator"
            log.say(f"metrics: {save_dir / run_folder.METRICS}{follow}")
        distributed.barrier()
        return None


def _refuse_divergence(model: RankingModel, step: int) -> None:
    """Raise DivergedError on every process where a parameter is no finite number: a loss is that
    of the weights before its update.
    """
    finite = all(bool(torch.isfinite(p.detach()).all()) for p in model.parameters())
    if distributed.any_process(not finite):
        raise DivergedError(
            f"parameters are no finite numbers after step {step:,}: training has diverged; lower "
            "the learning rates and start again, from the last complete checkpoint, or anew with "
            "--overwrite_save_dir"
        )


def _has_idle_processors(job: Job) -> bool:
    """Whether a thread that reads ahead would have a processor of its own.

    Where torch's threads have them all, each moment that the reader runs makes one of them late and
    the others wait for it: reading ahead then costs three times what it takes between the steps.
    """
    busy = torch.get_num_threads() * job.local_world_size
    return job.device.type != "cpu" or len(os.sched_getaffinity(0)) > busy


def _total_steps(config: RecapConfig, step: int, left: int | None) -> int | None:
    """The number of the last step, at the most; None where the data's end alone decides."""
    training = config.training
    return training.num_train_steps if left is None else training.last_step(step, left)


def _warm_start(config: RecapConfig, state: dict[str, Any], log: MetricLog) -> None:
    """Load the model, or the named parts of it, from another run's step folder."""
    training = config.training
    assert training.initial_checkpoint_dir is not None
    folder = Path(training.initial_checkpoint_dir)
    checkpoint.load_meta(folder)
    if training.initial_checkpoint_parts is not None:
        state = _parts(state, training.initial_checkpoint_parts, list(config.model.tasks))
    # How probabilities were corrected is a matter of the other run's data.
    state = {n: v for n, v in state.items() if not n.startswith("model.calibration.")}
    checkpoint.load(folder, state)
    log.say(f"starting from {folder}: {len(state):,} tensors")


def _parts(state: dict[str, Any], parts: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    """The entries of `state` that belong to the named parts."""
    prefixes = {
        "inputs": ("model.featurization.", "model.small.", "model.position.", "tables."),
        "backbone": ("model.sharing.",),
        "towers": ("model.towers.",),
        **{task: (f"model.towers.{module_name(task)}.",) for task in tasks},
    }
    chosen: dict[str, Any] = {}
    for part in parts:
        if part not in prefixes:
            raise ConfigError(
                f"training.initial_checkpoint_parts: {part!r} is no part of the model; there are "
                f"{', '.join(prefixes)}"
            )
        chosen |= {name: v for name, v in state.items() if name.startswith(prefixes[part])}
    return chosen


def _announce_ignored(config: RecapConfig) -> None:
    """Name each key that is set and has no effect, once."""
    partitions = {"train_data": config.train_data}
    partitions |= {f"validation_data.{k}": v for k, v in config.validation_data.items()}
    ignored: dict[str, list[str]] = {}
    for where, partition in partitions.items():
        for key in partition.ignored_keys():
            ignored.setdefault(key, []).append(where)
    for key, places in ignored.items():
        rest = f" (and {len(places) - 1} more places)" if len(places) > 1 else ""
        logger.warning("%s.%s is set but has no meaning here%s", places[0], key, rest)
    if config.runtime.wandb is not None:
        logger.warning("runtime.wandb is set but not used: metrics are in metrics.jsonl")
    if config.training.eval_log_every_n is not None and config.validation_data:
        logger.warning(
            "training.eval_log_every_n is set but has no meaning here: passes over "
            "validation_data are shown whole; validate_every_n says when they come"
        )
    if not config.validation_data:
        for name in ("num_eval_steps", "eval_log_every_n", "validate_every_n"):
            if getattr(config.training, name) is not None:
                logger.warning("training.%s is set but not used: there is no validation_data", name)


def _describe(
    config: RecapConfig,
    features: Features,
    job: Job,
    model: RankingModel,
    num_rows: int | None,
    total_steps: int | None,
) -> str:
    rows = "" if num_rows is None else f"{num_rows:,} rows; "
    steps = "until the data ends" if total_steps is None else f"{total_steps:,} steps"
    batch = config.train_data.global_batch_size * (config.training.gradient_accumulation or 1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    processes = f"{job.world_size} process{'es' if job.world_size > 1 else ''}"
    return (
        f"{rows}{len(model.tasks)} tasks; input of {model.input_width:,}; {parameters:,} "
        f"parameters; {steps} of {batch:,}; {processes} on {job.device.type}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for what the caller can mend, 128 + n when
    signal n stopped it.
    """
    parser = argparse.ArgumentParser(description="Train the Heavy Ranker.")
    parser.add_argument("--config_path", required=True, help="YAML of RecapConfig's shape")
    parser.add_argument("--save_dir", help="run folder; default: training.save_dir")
    program.add_overrides(parser)
    parser.add_argument(
        "--overwrite_save_dir", action="store_true", help="remove an earlier run first"
    )
    parser.add_argument(
        "--repeat",
        action="store_true",
        help="if the run in save_dir is finished, move it aside and train anew",
    )
    parser.add_argument(
        "--debug_loop",
        action="store_true",
        help="slow and plain: no reading ahead, nothing compiled, every step logged and searched "
        "for NaN",
    )
    parser.add_argument(
        "--describe",
        action="store_true",
        help="print input width, parameters, tasks and FLOPs an example as JSON, and end",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="with SPEC_TYPE=evaluator: measure what is there and end; nobody trains",
    )
    arguments = parser.parse_args(argv)

    def train() -> int | None:
        config = load_config(RecapConfig, arguments.config_path, arguments.overrides)
        if arguments.describe:
            if config.planted is not None:
                planted.ensure(config.planted, config.planted_folder())
            features = describe_features(config.train_data)
            print(json.dumps(describe(config.model, features), indent=2))
            return None
        role = program.role()
        if role == "datasetworker":
            dataset_worker.serve(config)
        save_dir = arguments.save_dir or config.training.save_dir
        if save_dir is None:
            raise ConfigError("no run folder: give --save_dir or set training.save_dir")
        if role == "evaluator":
            return evaluate.follow(config, Path(save_dir), once=arguments.once)
        return run(
            config,
            Path(save_dir),
            overwrite=arguments.overwrite_save_dir,
            repeat=arguments.repeat,
            debug=arguments.debug_loop,
        )

    return program.exit_code(train, arguments.save_dir)


if __name__ == "__main__":
    sys.exit(main())
