"""What candidates are worth: how many held-out items are among them, and how diverse they are."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Group, RenderableType
from torch import Tensor
from torch.nn import functional as F

from projects.twhin.clusters import Clusters
from projects.twhin.edges import Ids
from projects.twhin.mixture_retrieval import NONE, found
from tml import layout, metrics

Report = dict[str, Any]
METRICS = ("recall", "ndcg", "hit", "distance", "clusters", "entropy")
PROTOCOL = (
    "all items, training edges left out, mean over users with an edge to find; distance: 1 − "
    "cosine of two candidates of a user, mean over pairs; clusters: different ones among them; "
    "entropy: of their shares, in nats; coverage: items that are anybody's candidate, of all"
)


class Tally:
    """Adds up the metrics of users' candidates, block by block."""

    def __init__(self, items: Tensor, clusters: Clusters, k: Sequence[int]) -> None:
        """items: (N, D) vectors."""
        self._directions = F.normalize(items, dim=1)
        self._squares = self._directions.square().sum(dim=1)  # 1, or 0 of a zero vector
        self._clusters = clusters
        self._k = k
        self._users = 0
        self._sums = torch.zeros(len(k), len(METRICS), dtype=torch.float64)
        self._seen = torch.zeros(len(k), len(items), dtype=torch.bool)

    def add(self, cut: int, candidates: Tensor, relevant: tuple[Ids, Ids]) -> None:
        """Candidates (B, k[cut]), best first, against (row, item) of what was sought."""
        if cut == 0:
            self._users += len(candidates)
        num_relevant = torch.bincount(torch.from_numpy(relevant[0]), minlength=len(candidates))
        is_found = found(candidates, relevant, len(self._directions))
        k = self._k[cut]
        entropy, clusters = self._spread(candidates)
        values = [
            metrics.recall_at(is_found, num_relevant, k),
            metrics.ndcg_at(is_found, num_relevant, k),
            metrics.hit_at(is_found, k),
            self._distances(candidates),
            clusters,
            entropy,
        ]
        self._sums[cut] += torch.stack([value.double().sum() for value in values])
        self._seen[cut, candidates[candidates != NONE]] = True

    def _distances(self, candidates: Tensor) -> Tensor:
        """Mean of 1 − cosine over the pairs of each row: (B,), 0 where there is no pair."""
        is_there = (candidates != NONE).float()
        vectors = self._directions[candidates.clamp_min(0)]
        count = is_there.sum(dim=1).double()
        sums = torch.bmm(is_there.unsqueeze(1), vectors).squeeze(1).double()
        squares = (self._squares[candidates.clamp_min(0)] * is_there).sum(dim=1).double()
        # Σ_{i≠j} ⟨a_i, a_j⟩ = ‖Σ a_i‖² − Σ ‖a_i‖²
        cosines = sums.square().sum(dim=1) - squares
        pairs = count * (count - 1)
        return torch.where(pairs > 0, 1 - cosines / pairs.clamp_min(1), 0.0)

    def _spread(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Entropy of the candidates' clusters and the number of different ones: (B,) each."""
        num_clusters = len(self._clusters)
        of_items = self._clusters.of_items[candidates.clamp_min(0)]
        of_items = torch.where(candidates == NONE, num_clusters, of_items)
        counts = torch.zeros(len(candidates), num_clusters + 1, dtype=torch.float64)
        counts.scatter_add_(1, of_items, torch.ones_like(of_items, dtype=torch.float64))
        shares = counts[:, :-1] / counts[:, :-1].sum(dim=1, keepdim=True).clamp_min(1)
        return torch.special.entr(shares).sum(dim=1), (shares > 0).sum(dim=1)

    def report(self) -> dict[str, float]:
        """`<metric>@<K>` → mean over the users; `coverage@<K>` → share of the catalogue."""
        means = self._sums / max(1, self._users)
        values = {
            f"{metric}@{k}": float(means[cut, number])
            for number, metric in enumerate(METRICS)
            for cut, k in enumerate(self._k)
        }
        coverage = self._seen.double().mean(dim=1)
        return values | {f"coverage@{k}": float(coverage[cut]) for cut, k in enumerate(self._k)}


def render(report: Report) -> RenderableType:
    """The single vector beside the mixture, and what was tried where settings were chosen."""
    parts: list[RenderableType] = []
    if "tuning" in report:
        parts.append(_tuning_table(report["tuning"]))
    settings = report["settings"]
    title = (
        f"{report['relation']}: {report['users']:,} users of {report['split']}; "
        f"{settings['clusters']:,} clusters, {settings['modes']} modes, "
        f"{settings['neighbors']} neighbors, smoothing {settings['smoothing']:g}, "
        f"blend {settings['blend']:g}"
    )
    headings = [*METRICS, "coverage"]
    table = layout.table(["K", ""], headings)
    for k in report["k"]:
        for name in ("single", "mixture"):
            values = [report[name][f"{heading}@{k}"] for heading in headings]
            shown = str(k) if name == "single" else ""
            table.add_row(shown, name, *map(_short, values), end_section=name == "mixture")
    parts.append(layout.titled(title, table, report["protocol"]))
    return Group(*parts)


def _tuning_table(tuning: Report) -> RenderableType:
    measured = [name for name in tuning["tried"][0] if name not in tuning["chosen"]]
    table = layout.table(right=[*tuning["chosen"], *measured])
    table.add_row("single", *[""] * (len(tuning["chosen"]) - 1), *_cells(tuning["single"]))
    for row in tuning["tried"]:
        is_chosen = all(row[name] == value for name, value in tuning["chosen"].items())
        settings = [f"{row[name]:g}" for name in tuning["chosen"]]
        values = _cells({name: row[name] for name in measured})
        table.add_row(*settings, *values, style="bold" if is_chosen else None)
    return layout.titled(f"tried on {tuning['users']:,} users: {tuning['on']}", table)


def _cells(values: dict[str, float]) -> list[str]:
    return [_short(value) for value in values.values()]


def _short(value: float) -> str:
    """Three or four digits, without a zero in front: .1806, 12.31."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}".removeprefix("0")
