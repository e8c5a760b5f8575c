"""One partition opened for search: heads and directory in memory, posting lists and vectors by byte range.

What reads byte ranges is a generator: it yields what it wants, gets that, and returns what it makes of it, so that
`in_one_round` can read for many partitions together.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import FileRef, Partition, Segment
from pipeline.binarization import Binarizer, score
from pipeline.filters import Filter, evaluate
from pipeline.index.binarizers import load_binarizer
from pipeline.index.lists import Directory, Entries, ListsFile
from pipeline.index.scoring import spans_of
from pipeline.index.tombstones import read_tombstones
from pipeline.postings import HeadGraph, Probing, head_distances, nearest_heads, select_lists
from pipeline.schemas import VECTOR_ID, made_by
from pipeline.storage import RangeRead, Store, read_recorded, side_by_side
from pipeline.tables import RawFile, is_as_written, read_columns

__all__ = [
    "Numbered",
    "PartitionReader",
    "Reading",
    "Remembered",
    "in_one_round",
    "nearest_lists",
    "numbered",
]

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")
Ranges = list[tuple[int, int]]
Reading = Generator[Sequence[tuple[str, Ranges]], Sequence[RangeRead], T]
"""Yields ranges of files once, gets their bytes, returns what they are."""


def in_one_round(store: Store, readings: Sequence[Reading[T]]) -> list[T]:
    """What several readings return; all that they want is read together."""
    wanted = [next(one) for one in readings]
    fetched = iter(store.read_many([ranges for own in wanted for ranges in own]))
    return [_sent(one, [next(fetched) for _ in own]) for one, own in zip(readings, wanted, strict=True)]


def _sent(reading: Reading[T], fetched: Sequence[RangeRead]) -> T:
    try:
        reading.send(fetched)
    except StopIteration as done:
        found: T = done.value
        return found
    raise RuntimeError("a reading asked twice")


HEAD_TO_VECTOR = 2
"""Bytes of a float32 head to those of a float16 vector."""
READ_WHOLE = 50
"""A column is read whole for every so many'th of its values, instead of byte ranges for each."""
FILTERS_KEPT, KEPT_BYTES = 32, 1 << 24
"""Of which it is kept what passes, and what that takes, by partition: a bit a row and eight bytes a list for each."""
LENGTH_BYTES = 4
"""In front of each string of a PLAIN page."""


class _SegmentReader:
    """Files of one segment."""

    def __init__(self, store: Store, segment: Segment, partition: Partition) -> None:
        self._store = store
        self._ref = segment.vectors
        self._made = made_by(partition.space)
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._decoded: RawFile | None = None
        self._opened = False
        self.lists = ListsFile(store, segment.lists, partition)
        self.own_bytes = self.own_requests = 0

    @property
    def path(self) -> str:
        """Of the vectors file."""
        return self._ref.path

    @property
    def rows(self) -> int:
        return self._ref.rows

    @property
    def decoded(self) -> RawFile | None:
        """The vectors file where another tool wrote it anew; None where places in it are as the directory says.

        Raises:
            IncompatibleModelsError: Its vectors are of another encoder.
            MissingFileError: It is not there.
        """
        if not self._opened and not is_as_written(self._store, self._ref, self._made):
            self._decoded = RawFile(self._store, self._ref, ["vector_id", "embedding"], self._made)
        self._opened = True
        return self._decoded

    def open(self) -> None:
        """See whether the files are as they were written, and what made them."""
        self.lists.open()
        _ = self.decoded

    def count(self, fetched: RangeRead) -> None:
        """Add what fetching byte ranges of the vectors file cost."""
        self.own_bytes += fetched.bytes_read
        self.own_requests += fetched.requests

    @property
    def _files(self) -> list[RawFile | ListsFile]:
        return [self.lists, *([self._decoded] if self._decoded is not None else [])]

    @property
    def bytes_read(self) -> int:
        return self.own_bytes + sum(file.bytes_read for file in self._files)

    @property
    def requests(self) -> int:
        return self.own_requests + sum(file.requests for file in self._files)

    def attributes(self, columns: Sequence[str]) -> pa.Table:
        """Attribute columns, kept once read; as many rows where none is asked for."""
        if not columns:
            return pa.table({"": pa.nulls(self.rows)})
        absent = [name for name in columns if name not in self._columns]
        if absent:
            table = read_columns(self._store, self.path, absent)
            self.own_bytes += table.nbytes
            self._columns.update({name: table[name] for name in absent})
        return pa.table({name: self._columns[name] for name in columns})

    def decoded_doc_ids(self, rows: NDArray[np.int64]) -> pa.Array:
        """Names of the documents of rows, from the whole column."""
        column = read_columns(self._store, self.path, ["doc_id"])["doc_id"]
        self.own_bytes += column.nbytes
        return column.take(pa.array(rows)).combine_chunks()


class Remembered(Generic[A, B]):
    """Results of a function, kept; as they become too many, all are forgotten.

    Args:
        of: The function.
        most: Results that are kept.
    """

    def __init__(self, of: Callable[[A], B], *, most: int) -> None:
        self._of = of
        self._most = most
        self._known: dict[str, B] = {}

    def of(self, key: str, argument: A) -> B:
        """Its result; `key` stands for the argument."""
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= self._most:
                # Another thread may look up what is kept at any moment.
                self._known = {}
            found = self._known[key] = self._of(argument)
        return found


class _Passing(NamedTuple):
    """What passes a filter."""

    bitmap: NDArray[np.uint8]
    """Packed bits, one a row of the partition."""
    by_list: NDArray[np.int64]
    """(lists,) entries of each list, copies counted."""


class _Runs(NamedTuple):
    """Where the doc_ids of some rows lie."""

    ranges: list[tuple[int, int]]
    """Bytes of the doc_ids of a list, of each list."""
    places: list[list[int]]
    """Of each list, which of them are wanted, rising."""


def _strings(data: bytes, places: Sequence[int]) -> list[str]:
    """Strings at rising places of a PLAIN run."""
    found, at, number = [], 0, 0
    for place in places:
        while number < place:
            at += LENGTH_BYTES + int.from_bytes(data[at : at + LENGTH_BYTES], "little")
            number += 1
        start = at + LENGTH_BYTES
        found.append(data[start : start + int.from_bytes(data[at:start], "little")].decode())
    return found


def _runs_of_bytes(at: NDArray[np.int64], width: int) -> list[tuple[int, int]]:
    """Values of `width` bytes at rising places, as runs [start, stop)."""
    breaks = np.flatnonzero(np.diff(at) != width)
    starts, stops = at[np.append(0, breaks + 1)], at[np.append(breaks, len(at) - 1)] + width
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _read_graph(store: Store, ref: FileRef) -> HeadGraph:
    return HeadGraph.from_bytes(read_recorded(store, ref))


class PartitionReader:
    """Heads and directory of one partition in memory, its segments behind them.

    Args:
        store: The root.
        partition: As the manifest records it.
        binarizer: Of its codes, if it has been loaded.

    Raises:
        CorruptArtifactError: The bytes of the binarizer are not the recorded ones.
        IncompatibleModelsError: Heads or codes are of another space or binarizer than the partition.
    """

    def __init__(self, store: Store, partition: Partition, binarizer: Binarizer | None = None) -> None:
        self._store, self._partition = store, partition
        self._heads = RawFile(store, partition.heads, ["head"], made_by(partition.space))
        self.num_lists = partition.heads.rows
        self.graph = _read_graph(store, partition.head_graph) if partition.head_graph is not None else None
        self.directory = Directory(read_columns(store, partition.directory.path))
        self.binarizer: Binarizer = binarizer or load_binarizer(
            store, partition.codes.binarizer, dims=self._heads.width("head") // 4
        )
        self._segments = [_SegmentReader(store, segment, partition) for segment in partition.segments]
        self._first = np.cumsum([0, *(segment.rows for segment in self._segments)])
        kept_bytes = self.rows // 8 + 8 * self.num_lists
        self._passing = Remembered(
            self._evaluated, most=max(1, min(FILTERS_KEPT, KEPT_BYTES // max(1, kept_bytes)))
        )
        self._widths = {
            "vector_id": VECTOR_ID.byte_width,
            "embedding": self._heads.width("head") // HEAD_TO_VECTOR,
        }

    def open(self) -> None:
        """Read the heads that every query needs, and look at all files, now instead of at the first query."""
        if self.graph is None:
            _ = self._squares
        _ = self.open_lists
        side_by_side(_SegmentReader.open, self._segments)

    @property
    def rows(self) -> int:
        """Rows of the partition, those that have a tombstone among them."""
        return int(self._first[-1])

    @cached_property
    def live_rows(self) -> int:
        """Rows without a tombstone."""
        return self.rows if self.live is None else int(self.live.sum())

    @cached_property
    def live(self) -> NDArray[np.bool_] | None:
        """(rows,) which rows have no tombstone; None where all have none."""
        gone = [
            read_tombstones(self._store, segment.tombstones) + first
            for segment, first in zip(self._partition.segments, self._first, strict=False)
            if segment.tombstones is not None
        ]
        if not gone:
            return None
        live = np.ones(self.rows, np.bool_)
        live[np.concatenate(gone)] = False
        return live

    @cached_property
    def open_lists(self) -> NDArray[np.bool_] | None:
        """(lists,) which have a live vector of their own; None where all do. What others hold are copies of vectors elsewhere."""
        return None if self._live_primaries is None else self._live_primaries > 0

    @cached_property
    def _live_primaries(self) -> NDArray[np.int64] | None:
        """(lists,) live vectors of each list's own; None where all rows are live."""
        return None if self.live is None else self.primaries_passing(self.live)

    @cached_property
    def heads(self) -> NDArray[np.float32]:
        """(lists, d); where there is a graph, read only when a filter asks for all distances."""
        return self._heads.read_all("head").view(np.float32)

    @cached_property
    def _squares(self) -> NDArray[np.float32]:
        squares = np.einsum("ld,ld->l", self.heads, self.heads)
        return squares if self.open_lists is None else np.where(self.open_lists, squares, np.float32(np.inf))

    def distances(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """(q, lists) squared distances of queries to all heads; infinite of lists that are not open."""
        return head_distances(queries, self.heads, self._squares)

    @property
    def cost(self) -> tuple[int, int]:
        """Bytes and requests so far."""
        segments = self._segments
        return sum(s.bytes_read for s in segments), sum(s.requests for s in segments)

    def mask(self, where: Filter) -> NDArray[np.bool_]:
        """(rows,) whether a row passes the filter and has no tombstone; those of the last filters are kept."""
        bitmap = self._passing.of(where.text, where).bitmap
        return np.unpackbits(bitmap, count=self.rows).view(np.bool_)

    def attributes(self, columns: Sequence[str]) -> list[pa.Table]:
        """Attribute columns of the rows, by segment; kept once read."""
        return [segment.attributes(columns) for segment in self._segments]

    def rows_by_list(self, where: Filter | None) -> NDArray[np.int64]:
        """(lists,) entries of each list that pass the filter; where rows have tombstones, live vectors of its own."""
        if where is not None:
            return self._passing.of(where.text, where).by_list
        # Of copies it is not known which have a tombstone; every live vector is in its own list.
        return self.list_entries if self._live_primaries is None else self._live_primaries

    def _evaluated(self, where: Filter) -> _Passing:
        found = [evaluate(where, segment.attributes(where.columns)) for segment in self._segments]
        mask = np.concatenate(found)
        return self._passing_of(mask if self.live is None else mask & self.live)

    def _passing_of(self, mask: NDArray[np.bool_]) -> _Passing:
        passing = np.zeros(len(self.directory["list_no"]), np.int64)
        for no, segment in enumerate(self._segments):
            here = self.directory["segment"] == no
            sums = np.concatenate([[0], np.cumsum(mask[segment.lists.rows])])
            first, count = self.directory["first_entry"][here], self.directory["num_entries"][here]
            passing[here] = sums[first + count] - sums[first]
        return _Passing(np.packbits(mask), self._by_list(passing))

    def primaries_passing(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(lists,) vectors of each list's own that a mask of rows lets pass."""
        first, count = self.directory["first_row"], self.directory["num_primaries"]
        passing = np.zeros(len(first), np.int64)
        for start, stop in pairwise(self._first.tolist()):
            here = (first >= start) & (first < stop)
            sums = np.concatenate([[0], np.cumsum(mask[start:stop])])
            passing[here] = sums[first[here] - start + count[here]] - sums[first[here] - start]
        return self._by_list(passing)

    def _by_list(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        lists = self.directory["list_no"]
        return np.bincount(lists, weights=counts, minlength=self.num_lists).astype(np.int64)

    @cached_property
    def primaries(self) -> NDArray[np.int64]:
        """(lists,) vectors of each list's own."""
        return self._by_list(self.directory["num_primaries"])

    @cached_property
    def list_entries(self) -> NDArray[np.int64]:
        """(lists,) entries of each list."""
        return self._by_list(self.directory["num_entries"])

    def pieces(self, lists: NDArray[np.int64]) -> list[Entries]:
        """Entries of each of some posting lists, all read in one round."""
        return in_one_round(self._store, [self.reading_lists(lists)])[0]

    def reading_lists(self, lists: NDArray[np.int64]) -> Reading[list[Entries]]:
        """Entries of each of some posting lists."""
        rows = self.directory.rows_of(lists)
        of_row = self.directory["segment"][rows]
        parts = [(self._segments[int(no)].lists, np.flatnonzero(of_row == no)) for no in np.unique(of_row)]
        fetched = yield [(file.path, file.ranges(self.directory, rows[here])) for file, here in parts]
        found: dict[int, Entries] = {}
        for (file, here), data in zip(parts, fetched, strict=True):
            found.update(zip(here.tolist(), file.entries(self.directory, rows[here], data), strict=True))
        in_order = [found[at] for at in range(len(rows))]
        numbers = self.directory["list_no"][rows]
        if np.array_equal(numbers, lists):
            return in_order
        borders = np.flatnonzero(np.diff(numbers)) + 1
        return [
            Entries.joined(in_order[start:stop])
            for start, stop in pairwise([0, *borders.tolist(), len(rows)])
        ]

    def estimates(
        self, entries: Entries, queries: NDArray[np.float32], rotated: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """(q, n) float32 inner products of queries and entries, estimated from the codes.

        Args:
            entries: Of posting lists.
            queries: (q, d) float32.
            rotated: (q, m_0) float32, the same after `rotate_queries`.
        """
        scores = score(self.binarizer, rotated, entries.code, entries.factor, entries.offset)
        return scores + (queries @ self.binarizer.mean)[:, None]

    def spans(self) -> list[tuple[int, int]]:
        """Rows [first, stop) of each segment."""
        return list(pairwise(self._first.tolist()))

    def leaves_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) segment and (n,) list whose own vector each row is."""
        directory = self.directory
        here = np.flatnonzero(directory["num_primaries"] > 0)
        here = here[np.argsort(directory["first_row"][here])]
        at = here[np.searchsorted(directory["first_row"][here], rows, side="right") - 1]
        return directory["segment"][at], directory["list_no"][at]

    def primaries_at(
        self, lists: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Runs of rows of the vectors whose own list is one of some rising ones: list, first row and length of each."""
        at = self.directory.rows_of(lists)
        directory = self.directory
        return directory["list_no"][at], directory["first_row"][at], directory["num_primaries"][at]

    def primaries_of(self, lists: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) int64 rows of the vectors whose own list is one of these, rising, and (n,) int64 the list of each."""
        at = self.directory.rows_of(lists)
        counts = self.directory["num_primaries"][at]
        rows = np.arange(counts.sum()) + np.repeat(
            self.directory["first_row"][at] - np.cumsum(counts) + counts, counts
        )
        order = np.argsort(rows)
        return rows[order], np.repeat(self.directory["list_no"][at], counts)[order]

    def _by_segment(self, rows: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """Rising rows of the partition as numbers of segments and rows of these."""
        edges = np.searchsorted(rows, self._first)
        return [
            (no, rows[start:stop] - self._first[no])
            for no, (start, stop) in enumerate(pairwise(edges.tolist()))
            if stop > start
        ]

    def embeddings(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, d) vectors of rising rows."""
        return self.values(["embedding"], rows)[0].view(np.float16).astype(np.float32)

    def values(self, columns: Sequence[str], rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Some of `vector_id` and `embedding` of rising rows, at least one, as (n, width) bytes; read in one round."""
        return in_one_round(self._store, [self.reading_values(columns, rows)])[0]

    def reading_values(
        self, columns: Sequence[str], rows: NDArray[np.int64]
    ) -> Reading[list[NDArray[np.uint8]]]:
        """Some of `vector_id` and `embedding` of rising rows, at least one, as (n, width) bytes."""
        wanted = [(name, no, own) for name in columns for no, own in self._by_segment(rows)]
        raw = [
            (no, self._value_ranges(name, no, own))
            for name, no, own in wanted
            if self._segments[no].decoded is None
        ]
        fetched = iter(self._counted(raw, (yield self._files_of(raw))))
        found: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in columns}
        for name, no, own in wanted:
            decoded = self._segments[no].decoded
            if decoded is not None:
                found[name] += decoded.read(name, spans_of(own))
            else:
                data = b"".join(next(fetched).chunks)
                found[name].append(np.frombuffer(data, np.uint8).reshape(len(own), -1))
        return [np.concatenate(found[name]) for name in columns]

    def reading_doc_ids(self, rows: NDArray[np.int64]) -> Reading[list[str]]:
        """Names of the documents of rising rows."""
        parts = self._by_segment(rows)
        runs = {no: self._runs(no, own) for no, own in parts if self._segments[no].decoded is None}
        raw = [(no, run.ranges) for no, run in runs.items()]
        fetched = dict(zip(runs, self._counted(raw, (yield self._files_of(raw))), strict=True))
        names: list[str] = []
        for no, own in parts:
            if no not in runs:
                names += self._segments[no].decoded_doc_ids(own).to_pylist()
                continue
            for data, places in zip(fetched[no].chunks, runs[no].places, strict=True):
                names += _strings(data, places)
        return names

    def doc_ids(self, rows: NDArray[np.int64]) -> pa.Array:
        """Names of the documents of rising rows; a segment of which many are wanted is read whole."""
        found = []
        for no, own in self._by_segment(rows):
            segment = self._segments[no]
            if len(own) * READ_WHOLE < segment.rows:
                (names,) = in_one_round(self._store, [self.reading_doc_ids(own + self._first[no])])
                found.append(pa.array(names, pa.string()))
            else:
                found.append(segment.decoded_doc_ids(own))
        return pa.concat_arrays(found) if found else pa.array([], pa.string())

    def _files_of(self, wanted: Sequence[tuple[int, Ranges]]) -> list[tuple[str, Ranges]]:
        """Ranges of vectors files instead of segments."""
        return [(self._segments[no].path, ranges) for no, ranges in wanted]

    def _counted(
        self, wanted: Sequence[tuple[int, Ranges]], fetched: Sequence[RangeRead]
    ) -> Sequence[RangeRead]:
        """What was fetched, its cost added to the segments'."""
        for (no, _), one in zip(wanted, fetched, strict=True):
            self._segments[no].count(one)
        return fetched

    def _value_ranges(self, column: str, segment: int, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        here, firsts = self._primaries[segment]
        of_row = np.searchsorted(firsts, rows, side="right") - 1
        width = self._widths[column]
        starts = self.directory[f"{column}s_at"][here[of_row]]
        return _runs_of_bytes(starts + (rows - firsts[of_row]) * width, width)

    def _runs(self, segment: int, rows: NDArray[np.int64]) -> _Runs:
        """Where the doc_ids of the lists lie whose primaries rising rows of a segment are."""
        here, firsts = self._primaries[segment]
        of_row = np.searchsorted(firsts, rows, side="right") - 1
        lists, starts = np.unique(of_row, return_index=True)
        at = self.directory["doc_ids_at"][here[lists]]
        stops = at + self.directory["doc_ids_bytes"][here[lists]]
        places = [
            (part - firsts[one]).tolist() for one, part in zip(lists, np.split(rows, starts[1:]), strict=True)
        ]
        return _Runs(list(zip(at.tolist(), stops.tolist(), strict=True)), places)

    @cached_property
    def _primaries(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Of each segment, the rows of the directory with primaries, in storage order, and the first row of each."""
        directory, found = self.directory, []
        for no, first in enumerate(self._first[:-1]):
            here = np.flatnonzero((directory["segment"] == no) & (directory["num_primaries"] > 0))
            here = here[np.argsort(directory["first_row"][here])]
            found.append((here, directory["first_row"][here] - first))
        return found


class Numbered(NamedTuple):
    """One of several partitions."""

    number: int
    """Of the partition among all of the index."""
    part: PartitionReader
    first: int
    """Number of its first list where lists are numbered through these partitions, one after the other."""

    def own(self, lists: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,) which of some lists, numbered through, are of this partition."""
        return (lists >= self.first) & (lists < self.first + self.part.num_lists)


def numbered(partitions: Iterable[tuple[int, PartitionReader]]) -> list[Numbered]:
    """Partitions by their numbers, with their first lists."""
    found: list[Numbered] = []
    for number, part in partitions:
        first = found[-1].first + found[-1].part.num_lists if found else 0
        found.append(Numbered(number, part, first))
    return found


def nearest_lists(
    partitions: Sequence[Numbered], queries: NDArray[np.float32], rule: Probing
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Lists of each query by the rule; the heads of all partitions rank together.

    Args:
        partitions: At least one.
        queries: (q, d) float32.
        rule: Which lists are probed.

    Returns:
        Of each query (p,) int64 lists, numbered through, nearest first, and (p,) float32 squared distances to their heads.
    """
    numbers, apart = [], []
    for one in partitions:
        if one.part.graph is not None:
            count, among = min(rule.lists, one.part.num_lists), one.part.open_lists
            near, distances = one.part.graph.nearest(queries, count, among)
            numbers.append(np.where(near >= 0, near + one.first, near))
            apart.append(distances)
    measured = [one for one in partitions if one.part.graph is None]
    if measured:
        near, distances = _nearest_measured(measured, queries, rule.lists)
        numbers.append(near)
        apart.append(distances)
    found = []
    for lists, distances in zip(np.hstack(numbers), np.hstack(apart), strict=True):
        chosen = select_lists(distances, rule)
        found.append((lists[chosen], distances[chosen]))
    return found


def _nearest_measured(
    partitions: Sequence[Numbered], queries: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(q, count) nearest lists, numbered through, of partitions all of whose heads are measured, and their distances."""
    distances = np.hstack([one.part.distances(queries) for one in partitions])
    near, apart = nearest_heads(distances, min(count, distances.shape[1]))
    lists = np.concatenate([one.first + np.arange(one.part.num_lists) for one in partitions])
    return lists[near], apart
