"""Exact float32 neighbours of queries, bucket by bucket: what an index is held against.

Also `measure_search`, which runs an index over the queries and counts what that cost.
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import FileRef, Segment, StageOutput
from pipeline.embedding.bisecting import encode_around
from pipeline.embedding.encoder import TextEncoder
from pipeline.errors import DataError
from pipeline.index.reader import Hit, IndexReader
from pipeline.index.scoring import Candidates, RunningBest, best_documents
from pipeline.index.tombstones import live_rows
from pipeline.index.vectors import VectorSource, iterate_vectors
from pipeline.measures import mean, percentile
from pipeline.postings import Probing
from pipeline.storage import Store
from pipeline.tables import hash_keys, open_parquet, read_columns, to_matrix, vector_array, write_table

__all__ = [
    "ExactNeighbours",
    "encode_query_texts",
    "exact_bucket",
    "exact_segment",
    "measure_search",
    "measure_setting",
    "merge_exact",
    "rank",
    "read_query_vectors",
    "write_query_vectors",
]

QUERY_BLOCK = 1024
"""Queries compared with a slice of rows at once: bounds the memory of their products."""
LATENCY_QUERIES = 100
"""Queries that are timed one by one."""
CURVE_COST_QUERIES = 10
"""Queries of a recall curve that are searched one by one, as searches of many share what they read."""

EXACT = pa.schema(
    [
        pa.field("query", pa.int32(), nullable=False),
        pa.field("vector_id", pa.binary(16), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)


def write_query_vectors(store: Store, vectors: NDArray[np.float32]) -> FileRef:
    """Put query vectors (q, d) where every task can read them."""
    schema = pa.schema([pa.field("embedding", vector_array(vectors).type, nullable=False)])
    return write_table(store, "scratch/queries", schema, [pa.table([vector_array(vectors)], schema=schema)])


def encode_query_texts(
    store: Store, encoder: TextEncoder, *, texts: Sequence[str], query_ids: Sequence[str], place: str
) -> StageOutput:
    """Encode query texts into a file of `write_query_vectors`, under the role `queries`.

    Args:
        store: The root.
        encoder: Of the queries.
        texts: (q,) what is asked.
        query_ids: (q,) their names.
        place: Where they stand, for messages.

    Raises:
        DataError: The encoder fails on one, or its vector cannot be compared with others.
    """
    vectors, failed = encode_around(encoder.encode_queries, texts, dims=encoder.identity.dims)
    for found in failed:
        problem = f"query {query_ids[found.row]} cannot be encoded: {found.error}"
        raise DataError(place, problem, "mend its text, or take it out")
    ref = write_query_vectors(store, vectors)
    return StageOutput(files={"queries": ref}, numbers={"queries": ref.rows})


def read_query_vectors(store: Store, ref: FileRef) -> NDArray[np.float32]:
    """Vectors (q, d) of a file of `write_query_vectors`."""
    return to_matrix(read_columns(store, ref.path)["embedding"]).astype(np.float32)


def exact_bucket(
    store: Store, source: VectorSource, bucket: int, queries: FileRef, *, depth: int
) -> StageOutput:
    """The nearest documents of each query among the vectors of one bucket.

    Args:
        store: The root.
        source: Live documents and their vectors.
        bucket: Bucket of text hashes.
        queries: File of `write_query_vectors`.
        depth: Documents per query.

    Returns:
        File `exact`: at most q * depth rows of EXACT.
    """
    return _nearest(store, queries, iterate_vectors(store, source, bucket), depth)


def exact_segment(store: Store, segment: Segment, queries: FileRef, *, depth: int) -> StageOutput:
    """The nearest documents of each query among the vectors that one segment of an index holds, as float16.

    Args:
        store: The root.
        segment: The segment.
        queries: File of `write_query_vectors`, in the space of the segment.
        depth: Documents per query.

    Returns:
        File `exact`, as `exact_bucket`.
    """
    return _nearest(store, queries, _stored_vectors(store, segment), depth)


def _stored_vectors(store: Store, segment: Segment) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    """Rows without a tombstone, a row group at a time."""
    live = live_rows(store, segment)
    columns, first = ["vector_id", "doc_id", "embedding"], 0
    with open_parquet(store, segment.vectors.path) as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=columns, use_threads=False)
            kept = rows.filter(pa.array(live[first : first + rows.num_rows]))
            first += rows.num_rows
            if kept.num_rows:
                yield kept, to_matrix(kept["embedding"]).astype(np.float32)


def _nearest(
    store: Store,
    queries: FileRef,
    slices: Iterable[tuple[pa.Table, NDArray[np.float32]]],
    depth: int,
) -> StageOutput:
    """Of each query, among rows with vector_id and doc_id that come with their vectors."""
    wanted = read_query_vectors(store, queries)
    blocks = [slice(start, start + QUERY_BLOCK) for start in range(0, len(wanted), QUERY_BLOCK)]
    best = [RunningBest(len(wanted[block]), depth) for block in blocks]
    names: list[pa.Table] = []
    seen = 0
    for rows, vectors in slices:
        names.append(rows.select(["vector_id", "doc_id"]))
        for block, found in zip(blocks, best, strict=True):
            found.add(np.arange(seen, seen + len(vectors)), wanted[block] @ vectors.T, _ids(rows))
        seen += len(vectors)
    candidates = [one for found in best for one in found.candidates()]
    table = _found(pa.concat_tables(names), candidates) if names else EXACT.empty_table()
    ref = write_table(store, "scratch/exact", EXACT, [table])
    return StageOutput(files={"exact": ref}, numbers={"rows": ref.rows})


def _ids(rows: pa.Table) -> NDArray[np.uint8]:
    return hash_keys(rows["vector_id"]).view(np.uint8).reshape(-1, 16)


def _found(names: pa.Table, best: Sequence[Candidates]) -> pa.Table:
    """Rows of EXACT: the candidates of each query, by name."""
    rows = names.take(pa.array(np.concatenate([b.places for b in best])))
    queries = np.repeat(np.arange(len(best), dtype=np.int32), [len(b.places) for b in best])
    scores = np.concatenate([b.scores for b in best])
    columns = [pa.array(queries), rows["vector_id"], rows["doc_id"], pa.array(scores)]
    return pa.table(columns, schema=EXACT)


@dataclass(frozen=True)
class ExactNeighbours:
    """Exact ranking of one query."""

    doc_ids: tuple[str, ...]
    vector_ids: tuple[bytes, ...]
    """The nearest vector of each."""
    scores: tuple[float, ...]
    """Its inner product with the query."""

    def with_scores(self, scores: Sequence[float]) -> "ExactNeighbours":
        """The same documents with other scores that fall as these do."""
        return replace(self, scores=tuple(scores))


def merge_exact(
    store: Store, files: Iterable[FileRef], num_queries: int, *, depth: int
) -> list[ExactNeighbours]:
    """Merge the buckets' neighbours, one file after the other."""
    best = EXACT.empty_table()
    for ref in files:
        both = pa.concat_tables([best, read_columns(store, ref.path)]).sort_by("query")
        edges = np.searchsorted(both["query"].to_numpy(), np.arange(num_queries + 1))
        ids, scores = _ids(both), both["score"].to_numpy()
        spans = itertools.pairwise(edges)
        kept = [start + best_documents(ids[start:stop], scores[start:stop], depth) for start, stop in spans]
        best = both.take(pa.array(np.concatenate(kept)))
    edges = np.searchsorted(best["query"].to_numpy(), np.arange(num_queries + 1))
    names = [best[name].to_pylist() for name in ("doc_id", "vector_id", "score")]
    return [
        ExactNeighbours(*(tuple(column[start:stop]) for column in names))
        for start, stop in itertools.pairwise(edges)
    ]


def measure_search(
    reader: IndexReader, queries: NDArray[np.float32], *, k: int
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Rankings of an index as its users get them, and its costs per query.

    Args:
        reader: The index.
        queries: (q, d) unit vectors.
        k: Documents per query: what users ask for, as a deeper search re-ranks more than they get.

    Returns:
        Scores of each query's documents, best first; costs: p50_ms and p95_ms differ from run to run, the others do not.
    """
    # For k + 1 documents, one of which is the query itself, a reader would score more again than its users get.
    depth = reader.manifest.search.rerank
    rankings = _scores(reader.search(queries, k=k, rerank=depth).hits, depth)
    reader.search(queries[:1], k=k, rerank=depth)
    seconds, costs = [], []
    for query in queries[:LATENCY_QUERIES]:
        start = time.perf_counter()
        costs.append(reader.search(query, k=k, rerank=depth).stats)
        seconds.append(time.perf_counter() - start)
    rows = sum(partition.rows for partition in reader.manifest.partitions)
    return rankings, {
        "bytes_per_query": mean([float(c.bytes_read) for c in costs]),
        "requests_per_query": mean([float(c.requests) for c in costs]),
        "lists_per_query": mean([float(c.lists_probed) for c in costs]),
        "scanned_fraction": mean([c.rows_scanned / rows for c in costs]),
        "rounds": float(max(c.rounds for c in costs)),
        "p50_ms": 1000 * percentile(seconds, 0.5),
        "p95_ms": 1000 * percentile(seconds, 0.95),
    }


def measure_setting(
    reader: IndexReader, queries: NDArray[np.float32], *, k: int, probing: Probing, rerank: int
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Rankings of an index with another rule and depth than its own, and what of their cost does not differ from run to run.

    Args:
        reader: The index.
        queries: (q, d) unit vectors.
        k: Documents per query.
        probing: The rule.
        rerank: The depth.

    Returns:
        Scores of each query's documents, best first; costs: lists_per_query, scanned_fraction, and bytes_per_query of the first
        `CURVE_COST_QUERIES`.
    """
    found = reader.search(queries, k=k, probing=probing, rerank=rerank)
    alone = [
        reader.search(query, k=k, probing=probing, rerank=rerank).stats
        for query in queries[:CURVE_COST_QUERIES]
    ]
    rows = sum(partition.rows for partition in reader.manifest.partitions)
    return _scores(found.hits, rerank), {
        "lists_per_query": found.stats.lists_probed / len(queries),
        "scanned_fraction": found.stats.rows_scanned / (rows * len(queries)),
        "bytes_per_query": mean([float(stats.bytes_read) for stats in alone]),
    }


def rank(reader: IndexReader, queries: NDArray[np.float32], *, k: int) -> list[dict[str, float]]:
    """Scores of each query's documents, best first; minus infinity if they are estimates from codes."""
    return _scores(reader.search(queries, k=k).hits, reader.manifest.search.rerank)


def _scores(found: Iterable[Iterable[Hit]], rerank: int) -> list[dict[str, float]]:
    return [{hit.doc_id: hit.score if rerank else -math.inf for hit in hits} for hits in found]
