"""From samples of vectors: the branches, the heads of each branch, and how lists are cut into segments. Pure.

K-means in two levels: one task trains the branches on a capped sample, many tasks train the heads of their branches on the
larger sample that falls to them. No task sees a sample that grows with the corpus.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import clustering, postings
from pipeline.binarization import Binarizer
from pipeline.clustering import BranchedHeads
from pipeline.config import LayoutConfig

__all__ = [
    "TrainedLayout",
    "Trunk",
    "branch_count",
    "grown_rows",
    "most_pairs",
    "sample_rows",
    "train_branch",
    "train_trunk",
]

MIN_TRAIN_ROWS = 20_000
"""A covariance of d dimensions wants many times d rows."""
ROWS_PER_BRANCH = 32
"""Sample rows that a branch's centroid needs at least."""
GROUP_ROWS = 16_384
"""Sample rows of the branches that one task grows, about: bounds its memory."""


@dataclass(frozen=True)
class Trunk:
    """The first level."""

    branches: NDArray[np.float32]
    """(num_branches, d) centroids, in storage order."""
    lists: NDArray[np.int32]
    """(num_branches,) posting lists to make in each branch, at least 1."""
    groups: NDArray[np.int32]
    """(num_branches,) group of neighbouring branches that one task grows, rising from 0."""


@dataclass(frozen=True)
class TrainedLayout:
    """What every build task needs to place a vector."""

    binarizer: Binarizer
    tree: BranchedHeads
    segments: NDArray[np.int32]
    """(num_lists,) segment that holds each list."""


def sample_rows(num_vectors: int, layout: LayoutConfig) -> int:
    """Rows that the binarizer and the branches are trained on, in a corpus of `num_vectors`."""
    return min(num_vectors, layout.max_train_rows, max(grown_rows(num_vectors, layout), MIN_TRAIN_ROWS))


def most_pairs(layout: LayoutConfig) -> int:
    """Given pairs that the binarizer is learned from at most: with their queries and documents the sample grows by a quarter."""
    return layout.max_train_rows // 8


def grown_rows(num_vectors: int, layout: LayoutConfig) -> int:
    """Rows that the heads are trained on, over all branches: at most `max_train_rows` for a branch, on average."""
    lists = postings.list_count(num_vectors, layout.rows_per_list)
    branches = branch_count(lists, layout.max_train_rows)
    return min(num_vectors, lists * layout.train_rows_per_list, branches * layout.max_train_rows)


def branch_count(num_lists: int, num_rows: int) -> int:
    """Branches for a number of lists: as many as each has lists, if the sample has rows enough to train them."""
    return max(1, min(round(math.sqrt(num_lists)), num_rows // ROWS_PER_BRANCH))


def train_trunk(
    sample: NDArray[np.float32],
    *,
    num_vectors: int,
    layout: LayoutConfig,
    seed: int,
) -> Trunk:
    """Train the branches.

    Args:
        sample: (n, d) float32 unit vectors, a uniform sample of the corpus.
        num_vectors: Vectors of the corpus.
        layout: Sizes of lists.
        seed: Of every random choice.
    """
    num_lists = postings.list_count(num_vectors, layout.rows_per_list)
    wanted = branch_count(num_lists, len(sample))
    branches = clustering.train_centroids(sample, num_lists=wanted, seed=seed)
    branches = branches[clustering.order_depth_first(branches)]
    sizes = np.bincount(clustering.assign(sample, branches)[0], minlength=len(branches))
    expected = sizes.astype(np.float64) * (grown_rows(num_vectors, layout) / len(sample))
    return Trunk(branches, _shared_out(num_lists, sizes), postings.segments_of_lists(expected, GROUP_ROWS))


def _shared_out(total: int, sizes: NDArray[np.int64]) -> NDArray[np.int32]:
    """(n,) parts of a total in proportion to sizes, each at least 1: largest remainders, the first among equals."""
    exact = total * sizes / max(int(sizes.sum()), 1)
    parts = np.maximum(np.floor(exact).astype(np.int32), 1)
    spare = total - int(parts.sum())
    if spare > 0:
        parts[np.argsort(np.floor(exact) - exact, kind="stable")[:spare]] += 1
    return parts


def train_branch(
    sample: NDArray[np.float32], centroid: NDArray[np.float32], *, num_lists: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Train the heads of one branch.

    Args:
        sample: (n, d) float32 unit vectors whose nearest branch this is, in an order that does not depend on shards.
        centroid: (d,) of the branch, its only head where there is no sample.
        num_lists: Heads wanted; fewer where the sample has fewer distinct rows.
        seed: Of every random choice.

    Returns:
        (k, d) heads, depth first; (k,) sample rows of each.
    """
    if not len(sample):
        return centroid[None, :], np.zeros(1, np.int64)
    heads = clustering.train_centroids(sample, num_lists=num_lists, seed=seed)
    heads = heads[clustering.order_depth_first(heads)]
    return heads, np.bincount(clustering.assign(sample, heads)[0], minlength=len(heads))
