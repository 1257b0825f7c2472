"""Train TwHIN: config and edges in, vectors and metrics out.

    torchrun --standalone --nnodes 1 --nproc_per_node 1 projects/twhin/run.py \
        --config_yaml_path=projects/twhin/config/local.yaml --save_dir=$HOME/tmp/runs/twhin

The run folder (save_dir) gets config.yaml (resolved), metrics.jsonl (one record an interval), a
step folder a checkpoint, metrics.json and vectors/. Started again with the same command, a run goes
on from its last complete step folder.

SPEC_TYPE=evaluator makes of the same command one that follows the checkpoints of the run, and
SPEC_TYPE=datasetworker one that reads the training data for it (TML_DATASETWORKERS names those).
"""

import tml.machines.short_waits  # noqa: F401  # isort: skip (before torch)

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from projects.twhin import (
    dataset_worker,
    drift,
    evaluator,
    export,
    finished,
    finite,
    planted,
    vocabulary,
    warm_start,
)
from projects.twhin.best import forget_marks
from projects.twhin.config import DataConfig, TwhinConfig
from projects.twhin.data import (
    COLUMNS,
    VALIDATION_STEP,
    EdgeBatch,
    EdgeLayout,
    build_reader,
    read_batches,
)
from projects.twhin.dataset_worker import training_reader
from projects.twhin.evaluate import evaluate_split
from projects.twhin.given_config import load_given
from projects.twhin.model import (
    TwhinModel,
    build_relation_optimizer,
    seed_dropout,
    table_specs,
)
from projects.twhin.precision import uses_bfloat16
from projects.twhin.ranking import Report
from projects.twhin.report import render
from projects.twhin.validation import Validation, kept_steps
from tml import checkpoint, distributed, logs, program, run_folder
from tml.config import ConfigError, to_yaml
from tml.data.parquet import DataError, ParquetRows, Position
from tml.data.prefetch import prefetch
from tml.distributed import Job
from tml.embeddings import ArrayRows, build_tables
from tml.follow import EVALUATION
from tml.logs import MetricLog
from tml.machines import container
from tml.memory import keep_freed_memory
from tml.optimizers import end_schedules, is_optimizer_state, set_learning_rate
from tml.train import DivergedError, GivenUpError, Loop, Progress, StepResult, StopSignal

logger = logging.getLogger(__name__)

VECTORS = "vectors"
RUN_FILES = frozenset([VECTORS, EVALUATION]) | warm_start.RUN_FILES
"""What a run leaves beside step folders, config and metrics."""


def run(
    config: TwhinConfig,
    save_dir: Path,
    *,
    overwrite: bool = False,
    repeat: bool = False,
    evaluates: bool = True,
) -> int | None:
    """Train, evaluate and export in this process, one of the job's; returns None, or the number of
    the signal that stopped it.

    overwrite: what an earlier run left in save_dir is removed first. repeat: a finished run there
    is moved aside.
    """
    with distributed.join(config.training.eval_timeout_in_s) as job:
        logs.set_up(job.rank)
        if job.is_chief:
            _announce_ignored(config)
        if container.vanishes(save_dir):
            logger.warning("warning: %s", container.advice("--save_dir", save_dir))
        torch.backends.cuda.matmul.allow_tf32 = config.runtime.enable_tensorfloat32

        # Data. The chief makes what is missing; the others wait.
        if config.planted is not None and job.is_chief:
            planted.ensure(config.planted, planted.folder_of(config.train_data.data_root))
        distributed.barrier()
        layout = EdgeLayout(config.model)
        layout.count_degrees(config.train_data)
        seed, data = config.training.seed, config.train_data
        reader = training_reader(config, layout, job)
        steps_of_epochs = reader.steps_from(Position())
        all_steps = config.training.last_step(0, steps_of_epochs)
        if job.is_chief:
            _announce_uneven(config, all_steps, steps_of_epochs)
        scheduled = end_schedules(config.model, all_steps, "model")
        for held_out in (config.validation_data, config.test_data):
            if held_out is not None:  # what is wrong with it is said now, not after training
                ParquetRows(held_out.data_root, COLUMNS, held_out.offset, held_out.limit)
        vocabulary.check_lengths(config.model)
        vocabularies = vocabulary.fingerprints(config.model) if job.is_chief else {}

        # Run folder.
        if job.is_chief:
            anew = run_folder.starts_anew(save_dir, overwrite=overwrite, repeat=repeat)
            if config.warm_start is not None and anew:
                warm_start.check(config.warm_start, config.model, save_dir)
            run_folder.make_room(save_dir, RUN_FILES, overwrite=overwrite, repeat=repeat)
        distributed.barrier()
        log = MetricLog(save_dir, job.rank)

        # Model and optimizer; the tables carry theirs.
        specs = table_specs(scheduled)
        tables = build_tables(specs, job, seed, as_a_whole=data.all_negatives)
        amp = uses_bfloat16(config.runtime, job.device)
        model = TwhinModel(config.model, tables, amp=amp, seed=seed)
        model.to(job.device)
        optimizer, optimizer_state = build_relation_optimizer(config.model, model)
        parameters = model.relation_parameters()
        relations = {name: parameter.data for name, parameter in parameters.items()}
        state = {**tables.state(), **relations, **optimizer_state}

        # Resuming is the normal path: a run starts from its last complete step folder where there
        # is one.
        position, progress = Position(), Progress()
        if steps := checkpoint.complete_steps(save_dir):
            folder = save_dir / str(steps[-1])
            meta = checkpoint.load_meta(folder)
            if job.is_chief:
                vocabulary.refuse_another(folder, meta, vocabularies)
            distributed.barrier()
            position = Position.from_json(meta["data_position"])
            progress = Progress.from_json(meta, position, chief=job.is_chief)
            checkpoint.load(folder, state)
            if job.is_chief:
                run_folder.announce_changes(folder, config)
            log.say(f"resuming {save_dir} at step {progress.step:,}")
        else:
            _initialise(config, tables.fill, state, vocabularies)
            if config.warm_start is not None:
                warm_start.begin(config, save_dir, model, state, job, log)
        model.anchors = warm_start.anchors(config, save_dir)
        log.rewind(progress.step)
        if job.is_chief:
            forget_marks(save_dir, progress.step)
            (save_dir / checkpoint.CONFIG).write_text(to_yaml(config))
        validation, ended, stop = None, False, StopSignal()
        if (during := config.evaluation.during_training) is not None:
            validation = Validation(config, save_dir, job, log, stop)
            ended = validation.resume(progress)
        left = 0 if ended else reader.steps_from(position)
        total_steps = config.training.last_step(progress.step, left)
        if job.is_chief and progress.step < total_steps:
            (save_dir / run_folder.METRICS).unlink(
                missing_ok=True
            )  # of the run before it was prolonged
        log.say(_describe(config, job, reader.num_rows, total_steps))

        def update(batch: EdgeBatch, step: int) -> StepResult:
            rates = tables.set_learning_rates(step)
            rates["translation"] = scheduled.translation_optimizer.learning_rate_at(step)
            set_learning_rate(optimizer, rates["translation"])
            if config.model.embedding_dropout:
                seed_dropout(seed, step, job)
            loss_sum = model(batch, data)
            # The mean over all processes' edges: engines average gradients over the processes.
            (loss_sum * (job.world_size / batch.num_edges_all)).backward()
            distributed.average_gradients(parameters.values())
            optimizer.step()
            optimizer.zero_grad()
            if step == 0 or step == progress_at_start:
                elapsed = run_folder.seconds_since_start()
                log.say(f"first step done {elapsed:.1f} s after the process started")
            return StepResult(loss_sum.detach(), batch.num_edges_all, rates)

        progress_at_start = progress.step

        def save(progress: Progress) -> None:
            finite.refuse_infinite(tables, state, progress.step)
            meta = {**progress.to_json(), **run_folder.provenance(job)}
            meta[vocabulary.META_KEY] = vocabularies
            keep, best = config.training.checkpoint_max_to_keep, kept_steps(save_dir)
            checkpoint.save(save_dir, progress.step, state, meta, to_yaml(config), keep, best)

        validate = None
        if config.validation_data is not None:
            validate = partial(_validate, config, config.validation_data, layout, job, model, stop)
        loop: Loop[EdgeBatch] = Loop(
            job=job,
            log=log,
            update=update,
            save=save,
            total_steps=total_steps,
            log_every=config.training.train_log_every_n,
            unit="edges",
            checkpoint_every=config.training.checkpoint_every_n,
            validate=validate,
            validate_every=config.training.eval_log_every_n,
            measure=None if validation is None else validation.measure,
            measure_every=None if during is None else during.every_n,
            measure_every_examples=None if during is None else during.interval(reader.num_rows),
            stop=stop,
        )
        batches = read_batches(reader, layout, data, job, seed, position, progress.step)
        if job.device.type == "cpu":
            keep_freed_memory()
        with prefetch(batches) as ahead:
            try:
                stopped_by = loop.run(ahead, progress)
            except DivergedError:
                finite.refuse_infinite(tables, state, progress.step)  # which row it was
                raise
        if stopped_by is not None:
            log.say(
                f"stopped by signal {stopped_by} after step {progress.step:,}; saved, "
                "start again to go on"
            )
            return stopped_by

        # What was learned, read back from a step folder: what is measured is what was saved.
        ends: Report = {"step": progress.step}
        if validation is not None and (best_step := progress.best.step) is not None:
            ends["best_step"] = best_step
            log.say(
                f"step {best_step:,} of {progress.step:,} is the best by validation: it is what is "
                "exported and tested"
            )
        split = "test" if config.test_data else "validation"
        measured, there = None, finished.Found()
        if job.is_chief and evaluates and (config.test_data or config.validation_data):
            measured = finished.how_measured(config, split)
        if job.is_chief and progress.step and progress.step == progress_at_start:
            there = finished.look(save_dir, save_dir / VECTORS, ends, measured)
            log.say(
                f"the run is finished, nothing is left to train: step {progress.step:,} of "
                f"{total_steps:,}; {there.in_words}; --repeat moves {save_dir} aside and trains "
                "anew, --overwrite_save_dir removes it first"
            )
            if there.report is not None:
                log.console.print(render(there.report))
        measured, there = distributed.gather((measured, there))[0]
        if there.is_whole:
            run_folder.end_again(save_dir, job)
            return None
        folder = save_dir / str(ends.get("best_step", progress.step))
        vectors = export.load_vectors(folder, config.model)
        if job.is_chief and there.vectors is None:
            step = int(folder.name)
            paths = export.export_vectors(vectors, config.model, save_dir / VECTORS, step=step)
            log.say(f"vectors: {export.listed(paths)}")
        if there.report is not None:
            run_folder.end_again(save_dir, job)
            distributed.barrier()
            return None
        report: Report = {}
        if measured is not None:
            ends[finished.MEASURED] = measured
            report = evaluate_split(config, split, vectors, job)
            if job.is_chief:
                log.console.print(render(report))
                log.write("metrics", {**ends, **report})
        if job.is_chief:
            if (moved := drift.of_run(save_dir, vectors.tables)) is not None:
                report["drift"] = moved
                log.console.print(drift.render(moved))
            # Also without a report: it says that the run is finished.
            run_folder.write_json(save_dir / run_folder.METRICS, {**ends, **report})
            log.say(f"metrics: {save_dir / run_folder.METRICS}")
        distributed.barrier()
        return None


@torch.no_grad()
def _validate(
    config: TwhinConfig,
    data: DataConfig,
    layout: EdgeLayout,
    job: Job,
    model: TwhinModel,
    stop: StopSignal,
) -> dict[str, float]:
    """Mean loss of num_eval_steps batches of the validation data (all where unset); nothing is
    updated. Raises GivenUpError where a signal has come to a process.

    Where the validation data names no negatives, they are those of the training data: without any,
    the loss says nothing.
    """
    if not (data.global_negatives or data.in_batch_negatives or data.all_negatives):
        names = [
            "global_negatives",
            "in_batch_negatives",
            "chunk_size",
            "degree_power",
            "all_negatives",
            "asks",
        ]
        if config.train_data.all_negatives:  # as many scores as in training
            names.append("per_replica_batch_size")
        data = data.model_copy(update={name: getattr(config.train_data, name) for name in names})
    reader = build_reader(data, layout, job, config.training.seed, 1, 1)
    batches = read_batches(
        reader, layout, data, job, config.training.seed, Position(), VALIDATION_STEP
    )
    sums = torch.zeros(1, dtype=torch.float64)
    num_edges = 0
    for number, (batch, _) in enumerate(batches):
        if number == config.training.num_eval_steps:
            break
        if distributed.any_process(stop.number is not None):  # lookups are made together
            raise GivenUpError
        sums += model(batch, data).to("cpu", torch.float64)
        num_edges += batch.num_edges_all
    # A grouped pass of training asks for one side: its losses are those of half an edge.
    num_passes = 2 if config.train_data.grouped and data.asks == "both" else 1
    return {"loss": float(distributed.all_reduce_sum(sums)) / num_edges / num_passes}


def _initialise(
    config: TwhinConfig,
    fill: Any,
    state: dict[str, Any],
    vocabularies: vocabulary.Fingerprints,
) -> None:
    """Start from an earlier model, or tables from files, where the config says so."""
    if config.training.initial_checkpoint_dir is not None:
        folder = Path(config.training.initial_checkpoint_dir)
        model = {name: value for name, value in state.items() if not is_optimizer_state(name)}
        vocabulary.refuse_another(folder, checkpoint.load_meta(folder), vocabularies)
        checkpoint.load(folder, model)
    for table in config.model.embeddings.tables:
        if table.pretrained is None:
            continue
        try:
            # "c": torch warns of memory that may not be written to; nothing is.
            rows = np.load(table.pretrained, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"pretrained {table.pretrained} cannot be read: {error}") from error
        if rows.shape != (table.num_embeddings, table.embedding_dim):
            raise DataError(
                f"pretrained {table.pretrained} has shape {rows.shape}, table {table.name!r} needs "
                f"{(table.num_embeddings, table.embedding_dim)}"
            )
        if not np.isfinite(rows).all():
            row = int(np.argmin(np.isfinite(rows).all(axis=1)))
            raise DataError(f"pretrained {table.pretrained}, row {row}: not a finite number")
        try:
            fill(table.name, ArrayRows(torch.from_numpy(np.asarray(rows, dtype=np.float32))))
        except ConfigError as error:  # beyond what fp16 holds
            raise ConfigError(f"pretrained {table.pretrained}: {error}") from error


def _announce_ignored(config: TwhinConfig) -> None:
    if config.runtime.wandb is not None:
        logger.warning("runtime.wandb is set but not used: metrics are in metrics.jsonl")
    if config.validation_data is None:
        for name in ("num_eval_steps", "eval_log_every_n"):
            if getattr(config.training, name) is not None:
                logger.warning("training.%s is set but not used: there is no validation_data", name)
    if config.test_data is not None:
        unused = set(DataConfig.model_fields) - {"data_root", "limit", "offset"}
        for name in sorted(unused & config.test_data.model_fields_set):
            logger.warning("test_data.%s is set but not used: test edges are only ranked", name)


def _announce_uneven(config: TwhinConfig, total_steps: int, steps_of_epochs: int) -> None:
    """Say where num_train_steps ends training while passes by turns have asked for one side more
    often. steps_of_epochs: steps of num_epochs passes.
    """
    data = config.train_data
    if not data.grouped or data.asks != "both":
        return
    steps_of_pass = steps_of_epochs // config.training.num_epochs
    pairs, rest = divmod(total_steps, 2 * steps_of_pass)
    tails = pairs * steps_of_pass + min(rest, steps_of_pass)
    if tails != (heads := total_steps - tails):
        logger.warning(
            "training.num_train_steps: %s steps ask for tails in %s and for heads in %s of them, "
            "by passes of %s steps (train_data.grouped); a multiple of %s asks for both alike",
            *(f"{n:,}" for n in (total_steps, tails, heads, steps_of_pass, 2 * steps_of_pass)),
        )


def _describe(config: TwhinConfig, job: Job, num_edges: int, total_steps: int) -> str:
    tables = config.model.embeddings.tables
    rows = ", ".join(f"{table.num_embeddings:,} {table.name}" for table in tables)
    processes = f"{job.world_size} process{'es' if job.world_size > 1 else ''}"
    num_relations = len(config.model.relations)
    return (
        f"{num_edges:,} edges, {num_relations} relation{'s' * (num_relations > 1)}; {rows}; D = "
        f"{tables[0].embedding_dim}; {total_steps:,} steps of {config.training.num_epochs} "
        f"epoch{'s' if config.training.num_epochs > 1 else ''}; {processes} on {job.device.type}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for what the caller can mend, 128 + n when
    signal n stopped it.
    """
    parser = argparse.ArgumentParser(description="Train TwHIN.")
    parser.add_argument(
        "--config_yaml_path", type=Path, required=True, help="YAML of TwhinConfig's shape"
    )
    parser.add_argument("--save_dir", type=Path, help="run folder; default: training.save_dir")
    parser.add_argument(
        "--graph",
        type=Path,
        help="folder that prepare.py wrote; its graph.yaml is laid under the config",
    )
    parser.add_argument(
        "--warm_start",
        metavar="RUN",
        help="start from the vectors of an earlier run, matched by entity (warm_start.previous)",
    )
    program.add_overrides(parser)
    parser.add_argument(
        "--overwrite_save_dir", action="store_true", help="remove an earlier run first"
    )
    parser.add_argument(
        "--repeat",
        action="store_true",
        help="if the run in save_dir is finished, move it aside and train anew",
    )
    parser.add_argument("--no_evaluation", action="store_true", help="train and export only")
    parser.add_argument(
        "--once",
        action="store_true",
        help="with SPEC_TYPE=evaluator: measure what is there and end; nobody trains",
    )
    arguments = parser.parse_args(argv)

    def train() -> int | None:
        overrides = list(arguments.overrides)
        if arguments.warm_start is not None:
            overrides.append(f"warm_start.previous={json.dumps(arguments.warm_start)}")
        config = load_given(arguments.config_yaml_path, arguments.graph, overrides)
        role = program.role()
        if role == "datasetworker":
            dataset_worker.serve(config)
        save_dir = arguments.save_dir or config.training.save_dir
        if save_dir is None:
            raise ConfigError("no run folder: give --save_dir or set training.save_dir")
        if role == "evaluator":
            return evaluator.follow(config, Path(save_dir), once=arguments.once)
        return run(
            config,
            Path(save_dir),
            overwrite=arguments.overwrite_save_dir,
            repeat=arguments.repeat,
            evaluates=not arguments.no_evaluation,
        )

    return program.exit_code(train, arguments.save_dir)


if __name__ == "__main__":
    sys.exit(main())
