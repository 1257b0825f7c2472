"""What an entity already has in the training edges of a run, without torch: what `--unseen-only`
leaves out.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tml.config import Config, build_config, read_yaml
from tml.data.parquet import ParquetRows

CONFIG = "config.yaml"
COLUMNS = ("lhs", "rel", "rhs")


class TrainingEdges(Config):
    """What of a run's train_data is needed here; DataConfig, whose import brings torch, says what
    it means.
    """

    data_root: str
    offset: int = 0
    limit: int | None = None


def seen_rows(run: Path, relation: int, side: str, row: int) -> NDArray[np.int64]:
    """Rows at `side` ("rhs" or "lhs") of the training edges of a relation whose other side is
    `row`, each once; a row group in memory at a time.

    Raises ConfigError where the run folder does not say where its edges are, DataError where they
    cannot be read.
    """
    data = _training_edges(run / CONFIG)
    edges = ParquetRows(data.data_root, COLUMNS, data.offset, data.limit)
    asking = "lhs" if side == "rhs" else "rhs"
    found = [np.empty(0, np.int64)]
    for piece in edges.pieces:
        columns = edges.read(piece)
        mine = (columns["rel"] == relation) & (columns[asking] == row)
        found.append(columns[side][mine])
    return np.unique(np.concatenate(found))


def _training_edges(path: Path) -> TrainingEdges:
    data = read_yaml(path).get("train_data") or {}
    known = {name: data[name] for name in TrainingEdges.model_fields if name in data}
    return build_config(TrainingEdges, known, f"{path}: train_data")
