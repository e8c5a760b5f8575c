"""An index opened for search, from the files alone: the reference reader that serving copies.

`open_release` follows alias → release → manifest. A query finds the nearest heads in memory, reads their posting lists
by byte range, scores codes, re-ranks the best with float16 vectors and reads the doc_ids of the winners: three dependent
rounds of I/O. Importing this module loads neither torch nor ray; an encoder is loaded at the first text query.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import (
    AliasEntry,
    FileRef,
    IndexManifest,
    Partition,
    ReleaseRecord,
    arrow_schema,
    parse_model,
)
from pipeline.binarization import rotate_queries
from pipeline.config import EncoderConfig, StorageConfig
from pipeline.errors import ConfigError, CorruptArtifactError, MissingFileError
from pipeline.filters import Filter, parse_filter
from pipeline.index.lists import Entries
from pipeline.index.partition import PartitionReader, nearest_lists
from pipeline.index.scoring import (
    Candidates,
    RunningBest,
    best_documents,
    best_rows,
    borders,
    groups_of_lists,
)
from pipeline.partitioning import route
from pipeline.postings import MOST_MARGIN, WANTED, Probing, select_lists
from pipeline.schemas import VECTOR_ID
from pipeline.spaces import GIVEN_MODEL, EncoderIdentity, check_same_space
from pipeline.storage import Log, Store, open_store

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
        self._one_each = manifest.num_documents == sum(part.rows for part in manifest.partitions)

    def open(self) -> None:
        """Read heads and directories and look at all files now instead of at the first query."""
        for partition in self.manifest.partitions:
            self._reader(partition).open()

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
        queries = _checked(vectors, self.manifest, k)
        defaults = self.manifest.search
        depth = _default_depth(defaults.rerank, k, where) if rerank is None else rerank
        rule = probing or Probing(defaults.lists, defaults.margin)
        hits: list[list[Hit]] = []
        stats = SearchStats()
        size = max(1, min(QUERY_BLOCK, CANDIDATES_AT_ONCE // max(depth, k)))
        for start in range(0, len(queries), size):
            block = self._block(queries[start : start + size], k, where)
            found = block.exact() if exact else block.approximate(rule, depth)
            hits += found
            stats = stats.plus(block.stats())
        return SearchResult(tuple(hits), stats)

    def partitions(self) -> list[PartitionReader]:
        """All of them, opened."""
        return self._route(None)

    def _block(self, queries: NDArray[np.float32], k: int, where: Filter | None) -> "_Block":
        return _Block(self._route(where), queries, k, where, one_each=self._one_each)

    def _route(self, where: Filter | None) -> list[PartitionReader]:
        return [self._reader(partition) for partition in route(self.manifest.partitions, where)]

    def _reader(self, partition: Partition) -> PartitionReader:
        if partition.partition_id not in self._opened:
            self._opened[partition.partition_id] = PartitionReader(self._store, partition)
        return self._opened[partition.partition_id]


def _default_depth(tuned: int, k: int, where: Filter | None) -> int:
    """It is for `WANTED` documents: more of them need as many candidates each."""
    depth = max(tuned, FILTERED_DEPTH) if tuned and where is not None else tuned
    return max(depth, -(-depth * k // WANTED))


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
ROW_MASK = 0xFFFFFFFF
"""Of a place: partition << 32 | row."""


class _Block:
    """One block of queries under one filter: what was read is counted from the block's start."""

    def __init__(
        self,
        partitions: list[PartitionReader],
        queries: NDArray[np.float32],
        k: int,
        where: Filter | None,
        *,
        one_each: bool,
    ) -> None:
        self._queries, self._k, self._where = queries, k, where
        self._one_each = one_each
        self._partitions = partitions
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

    def approximate(self, rule: Probing, rerank: int) -> list[list[Hit]]:
        """Heads, lists, re-rank; deeper for the queries that got fewer documents than there are (chunks, filters)."""
        total = self._matching()
        depth = max(rerank, self._k)
        if self._where is not None and rerank > 0 and total <= max(FILTERED_ROWS, depth):
            return self.exact()
        passing = np.concatenate([part.rows_by_list(self._where) for part in self._partitions])
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
        for number, part in enumerate(self._partitions):
            rows = np.arange(part.rows) if self._where is None else np.flatnonzero(part.mask(self._where))
            for start in range(0, len(rows), EXACT_BLOCK_ROWS):
                block = rows[start : start + EXACT_BLOCK_ROWS]
                scores = self._queries @ part.embeddings(block).T
                places = (number << 32) + block
                best.add(places, scores, self._keys(places))
                self._reranked += len(block) * len(self._queries)
        self._rounds = 1
        return self._named(best.candidates())

    def _matching(self) -> int:
        """Rows that pass."""
        if self._where is None:
            return sum(part.rows for part in self._partitions)
        return sum(int(part.mask(self._where).sum()) for part in self._partitions)

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
            for one in np.concatenate([part.distances(block) for part in self._partitions], axis=1)
        ]

    def _scan_all(
        self,
        queries: NDArray[np.float32],
        probed: list[NDArray[np.int64]],
        gathered: list["_Gathered"],
    ) -> None:
        first = 0
        for number, part in enumerate(self._partitions):
            stop = first + part.num_lists
            mine = [lists[(lists >= first) & (lists < stop)] - first for lists in probed]
            rotated = rotate_queries(part.binarizer, queries)
            for lists, members in self._read_groups(part, mine):
                rows, scores = self._score(part, lists, queries[members], rotated[members])
                self._scanned += len(rows) * len(members)
                places = (number << 32) + rows
                for query, row in zip(members.tolist(), scores, strict=True):
                    gathered[query].add(Candidates(places, row))
            first = stop

    def _read_groups(
        self, part: PartitionReader, probed: list[NDArray[np.int64]]
    ) -> Iterator[tuple[list[Entries], NDArray[np.int64]]]:
        """Lists that the same queries probe, with these; lists of many groups are read at once."""
        groups = [
            (part_of_lists, members)
            for lists, members in groups_of_lists(probed)
            for part_of_lists in np.split(
                lists,
                borders(part.list_entries[lists], min(ENTRIES_AT_ONCE, SCORES_AT_ONCE // len(members))),
            )
        ]
        sizes = np.array([part.list_entries[lists].sum() for lists, _ in groups], np.int64)
        for batch in np.split(np.arange(len(groups)), borders(sizes, ENTRIES_AT_ONCE)):
            if not len(batch):
                continue
            read = iter(part.pieces(np.concatenate([groups[i][0] for i in batch])))
            for i in batch:
                lists, members = groups[i]
                yield list(islice(read, len(lists))), members

    def _score(
        self,
        part: PartitionReader,
        lists: list[Entries],
        queries: NDArray[np.float32],
        rotated: NDArray[np.float32],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows (n,) and estimates (queries, n) of the passing entries of lists."""
        entries = Entries.joined(lists)
        rows = entries.row.astype(np.int64)
        if self._where is not None:
            kept = part.mask(self._where)[rows]
            entries = entries.only(kept)
            rows = rows[kept]
        return rows, part.estimates(entries, queries, rotated)

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
        self, places: NDArray[np.int64], read: Callable[[PartitionReader, NDArray[np.int64]], NDArray[Any]]
    ) -> NDArray[Any]:
        """What the partitions say of rising places."""
        numbers = places >> 32
        return np.concatenate(
            [read(self._partitions[int(no)], places[numbers == no] & ROW_MASK) for no in np.unique(numbers)]
        )

    def _keys_and_vectors(
        self, places: NDArray[np.int64], *, rescore: bool
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """`_keys` of rising places, and their vectors, read in one round."""
        if not rescore:
            return self._keys(places), None
        self._rounds += 1
        if self._one_each:
            vectors = self._of(places, lambda part, rows: part.embeddings(rows))
            return self._keys(places), vectors
        columns = ["vector_id", "embedding"]
        both = self._of(places, lambda part, rows: np.concatenate(part.values(columns, rows), axis=1))
        ids, vectors = np.split(both, [VECTOR_ID.byte_width], axis=1)
        return ids, np.ascontiguousarray(vectors).view(np.float16).astype(np.float32)

    def _keys(self, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, 16) what tells the documents of rising places apart: vector_ids, or places if each document has one vector."""
        if self._one_each:
            keys = np.zeros((len(places), VECTOR_ID.byte_width), np.uint8)
            keys[:, :8] = places.astype(">i8").view(np.uint8).reshape(-1, 8)
            return keys
        self._rounds += 1
        return self._of(places, lambda part, rows: part.values(["vector_id"], rows)[0])

    def _named(self, best: list[Candidates]) -> list[list[Hit]]:
        places = np.unique(np.concatenate([b.places for b in best]))
        self._rounds += 1
        names = [
            name
            for no in np.unique(places >> 32)
            for name in self._partitions[int(no)].doc_ids(places[places >> 32 == no] & ROW_MASK)
        ]
        by_place = dict(zip(places.tolist(), names, strict=True))
        return [
            [Hit(by_place[p], s) for p, s in zip(b.places.tolist(), b.scores.tolist(), strict=True)]
            for b in best
        ]

    def _read_so_far(self) -> tuple[int, int]:
        costs = [part.cost for part in self._partitions]
        return sum(read for read, _ in costs), sum(requests for _, requests in costs)


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
        where = parse_filter(filter, self.reader.attributes) if filter is not None else None
        vectors = (
            queries
            if isinstance(queries, np.ndarray)
            else self._encode([queries] if isinstance(queries, str) else queries)
        )
        return self.reader.search(vectors, k=k, where=where, probing=probing, rerank=rerank, exact=exact)

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
