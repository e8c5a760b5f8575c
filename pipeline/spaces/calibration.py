"""Scores across a bridge beside scores within a space: monotone maps, so that hits of both can be merged.

Raw scores do not compare: of two spaces one has the larger ones, and its documents take the first places. Nor do their expected
values, which shrink the side that is known less well. And some queries are near to much, others to little, of which a weak old
model tells nothing: what one query scores is held against what it scores with a few documents that are known in both spaces.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Calibration", "Cohort", "Gauge", "calibrate"]

FEWEST = 50
"""Documents of a cohort: fewer say less of a query than they leave to chance."""
NEAREST_SHARE = 0.01
FEWEST_NEAREST = 10
LEAST_WIDTH = 1e-6
QUERY_BLOCK = 256
"""Queries that are compared with a cohort together."""
LAST_RANKS = 10
"""Ranks that say how scores go on above the first one: an index holds more documents than the curve was learned from, and
nearer ones. *Measured*, learned from 800 of 29,000 texts, half of these migrated, share of the new ones in the first ten (.496
and .498 are due): GloVe to MiniLM by all hundred ranks .514, by ten .494; MiniLM to mpnet .510 and .502."""

Rows = slice | int | NDArray[np.int64]
"""Of some queries."""


class Levels(NamedTuple):
    """Where scores of each of some queries lie in one space."""

    high: NDArray[np.float32]
    """(q,) mean score of the cohort's nearest."""
    width: NDArray[np.float32]
    """(q,) from the mean score of the whole cohort to that one."""

    @classmethod
    def of(cls, queries: NDArray[np.float32], cohort: NDArray[np.float32]) -> "Levels":
        """Of queries (q, d) by documents (c, d)."""
        count = max(FEWEST_NEAREST, round(NEAREST_SHARE * len(cohort)))
        high, width = np.empty((2, len(queries)), np.float32)
        for start in range(0, len(queries), QUERY_BLOCK):
            some = slice(start, start + QUERY_BLOCK)
            scores = queries[some] @ cohort.T
            high[some] = np.partition(scores, -count, axis=1)[:, -count:].mean(axis=1)
            width[some] = np.maximum(high[some] - scores.mean(axis=1), np.float32(LEAST_WIDTH))
        return cls(high, width)

    def some(self, rows: Rows, scores: NDArray[np.float32]) -> "Levels":
        """Of some queries, to be combined with scores, in whose last axis the documents are."""
        found = (np.asarray(one[rows]) for one in self)
        return Levels(*(one[..., None] if scores.ndim > one.ndim else one for one in found))


@dataclass(frozen=True, eq=False)
class Cohort:
    """Documents that are known in both spaces, row by row.

    Source: normalization by a cohort of other speakers, Auckenthaler, Carey and Lloyd-Thomas, "Score normalization for
    text-independent speaker verification systems", 2000.
    """

    new: NDArray[np.float32]
    """(c, d_new) unit vectors."""
    old: NDArray[np.float32]
    """(c, d_old)"""


class _Curve(NamedTuple):
    bridged: NDArray[np.float32]
    native: NDArray[np.float32]

    def of(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Linear between the ranks, and on."""
        bridged, native = self
        inside = np.clip(scores, bridged[0], bridged[-1])
        slope = np.where(scores > inside, self._slope(-LAST_RANKS), self._slope(0))
        mapped: NDArray[np.float32] = np.interp(inside, bridged, native) + slope * (scores - inside)
        return mapped

    def _slope(self, start: int) -> float:
        """From a rank to the best one."""
        width, height = (float(scores[-1] - scores[start:][0]) for scores in self)
        return height / width if width > 0 else 1.0


class Gauge(NamedTuple):
    """A calibration, and what its cohort says of some queries."""

    curve: _Curve
    levels: tuple[Levels, Levels] | None
    """Across the bridge and within the new space; None where there is no cohort."""

    def of(self, scores: NDArray[np.float32], rows: Rows) -> NDArray[np.float32]:
        """Scores across the bridge, as the new space would score that rank.

        Args:
            scores: (n,) of one query or of one each, or (q, n).
            rows: Which queries these are, of those that it was made for.
        """
        if self.levels is None:
            return self.curve.of(scores).astype(np.float32)
        crossed, native = (one.some(rows, scores) for one in self.levels)
        mapped = self.curve.of((scores - crossed.high) / crossed.width)
        calibrated: NDArray[np.float32] = (native.high + native.width * mapped).astype(np.float32)
        return calibrated


@dataclass(frozen=True, eq=False)
class Calibration:
    """What documents of one rank score across the bridge and within the new space, on the mean of queries.

    Scores are held against what a query scores with the cohort: 0 is the mean of its nearest, -1 that of all.

    Raises:
        ValueError: There is no rank, the arrays are not of one length, or one of them falls.
    """

    bridged: NDArray[np.float32]
    """(r,) rising."""
    native: NDArray[np.float32]
    """(r,) rising: of the same ranks."""
    cohort: Cohort | None = None
    """None: scores are taken as they are."""

    def __post_init__(self) -> None:
        ranks = len(self.bridged), len(self.native)
        falls = any((np.diff(scores) < 0).any() for scores in (self.bridged, self.native))
        if ranks[0] != ranks[1] or not ranks[0] or falls:
            raise ValueError(f"expected rising scores of the same ranks, found {ranks[0]} and {ranks[1]}")

    def gauge(self, queries: NDArray[np.float32], crossed: NDArray[np.float32]) -> Gauge:
        """What calibrates the scores of some queries.

        Args:
            queries: (q, d_new) unit vectors.
            crossed: (q, d_old) the same across the bridge.
        """
        return Gauge(_Curve(self.bridged, self.native), _levels(self.cohort, queries, crossed))


def _levels(
    cohort: Cohort | None, queries: NDArray[np.float32], crossed: NDArray[np.float32]
) -> tuple[Levels, Levels] | None:
    if cohort is None:
        return None
    return Levels.of(crossed, cohort.old), Levels.of(queries, cohort.new)


def calibrate(
    bridged: NDArray[np.float32],
    native: NDArray[np.float32],
    *,
    queries: NDArray[np.float32],
    crossed: NDArray[np.float32],
    cohort: Cohort,
) -> Calibration:
    """Learn from what queries found, rank by rank.

    Args:
        bridged: (q, r) scores across the bridge, best first.
        native: (q, r) scores of the same queries within the new space, best first.
        queries: (q, d_new) unit vectors.
        crossed: (q, d_old) the same across the bridge.
        cohort: Other documents than the queries; left out where they are too few.
    """
    used = cohort if len(cohort.new) >= FEWEST else None
    levels = _levels(used, queries, crossed)
    if levels is not None:
        bridged, native = (
            (scores - one.high[:, None]) / one.width[:, None]
            for scores, one in zip((bridged, native), levels, strict=True)
        )
    means = (scores.mean(axis=0, dtype=np.float64)[::-1] for scores in (bridged, native))
    across, within = (np.maximum.accumulate(scores).astype(np.float32) for scores in means)
    return Calibration(across, within, used)
