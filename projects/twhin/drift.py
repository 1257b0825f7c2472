"""How far the vectors of a run have moved from those of an earlier one that knew the same entities.

For each table: cosine of old and new vector, their lengths and distance; of how many of an entity's
k nearest (by cosine, among the matched rows) are the same; and what remains when the old vectors
are turned as a whole to lie as near as they can to the new ones (orthogonal Procrustes: R = U Vᵀ of
the SVD of oldᵀ new). Scores between entities of one table do not see such a turn; who has stored
old vectors does.

    python projects/twhin/drift.py --run=NEW [--previous=OLD] [--json]

OLD and NEW are run folders, step folders or folders of exported vectors; without --previous it is
what NEW was started from.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from projects.twhin.anchors import FOLDER, map_rows, path_of
from projects.twhin.previous import open_previous
from projects.twhin.quantize import refuse_not_finite
from projects.twhin.vocabulary import match
from projects.twhin.warm_start import read_report
from tml import layout, program
from tml.config import ConfigError

Report = dict[str, Any]

K = 10
MAX_QUERIES = 2000
"""Entities whose nearest are looked for."""
MAX_ROWS = 1 << 20
"""Matched rows that are measured at most, spread evenly; said in the report."""
BLOCK_SCORES = 1 << 24
PERCENTILES = (1, 10, 50)


def measure(old: Tensor, new: Tensor, k: int = K) -> Report:
    """Drift from `old` to `new`, both (n, D) float32 with n > 0, row by row the same entities."""
    cosine, distance = F.cosine_similarity(old, new), (old - new).norm(dim=1)
    shares = torch.tensor([p / 100 for p in PERCENTILES])
    quantiles = _quantiles(cosine, shares)
    return {
        "rows": len(old),
        "cosine": {
            "mean": float(cosine.mean()),
            **{f"p{p}": value for p, value in zip(PERCENTILES, quantiles, strict=True)},
        },
        "norm": {"old": float(old.norm(dim=1).mean()), "new": float(new.norm(dim=1).mean())},
        "distance": float(distance.mean()),
        "neighbors": _neighbours_kept(old, new, k),
        "rotation": _rotation(old, new),
    }


def of_run(save_dir: Path, tables: Mapping[str, Tensor]) -> Report | None:
    """Table → drift of its rows (rows, D) from those that the run was started from; None where it
    was started cold, or its folder no longer holds them.
    """
    folder = save_dir / FOLDER
    report: Report = {}
    for name, rows in tables.items():
        if not path_of(folder, name).is_file():
            continue
        previous = map_rows(folder, name)
        if previous.shape != rows.shape:
            continue
        known = (~previous[:, 0].isnan()).nonzero().squeeze(1)
        if len(known):
            chosen = spread(known)
            report[name] = {"matched": len(known), **measure(previous[chosen], rows[chosen])}
    return report or None


def between(old: Path, new: Path, k: int = K) -> Report:
    """Table → drift between two runs, rows matched by entity."""
    if k < 1:
        raise ConfigError(f"--k: {k} is no number of neighbors; give 1 or more")
    before, after = open_previous(old, "--previous"), open_previous(new, "--run")
    if before.dim != after.dim:
        raise ConfigError(
            f"the vectors of {before.folder} have dimension {before.dim}, those of {after.folder} "
            f"{after.dim}: they cannot be compared"
        )
    report: Report = {}
    for name in before.num_rows:
        if name not in after.num_rows:
            continue
        places = torch.from_numpy(match(after.names(name), before.names(name), name))
        known = (places >= 0).nonzero().squeeze(1)
        if len(known):
            chosen = spread(known)
            vectors = [source.rows(name) for source in (before, after)]
            for rows in vectors:  # means of what is no number would be none
                refuse_not_finite(name, rows)
            old_rows, new_rows = map(torch.from_numpy, vectors)
            measured = measure(old_rows[places[chosen]], new_rows[chosen], k)
            report[name] = {"matched": len(known), **measured}
    if not report:
        raise ConfigError(f"{before.folder} and {after.folder} have no entity in common")
    return report


def spread(rows: Tensor) -> Tensor:
    """At most MAX_ROWS of `rows`, evenly spaced."""
    if len(rows) <= MAX_ROWS:
        return rows
    return rows[torch.arange(MAX_ROWS) * len(rows) // MAX_ROWS]


def _quantiles(values: Tensor, shares: Tensor) -> list[float]:
    """Values below which those shares lie; torch.quantile takes no more than 2^24 numbers."""
    ordered = values.sort().values
    return [float(ordered[int(share * (len(ordered) - 1))]) for share in shares]


def _neighbours_kept(old: Tensor, new: Tensor, k: int) -> Report | None:
    """Mean share of an entity's k nearest that stay among them; None for a single row."""
    k = min(k, len(old) - 1)
    if k < 1:
        return None
    num_queries = min(MAX_QUERIES, len(old))
    queries = torch.arange(num_queries) * len(old) // num_queries
    directions = [F.normalize(rows) for rows in (old, new)]
    kept = 0
    for block in queries.split(max(1, BLOCK_SCORES // len(old))):
        nearest = []
        for rows in directions:
            scores = rows[block] @ rows.T
            scores[torch.arange(len(block)), block] = -torch.inf  # not of itself
            nearest.append(scores.topk(k, dim=1).indices)
        kept += int((nearest[0].unsqueeze(2) == nearest[1].unsqueeze(1)).sum())
    return {"k": k, "entities": num_queries, "kept": kept / (k * num_queries)}


def _rotation(old: Tensor, new: Tensor) -> Report | None:
    """Drift after the best rotation (or reflection) of the old vectors, and the share of the
    squared distance that it takes away; None for no more rows than dimensions, which a rotation
    fits as it likes.
    """
    num_rows, dim = old.shape
    if num_rows <= dim:
        return None
    u, _, vt = torch.linalg.svd(old.T.double() @ new.double())
    turned = old @ (u @ vt).float()
    before, after = (
        float((rows - new).square().sum(dtype=torch.float64)) for rows in (old, turned)
    )
    return {
        "share": 1 - after / before if before else 0.0,
        "cosine": float(F.cosine_similarity(turned, new).mean()),
        "distance": float((turned - new).norm(dim=1).mean()),
    }


def render(report: Report) -> RenderableType:
    """The table that a person sees."""
    k = next((r["neighbors"]["k"] for r in report.values() if r["neighbors"]), K)
    low, *_, _ = PERCENTILES
    headings = ["matched", "cosine\nmean", f"lowest\n{low}%", "median"]
    headings += ["length\nold→new", "moved", "nearest\nkept", "turned"]
    table = layout.table(["table"], headings)
    for name, row in report.items():
        cosine, norm = row["cosine"], row["norm"]
        table.add_row(
            Text(name),
            f"{row['matched']:,}",
            *(f"{cosine[key]:.3f}" for key in ("mean", f"p{low}", f"p{PERCENTILES[-1]}")),
            f"{norm['old']:.3g}→{norm['new']:.3g}",
            f"{row['distance']:.3g}",
            f"{row['neighbors']['kept']:.1%}" if row["neighbors"] else "–",
            f"{row['rotation']['share']:.1%}" if row["rotation"] else "–",
        )
    notes = (
        f"cosine: of old and new vector; {low}% of the entities lie below lowest {low}%",
        "length: mean length of the vectors; moved: mean distance from old to new",
        f"nearest kept: how many of an entity's {k} nearest (by cosine) are the same",
        "turned: share of moved² that one turn of all old vectors alike explains;\n"
        "  such a turn changes no score between entities of the table",
    )
    return layout.titled("drift", table, *notes)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="How far vectors have moved between two runs.")
    parser.add_argument("--run", type=Path, required=True, help="the new run, or its vectors")
    parser.add_argument("--previous", type=Path, help="the earlier one; default: warm_start's")
    parser.add_argument("--k", type=int, default=K, help=f"nearest to compare; default {K}")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    return program.exit_code(lambda: _show(arguments), arguments.run)


def _show(arguments: argparse.Namespace) -> None:
    previous = arguments.previous or _started_from(arguments.run)
    report = between(previous, arguments.run, arguments.k)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        Console().print(render(report))


def _started_from(run: Path) -> Path:
    report = read_report(run)
    if report is None:
        open_previous(run, "--run")  # says so where it is not there at all
        raise ConfigError(f"{run} was not started warm; name the earlier run with --previous")
    previous = Path(report["previous"])
    if not previous.is_dir():
        raise ConfigError(
            f"{previous}, which {run} was started from, is not there any more; name the earlier "
            "run with --previous"
        )
    return previous


if __name__ == "__main__":
    sys.exit(main())
