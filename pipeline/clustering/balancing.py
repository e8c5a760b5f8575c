"""Even lists: a price on every list that rises while it is too long. Pure.

SPANN charges a vector of list i its squared distance to the head plus λ·count_i (Chen et al., arXiv 2111.08566, Eq. 1 and
section 3.1), with one λ for all lists that is sought by trial. Here λ_i follows from the data: half of how much farther the
second nearest head is for the members of list i, so that a list of twice the mean rows loses about the half of them that
are nearest to another head. A tenth of every charge stays for good, which takes lists to even sizes in the end.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.clustering.assignment import NearHeads

__all__ = ["Membership", "Prices", "charged_lists", "recentred", "repriced"]

AT_ONCE, FOR_GOOD = 0.5, 0.1
"""Of a list's gap. *Measured* on heaps of uneven size: .5 for good lets sizes swing for ten rounds, none leaves them uneven."""


LISTS_PER_BLOCK = 64
"""Whose members are summed together: float64 copies of them are what counts."""


class Prices(NamedTuple):
    """What each list costs, in squared L2."""

    now: NDArray[np.float32]
    """(num_lists,) what is charged."""
    base: NDArray[np.float32]
    """(num_lists,) the part of it that has come to stay."""

    @classmethod
    def none(cls, num_lists: int) -> "Prices":
        """Every list is free."""
        return cls(np.zeros(num_lists, np.float32), np.zeros(num_lists, np.float32))


class Membership(NamedTuple):
    """What the members of lists sum to; those of several sets of vectors add up."""

    lists: NDArray[np.int64]
    """(k,) numbers of the lists, rising."""
    rows: NDArray[np.int64]
    """(k,) members."""
    total: NDArray[np.float64]
    """(k, d) sum of the members."""
    gap: NDArray[np.float64]
    """(k,) sum over the members of how much farther their second nearest head is than their nearest, in squared L2."""

    @classmethod
    def of(cls, vectors: NDArray[np.float32], near: NearHeads, list_no: NDArray[np.int32]) -> "Membership":
        """Sums over vectors, of the lists that have any.

        Args:
            vectors: (n, d).
            near: Their nearest heads.
            list_no: (n,) the list of each.
        """
        order = np.argsort(list_no, kind="stable")
        lists, firsts, rows = np.unique(list_no[order], return_index=True, return_counts=True)
        gaps = near.distance[:, 1:2].sum(axis=1, dtype=np.float64) - near.distance[:, 0].astype(np.float64)
        # A list without a rival keeps all it has, whatever it costs.
        gaps = np.where(np.isfinite(gaps), np.maximum(gaps, 0.0), 0.0)
        if not len(lists):
            return cls(lists.astype(np.int64), rows, np.zeros((0, vectors.shape[1])), gaps)
        total = np.empty((len(lists), vectors.shape[1]))
        for start in range(0, len(lists), LISTS_PER_BLOCK):
            block = slice(start, start + LISTS_PER_BLOCK)
            first = firsts[start]
            members = order[first : first + rows[block].sum()]
            total[block] = np.add.reduceat(vectors[members].astype(np.float64), firsts[block] - first, axis=0)
        return cls(lists.astype(np.int64), rows, total, np.add.reduceat(gaps[order], firsts))

    def over(self, first: int, stop: int) -> "Membership":
        """Sums of all lists from `first` to before `stop`, which are to hold those that are summed here."""
        rows, gap = np.zeros(stop - first, np.int64), np.zeros(stop - first)
        total = np.zeros((stop - first, self.total.shape[1]))
        at = self.lists - first
        rows[at], gap[at], total[at] = self.rows, self.gap, self.total
        return Membership(np.arange(first, stop), rows, total, gap)

    def plus(self, other: "Membership") -> "Membership":
        """Sums over both sets of vectors, of the same lists."""
        return Membership(self.lists, self.rows + other.rows, self.total + other.total, self.gap + other.gap)


def charged_lists(near: NearHeads, prices: NDArray[np.float32]) -> NDArray[np.int32]:
    """List of each vector: that of the least squared distance plus price, the nearer head's among equals.

    Args:
        near: The nearest heads of n vectors, at least one of each.
        prices: (num_lists,) float32.

    Returns:
        (n,) int32.
    """
    best = (near.distance + prices[near.list_no]).argmin(axis=1)
    return near.list_no[np.arange(len(best)), best]


def recentred(heads: NDArray[np.float32], members: Membership) -> NDArray[np.float32]:
    """(k, d) means of the members of k lists, all of these; the head of one without any stays."""
    rows = members.rows[:, None]
    return np.where(rows > 0, members.total / np.maximum(rows, 1), heads).astype(np.float32)


def repriced(prices: Prices, members: Membership, *, mean_rows: float) -> Prices:
    """Prices after a round: higher where a list is too long, lower where it is too short.

    Args:
        prices: Of the round before.
        members: What the same lists held in it.
        mean_rows: Rows that a list should hold.
    """
    gap = members.gap / np.maximum(members.rows, 1)
    usual = float(members.gap.sum() / max(int(members.rows.sum()), 1))
    excess = np.where(members.rows > 0, gap, usual) * np.clip(members.rows / mean_rows - 1, -1, 1)
    base = (prices.base + FOR_GOOD * excess).astype(np.float32)
    return Prices((base + AT_ONCE * excess).astype(np.float32), base)
