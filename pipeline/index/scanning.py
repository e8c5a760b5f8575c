"""What queries meet in their nearest lists, and where their true neighbours lie: what tuning chooses by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.binarization import rotate_queries
from pipeline.index.lists import Entries
from pipeline.index.partition import Numbered, nearest_lists
from pipeline.index.scoring import borders
from pipeline.postings import MOST_MARGIN, Probing, Scanned

__all__ = ["Located", "Tracker", "scan"]

SAME_SCORE = 1e-6
"""Two estimates from one code may differ by as much."""
FIRST_LISTS = 32
"""Lists of each query in which its neighbours are looked for at first; twice as many where they are not there."""
QUERIES_AT_ONCE = 256
"""Queries that are compared with all heads together."""
IDS_AT_ONCE = 1 << 18
"""vector_ids that are read together, about."""


@dataclass(frozen=True)
class Located:
    """Where true neighbours of queries lie."""

    places: tuple[NDArray[np.int64], ...]
    """Of each query, partition << 32 | row of those that were found, rising."""
    lists: int
    """Lists by which the wanted share of them is in a query's own nearest lists, on average."""


class _Place(NamedTuple):
    """Where a vector lies."""

    place: int
    list_no: int


class Tracker:
    """Looks for vectors, list by list, each list once whatever is asked.

    Args:
        partitions: Of the index.
        queries: (q, d) unit vectors.
        wanted: Of each, vector_ids of its true neighbours and of others that are as near.
        enough: How many of them a search should find, or all where they are fewer.
    """

    def __init__(
        self,
        partitions: Sequence[Numbered],
        queries: NDArray[np.float32],
        wanted: Sequence[Sequence[bytes]],
        *,
        enough: int,
    ) -> None:
        self._partitions, self._queries, self._wanted, self._enough = partitions, queries, wanted, enough
        self._names = np.unique(np.array([one for ids in wanted for one in ids]))
        self._found: dict[bytes, _Place] = {}
        self._is_read = np.zeros(sum(one.part.num_lists for one in partitions), np.bool_)

    def locate(self, share: float, most: int) -> Located:
        """Find a share of the neighbours that searches should find.

        Args:
            share: In (0, 1].
            most: Lists of a query that are looked through.
        """
        count = min(FIRST_LISTS, most)
        while True:
            near = self._nearest(count)
            self._look_in(near)
            lists = self._lists_of_share(near, share, most)
            if lists <= count or count == most:
                return Located(tuple(map(self._places_of, self._wanted)), lists)
            count = min(most, 2 * count)

    def _nearest(self, count: int) -> list[NDArray[np.int64]]:
        """So many lists of each query, nearest first."""
        starts = range(0, len(self._queries), QUERIES_AT_ONCE)
        blocks = [self._queries[start : start + QUERIES_AT_ONCE] for start in starts]
        rule = Probing(count, MOST_MARGIN)
        return [lists for block in blocks for lists, _ in nearest_lists(self._partitions, block, rule)]

    def _places_of(self, wanted: Sequence[bytes]) -> NDArray[np.int64]:
        return np.array(sorted(self._found[one].place for one in wanted if one in self._found), np.int64)

    def _look_in(self, near: Sequence[NDArray[np.int64]]) -> None:
        """Read the vector_ids of lists of the queries that miss something."""
        missing = [lists for lists, ids in zip(near, self._wanted, strict=True) if self._misses(ids)]
        if not missing:
            return
        wanted = np.unique(np.concatenate(missing))
        for ids, places, lists in self._ids_of(wanted[~self._is_read[wanted]]):
            hits = np.flatnonzero(np.isin(ids.view(self._names.dtype).reshape(-1), self._names))
            self._found.update(
                (ids[hit].tobytes(), _Place(int(places[hit]), int(lists[hit]))) for hit in hits.tolist()
            )
        self._is_read[wanted] = True

    def _misses(self, ids: Sequence[bytes]) -> bool:
        return sum(one in self._found for one in ids) < min(self._enough, len(ids))

    def _ids_of(
        self, lists: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]]:
        """vector_ids, places and lists of the vectors whose own lists these are, some at a time."""
        for one in self._partitions:
            mine = lists[one.own(lists)] - one.first
            for some in np.split(mine, borders(one.part.list_entries[mine], IDS_AT_ONCE)):
                rows, own = one.part.primaries_of(some)
                if one.part.live is not None:
                    kept = one.part.live[rows]
                    rows, own = rows[kept], own[kept]
                if len(rows):
                    (ids,) = one.part.values(["vector_id"], rows)
                    yield np.ascontiguousarray(ids), (one.number << 32) + rows, own + one.first

    def _lists_of_share(self, near: Sequence[NDArray[np.int64]], share: float, most: int) -> int:
        """How many nearest lists of every query hold a share of all neighbours; `most` if those do not."""
        ranks: list[int] = []
        total = 0
        for lists, ids in zip(near, self._wanted, strict=True):
            rank = {number: at for at, number in enumerate(lists.tolist())}
            own = sorted(rank.get(self._found[one].list_no, most) for one in ids if one in self._found)
            ranks += own[: self._enough]
            total += min(self._enough, len(ids))
        needed = int(np.ceil(share * total))
        return min(most, sorted(ranks)[needed - 1] + 1) if len(ranks) >= needed else most


def scan(
    partitions: Sequence[Numbered],
    queries: NDArray[np.float32],
    wanted: Sequence[NDArray[np.int64]],
    enough: Sequence[int],
    *,
    lists: int,
) -> list[Scanned]:
    """What queries meet in their nearest lists.

    Args:
        partitions: Of the index.
        queries: (q, d) unit vectors.
        wanted: Of each, where its true neighbours lie and others that are as near, as `Located` says.
        enough: Of each, how many of them a search should find.
        lists: Posting lists to scan.
    """
    list_entries = np.concatenate([one.part.list_entries for one in partitions])
    return [
        _met(partitions, list_entries, query[None], places, one, lists)
        for query, places, one in zip(queries, wanted, enough, strict=True)
    ]


def _met(
    partitions: Sequence[Numbered],
    list_entries: NDArray[np.int64],
    query: NDArray[np.float32],
    wanted: NDArray[np.int64],
    enough: int,
    lists: int,
) -> Scanned:
    ((probed, distances),) = nearest_lists(partitions, query, Probing(lists, MOST_MARGIN))
    places, scores, seen = _entries_in_turn(partitions, query, probed)
    is_wanted = np.isin(places, wanted)
    # Codes that are worse than those of all true neighbours change nothing.
    kept = scores >= scores[is_wanted].min(initial=np.inf) - 2 * SAME_SCORE
    places, scores, seen, is_wanted = places[kept], scores[kept], seen[kept], is_wanted[kept]
    _, first = np.unique(places, return_index=True)
    order = first[np.lexsort((places[first], -scores[first]))]
    found = _with_ties(scores[order], np.flatnonzero(is_wanted[order]))
    last = int(found.max(initial=-1)) + 1
    return Scanned(
        margin=distances - distances[0],
        entries=list_entries[probed],
        first_seen=seen[order[:last]].astype(np.int32),
        wanted=found,
        enough=enough,
    )


def _entries_in_turn(
    partitions: Sequence[Numbered], query: NDArray[np.float32], probed: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Places, estimates and turn of the list of every entry of lists, nearest list first."""
    found = []
    for one in partitions:
        mine = np.flatnonzero(one.own(probed))
        if len(mine):
            lists = one.part.pieces(probed[mine] - one.first)
            entries = Entries.joined(lists)
            turns = np.repeat(mine, [len(own.row) for own in lists])
            if one.part.live is not None:
                kept = one.part.live[entries.row]
                entries, turns = entries.only(kept), turns[kept]
            scores = one.part.estimates(entries, query, rotate_queries(one.part.binarizer, query))[0]
            found.append(((one.number << 32) + entries.row.astype(np.int64), scores, turns))
    places, scores, turns = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(turns, kind="stable")
    return places[order], scores[order], turns[order]


def _with_ties(scores: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places in falling scores, and those of the same score: copies of a vector, any of which will do."""
    rising = -scores
    starts = np.searchsorted(rising, rising[places] - SAME_SCORE)
    stops = np.searchsorted(rising, rising[places] + SAME_SCORE, side="right")
    is_wanted = np.zeros(len(scores) + 1, np.int64)
    np.add.at(is_wanted, starts, 1)
    np.add.at(is_wanted, stops, -1)
    return np.flatnonzero(np.cumsum(is_wanted[:-1]) > 0)
