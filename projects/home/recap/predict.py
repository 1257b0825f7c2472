"""Score rows with a trained ranker: TFRecord or parquet in, parquet out.

    python projects/home/recap/predict.py --run ~/tmp/runs/recap --inputs 'data/*.gz' \
        --output scores.parquet [--weights projects/home/recap/config/weights_2023.yaml]

The output has a row for each row read, in the order of the files: the data's id features, a column
`probability.<task>` a task (float32, calibrated as the model is), and with --weights `score`, the
sum of weight · probability (float64). Labels are not needed.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from projects.home.recap.config import RecapConfig
from projects.home.recap.data.batch import RankingBatch
from projects.home.recap.data.dataset import build_dataset, describe_features
from projects.home.recap.model.build import load_model, read_config, resolve_step
from projects.home.recap.model.model import RankingModel
from tml import distributed, logs, program
from tml.config import ConfigError, read_yaml
from tml.data.prefetch import prefetch
from tml.distributed import Job
from tml.train import StopSignal

ROWS_AT_ONCE = 2048


def read_weights(path: str | Path, tasks: Sequence[str]) -> dict[str, float]:
    """Task → weight from a YAML file. Raises ConfigError for a weight that no task of the model
    has; tasks without a weight do not count.
    """
    tree = read_yaml(path)
    try:
        weights = TypeAdapter(dict[str, float]).validate_python(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise ConfigError(f"weights {path}: {where}: {fault['msg']}: {fault['input']!r}") from error
    if unknown := [task for task in weights if task not in tasks]:
        raise ConfigError(
            f"weights {path}: {', '.join(unknown)}: no task of the model; there are "
            f"{', '.join(tasks)}"
        )
    if not weights:
        raise ConfigError(f"weights {path} is empty; name tasks of the model: {', '.join(tasks)}")
    return weights


def predict(
    config: RecapConfig,
    model: RankingModel,
    inputs: str,
    output: Path,
    job: Job,
    weights: dict[str, float] | None = None,
    stop: StopSignal | None = None,
) -> int:
    """Score the files that match `inputs` into the parquet file `output`, which appears when it is
    whole; returns the number of rows. A signal noted in `stop` ends it without a file.
    """
    data = config.train_data.model_copy(
        update={
            "inputs": inputs,
            "explicit_date_inputs": None,
            "explicit_datetime_inputs": None,
            "num_files_to_keep": None,
            "preprocess": _without_sampling(config),
        }
    )
    features = describe_features(data)
    dataset = build_dataset(
        data,
        features,
        job,
        config.training.seed,
        ROWS_AT_ONCE,
        num_epochs=1,
        shuffle=False,
        needs_labels=False,
    )
    new_folders = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    schema = _schema(features.ids, model.tasks, scores=weights is not None)
    num_rows = 0
    try:
        with (
            prefetch(dataset.batches(dataset.start())) as batches,
            pq.ParquetWriter(temporary, schema) as writer,
        ):
            for table in _tables((b for b, _ in batches), config, model, job, schema, weights):
                if stop is not None and stop.number is not None:
                    return num_rows
                writer.write_table(table)
                num_rows += table.num_rows
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
        for folder in new_folders if not output.exists() else ():
            folder.rmdir()
    return num_rows


@torch.no_grad()
def _tables(
    batches: Iterator[RankingBatch],
    config: RecapConfig,
    model: RankingModel,
    job: Job,
    schema: pa.Schema,
    weights: dict[str, float] | None,
) -> Iterator[pa.Table]:
    by_task = np.array([(weights or {}).get(task, 0.0) for task in model.tasks])
    for batch in batches:
        rows = batch.to(job.device)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=config.runtime.enable_amp):
            logits = model(rows, model.lookup(rows))
        probabilities = model.probabilities(logits.float()).cpu().numpy()  # (B, T)
        columns = {name: values.numpy() for name, values in batch.ids.items()}
        for number, task in enumerate(model.tasks):
            columns[f"probability.{task}"] = np.ascontiguousarray(probabilities[:, number])
        if weights is not None:
            columns["score"] = probabilities.astype(np.float64) @ by_task
        yield pa.table(columns, schema=schema)


def _schema(ids: Sequence[str], tasks: Sequence[str], *, scores: bool) -> pa.Schema:
    fields = [pa.field(name, pa.int64()) for name in ids]
    fields += [pa.field(f"probability.{task}", pa.float32()) for task in tasks]
    return pa.schema([*fields, pa.field("score", pa.float64())] if scores else fields)


def _without_sampling(config: RecapConfig) -> object:
    """The preprocessing of features alone: labels are not read, and no row is left out."""
    own = config.train_data.preprocess
    if own is None:
        return None
    return own.model_copy(update={"rectify_labels": None, "downsample_negatives": None})


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Score rows with a trained ranker.")
    parser.add_argument("--run", type=Path, required=True, help="run folder (save_dir)")
    parser.add_argument("--step", type=int, help="step folder; default: the newest complete one")
    parser.add_argument(
        "--inputs", required=True, help="glob of the files; same kind as trained on"
    )
    parser.add_argument("--output", type=Path, required=True, help="parquet file that is written")
    parser.add_argument("--weights", type=Path, help="YAML file, task: weight; adds `score`")
    program.add_overrides(parser, "change one setting of the run's config")
    arguments = parser.parse_args(argv)

    def score() -> int | None:
        folder = resolve_step(arguments.run, arguments.step)
        config = read_config(folder, tuple(arguments.overrides))
        weights = None
        if arguments.weights is not None:
            weights = read_weights(arguments.weights, list(config.model.tasks))
        with distributed.join(config.training.eval_timeout_in_s) as job:
            if job.world_size > 1:
                raise ConfigError(
                    "predict runs in one process; to use several, give each its own --inputs and "
                    "--output"
                )
            logs.set_up(job.rank)
            model, _ = load_model(folder, config, job)
            with StopSignal() as stop:
                rows = predict(
                    config, model, arguments.inputs, arguments.output, job, weights, stop
                )
        if stop.number is not None:
            return stop.number
        Console(soft_wrap=True, highlight=False).print(
            f"{rows:,} rows scored: {arguments.output}", markup=False
        )
        return None

    return program.exit_code(score, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
