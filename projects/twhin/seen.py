"""What an entity already has in the training edges of a run, without torch: what `--unseen-only`
leaves out.
"""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from tml.config import ConfigError
from tml.data.parquet import ParquetRows

CONFIG = "config.yaml"
COLUMNS = ("lhs", "rel", "rhs")


def seen_rows(run: Path, relation: int, side: str, row: int) -> NDArray[np.int64]:
    """Rows at `side` ("rhs" or "lhs") of the training edges of a relation whose other side is
    `row`, each once; a row group in memory at a time.

    Raises ConfigError where the run folder does not say where its edges are, DataError where they
    cannot be read.
    """
    data = _train_data(run / CONFIG)
    edges = ParquetRows(data["data_root"], COLUMNS, data.get("offset") or 0, data.get("limit"))
    asking = "lhs" if side == "rhs" else "rhs"
    found = [np.empty(0, np.int64)]
    for piece in edges.pieces:
        columns = edges.read(piece)
        mine = (columns["rel"] == relation) & (columns[asking] == row)
        found.append(columns[side][mine])
    return np.unique(np.concatenate(found))


def _train_data(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())["train_data"]
        assert isinstance(data["data_root"], str)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"--unseen-only: {path} does not name the training edges: {error!r}; leave it out"
        ) from error
    return dict(data)
