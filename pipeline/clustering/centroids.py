"""K-means centroids of a sample, by faiss."""

import faiss
import numpy as np
from numpy.typing import NDArray

__all__ = ["train_centroids"]


def train_centroids(
    sample: NDArray[np.float32], *, num_lists: int, iterations: int = 12, seed: int
) -> NDArray[np.float32]:
    """Train centroids by Lloyd's k-means under squared L2.

    Rows that repeat count once, so that boilerplate in a corpus does not use up lists. Every distinct row is used:
    faiss's own subsampling is off, since the caller has sampled. Same sample, seed, number of threads, hardware and
    faiss version: same bits.

    Args:
        sample: (n, d) float32, n >= 1, finite.
        num_lists: Centroids wanted, at least 1.
        iterations: Rounds of Lloyd's algorithm.
        seed: Of the choice of the first centroids.

    Returns:
        (num_lists, d) float32, finite. Where the sample has no more than `num_lists` distinct rows, exactly these, in
        the order of their first appearance: then there are fewer centroids than asked for.

    Raises:
        ValueError: The sample is empty or not finite, or `num_lists` is below 1.
    """
    if not sample.size or not np.isfinite(sample).all():
        raise ValueError(f"sample must be finite, with a row at least; found shape {sample.shape}")
    if num_lists < 1:
        raise ValueError(f"num_lists must be at least 1, found {num_lists}")
    distinct = _distinct_rows(sample)
    if len(distinct) <= num_lists:
        return distinct
    return _lloyd(distinct, num_lists, iterations, seed)


def _distinct_rows(x: NDArray[np.float32]) -> NDArray[np.float32]:
    # Adding zero turns -0.0 into 0.0: rows that are equal as numbers are then equal as bytes, which sort 5 times faster.
    x = np.ascontiguousarray(x + np.float32(0.0))
    keys = x.view(np.dtype((np.void, x.shape[1] * x.itemsize))).reshape(-1)
    _, first = np.unique(keys, return_index=True)
    return x[np.sort(first)]


def _lloyd(x: NDArray[np.float32], k: int, iterations: int, seed: int) -> NDArray[np.float32]:
    d = x.shape[1]
    clustering = faiss.Clustering(d, k)
    clustering.niter, clustering.seed = iterations, seed
    # Below its minimum faiss warns on stderr; above its maximum it drops rows.
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(x)
    clustering.train(x, faiss.IndexFlatL2(d))
    centroids: NDArray[np.float32] = faiss.vector_to_array(clustering.centroids).reshape(k, d)
    return centroids
