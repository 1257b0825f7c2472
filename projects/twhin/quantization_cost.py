"""What quantised vectors cost: bytes, the ranking of held-out edges, and neighbours.

`measure` gives the report that quantization.json holds, `render` shows it. Rankings are those of
`evaluate_split` with the decoded vectors in place of the full ones, on the same edges; where the
data are large, on a share of them, which the report names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.markup import escape

from projects.twhin.config import TwhinConfig
from projects.twhin.evaluate import evaluate_split, read_splits
from projects.twhin.exported import Floats
from projects.twhin.model import Vectors
from projects.twhin.quantize import Quantised
from projects.twhin.queries import normalised, similarity
from projects.twhin.ranking import Report
from projects.twhin.report import short
from tml import layout
from tml.data.parquet import DataError
from tml.distributed import Job
from tml.program import announce

K = 10
NUM_QUERIES = 500
"""Entities of a table whose neighbours are compared."""
MAX_SCORES = 150_000_000
"""Of one measurement: some seconds."""
BLOCK_SCORES = 1 << 24


class Measurement:
    """The full vectors of a run, to which quantised ones are compared."""

    def __init__(
        self, config: TwhinConfig, vectors: Vectors, split: str | None, max_edges: int | None
    ) -> None:
        """split: validation or test; None: validation, where there is none test."""
        self._vectors = vectors
        self._config = config
        self.split = split or next(
            (name for name in ("validation", "test") if getattr(config, f"{name}_data")), None
        )
        self.unmeasured = None if self.split else "the run has no held-out data"
        self._edges: Any = None
        if self.split:
            self._config = _sampled(config, vectors, max_edges)
            try:
                self._edges = read_splits(self._config)
            except (DataError, OSError) as error:
                self.unmeasured = f"not measured: {error}"
        self._neighbours: dict[str, NDArray[np.int64]] = {}
        self.full = self._rank(vectors)

    def cost(self, kind: str, quantised: Mapping[str, Quantised]) -> Report:
        """What one kind costs."""
        decoded = {name: table.decode() for name, table in quantised.items()}
        before = {name: table.numel() * 4 for name, table in self._vectors.tables.items()}
        after = {name: table.num_bytes for name, table in quantised.items()}
        tables = {
            name: {
                "kept_as": quantised[name].kind,
                "bytes_before": before[name],
                "bytes_after": after[name],
                "neighbours_kept": round(self._neighbours_kept(name, rows), 4),
            }
            for name, rows in decoded.items()
        }
        report: Report = {
            "kind": kind,
            "bytes_before": sum(before.values()),
            "bytes_after": sum(after.values()),
            "saved": round(1 - sum(after.values()) / sum(before.values()), 4),
            "tables": tables,
        }
        ranked = self._rank(self._with(decoded))
        if ranked is not None and self.full is not None:
            report["metrics"] = {
                name: {"full": self.full[name], "quantised": value, "lost": self.full[name] - value}
                for name, value in ranked.items()
            }
        return report

    def _with(self, decoded: Mapping[str, Floats]) -> Vectors:
        """The vectors with other tables."""
        full = self._vectors
        tables = {name: torch.from_numpy(rows) for name, rows in decoded.items()}
        return Vectors(self._config.model, tables, full.operators, full.biases)

    def _rank(self, vectors: Vectors) -> dict[str, float] | None:
        """mrr, hits@10 and recall@K, where they can be measured."""
        if self.unmeasured is not None or self.split is None:
            return None
        job = Job(0, 1, 1, torch.device("cpu"))
        report = evaluate_split(self._config, self.split, vectors, job, self._edges)
        found: dict[str, float] = {}
        if "link_prediction" in report:
            self.protocol = report["link_prediction"]["protocol"]
            means = report["link_prediction"]["mean"]
            found |= {name: means[name] for name in ("mrr", "hits@10") if name in means}
        means = report.get("retrieval", {}).get("mean", {})
        found |= {name: value for name, value in means.items() if name.startswith("recall@")}
        return found

    def _neighbours_kept(self, table: str, decoded: Floats) -> float:
        """Share of the 10 nearest of the full vectors that are among the 10 nearest of the decoded
        ones.
        """
        full = self._vectors.tables[table].numpy()
        if table not in self._neighbours:
            self._neighbours[table] = self._nearest(full)
        pairs = zip(self._neighbours[table], self._nearest(decoded), strict=True)
        kept = [len(np.intersect1d(a, b)) / max(1, len(a)) for a, b in pairs]
        return float(np.mean(kept))

    def _nearest(self, rows: Floats) -> NDArray[np.int64]:
        """The 10 nearest rows of some, themselves left out (queries, 10)."""
        measure = similarity(self._config.model.comparator)
        chosen = np.unique(np.arange(NUM_QUERIES, dtype=np.int64) * len(rows) // NUM_QUERIES)
        k = min(K, len(rows) - 1)
        candidates = rows if measure != "cosine" else normalised(rows)
        squares = np.einsum("nd,nd->n", candidates, candidates)
        found = np.empty((len(chosen), k), np.int64)
        size = max(1, BLOCK_SCORES // len(rows))
        for start in range(0, len(chosen), size):
            asked = chosen[start : start + size]
            scores = candidates[asked] @ candidates.T
            if measure != "cosine":  # of equal squares of the query: ‖q − c‖² but for them
                scores = 2 * scores - squares
            scores[np.arange(len(asked)), asked] = -np.inf
            found[start : start + size] = np.argpartition(-scores, max(0, k - 1), axis=1)[:, :k]
        return found


def measure(
    config: TwhinConfig,
    vectors: Vectors,
    quantised: Mapping[str, Mapping[str, Quantised]],
    split: str | None = None,
    max_edges: int | None = None,
) -> Report:
    """kind → table → quantised rows, each measured → what quantization.json holds."""
    announce("measuring the full vectors, to compare with")
    measurement = Measurement(config, vectors, split, max_edges)
    kinds = []
    for kind, tables in quantised.items():
        announce(f"measuring what {kind} costs")
        kinds.append(measurement.cost(kind, tables))
    report: Report = {
        "neighbours": f"recall@{K} of the exact neighbours by "
        f"{similarity(config.model.comparator)}, {NUM_QUERIES} entities a table"
    }
    if measurement.unmeasured is None:
        report |= {"split": measurement.split, "protocol": getattr(measurement, "protocol", "")}
        report["full"] = measurement.full
    else:
        report["unmeasured"] = measurement.unmeasured
    return {**report, "kinds": kinds}


def render(report: Report) -> RenderableType:
    """What a person sees."""
    names = _shown(report.get("full") or {})
    table = layout.table([""], ["MiB", "saved", *names])
    table.add_column("neighbours kept", justify="right", overflow="fold")
    kinds: Sequence[Report] = report["kinds"]
    if kinds:
        full = [short(report["full"][name]) for name in names]
        table.add_row("fp32", f"{kinds[0]['bytes_before'] / 2**20:,.2f}", "", *full, "")
    for kind in kinds:
        cells = [f"{kind['bytes_after'] / 2**20:,.2f}", f"{kind['saved']:.1%}"]
        for name in names:  # the change beneath the number, dim
            metric = kind["metrics"][name]
            cells.append(f"{short(metric['quantised'])}\n[dim]{_change(metric)}[/dim]")
        label = kind["kind"] + ("\n[dim]change[/dim]" if names else "")
        kept = [_kept(name, kind["kind"], table) for name, table in kind["tables"].items()]
        table.add_row(label, *cells, escape("\n".join(kept)))
    where = report.get("split")
    return layout.titled(
        "quantised",
        table,
        f"{where}: {report['protocol']}" if where else report["unmeasured"],
        f"neighbours: {report['neighbours']}",
        _note_on_small(kinds),
    )


def _kept(name: str, kind: str, table: Report) -> str:
    """`items 98.1%`; of a table that is in another kind than was asked for also in which."""
    other = "" if table["kept_as"] == kind else f" (as {table['kept_as']})"
    return f"{name}{other} {table['neighbours_kept']:.1%}"


def _note_on_small(kinds: Sequence[Report]) -> str:
    """Why tables are in another kind; "" where none is."""
    for kind in kinds:
        if any(table["kept_as"] != kind["kind"] for table in kind["tables"].values()):
            return f"as fp16: too few rows for {kind['kind']} to take less than fp16 does"
    return ""


def _shown(full: Mapping[str, float]) -> list[str]:
    """The metrics that a terminal of 80 columns has room for; the file has all."""
    recalls = [name for name in full if name.startswith("recall@")]
    return [name for name in ("mrr", *(recalls[:2] or ["hits@10"])) if name in full]


def _change(metric: Report) -> str:
    """Change of a metric in parts of the full one: +0.31%, or 0.00% without a sign."""
    share = -metric["lost"] / metric["full"] if metric["full"] else 0.0
    shown = f"{share:+.2%}"
    return "0.00%" if shown in ("+0.00%", "-0.00%") else shown


def _sampled(config: TwhinConfig, vectors: Vectors, max_edges: int | None) -> TwhinConfig:
    """The config with so few edges that they are ranked in seconds."""
    if max_edges is None:
        rows = [
            len(vectors.tables[relation.lhs]) + len(vectors.tables[relation.rhs])
            for relation in config.model.relations
        ]
        max_edges = max(500, MAX_SCORES // max(rows))
        if config.evaluation.max_edges is not None:
            max_edges = min(max_edges, config.evaluation.max_edges)
    settings = config.evaluation.model_copy(update={"max_edges": max_edges})
    return config.model_copy(update={"evaluation": settings, "planted": None})
