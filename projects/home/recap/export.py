"""Hand a trained ranker to other programs: a folder with the model as a torch.export program, as
ONNX and as ONNX with int8 matrix products, each compared with the model on the same rows.

    python projects/home/recap/export.py --run ~/tmp/runs/recap --output ~/tmp/ranker \
        [--step N] [--format torch onnx int8] [--rows 'data/*.gz'] [--num_rows 4096]

The folder needs nothing of this project: `model.pt2`, `model.onnx`, `model.int8.onnx`,
`signature.json` (inputs, tasks, versions, what was measured), `config.yaml` of the run and the
vocabularies of the data. docs/serving.md shows how it is used. It appears when it is whole; where a
format differs from the model by more than its tolerance, nothing is left behind.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from projects.home.recap import serving
from projects.home.recap.config import RecapConfig
from projects.home.recap.data.batch import Features, RankingBatch
from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.dataset import build_dataset, describe_features
from projects.home.recap.data.spec import CategoricalSpec, read_spec
from projects.home.recap.model.build import read_config, resolve_step
from projects.home.recap.model.inference import tensors_of
from projects.home.recap.model.model import RankingModel
from projects.home.recap.serving import Arrays, Scorer
from tml import binary_metrics, checkpoint, layout, logs, program, run_folder
from tml.config import ConfigError
from tml.data.parquet import DataError
from tml.distributed import Job

SIGNATURE = "signature.json"
WRITTEN_BY = "projects/home/recap/export.py"
FILES = {"torch": "model.pt2", "onnx": "model.onnx", "int8": "model.int8.onnx"}
"""Format → file."""
TOLERANCES = {"torch": 1e-6, "onnx": 1e-4, "int8": 0.1}
"""Largest difference of a probability from the model's. A learned calibration, which may be steep,
multiplies what rounding makes of the sums: hence 1e-4 where 1e-6 is usual.
"""
NUM_ROWS = 4096
ROWS_AT_ONCE = 256
SPEED_REPEATS = 3


@dataclass(frozen=True)
class Rows:
    """Labelled rows that every format scores."""

    source: str
    batches: list[RankingBatch]
    features: Features
    tasks: tuple[str, ...]
    """Tasks that AUC is measured for."""

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    def column(self, task: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Labels and weights (N,) of a task."""
        number = self.features.tasks.index(task)
        labels = torch.cat([batch.labels[:, number] for batch in self.batches])
        weights = torch.cat([batch.weights[:, number] for batch in self.batches])
        return labels.numpy(), weights.numpy()


@dataclass(frozen=True)
class Measured:
    """One format beside the model."""

    format: str
    num_bytes: int
    max_difference: float
    """Of a probability, over all rows and tasks."""
    tolerance: float
    examples_per_s: float
    """Of one thread, ROWS_AT_ONCE rows at once, in seconds of its processor time."""
    auc: dict[str, dict[str, float | None]] | None
    """int8 alone: task → AUC of model and int8, and how much it costs; None where a class is
    absent.
    """


def export(
    config: RecapConfig,
    folder: Path,
    output: Path,
    rows: Rows,
    formats: Sequence[str],
    tolerances: dict[str, float] | None = None,
) -> tuple[list[Measured], float]:
    """Write the model of the step folder `folder` into `output`, which is replaced as a whole.
    Returns what was measured for each format, and the examples/s of the model itself.

    Raises ConfigError where a package is missing or a format is further from the model than its
    tolerance, DataError where `output` holds something else.
    """
    serving.check_packages(formats)
    allowed = {**TOLERANCES, **(tolerances or {})}
    with _new_folder(output) as new:
        features = describe_features(config.train_data)
        model = serving.dense_model(folder, config, features)
        expected, own_speed = _score_by_model(model, rows)
        traced, tensors = serving.export_program(model, features)
        names = list(tensors)
        serving.save_program(traced, new / FILES["torch"])
        if set(formats) != {"torch"}:
            serving.save_onnx(traced, tensors, new / FILES["onnx"])
        if "int8" in formats:
            serving.save_int8(new / FILES["onnx"], new / FILES["int8"])
        measured = []
        for one in formats:
            path = new / FILES[one]
            scorer = serving.open_program(path) if one == "torch" else serving.open_onnx(path)
            result = _measure(one, path, scorer, names, expected, rows, model.tasks, allowed[one])
            _refuse_difference(result, len(rows))
            measured.append(result)
        for one in set(FILES) - set(formats):
            for path in _files_of(new / FILES[one]):
                path.unlink()
        shutil.copyfile(folder / checkpoint.CONFIG, new / checkpoint.CONFIG)
        inputs = _describe_inputs(config.train_data, features, tensors, new)
        signature = _signature(folder, model.tasks, inputs, measured, rows)
        signature["files"] = sorted(
            path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()
        )
        run_folder.write_json(new / SIGNATURE, signature)
    return measured, own_speed


def read_rows(config: RecapConfig, glob: str | None, num_rows: int) -> Rows:
    """The first `num_rows` rows of the files that match `glob`, of the kind trained on; without a
    glob, of the first validation partition.
    """
    if glob is not None:
        source, tasks = glob, tuple(config.model.tasks)
        no_dates = {"explicit_date_inputs": None, "explicit_datetime_inputs": None}
        data = config.train_data.model_copy(
            update={"inputs": glob, "num_files_to_keep": None, **no_dates}
        )
    elif config.validation_data:
        name, data = next(iter(config.validation_data.items()))
        source = f"validation_data.{name}"
        tasks = tuple(data.evaluation_tasks or config.model.tasks)
    else:
        raise ConfigError(
            "the run has no validation_data, whose rows the formats are compared on; give --rows"
        )
    features = describe_features(data)
    dataset = build_dataset(
        data,
        features,
        _one_process(),
        config.training.seed,
        min(ROWS_AT_ONCE, num_rows),
        num_epochs=1,
        shuffle=False,
    )
    batches: list[RankingBatch] = []
    left = num_rows
    for batch, _ in dataset.batches(dataset.start()):
        batches.append(batch.slice(0, min(left, len(batch))))
        left -= len(batches[-1])
        if not left:
            break
    if not batches:
        raise DataError(f"{source} has no rows; the formats are compared on them")
    return Rows(source, batches, features, tasks)


def _one_process() -> Job:
    return Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


# Comparing


@torch.no_grad()
def _score_by_model(model: RankingModel, rows: Rows) -> tuple[NDArray[np.float32], float]:
    """((N, T) probabilities in float32, examples/s of one thread)."""
    scores = [model.probabilities(model(batch)).numpy() for batch in rows.batches]
    first = rows.batches[0]
    speed = _examples_per_s(len(first), lambda: model.probabilities(model(first)))
    return np.concatenate(scores), speed


def _measure(
    name: str,
    path: Path,
    scorer: Scorer,
    inputs: Sequence[str],
    expected: NDArray[np.float32],
    rows: Rows,
    tasks: Sequence[str],
    tolerance: float,
) -> Measured:
    arrays = [_arrays(batch, rows.features, inputs) for batch in rows.batches]
    found = np.concatenate([scorer(one) for one in arrays])
    return Measured(
        format=name,
        num_bytes=sum(one.stat().st_size for one in _files_of(path)),
        # The maximum of NaN is NaN, which no tolerance allows.
        max_difference=float(np.abs(found.astype(np.float64) - expected).max()),
        tolerance=tolerance,
        examples_per_s=_examples_per_s(len(rows.batches[0]), lambda: scorer(arrays[0])),
        auc=_auc_cost(expected, found, rows, tasks) if name == "int8" else None,
    )


def _arrays(batch: RankingBatch, features: Features, names: Sequence[str]) -> Arrays:
    tensors = tensors_of(batch, features)
    return {name: np.ascontiguousarray(tensors[name].numpy()) for name in names}


def _auc_cost(
    expected: NDArray[np.float32], found: NDArray[np.float32], rows: Rows, tasks: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    costs = {}
    for task in rows.tasks:
        labels, weights = rows.column(task)
        number = list(tasks).index(task)
        before, after = (
            binary_metrics.auc(scores[:, number], labels, weights) for scores in (expected, found)
        )
        values = {"model": before, "int8": after, "cost": before - after}
        costs[task] = {key: None if math.isnan(v) else v for key, v in values.items()}
    return costs


def _examples_per_s(num_rows: int, score: Any) -> float:
    """Best of SPEED_REPEATS, of one thread, in its own processor time: what else runs on the
    machine does not count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = math.inf
        with torch.no_grad():
            for _ in range(SPEED_REPEATS):
                started = time.thread_time()
                score()
                best = min(best, time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return num_rows / best


def _refuse_difference(measured: Measured, num_rows: int) -> None:
    if measured.max_difference <= measured.tolerance:
        return
    raise ConfigError(
        f"format {measured.format}: a probability differs by {measured.max_difference:.2g} from "
        f"the model's on {num_rows:,} rows, more than {measured.tolerance:g}; nothing was written. "
        f"Leave {measured.format} out of --format, or allow more: --tolerance "
        f"{measured.format}=VALUE"
    )


# The folder


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes `output` at the end, and is removed on an error."""
    output = Path(os.path.realpath(output))
    _check_ours(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"{output} cannot be written: {error.strerror}: {error.filename}; choose another "
            "--output"
        ) from error
    try:
        yield temporary
        # Looked at again: what was put there in the meantime is not ours to remove.
        _check_ours(output)
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_ours(output: Path) -> None:
    """Raises DataError where `output` holds anything that this program has not written."""
    if not output.exists():
        return
    found: list[str] = []
    if output.is_dir():
        found = [p.relative_to(output).as_posix() for p in output.rglob("*") if not p.is_dir()]
        if not found:
            return
        try:
            signature = json.loads((output / SIGNATURE).read_text())
            known = {SIGNATURE, *signature["files"]}
            if signature["written_by"] == WRITTEN_BY and set(found) <= known:
                return
            found = sorted(set(found) - known) or found
        except (OSError, ValueError, KeyError, TypeError):
            pass
    such_as = f", such as {found[0]}" if found else ""
    raise DataError(
        f"{output} holds something else than an exported ranker{such_as}; choose another --output"
    )


def _files_of(path: Path) -> list[Path]:
    """The file of a format, and the one beside it that its weights may be in."""
    return [one for one in (path, path.with_name(f"{path.name}.data")) if one.exists()]


# The signature


def _signature(
    folder: Path,
    tasks: Sequence[str],
    inputs: list[dict[str, Any]],
    measured: Sequence[Measured],
    rows: Rows,
) -> dict[str, Any]:
    packages = ["torch", "numpy"]
    if any(one.format != "torch" for one in measured):
        packages += serving.PACKAGES
    return {
        "written_by": WRITTEN_BY,
        "time": time.time(),
        "step": checkpoint.load_meta(folder)["step"],
        "config": checkpoint.CONFIG,
        "versions": {name: version(name) for name in packages},
        "inputs": inputs,
        "tasks": list(tasks),
        "output": {
            "name": serving.OUTPUT,
            "dtype": "float32",
            "shape": ["batch", len(tasks)],
            "meaning": "probability of each task, calibrated as the model is; columns: tasks",
        },
        "formats": {
            one.format: {
                "file": FILES[one.format],
                "bytes": one.num_bytes,
                "max_difference": one.max_difference,
                "tolerance": one.tolerance,
                "examples_per_s": one.examples_per_s,
                **({"auc": one.auc} if one.auc is not None else {}),
            }
            for one in measured
        },
        "compared_on": {
            "rows": rows.source,
            "num_rows": len(rows),
            "rows_at_once": len(rows.batches[0]),
        },
    }


def _describe_inputs(
    data: RecapDataConfig, features: Features, tensors: dict[str, torch.Tensor], new: Path
) -> list[dict[str, Any]]:
    """Name, type, shape and meaning of each input; vocabularies are copied into `new`."""
    spec = read_spec(data.feature_spec) if data.feature_spec else None
    described = []
    for name, example in tensors.items():
        kind, _, feature = name.partition(".")
        shape: list[Any] = ["batch", *example.shape[1:]]
        if kind == "bags":
            shape[1] = "length"
        one: dict[str, Any] = {
            "name": name,
            "dtype": str(example.dtype).removeprefix("torch."),
            "shape": shape,
            "meaning": _meaning(kind, feature, data),
        }
        renamed = data.seg_dense_schema.renamed_features if data.seg_dense_schema else {}
        if (feature or kind) in renamed:
            one["record_feature"] = renamed[feature or kind]
        columns = {"continuous": features.continuous_names, "binary": features.binary_names}
        if columns.get(kind):
            one["columns"] = list(columns[kind])
        if kind in ("categorical", "bags"):
            sizes = features.categorical if kind == "categorical" else features.bags
            one["num_rows"] = sizes[feature]
            if spec is not None and data.feature_spec is not None:
                place = Path(data.feature_spec).parent
                own = (spec.categorical if kind == "categorical" else spec.bags)[feature]
                one |= _row_numbers(own, name, place, new)
        described.append(one)
    return described


def _meaning(kind: str, feature: str, data: RecapDataConfig) -> str:
    looked_up = {table.name: table for table in data.vector_tables}
    if feature in looked_up:
        table = looked_up[feature]
        return f"vector of the row's {table.by} in {table.path}; zeros where it has none"
    return {
        "continuous": "numbers as they are in the data, not normalised, cut as train_data."
        "preprocess of config.yaml says; NaN and infinity count as 0",
        "binary": "0 or 1, cut as train_data.preprocess of config.yaml says",
        "discrete": "any whole numbers; the model hashes them",
        "vector": f"vector {feature}, made elsewhere; zeros where there is none",
        "categorical": "row number, 0 = unknown; what is no row number counts as unknown",
        "bags": "row numbers, 0 = unknown; -1 after the end of a shorter list",
        "ids": f"{feature}: any whole number; the model hashes it",
    }[kind]


def _row_numbers(spec: CategoricalSpec, name: str, place: Path, new: Path) -> dict[str, Any]:
    """How values of the data become row numbers."""
    if spec.hash_rows is not None:
        return {
            "hash_rows": spec.hash_rows,
            "hash_meaning": "row number = hash mod (hash_rows - 1) + 1, 0 where the value is "
            "missing; hash: splitmix64 of a whole number, the little-endian BLAKE2b digest of 8 "
            "bytes of a text in UTF-8; all unsigned, of 64 bits",
        }
    # prepare's rows are numbered already; its vocabularies lie beside its spec.
    source = place / (spec.vocabulary or Path("vocabularies", f"{name}.parquet"))
    if spec.vocabulary is None and not source.is_file():
        return {}
    copy = new / "vocabularies" / f"{name}.parquet"
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, copy)
    return {
        "vocabulary": copy.relative_to(new).as_posix(),
        "vocabulary_source": str(source.resolve()),
        "vocabulary_meaning": "row i of column `value`, counted from 0, is row number i + 1",
    }


# The command line


def show(measured: Sequence[Measured], own_speed: float, rows: Rows, console: Console) -> None:
    """Print what was measured."""
    headings = ("MB", "max difference", "allowed", "examples/s, 1 thread")
    table = layout.table(["format"], headings)
    table.add_row("model", "", "", "", f"{own_speed:,.0f}")
    for one in measured:
        table.add_row(
            one.format,
            f"{one.num_bytes / 1e6:,.1f}",
            f"{one.max_difference:.2g}",
            f"{one.tolerance:g}",
            f"{one.examples_per_s:,.0f}",
        )
    console.print(layout.titled(f"{len(rows):,} rows of {rows.source}", table))
    for one in measured:
        for task, values in (one.auc or {}).items():
            before, after, cost = values["model"], values["int8"], values["cost"]
            if before is None or after is None or cost is None:
                told = "these rows have one label only"
            else:
                told = f"{before:.5f}, int8 {after:.5f}, cost {cost:+.5f}"
            console.print(f"AUC of {task}: {told}", markup=False)


def _tolerances(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in FILES or not number >= 0:
            raise ConfigError(
                f"--tolerance {one!r}: write FORMAT=VALUE, FORMAT one of {', '.join(FILES)}, "
                "VALUE a probability such as 0.05"
            )
        found[name] = number
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Hand a trained ranker to other programs.")
    parser.add_argument("--run", type=Path, required=True, help="run folder (save_dir)")
    parser.add_argument("--step", type=int, help="step folder; default: the newest complete one")
    parser.add_argument("--output", type=Path, required=True, help="folder that is written")
    parser.add_argument(
        "--format", nargs="+", choices=FILES, default=list(FILES), help="default: all"
    )
    parser.add_argument(
        "--rows",
        help="glob of labelled files that the formats are compared on, same kind as trained on; "
        "default: the first partition of validation_data",
    )
    parser.add_argument("--num_rows", type=int, default=NUM_ROWS, help="default: %(default)s")
    parser.add_argument(
        "--tolerance",
        action="append",
        default=[],
        metavar="FORMAT=VALUE",
        help=f"largest difference of a probability; default: {TOLERANCES}; repeatable",
    )
    program.add_overrides(parser, "change one setting of the run's config")
    arguments = parser.parse_args(argv)

    def run() -> None:
        logs.set_up(0)
        if arguments.num_rows < 1:
            raise ConfigError(f"--num_rows {arguments.num_rows}: must be at least 1")
        tolerances = _tolerances(arguments.tolerance)
        formats = [name for name in FILES if name in arguments.format]
        serving.check_packages(formats)
        folder = resolve_step(arguments.run, arguments.step)
        _check_ours(arguments.output)
        config = read_config(folder, tuple(arguments.overrides))
        rows = read_rows(config, arguments.rows, arguments.num_rows)
        measured, own_speed = export(config, folder, arguments.output, rows, formats, tolerances)
        console = Console(soft_wrap=True, highlight=False)
        show(measured, own_speed, rows, console)
        console.print(f"exported: {arguments.output}", markup=False)

    return program.exit_code(run, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
