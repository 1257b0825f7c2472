"""Candidates by a mixture: each mode asks for its share of them (kNN-Embed, arXiv 2205.06205).

K candidates are divided among a user's modes in proportion to their weights, by largest remainder.
Every mode ranks all items by the comparator (exact, in blocks); the lists are merged in turns, so
that any beginning of the result is divided about as the whole is. An item that an earlier turn has
taken is passed over for the mode's next one, and the user's training items are left out, so there
are K candidates wherever there are that many items.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from projects.twhin.comparators import Comparator, products
from projects.twhin.edges import Ids
from projects.twhin.history import History
from projects.twhin.modes import Modes
from tml import metrics

BLOCK_SCORES = 1 << 24  # scores held at once: 64 MB of float32
BLOCK_FLAGS = 1 << 26  # (user, item) flags held at once: 64 MB

NONE = -1
"""In a list of items: no further one."""


def budgets(weights: Tensor, num_candidates: int) -> Tensor:
    """How many of `num_candidates` each mode may bring, by largest remainder: weights (B, M) ≥ 0 of
    sum 1 → (B, M) int64 of that sum. Among equal remainders the earlier mode is given one.

    A row of zeros has no modes and is given nothing.
    """
    weights = weights.double()
    # Rounding in the weights must not decide what is an equal remainder.
    quotas = (weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-30)) * num_candidates
    quotas = (quotas * 2**20).round() / 2**20
    whole = quotas.floor()
    left = num_candidates - whole.sum(dim=1, keepdim=True)
    remainders = (quotas - whole).masked_fill(weights == 0, -1.0)
    place = remainders.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    given = whole + (place < left) * (weights > 0)
    return given.long()


def turns(given: Tensor, num_candidates: int) -> Tensor:
    """Which mode brings each candidate, in order: budgets (B, M) → (B, num_candidates) int64.

    Candidate j of a mode with budget b stands at (j + ½) / b of the list, the earlier mode first
    where two meet. Rows without modes are NONE.
    """
    number = torch.arange(num_candidates, dtype=torch.float64)
    places = (number + 0.5) / given.unsqueeze(2).clamp_min(1)  # (B, M, K)
    places = places.masked_fill(number >= given.unsqueeze(2), torch.inf)
    found = places.flatten(1).sort(dim=1, stable=True)
    order = found.indices[:, :num_candidates] // num_candidates
    return order.masked_fill(found.values[:, :num_candidates].isinf(), NONE)


def merge(lists: Tensor, order: Tensor, num_items: int) -> Tensor:
    """Take the modes' turns: lists (B, M, L) of items, best first, NONE behind the last; order
    (B, K) of modes, K ≤ L → (B, K) distinct items, NONE where the list is exhausted.
    """
    size = max(1, BLOCK_FLAGS // (num_items + 1))
    parts = zip(lists.split(size), order.split(size), strict=True)
    return torch.cat([_merge(some, turn, num_items) for some, turn in parts])


def _merge(lists: Tensor, order: Tensor, num_items: int) -> Tensor:
    # The last column stands for NONE, which is never free.
    taken = torch.zeros(len(lists), num_items + 1, dtype=torch.bool)
    taken[:, NONE] = True
    lists = torch.where(lists == NONE, num_items, lists)
    rows = torch.arange(len(lists))
    result = torch.full_like(order, num_items)
    for position in range(order.shape[1]):
        mode = order[:, position]
        wanted = lists[rows, mode.clamp_min(0)]  # (B, L)
        is_free = ~taken.gather(1, wanted) & (mode >= 0).unsqueeze(1)
        item = wanted[rows, is_free.int().argmax(dim=1)]
        item = torch.where(is_free.any(dim=1), item, num_items)
        taken[rows, item] = True
        result[:, position] = item
    return torch.where(result == num_items, NONE, result)


class Retrieval:
    """Ranks items for modes and for users, training items left out."""

    def __init__(
        self,
        items: Tensor,
        biases: Tensor | None,
        comparator: Comparator,
        score: Callable[[Tensor], Tensor],
    ) -> None:
        """items: (N, D) float32; biases: (N,), added to the scores of all modes; score: users (n,)
        → the model's scores (n, N) in fresh memory.
        """
        self._items, self._biases, self._comparator = items, biases, comparator
        self._score = score
        self.num_items = len(items)

    def single(self, users: Ids, seen: History, number: int) -> Tensor:
        """The best items of each user by the model: (B, number) int64."""
        size = max(1, BLOCK_SCORES // self.num_items)
        found = [torch.empty(0, number, dtype=torch.int64)]
        for start in range(0, len(users), size):
            block = users[start : start + size]
            scores = self._score(torch.from_numpy(block))
            found.append(self._best(scores, *seen.pairs(block), number))
        return torch.cat(found)

    def of_modes(self, users: Ids, modes: Modes, seen: History, number: int) -> Tensor:
        """The best items of each mode: (B, M, number) int64, NONE for modes of weight 0."""
        row, place = (modes.weights > 0).nonzero(as_tuple=True)
        result = torch.full((*modes.weights.shape, number), NONE)
        size = max(1, BLOCK_SCORES // self.num_items)
        for start in range(0, len(row), size):
            rows, places = row[start : start + size], place[start : start + size]
            scores = products(self._comparator, modes.queries[rows, places], self._items)
            if self._biases is not None:
                scores += self._biases
            masked = seen.pairs(users[rows.numpy()])
            result[rows, places] = self._best(scores, *masked, number)
        return result

    def _best(self, scores: Tensor, rows: Ids, items: Ids, number: int) -> Tensor:
        metrics.refuse_nan(scores)
        scores[torch.from_numpy(rows), torch.from_numpy(items)] = -torch.inf
        best = metrics.top_columns(scores, number)
        best = best.masked_fill(scores.gather(1, best).isneginf(), NONE)
        missing = torch.full((len(best), number - best.shape[1]), NONE)
        return torch.cat([best, missing], dim=1)


def retrieve(weights: Tensor, lists: Tensor, num_candidates: int, num_items: int) -> Tensor:
    """Candidates of B users from the lists of their modes: (B, num_candidates) int64, NONE behind
    the last.
    """
    given = budgets(weights, num_candidates)
    return merge(lists, turns(given, num_candidates), num_items)


def found(candidates: Tensor, relevant: tuple[Ids, Ids], num_items: int) -> Tensor:
    """Whether each candidate is relevant, NONE never: (B, K) bool. relevant: (row, item)."""
    padded = torch.where(candidates == NONE, num_items, candidates)
    rows, columns = (torch.from_numpy(np.ascontiguousarray(each)) for each in relevant)
    return metrics.found(padded, (rows, columns), num_items + 1)
