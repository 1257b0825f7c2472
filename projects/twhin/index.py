"""FAISS indexes of exported vectors: nearest rows of a table without comparing all.

`<table>.faiss` answers what f(s, r, ·) asks, by the model's comparator; `<table>.similar.faiss`
what is like an entity, where that is another measure (cosine beside dot; no biases) and the table
large. `<table>[.similar].index.json` beside it says how to ask, so that FAISS alone is enough:

    rows          t                     of cosine t/‖t‖
    with biases   (t, b_t)              of squared_l2 (t, b_t − ‖t‖²)
    query         q                     of cosine q/‖q‖
    with biases   (q, 1)                of squared_l2 (2q, 1)

Small tables have a flat index, which is exact. Larger ones are cut into cells of which a query
visits some (IVF), the largest are also product-quantised after a rotation (OPQ, PQ), and the best
candidates are then compared exactly. How much of the exact answer is found is measured and written
down. The comparator l2 with biases is no product, so tables of such a model have no index for it.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from projects.twhin.exported import Exported, Floats
from projects.twhin.queries import Query, compare, normalised, related, search_exactly, similarity
from projects.twhin.queries import similar as similar_query
from tml.config import ConfigError
from tml.data.parquet import DataError
from tml.machines import environment

FLAT_ROWS = 100_000
"""Tables of up to so many rows are searched whole: that takes milliseconds."""
IVF_ROWS = 4_000_000
"""Up to so many rows an index holds whole vectors, above product-quantised ones."""
BLOCK_ROWS = 1 << 16
POINTS_A_CELL = 64
"""Rows that k-means learns a cell from."""
OPQ_POINTS = 1 << 15
OPQ_ROUNDS = 8
NUM_QUERIES = 128
"""Of which the share of exact neighbours found is measured."""
K = 10
WANTED_RECALL = 0.95
RESCORED = 20
"""Candidates for each wanted row that are compared exactly where the index holds quantised ones."""
HOLDS_VECTORS = re.compile(r"(IVF\d+(_HNSW\d*)?,)?Flat|HNSW\d*(,Flat)?")
"""Kinds whose scores are exact; others round vectors, shorten them or count in other measures."""
SIMILAR = ".similar"

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class IndexInfo:
    """What `<table>.index.json` says."""

    table: str
    answers: str
    """"relations": f(s, r, ·); "similar": entities alike."""
    measure: str
    with_biases: bool
    factory: str
    """FAISS's name of the kind."""
    metric: str
    """inner_product (larger is nearer) or l2 (squared distance)."""
    rows: int
    dim: int
    """Numbers of a row: D, or D + 1 with biases."""
    holds_vectors: bool
    """Whether its scores are exact; else candidates are compared once more."""
    nprobe: int | None = None
    """Cells that a query visits."""
    recall: float = 1.0
    """Share of the 10 exactly nearest rows that are found, over sampled queries."""

    @property
    def stem(self) -> str:
        return self.table + (SIMILAR if self.answers == "similar" else "")


def load_faiss() -> Any:
    """The library, imported where it is needed.

    It brings an OpenMP of its own beside torch's (on Linux both are libgomp, which get on). Threads
    that wait must not spin: where processors are shared, k-means took twice the processor time and
    1.6 times as long.
    """
    environment.set_default(environment.OMP_WAIT_POLICY, "PASSIVE")
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"the index needs faiss-cpu, which cannot be imported ({error}); install "
            "requirements/train.txt, or go without: --index=none"
        ) from error
    return faiss


def write_indexes(exported: Exported, kind: str, *, small_only: bool = False) -> list[IndexInfo]:
    """Build the indexes of all tables into the folder.

    kind: auto, or FAISS's name of a kind, such as IVF256,Flat, for tables of rows enough.
    small_only: leave out tables that take time.
    """
    found = []
    for table, num_rows in exported.rows.items():
        if small_only and num_rows > FLAT_ROWS:
            continue
        for answers in ("relations", "similar"):
            info = _plan(exported, table, answers, kind)
            if info is not None:
                found.append(_build(exported, info))
    return found


def choose_kind(num_rows: int, dim: int) -> str:
    """FAISS's name of the kind of index for a table. dim: numbers of a row."""
    if num_rows <= FLAT_ROWS:
        return "Flat"
    cells = 2 ** round(math.log2(4 * math.sqrt(num_rows)))
    if num_rows <= IVF_ROWS:
        return f"IVF{cells},Flat"
    size = max(1, dim // 4)
    return f"OPQ{size}_{4 * size},IVF{cells},PQ{size}"


def rows_needed(kind: str) -> int:
    """Rows that cells and centroids of a kind can be learned from; tables of fewer stay flat."""
    cells = [int(number) for number in re.findall(r"IVF(\d+)", kind)]
    return max([*cells, 256 if "PQ" in kind else 0])


def _plan(exported: Exported, table: str, answers: str, kind: str) -> IndexInfo | None:
    """What an index will be; None where it is not needed or cannot be."""
    measure, biases = exported.comparator, exported.has_biases
    dim = exported.vectors(table).shape[1]
    if answers == "similar":
        alike = similarity(measure)
        if alike == measure and not biases:
            return None  # the other one answers both
        measure, biases = alike, False
    elif measure == "l2" and biases:
        return None
    width = dim + biases
    num_rows = exported.rows[table]
    factory = choose_kind(num_rows, width) if kind == "auto" else kind
    if num_rows < rows_needed(factory):
        factory = "Flat"
    if answers == "similar" and factory == "Flat":
        return None  # all rows are compared: the vectors themselves do
    is_distance = measure in ("l2", "squared_l2") and not biases
    return IndexInfo(
        table=table,
        answers=answers,
        measure=measure,
        with_biases=biases,
        factory=factory,
        metric="l2" if is_distance else "inner_product",
        rows=num_rows,
        dim=width,
        holds_vectors=HOLDS_VECTORS.fullmatch(factory) is not None,
    )


def _build(exported: Exported, info: IndexInfo) -> IndexInfo:
    """Build, measure and write one index and its description."""
    faiss = load_faiss()
    metric = faiss.METRIC_L2 if info.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        index = faiss.index_factory(info.dim, info.factory, metric)
        _train(faiss, index, exported, info)
        for start in range(0, info.rows, BLOCK_ROWS):
            index.add(_rows(exported, info, slice(start, start + BLOCK_ROWS)))
    except RuntimeError as error:
        raise ConfigError(
            f"table {info.table!r} ({info.rows:,} rows of {info.dim} numbers) cannot have an index "
            f"{info.factory!r}: {_reason(error)}; choose another --index"
        ) from error
    if info.factory != "Flat":
        info = _choose_nprobe(faiss, index, exported, info)
    try:
        faiss.write_index(index, str(exported.folder / f"{info.stem}.faiss"))
    except RuntimeError as error:
        raise OSError(f"{exported.folder / info.stem}.faiss: {_reason(error)}") from error
    text = json.dumps(asdict(info), indent=2) + "\n"
    (exported.folder / f"{info.stem}.index.json").write_text(text)
    return info


def _train(faiss: Any, index: Any, exported: Exported, info: IndexInfo) -> None:
    """Learn the cells and the quantisation from some of the rows, evenly spaced."""
    if index.is_trained:
        return
    cells = 0
    if (ivf := _cells(faiss, index)) is not None:
        cells = ivf.nlist
        ivf.cp.max_points_per_centroid, ivf.cp.min_points_per_centroid = POINTS_A_CELL, 1
        if hasattr(ivf, "pq"):
            ivf.pq.cp.min_points_per_centroid = 1
    if isinstance(index, faiss.IndexPreTransform):
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        if hasattr(rotation, "max_train_points"):
            rotation.max_train_points, rotation.niter = OPQ_POINTS, OPQ_ROUNDS
    number = min(info.rows, max(cells * POINTS_A_CELL, BLOCK_ROWS))
    chosen = np.arange(number, dtype=np.int64) * info.rows // number
    index.train(_rows(exported, info, chosen))


def _cells(faiss: Any, index: Any) -> Any:
    """The part that is cut into cells; None where there is none."""
    inner = faiss.downcast_index(index.index) if hasattr(index, "chain") else index
    return inner if hasattr(inner, "nprobe") else None


def _rows(exported: Exported, info: IndexInfo, chosen: slice | Ids) -> Floats:
    """Rows of a table as the index holds them (n, dim)."""
    x = np.ascontiguousarray(exported.vectors(info.table)[chosen], np.float32)
    if info.measure == "cosine":
        x = normalised(x)
    if not info.with_biases:
        return x
    biases = exported.biases(info.table)
    assert biases is not None
    last = np.asarray(biases[chosen], np.float32)
    if info.measure == "squared_l2":
        last = last - np.einsum("nd,nd->n", x, x)
    return np.concatenate([x, last[:, None]], axis=1, dtype=np.float32)


def _choose_nprobe(faiss: Any, index: Any, exported: Exported, info: IndexInfo) -> IndexInfo:
    """As few cells as find 95 % of the nearest rows, and how many they find."""
    queries = _sample_queries(exported, info)
    exact = [search_exactly(query, exported, info.table, K)[0] for query in queries]
    ivf = _cells(faiss, index)
    nprobe, recall = 1, 0.0
    while True:
        if ivf is not None:
            ivf.nprobe = nprobe
        found = [search(index, info, query, exported, K)[0] for query in queries]
        hits = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]
        recall = float(np.mean(hits))
        if ivf is None or recall >= WANTED_RECALL or nprobe >= ivf.nlist:
            break
        nprobe = min(2 * nprobe, ivf.nlist)
    measured = {"nprobe": None if ivf is None else nprobe, "recall": round(recall, 4)}
    return IndexInfo(**{**asdict(info), **measured})


def _sample_queries(exported: Exported, info: IndexInfo) -> list[Query]:
    """Questions of the kind that will be asked, evenly spaced over those who ask."""
    if info.answers == "similar":
        chosen = np.unique(np.arange(NUM_QUERIES) * info.rows // NUM_QUERIES)
        return [similar_query(exported, info.table, int(row)) for row in chosen]
    found = []
    for number, relation in enumerate(exported.relations):
        for side in ("rhs", "lhs"):
            asked, asking = (
                (relation.rhs, relation.lhs) if side == "rhs" else (relation.lhs, relation.rhs)
            )
            if asked != info.table:
                continue
            chosen = np.arange(NUM_QUERIES) * exported.rows[asking] // NUM_QUERIES
            asked_for = [related(exported, number, side, int(r)) for r in np.unique(chosen)]
            found += [query for query in asked_for if query.operator is None]
    if len(found) > NUM_QUERIES:
        found = [found[i * len(found) // NUM_QUERIES] for i in range(NUM_QUERIES)]
    if found:
        return found
    chosen = np.unique(np.arange(NUM_QUERIES) * info.rows // NUM_QUERIES)
    rows = exported.vectors(info.table)
    return [Query(np.array(rows[r]), info.measure, 0.0, info.with_biases) for r in chosen]


def find_index(exported: Exported, table: str, query: Query) -> IndexInfo | None:
    """The description of the index that answers a query; None where there is none, or no faiss."""
    if query.operator is not None or find_spec("faiss") is None:
        return None
    for stem in (table, table + SIMILAR):
        path = exported.folder / f"{stem}.index.json"
        if path.exists():
            try:
                info = IndexInfo(**json.loads(path.read_text()))
            except (OSError, ValueError, TypeError) as error:
                raise DataError(f"{path} cannot be read: {error!r}; export again") from error
            if (info.measure, info.with_biases) == (query.measure, query.with_biases):
                return info
    return None


def read_index(exported: Exported, info: IndexInfo) -> Any:
    """The FAISS index, as a memory map where its kind allows that."""
    faiss = load_faiss()
    faiss.omp_set_num_threads(1)  # for one query, threads cost more than they bring
    path = exported.folder / f"{info.stem}.faiss"
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise ConfigError(f"{path} cannot be read: {_reason(error)}; export again") from error


def search(
    index: Any, info: IndexInfo, query: Query, exported: Exported, k: int
) -> tuple[Ids, Floats]:
    """The k best rows and their scores, best first."""
    wanted = k if info.holds_vectors else k * RESCORED
    nearness, ids = index.search(_asked(info, query)[None], min(wanted, info.rows))
    nearness, ids = nearness[0][ids[0] >= 0], ids[0][ids[0] >= 0]
    if not info.holds_vectors:
        order = np.sort(ids)
        rows = np.asarray(exported.vectors(info.table)[order])
        biases = exported.biases(info.table) if query.with_biases else None
        scores = compare(query, rows, None if biases is None else np.asarray(biases[order]))
        best = np.argsort(-scores, kind="stable")[:k]
        return order[best], scores[best]
    if info.metric == "l2":
        squares = np.maximum(nearness, 0.0)
        nearness = -np.sqrt(squares) if info.measure == "l2" else -squares
    elif info.measure == "squared_l2":
        nearness = nearness - query.vector @ query.vector
    return ids, np.asarray(nearness + np.float32(query.extra), np.float32)


def _asked(info: IndexInfo, query: Query) -> Floats:
    """The query as the index wants it (dim,)."""
    q = query.vector
    if info.measure == "cosine":
        q = normalised(q[None])[0]
    if not info.with_biases:
        return np.asarray(q, np.float32)
    scale = 2.0 if info.measure == "squared_l2" else 1.0
    return np.concatenate([scale * q, [1.0]], dtype=np.float32)


def _reason(error: BaseException) -> str:
    """FAISS's message without the place in its source."""
    return " ".join(str(error).split(": ", 1)[-1].split())[:200]
