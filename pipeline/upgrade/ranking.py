"""Exact rankings of rows by inner products: what bridges are trained and judged by."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["best_of", "ranked", "ranked_by", "scores_of"]

QUERY_BLOCK = 256
"""Bounds the memory of products with all documents."""
GATHERED_BYTES = 1 << 27
"""Of documents that queries found, gathered at once."""


def ranked(
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    k: int,
    *,
    own: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """(q, k) rows of the documents of largest inner product, best first; fewer columns where there are fewer documents.

    Args:
        queries: (q, d).
        documents: (n, d).
        k: Documents per query.
        own: (q,) row of the document that stands in as the query and is left out; -1: none. Where any query has one, at most
            n - 1 columns come.
    """
    own = np.full(len(queries), -1) if own is None else own
    return ranked_by(lambda block: queries[block] @ documents.T, len(documents), k, own=own)


def ranked_by(
    scores_of_block: Callable[[slice], NDArray[np.float32]], documents: int, k: int, *, own: NDArray[np.int64]
) -> NDArray[np.int64]:
    """As `ranked`, by other scores than inner products.

    Args:
        scores_of_block: Of some queries, (b, n) with all documents; written to.
        documents: How many there are.
        k: Documents per query.
        own: (q,) as of `ranked`.
    """
    depth = min(k, documents - bool((own >= 0).any()))
    found = np.empty((len(own), depth), np.int64)
    for block in query_blocks(len(own)):
        scores = scores_of_block(block)
        hide_own(scores, own[block])
        found[block] = best_of(scores, depth)
    return found


def query_blocks(queries: int, size: int = QUERY_BLOCK) -> list[slice]:
    """Slices of queries that are compared with all documents together."""
    return [slice(start, start + size) for start in range(0, queries, size)]


def scores_of(
    queries: NDArray[np.float32], documents: NDArray[np.float32], found: NDArray[np.int64]
) -> NDArray[np.float32]:
    """(q, k) inner products of queries (q, d) with what they found: rows (q, k) of the documents (n, d)."""
    scores = np.empty(found.shape, np.float32)
    size = max(1, GATHERED_BYTES // max(1, 4 * found.shape[1] * documents.shape[1]))
    for block in query_blocks(len(queries), size):
        scores[block] = np.einsum("qd,qkd->qk", queries[block], documents[found[block]])
    return scores


def hide_own(scores: NDArray[np.float32], own: NDArray[np.int64]) -> None:
    """Put the score of each query's own document below all others, in place."""
    asked = np.flatnonzero(own >= 0)
    scores[asked, own[asked]] = -np.inf


def best_of(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """(q, k) columns of the largest of scores (q, n), best first, of equal ones the first; all where n is less than k."""
    k = min(k, scores.shape[1])
    if k == 0:
        return np.empty((len(scores), 0), np.int64)
    least = np.partition(scores, -k, axis=1)[:, -k, None]
    above = scores > least
    ties = scores == least
    # Of those that score as much as the k-th, as many of the first as there is room for.
    room = k - above.sum(axis=1, keepdims=True)
    picked = np.nonzero(above | (ties & (np.cumsum(ties, axis=1) <= room)))[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(scores, picked, axis=1), axis=1, kind="stable")
    best: NDArray[np.int64] = np.take_along_axis(picked, order, axis=1)
    return best
