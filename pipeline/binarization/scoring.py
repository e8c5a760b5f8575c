"""Inner products of queries with codes, all pairs of a block: for lists that are read once.

Codes that stay and are searched again are `scanning`'s.
"""

from typing import Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.binarization.binarizer import Binarizer
from pipeline.binarization.codec import decode, factors, quantize

__all__ = [
    "Mode",
    "code_products",
    "expand_queries",
    "query_values",
    "rotate_queries",
    "score",
    "sign_patterns",
]

Mode = Literal["asymmetric", "symmetric"]
"""Asymmetric: the query stays float. Symmetric: a code stands for it, too."""

ROWS_PER_PRODUCT = 256
"""Values of so many codes stay in the second-level cache between decoding and product."""
MAX_TABLE_QUERIES = 12
"""Up to here tables beat decoding; measured crossing at 14 to 18 queries, of 48 and 96 bytes."""


def rotate_queries(binarizer: Binarizer, queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Queries as the codes see them: (q - mean) @ query_map.

    Args:
        binarizer: The transform of the codes.
        queries: (q, d) float32.

    Returns:
        (q, m_0) float32.
    """
    return ((queries - binarizer.mean) @ binarizer.query_map).astype(np.float32, copy=False)


def score(
    binarizer: Binarizer,
    rotated_queries: NDArray[np.float32],
    code: NDArray[np.uint8],
    factor: NDArray[np.float16],
    offset: NDArray[np.float16],
    *,
    mode: Mode = "asymmetric",
) -> NDArray[np.float32]:
    """Estimate ⟨query, vector⟩ - ⟨query, mean⟩ of each pair: factor·⟨z_q, B⟩ + offset.

    What is left out is one number per query, which ranks nothing within a binarizer and which rotated queries of
    m_0 < d dimensions no longer tell; add `(queries @ binarizer.mean)[:, None]` to compare across binarizers or to
    report inner products. Last bits depend on how many queries and codes come together.

    Source: RaBitQ, arXiv 2405.12497, with centred queries; symmetric: BEBR, arXiv 2302.08714.

    Args:
        binarizer: The transform of the codes.
        rotated_queries: (q, m_0) float32, finite, from `rotate_queries`.
        code: (n, code_bytes) uint8.
        factor: (n,) float16.
        offset: (n,) float16.
        mode: What stands for the queries.

    Returns:
        (q, n) float32.

    Raises:
        ValueError: A query is not finite, or queries or codes are not of this binarizer's size.
    """
    products = code_products(binarizer, query_values(binarizer, rotated_queries, mode), code)
    products *= factor.astype(np.float32)
    products += offset.astype(np.float32)
    return products


def query_values(
    binarizer: Binarizer, rotated_queries: NDArray[np.float32], mode: Mode
) -> NDArray[np.float32]:
    """What is multiplied with the values of codes.

    Symmetric: f·v of the value v of the query's own code, with f = |z|² / ⟨z, v⟩, or 0 where z is 0, so that products
    with it estimate those with z, and offsets mean the same. That code is greedy, where a network makes the documents', too.

    Args:
        binarizer: The transform of the codes.
        rotated_queries: (q, m_0) float32, finite.
        mode: Whether to take z as it is or its code.

    Returns:
        (q, m_0) float32.

    Raises:
        ValueError: The queries are not (q, m_0), or not finite.
    """
    z = rotated_queries
    if z.shape[1:] != (binarizer.levels[0],) or not np.isfinite(z).all():
        raise ValueError(f"expected finite (q, {binarizer.levels[0]}) rotated queries, found shape {z.shape}")
    if mode == "asymmetric":
        return z
    _, value = quantize(binarizer, z)
    return value * factors(z, value).astype(np.float32)[:, None]


def code_products(
    binarizer: Binarizer, values: NDArray[np.float32], code: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """(q, n) inner products of (q, m_0) values with the values of codes.

    Raises:
        ValueError: The codes are not of this binarizer's size.
    """
    few = 0 < len(values) <= MAX_TABLE_QUERIES
    return (_by_tables if few else _by_decoding)(binarizer, values, code)


def expand_queries(binarizer: Binarizer, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(q, m_0) → (q, 8 * code_bytes): multiplied with the signs of a code, bit by bit, as `values` with its value."""
    parts = [
        values[:, :m] * weight for m, weight in zip(binarizer.levels, binarizer.level_weights, strict=True)
    ]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def sign_patterns(bits: int) -> NDArray[np.float32]:
    """(2**bits, bits) signs that each value of 1 to 8 bits stands for, the first in its highest bit."""
    values = np.arange(2**bits, dtype=np.uint8)[:, None]
    return 2 * np.unpackbits(values, axis=1)[:, -bits:].astype(np.float32) - 1


def _by_decoding(
    binarizer: Binarizer, values: NDArray[np.float32], code: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """(q, n) products, by decoding and matrix products."""
    products = np.empty((len(values), len(code)), np.float32)
    for start in range(0, len(code), ROWS_PER_PRODUCT):
        block = slice(start, start + ROWS_PER_PRODUCT)
        products[:, block] = values @ decode(binarizer, code[block]).T
    return products


def _by_tables(
    binarizer: Binarizer, values: NDArray[np.float32], code: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """(q, n) products, by a table of 256 partial products for each byte.

    FAISS sums the tables: the bytes are a product quantizer's codes whose centroids are all signs of eight dimensions.
    Its range search over one inverted list, without a bound, returns every product in the order of the codes.
    """
    if code.shape[1:] != (binarizer.code_bytes,):
        raise ValueError(f"expected (n, {binarizer.code_bytes}) codes, found shape {code.shape}")
    bits = 8 * binarizer.code_bytes
    one_list = faiss.IndexFlatIP(bits)
    one_list.add(np.zeros((1, bits), np.float32))
    index = faiss.IndexIVFPQ(one_list, bits, 1, binarizer.code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
    index.by_residual = False
    faiss.copy_array_to_vector(np.tile(sign_patterns(8).ravel(), binarizer.code_bytes), index.pq.centroids)
    index.is_trained = True
    ids, code = np.arange(len(code)), np.ascontiguousarray(code)
    lists = faiss.ArrayInvertedLists(1, binarizer.code_bytes)
    lists.add_entries(0, len(code), faiss.swig_ptr(ids), faiss.swig_ptr(code))
    index.replace_invlists(lists)
    index.ntotal = len(code)
    _, products, _ = index.range_search(expand_queries(binarizer, values), -np.inf)
    return products.reshape(len(values), len(code))
