"""Measure what a stored binarizer loses on a corpus that has changed since it was made, and choose.

Like is held against like: the closed form that the stored one was made from against one fitted anew, by the same queries, on
which the new one was not fitted. What is learned on top costs minutes, and gains about the same on either.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.binarization.binarizer import Binarizer
from pipeline.binarization.choosing import HELD_OUT_BASE, HELD_OUT_QUERIES, can_compare, hold_out
from pipeline.binarization.fitting import fit_binarizer
from pipeline.binarization.learning import is_held_out
from pipeline.config import BinarizerConfig

__all__ = ["Drift", "may_stay", "measure_drift"]


QUERY_DEVIATION = 0.1
"""Standard deviation of what one query finds more by one of two equally good closed forms. Measured, recall@10 of package
summaries: .110 at 48 bytes, .084 at 96."""


@dataclass(frozen=True)
class Drift:
    """recall@10 by codes alone, of closed forms, for held-out queries."""

    stored: float
    fitted: float
    """Of one fitted on the sample."""
    queries: int

    @property
    def lost(self) -> float:
        """What the stored one finds less; below zero where it finds more."""
        return self.fitted - self.stored

    @property
    def error(self) -> float:
        """Standard error of `lost`."""
        return QUERY_DEVIATION / math.sqrt(self.queries)


def measure_drift(
    stored: Binarizer, sample: NDArray[np.float32], *, config: BinarizerConfig, seed: int
) -> Drift | None:
    """Hold a stored binarizer against one fitted anew.

    Of a learned one, on the sample that it was learned from, with the same seed, the drift is 0.

    Args:
        stored: Of the size that the configuration asks for.
        sample: (n, d) float32 unit vectors, a uniform sample of the corpus.
        config: Size of the codes.
        seed: Of every random choice.

    Returns:
        None where the vectors are too few to tell.
    """
    for_queries = is_held_out(sample)
    if not can_compare(for_queries):
        return None
    train = sample[~for_queries]
    (rotations,) = np.random.SeedSequence(seed).spawn(1)
    fitted = fit_binarizer(train, config=config, rng=np.random.default_rng(rotations))
    judges = hold_out(sample[for_queries][:HELD_OUT_QUERIES], train[:HELD_OUT_BASE])
    return Drift(
        stored=judges.recall(replace(stored, learned=None, network=None)),
        fitted=judges.recall(fitted),
        queries=len(judges.queries),
    )


def may_stay(drift: Drift | None, config: BinarizerConfig) -> bool:
    """Whether a stored binarizer stays.

    It does unless it loses more than it is allowed to by a standard error or more: a small corpus has few queries, and chance
    alone should not change its codes from night to night. Where nothing can tell it does not.
    """
    if drift is None or config.max_drift is None:
        return False
    return drift.lost - drift.error <= config.max_drift
