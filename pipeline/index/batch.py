"""Many queries, each with a filter of its own, answered together (HQI's multi-query execution, arXiv 2304.01926).

Queries with the same filter share one bitmap, those that probe the same posting list one matrix product, and every vector is
read once for all of them. So vectors themselves are scored instead of codes: what a code saves in bytes for one query, a batch
saves by reading less than once per query.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import chain, pairwise
from typing import NamedTuple, Self, TypeVar

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.filters import Filter, evaluate_many
from pipeline.index.partition import Numbered
from pipeline.index.reader import IndexReader, SearchStats, Side, checked_queries
from pipeline.index.scoring import best_documents
from pipeline.postings import Probing, nearest_heads

__all__ = ["Batch", "Found", "ManyHits", "Route", "Work", "answer", "routes_of", "search_many"]

S = TypeVar("S")
T = TypeVar("T")

PASSING_ROWS = 1000
"""Passing rows among which a query that probes lists looks for its neighbours, at least."""
WIDER = 1.2
"""Of the lists and the margin of the release's rule, which reckons with copies in lists and with codes; here a list is its own
vectors, scored as they are. *Measured* on 162,093 vectors and 6,666 queries, most of them filtered, where `search` found .972:
1.0 finds .967 in 5,500 rows a query, 1.4 .988 in 10,900, 2.0 .998 in 21,300."""
GATHERED, SCORED = 0.8, 0.05
"""Nanoseconds a dimension to pick a passing row out of a partition, and to multiply a row with a query: by these a group of
queries is compared with all rows that pass, or probes lists."""
MEMBERS = 1024
"""Queries of a group, and of a share of what is joined."""
BITMAP_BYTES = 1 << 28
"""Of the bitmaps of queries that are answered together."""
MASKS_AT_ONCE = 1 << 26
"""Rows times filters that are unpacked together."""
DISTANCES_AT_ONCE = 1 << 22
"""Of queries to heads."""
CHUNKS = 4
"""Vectors that are looked for per document, where documents have several."""
RESULTS_AT_ONCE = 1 << 23
"""Vectors found that are held together, of all threads."""
ROUNDS = 3
"""Of I/O: attributes, vectors, doc_ids."""
NOWHERE = -1
"""Place of a result that is not there."""


@dataclass(frozen=True)
class Batch:
    """What is asked."""

    queries: NDArray[np.float32]
    """(q, d) unit vectors."""
    filters: Sequence[Filter | None]
    """Of each query."""
    k: int
    """Vectors per query."""
    rule: Probing
    """Of the release."""
    exact: bool = False
    """Whether to compare every query with all rows that pass."""


@dataclass(frozen=True)
class Work:
    """What answering cost, summed over queries."""

    partitions: int = 0
    lists: int = 0
    rows: int = 0
    """Rows that were multiplied with a query."""

    def plus(self, other: "Work") -> "Work":
        """Sum of both."""
        return Work(self.partitions + other.partitions, self.lists + other.lists, self.rows + other.rows)


class Route(NamedTuple):
    """Where a filter leads."""

    reached: tuple[Numbered, ...]
    """Partitions that may hold a row that passes; lists numbered through all partitions."""
    is_tested: bool
    """Whether some of their rows may fail."""


Routes = Mapping[Filter | None, Route]


@dataclass(frozen=True)
class Found:
    """The nearest vectors of each query, best first; among equals the lower place."""

    places: NDArray[np.int64]
    """(q, k) partition << 32 | row; -1 where fewer passed."""
    scores: NDArray[np.float32]
    """(q, k) inner products; -inf where fewer passed."""
    passing: NDArray[np.int64]
    """(q,) rows that pass in the partitions that the query can reach."""
    work: Work


@dataclass(frozen=True)
class _Group:
    """Queries with the same filter, `MEMBERS` at most."""

    members: NDArray[np.int64]
    reached: tuple[Numbered, ...]
    bitmaps: Mapping[int, NDArray[np.uint8]] | None
    """By partition, packed, whether each row passes; None where all do."""
    passing: int

    def passing_of(self, one: Numbered) -> NDArray[np.int64]:
        """(lists,) vectors of each list's own that pass."""
        if self.bitmaps is None:
            return one.part.primaries
        return one.part.primaries_passing(self.mask(one.number, 0, one.part.rows))

    def mask(self, number: int, first: int, stop: int) -> NDArray[np.bool_]:
        """Whether each of some rows of a partition passes."""
        if self.bitmaps is None:
            return np.ones(stop - first, np.bool_)
        skipped = first % 8
        packed = self.bitmaps[number][first // 8 : -(-stop // 8)]
        return np.unpackbits(packed, count=skipped + stop - first)[skipped:].view(np.bool_)


class _Pairs(NamedTuple):
    """Queries and lists that they probe, by rising list."""

    lists: NDArray[np.int64]
    """Numbered through all partitions."""
    queries: NDArray[np.int64]
    groups: NDArray[np.int64]
    """Of the query."""


def answer(batch: Batch, routes: Routes, *, threads: int) -> Found:
    """Answer all queries.

    Args:
        batch: What is asked.
        routes: Of each filter.
        threads: That compare, each with products of its own.
    """
    passing = np.zeros(len(batch.queries), np.int64)
    work = Work()
    with _Team(threads, batch) as team:
        for groups in _together(batch, routes, team):
            for group in groups:
                passing[group.members] = group.passing
            work = work.plus(_answer_groups(batch, groups, team))
        places, scores = team.best()
    return Found(places, scores, passing, work)


class _Team:
    """Threads, each with the best that it has found.

    Args:
        threads: How many.
        batch: What is asked.
    """

    def __init__(self, threads: int, batch: Batch) -> None:
        self.size = threads
        self._found = [_Best(len(batch.queries), batch.k) for _ in range(threads)]
        # What a thread sets of OpenMP holds for that thread.
        self._pool = ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, call: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """What a call makes of each item, in their order."""
        return list(self._pool.map(call, items))

    def share(self, items: Sequence[S], compare: Callable[[Sequence[S], "_Best"], int]) -> int:
        """Let every thread compare a run of the items; the sum of what it gives."""
        size = max(1, -(-len(items) // self.size))
        shares = [items[start : start + size] for start in range(0, len(items), size)]
        return sum(self._pool.map(compare, shares, self._found))

    def best(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(q, k) places and scores of the best of all, best first."""
        first, *others = self._found

        def join(start: int) -> None:
            queries = np.arange(start, min(start + MEMBERS, first.num_queries))
            for one in others:
                first.add(queries, one.places[queries], one.scores[queries])

        self.map(join, range(0, first.num_queries, MEMBERS))
        return first.sorted()


def _together(batch: Batch, routes: Routes, team: _Team) -> Iterator[list[_Group]]:
    """Groups whose bitmaps fit in memory together."""
    members: dict[Filter | None, list[int]] = {}
    for query, where in enumerate(batch.filters):
        members.setdefault(where, []).append(query)
    sizes = [
        sum(one.part.rows for one in routes[where].reached) // 8 * routes[where].is_tested
        for where in members
    ]
    cut = (np.cumsum(sizes) - 1) // BITMAP_BYTES
    wheres = list(members)
    for number in np.unique(cut):
        some = [wheres[i] for i in np.flatnonzero(cut == number).tolist()]
        bitmaps = _bitmaps(some, routes, team)
        yield [
            group
            for where in some
            for group in _groups(np.array(members[where]), routes[where].reached, bitmaps.get(where))
        ]


def _bitmaps(
    wheres: Sequence[Filter | None], routes: Routes, team: _Team
) -> dict[Filter | None, dict[int, NDArray[np.uint8]]]:
    """By filter and partition; each partition's attributes are looked at for all filters in turn."""
    found: dict[Filter | None, dict[int, NDArray[np.uint8]]] = {
        where: {} for where in wheres if routes[where].is_tested
    }
    if None in found:
        found[None] = {one.number: np.packbits(_live(one)) for one in routes[None].reached}
    asked: dict[int, tuple[Numbered, list[Filter]]] = {}
    for where in filter(None, found):
        for one in routes[where].reached:
            asked.setdefault(one.number, (one, []))[1].append(where)
    for number, (one, filters) in asked.items():
        # Neighbours in the order of their texts have the most in common, which is evaluated once a thread.
        filters.sort(key=lambda where: where.text)
        tables = one.part.attributes(sorted({column for where in filters for column in where.columns}))
        size = -(-len(filters) // team.size)
        shares = [filters[start : start + size] for start in range(0, len(filters), size)]
        packed = chain.from_iterable(team.map(partial(_packed, tables), shares))
        live = None if one.part.live is None else np.packbits(one.part.live)
        for where, bitmap in zip(filters, packed, strict=True):
            found[where][number] = bitmap if live is None else bitmap & live
    return found


def _live(one: Numbered) -> NDArray[np.bool_]:
    """(rows,) of a partition which rows have no tombstone."""
    return np.ones(one.part.rows, np.bool_) if one.part.live is None else one.part.live


def _packed(tables: Sequence[pa.Table], filters: Sequence[Filter]) -> list[NDArray[np.uint8]]:
    """Bitmap of each filter, over the rows of all tables."""
    masks = [evaluate_many(filters, table) for table in tables]
    return [np.packbits(np.concatenate(own)) for own in zip(*masks, strict=True)]


def _groups(
    members: NDArray[np.int64],
    reached: tuple[Numbered, ...],
    bitmaps: Mapping[int, NDArray[np.uint8]] | None,
) -> list[_Group]:
    passing = sum(one.part.rows for one in reached)
    if bitmaps is not None:
        counts = {number: int(np.bitwise_count(bitmap).sum()) for number, bitmap in bitmaps.items()}
        reached = tuple(one for one in reached if counts[one.number])
        passing = sum(counts.values())
    # Of so many whatever the threads are: products of another shape have other last bits.
    blocks = (members[start : start + MEMBERS] for start in range(0, len(members), MEMBERS))
    return [_Group(block, reached, bitmaps, passing) for block in blocks]


def _scans_all(group: _Group, batch: Batch) -> bool:
    """Whether comparing with all passing rows is cheaper than probing lists, some of whose rows do not pass."""
    if batch.exact or group.passing <= PASSING_ROWS:
        return True
    rows = sum(one.part.rows for one in group.reached)
    queries = len(group.members)
    probed = queries * SCORED * min(rows, PASSING_ROWS * rows / group.passing)
    return group.passing * (GATHERED + queries * SCORED) < probed


# ------------------------------------------------------------------------------------------------ executing


def _answer_groups(batch: Batch, groups: list[_Group], team: _Team) -> Work:
    whole: list[_Group] = []
    probing: list[_Group] = []
    for group in groups:
        if group.passing:
            (whole if _scans_all(group, batch) else probing).append(group)
    pairs = _probed(batch, probing, team)
    reached = {one.number: one for group in groups for one in group.reached}
    rows = 0
    for number in sorted(reached):
        for first, stop in reached[number].part.spans():
            rows += _answer_segment(batch, reached[number], (first, stop), whole, probing, pairs, team)
    return Work(
        partitions=sum(len(group.members) * len(group.reached) for group in groups),
        lists=len(pairs.lists),
        rows=rows,
    )


def _probed(batch: Batch, groups: Sequence[_Group], team: _Team) -> _Pairs:
    """Lists that each query of the groups probes."""
    by_group = team.map(lambda group: list(_probed_of(batch, group)), groups)
    found = [
        (lists, queries, np.full(len(lists), number))
        for number, own in enumerate(by_group)
        for lists, queries in own
    ]
    if not found:
        nothing = np.zeros(0, np.int64)
        return _Pairs(nothing, nothing, nothing)
    pairs = _Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))
    order = np.argsort(pairs.lists, kind="stable")
    return _Pairs(pairs.lists[order], pairs.queries[order], pairs.groups[order])


def _probed_of(batch: Batch, group: _Group) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Lists and queries of one group: those of the rule that have a passing row, and more until enough rows pass."""
    numbers = np.concatenate([one.first + np.arange(one.part.num_lists) for one in group.reached])
    passing = np.concatenate([group.passing_of(one) for one in group.reached])
    alive = np.flatnonzero(passing)
    numbers, passing = numbers[alive], passing[alive]
    size = max(1, DISTANCES_AT_ONCE // sum(one.part.num_lists for one in group.reached))
    least = max(PASSING_ROWS, batch.k) if group.bitmaps is not None else batch.k
    for start in range(0, len(group.members), size):
        members = group.members[start : start + size]
        queries = batch.queries[members]
        distances = np.hstack([one.part.distances(queries) for one in group.reached])[:, alive]
        rows, lists = _nearest_enough(distances, passing, batch.rule, least)
        yield numbers[lists], members[rows]


def _nearest_enough(
    distances: NDArray[np.float32], passing: NDArray[np.int64], rule: Probing, least: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Queries and lists: the nearest lists by the rule, and more where those have fewer than `least` passing rows."""
    most = round(WIDER * rule.lists)
    count = min(distances.shape[1], max(most, 1 + int(2 * least / max(passing.mean(), 1))))
    near, apart = nearest_heads(distances, count)
    before = np.cumsum(passing[near], axis=1) - passing[near]
    margin = WIDER * rule.margin
    taken = (apart <= apart[:, :1] + margin) & (np.arange(count) < most) | (before < least)
    short = before[:, -1] + passing[near[:, -1]] < least
    if count < distances.shape[1] and short.any():
        fine, far = np.flatnonzero(~short), np.flatnonzero(short)
        rows, lists = _all_until_enough(distances[far], passing, least)
        first, places = np.nonzero(taken[fine])
        return np.concatenate([fine[first], far[rows]]), np.concatenate([near[fine][first, places], lists])
    rows, places = np.nonzero(taken)
    return rows, near[rows, places]


def _all_until_enough(
    distances: NDArray[np.float32], passing: NDArray[np.int64], least: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Queries and nearest lists that have `least` passing rows together, or all lists."""
    near = np.argsort(distances, axis=1, kind="stable")
    before = np.cumsum(passing[near], axis=1) - passing[near]
    rows, places = np.nonzero(before < least)
    return rows, near[rows, places]


def _answer_segment(
    batch: Batch,
    one: Numbered,
    span: tuple[int, int],
    whole: Sequence[_Group],
    probing: Sequence[_Group],
    pairs: _Pairs,
    team: _Team,
) -> int:
    """Compare queries with the vectors of one segment; how many products that took."""
    first, stop = span
    whole = [group for group in whole if one in group.reached]
    lists = _lists_of_segment(one, span, pairs)
    needed = np.zeros(stop - first, np.bool_)
    for group in whole:
        needed |= group.mask(one.number, first, stop)
    for held in lists:
        needed[held.rows.start : held.rows.stop] = True
    if not needed.any():
        return 0
    vectors = one.part.embeddings(first + np.flatnonzero(needed))
    block = _Block((one.number << 32) + first, vectors, np.cumsum(needed) - 1)

    def compare_groups(groups: Sequence[_Group], best: _Best) -> int:
        masks = ((group, group.mask(one.number, first, stop)) for group in groups)
        return sum(block.compare_passing(batch, group, mask, best) for group, mask in masks)

    def compare_lists(some: Sequence[_Held], best: _Best) -> int:
        return block.compare_lists(batch, one.number, first, some, probing, pairs, best)

    products = team.share(whole, compare_groups)
    for some in _fitting(lists, stop - first, team.size * len(probing)):
        products += team.share(some, compare_lists)
    return products


class _Held(NamedTuple):
    """A list whose own vectors are in a segment, and what probes it."""

    rows: slice
    """Of the segment."""
    pairs: slice


def _lists_of_segment(one: Numbered, span: tuple[int, int], pairs: _Pairs) -> list[_Held]:
    first, stop = span
    lists = pairs.lists[slice(*np.searchsorted(pairs.lists, [one.first, one.first + one.part.num_lists]))]
    numbers, rows, counts = one.part.primaries_at(np.unique(lists) - one.first)
    own = np.flatnonzero((rows >= first) & (rows < stop) & (counts > 0))
    rows, counts, numbers = rows[own] - first, counts[own], numbers[own] + one.first
    starts, ends = np.searchsorted(pairs.lists, numbers), np.searchsorted(pairs.lists, numbers, side="right")
    columns = (rows, rows + counts, starts, ends)
    return [
        _Held(slice(a, b), slice(c, d)) for a, b, c, d in zip(*map(np.ndarray.tolist, columns), strict=True)
    ]


def _fitting(lists: Sequence[_Held], rows: int, groups: int) -> Iterator[Sequence[_Held]]:
    """All lists at once, or so many that the masks of their rows fit in memory."""
    if not lists:
        return
    at_once = max(1, MASKS_AT_ONCE // max(groups, 1))
    if rows <= at_once:
        yield lists
        return
    part = np.array([held.rows.start for held in lists]) // at_once
    for number in np.unique(part):
        yield [lists[i] for i in np.flatnonzero(part == number).tolist()]


class _Block(NamedTuple):
    """Vectors of one segment that some query wants."""

    place: int
    """Of the segment's first row."""
    vectors: NDArray[np.float32]
    at: NDArray[np.int64]
    """(rows of the segment,) where the vector of each is, if it is wanted."""

    def compare_passing(self, batch: Batch, group: _Group, mask: NDArray[np.bool_], best: "_Best") -> int:
        """A group with every row that passes."""
        rows = np.flatnonzero(mask)
        if not len(rows):
            return 0
        at = self.at[rows]
        is_run = at[-1] - at[0] + 1 == len(at)
        vectors = self.vectors[at[0] : at[-1] + 1] if is_run else self.vectors[at]
        near, scores = _nearest_rows(batch.queries[group.members], vectors, min(batch.k, len(rows)))
        best.add(group.members, self.place + rows[near], scores)
        return len(rows) * len(group.members)

    def compare_lists(
        self,
        batch: Batch,
        number: int,
        first: int,
        lists: Sequence[_Held],
        groups: Sequence[_Group],
        pairs: _Pairs,
        best: "_Best",
    ) -> int:
        """Lists with the queries that probe them; rows that fail a query's filter count for nothing."""
        if not lists:
            return 0
        low, high = min(held.rows.start for held in lists), max(held.rows.stop for held in lists)
        fails = _failing(groups, number, first + low, first + high)
        products = 0
        for rows, members in lists:
            queries, of_group = pairs.queries[members], pairs.groups[members]
            vectors = self.vectors[self.at[rows.start] : self.at[rows.stop - 1] + 1]
            scores = batch.queries[queries] @ vectors.T
            if fails is not None:
                np.putmask(scores, fails[of_group, rows.start - low : rows.stop - low], -np.inf)
            best.add_best(queries, self.place + rows.start, scores)
            products += scores.size
        return products


def _nearest_rows(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(q, count) rows with the largest products and (q, count) these; of equals at the border the lower rows."""
    more = min(count + 1, len(vectors))
    scores, near = faiss.knn(queries, vectors, more, faiss.METRIC_INNER_PRODUCT)
    if more > count:
        unsure = np.flatnonzero(scores[:, count] == scores[:, count - 1])
        near, scores = near[:, :count], scores[:, :count]
        if len(unsure):
            products = queries[unsure] @ vectors.T
            near[unsure] = _largest(products, count)
            scores[unsure] = np.take_along_axis(products, near[unsure], axis=1)
    return near, scores


def _largest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """(q, count) columns of the largest scores of each row, in no order; of equals at the border the lower columns."""
    near = np.argpartition(scores, -count, axis=1)[:, -count:]
    border = np.take_along_axis(scores, near, axis=1).min(axis=1, keepdims=True)
    unsure = np.flatnonzero(((scores >= border).sum(axis=1) > count) & (border[:, 0] > -np.inf))
    near[unsure] = np.argsort(-scores[unsure], axis=1, kind="stable")[:, :count]
    return near


def _failing(groups: Sequence[_Group], number: int, first: int, stop: int) -> NDArray[np.bool_] | None:
    """(groups, rows) whether rows of a partition fail the filters of groups; None where no group has one."""
    if all(group.bitmaps is None for group in groups):
        return None
    found = np.zeros((len(groups), stop - first), np.bool_)
    for at, group in enumerate(groups):
        if group.bitmaps is not None and number in group.bitmaps:
            np.logical_not(group.mask(number, first, stop), out=found[at])
    return found


class _Best:
    """The k best vectors of every query so far, in no order.

    Args:
        num_queries: Queries.
        k: Vectors per query.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self._k = k
        self.places = np.full((num_queries, k), NOWHERE, np.int64)
        self.scores = np.full((num_queries, k), -np.inf, np.float32)

    def add(self, queries: NDArray[np.int64], places: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Consider (n, few) vectors of distinct queries (n,)."""
        scores = np.hstack([self.scores[queries], scores])
        places = np.hstack([self.places[queries], places])
        kept = np.lexsort((places, -scores), axis=1)[:, : self._k]
        self.scores[queries] = np.take_along_axis(scores, kept, axis=1)
        self.places[queries] = np.take_along_axis(places, kept, axis=1)

    def add_best(self, queries: NDArray[np.int64], first: int, scores: NDArray[np.float32]) -> None:
        """Consider vectors at consecutive places, with their (n, rows) scores."""
        best = scores.max(axis=1)
        better = np.flatnonzero((best >= self.scores[queries].min(axis=1)) & (best > -np.inf))
        if not len(better):
            return
        queries, scores = queries[better], scores[better]
        if scores.shape[1] > self._k:
            near = _largest(scores, self._k)
            self.add(queries, first + near, np.take_along_axis(scores, near, axis=1))
        else:
            self.add(queries, np.broadcast_to(first + np.arange(scores.shape[1]), scores.shape), scores)

    @property
    def num_queries(self) -> int:
        """Of how many queries."""
        return len(self.places)

    def sorted(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(q, k) places and scores, best first."""
        places = np.where(np.isfinite(self.scores), self.places, NOWHERE)
        order = np.lexsort((places, -self.scores), axis=1)
        return np.take_along_axis(places, order, axis=1), np.take_along_axis(self.scores, order, axis=1)


# ------------------------------------------------------------------------------------------------ documents


@dataclass(frozen=True)
class ManyHits:
    """Hits of many queries, by query, best first."""

    query: NDArray[np.int64]
    """(n,) number of the query."""
    rank: NDArray[np.int32]
    """(n,) from 1."""
    doc_id: pa.Array
    score: NDArray[np.float32]
    """(n,) cosine of query and document."""
    stats: SearchStats


def search_many(
    reader: IndexReader,
    vectors: NDArray[np.floating],
    filters: Sequence[Filter | None],
    *,
    k: int = 10,
    probing: Probing | None = None,
    exact: bool = False,
    threads: int = 1,
) -> ManyHits:
    """Find the k nearest documents of each of many queries, each under a filter of its own.

    Args:
        reader: The index.
        vectors: (q, d); normalized here.
        filters: Of each query, or None.
        k: Documents per query; fewer come where fewer match.
        probing: Which posting lists a query probes; the release's default if None.
        exact: Compare every query with every row that passes.
        threads: That compare, each with products of its own: these are too small for BLAS to share one among threads. With
            several, hold BLAS to one meanwhile (`threadpoolctl.threadpool_limits`).

    Raises:
        ValueError: The width of the vectors is not the index's, one is not finite or zero, or k is below 1.
    """
    queries = checked_queries(vectors, reader.manifest, k)
    defaults = reader.manifest.search
    rule = probing or Probing(defaults.lists, defaults.margin)
    before = reader.cost
    asked = Batch(queries, filters, k if reader.one_each else CHUNKS * k, rule, exact)
    found = [_searched_side(reader, side, asked, k, threads) for side in reader.sides()]
    hits = _best_of_sides(reader, [own for own, _ in found], len(queries), k)
    work = reduce(Work.plus, (cost for _, cost in found))
    places, rows = np.unique(hits.place, return_inverse=True)
    names = reader.doc_ids(places).take(pa.array(rows))
    read, requests = (now - then for now, then in zip(reader.cost, before, strict=True))
    stats = SearchStats(
        queries=len(queries),
        bytes_read=read,
        requests=requests,
        lists_probed=work.lists,
        rows_scanned=work.rows,
        partitions_opened=work.partitions,
        rounds=ROUNDS,
    )
    return ManyHits(hits.query, hits.rank, names, hits.score, stats)


def routes_of(reader: IndexReader, side: Side, filters: set[Filter | None]) -> Routes:
    """Where each filter leads among the partitions of one space."""
    of_side = {one.number: one for one in side.partitions}
    return {
        where: Route(
            tuple(of_side[number] for number in reader.reached(where) if number in of_side),
            reader.without_need(where) is not None
            or any(one.part.live is not None for one in side.partitions),
        )
        for where in filters
    }


def _searched_side(
    reader: IndexReader, side: Side, asked: Batch, k: int, threads: int
) -> tuple["_Hits", Work]:
    """Hits of all queries in the partitions of one space, and what they cost."""
    queries, routes = side.queries(asked.queries), routes_of(reader, side, set(asked.filters))
    gauge = side.gauge(asked.queries, queries)
    parts, work = list[_Hits](), Work()
    for start in range(0, len(queries), size := max(1, RESULTS_AT_ONCE // (asked.k * threads))):
        some = slice(start, start + size)
        batch = replace(asked, queries=queries[some], filters=asked.filters[some])
        hits, cost = _searched(reader, batch, routes, k, threads)
        parts.append(hits._replace(query=hits.query + start))
        work = work.plus(cost)
    hits = _Hits.joined(parts)
    return hits if gauge is None else hits._replace(score=gauge.of(hits.score, hits.query)), work


def _best_of_sides(reader: IndexReader, found: Sequence["_Hits"], queries: int, k: int) -> "_Hits":
    if len(found) == 1:
        return found[0]
    hits = _Hits.joined(found)
    return _documents(reader, hits.take(np.argsort(hits.query, kind="stable")), queries, k)


class _Hits(NamedTuple):
    query: NDArray[np.int64]
    rank: NDArray[np.int32]
    place: NDArray[np.int64]
    score: NDArray[np.float32]

    @classmethod
    def joined(cls, parts: Sequence["_Hits"]) -> "_Hits":
        """Of several runs of queries, one after the other."""
        return cls(
            np.concatenate([np.zeros(0, np.int64), *(part.query for part in parts)]),
            np.concatenate([np.zeros(0, np.int32), *(part.rank for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(part.place for part in parts)]),
            np.concatenate([np.zeros(0, np.float32), *(part.score for part in parts)]),
        )

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "_Hits":
        """Some of them."""
        return _Hits(self.query[rows], self.rank[rows], self.place[rows], self.score[rows])


def _searched(
    reader: IndexReader,
    batch: Batch,
    routes: Routes,
    k: int,
    threads: int,
) -> tuple[_Hits, Work]:
    """Hits by query; queries whose nearest vectors are of too few documents look for more of them."""
    found = answer(batch, routes, threads=threads)
    query, at = np.nonzero(found.places != NOWHERE)
    ranks = (at + 1).astype(np.int32)
    places, scores = found.places[query, at], found.scores[query, at]
    if reader.one_each:
        return _Hits(query, ranks, places, scores), found.work
    hits = _documents(reader, _Hits(query, ranks, places, scores), len(batch.queries), k)
    documents = np.bincount(hits.query, minlength=len(batch.queries))
    short = np.flatnonzero((documents < k) & (found.passing > batch.k))
    if not len(short):
        return hits, found.work
    again = replace(
        batch, queries=batch.queries[short], filters=[batch.filters[i] for i in short.tolist()], k=4 * batch.k
    )
    more, work = _searched(reader, again, routes, k, threads)
    kept = ~np.isin(hits.query, short)
    both = _Hits.joined([hits.take(kept), more._replace(query=short[more.query])])
    return both.take(np.argsort(both.query, kind="stable")), found.work.plus(work)


def _documents(reader: IndexReader, hits: _Hits, queries: int, k: int) -> _Hits:
    """The best row of each document, k at most of a query."""
    query, _, places, scores = hits
    if not len(query):
        return hits
    distinct, rows = np.unique(places, return_inverse=True)
    ids = reader.vector_ids(distinct)[rows]
    kept, ranks = [], []
    for start, stop in pairwise(np.searchsorted(query, np.arange(queries + 1)).tolist()):
        best = best_documents(ids[start:stop], scores[start:stop], k)
        kept.append(start + best)
        ranks.append(np.arange(1, len(best) + 1, dtype=np.int32))
    order = np.concatenate(kept)
    return _Hits(query[order], np.concatenate(ranks), places[order], scores[order])
