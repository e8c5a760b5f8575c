"""Nearest head of each vector, as a function of that vector and the heads alone."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["assign"]

SCORES_PER_BLOCK = 1 << 24
"""Bounds the memory of one block: 64 MiB of float32 scores."""
PAIRS_PER_BLOCK = 1 << 14
"""Candidates measured at once: 24 MiB of differences at 384 dimensions."""


def assign(
    vectors: NDArray[np.float32], heads: NDArray[np.float32], *, block_rows: int = 4096
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Find the nearest head of each vector by squared L2.

    A float32 matrix product changes its bits with the shape of the block and the number of threads (measured with
    OpenBLAS 0.3.31: nearly every row has some score that differs). So here the product only
    picks candidates, the heads within its worst rounding error of the best, and the sum of squared differences, which
    is taken row by row in a fixed order, decides among them. Results do not depend on which vectors come together, on
    `block_rows` or on threads.

    Args:
        vectors: (n, d) float32, finite.
        heads: (num_lists, d) float32, num_lists >= 1, finite.
        block_rows: Most vectors compared at once; fewer where the heads are many. Affects memory and speed only.

    Returns:
        list_no: (n,) int32, the nearest head, the lowest number among equals.
        distance: (n,) float32, squared L2 to it.

    Raises:
        ValueError: The widths differ, there is no head, or a value is not finite.
    """
    _check(vectors, heads)
    list_no = np.empty(len(vectors), np.int32)
    distance = np.empty(len(vectors), np.float32)
    rows = max(1, min(block_rows, SCORES_PER_BLOCK // len(heads)))
    for start in range(0, len(vectors), rows):
        block = slice(start, start + rows)
        list_no[block], distance[block] = _assign_block(vectors[block], heads)
    return list_no, distance


def _check(vectors: NDArray[np.float32], heads: NDArray[np.float32]) -> None:
    if vectors.shape[1:] != heads.shape[1:] or not heads.size:
        raise ValueError(f"expected (n, d) vectors and (k, d) heads, found {vectors.shape} and {heads.shape}")
    if not (np.isfinite(vectors).all() and np.isfinite(heads).all()):
        raise ValueError("vectors and heads must be finite")


def _assign_block(
    x: NDArray[np.float32], h: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rows, heads = np.nonzero(_candidates(x, h))
    distances = _squared_distances(x, h, rows, heads)
    # The first pair of each row after sorting: nearest, then lowest number. Every row has a candidate.
    order = np.lexsort((heads, distances, rows))
    best = order[np.searchsorted(rows, np.arange(len(x)))]
    return heads[best], distances[best]


def _candidates(x: NDArray[np.float32], h: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(n, k) true where head k may be the nearest of row n, whatever the rounding."""
    norms = (h * h).sum(axis=1)
    scores = x @ h.T
    scores *= -2
    scores += norms
    # A float32 sum of d terms errs by at most d·eps times the sum of their sizes, here at most (|x| + |h|)²: once for
    # each of two scores, once for each of two distances.
    reach = np.sqrt((x * x).sum(axis=1)) + np.sqrt(norms.max())
    slack = 4 * (h.shape[1] + 4) * np.finfo(np.float32).epsneg * reach**2
    within: NDArray[np.bool_] = scores <= (scores.min(axis=1) + slack)[:, None]
    return within


def _squared_distances(
    x: NDArray[np.float32], h: NDArray[np.float32], rows: NDArray[np.int64], heads: NDArray[np.int64]
) -> NDArray[np.float32]:
    distances = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), PAIRS_PER_BLOCK):
        pairs = slice(start, start + PAIRS_PER_BLOCK)
        difference = x[rows[pairs]] - h[heads[pairs]]
        distances[pairs] = np.square(difference, out=difference).sum(axis=1)
    return distances
