"""Recall, nDCG and overlap: pure functions on rankings, used by every part that must judge.

A ranking is a list of doc_ids, or their scores, best first, without repeats. What is judged on, and how exact neighbours are
found, is in `pipeline.evaluation`.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ROUNDING",
    "Interval",
    "least_near",
    "mean",
    "ndcg_at_k",
    "overlap_at_k",
    "paired_interval",
    "percentile",
    "recall_at_k",
    "share_interval",
]

D = TypeVar("D", bound=Hashable)
"""What names a document."""


ROUNDING = 1e-5
"""Of one product made in two ways."""
HALF_ROUNDING = 2**-11
"""Of inner products of unit vectors one of which is float16, at most."""


def least_near(scores: Sequence[float], k: int) -> float:
    """Score from which on a document is as near as the k-th, or as the last of fewer.

    Args:
        scores: By exact search, best first, at least one.
        k: Depth.
    """
    return scores[min(k, len(scores)) - 1] - ROUNDING


def overlap_at_k(found: Mapping[str, float], exact: Mapping[str, float], k: int) -> float:
    """Share of the found top k that is as near as the exact k-th (`k@k` recall); 1 where nothing is near.

    Of documents with equal texts any will do, whichever of them stand among the exact k: ann-benchmarks counts so, too
    (Aumüller, Bernhardsson and Faithfull, "ANN-Benchmarks", Information Systems 87, 2020, section 2.1). Only where they go on
    beyond the depth of `exact` does the score that was found decide.

    Args:
        found: Scores of the index, best first, from float16 vectors; minus infinity where there is but an estimate.
        exact: Scores by exact search, best first, deeper than k.
        k: Depth.
    """
    if not exact:
        return 1.0
    scores = list(exact.values())
    wanted, least = min(k, len(scores)), least_near(scores, k)
    beyond = least - HALF_ROUNDING if scores[-1] >= least else math.inf
    near = sum(exact[doc] >= least if doc in exact else found[doc] >= beyond for doc in list(found)[:k])
    return min(near, wanted) / wanted


def recall_at_k(found: Sequence[D], grades: Mapping[D, float], k: int) -> float:
    """Share of the relevant documents (grade above 0) among the found top k.

    Raises:
        ValueError: No document is relevant.
    """
    relevant = {doc for doc, grade in grades.items() if grade > 0}
    if not relevant:
        raise ValueError("recall needs at least one relevant document")
    return len(relevant & set(found[:k])) / len(relevant)


def ndcg_at_k(found: Sequence[D], grades: Mapping[D, float], k: int) -> float:
    """Normalized discounted cumulative gain with linear gain, as trec_eval's ndcg_cut.

    Source: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 20(4), 2002, section 2.

    Raises:
        ValueError: No document is relevant.
    """
    ideal = _gain(sorted((grade for grade in grades.values() if grade > 0), reverse=True)[:k])
    if ideal == 0:
        raise ValueError("nDCG needs at least one relevant document")
    return _gain([max(grades.get(doc, 0.0), 0.0) for doc in found[:k]]) / ideal


def _gain(grades: Sequence[float]) -> float:
    return sum(grade / math.log2(rank + 2) for rank, grade in enumerate(grades))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, summed without rounding error, so that it does not depend on the order.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("the mean of no values")
    return math.fsum(values) / len(values)


def percentile(values: Sequence[float], fraction: float) -> float:
    """Nearest-rank percentile.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("a percentile of no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(fraction * len(ordered)) - 1 if fraction > 0 else 0)]


class Interval(NamedTuple):
    """A figure with the interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float


RESAMPLES = 2000
OUTSIDE = 0.025
"""Share of the resamples on either side of the interval."""


def paired_interval(
    better: NDArray[np.float64], base: NDArray[np.float64], rng: np.random.Generator
) -> Interval:
    """Mean difference of two systems on the same queries, by bootstrap over the queries.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979; percentile intervals.

    Args:
        better: (q,) figures of one system.
        base: (q,) of the other.
        rng: Draws the resamples.

    Raises:
        ValueError: There is no query.
    """
    means = _resampled((better - base)[:, None], rng)[:, 0]
    return Interval(float((better - base).mean()), *_ends(means))


def share_interval(
    part: NDArray[np.float64],
    base: NDArray[np.float64],
    whole: NDArray[np.float64],
    rng: np.random.Generator,
) -> Interval:
    """Share of the gain from `base` to `whole` that `part` keeps: (part - base) / (whole - base), of means over the same queries.

    Args:
        part: (q,) figures of one system.
        base: (q,) of the one before.
        whole: (q,) of the one that is wanted.
        rng: Draws the resamples.

    Returns:
        The share; its ends are infinite where a resample has no gain to share, and it is nan where there is none at all.

    Raises:
        ValueError: There is no query.
    """
    gains = np.stack([part - base, whole - base], axis=1)
    means = _resampled(gains, rng)
    kept, gain = gains.mean(axis=0)
    if gain <= 0:
        return Interval(math.nan, -math.inf, math.inf)
    if (means[:, 1] <= 0).any():
        return Interval(float(kept / gain), -math.inf, math.inf)
    return Interval(float(kept / gain), *_ends(means[:, 0] / means[:, 1]))


def _resampled(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """(RESAMPLES, c) means of columns (q, c) over queries drawn with replacement.

    Raises:
        ValueError: There is no query.
    """
    if not len(values):
        raise ValueError("an interval of no queries")
    chances = np.full(len(values), 1 / len(values))
    draws = (rng.multinomial(len(values), chances) @ values for _ in range(RESAMPLES))
    return np.stack(list(draws)) / len(values)


def _ends(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [OUTSIDE, 1 - OUTSIDE])
    return float(low), float(high)
