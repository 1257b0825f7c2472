"""Quantised vectors: fewer bytes a row, and how they are turned back.

    kind   files                                                       decoded
    fp16   <table>.fp16.npy (N, D) float16                             as float32
    int8   <table>.int8.npy (N, D), <table>.int8_scale.npy (N,)        code · scale of the row
    pq     <table>.pq_codes.npy (N, M) uint8,                          row i, numbers m·D/M … of it:
           <table>.pq_centroids.npy (M, 256, D/M) float32              centroids[m, codes[i, m]]

int8 codes lie in −127 … 127, the scale (float32) is max|x| / 127. Product quantisation (Jégou et
al. 2011) cuts a row into M pieces and writes down the nearest of 256 learned ones; FAISS learns
them. A table too small for that to save bytes over fp16 (its centroids take 1,024·D bytes) is kept
as fp16, in the files of fp16. Relations and biases stay float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from projects.twhin.exported import Floats
from projects.twhin.index import load_faiss
from tml.config import ConfigError
from tml.data.parquet import DataError

KINDS = ("fp16", "int8", "pq")
BLOCK_ROWS = 1 << 16
LARGEST_FP16 = 65_504.0
NUM_CENTROIDS = 256
PQ_POINTS, PQ_ROUNDS = 64, 16
"""Rows a centroid is learned from, at most, and rounds of k-means. FAISS's 256 and 25 take five
times as long."""


@dataclass(frozen=True)
class Quantised:
    """A table in fewer bytes. kind: fp16, int8 or pq, as it is written."""

    kind: str
    arrays: dict[str, NDArray[Any]]
    """Ending of the file's name → array."""

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def decode(self) -> Floats:
        """(N, D) float32."""
        return decode(self.kind, self.arrays)

    def write(self, folder: Path, table: str) -> None:
        """Write `<table>.<ending>.npy` of each array."""
        for ending, array in self.arrays.items():
            np.save(folder / f"{table}.{ending}.npy", array, allow_pickle=False)


def quantise(kind: str, table: str, rows: Floats, pq_bytes: int | None = None) -> Quantised:
    """Rows (N, D) as `kind`. pq_bytes: M; None: D/4.

    Raises DataError for a number that is not finite, or too large for fp16, with its place.
    """
    if kind == "fp16":
        return Quantised("fp16", {"fp16": _to_fp16(table, rows)})
    if kind == "int8":
        return Quantised("int8", _to_int8(table, rows))
    num_bytes = check_pq_bytes(rows.shape[1], pq_bytes)
    if not pq_saves(len(rows), rows.shape[1], num_bytes):
        return Quantised("fp16", {"fp16": _to_fp16(table, rows)})
    return Quantised("pq", _to_pq(table, rows, num_bytes))


def decode(kind: str, arrays: dict[str, NDArray[Any]]) -> Floats:
    """The rows (N, D) float32 that stand for those that were quantised."""
    if kind == "fp16":
        return arrays["fp16"].astype(np.float32)
    if kind == "int8":
        found: Floats = arrays["int8"].astype(np.float32)
        found *= np.asarray(arrays["int8_scale"], np.float32)[:, None]
        return found
    codes, centroids = arrays["pq_codes"], arrays["pq_centroids"]
    pieces, _, width = centroids.shape
    found = np.empty((len(codes), pieces * width), np.float32)
    for m in range(pieces):
        found[:, m * width : (m + 1) * width] = centroids[m][codes[:, m]]
    return found


def check_pq_bytes(dim: int, pq_bytes: int | None) -> int:
    """M. Raises ConfigError where it does not divide the dimension."""
    if pq_bytes is None:
        return dim // 4
    if pq_bytes < 1 or dim % pq_bytes:
        allowed = ", ".join(str(m) for m in range(1, dim + 1) if dim % m == 0)
        raise ConfigError(
            f"--pq-bytes: {pq_bytes} does not divide the {dim} numbers of a vector; "
            f"choose one of {allowed}"
        )
    return pq_bytes


def pq_saves(num_rows: int, dim: int, pq_bytes: int) -> bool:
    """Whether codes and centroids take fewer bytes than fp16; then there are rows enough to learn
    from, too.
    """
    return num_rows * pq_bytes + 4 * NUM_CENTROIDS * dim < 2 * num_rows * dim


def refuse_not_finite(table: str, rows: Floats) -> None:
    """Raise DataError for the first number that is none."""
    for start, block in blocks(rows):
        if not np.isfinite(block).all():
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise DataError(
                f"table {table!r}, row {start + row}: the vector holds {block[row, column]}, which "
                "is no finite number; the training has diverged: lower its learning rates"
            )


def blocks(rows: Floats) -> Iterator[tuple[int, Floats]]:
    """(first row, rows) of each block, so that no copy of the whole is made."""
    for start in range(0, len(rows), BLOCK_ROWS):
        yield start, np.asarray(rows[start : start + BLOCK_ROWS])


def _to_fp16(table: str, rows: Floats) -> NDArray[np.float16]:
    refuse_not_finite(table, rows)
    found = np.empty(rows.shape, np.float16)
    for start, block in blocks(rows):
        too_large = np.abs(block) > LARGEST_FP16
        if too_large.any():
            row, column = np.argwhere(too_large)[0]
            raise DataError(
                f"table {table!r}, row {start + row}: {block[row, column]:,.6g} is too large for "
                f"fp16, which holds numbers up to {LARGEST_FP16:,.0f}; use --quantize=int8, or "
                "train with regularization.l2 to keep vectors short"
            )
        found[start : start + len(block)] = block
    return found


def _to_int8(table: str, rows: Floats) -> dict[str, NDArray[Any]]:
    refuse_not_finite(table, rows)
    codes, scales = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    for start, block in blocks(rows):
        here = slice(start, start + len(block))
        scale = np.abs(block).max(axis=1) / np.float32(127)
        scales[here] = scale
        scale = np.where(scale > 0, scale, np.float32(1))  # a row of zeros stays one
        codes[here] = np.rint(block / scale[:, None]).clip(-127, 127)
    return {"int8": codes, "int8_scale": scales}


def _to_pq(table: str, rows: Floats, num_bytes: int) -> dict[str, NDArray[Any]]:
    refuse_not_finite(table, rows)
    faiss = load_faiss()
    dim = rows.shape[1]
    quantizer = faiss.ProductQuantizer(dim, num_bytes, 8)
    quantizer.cp.min_points_per_centroid = 1  # no warning: pq_saves has looked at the rows
    quantizer.cp.niter = PQ_ROUNDS
    number = min(len(rows), PQ_POINTS * NUM_CENTROIDS)
    chosen = np.arange(number, dtype=np.int64) * len(rows) // number
    quantizer.train(np.ascontiguousarray(rows[chosen], np.float32))
    codes = np.empty((len(rows), num_bytes), np.uint8)
    for start, block in blocks(rows):
        found = quantizer.compute_codes(np.ascontiguousarray(block, np.float32))
        codes[start : start + len(block)] = found
    centroids = faiss.vector_to_array(quantizer.centroids)
    shape = (num_bytes, NUM_CENTROIDS, dim // num_bytes)
    return {"pq_codes": codes, "pq_centroids": centroids.reshape(shape).copy()}
