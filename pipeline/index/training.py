"""From samples of vectors: the branches, the heads of each branch, even lists, and how these are cut into segments. Pure.

Balanced k-means in two levels: one task trains the branches on a capped sample, many tasks train the heads of their
branches on the larger sample that falls to them. Rounds over all branches then move heads across the borders of
branches and even the lists out. No task sees a sample that grows with the corpus.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import clustering, postings
from pipeline.clustering import HeadTree, Membership, NearHeads, Prices
from pipeline.config import LayoutConfig, SizedLayout
from pipeline.partitioning import PartitionTree

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
    partitions: NDArray[np.int32]
    """(num_branches,) the partition of each, rising from 0 without gaps."""


@dataclass(frozen=True)
class GrownTree:
    """Heads with their prices."""

    tree: HeadTree
    prices: Prices
    partitions: NDArray[np.int32]
    """(num_branches,) the partition of each branch, rising from 0 without gaps."""

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        """(num_partitions + 1,) first branch of each partition."""
        return np.searchsorted(self.partitions, np.arange(self.partitions[-1] + 2))

    @cached_property
    def of_list(self) -> NDArray[np.int32]:
        """(num_lists,) the partition of each list, rising."""
        return np.repeat(self.partitions, np.diff(self.tree.starts))

    def near(self, vectors: NDArray[np.float32], partitions: NDArray[np.integer], count: int) -> NearHeads:
        """The nearest heads of each vector among those of its partition.

        Args:
            vectors: (n, d) float32 unit vectors.
            partitions: (n,) of each.
            count: Heads per vector, at least 1.
        """
        if self.partitions[-1] == 0:
            return clustering.near_heads(vectors, self.tree, count)
        found = NearHeads(
            np.full((len(vectors), count), -1, np.int32), np.full((len(vectors), count), np.inf, np.float32)
        )
        for number in np.unique(partitions):
            rows = np.flatnonzero(partitions == number)
            tree, first = self._of_partition(int(number))
            near = clustering.near_heads(vectors[rows], tree, count)
            found.list_no[rows] = np.where(near.list_no >= 0, near.list_no + first, -1)
            found.distance[rows] = near.distance
        return found

    def _of_partition(self, number: int) -> tuple[HeadTree, int]:
        """Heads of a partition, and the number of the first."""
        tree, (low, high) = self.tree, self._edges[number : number + 2].tolist()
        first, stop = tree.starts[[low, high]].tolist()
        starts = tree.starts[low : high + 1] - first
        return HeadTree(
            tree.heads[first:stop], tree.branches[low:high], starts, tree.norms[first:stop]
        ), first


@dataclass(frozen=True)
class Layout:
    """What every task needs to put vectors into lists; one copy of it serves all tasks of a node."""

    grown: GrownTree
    segments: NDArray[np.int32]
    """(num_lists,) segment that holds each list, not falling, from 0 without gaps; none has lists of two partitions."""
    partition_tree: PartitionTree
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

    @property
    def first_segments(self) -> NDArray[np.int64]:
        """(num_partitions + 1,) first segment of each partition, and how many there are in all."""
        edges = np.searchsorted(self.grown.of_list, np.arange(self.partition_tree.num_partitions))
        return np.append(self.segments[edges], self.segments[-1] + 1).astype(np.int64)


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
    partitions: NDArray[np.integer],
    *,
    num_partitions: int,
    num_vectors: int,
    layout: SizedLayout,
    seed: int,
) -> Trunk:
    """Train the branches of each partition.

    Args:
        sample: (n, d) float32 unit vectors, a uniform sample of the corpus.
        partitions: (n,) of each.
        num_partitions: In all.
        num_vectors: Vectors of the corpus.
        layout: Sizes of lists.
        seed: Of every random choice.
    """
    grown = [
        _branches_of(sample[partitions == number], sample, num_vectors=num_vectors, layout=layout, seed=seed)
        for number in range(num_partitions)
    ]
    sizes = np.concatenate([one.sizes for one in grown])
    expected = sizes.astype(np.float64) * (grown_rows(num_vectors, layout) / len(sample))
    return Trunk(
        branches=np.concatenate([one.branches for one in grown]),
        lists=np.concatenate([one.lists for one in grown]),
        groups=postings.segments_of_lists(expected, rows_per_group(layout)),
        partitions=np.repeat(np.arange(num_partitions, dtype=np.int32), [len(one.sizes) for one in grown]),
    )


class _Branches(NamedTuple):
    """Of one partition."""

    branches: NDArray[np.float32]
    sizes: NDArray[np.int64]
    """(branches,) rows of the sample in each."""
    lists: NDArray[np.int32]
    """(branches,) posting lists to make in each."""


def _branches_of(
    own: NDArray[np.float32], sample: NDArray[np.float32], *, num_vectors: int, layout: SizedLayout, seed: int
) -> _Branches:
    """Branches of the partition whose rows of the sample are these; where there are none, one in the middle of all."""
    if not len(own):
        return _Branches(sample.mean(axis=0, keepdims=True), np.zeros(1, np.int64), np.ones(1, np.int32))
    num_lists = postings.list_count(round(num_vectors * len(own) / len(sample)), layout.rows_per_list)
    branches = clustering.train_centroids(own, num_lists=branch_count(num_lists, len(own)), seed=seed)
    branches = branches[clustering.order_depth_first(branches)]
    sizes = np.bincount(clustering.assign(own, branches)[0], minlength=len(branches))
    return _Branches(branches, sizes, _shared_out(num_lists, sizes))


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


def sort_into_lists(
    sample: NDArray[np.float32], partitions: NDArray[np.integer], grown: GrownTree
) -> Membership:
    """What the lists hold of a sample, each vector in that of the least squared distance plus price.

    Args:
        sample: (n, d) float32 unit vectors.
        partitions: (n,) of each.
        grown: Heads and prices.
    """
    near = grown.near(sample, partitions, SORTED_AMONG)
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
    return replace(grown, tree=HeadTree.of(heads, tree.branches, tree.starts), prices=prices)


def real_heads(sample: NDArray[np.float32], heads: NDArray[np.float32]) -> NDArray[np.float32]:
    """(k, d) the vector of the sample that is nearest to each head; the head itself where there is no sample."""
    if not len(sample):
        return heads
    return sample[clustering.assign(heads, sample)[0]]
