"""Names made from content: vector ids, text hashes, and the buckets that they fall into."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = [
    "DOC_HASH_BYTES",
    "bucket_of",
    "embedding_hashes",
    "hash_array",
    "hash_matrix",
    "sort_keys",
    "text_hashes",
    "vector_ids",
]

HASH_BYTES = 16
"""Width of a vector id and of a text hash."""
DOC_HASH_BYTES = 12
"""Bytes of a vector id that name the document; the other four are the chunk number."""


def vector_ids(doc_ids: Sequence[str] | pa.Array, chunk_no: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Names of chunks: 12 bytes BLAKE2b of the doc_id in UTF-8, then the chunk number, big endian.

    Args:
        doc_ids: (n,) document of each chunk.
        chunk_no: (n,) chunk number inside the document, from 0.

    Returns:
        (n, 16) bytes; chunks of one document sort together and in order.
    """
    ids = np.empty((len(chunk_no), HASH_BYTES), dtype=np.uint8)
    ids[:, :DOC_HASH_BYTES] = _digests(_encoded(doc_ids), DOC_HASH_BYTES)
    ids[:, DOC_HASH_BYTES:] = chunk_no.astype(">u4").view(np.uint8).reshape(-1, 4)
    return ids


def text_hashes(texts: Sequence[str] | pa.Array) -> NDArray[np.uint8]:
    """(n, 16) bytes, BLAKE2b of each text in UTF-8."""
    return _digests(_encoded(texts), HASH_BYTES)


def embedding_hashes(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Stand-ins for text hashes where vectors are ready-made.

    Args:
        vectors: (n, d) unit vectors.

    Returns:
        (n, 16) bytes, BLAKE2b of each vector as little-endian float32.
    """
    rows = np.ascontiguousarray(vectors, dtype="<f4").view(np.uint8)
    return _digests((row.data for row in rows), HASH_BYTES)


def bucket_of(hashes: NDArray[np.uint8], num_buckets: int) -> NDArray[np.int32]:
    """Bucket of each hash by its prefix: sorted buckets, one after the other, are sorted as a whole.

    Args:
        hashes: (n, at least 4) bytes.
        num_buckets: From 1 to 2**31 - 1.

    Returns:
        (n,) bucket numbers below `num_buckets`.
    """
    prefix = np.ascontiguousarray(hashes[:, :4]).view(">u4").reshape(-1).astype(np.uint64)
    return ((prefix * np.uint64(num_buckets)) >> np.uint64(32)).astype(np.int32)


def hash_array(matrix: NDArray[np.uint8]) -> pa.Array:
    """A (n, 16) byte matrix as a fixed-size binary column."""
    data = pa.py_buffer(np.ascontiguousarray(matrix))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(HASH_BYTES), len(matrix), [None, data])


def hash_matrix(column: pa.Array | pa.ChunkedArray) -> NDArray[np.uint8]:
    """A 16-byte binary column without nulls as a (n, 16) byte matrix."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [
        np.frombuffer(c.buffers()[1], np.uint8, len(c) * HASH_BYTES, c.offset * HASH_BYTES)
        for c in chunks
        if len(c)
    ]
    return np.concatenate([np.zeros(0, np.uint8), *parts]).reshape(-1, HASH_BYTES)


def sort_keys(matrix: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """(n, w) byte rows as (n,) strings that numpy sorts and searches in byte order."""
    width = matrix.shape[1]
    return np.ascontiguousarray(matrix).view(f"S{width}").reshape(-1)


def _encoded(texts: Sequence[str] | pa.Array) -> list[bytes]:
    array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
    return array.cast(pa.binary()).to_pylist()


def _digests(values: Iterable[bytes | memoryview], width: int) -> NDArray[np.uint8]:
    blake2b = hashlib.blake2b
    joined = b"".join([blake2b(value, digest_size=width).digest() for value in values])
    return np.frombuffer(joined, np.uint8).reshape(-1, width)
