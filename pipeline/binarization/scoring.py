"""Inner products of float queries with codes: the plain path, by decoding and one matrix product."""

import numpy as np
from numpy.typing import NDArray

from pipeline.binarization.binarizer import Binarizer
from pipeline.binarization.codec import ROWS_PER_BLOCK, decode

__all__ = ["rotate_queries", "score"]


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
) -> NDArray[np.float32]:
    """Estimate ⟨query, vector⟩ - ⟨query, mean⟩ of each pair: factor·⟨z_q, B⟩ + offset.

    What is left out is one number per query, which ranks nothing within a binarizer and which rotated queries of
    m_0 < d dimensions no longer tell; add `(queries @ binarizer.mean)[:, None]` to compare across binarizers or to
    report inner products. Last bits depend on which queries and codes come together.

    Source: RaBitQ, arXiv 2405.12497, with centred queries.

    Args:
        binarizer: The transform of the codes.
        rotated_queries: (q, m_0) float32, from `rotate_queries`.
        code: (n, code_bytes) uint8.
        factor: (n,) float16.
        offset: (n,) float16.

    Returns:
        (q, n) float32.
    """
    scores = np.empty((len(rotated_queries), len(code)), np.float32)
    for start in range(0, len(code), ROWS_PER_BLOCK):
        block = slice(start, start + ROWS_PER_BLOCK)
        products = rotated_queries @ decode(binarizer, code[block]).T
        scores[:, block] = products * factor[block].astype(np.float32) + offset[block].astype(np.float32)
    return scores
