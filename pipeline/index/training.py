"""From a sample of vectors: the binarizer, the heads, and how the lists are cut into segments. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import clustering, postings
from pipeline.binarization import Binarizer, fit_binarizer
from pipeline.config import BinarizerConfig, LayoutConfig

__all__ = ["TrainedLayout", "sample_rows", "train_layout"]


@dataclass(frozen=True)
class TrainedLayout:
    """What every build task needs to place a vector."""

    binarizer: Binarizer
    heads: NDArray[np.float32]
    """(num_lists, d), in storage order."""
    segments: NDArray[np.int32]
    """(num_lists,) segment that holds each list."""


def sample_rows(num_vectors: int, layout: LayoutConfig) -> int:
    """Rows to train on, for a corpus of `num_vectors`."""
    lists = postings.list_count(num_vectors, layout.rows_per_list)
    wanted = max(lists * layout.train_rows_per_list, MIN_TRAIN_ROWS)
    return min(num_vectors, layout.max_train_rows, wanted)


MIN_TRAIN_ROWS = 20_000
"""A covariance of d dimensions wants many times d rows."""


def train_layout(
    sample: NDArray[np.float32],
    *,
    num_vectors: int,
    layout: LayoutConfig,
    binarizer: BinarizerConfig,
    seed: int,
) -> TrainedLayout:
    """Fit the binarizer and the heads.

    Args:
        sample: (n, d) float32 unit vectors, a uniform sample of the corpus.
        num_vectors: Vectors of the corpus.
        layout: Sizes of lists and segments.
        binarizer: Size of the codes.
        seed: Of every random choice.
    """
    rng = np.random.default_rng(seed)
    fitted = fit_binarizer(sample, config=binarizer, rng=rng)
    num_lists = postings.list_count(num_vectors, layout.rows_per_list)
    heads = clustering.train_centroids(sample, num_lists=num_lists, seed=seed)
    heads = heads[clustering.order_depth_first(heads)]
    counts = np.bincount(clustering.assign(sample, heads)[0], minlength=len(heads))
    expected = counts.astype(np.float64) * (num_vectors / len(sample))
    return TrainedLayout(fitted, heads, postings.segments_of_lists(expected, layout.segment_rows))
