"""An earlier run as a source of vectors: names, rows, accumulators and relations, from a step
folder or from exported parquet files.

`open_previous` takes a run folder (the step that `best.choose_step` chooses, as for export), a step
folder, or a folder of exported vectors. Names come from the exported `vectors/<table>.parquet` of
the run, or else from the vocabulary that its config names, if that is still the one the run was
made with.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from projects.twhin.best import choose_step
from projects.twhin.config import BIAS, TwhinConfig
from projects.twhin.exported import MATRICES, RELATIONS
from projects.twhin.model import SINGULAR, weight_name
from projects.twhin.operators import PARAMETERS
from projects.twhin.vocabulary import META_KEY, fingerprint, read_names
from tml import checkpoint
from tml.config import ConfigError, load_config
from tml.data.parquet import DataError
from tml.machines import container

VECTORS = "vectors"
INVERSE = ":inverse"
"""What the exported name of a relation's second direction ends in."""
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PreviousRelation:
    """Parameters of one direction of a relation: name (`PARAMETERS`) → row."""

    operator: str
    parameters: dict[str, Tensor]
    accumulators: dict[str, Tensor] = field(default_factory=dict)
    """Of Adagrad, where the source has them."""


class Previous(ABC):
    """Where vectors come from."""

    def __init__(self, folder: Path, dim: int, num_rows: dict[str, int]) -> None:
        self.folder = folder
        self.dim = dim
        self.num_rows = num_rows
        """Table → its rows."""

    @abstractmethod
    def names(self, table: str) -> pa.LargeStringArray:
        """Entities in the order of the rows; raises DataError where they cannot be had."""

    @abstractmethod
    def rows(self, table: str) -> Floats:
        """Vectors (rows, D)."""

    @abstractmethod
    def biases(self, table: str) -> Floats | None:
        """Biases (rows,), None where there are none."""

    @abstractmethod
    def accumulator(self, table: str) -> tuple[str, Floats | None]:
        """The kind of the optimizer of a table (or of its biases) and its accumulator, (rows,) of
        row-wise Adagrad or (rows, D) of Adagrad; None of others. Raises ConfigError where the
        source has no optimizer state.
        """

    @abstractmethod
    def relations(self) -> dict[str, PreviousRelation]:
        """Name → parameters; with reciprocal relations also `<name>:inverse`."""


class StepFolder(Previous):
    """A complete step folder, and what its run folder says of entities."""

    def __init__(self, folder: Path) -> None:
        self._meta = checkpoint.load_meta(folder)
        self._config = load_config(TwhinConfig, folder / checkpoint.CONFIG).model
        self._tables = {table.name: table for table in self._config.embeddings.tables}
        dim = self._config.embeddings.tables[0].embedding_dim
        num_rows = {name: table.num_embeddings for name, table in self._tables.items()}
        super().__init__(folder, dim, num_rows)

    def names(self, table: str) -> pa.LargeStringArray:
        """See Previous."""
        wanted = self._meta.get(META_KEY, {}).get(table, {}).get("entities")
        exported = self.folder.parent / VECTORS / f"{table}.parquet"
        tried = []
        for path in (exported, self._tables[table].vocab):
            if path is None:
                tried.append("its config names no vocab")
                continue
            try:
                names = read_names(path, "vocabulary")
            except DataError as error:
                tried.append(str(error))
                continue
            same = len(names) == self.num_rows[table]
            if same and (wanted is None or fingerprint(names) == wanted):
                return names
            tried.append(f"{path} is of other data")
        raise DataError(
            f"warm_start: the entities of table {table!r} of {self.folder} are not known: "
            f"{'; '.join(tried)}; give a folder of exported vectors that has them, or leave the "
            "table out with warm_start.tables"
        )

    def rows(self, table: str) -> Floats:
        """See Previous."""
        return self._load(weight_name(table))

    def biases(self, table: str) -> Floats | None:
        """See Previous."""
        if not self._config.biases:
            return None
        return np.ascontiguousarray(self._load(weight_name(table + BIAS))[:, 0])

    def accumulator(self, table: str) -> tuple[str, Floats | None]:
        """See Previous."""
        owner = self._tables.get(table) or self._tables[table.removesuffix(BIAS)]
        kind = owner.optimizer.kind
        if kind not in ("adagrad", "rowwise_adagrad"):
            return kind, None
        found = self._load(f"tables.{table}.accumulator")
        return kind, found.reshape(len(found)) if kind == "rowwise_adagrad" else found

    def relations(self) -> dict[str, PreviousRelation]:
        """See Previous."""
        names = [relation.name for relation in self._config.relations]
        kinds = [relation.operator for relation in self._config.relations]
        if self._config.reciprocal:
            names, kinds = names + [name + INVERSE for name in names], kinds * 2
        wanted = [p for kind in kinds for p in PARAMETERS[kind]]
        wanted += [f"{SINGULAR[name]}_accumulator" for name in wanted]
        saved = checkpoint.load_whole(self.folder, set(wanted))
        found = {}
        for number, (name, kind) in enumerate(zip(names, kinds, strict=True)):
            parameters = {p: saved[p][number] for p in PARAMETERS[kind]}
            keys = {p: f"{SINGULAR[p]}_accumulator" for p in parameters}
            accumulators = {p: saved[key][number] for p, key in keys.items() if key in saved}
            found[name] = PreviousRelation(kind, parameters, accumulators)
        return found

    def _load(self, name: str) -> Floats:
        return checkpoint.load_whole(self.folder, {name})[name].float().numpy()


class VectorsFolder(Previous):
    """Exported vectors: `<table>.parquet` with columns id, entity, vector."""

    def __init__(self, folder: Path) -> None:
        num_rows, dims = {}, set()
        for path in sorted(folder.glob("*.parquet")):
            if path.stem in (RELATIONS, MATRICES) or not _has_vectors(path):
                continue
            file = pq.ParquetFile(path)
            vector = file.schema_arrow.field("vector").type
            dims.add(getattr(vector, "list_size", None) or len(_first_vector(file)))
            num_rows[path.stem] = file.metadata.num_rows
        if len(dims) != 1:
            raise DataError(f"warm_start: the tables of {folder} have dimensions {sorted(dims)}")
        super().__init__(folder, dims.pop(), num_rows)

    def names(self, table: str) -> pa.LargeStringArray:
        """See Previous."""
        path = self._path(table)
        if "entity" not in pq.read_schema(path).names:
            raise DataError(
                f"warm_start: {path} has no column entity: the run that exported it had no vocab "
                f"for table {table!r}; leave the table out with warm_start.tables"
            )
        return read_names(path, VECTORS)

    def rows(self, table: str) -> Floats:
        """See Previous."""
        columns = pq.read_table(self._path(table), columns=["id", "vector"])
        return _by_id(columns, _vectors(columns.column("vector"), self.dim))

    def biases(self, table: str) -> Floats | None:
        """See Previous."""
        if "bias" not in pq.read_schema(self._path(table)).names:
            return None
        columns = pq.read_table(self._path(table), columns=["id", "bias"])
        return _by_id(columns, columns.column("bias").to_numpy().astype(np.float32))

    def accumulator(self, table: str) -> tuple[str, Floats | None]:
        """See Previous."""
        raise ConfigError(
            f"warm_start.optimizer_state: exported vectors ({self.folder}) have none; give a run "
            "folder, or set it to false"
        )

    def relations(self) -> dict[str, PreviousRelation]:
        """See Previous."""
        if not self._path(RELATIONS).is_file():
            return {}
        table = pq.read_table(self._path(RELATIONS))
        rows = torch.from_numpy(_vectors(table.column("vector"), self.dim))
        matrices: dict[str, Tensor] = {}
        if (path := self._path(MATRICES)).is_file():
            columns = pq.read_table(path)
            flat = _vectors(columns.column("vector"), self.dim * self.dim)
            shaped = torch.from_numpy(flat).view(-1, self.dim, self.dim)
            matrices = dict(zip(columns.column("relation").to_pylist(), shaped, strict=True))
        found = {}
        names, kinds = (table.column(key).to_pylist() for key in ("relation", "operator"))
        for name, kind, row in zip(names, kinds, rows, strict=True):
            parameters = {p: matrices[name] if p == "matrices" else row for p in PARAMETERS[kind]}
            found[name] = PreviousRelation(kind, parameters)
        return found

    def _path(self, table: str) -> Path:
        return self.folder / f"{table}.parquet"


def open_previous(path: Path, given_as: str = "warm_start.previous") -> Previous:
    """The source at `path`; raises ConfigError, which says how it was given, where there is
    none.
    """
    if not path.is_dir():
        raise ConfigError(f"{given_as}: there is no folder {path}{container.outside(path)}")
    if checkpoint.complete_steps(path):
        step, _ = choose_step(path, None)
        return StepFolder(path / str(step))
    if (path / checkpoint.META).is_file():
        return StepFolder(path)
    if any(p.stem not in (RELATIONS, MATRICES) and _has_vectors(p) for p in path.glob("*.parquet")):
        return VectorsFolder(path)
    raise ConfigError(
        f"{given_as}: {path} is neither a run folder with a complete step, nor a step "
        "folder, nor a folder of exported vectors as parquet (<table>.parquet; export.py "
        "--format parquet writes them)"
    )


def _has_vectors(path: Path) -> bool:
    """Whether it is a table's file: that of its names alone (`<table>.ids.parquet`) is not."""
    try:
        return "vector" in pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}; export again") from error


def _first_vector(file: pq.ParquetFile) -> Any:
    batch = next(file.iter_batches(batch_size=1, columns=["vector"]), None)
    return [] if batch is None else batch.column("vector")[0]


def _vectors(column: pa.ChunkedArray, dim: int) -> Floats:
    """(rows, D) of a column of lists."""
    parts = [np.asarray(chunk.flatten(), dtype=np.float32) for chunk in column.chunks]
    return np.concatenate([np.zeros(0, np.float32), *parts]).reshape(-1, dim)


def _by_id(columns: pa.Table, values: Floats) -> Floats:
    """Rows in the order of the column id."""
    ids = columns.column("id").to_numpy()
    return values if (ids[:-1] < ids[1:]).all() else values[np.argsort(ids, kind="stable")]
