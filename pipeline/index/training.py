"""From samples of vectors: the branches, the heads of each branch, even lists, and how these are cut into segments. Pure.

Balanced k-means in two levels: one task trains the branches on a capped sample, many tasks train the heads of their
branches on the larger sample that falls to them. Rounds over all branches then move heads across the borders of
branches and even the lists out. No task sees a sample that grows with the corpus.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import clustering, postings
from pipeline.clustering import HeadTree, Membership, Prices
from pipeline.config import LayoutConfig, SizedLayout

__all__ = [
    "ROUNDS",
    "GrownTree",
    "Layout",
    "Trunk",
    "after_round",
    "branch_count",
    "grown_rows",
    "most_pairs",
    "real_heads",
    "rows_per_group",
    "sample_rows",
    "sort_into_lists",
    "train_branch",
    "train_trunk",
]

MIN_TRAIN_ROWS = 20_000
"""A covariance of d dimensions wants many times d rows."""
ROWS_PER_BRANCH = 32
"""Sample rows that a branch's centroid needs at least."""
ROUNDS = 8
"""Over all branches. *Measured* on 97,000 summaries, 100 a list, two copies of a vector: entries scanned to hold .95 and .99
of the true ten after 0, 2, 4 and 8 rounds: 5,800 and 18,200, 4,300 and 13,800, 4,100 and 13,700, 3,800 and 13,200."""
SORTED_AMONG = 8
"""Nearest heads among which a vector finds a cheaper list than the nearest: prices are of the size of the gaps between these."""


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
class GrownTree:
    """Heads with their prices."""

    tree: HeadTree
    prices: Prices


@dataclass(frozen=True)
class Layout:
    """What every task needs to put vectors into lists; one copy of it serves all tasks of a node."""

    grown: GrownTree
    segments: NDArray[np.int32]
    """(num_lists,) segment that holds each list, not falling, from 0 without gaps."""
    rows_per_list: int
    """Primaries that a list should have."""
    max_replicas: int
    """Lists of a vector, the primary one counted."""
    real_heads: bool
    """Whether heads are vectors of the corpus instead of means."""
    seed: int
    """Of every random choice."""

    @property
    def heads(self) -> NDArray[np.float32]:
        """(num_lists, d)."""
        return self.grown.tree.heads


def sample_rows(num_vectors: int, layout: SizedLayout) -> int:
    """Rows that the binarizer and the branches are trained on, in a corpus of `num_vectors`."""
    return min(num_vectors, layout.max_train_rows, max(grown_rows(num_vectors, layout), MIN_TRAIN_ROWS))


def most_pairs(layout: LayoutConfig) -> int:
    """Given pairs that the binarizer is learned from at most: with their queries and documents the sample grows by a quarter."""
    return layout.max_train_rows // 8


def grown_rows(num_vectors: int, layout: SizedLayout) -> int:
    """Rows that the heads are trained on, over all branches: at most `max_train_rows` for a branch, on average."""
    lists = postings.list_count(num_vectors, layout.rows_per_list)
    branches = branch_count(lists, layout.max_train_rows)
    return min(num_vectors, lists * layout.train_rows_per_list, branches * layout.max_train_rows)


def rows_per_group(layout: LayoutConfig) -> int:
    """Sample rows of the branches that one task grows, about: bounds its memory."""
    return layout.max_train_rows // 2


def branch_count(num_lists: int, num_rows: int) -> int:
    """Branches for a number of lists: as many as each has lists, if the sample has rows enough to train them."""
    return max(1, min(round(math.sqrt(num_lists)), num_rows // ROWS_PER_BRANCH))


def train_trunk(
    sample: NDArray[np.float32],
    *,
    num_vectors: int,
    layout: SizedLayout,
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
    groups = postings.segments_of_lists(expected, rows_per_group(layout))
    return Trunk(branches, _shared_out(num_lists, sizes), groups)


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
) -> NDArray[np.float32]:
    """Train the heads of one branch.

    Args:
        sample: (n, d) float32 unit vectors whose nearest branch this is, in an order that does not depend on shards.
        centroid: (d,) of the branch, its only head where there is no sample.
        num_lists: Heads wanted; fewer where the sample has fewer distinct rows.
        seed: Of every random choice.

    Returns:
        (k, d) heads, depth first.
    """
    if not len(sample):
        return centroid[None, :]
    heads = clustering.train_centroids(sample, num_lists=num_lists, seed=seed)
    return heads[clustering.order_depth_first(heads)]


def sort_into_lists(sample: NDArray[np.float32], grown: GrownTree) -> Membership:
    """What the lists hold of a sample, each vector in that of the least squared distance plus price.

    Args:
        sample: (n, d) float32 unit vectors.
        grown: Heads and prices.
    """
    near = clustering.near_heads(sample, grown.tree, SORTED_AMONG)
    list_no = clustering.charged_lists(near, grown.prices.now)
    return Membership.of(sample, near, list_no)


def after_round(grown: GrownTree, members: Membership, *, mean_rows: float) -> GrownTree:
    """Heads and prices after a round in which the lists held these members.

    Args:
        grown: Before it.
        members: Of the whole sample.
        mean_rows: Rows of it that a list should hold.
    """
    tree = grown.tree
    members = members.over(0, len(tree.heads))
    heads = clustering.recentred(tree.heads, members)
    prices = clustering.repriced(grown.prices, members, mean_rows=mean_rows)
    return GrownTree(HeadTree.of(heads, tree.branches, tree.starts), prices)


def real_heads(sample: NDArray[np.float32], heads: NDArray[np.float32]) -> NDArray[np.float32]:
    """(k, d) the vector of the sample that is nearest to each head; the head itself where there is no sample."""
    if not len(sample):
        return heads
    return sample[clustering.assign(heads, sample)[0]]
