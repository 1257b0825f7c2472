"""Several weighted modes in place of a user's one vector (kNN-Embed, arXiv 2205.06205).

A user's training edges of a relation are a distribution over items, p(j|u) = count(u, j) / n_u. It
is smoothed with those of his nearest users by vector, as the paper does with counts over clusters:

    q(j|u) = (1 − s) p(j|u) + s / |kNN(u)| · Σ_{v ∈ kNN(u)} p(j|v)  s = `smoothing`
    q(c|u) = Σ_{j ∈ c} q(j|u)                                       the weight of mode c
    m(c, u) = Σ_{j ∈ c} q(j|u) θ_j / q(c|u)                         its centroid

so a mode's centroid is that of the user's items in its cluster, his neighbours' ones counted in by
their share; where only neighbours have been, it is theirs. The M heaviest modes are kept and their
weights brought to sum 1.

The query of a mode is compared with items by the model's comparator, and stands between its
centroid and the user's own query op_r(θ_u) = L_r θ_u + b_r:

    dot       α L_r θ_u + (1 − α) ‖L_r θ_u‖ m / ‖m‖ + b_r
    cosine    α op_r(θ_u) / ‖op_r(θ_u)‖ + (1 − α) m / ‖m‖
    l2        α op_r(θ_u) + (1 − α) m

`blend` is α: 0 asks by centroids alone, as in the paper, 1 gives every mode the single vector's
ranking. Under dot, ⟨b_r, θ_j⟩ is the same for all users, the item's bias in this relation; modes
keep it. Elsewhere b_r carries users to where their items lie, and centroids lie there already.

A user without training edges is his neighbours' mean whatever `smoothing` is; users without
training edges are nobody's neighbours; a user with neither has one mode, his own query, of cluster
−1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from projects.twhin.clusters import Clusters, is_spherical
from projects.twhin.comparators import Comparator, products
from projects.twhin.edges import Ids
from projects.twhin.history import History
from projects.twhin.operators import Operators

BLOCK_SIMILARITIES = 1 << 24  # (users, users) held at once: 64 MB of float32
BLOCK_ENTRIES = 1 << 21  # (user, item) of users and neighbours and (user, cluster) held at once
NEIGHBOUR_POOL = 100_000
"""Where more users have training edges, so many, drawn at random, are looked at as neighbours."""
NOBODY = -1
NO_CLUSTER = -1


@dataclass(frozen=True)
class Modes:
    """The modes of B users, heaviest first. Who has fewer than M has weight 0 and NO_CLUSTER in the
    rest.
    """

    clusters: Tensor  # (B, M) int64
    weights: Tensor  # (B, M) float32, of sum 1
    queries: Tensor  # (B, M, D) float32


@dataclass(frozen=True)
class Space:
    """One relation of a model: the vectors of its two tables and how they are compared."""

    users: Tensor  # (U, D) float32
    items: Tensor  # (N, D) float32
    operators: Operators
    relation: int
    comparator: Comparator

    @torch.no_grad()
    def own_queries(self, users: Ids) -> Tensor:
        """op_r(θ_u): (B, D)."""
        numbers = torch.full((len(users),), self.relation)
        return self.operators.apply_to(self.users[torch.from_numpy(users)], numbers)

    @torch.no_grad()
    def offset(self) -> Tensor:
        """b_r: (1, D), zeros where the operator has none."""
        found = self.operators.offset(torch.tensor([self.relation]))
        return torch.zeros(1, self.users.shape[1]) if found is None else found


class Mixture:
    """Makes the modes of users from what they and their neighbours have engaged with."""

    def __init__(self, space: Space, history: History, clusters: Clusters, seed: int = 0) -> None:
        """history: of all users of the space."""
        self.history, self.clusters = history, clusters
        self._space = space
        pool = history.active()
        if len(pool) > NEIGHBOUR_POOL:
            chosen = np.random.default_rng(seed).permutation(len(pool))[:NEIGHBOUR_POOL]
            pool = pool[np.sort(chosen)]
        self._pool = pool
        rows = np.repeat(np.arange(len(space.users)), np.diff(history.offsets))
        totals = np.bincount(rows, weights=history.counts, minlength=len(space.users))
        self._shares = history.counts / totals[rows]  # p(j|u)
        self._clusters_of = clusters.of_items.numpy()

    def neighbours(self, users: Ids, number: int) -> Ids:
        """The nearest users of each who have training edges, himself left out: (B, number) or
        fewer columns where there are fewer users, NOBODY behind the last.

        By cosine where the comparator goes by direction, else by distance.
        """
        number = min(number, len(self._pool))
        found = [np.empty((0, number), dtype=np.int64)]
        if not number:
            return np.empty((len(users), 0), dtype=np.int64)
        by: Comparator = "dot" if is_spherical(self._space.comparator) else "squared_l2"
        pool = self._placed(self._pool)
        for block in _blocks(users, max(1, BLOCK_SIMILARITIES // len(pool))):
            similarities = products(by, self._placed(block), pool)
            found.append(self._nearest(similarities, block, number))
        return np.concatenate(found)

    def _placed(self, users: Ids) -> Tensor:
        vectors = self._space.users[torch.from_numpy(users)]
        return F.normalize(vectors, dim=1) if is_spherical(self._space.comparator) else vectors

    def _nearest(self, similarities: Tensor, users: Ids, number: int) -> Ids:
        places = np.minimum(np.searchsorted(self._pool, users), len(self._pool) - 1)
        own = np.flatnonzero(self._pool[places] == users)
        similarities[torch.from_numpy(own), torch.from_numpy(places[own])] = -torch.inf
        best = similarities.topk(number, dim=1)
        nearest = self._pool[best.indices.numpy()]
        return np.where(best.values.isneginf().numpy(), NOBODY, nearest)

    def modes(
        self, users: Ids, neighbours: Ids, *, smoothing: float, blend: float, num_modes: int
    ) -> Modes:
        """The modes of `users` (B,), at least one, smoothed by `smoothing` over `neighbours`
        (B, k).
        """
        parts = [
            self._modes(users[part], neighbours[part], smoothing, blend, num_modes)
            for part in self._parts(users, neighbours)
        ]
        return Modes(
            torch.cat([part.clusters for part in parts]),
            torch.cat([part.weights for part in parts]),
            torch.cat([part.queries for part in parts]),
        )

    def _parts(self, users: Ids, neighbours: Ids) -> Iterator[slice]:
        """Stretches of the users whose own and neighbours' items fit into one block."""
        sizes = self.history.sizes(users) + len(self.clusters)
        sizes = sizes + np.where(neighbours >= 0, self.history.sizes(neighbours), 0).sum(axis=1)
        number = np.cumsum(sizes) // BLOCK_ENTRIES
        starts: Sequence[int] = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(users)], strict=True):
            yield slice(start, stop)

    def _modes(
        self, users: Ids, neighbours: Ids, smoothing: float, blend: float, num_modes: int
    ) -> Modes:
        rows, items, q = self._smoothed(users, neighbours, smoothing)
        num_clusters = len(self.clusters)
        cell = rows * num_clusters + self._clusters_of[items]
        mass = np.bincount(cell, weights=q, minlength=len(users) * num_clusters)
        table = torch.from_numpy(mass).view(len(users), num_clusters)
        found = table.sort(dim=1, descending=True, stable=True)
        kept = found.values[:, :num_modes]
        clusters = found.indices[:, :num_modes].masked_fill(kept == 0, NO_CLUSTER)
        total = kept.sum(dim=1, keepdim=True)
        weights = (kept / total.clamp_min(1e-30)).float()
        centroids = self._centroids(items, q, cell, clusters)
        centroids = centroids / kept.clamp_min(1e-30).unsqueeze(2).float()
        own = self._space.own_queries(users)
        queries = self._blended(own, centroids, blend)
        # Who has no mode at all asks by his own query.
        lost = total.squeeze(1) == 0
        weights[lost, 0] = 1.0
        queries[lost, 0] = own[lost]
        return Modes(clusters, weights, queries)

    def _smoothed(
        self, users: Ids, neighbours: Ids, smoothing: float
    ) -> tuple[Ids, Ids, NDArray[np.float64]]:
        """q(j|u) as (row, item, share); an item may come several times."""
        rows, places = self.history.entries(users)
        is_near = neighbours >= 0
        num_near = is_near.sum(axis=1)
        # Who has no edges is his neighbours; who has no neighbours is himself.
        near = np.where(self.history.sizes(users) > 0, smoothing, 1.0)
        near = np.where(num_near > 0, near, 0.0)
        q = (1 - near)[rows] * self._shares[places]
        if near.any():
            owners = np.nonzero(is_near)[0]
            near_rows, near_places = self.history.entries(neighbours[is_near])
            near_rows = owners[near_rows]
            share = (near / np.maximum(num_near, 1))[near_rows] * self._shares[near_places]
            rows, places = np.append(rows, near_rows), np.append(places, near_places)
            q = np.append(q, share)
        return rows, self.history.items[places], q

    def _centroids(self, items: Ids, q: NDArray[Any], cell: Ids, clusters: Tensor) -> Tensor:
        """Σ q(j|u) θ_j over the items of each kept mode: (B, M, D)."""
        num_users, num_modes = clusters.shape
        slots = np.full((num_users, len(self.clusters)), -1, dtype=np.int64)
        row, place = np.nonzero(clusters.numpy() != NO_CLUSTER)
        slots[row, clusters.numpy()[row, place]] = row * num_modes + place
        slot = slots.ravel()[cell]
        kept = np.flatnonzero(slot >= 0)
        order = kept[np.argsort(slot[kept], kind="stable")]
        starts = np.searchsorted(slot[order], np.arange(num_users * num_modes))
        vectors = self._space.items
        sums: Tensor = F.embedding_bag(
            torch.from_numpy(items[order]),
            vectors,
            torch.from_numpy(starts),
            mode="sum",
            per_sample_weights=torch.from_numpy(q[order]).to(vectors.dtype),
        )
        return sums.view(num_users, num_modes, -1)

    def _blended(self, own: Tensor, centroids: Tensor, blend: float) -> Tensor:
        """Queries (B, M, D) between users' own ones (B, D) and centroids (B, M, D)."""
        comparator = self._space.comparator
        if comparator == "dot":
            offset = self._space.offset()
            moved = own - offset
            length: Tensor = torch.linalg.vector_norm(moved, dim=1)
            towards = F.normalize(centroids, dim=2) * length.view(-1, 1, 1)
            return moved.unsqueeze(1) * blend + towards * (1 - blend) + offset
        if comparator == "cosine":
            own, centroids = F.normalize(own, dim=1), F.normalize(centroids, dim=2)
        return own.unsqueeze(1) * blend + centroids * (1 - blend)


def _blocks(users: Ids, size: int) -> Iterator[Ids]:
    for start in range(0, len(users), size):
        yield users[start : start + size]
