"""From scored rows to hits: candidates, groups of lists, one hit per document. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.identity import DOC_HASH_BYTES, sort_keys

__all__ = [
    "Candidates",
    "RunningBest",
    "best_documents",
    "best_rows",
    "borders",
    "groups_of_lists",
    "spans_of",
]


@dataclass(frozen=True)
class Candidates:
    """Scored vectors of one query."""

    places: NDArray[np.int64]
    """(n,) where they are: in an index partition << 32 | row."""
    scores: NDArray[np.float32]
    """(n,) inner products, or estimates of them."""


def best_rows(candidates: Candidates, depth: int) -> Candidates:
    """The `depth` best places by score, best first; ties go to the lower place, so that the order is one.

    A vector comes as often as lists that have it were probed.
    """
    scores, places = candidates.scores, candidates.places
    wanted = 2 * depth
    while len(scores) > wanted:
        # Everything as good as the last of the top joins the sort: a tie at the border must not depend on the partition.
        border = np.partition(scores, len(scores) - wanted)[len(scores) - wanted]
        kept = scores >= border
        if len(np.unique(places[kept])) >= depth:
            scores, places = scores[kept], places[kept]
            break
        wanted *= 2
    order = np.lexsort((places, -scores))
    # Copies of a code may score a last bit apart: the best one counts.
    _, first = np.unique(places[order], return_index=True)
    order = order[np.sort(first)[:depth]]
    return Candidates(places[order], scores[order])


def best_documents(vector_ids: NDArray[np.uint8], scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Rows of the k best documents, one row each, best first; ties go to the smaller vector_id.

    Args:
        vector_ids: (n, 16) uint8.
        scores: (n,) float32.
        k: Documents to return at most.
    """
    shortlist = SHORTLIST * k
    if len(scores) > shortlist:
        border = np.partition(scores, len(scores) - shortlist)[len(scores) - shortlist]
        rows = np.flatnonzero(scores >= border)
        kept = _collapsed(vector_ids[rows], scores[rows], k)
        if len(kept) == k:
            return rows[kept]
    return _collapsed(vector_ids, scores, k)


SHORTLIST = 4
"""Rows per wanted document that are sorted at first; all are where many chunks of few documents lead."""


def _collapsed(vector_ids: NDArray[np.uint8], scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    keys = np.ascontiguousarray(vector_ids).view("S16").reshape(-1)
    order = np.lexsort((keys, -scores))
    documents = sort_keys(vector_ids[order, :DOC_HASH_BYTES])
    _, first = np.unique(documents, return_index=True)
    return order[np.sort(first)[:k]]


class RunningBest:
    """The k best documents of each of several queries, over blocks of rows that come one after the other.

    Args:
        num_queries: Queries.
        k: Documents per query.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self._k = k
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 16), np.uint8))
        self._best = [nothing] * num_queries

    def add(
        self, places: NDArray[np.int64], scores: NDArray[np.float32], vector_ids: NDArray[np.uint8]
    ) -> None:
        """Consider a block.

        Args:
            places: (n,) what the rows are called.
            scores: (queries, n) float32.
            vector_ids: (n, 16) uint8.
        """
        for query, row in enumerate(scores):
            old_places, old_scores, old_ids = self._best[query]
            floor = old_scores[-1] if len(old_scores) == self._k else -np.inf
            better = np.flatnonzero(row >= floor)
            if not len(better):
                continue
            joined = np.concatenate([old_scores, row[better]])
            ids = np.concatenate([old_ids, vector_ids[better]])
            kept = best_documents(ids, joined, self._k)
            self._best[query] = np.concatenate([old_places, places[better]])[kept], joined[kept], ids[kept]

    def candidates(self) -> list[Candidates]:
        """What was found, best first."""
        return [Candidates(places, scores) for places, scores, _ in self._best]


def groups_of_lists(
    probed: Sequence[NDArray[np.int64]],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Turn lists by query into queries by list, lists that the same queries probe together.

    Args:
        probed: For each query, the lists that it probes.

    Yields:
        (lists, queries): int64 arrays; every pair of them is probed; lists rise within a group.
    """
    if not any(map(len, probed)):
        return
    if len(probed) == 1:  # which every search of one query is
        yield np.sort(probed[0]), np.zeros(1, np.int64)
        return
    queries = np.repeat(np.arange(len(probed)), [len(lists) for lists in probed])
    lists = np.concatenate(probed)
    order = np.lexsort((queries, lists))
    queries, lists = queries[order], lists[order]
    numbers, starts = np.unique(lists, return_index=True)
    groups: dict[bytes, list[int]] = {}
    members = np.split(queries, starts[1:])
    for number, group in zip(numbers, members, strict=True):
        groups.setdefault(group.tobytes(), []).append(int(number))
    for key, numbers_of_group in groups.items():
        yield np.array(numbers_of_group, dtype=np.int64), np.frombuffer(key, dtype=np.int64)


def spans_of(rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers in a rising array, as [start, stop)."""
    if not len(rows):
        return []
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks)]


def borders(sizes: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Where to cut a row of sizes so that parts sum to about `most`."""
    part = (np.cumsum(sizes) - 1) // most
    return np.flatnonzero(np.diff(part)) + 1
