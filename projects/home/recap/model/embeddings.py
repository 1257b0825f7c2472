"""Vectors of categorical features: small tables that every process holds whole, large ones that are
cut by rows over the processes (tml.embeddings), and the vector of a post's position.

A table serves one or several features: categorical ones and ids (B,), bags, and
`discrete.<column>`. Values are row numbers, or any whole numbers that are hashed to rows
(hash_values). Row 0 is the unknown value. An empty bag gives zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.home.recap.data.batch import Bag, Features, RankingBatch
from projects.home.recap.model.config import (
    EmbeddingTableConfig,
    ModelConfig,
    PositionDebiasConfig,
    SmallEmbeddingsConfig,
)
from tml.config import ConfigError
from tml.data.parquet import DataError
from tml.embeddings import ArrayRows, Tables, TableSpec

DISCRETE = "discrete."
"""Beginning of the name of a discrete column as a feature."""
DEFAULT_INIT_SCALE = 0.01
PADDING = -1


@dataclass(frozen=True)
class PaddedBag:
    """Lists of whole numbers as one matrix: the form that exported models take."""

    values: Tensor
    """(B, L) int64; PADDING where there is no value."""


Values = Tensor | Bag | PaddedBag


@dataclass(frozen=True)
class Table:
    """A table as it will be built: config, with what the data decides."""

    name: str
    num_rows: int
    dim: int
    features: tuple[str, ...]
    pooling: str
    hashes: bool
    init_scale: float
    pretrained: str | None


def small_tables(config: SmallEmbeddingsConfig, features: Features, taken: set[str]) -> list[Table]:
    """The tables that are named, and one for each feature that default_dim covers. taken: features
    of large tables, which default_dim leaves to them.
    """
    tables = [_resolve(one, features, "small_embeddings") for one in config.tables]
    if config.default_dim is not None:
        named = taken | {name for table in tables for name in table.features}
        tables += [
            Table(
                name, num_rows, config.default_dim, (name,), "mean", False, DEFAULT_INIT_SCALE, None
            )
            for name, num_rows in {**features.categorical, **features.bags}.items()
            if name not in named
        ]
    _refuse_repeated(tables, "small_embeddings")
    return tables


def large_tables(config: ModelConfig, features: Features) -> list[Table]:
    """The large tables, in config order."""
    if config.large_embeddings is None:
        return []
    tables = [_resolve(one, features, "large_embeddings") for one in config.large_embeddings.tables]
    _refuse_repeated(tables, "large_embeddings")
    return tables


def large_table_specs(config: ModelConfig, features: Features) -> list[TableSpec]:
    """What `tml.embeddings.build_tables` needs; empty without large tables."""
    if config.large_embeddings is None:
        return []
    return [
        TableSpec(
            name=table.name,
            num_rows=table.num_rows,
            dim=table.dim,
            data_type="fp32",
            optimizer=config.large_embeddings.optimizer,
            init_scale=table.init_scale,
        )
        for table in large_tables(config, features)
    ]


def fill_pretrained(config: ModelConfig, features: Features, tables: Tables) -> None:
    """Overwrite the initial rows of large tables that name a file."""
    for table in large_tables(config, features):
        if table.pretrained is not None:
            tables.fill(table.name, ArrayRows(read_pretrained(table)))


def read_pretrained(table: Table) -> Tensor:
    """(num_rows, dim) float32 of the table's .npy file. Raises ConfigError."""
    where = f"table {table.name!r}: pretrained {table.pretrained}"
    try:
        rows = np.load(Path(str(table.pretrained)), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read as a .npy file: {error}") from error
    if rows.shape != (table.num_rows, table.dim):
        raise ConfigError(f"{where} has shape {rows.shape}, not {(table.num_rows, table.dim)}")
    loaded = np.asarray(rows, dtype=np.float32)
    if not np.isfinite(loaded).all():
        row = int(np.flatnonzero(~np.isfinite(loaded).all(axis=1))[0])
        raise ConfigError(f"{where}: row {row} holds NaN or infinity")
    return torch.from_numpy(loaded.copy())


def _resolve(config: EmbeddingTableConfig, features: Features, where: str) -> Table:
    sizes = [_num_values(name, config, features, where) for name in config.features]
    known = [size for size in sizes if size is not None]
    num_rows = config.num_embeddings or max(known, default=0)
    place = f"model.{where}.tables: table {config.name!r}"
    if not num_rows or (config.hash_values and config.num_embeddings is None):
        raise ConfigError(f"{place}: set num_embeddings; the data does not say how many rows")
    if config.hash_values:
        if num_rows < 2:
            raise ConfigError(f"{place}: num_embeddings must be at least 2: row 0 is the unknown")
    elif num_rows < max(known, default=0):
        raise ConfigError(
            f"{place}: num_embeddings {num_rows} is less than the {max(known)} values that its "
            "features have; raise it, leave it out, or set hash_values"
        )
    return Table(
        name=config.name,
        num_rows=num_rows,
        dim=config.embedding_dim,
        features=tuple(config.features),
        pooling=config.pooling,
        hashes=config.hash_values,
        init_scale=config.init_scale,
        pretrained=config.pretrained,
    )


def _num_values(
    name: str, config: EmbeddingTableConfig, features: Features, where: str
) -> int | None:
    """Number of values of a feature; None where only hashing makes them rows."""
    vocabularies = {**features.categorical, **features.bags}
    if name in vocabularies:
        return vocabularies[name]
    discrete = [f"{DISCRETE}{column}" for column in range(features.num_discrete)]
    if name in discrete or name in features.ids:
        if not config.hash_values:
            raise ConfigError(
                f"model.{where}.tables: table {config.name!r}: the values of {name!r} are no row "
                "numbers; set hash_values: true"
            )
        return None
    known = [*vocabularies, *features.ids]
    if discrete:
        known.append(f"{discrete[0]} to {discrete[-1]}")
    raise ConfigError(
        f"model.{where}.tables: table {config.name!r}: the data has no feature {name!r}; there are "
        f"{', '.join(known) or 'none'}"
    )


def _refuse_repeated(tables: Sequence[Table], where: str) -> None:
    for kind, names in (
        ("table", [table.name for table in tables]),
        ("feature", [name for table in tables for name in table.features]),
    ):
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"model.{where}.tables: {kind} {name!r} is named twice")


def hash_to_rows(values: Tensor, num_rows: int) -> Tensor:
    """Any int64 → rows 1 … num_rows − 1, by splitmix64 (Steele et al. 2014)."""
    # Constants above 2⁶³ are written as the negative numbers of the same bits; products wrap.
    h = values + (0x9E3779B97F4A7C15 - (1 << 64))
    h = (h ^ _shift(h, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    h = (h ^ _shift(h, 27)) * (0x94D049BB133111EB - (1 << 64))
    h = h ^ _shift(h, 31)
    return (h & ((1 << 63) - 1)) % (num_rows - 1) + 1


def _shift(h: Tensor, bits: int) -> Tensor:
    """h >> bits of the unsigned number."""
    return (h >> bits) & ((1 << (64 - bits)) - 1)


def values_of(batch: RankingBatch, name: str) -> Values:
    """The values of a feature."""
    if name in batch.categorical:
        return batch.categorical[name]
    if name in batch.bags:
        return batch.bags[name]
    if name in batch.ids:
        return batch.ids[name]
    return batch.discrete[:, int(name.removeprefix(DISCRETE))]


def rows_of(table: Table, values: Values) -> Values:
    """Row numbers instead of values, padding untouched."""
    if isinstance(values, Bag):
        return Bag(_rows(table, values.values), values.offsets)
    if isinstance(values, PaddedBag):
        rows = _rows(table, values.values)
        return PaddedBag(torch.where(values.values == PADDING, PADDING, rows))
    return _rows(table, values)


def _rows(table: Table, values: Tensor) -> Tensor:
    if table.hashes:
        return hash_to_rows(values, table.num_rows)
    if torch.compiler.is_exporting():
        known = (values >= 0) & (values < table.num_rows)
        return torch.where(known, values, 0)  # nobody is there to read an error: unknown
    return values


def check_rows(tables: Sequence[Table], batch: RankingBatch) -> None:
    """Raises DataError where a value is no row of its table (not in a compiled program)."""
    if torch.compiler.is_compiling():
        return
    checked = [(table, name) for table in tables if not table.hashes for name in table.features]
    found = [(table, name, _present(values_of(batch, name))) for table, name in checked]
    bounds = [(table, name, torch.aminmax(rows)) for table, name, rows in found if rows.numel()]
    if not bounds:
        return
    # One transfer from the device for all features.
    ends = torch.stack([torch.stack([low, high]) for _, _, (low, high) in bounds]).tolist()
    for (table, name, _), (lowest, highest) in zip(bounds, ends, strict=True):
        if lowest < 0 or highest >= table.num_rows:
            raise DataError(
                f"feature {name!r} has the value {lowest if lowest < 0 else highest}; its table "
                f"{table.name!r} has the rows 0 to {table.num_rows - 1}. Prepare the data and the "
                "model with one vocabulary, or set num_embeddings or hash_values"
            )


def _present(values: Values) -> Tensor:
    if isinstance(values, PaddedBag):
        return values.values[values.values != PADDING]
    return _flat(values)


def pool(vectors: Tensor, offsets: Tensor, pooling: str) -> Tensor:
    """(N, D) end to end, offsets (B + 1,) → (B, D): sum or mean of each list; zeros of an empty
    one.
    """
    lengths = offsets.diff()
    rows = torch.repeat_interleave(lengths, output_size=len(vectors))
    total = vectors.new_zeros(len(lengths), vectors.shape[1]).index_add(0, rows, vectors)
    return total / lengths.clamp(min=1)[:, None] if pooling == "mean" else total


class SmallEmbeddings(nn.Module):
    """Tables that every process holds whole → one (B, dim) a feature, in config order."""

    def __init__(self, config: SmallEmbeddingsConfig, tables: Sequence[Table]) -> None:
        super().__init__()
        self._tables = tuple(tables)
        self._dropout = config.dropout.rate if config.dropout else 0.0
        self.dims = [table.dim for table in tables for _ in table.features]
        self.tables = nn.ModuleDict({_key(table.name): _embedding(table) for table in tables})

    def forward(self, batch: RankingBatch) -> list[Tensor]:
        """See the class. Raises DataError for a value that is no row."""
        check_rows(self._tables, batch)
        found = []
        for table in self._tables:
            embedding = self.tables[_key(table.name)]
            for name in table.features:
                vectors = _look_up(embedding.weight, rows_of(table, values_of(batch, name)), table)
                found.append(F.dropout(vectors, self._dropout, self.training))
        return found


def _look_up(weight: Tensor | nn.Module, rows: Values, table: Table) -> Tensor:
    assert isinstance(weight, Tensor)
    if isinstance(rows, PaddedBag):
        present = (rows.values != PADDING).to(weight.dtype)
        vectors = F.embedding(rows.values.clamp(min=0), weight)  # (B, L, D)
        total = (vectors * present[..., None]).sum(1)
        return (
            total / present.sum(1, keepdim=True).clamp(min=1) if table.pooling == "mean" else total
        )
    if isinstance(rows, Bag):
        if len(rows.values) == 0:
            return weight.new_zeros(len(rows), table.dim) + 0 * weight[:1].sum()
        return F.embedding_bag(
            rows.values, weight, rows.offsets, mode=table.pooling, include_last_offset=True
        )
    return F.embedding(rows, weight)


def _embedding(table: Table) -> nn.Embedding:
    embedding = nn.Embedding(table.num_rows, table.dim)
    nn.init.normal_(embedding.weight, std=table.init_scale)
    if table.pretrained is not None:
        rows = read_pretrained(table)
        with torch.no_grad():
            embedding.weight.copy_(rows)
    return embedding


def _key(name: str) -> str:
    """Name of a table as a module, which may hold no dot and not be a dictionary's method."""
    return "table_" + name.replace(".", "__")


def large_ids(tables: Sequence[Table], batch: RankingBatch) -> dict[str, Tensor]:
    """Table → (N,) int64: the rows of all its features, one feature after the other."""
    check_rows(tables, batch)
    return {
        table.name: torch.cat([_flat(rows_of(table, values_of(batch, n))) for n in table.features])
        for table in tables
    }


def pool_large(
    tables: Sequence[Table], batch: RankingBatch, rows: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Feature → (B, D), from the rows that `large_ids` asked for."""
    pooled = {}
    for table in tables:
        values = [values_of(batch, name) for name in table.features]
        parts = rows[table.name].split([len(_flat(one)) for one in values])
        for name, one, vectors in zip(table.features, values, parts, strict=True):
            if isinstance(one, Bag):
                vectors = pool(vectors, one.offsets, table.pooling)
            pooled[name] = vectors
    return pooled


def _flat(values: Values) -> Tensor:
    assert not isinstance(values, PaddedBag)
    return values.values if isinstance(values, Bag) else values


class PositionDebias(nn.Module):
    """A vector of the position at which a post was shown → (B, num_dims).

    In training a row's position is dropped with drop_probability; in inference it always is, so
    that scores do not depend on it. Dropped, and below 0: zeros.
    """

    def __init__(self, config: PositionDebiasConfig, features: Features) -> None:
        super().__init__()
        self._config = config
        if config.position_feature_name not in features.ids:
            raise ConfigError(
                "model.position_debias_config.position_feature_name: the data has no id feature "
                f"{config.position_feature_name!r}; there are {', '.join(features.ids) or 'none'}"
            )
        self.embedding = nn.Embedding(config.max_position, config.num_dims)
        nn.init.normal_(self.embedding.weight, std=DEFAULT_INIT_SCALE)

    def forward(self, batch: RankingBatch) -> Tensor:
        """See the class."""
        if not self.training:
            rows = batch.labels.shape[0]
            return self.embedding.weight.new_zeros(rows, self._config.num_dims)
        positions = batch.ids[self._config.position_feature_name]
        kept = torch.rand(positions.shape, device=positions.device) >= self._config.drop_probability
        vectors: Any = self.embedding(positions.clamp(0, self._config.max_position - 1))
        return torch.where((kept & (positions >= 0))[:, None], vectors, 0.0)
