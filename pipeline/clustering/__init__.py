"""k-means for posting lists (faiss), assignment to heads, and the order of lists on storage. Pure."""

import faiss
import numpy as np
from numpy.typing import NDArray

__all__ = ["assign", "order_depth_first", "train_centroids"]

BLOCK_ROWS = 4096


def train_centroids(
    sample: NDArray[np.float32], *, num_lists: int, iterations: int = 12, seed: int
) -> NDArray[np.float32]:
    """k-means by squared L2; fewer centroids come out where there are fewer distinct points.

    Args:
        sample: (n, d) float32.
        num_lists: Centroids wanted.
        iterations: Lloyd iterations.
        seed: Of the first centroids.
    """
    distinct = np.unique(sample, axis=0)
    if num_lists >= len(distinct):
        return distinct
    parameters = faiss.ClusteringParameters()
    parameters.niter, parameters.seed = iterations, seed + 1
    parameters.min_points_per_centroid, parameters.max_points_per_centroid = 1, len(sample)
    clustering = faiss.Clustering(sample.shape[1], num_lists, parameters)
    clustering.train(np.ascontiguousarray(sample, np.float32), faiss.IndexFlatL2(sample.shape[1]))
    return faiss.vector_to_array(clustering.centroids).reshape(num_lists, -1).copy()


def assign(
    vectors: NDArray[np.float32], heads: NDArray[np.float32], *, block_rows: int = BLOCK_ROWS
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Nearest head of each vector, (n,) int32, and the squared distance to it, (n,) float32."""
    index = faiss.IndexFlatL2(heads.shape[1])
    index.add(np.ascontiguousarray(heads))
    numbers, distances = np.empty(len(vectors), np.int32), np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), block_rows):
        block = np.ascontiguousarray(vectors[start : start + block_rows], np.float32)
        found, nearest = index.search(block, 1)
        distances[start : start + block_rows], numbers[start : start + block_rows] = found[:, 0], nearest[:, 0]
    return numbers, distances


def order_depth_first(heads: NDArray[np.float32]) -> NDArray[np.int64]:
    """Permutation that puts near lists beside each other: halves along the widest direction, again and again."""
    done: list[NDArray[np.int64]] = []
    stack = [np.arange(len(heads))]
    while stack:
        rows = stack.pop()
        if len(rows) <= 2:  # noqa: PLR2004
            done.append(rows)
            continue
        centred = heads[rows].astype(np.float64) - heads[rows].mean(axis=0, dtype=np.float64)
        direction = centred[np.argmax(np.einsum("nd,nd->n", centred, centred))]
        order = rows[np.argsort(centred @ direction, kind="stable")]
        stack += [order[len(order) // 2 :], order[: len(order) // 2]]
    return np.concatenate(done)
