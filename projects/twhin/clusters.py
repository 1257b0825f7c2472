"""k-means over the vectors of items: the interests that mixtures are made of.

Lloyd's algorithm from a k-means++ start (Arthur and Vassilvitskii 2007), in blocks, so that no
(items, clusters, D) array is made. Spherical where the comparator goes by direction (dot, cosine):
vectors are brought to length 1, centroids are kept there, and the nearest is the one of largest
cosine; under dot the length of a vector tells how popular an item is, not what it is about. The
same seed on the same number of threads gives the same clusters.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from projects.twhin.comparators import Comparator

BLOCK_SIMILARITIES = 1 << 22  # (items, clusters) held at once: 16 MB of float32
ROUNDS = 30
"""At most; most runs stand still earlier."""
ITEMS_PER_CLUSTER = 1000
"""Centroids are fitted to at most so many items a cluster, drawn at random."""


@dataclass(frozen=True)
class Clusters:
    """Centroids and the cluster of each item."""

    centroids: Tensor  # (C, D) float32, of length 1 where spherical
    of_items: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.centroids)


def is_spherical(comparator: Comparator) -> bool:
    """Whether items are alike by their direction alone."""
    return comparator in ("dot", "cosine")


def cluster(
    vectors: Tensor, num_clusters: int, comparator: Comparator, seed: int, fitted: Tensor
) -> Clusters:
    """Cluster all items of `vectors` (N, D) by centroids that are fitted to the items `fitted` (n,)
    alone: those that training has placed.

    There are at most `num_clusters`, fewer where there are fewer distinct vectors.
    """
    spherical = is_spherical(comparator)
    points = F.normalize(vectors, dim=1) if spherical else vectors
    random = np.random.default_rng(seed)
    chosen = fitted
    if len(chosen) > (most := ITEMS_PER_CLUSTER * num_clusters):
        chosen = chosen[torch.from_numpy(np.sort(random.permutation(len(chosen))[:most]))]
    sample = points[chosen]
    centroids = _start(sample, num_clusters, random)
    before: Tensor | None = None
    for _ in range(ROUNDS):
        nearest, distances = _nearest(sample, centroids)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        centroids = _means(sample, nearest, distances, len(centroids))
        if spherical:
            centroids = F.normalize(centroids, dim=1)
    return Clusters(centroids, _nearest(points, centroids)[0])


def _start(points: Tensor, num_clusters: int, random: np.random.Generator) -> Tensor:
    """k-means++: each next centroid is a point drawn by its squared distance to the nearest one."""
    chosen = [int(random.integers(len(points)))]
    distances = _squares(points, points[chosen])[:, 0]
    while len(chosen) < num_clusters:
        mass = distances.double().cumsum(0).numpy()
        if mass[-1] <= 0:  # as many as there are distinct points
            break
        chosen.append(int(np.searchsorted(mass, random.random() * mass[-1], side="right")))
        distances = torch.minimum(distances, _squares(points, points[chosen[-1:]])[:, 0])
        distances[chosen[-1]] = 0.0  # rounding may leave a little
    return points[chosen]


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each point and its squared distance: (N,) int64, (N,) float32."""
    size = max(1, BLOCK_SIMILARITIES // len(centroids))
    found = [_squares(block, centroids).min(dim=1) for block in points.split(size)]
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])


def _means(points: Tensor, nearest: Tensor, distances: Tensor, num_clusters: int) -> Tensor:
    """Mean of each cluster's points; one that has lost all of its points gets one of the points
    that lie farthest from theirs.
    """
    counts = torch.bincount(nearest, minlength=num_clusters)
    sums = torch.zeros(num_clusters, points.shape[1]).index_add_(0, nearest, points)
    means = sums / counts.clamp_min(1).unsqueeze(1)
    if len(empty := (counts == 0).nonzero().squeeze(1)):
        means[empty] = points[distances.topk(len(empty)).indices]
    return means


def _squares(points: Tensor, centroids: Tensor) -> Tensor:
    """Squared distances (n, C)."""
    squares = points.square().sum(dim=1, keepdim=True) + centroids.square().sum(dim=1)
    return torch.addmm(squares, points, centroids.T, alpha=-2).clamp_min_(0.0)
