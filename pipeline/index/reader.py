"""An index opened for search, from the files alone: the reference reader that serving copies.

`open_release` follows alias → release → manifest. A query finds the nearest heads in memory, reads their posting lists
by byte range, scores codes, re-ranks the best with float16 vectors and reads the doc_ids of the winners: three dependent
rounds of I/O. Importing this module loads neither torch nor ray; an encoder is loaded at the first text query.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import (
    AliasEntry,
    FileRef,
    IndexManifest,
    Partition,
    ReleaseRecord,
    Segment,
    arrow_schema,
    parse_model,
)
from pipeline.binarization import Binarizer, rotate_queries, score
from pipeline.config import EncoderConfig, StorageConfig
from pipeline.errors import ConfigError, CorruptArtifactError, MissingFileError
from pipeline.filters import Filter, evaluate, parse_filter
from pipeline.index.scoring import (
    Candidates,
    RunningBest,
    best_documents,
    best_rows,
    groups_of_lists,
    spans_of,
)
from pipeline.index.stage import load_binarizer
from pipeline.partitioning import route
from pipeline.postings import head_distances, select_probes
from pipeline.schemas import made_by
from pipeline.spaces import GIVEN_MODEL, EncoderIdentity, check_same_space
from pipeline.storage import Log, Store, open_store
from pipeline.tables import RawFile, open_parquet, read_columns

__all__ = [
    "Hit",
    "IndexReader",
    "QueryEncoder",
    "Release",
    "SearchResult",
    "SearchStats",
    "check_query_encoder",
    "open_release",
]

QUERY_BLOCK = 256
"""Queries searched together; bounds the memory of their candidates."""
FILTERED_DEPTHS = 10
"""Passing rows that a filtered query scans at least, in units of the re-rank depth: a selective filter moves the nearest
matches away from the nearest lists. Where no more than that pass, all of them are scored exactly."""
EXACT_BLOCK_ROWS = 8192


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
        mine, theirs = asdict(self), asdict(other)
        rounds = max(self.rounds, other.rounds)
        return SearchStats(**{**{name: mine[name] + theirs[name] for name in mine}, "rounds": rounds})


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


# ------------------------------------------------------------------------------------------------ segments


class _SegmentReader:
    """Rows of one segment by number."""

    def __init__(self, store: Store, segment: Segment, partition: Partition) -> None:
        self._store = store
        self._segment = segment
        self._partition = partition
        self._columns: dict[str, pa.ChunkedArray] = {}
        self.decoded_bytes = 0

    @cached_property
    def lists(self) -> RawFile:
        made = made_by(self._partition.space, self._partition.codes.binarizer)
        return RawFile(self._store, self._segment.lists, ["code", "factor", "offset", "row"], made)

    @cached_property
    def vectors(self) -> RawFile:
        made = made_by(self._partition.space)
        return RawFile(self._store, self._segment.vectors, ["vector_id", "embedding"], made)

    @cached_property
    def entry_rows(self) -> NDArray[np.int32]:
        """(entries,) row of each entry."""
        return self.lists.read_all("row").view(np.int32).reshape(-1)

    @property
    def bytes_read(self) -> int:
        opened = [self.__dict__[name] for name in ("lists", "vectors") if name in self.__dict__]
        return self.decoded_bytes + sum(file.bytes_read for file in opened)

    @property
    def requests(self) -> int:
        opened = [self.__dict__[name] for name in ("lists", "vectors") if name in self.__dict__]
        return sum(file.requests for file in opened)

    def attributes(self, columns: Sequence[str]) -> pa.Table:
        """Attribute columns, kept once read."""
        absent = [name for name in columns if name not in self._columns]
        if absent:
            table = read_columns(self._store, self._segment.vectors.path, absent)
            self.decoded_bytes += table.nbytes
            self._columns.update({name: table[name] for name in absent})
        return pa.table({name: self._columns[name] for name in columns})

    def doc_ids(self, rows: NDArray[np.int64]) -> list[str]:
        """Names of the documents of rows."""
        with open_parquet(self._store, self._segment.vectors.path) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            starts = np.concatenate([[0], np.cumsum(sizes)])
            groups = np.searchsorted(starts, rows, side="right") - 1
            found: dict[int, str] = {}
            for group in np.unique(groups):
                column = file.read_row_group(int(group), columns=["doc_id"], use_threads=False).column(0)
                self.decoded_bytes += column.nbytes
                here = rows[groups == group]
                names = column.take(pa.array(here - starts[group])).to_pylist()
                found.update(zip(here.tolist(), names, strict=True))
        return [found[row] for row in rows.tolist()]

    def embeddings(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, d) vectors of rising rows."""
        blocks = self.vectors.read("embedding", spans_of(rows))
        return np.concatenate(blocks).view(np.float16).astype(np.float32)

    def vector_ids(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, 16) vector_ids of rising rows."""
        return np.concatenate(self.vectors.read("vector_id", spans_of(rows)))


class _PartitionReader:
    """Heads and directory of one partition in memory, its segments behind them."""

    def __init__(self, store: Store, partition: Partition) -> None:
        heads = RawFile(store, partition.heads, ["head"], made_by(partition.space))
        self.heads: NDArray[np.float32] = heads.read_all("head").view(np.float32)
        directory = read_columns(store, partition.directory.path)
        order = np.lexsort((directory["segment"].to_numpy(), directory["list_no"].to_numpy()))
        self.segment_no, self.list_no, self.first, self.count = (
            directory[name].to_numpy()[order].astype(np.int64)
            for name in ("segment", "list_no", "first_entry", "num_entries")
        )
        self.binarizer: Binarizer = load_binarizer(store, partition.codes.binarizer, dims=self.heads.shape[1])
        self.segments = [_SegmentReader(store, segment, partition) for segment in partition.segments]
        self._masks: dict[str, list[NDArray[np.bool_]]] = {}

    def masks(self, where: Filter) -> list[NDArray[np.bool_]]:
        """For each segment, (rows,) whether a row passes the filter; the last filter's are kept."""
        if where.text not in self._masks:
            found = [evaluate(where, segment.attributes(where.columns)) for segment in self.segments]
            self._masks = {where.text: found}
        return self._masks[where.text]

    def rows_by_list(self, where: Filter | None) -> NDArray[np.int64]:
        """(lists,) entries of each list that pass the filter."""
        counts = self.count if where is None else self._passing_entries(self.masks(where))
        return np.bincount(self.list_no, weights=counts, minlength=len(self.heads)).astype(np.int64)

    def _passing_entries(self, masks: list[NDArray[np.bool_]]) -> NDArray[np.int64]:
        sums = [
            np.concatenate([[0], np.cumsum(m[s.entry_rows])])
            for s, m in zip(self.segments, masks, strict=True)
        ]
        places = zip(self.segment_no, self.first, self.count, strict=True)
        return np.array(
            [sums[s][first + count] - sums[s][first] for s, first, count in places], dtype=np.int64
        )

    def directory_rows(self, lists: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the directory that belong to lists."""
        starts, stops = (
            np.searchsorted(self.list_no, lists),
            np.searchsorted(self.list_no, lists, side="right"),
        )
        return np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])


# ------------------------------------------------------------------------------------------------ index


class IndexReader:
    """Search over one index, whether or not it is published.

    Args:
        store: The root.
        manifest: The index.
    """

    def __init__(self, store: Store, manifest: IndexManifest) -> None:
        self.manifest = manifest
        self.attributes = arrow_schema(manifest.attributes)
        self._store = store
        self._opened: dict[int, _PartitionReader] = {}

    def open(self) -> None:
        """Load heads and directories now instead of at the first query."""
        for partition in self.manifest.partitions:
            self._reader(partition)

    def heads(self) -> NDArray[np.float32]:
        """(lists, d) heads of all partitions, in the order in which queries rank them."""
        return np.concatenate([self._reader(partition).heads for partition in self.manifest.partitions])

    def search(
        self,
        vectors: NDArray[np.floating],
        *,
        k: int = 10,
        where: Filter | None = None,
        probes: int | None = None,
        rerank: int | None = None,
        exact: bool = False,
    ) -> SearchResult:
        """Find the k nearest documents of each query by cosine.

        Args:
            vectors: (q, d); normalized here.
            k: Documents per query.
            where: Only documents that pass this filter.
            probes: Posting lists per query; the release's default if None.
            rerank: Candidates scored with float16 vectors, 0 for codes alone; the release's default if None.
            exact: Score every passing document instead.

        Raises:
            ValueError: The width of the vectors is not the index's, one is not finite or zero, or k is below 1.
        """
        queries = _checked(vectors, self.manifest, k)
        depth = self.manifest.search.rerank if rerank is None else rerank
        wanted = probes or self.manifest.search.probes
        hits: list[list[Hit]] = []
        stats = SearchStats()
        for start in range(0, len(queries), QUERY_BLOCK):
            block = _Block(self._route(where), queries[start : start + QUERY_BLOCK], k, where)
            found = block.exact() if exact else block.approximate(wanted, depth)
            hits += found
            stats = stats.plus(block.stats())
        return SearchResult(tuple(hits), stats)

    def _route(self, where: Filter | None) -> list[_PartitionReader]:
        return [self._reader(partition) for partition in route(self.manifest.partitions, where)]

    def _reader(self, partition: Partition) -> _PartitionReader:
        if partition.partition_id not in self._opened:
            self._opened[partition.partition_id] = _PartitionReader(self._store, partition)
        return self._opened[partition.partition_id]


def _checked(vectors: NDArray[np.floating], manifest: IndexManifest, k: int) -> NDArray[np.float32]:
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


class _Block:
    """One block of queries under one filter: what was read is counted from the block's start."""

    def __init__(
        self, partitions: list[_PartitionReader], queries: NDArray[np.float32], k: int, where: Filter | None
    ) -> None:
        self._queries, self._k, self._where = queries, k, where
        self._partitions = partitions
        self._segments = [(part, no) for part in partitions for no in range(len(part.segments))]
        self._base = {id(part): self._segments.index((part, 0)) for part in partitions if part.segments}
        self._bytes, self._requests = self._read_so_far()
        self._probed = self._scanned = self._reranked = self._rounds = 0

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

    def approximate(self, probes: int, rerank: int) -> list[list[Hit]]:
        """Heads, lists, re-rank; deeper for the queries that got fewer documents than there are (chunks, filters)."""
        passing = [part.rows_by_list(self._where) for part in self._partitions]
        total = sum(int(counts.sum()) for counts in passing)
        depth = max(rerank, self._k)
        if self._where is not None and rerank > 0 and total <= FILTERED_DEPTHS * depth:
            return self.exact()
        hits: list[list[Hit]] = [[] for _ in self._queries]
        short = np.arange(len(self._queries))
        while len(short):
            found = self._candidates(self._queries[short], passing, probes, depth)
            for query, one in zip(
                short.tolist(), self._hits(self._queries[short], found, rescore=rerank > 0), strict=True
            ):
                hits[query] = one
            if depth >= total:
                break
            short = np.array(
                [query for query in short.tolist() if len(hits[query]) < self._k], dtype=np.int64
            )
            probes, depth = 2 * probes, min(total, 4 * depth)
        return hits

    def exact(self) -> list[list[Hit]]:
        """Score every passing row with its float16 vector; the running best are one row per document."""
        self._rounds = 2
        best = RunningBest(len(self._queries), self._k)
        for place, (part, no) in enumerate(self._segments):
            segment = part.segments[no]
            rows = (
                np.arange(segment.vectors.rows)
                if self._where is None
                else np.flatnonzero(part.masks(self._where)[no])
            )
            for start in range(0, len(rows), EXACT_BLOCK_ROWS):
                block = rows[start : start + EXACT_BLOCK_ROWS]
                scores = self._queries @ segment.embeddings(block).T
                best.add((place << 32) + block, scores, segment.vector_ids(block))
                self._reranked += len(block) * len(self._queries)
        return self._named(best.candidates())

    def _candidates(
        self, queries: NDArray[np.float32], passing: list[NDArray[np.int64]], probes: int, depth: int
    ) -> list[Candidates]:
        """Best entries of each query by code, pooled over the partitions: their heads rank together."""
        self._rounds = max(self._rounds, 1)
        distances = np.concatenate([head_distances(queries, part.heads) for part in self._partitions], axis=1)
        pooled = np.concatenate(passing)
        min_rows = depth if self._where is None else FILTERED_DEPTHS * depth
        probed = [select_probes(row, pooled, probes=probes, min_rows=min_rows) for row in distances]
        self._probed += sum(map(len, probed))
        gathered: list[list[Candidates]] = [[] for _ in queries]
        first = 0
        for part in self._partitions:
            stop = first + len(part.heads)
            mine = [lists[(lists >= first) & (lists < stop)] - first for lists in probed]
            self._scan(part, queries, mine, gathered)
            first = stop
        return [best_rows(_joined(pieces), depth) for pieces in gathered]

    def _scan(
        self,
        part: _PartitionReader,
        queries: NDArray[np.float32],
        probed: list[NDArray[np.int64]],
        gathered: list[list[Candidates]],
    ) -> None:
        rotated = rotate_queries(part.binarizer, queries)
        for lists, members in groups_of_lists(probed):
            rows = part.directory_rows(lists)
            for no in np.unique(part.segment_no[rows]):
                here = rows[part.segment_no[rows] == no]
                spans = list(
                    zip(
                        part.first[here].tolist(), (part.first[here] + part.count[here]).tolist(), strict=True
                    )
                )
                places, scores = self._score(part, int(no), spans, queries[members], rotated[members])
                self._scanned += len(places) * len(members)
                for query, row in zip(members.tolist(), scores, strict=True):
                    gathered[query].append(Candidates(places, row))

    def _score(
        self,
        part: _PartitionReader,
        no: int,
        spans: list[tuple[int, int]],
        queries: NDArray[np.float32],
        rotated: NDArray[np.float32],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Places (n,) and estimates (queries, n) of the passing entries of spans of one segment."""
        lists = part.segments[no].lists
        row, code, factor, offset = (
            np.concatenate(lists.read(c, spans)) for c in ("row", "code", "factor", "offset")
        )
        rows = row.view(np.int32).reshape(-1)
        kept = np.ones(len(rows), bool) if self._where is None else part.masks(self._where)[no][rows]
        factors, offsets = (
            factor.view(np.float16).reshape(-1)[kept],
            offset.view(np.float16).reshape(-1)[kept],
        )
        scores = (
            score(part.binarizer, rotated, code[kept], factors, offsets)
            + (queries @ part.binarizer.mean)[:, None]
        )
        return ((self._base[id(part)] + no) << 32) + rows[kept].astype(np.int64), scores

    def _hits(
        self, queries: NDArray[np.float32], found: list[Candidates], *, rescore: bool
    ) -> list[list[Hit]]:
        """Re-rank candidates with float16 vectors, keep one per document, name them."""
        places = np.unique(np.concatenate([c.places for c in found]))
        if not len(places):
            return [[] for _ in found]
        self._rounds = 3
        ids = np.concatenate([segment.vector_ids(rows) for segment, rows in self._by_segment(places)])
        vectors = self._embeddings(places) if rescore else None
        best = []
        for i, candidates in enumerate(found):
            at, scores = np.searchsorted(places, candidates.places), candidates.scores
            if vectors is not None:
                scores = vectors[at] @ queries[i]
                self._reranked += len(scores)
            kept = best_documents(ids[at], scores, self._k)
            best.append(Candidates(candidates.places[kept], scores[kept]))
        return self._named(best)

    def _by_segment(self, places: NDArray[np.int64]) -> Iterator[tuple[_SegmentReader, NDArray[np.int64]]]:
        """Rising places as rows of their segments."""
        for place in np.unique(places >> 32):
            part, no = self._segments[int(place)]
            yield part.segments[no], places[places >> 32 == place] & 0xFFFFFFFF

    def _embeddings(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.concatenate([segment.embeddings(rows) for segment, rows in self._by_segment(places)])

    def _named(self, best: list[Candidates]) -> list[list[Hit]]:
        places = np.unique(np.concatenate([b.places for b in best]))
        names = [name for segment, rows in self._by_segment(places) for name in segment.doc_ids(rows)]
        by_place = dict(zip(places.tolist(), names, strict=True))
        return [
            [Hit(by_place[p], s) for p, s in zip(b.places.tolist(), b.scores.tolist(), strict=True)]
            for b in best
        ]

    def _read_so_far(self) -> tuple[int, int]:
        segments = [part.segments[no] for part, no in self._segments]
        return sum(s.bytes_read for s in segments), sum(s.requests for s in segments)


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
        probes: int | None = None,
        rerank: int | None = None,
        exact: bool = False,
    ) -> SearchResult:
        """Find the k best documents of each query.

        Args:
            queries: (q, d) or (d,) vectors, or one or more texts.
            k: Documents per query; fewer come where fewer match.
            filter: WHERE text over the attributes, for all queries.
            probes: Posting lists per query; None: the release's default.
            rerank: Candidates scored again with float16 vectors, 0 for codes alone; None: the release's default.
            exact: Score every passing document instead of probing.

        Raises:
            FilterError: The filter cannot be parsed or does not fit the attributes.
            ValueError: A vector has the wrong width, or is zero or not finite.
        """
        where = parse_filter(filter, self.reader.attributes) if filter is not None else None
        vectors = (
            queries
            if isinstance(queries, np.ndarray)
            else self._encode([queries] if isinstance(queries, str) else queries)
        )
        return self.reader.search(vectors, k=k, where=where, probes=probes, rerank=rerank, exact=exact)

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self._encoder is None:
            self._encoder = self._load_encoder()
        return self._encoder.encode_queries(texts)

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
        IncompatibleModelsError: Heads or encoder are of another space than the release; later searches may find codes of
            another binarizer. The message names both.
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
    data = store.read(ref.path)
    place = f"{store.uri}/{ref.path}"
    digest = hashlib.sha256(data).hexdigest()
    if digest != ref.sha256:
        problem = f"expected sha256 {ref.sha256[:12]}…, found {digest[:12]}…"
        raise CorruptArtifactError(place, problem, "restore the file, or roll back to another release")
    return parse_model(IndexManifest, data, place)


def _current(store: Store) -> int:
    log = Log(store, "aliases/current")
    newest = log.newest()
    if newest == 0:
        raise MissingFileError(store.uri, "no release is published here", "run `strata run CONF` first")
    return AliasEntry.model_validate(log.read(newest)).release
