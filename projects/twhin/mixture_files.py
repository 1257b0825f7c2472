"""Modes as files, for a service that asks an index of items for each mode's share of candidates.

    <folder>/modes.parquet      a row a user: id (int64), entity (string; where the table has a
                                vocabulary), modes: a list of {cluster (int32; −1: none), weight
                                (float32), vector (D float32)}, heaviest first, of sum 1
    <folder>/items.parquet      a row an item: id, entity, cluster
    <folder>/clusters.parquet   a row a cluster: id, items (how many), centroid (D float32)
    <folder>/mixture.json       relation, tables, comparator and the settings; written last

A mode's vector is compared with items' vectors by the model's comparator, their biases added where
the model has them; it has been through the relation's operator.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from projects.twhin.clusters import Clusters
from projects.twhin.config import TableConfig
from projects.twhin.edges import Ids
from projects.twhin.modes import Modes
from projects.twhin.output_folder import replaced
from projects.twhin.vocabulary import names_of

DESCRIPTION = "mixture.json"
FILES = frozenset([DESCRIPTION, "modes.parquet", "items.parquet", "clusters.parquet"])


def write_mixture(
    folder: Path,
    users: TableConfig,
    items: TableConfig,
    clusters: Clusters,
    modes: Iterable[tuple[Ids, Modes]],
    description: dict[str, Any],
) -> None:
    """Write the files into `folder`, which is replaced as a whole.

    modes: blocks of (users, their modes), in the order of the users' ids. Raises DataError where
    the folder holds something else.
    """
    with replaced(folder, is_ours, "a mixture") as temporary:
        _write_clusters(temporary / "clusters.parquet", clusters)
        _write_items(temporary / "items.parquet", items, clusters)
        _write_modes(temporary / "modes.parquet", users, clusters.centroids.shape[1], modes)
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def is_ours(path: Path) -> bool:
    """Whether a file is one of a mixture."""
    return path.name in FILES


def _write_clusters(path: Path, clusters: Clusters) -> None:
    sizes = torch.bincount(clusters.of_items, minlength=len(clusters))
    columns = {
        "id": pa.array(range(len(clusters)), pa.int32()),
        "items": pa.array(sizes.numpy()),
        "centroid": _vectors(clusters.centroids),
    }
    pq.write_table(pa.table(columns), path, compression="zstd")


def _write_items(path: Path, table: TableConfig, clusters: Clusters) -> None:
    columns = {"id": pa.array(range(len(clusters.of_items)), pa.int64())}
    if (names := names_of(table)) is not None:
        columns["entity"] = names
    columns["cluster"] = pa.array(clusters.of_items.int().numpy())
    pq.write_table(pa.table(columns), path, compression="zstd")


def _write_modes(
    path: Path, table: TableConfig, dim: int, modes: Iterable[tuple[Ids, Modes]]
) -> None:
    names = names_of(table)
    fields: list[tuple[str, Any]] = [("cluster", pa.int32()), ("weight", pa.float32())]
    mode = pa.struct([*fields, ("vector", pa.list_(pa.float32(), dim))])
    columns: list[tuple[str, Any]] = [("id", pa.int64())]
    columns += [] if names is None else [("entity", names.type)]
    schema = pa.schema([*columns, ("modes", pa.list_(mode))])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for users, of_users in modes:
            arrays = [pa.array(users, pa.int64())]
            arrays += [] if names is None else [names.take(pa.array(users))]
            arrays.append(_mode_lists(of_users, mode))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _mode_lists(modes: Modes, kind: Any) -> Any:
    """(B,) lists of those modes that have a weight."""
    is_there = modes.weights > 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), is_there.sum(dim=1).cumsum(0)])
    values = [
        pa.array(modes.clusters[is_there].int().numpy()),
        pa.array(modes.weights[is_there].numpy()),
        _vectors(modes.queries[is_there]),
    ]
    structs = pa.StructArray.from_arrays(values, fields=list(kind))
    return pa.ListArray.from_arrays(pa.array(offsets.int().numpy()), structs)


def _vectors(rows: torch.Tensor) -> Any:
    values = pa.array(rows.detach().contiguous().numpy().ravel())
    return pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
