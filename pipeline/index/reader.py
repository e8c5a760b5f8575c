"""An index opened for search, from the files alone: the reference reader that serving copies.

`open_release` follows alias → release → manifest. A query finds the nearest heads in memory, reads their posting lists
by byte range, scores codes, re-ranks the best with float16 vectors and reads the doc_ids of the winners: three dependent
rounds of I/O. Importing this module loads neither torch nor ray; an encoder is loaded at the first text query.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import chain, groupby, islice
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import (
    AliasEntry,
    FileRef,
    IndexManifest,
    ReleaseRecord,
    arrow_schema,
    parse_model,
)
from pipeline.binarization import Binarizer, rotate_queries
from pipeline.config import EncoderConfig, StorageConfig
from pipeline.errors import ConfigError, IncompatibleModelsError, MissingFileError
from pipeline.filters import Filter, Region, parse_filter
from pipeline.index.bridges import Crossing, load_crossing
from pipeline.index.lists import Entries
from pipeline.index.partition import (
    Numbered,
    PartitionReader,
    Reading,
    Remembered,
    in_one_round,
    nearest_lists,
    numbered,
)
from pipeline.index.scoring import (
    Candidates,
    RunningBest,
    best_documents,
    best_rows,
    borders,
    groups_of_lists,
)
from pipeline.partitioning import read_regions
from pipeline.postings import MOST_MARGIN, WANTED, Probing, select_lists
from pipeline.schemas import VECTOR_ID
from pipeline.spaces import GIVEN_MODEL, EncoderIdentity, check_same_space
from pipeline.spaces.calibration import Gauge
from pipeline.storage import Log, Store, open_store, read_recorded

__all__ = [
    "Hit",
    "IndexReader",
    "QueryEncoder",
    "Release",
    "SearchResult",
    "SearchStats",
    "Side",
    "check_query_encoder",
    "checked_queries",
    "open_release",
]

T = TypeVar("T")

QUERY_BLOCK = 256
"""Queries searched together, at most."""
CANDIDATES_AT_ONCE = 1 << 17
"""Candidates of theirs, about: bounds the memory of their vectors."""
FILTERED_ROWS = 1000
"""Passing rows that a filtered query scans at least: a selective filter moves the nearest matches away from the nearest lists.
Where no more than that pass, all of them are scored exactly."""
FILTERED_DEPTH = 100
"""Candidates that it scores again at least, unless it is told how many: a release's depth is that of queries without a filter."""
EXACT_BLOCK_ROWS = 8192
GATHERED = 1 << 14
"""Entries that a query of a block holds at most, about, before the best of them are taken."""
ENTRIES_AT_ONCE = 1 << 18
"""Entries of lists that are read together, about; bounds the memory of a block of queries."""
SCORES_AT_ONCE = 1 << 23
"""Scores of lists that the same queries probe, about, and distances of queries to heads."""
MOST_REMEMBERED = 10_000
"""Filters whose parsed form and partitions are kept: parsing one takes as long as answering a query."""
WIDER = 0.1
"""Margin of the second try of a query that found too few documents, at least."""


class Hit(NamedTuple):
    """One document found."""

    doc_id: str
    score: float
    """Cosine of query and document, or its estimate from the code where nothing is re-ranked."""


@dataclass(frozen=True)
class SearchStats:
    """What a search cost, summed over its queries."""

    queries: int = 0
    bytes_read: int = 0
    requests: int = 0
    lists_probed: int = 0
    rows_scanned: int = 0
    rows_reranked: int = 0
    partitions_opened: int = 0
    rounds: int = 0
    """Dependent rounds of I/O of the query that needed most."""

    def plus(self, other: "SearchStats") -> "SearchStats":
        """Sum of two searches; of rounds the larger."""
        mine, theirs = vars(self), vars(other)
        rounds = max(self.rounds, other.rounds)
        return SearchStats(**{name: mine[name] + theirs[name] for name in mine} | {"rounds": rounds})

    def beside(self, other: "SearchStats") -> "SearchStats":
        """Sum of two searches for the same queries."""
        return replace(self.plus(other), queries=self.queries)

    def summary(self) -> dict[str, int]:
        """Its figures for a summary, but for the queries."""
        names = ("bytes_read", "requests", "lists_probed", "rows_scanned", "partitions_opened", "rounds")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SearchResult(Sequence[list[Hit]]):
    """Hits of each query, in the order of the queries, best first."""

    hits: tuple[list[Hit], ...]
    stats: SearchStats

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, query: int) -> list[Hit]:  # type: ignore[override]
        return self.hits[query]


class QueryEncoder(Protocol):
    """Turns query texts into vectors of an index's space; where it has an `identity`, that is checked."""

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d) float32 unit vectors."""
        ...


# ------------------------------------------------------------------------------------------------ index


class _Route(NamedTuple):
    """Where a filter leads."""

    reached: tuple[int, ...]
    """Partitions that may hold a row that passes."""
    all_pass: bool
    """Whether all of their rows do, and they are more than would be compared one by one."""


class Side(NamedTuple):
    """Partitions in one space, and the way there from the space of the queries."""

    crossing: Crossing | None
    """None where it is the same space."""
    partitions: list[Numbered]

    def queries(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """(q, d_side) what asks there what queries (q, d) ask."""
        return queries if self.crossing is None else self.crossing.queries(queries)

    def gauge(self, queries: NDArray[np.float32], crossed: NDArray[np.float32]) -> Gauge | None:
        """What makes scores from there compare with those of other sides, for queries and what `queries` makes of them."""
        return None if self.crossing is None else self.crossing.calibration.gauge(queries, crossed)


class IndexReader:
    """Search over one index, whether or not it is published.

    Threads may search at once; what their searches cost is then counted together.

    Args:
        store: The root.
        manifest: The index.
    """

    def __init__(self, store: Store, manifest: IndexManifest) -> None:
        self.manifest = manifest
        self.attributes = arrow_schema(manifest.attributes)
        self._store = store
        self._opened: dict[int, PartitionReader] = {}
        self._binarizers: dict[str, Binarizer] = {}
        self._crossings: dict[str, Crossing | None] = {}
        self._routes = Remembered(self._route, most=MOST_REMEMBERED)
        self._one_each = manifest.num_documents == sum(part.rows for part in manifest.partitions)

    def open(self) -> None:
        """Read heads, directories and bridges and look at all files now instead of at the first query."""
        for side in self.sides():
            for one in side.partitions:
                one.part.open()

    def search(
        self,
        vectors: NDArray[np.floating],
        *,
        k: int = 10,
        where: Filter | None = None,
        probing: Probing | None = None,
        rerank: int | None = None,
        exact: bool = False,
    ) -> SearchResult:
        """Find the k nearest documents of each query by cosine.

        Args:
            vectors: (q, d); normalized here.
            k: Documents per query.
            where: Only documents that pass this filter.
            probing: Which posting lists a query probes; the release's default if None.
            rerank: Candidates scored with float16 vectors, 0 for codes alone; the release's default if None, in proportion
                where more than ten documents are asked for.
            exact: Score every passing document instead.

        Raises:
            ValueError: The width of the vectors is not the index's, one is not finite or zero, or k is below 1.
        """
        queries = checked_queries(vectors, self.manifest, k)
        sides, where = self.sides(where), self.without_need(where)
        defaults = self.manifest.search
        depth = _default_depth(defaults.rerank, k, where) if rerank is None else rerank
        rule = probing or Probing(defaults.lists, defaults.margin)
        hits: list[list[Hit]] = []
        stats = SearchStats()
        size = max(1, min(QUERY_BLOCK, CANDIDATES_AT_ONCE // max(depth, k)))
        for start in range(0, len(queries), size):
            some = queries[start : start + size]
            crossed = [side.queries(some) for side in sides]
            blocks = [
                _Block(self._store, side, asked, k, where, one_each=self._one_each)
                for side, asked in zip(sides, crossed, strict=True)
            ]
            found = [
                _comparable(
                    side.gauge(some, asked), block.exact() if exact else block.approximate(rule, depth)
                )
                for side, asked, block in zip(sides, crossed, blocks, strict=True)
            ]
            hits += [_best_of_sides(own, k) for own in zip(*found, strict=True)]
            stats = stats.plus(reduce(SearchStats.beside, (block.stats() for block in blocks)))
        return SearchResult(tuple(hits), stats)

    @property
    def one_each(self) -> bool:
        """Whether each document has one vector."""
        return self._one_each

    def vector_ids(self, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, 16) of rising places: partition << 32 | row."""
        parts = [part.values(["vector_id"], rows)[0] for part, rows in self._at(places)]
        return np.concatenate(parts) if parts else NO_KEYS

    def doc_ids(self, places: NDArray[np.int64]) -> pa.Array:
        """Names of the documents of rising places."""
        parts = [part.doc_ids(rows) for part, rows in self._at(places)]
        return pa.concat_arrays(parts) if parts else pa.array([], pa.string())

    def _at(self, places: NDArray[np.int64]) -> Iterator[tuple[PartitionReader, NDArray[np.int64]]]:
        """Rising places by partition, as rows of it."""
        for number in np.unique(places >> 32).tolist():
            rows = places[places >> 32 == number] & ROW_MASK
            yield self._reader(number), rows

    @property
    def cost(self) -> tuple[int, int]:
        """Bytes and requests so far."""
        costs = [part.cost for part in list(self._opened.values())]
        return sum(read for read, _ in costs), sum(requests for _, requests in costs)

    def partitions(self, where: Filter | None = None) -> list[Numbered]:
        """Those that may hold a row passing a filter, opened and numbered by their place in the manifest; all if None."""
        return self._opened_of(self.reached(where))

    def sides(self, where: Filter | None = None) -> list[Side]:
        """The same by space; one without partitions where there is none.

        Raises:
            IncompatibleModelsError: Partitions are in a space that no bridge leads to; the message names both.
        """
        by_space: dict[str, list[int]] = {}
        for number in self.reached(where):
            by_space.setdefault(self.manifest.partitions[number].space, []).append(number)
        sides = [Side(self._crossing(space), self._opened_of(own)) for space, own in by_space.items()]
        return sides or [Side(None, [])]

    def reached(self, where: Filter | None) -> Sequence[int]:
        """Numbers of the partitions that may hold a row passing a filter; all if None."""
        if where is None:
            return range(len(self.manifest.partitions))
        return self._routes.of(where.text, where).reached

    def _opened_of(self, numbers: Sequence[int]) -> list[Numbered]:
        return numbered((number, self._reader(number)) for number in numbers)

    def _crossing(self, space: str) -> Crossing | None:
        if space not in self._crossings:
            self._crossings[space] = self._load_crossing(space)
        return self._crossings[space]

    def _load_crossing(self, space: str) -> Crossing | None:
        encoder, bridge = self.manifest.encoder, self.manifest.bridge_to(space)
        if space == encoder.get("fingerprint"):
            return None
        if bridge is None:
            problem = f"has vectors of encoder {space[:12]}, and no bridge from {encoder.get('name')} to them"
            raise IncompatibleModelsError(f"index {self.manifest.index}", problem, "run `strata upgrade`")
        return load_crossing(self._store, bridge, EncoderIdentity.model_validate(encoder))

    def without_need(self, where: Filter | None) -> Filter | None:
        """The filter, or None where every row of the partitions that it reaches passes and they are more than are compared."""
        return None if where is None or self._routes.of(where.text, where).all_pass else where

    def _route(self, where: Filter) -> "_Route":
        regions = self._regions
        reached = tuple(no for no, region in enumerate(regions) if region.may_hold(where.predicate))
        rows = sum(self.manifest.partitions[no].rows for no in reached)
        all_pass = rows > FILTERED_ROWS and all(regions[no].must_hold(where.predicate) for no in reached)
        return _Route(reached, all_pass)

    @cached_property
    def _regions(self) -> list[Region]:
        manifest = self.manifest
        if manifest.partition_table is None:
            return [ANYWHERE] * len(manifest.partitions)
        return read_regions(self._store, manifest.partition_table, manifest.cuts, self.attributes)

    def _reader(self, number: int) -> PartitionReader:
        if number not in self._opened:
            partition = self.manifest.partitions[number]
            folder = partition.codes.binarizer
            opened = PartitionReader(self._store, partition, self._binarizers.get(folder))
            self._binarizers[folder] = opened.binarizer
            self._opened[number] = opened
        return self._opened[number]


def _comparable(gauge: Gauge | None, found: list[list[Hit]]) -> list[list[Hit]]:
    """Hits of each query with scores that compare with those of other sides."""
    if gauge is None:
        return found
    scores = [
        gauge.of(np.array([hit.score for hit in hits], np.float32), query).tolist()
        for query, hits in enumerate(found)
    ]
    return [
        [hit._replace(score=score) for hit, score in zip(hits, own, strict=True)]
        for hits, own in zip(found, scores, strict=True)
    ]


def _best_of_sides(found: Sequence[list[Hit]], k: int) -> list[Hit]:
    """The k best documents that any side found; of the same score those of the side that stands first."""
    if len(found) == 1:
        return found[0]
    best: dict[str, Hit] = {}
    for hit in sorted(chain.from_iterable(found), key=lambda hit: -hit.score):
        best.setdefault(hit.doc_id, hit)
    return list(islice(best.values(), k))


def _default_depth(tuned: int, k: int, where: Filter | None) -> int:
    """It is for `WANTED` documents: more of them need as many candidates each."""
    depth = max(tuned, FILTERED_DEPTH) if tuned and where is not None else tuned
    return max(depth, -(-depth * k // WANTED))


def checked_queries(vectors: NDArray[np.floating], manifest: IndexManifest, k: int) -> NDArray[np.float32]:
    """(q, d) unit vectors of queries.

    Raises:
        ValueError: Their width is not the index's, one is not finite or zero, or k is below 1.
    """
    queries = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    if queries.shape[1] != manifest.dims:
        made_by_encoder = f"{manifest.dims} dimensions, as {manifest.encoder.get('name')} makes them"
        raise ValueError(f"expected vectors of {made_by_encoder}, found {queries.shape[1]}")
    norms = np.linalg.norm(queries, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("a query vector is zero or not finite")
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    return queries / norms


NOTHING = Candidates(np.zeros(0, np.int64), np.zeros(0, np.float32))
NO_KEYS = np.zeros((0, VECTOR_ID.byte_width), np.uint8)
ANYWHERE = Region()
ROW_MASK = 0xFFFFFFFF
"""Of a place: partition << 32 | row."""


class _Group(NamedTuple):
    """Lists of one partition that the same queries probe."""

    number: int
    """Of the partition."""
    lists: NDArray[np.int64]
    members: NDArray[np.int64]
    """The queries."""
    entries: int


class _Read(NamedTuple):
    """A group with the entries of its lists."""

    group: _Group
    lists: list[Entries]


class _Rotated:
    """Queries as codes are scored with them, by binarizer; each is reckoned once."""

    def __init__(self, queries: NDArray[np.float32]) -> None:
        self._queries = queries
        self._found: dict[int, NDArray[np.float32]] = {}

    def by(self, binarizer: Binarizer) -> NDArray[np.float32]:
        key = id(binarizer)
        if key not in self._found:
            self._found[key] = rotate_queries(binarizer, self._queries)
        return self._found[key]


class _Block:
    """One block of queries of one side under one filter: what was read is counted from the block's start."""

    def __init__(
        self,
        store: Store,
        side: Side,
        queries: NDArray[np.float32],
        k: int,
        where: Filter | None,
        *,
        one_each: bool,
    ) -> None:
        self._queries, self._k, self._where = queries, k, where
        self._one_each = one_each
        self._store, self._partitions = store, side.partitions
        self._part_of = {one.number: one.part for one in side.partitions}
        self._bytes, self._requests = self._read_so_far()
        self._probed = self._scanned = self._reranked = self._rounds = 0
        self._masks: dict[int, NDArray[np.bool_]] = {}

    def stats(self) -> SearchStats:
        read, requests = self._read_so_far()
        return SearchStats(
            queries=len(self._queries),
            bytes_read=read - self._bytes,
            requests=requests - self._requests,
            lists_probed=self._probed,
            rows_scanned=self._scanned,
            rows_reranked=self._reranked,
            partitions_opened=len(self._partitions) * len(self._queries),
            rounds=self._rounds,
        )

    def approximate(self, rule: Probing, rerank: int) -> list[list[Hit]]:
        """Heads, lists, re-rank; deeper for the queries that got fewer documents than there are (chunks, filters)."""
        total = self._matching()
        if not total:
            return [[] for _ in self._queries]
        depth = max(rerank, self._k)
        if self._has_masks and rerank > 0 and total <= max(FILTERED_ROWS, depth):
            return self.exact()
        passing = np.concatenate([one.part.rows_by_list(self._where) for one in self._partitions])
        hits: list[list[Hit]] = [[] for _ in self._queries]
        short = np.arange(len(self._queries))
        while len(short):
            found = self._candidates(self._queries[short], passing, rule, depth)
            for query, one in zip(
                short.tolist(), self._hits(self._queries[short], found, rescore=rerank > 0), strict=True
            ):
                hits[query] = one
            if depth >= total:
                break
            short = np.array(
                [query for query in short.tolist() if len(hits[query]) < self._k], dtype=np.int64
            )
            rule = Probing(2 * rule.lists, max(WIDER, 2 * rule.margin))
            depth = min(total, 4 * depth)
        return hits

    def exact(self) -> list[list[Hit]]:
        """Score every passing row with its float16 vector; the running best are one row per document."""
        best = RunningBest(len(self._queries), self._k)
        for number, part in self._part_of.items():
            mask = self._mask(number)
            rows = np.arange(part.rows) if mask is None else np.flatnonzero(mask)
            for start in range(0, len(rows), EXACT_BLOCK_ROWS):
                block = rows[start : start + EXACT_BLOCK_ROWS]
                scores = self._queries @ part.embeddings(block).T
                places = (number << 32) + block
                best.add(places, scores, self._keys(places))
                self._reranked += len(block) * len(self._queries)
        self._rounds = 1
        return self._named(best.candidates())

    @property
    def _has_masks(self) -> bool:
        """Whether some rows are left out."""
        return self._where is not None or any(one.part.live is not None for one in self._partitions)

    def _mask(self, number: int) -> NDArray[np.bool_] | None:
        """(rows,) of a partition whether each passes; None where all do."""
        if self._where is None:
            return self._part_of[number].live
        if number not in self._masks:
            self._masks[number] = self._part_of[number].mask(self._where)
        return self._masks[number]

    def _matching(self) -> int:
        """Rows that pass."""
        if self._where is None:
            return sum(one.part.live_rows for one in self._partitions)
        masks = [(one.part, self._mask(one.number)) for one in self._partitions]
        return sum(part.rows if mask is None else int(mask.sum()) for part, mask in masks)

    def _candidates(
        self, queries: NDArray[np.float32], passing: NDArray[np.int64], rule: Probing, depth: int
    ) -> list[Candidates]:
        """Best vectors of each query by code, pooled over the partitions."""
        self._rounds += 1
        probed = self._probed_lists(queries, passing, rule, depth)
        self._probed += sum(map(len, probed))
        gathered = [_Gathered(depth) for _ in queries]
        self._scan_all(queries, probed, gathered)
        return [one.best() for one in gathered]

    def _probed_lists(
        self, queries: NDArray[np.float32], passing: NDArray[np.int64], rule: Probing, depth: int
    ) -> list[NDArray[np.int64]]:
        """Lists by the rule, and more where those have too few entries; all where all rows are asked for."""
        if depth >= self._matching():
            every = np.flatnonzero(passing)
            return [every] * len(queries)
        if self._where is not None:
            return self._probed_of_passing(queries, passing, rule, max(FILTERED_ROWS, depth))
        return [
            lists if passing[lists].sum() >= self._k else self._widened(query, passing, rule)
            for query, (lists, _) in zip(queries, nearest_lists(self._partitions, queries, rule), strict=True)
        ]

    def _widened(
        self, query: NDArray[np.float32], passing: NDArray[np.int64], rule: Probing
    ) -> NDArray[np.int64]:
        """The nearest lists, as many as hold entries enough."""
        most = rule.lists
        while True:
            most = min(4 * most, len(passing))
            ((lists, _),) = nearest_lists(self._partitions, query[None], Probing(most, MOST_MARGIN))
            enough = int(np.searchsorted(np.cumsum(passing[lists]), self._k)) + 1
            if enough <= len(lists) or most == len(passing):
                return lists[:enough]

    def _probed_of_passing(
        self, queries: NDArray[np.float32], passing: NDArray[np.int64], rule: Probing, min_rows: int
    ) -> list[NDArray[np.int64]]:
        """Lists by the rule of those that have a row that passes, and more where these have too few such rows."""
        size = max(1, SCORES_AT_ONCE // len(passing))
        blocks = [queries[start : start + size] for start in range(0, len(queries), size)]
        return [
            select_lists(one, rule, passing, min_rows=min_rows)
            for block in blocks
            for one in np.hstack([every.part.distances(block) for every in self._partitions])
        ]

    def _scan_all(
        self,
        queries: NDArray[np.float32],
        probed: list[NDArray[np.int64]],
        gathered: list["_Gathered"],
    ) -> None:
        rotated = _Rotated(queries)
        for groups in self._read_groups(probed):
            part, members = self._part_of[groups[0].group.number], groups[0].group.members
            places, entries = self._passing_entries(groups)
            scores = part.estimates(entries, queries[members], rotated.by(part.binarizer)[members])
            self._scanned += scores.size
            for query, row in zip(members.tolist(), scores, strict=True):
                gathered[query].add(Candidates(places, row))

    def _read_groups(self, probed: list[NDArray[np.int64]]) -> Iterator[list["_Read"]]:
        """Lists that the same queries probe, of partitions with the same binarizer; those of many groups are read at once."""
        groups = [group for one in self._partitions for group in self._groups_of(one, probed)]
        sizes = np.array([group.entries for group in groups], np.int64)
        for batch in np.split(np.arange(len(groups)), borders(sizes, ENTRIES_AT_ONCE)):
            same: dict[tuple[bytes, int], list[_Read]] = {}
            for read in self._read([groups[i] for i in batch]):
                binarizer = self._part_of[read.group.number].binarizer
                same.setdefault((read.group.members.tobytes(), id(binarizer)), []).append(read)
            for reads in same.values():
                held = np.array([read.group.entries for read in reads], np.int64)
                most = SCORES_AT_ONCE // len(reads[0].group.members)
                for some in np.split(np.arange(len(reads)), borders(held, most)):
                    yield [reads[i] for i in some]

    def _groups_of(self, one: Numbered, probed: list[NDArray[np.int64]]) -> Iterator["_Group"]:
        """Groups of lists of one partition."""
        entries = one.part.list_entries
        for lists, members in groups_of_lists([lists[one.own(lists)] - one.first for lists in probed]):
            most = min(ENTRIES_AT_ONCE, SCORES_AT_ONCE // len(members))
            for some in np.split(lists, borders(entries[lists], most)):
                yield _Group(one.number, some, members, int(entries[some].sum()))

    def _read(self, groups: Sequence["_Group"]) -> Iterator["_Read"]:
        """The lists of groups, whose partitions follow each other, read in one round."""
        runs = [list(run) for _, run in groupby(groups, lambda group: group.number)]
        readings = [
            self._part_of[run[0].number].reading_lists(np.concatenate([group.lists for group in run]))
            for run in runs
        ]
        for run, found in zip(runs, in_one_round(self._store, readings), strict=True):
            read = iter(found)
            for group in run:
                yield _Read(group, list(islice(read, len(group.lists))))

    def _passing_entries(self, reads: Sequence["_Read"]) -> tuple[NDArray[np.int64], Entries]:
        """Places (n,) of the entries of lists that pass, and these."""
        entries = Entries.joined([one for read in reads for one in read.lists])
        numbers = np.array([read.group.number for read in reads], np.int64)
        stops = np.cumsum([read.group.entries for read in reads])
        rows = entries.row.astype(np.int64)
        places = rows + np.repeat(numbers << 32, np.diff(stops, prepend=0))
        masks = [self._mask(number) for number in numbers.tolist()]
        if all(mask is None for mask in masks):
            return places, entries
        parts = np.split(rows, stops[:-1])
        kept = np.concatenate([_let_pass(mask, own) for mask, own in zip(masks, parts, strict=True)])
        return places[kept], entries.only(kept)

    def _hits(
        self, queries: NDArray[np.float32], found: list[Candidates], *, rescore: bool
    ) -> list[list[Hit]]:
        """Re-rank candidates with float16 vectors, keep one per document, name them."""
        places = np.unique(np.concatenate([c.places for c in found]))
        if not len(places):
            return [[] for _ in found]
        ids, vectors = self._keys_and_vectors(places, rescore=rescore)
        best = []
        for i, candidates in enumerate(found):
            at, scores = np.searchsorted(places, candidates.places), candidates.scores
            if vectors is not None:
                scores = vectors[at] @ queries[i]
                self._reranked += len(scores)
            kept = best_documents(ids[at], scores, self._k)
            best.append(Candidates(candidates.places[kept], scores[kept]))
        return self._named(best)

    def _of(
        self, places: NDArray[np.int64], read: Callable[[PartitionReader, NDArray[np.int64]], Reading[T]]
    ) -> list[T]:
        """What each partition says of its part of rising places, read in one round."""
        if not len(places):
            return []
        numbers, starts = np.unique(places >> 32, return_index=True)
        rows = np.split(places & ROW_MASK, starts[1:])
        parts = [self._part_of[number] for number in numbers.tolist()]
        return in_one_round(self._store, [read(part, own) for part, own in zip(parts, rows, strict=True)])

    def _values(self, places: NDArray[np.int64], columns: list[str]) -> list[NDArray[np.uint8]]:
        """Columns of rising places as (n, width) bytes."""
        found = self._of(places, lambda part, rows: part.reading_values(columns, rows))
        return [np.concatenate(column) for column in zip(*found, strict=True)]

    def _keys_and_vectors(
        self, places: NDArray[np.int64], *, rescore: bool
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """`_keys` of rising places, and their vectors, read in one round."""
        if not rescore:
            return self._keys(places), None
        self._rounds += 1
        if self._one_each:
            (vectors,) = self._values(places, ["embedding"])
            return self._keys(places), vectors.view(np.float16).astype(np.float32)
        ids, vectors = self._values(places, ["vector_id", "embedding"])
        return ids, vectors.view(np.float16).astype(np.float32)

    def _keys(self, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, 16) what tells the documents of rising places apart: vector_ids, or places if each document has one vector."""
        if self._one_each:
            keys = np.zeros((len(places), VECTOR_ID.byte_width), np.uint8)
            keys[:, :8] = places.astype(">i8").view(np.uint8).reshape(-1, 8)
            return keys
        self._rounds += 1
        return self._values(places, ["vector_id"])[0] if len(places) else NO_KEYS

    def _named(self, best: list[Candidates]) -> list[list[Hit]]:
        places = np.unique(np.concatenate([b.places for b in best]))
        self._rounds += 1
        names = self._of(places, lambda part, rows: part.reading_doc_ids(rows))
        by_place = dict(zip(places.tolist(), chain.from_iterable(names), strict=True))
        return [
            [
                Hit(by_place[place], score)
                for place, score in zip(b.places.tolist(), b.scores.tolist(), strict=True)
            ]
            for b in best
        ]

    def _read_so_far(self) -> tuple[int, int]:
        costs = [one.part.cost for one in self._partitions]
        return sum(read for read, _ in costs), sum(requests for _, requests in costs)


def _let_pass(mask: NDArray[np.bool_] | None, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) which rows a mask lets pass; None: all."""
    return np.ones(len(rows), np.bool_) if mask is None else mask[rows]


class _Gathered:
    """The best vectors of one query by code, of what was scanned so far and a little of the rest.

    Args:
        depth: How many are wanted.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pieces: list[Candidates] = []
        self._held = 0

    def add(self, piece: Candidates) -> None:
        """Consider the entries of some lists."""
        self._pieces.append(piece)
        self._held += len(piece.scores)
        if self._held > GATHERED + self._depth:
            self._pieces = [self.best()]
            self._held = len(self._pieces[0].scores)

    def best(self) -> Candidates:
        """At most `depth`, best first."""
        return best_rows(_joined(self._pieces), self._depth)


def _joined(pieces: list[Candidates]) -> Candidates:
    pieces = pieces or [NOTHING]
    return Candidates(np.concatenate([p.places for p in pieces]), np.concatenate([p.scores for p in pieces]))


# ------------------------------------------------------------------------------------------------ release


class Release:
    """A published index, ready to answer.

    Args:
        reader: The index.
        record: The release.
        encoder: For text queries; loaded from the manifest's encoder at the first one if None.
        storage: S3 settings, for an encoder that lies on S3.

    Raises:
        IncompatibleModelsError: The encoder says of itself that it is in another space; the message names both.
    """

    def __init__(
        self,
        reader: IndexReader,
        record: ReleaseRecord,
        encoder: QueryEncoder | None = None,
        storage: StorageConfig | None = None,
    ) -> None:
        identity = getattr(encoder, "identity", None)
        if isinstance(identity, EncoderIdentity):
            check_query_encoder(reader.manifest, identity, place=f"release {record.release}")
        self.reader = reader
        self.record = record
        self._encoder = encoder
        self._storage = storage
        self._filters: Remembered[str, Filter] = Remembered(
            lambda text: parse_filter(text, reader.attributes), most=MOST_REMEMBERED
        )

    @property
    def number(self) -> int:
        """Number of the release."""
        return self.record.release

    def search(
        self,
        queries: NDArray[np.floating] | Sequence[str] | str,
        *,
        k: int = 10,
        filter: str | None = None,  # noqa: A002  (the public contract's word)
        probing: Probing | None = None,
        rerank: int | None = None,
        exact: bool = False,
    ) -> SearchResult:
        """Find the k best documents of each query.

        Args:
            queries: (q, d) or (d,) vectors, or one or more texts.
            k: Documents per query; fewer come where fewer match.
            filter: WHERE text over the attributes, for all queries.
            probing: Which posting lists a query probes; None: the release's default.
            rerank: Candidates scored again with float16 vectors, 0 for codes alone; None: the release's default, in proportion
                where more than ten documents are asked for.
            exact: Score every passing document instead of probing.

        Raises:
            FilterError: The filter cannot be parsed or does not fit the attributes.
            ValueError: A vector has the wrong width, or is zero or not finite.
        """
        where = self._filters.of(filter, filter) if filter is not None else None
        vectors = self.vectors_of([queries] if isinstance(queries, str) else queries)
        return self.reader.search(vectors, k=k, where=where, probing=probing, rerank=rerank, exact=exact)

    def vectors_of(self, queries: NDArray[np.floating] | Sequence[str]) -> NDArray[np.floating]:
        """(q, d) vectors of texts; vectors are taken as they are."""
        if isinstance(queries, np.ndarray):
            return queries
        if self._encoder is None:
            self._encoder = self._load_encoder()
        return self._encoder.encode_queries(queries)

    def _load_encoder(self) -> QueryEncoder:
        """The encoder that the index was built with, checked against its fingerprint."""
        from pipeline.embedding.encoder import load_encoder

        built_with = EncoderIdentity.model_validate(self.reader.manifest.encoder)
        settings = self.reader.manifest.encoder_settings
        if settings is None:
            raise ConfigError(
                f"release {self.number}",
                "was built from ready-made vectors",
                "search with vectors, or pass an encoder",
            )
        encoder = load_encoder(
            EncoderConfig.model_validate(settings),
            dtype=built_with.dtype,
            name=built_with.name,
            storage=self._storage,
        )
        check_query_encoder(self.reader.manifest, encoder.identity, place=f"release {self.number}")
        return encoder


def check_query_encoder(manifest: IndexManifest, encoder: EncoderIdentity, *, place: str) -> None:
    """Refuse an encoder of queries that is in another space than an index.

    Of ready-made vectors nobody told what encoded them: there the same width passes.

    Args:
        manifest: The index.
        encoder: What encodes the queries.
        place: What names the encoder, for the message.

    Raises:
        IncompatibleModelsError: It is in another space; the message names both.
    """
    built_with = EncoderIdentity.model_validate(manifest.encoder)
    if built_with.model != GIVEN_MODEL or encoder.dims != built_with.dims:
        check_same_space(built_with, encoder, place=place)


def open_release(
    root: str,
    *,
    release: int | None = None,
    storage: StorageConfig | None = None,
    encoder: QueryEncoder | None = None,
) -> Release:
    """Open the release that the alias `current` names, or another one by number.

    Args:
        root: Local folder or s3://bucket/prefix.
        release: Number of a release; None: the current one.
        storage: S3 settings.
        encoder: For text queries; None: the manifest's encoder, loaded at the first one.

    Raises:
        MissingFileError: Nothing is published there, or there is no such release.
        CorruptArtifactError: The bytes of the manifest or of a binarizer are not the recorded ones.
        IncompatibleModelsError: Heads, vectors or encoder are of another space than the release, or codes of another binarizer.
            The message names both.
    """
    store = open_store(root, storage)
    number = release if release is not None else _current(store)
    record = parse_model(
        ReleaseRecord, store.read(f"releases/{number}.json"), f"{root}/releases/{number}.json"
    )
    reader = IndexReader(store, load_manifest(store, record.manifest))
    reader.open()
    return Release(reader, record, encoder, storage)


def load_manifest(store: Store, ref: FileRef) -> IndexManifest:
    """Read a manifest and hold it against its recorded hash.

    Raises:
        CorruptArtifactError: Its bytes are not the recorded ones.
        DataError: Another version of strata wrote it.
    """
    return parse_model(IndexManifest, read_recorded(store, ref), f"{store.uri}/{ref.path}")


def _current(store: Store) -> int:
    log = Log(store, "aliases/current")
    newest = log.newest()
    if newest == 0:
        raise MissingFileError(store.uri, "no release is published here", "run `strata run CONF` first")
    return AliasEntry.model_validate(log.read(newest)).release
