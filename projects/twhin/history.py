"""What each user has engaged with by one relation: distinct items and how often."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from projects.twhin.edges import Ids


@dataclass(frozen=True)
class History:
    """The distinct items of each user and how often he has each, users end to end."""

    offsets: Ids  # (U + 1,)
    items: Ids  # (n,), ascending within a user
    counts: Ids  # (n,)

    @classmethod
    def from_edges(cls, users: Ids, items: Ids, num_users: int, num_items: int) -> Self:
        """From the two ends of edges, in any order."""
        pairs, counts = np.unique(users * num_items + items, return_counts=True)
        offsets = np.searchsorted(pairs, np.arange(num_users + 1) * num_items)
        return cls(offsets, pairs % num_items, counts)

    def sizes(self, users: Ids) -> Ids:
        """Number of distinct items of each."""
        return self.offsets[users + 1] - self.offsets[users]

    def active(self) -> Ids:
        """The users who have an item."""
        return np.flatnonzero(np.diff(self.offsets))

    def entries(self, users: Ids) -> tuple[Ids, Ids]:
        """(row, place) of each distinct item of each user; rows count `users`, places are those of
        `items` and `counts`.
        """
        sizes = self.sizes(users)
        rows = np.repeat(np.arange(len(users)), sizes)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return rows, self.offsets[users][rows] + within

    def pairs(self, users: Ids) -> tuple[Ids, Ids]:
        """(row, item) of each distinct item of each user."""
        rows, places = self.entries(users)
        return rows, self.items[places]

    def without(self, other: "History") -> "History":
        """What is here and not in `other`, which is of as many users."""
        users = np.arange(len(self.offsets) - 1)
        width = max((int(each.items.max()) for each in (self, other) if len(each.items)), default=0)
        keys, others = (
            rows * (width + 1) + items for rows, items in (self.pairs(users), other.pairs(users))
        )
        kept = np.ones(len(keys), dtype=bool)
        if len(others):
            places = np.minimum(np.searchsorted(others, keys), len(others) - 1)
            kept = others[places] != keys
        return self._take(kept)

    def split(self, share: float, seed: int) -> tuple["History", "History"]:
        """(kept, held out): about `share` of each user's items are held out at random, at least one
        kept.
        """
        users = np.arange(len(self.offsets) - 1)
        rows, _ = self.entries(users)
        order = np.lexsort((np.random.default_rng(seed).random(len(rows)), rows))
        place = np.empty(len(rows), dtype=np.int64)
        place[order] = np.arange(len(rows)) - self.offsets[rows]  # a random rank within the user
        sizes = self.sizes(users)
        num_held = np.minimum(np.rint(sizes * share).astype(np.int64), np.maximum(sizes - 1, 0))
        held = place < num_held[rows]
        return self._take(~held), self._take(held)

    def _take(self, kept: NDArray[np.bool_]) -> "History":
        offsets = np.concatenate([[0], np.cumsum(kept)])[self.offsets]
        return History(offsets, self.items[kept], self.counts[kept])
