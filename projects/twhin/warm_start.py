"""Warm start onto a changed vocabulary: rows of entities that an earlier run knew take its vectors,
whatever their ids are now; rows of new ones start at random or from their neighbours.

The chief matches entities by name and writes what all processes need into `<run>/warm_start/`, in
the order of this run's ids: `<table>.npy` (rows, D) float32, NaN where there is no previous vector.
It stays there: pull and freeze look their rows up in it (`anchors`), also in a run that is taken up
again, and the drift is measured against it. `<run>/warm_start.json` says how many rows matched.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from projects.twhin.anchors import FOLDER, Anchors, map_rows, path_of
from projects.twhin.config import BIAS, ModelConfig, TableConfig, TwhinConfig
from projects.twhin.model import SINGULAR, TwhinModel
from projects.twhin.new_rows import neighbour_starts
from projects.twhin.operators import PARAMETERS
from projects.twhin.previous import INVERSE, Previous, open_previous
from projects.twhin.vocabulary import match, names_of
from projects.twhin.warm_start_config import WarmStartConfig
from tml import distributed, layout, run_folder
from tml.checkpoint import CheckpointError
from tml.config import ConfigError
from tml.data.parquet import DataError
from tml.distributed import Job
from tml.embeddings import NormalRows, RowSource
from tml.logs import MetricLog

REPORT = "warm_start.json"
RUN_FILES = frozenset([FOLDER, f"{FOLDER}.tmp", REPORT])
"""What a warm start leaves in the run folder."""
RELATIONS = "relations.npz"
BLOCK_ROWS = 1 << 16

Ints = NDArray[np.int64]
Report = dict[str, Any]


def check(settings: WarmStartConfig, model: ModelConfig, save_dir: Path) -> None:
    """Refuse what cannot be started from, before an earlier run is removed for it."""
    source = Path(settings.previous).resolve()
    if source == save_dir.resolve() or save_dir.resolve() in source.parents:
        raise ConfigError(
            f"warm_start.previous: {settings.previous} is the run folder itself, where the new run "
            "is to be; give another --save_dir"
        )
    _tables(open_previous(Path(settings.previous)), settings, model)


def begin(
    config: TwhinConfig,
    save_dir: Path,
    model: TwhinModel,
    state: dict[str, Any],
    job: Job,
    log: MetricLog,
) -> None:
    """Give the model of a new run the vectors of the earlier one; every process calls it.

    state: saved name → tensor of the model and its optimizers, changed in place. Raises ConfigError
    or DataError, on the chief, where the earlier run does not fit.
    """
    settings, folder = config.warm_start, save_dir / FOLDER
    assert settings is not None
    if job.is_chief:
        temporary = save_dir / f"{FOLDER}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            report = _write(config, open_previous(Path(settings.previous)), model, state, temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        run_folder.write_json(save_dir / REPORT, report)
        log.say(f"warm start from {report['previous']}")
        log.console.print(_render(report))
    distributed.barrier()
    _fill(config, folder, model, state)
    distributed.barrier()
    if job.is_chief:
        for path in [*_passing(folder), folder / RELATIONS]:
            path.unlink(missing_ok=True)


def anchors(config: TwhinConfig, save_dir: Path) -> Anchors | None:
    """What rows are pulled toward or held at; None where they are not. Raises CheckpointError where
    the run folder lacks it.
    """
    settings, folder = config.warm_start, save_dir / FOLDER
    if settings is None or not (settings.pull or settings.freeze):
        return None
    rows = {table.name: table.num_embeddings for table in config.model.embeddings.tables}
    if settings.freeze and config.model.biases:
        rows |= {name + BIAS: number for name, number in rows.items()}
    known = [name for name in rows if path_of(folder, name).is_file()]
    if not known:
        raise CheckpointError(
            f"{folder} is not there: the run in {save_dir} was not started with warm_start, or "
            "lost it; leave out pull and freeze, or start anew with --overwrite_save_dir"
        )
    for name in known:
        if len(map_rows(folder, name)) != rows[name]:
            raise CheckpointError(
                f"{path_of(folder, name)} has {len(map_rows(folder, name)):,} rows, table {name!r} "
                f"{rows[name]:,}: it is of another run; start anew with --overwrite_save_dir"
            )
    return Anchors(folder, known, settings.pull, freeze=settings.freeze)


# What the chief does


def _write(
    config: TwhinConfig,
    previous: Previous,
    model: TwhinModel,
    state: dict[str, Any],
    folder: Path,
) -> Report:
    """Write the files of all tables and of the relations; returns the report."""
    settings = config.warm_start
    assert settings is not None
    tables: Report = {}
    for name in _tables(previous, settings, config.model):
        table = next(t for t in config.model.embeddings.tables if t.name == name)
        names, before = names_of(table), previous.names(name)
        assert names is not None
        places = match(names, before, name)
        matched = int((places >= 0).sum())
        _write_rows(path_of(folder, name), previous.rows(name), places, f"table {name!r}", names)
        biases = previous.biases(name) if config.model.biases else None
        if biases is not None:
            path = path_of(folder, name + BIAS)
            _write_rows(path, biases[:, None], places, f"biases of table {name!r}", names)
        owners = [name] if biases is None else [name, name + BIAS]
        carried = _write_accumulators(previous, settings, owners, table, places, folder)
        tables[name] = {
            "rows": len(names),
            "matched": matched,
            "new": len(names) - matched,
            "vanished": len(before) - matched,
            "optimizer_state": carried,
        }
    relations = _match_relations(previous, config, state)
    np.savez(folder / RELATIONS, **_relation_state(state))
    if settings.new_rows == "neighbors":
        for name, count in neighbour_starts(config, model.operators, folder, list(tables)).items():
            tables[name]["from_neighbors"] = count
    return {"previous": str(previous.folder), "tables": tables, "relations": relations}


def _tables(previous: Previous, settings: WarmStartConfig, model: ModelConfig) -> list[str]:
    """Names of the tables that start warm; refuses what cannot."""
    wanted = settings.tables or [table.name for table in model.embeddings.tables]
    for name in settings.tables or ():
        if name not in previous.num_rows:
            raise ConfigError(
                f"warm_start.tables: {previous.folder} has no table {name!r}; it has "
                f"{', '.join(previous.num_rows)}"
            )
    found = [table for table in model.embeddings.tables if table.name in wanted]
    found = [table for table in found if table.name in previous.num_rows]
    if not found:
        raise ConfigError(
            f"warm_start.previous: {previous.folder} has the tables {', '.join(previous.num_rows)}"
            f", none of {', '.join(wanted)}"
        )
    for table in found:
        if table.embedding_dim != previous.dim:
            raise ConfigError(
                f"warm_start.previous: the vectors of {previous.folder} have dimension "
                f"{previous.dim}, table {table.name!r} has embedding_dim {table.embedding_dim}; "
                "they must be equal"
            )
        if table.vocab is None:
            raise ConfigError(
                f"warm_start: table {table.name!r} has no vocab, so its entities are not known; "
                "set it (prepare writes one), or leave the table out with warm_start.tables"
            )
        previous.names(table.name)
    return [table.name for table in found]


def _write_rows(
    path: Path, rows: NDArray[np.float32], places: Ints, what: str, names: pa.LargeStringArray
) -> None:
    """Rows by their places, NaN where there is none; refuses values that are no numbers."""
    shape = (len(places), rows.shape[1])
    written = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for start in range(0, len(places), BLOCK_ROWS):
        here = places[start : start + BLOCK_ROWS]
        block = np.full((len(here), rows.shape[1]), np.nan, np.float32)
        block[here >= 0] = rows[here[here >= 0]]
        bad = ~np.isfinite(block).all(axis=1) & (here >= 0)
        if bad.any():
            at = int(np.argmax(bad))
            raise DataError(
                f"warm_start: {what}, entity {names[start + at].as_py()!r} (row {here[at]} of the "
                "previous run): not a finite number; start from an earlier step"
            )
        written[start : start + len(here)] = block
    written.flush()


def _write_accumulators(
    previous: Previous,
    settings: WarmStartConfig,
    owners: list[str],
    table: TableConfig,
    places: Ints,
    folder: Path,
) -> bool:
    """Those of a table, and of its biases, where they are wanted; returns whether there are any."""
    if settings.optimizer_state is False:
        return False
    try:
        for owner in owners:
            _write_accumulator(previous, owner, table.optimizer.kind, places, folder)
    except ConfigError:
        if settings.optimizer_state:
            raise
    return _accumulator_path(folder, table.name).is_file()


def _write_accumulator(
    previous: Previous, name: str, kind: str, places: Ints, folder: Path
) -> None:
    """Accumulators of matched rows, 0 for new ones."""
    before, values = previous.accumulator(name)
    if kind == "adam" or before != kind:
        reason = (
            "the moments of Adam are not carried over"
            if kind == before
            else f"it was trained with {before} and is with {kind} now"
        )
        raise ConfigError(f"warm_start.optimizer_state: table {name!r}: {reason}; set it to false")
    if values is None:
        return
    carried = np.zeros((len(places), *values.shape[1:]), np.float32)
    carried[places >= 0] = values[places[places >= 0]]
    np.save(_accumulator_path(folder, name), carried)


def _match_relations(
    previous: Previous, config: TwhinConfig, state: dict[str, Any]
) -> dict[str, list[str]]:
    """Copy the parameters of relations of the same name and operator into `state`; returns the
    names of those matched, new and vanished, a second direction as `<name>:inverse`.
    """
    relations = config.model.relations
    operators = {relation.name: relation.operator for relation in relations}
    if config.model.reciprocal:
        operators |= {relation.name + INVERSE: relation.operator for relation in relations}
    before = previous.relations()
    settings = config.warm_start
    assert settings is not None
    matched = []
    for number, (name, operator) in enumerate(operators.items()):
        found = before.get(name)
        if found is None or found.operator != operator:
            continue
        matched.append(name)
        for key in PARAMETERS[operator]:
            if not torch.isfinite(found.parameters[key]).all():
                raise DataError(
                    f"warm_start: relation {name!r} of {previous.folder}: its {key} hold what is "
                    "not a finite number; start from an earlier step"
                )
            state[key][number] = found.parameters[key]
            accumulator = f"{SINGULAR[key]}_accumulator"
            if (
                settings.optimizer_state is not False
                and key in found.accumulators
                and accumulator in state
            ):
                state[accumulator][number] = found.accumulators[key]
    return {
        "matched": matched,
        "new": [name for name in operators if name not in matched],
        "vanished": [name for name in before if name not in operators],
    }


# What every process does


class WarmRows(RowSource):
    """Rows of a file; those that are NaN there come from another source."""

    def __init__(self, rows: Tensor, others: RowSource) -> None:
        self._rows = rows
        self._others = others

    def __call__(self, start: int, stop: int) -> Tensor:
        """See RowSource."""
        found, others = self._rows[start:stop], self._others(start, stop)
        if found.shape[1] < others.shape[1]:  # the one number of a bias
            others[:, : found.shape[1]] = torch.where(
                found.isnan(), others[:, : found.shape[1]], found
            )
            return others
        return torch.where(found.isnan(), others, found)


def _fill(config: TwhinConfig, folder: Path, model: TwhinModel, state: dict[str, Any]) -> None:
    for number, spec in enumerate(model.tables.specs):
        if not path_of(folder, spec.name).is_file():
            continue
        source: RowSource = NormalRows(config.training.seed, number, spec)
        if (path := path_of(folder, spec.name + ".start")).is_file():
            source = WarmRows(map_rows(folder, path.stem), source)
        try:
            model.tables.fill(spec.name, WarmRows(map_rows(folder, spec.name), source))
        except ConfigError as error:  # beyond what fp16 holds
            raise ConfigError(f"warm_start: table {spec.name!r}: {error}") from error
        if (path := _accumulator_path(folder, spec.name)).is_file():
            _copy(np.load(path, mmap_mode="r"), state[f"tables.{spec.name}.accumulator"])
    with np.load(folder / RELATIONS) as saved:
        for name, values in saved.items():
            state[name].copy_(torch.from_numpy(values))


@torch.no_grad()
def _copy(values: NDArray[np.float32], target: Any) -> None:
    """Overwrite a tensor, or this process's shards of one."""
    parts = [(target, 0)]
    if hasattr(target, "local_shards"):
        parts = [(s.tensor, s.metadata.shard_offsets[0]) for s in target.local_shards()]
    for tensor, first in parts:
        rows = np.array(values[first : first + len(tensor)])
        tensor.copy_(torch.from_numpy(rows).view(tensor.shape))


def _relation_state(state: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the relations and their accumulators."""
    names = [*SINGULAR, *(f"{name}_accumulator" for name in SINGULAR.values())]
    return {name: state[name].detach().cpu().numpy() for name in names if name in state}


def _accumulator_path(folder: Path, table: str) -> Path:
    return folder / f"{table}.accumulator.npy"


def _passing(folder: Path) -> Iterator[Path]:
    """Files that only the start needs."""
    yield from folder.glob("*.start.npy")
    yield from folder.glob("*.accumulator.npy")


# What a person sees


def _render(report: Report) -> RenderableType:
    headings = ("rows", "matched", "", "new", "from neighbors", "vanished", "optimizer")
    table = layout.table(["table"], headings)
    for name, row in report["tables"].items():
        table.add_row(
            Text(name),
            f"{row['rows']:,}",
            f"{row['matched']:,}",
            f"{row['matched'] / row['rows']:.1%}",
            f"{row['new']:,}",
            f"{row['from_neighbors']:,}" if "from_neighbors" in row else "–",
            f"{row['vanished']:,}",
            "carried over" if row["optimizer_state"] else "anew",
        )
    found = report["relations"]
    words = [f"{len(found[key]):,} {key}" for key in ("matched", "new", "vanished") if found[key]]
    return layout.titled("warm start", table, f"relations: {', '.join(words)}")


def read_report(save_dir: Path) -> Report | None:
    """warm_start.json of a run folder, None where it was started cold."""
    path = save_dir / REPORT
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found
