"""Live documents joined with their float32 vectors, bucket by bucket: what training, placing and exact search stream."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import Attribute, FileRef, arrow_schema
from pipeline.corpus.identity import bucket_of
from pipeline.embedding.cache import Cache, CachedBucket
from pipeline.index.condemned import drop_condemned
from pipeline.partitioning import UNCUT, PartitionTree
from pipeline.storage import Store
from pipeline.tables import hash_keys, read_bucket, read_columns

__all__ = [
    "SLICE_ROWS",
    "CachedVectors",
    "VectorSource",
    "cached_vectors",
    "iterate_vectors",
    "sample_by_partition",
    "sample_queries",
    "sample_vectors",
    "unknown_texts",
]

SLICE_ROWS = 8192
"""Rows placed at once. Fixed: distances can change in the last bit with the size of a product."""


@dataclass(frozen=True)
class VectorSource:
    """Live documents by bucket of text hash, and the cache that holds their vectors."""

    texts: tuple[FileRef, ...]
    cache: Cache
    attributes: tuple[Attribute, ...]
    condemned: Mapping[int, FileRef] = field(default_factory=dict)
    """By bucket, rows that have no vector because their text cannot be encoded."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the attributes."""
        return arrow_schema(self.attributes)


def iterate_vectors(
    store: Store,
    source: VectorSource,
    bucket: int,
    *,
    backwards: bool = False,
    only: pa.Array | None = None,
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    """Rows of one bucket in slices, sorted by (text_hash, vector_id), with their vectors.

    Args:
        store: The root.
        source: Live documents and their vectors.
        bucket: Bucket of text hashes.
        backwards: Last slice first; the same slices, each in the same order.
        only: doc_ids: of the slices only the rows of these documents, without attributes.

    Yields:
        (n) rows with vector_id, doc_id, text_hash and the attributes; (n, d) float32. n is at most SLICE_ROWS.
    """
    columns = ["vector_id", "doc_id", "text_hash", *(source.schema.names if only is None else [])]
    table = pa.concat_tables([read_bucket(store, ref.path, bucket, columns) for ref in source.texts])
    if bucket in source.condemned:
        table = drop_condemned(table, read_columns(store, source.condemned[bucket].path), by="text_hash")
    order = pc.sort_indices(table, sort_keys=[("text_hash", "ascending"), ("vector_id", "ascending")])
    table = table.take(order)
    cached = CachedBucket(store, source.cache, bucket)
    starts = range(0, table.num_rows, SLICE_ROWS)
    for start in reversed(starts) if backwards else starts:
        rows = table.slice(start, SLICE_ROWS)
        rows = rows if only is None else rows.filter(pc.is_in(rows["doc_id"], only))
        distinct, places = np.unique(hash_keys(rows["text_hash"]), return_inverse=True)
        yield rows, cached.read(distinct)[places]


class CachedVectors(NamedTuple):
    """What a cache has of some texts."""

    is_there: NDArray[np.bool_]
    """(n,) whether each has a vector."""
    is_condemned: NDArray[np.bool_]
    """(n,) whether it is known of each that the encoder cannot make one."""
    vectors: NDArray[np.float32]
    """(n, d), of zeros where there is none."""


def cached_vectors(store: Store, cache: Cache, hashes: NDArray[np.bytes_]) -> CachedVectors:
    """What a cache has of some texts; every bucket that one of them is in is opened.

    Args:
        store: The root.
        cache: Of an encoder.
        hashes: (n,) S16, sorted and distinct.
    """
    is_there, is_condemned = np.zeros((2, len(hashes)), np.bool_)
    vectors = np.zeros((len(hashes), cache.dims), np.float32)
    for cached, mine in _by_bucket(store, cache, hashes):
        is_condemned[mine] = np.isin(hashes[mine], hash_keys(cached.condemned["text_hash"]))
        found = mine[np.isin(hashes[mine], cached.keys)]
        is_there[found], vectors[found] = True, cached.read(hashes[found])
    return CachedVectors(is_there, is_condemned, vectors)


def unknown_texts(store: Store, cache: Cache, hashes: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """(m,) which of some texts have no vector and are not condemned; arguments as `cached_vectors`, which reads vectors, too."""
    is_known = np.zeros(len(hashes), np.bool_)
    for cached, mine in _by_bucket(store, cache, hashes):
        known = np.concatenate([cached.keys, hash_keys(cached.condemned["text_hash"])])
        is_known[mine] = np.isin(hashes[mine], known)
    return np.flatnonzero(~is_known)


def _by_bucket(
    store: Store, cache: Cache, hashes: NDArray[np.bytes_]
) -> Iterator[tuple[CachedBucket, NDArray[np.int64]]]:
    """Every bucket that some texts are in, and which of them are."""
    of_hash = bucket_of(hashes.view(np.uint8).reshape(-1, 16), cache.buckets)
    for bucket in np.unique(of_hash).tolist():
        yield CachedBucket(store, cache, bucket), np.flatnonzero(of_hash == bucket)


def sample_vectors(store: Store, source: VectorSource, rows: int) -> NDArray[np.float32]:
    """Vectors (n, d) with the smallest text hashes, in order: a uniform sample that does not depend on the shards.

    n is `rows`, or less in a smaller corpus.
    """
    return sample_by_partition(store, source, rows, UNCUT)[0]


def sample_by_partition(
    store: Store, source: VectorSource, rows: int, tree: PartitionTree
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The vectors of `sample_vectors`, and (n,) the partition of each."""
    vectors, partitions = np.empty((rows, source.cache.dims), dtype=np.float32), np.empty(rows, np.int32)
    filled = 0
    for table, found in _slices(store, source):
        n = min(len(found), rows - filled)
        vectors[filled : filled + n] = found[:n]
        partitions[filled : filled + n] = tree.assign(table.slice(0, n))
        filled += n
        if filled == rows:
            break
    return vectors[:filled], partitions[:filled]


def sample_queries(store: Store, source: VectorSource, queries: int) -> tuple[NDArray[np.float32], list[str]]:
    """Documents that stand in for queries: those with the largest text hashes, one of each text.

    Copies stand together in order of hash: with them, a sample of a corpus of mass copies would ask for a few texts alone.

    Returns:
        (n, d) vectors and doc_ids, in order of hash; n is `queries`, or less where there are fewer texts.
    """
    vectors: list[NDArray[np.float32]] = []
    names: list[list[str]] = []
    count, first_of_next = 0, b""
    for table, found in _slices(store, source, backwards=True):
        hashes = table["text_hash"].to_pylist()
        is_last = [one != after for one, after in zip(hashes, [*hashes[1:], first_of_next], strict=True)]
        kept = np.flatnonzero(is_last)[-(queries - count) :]
        vectors.append(found[kept])
        names.append(table["doc_id"].take(pa.array(kept)).to_pylist())
        count, first_of_next = count + len(kept), hashes[0]
        if count == queries:
            break
    if not vectors:
        return np.empty((0, source.cache.dims), np.float32), []
    return np.concatenate(vectors[::-1]), [name for part in names[::-1] for name in part]


def _slices(
    store: Store, source: VectorSource, *, backwards: bool = False
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    buckets = range(source.cache.buckets)
    for bucket in reversed(buckets) if backwards else buckets:
        yield from iterate_vectors(store, source, bucket, backwards=backwards)
