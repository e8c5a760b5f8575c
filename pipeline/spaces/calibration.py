"""Scores across a bridge beside scores within a space: one monotone map, so that hits of both can be merged.

Raw scores do not compare: of two spaces one has the larger ones, and its documents take the first places. Nor do their expected
values, which shrink the side that is known less well.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What documents of one rank score across the bridge and within the new space, on the mean of queries.

    Raises:
        ValueError: There is no rank, the arrays are not of one length, or one of them falls.
    """

    bridged: NDArray[np.float32]
    """(r,) rising."""
    native: NDArray[np.float32]
    """(r,) rising: of the same ranks."""

    def __post_init__(self) -> None:
        ranks = len(self.bridged), len(self.native)
        falls = any((np.diff(scores) < 0).any() for scores in (self.bridged, self.native))
        if ranks[0] != ranks[1] or not ranks[0] or falls:
            raise ValueError(f"expected rising scores of the same ranks, found {ranks[0]} and {ranks[1]}")

    def of(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores of any shape across the bridge, as the new space would score that rank: linear between the ranks, and on."""
        width = self.bridged[-1] - self.bridged[0]
        slope = (self.native[-1] - self.native[0]) / width if width > 0 else np.float32(1)
        inside = np.clip(scores, self.bridged[0], self.bridged[-1])
        mapped = np.interp(inside, self.bridged, self.native) + slope * (scores - inside)
        calibrated: NDArray[np.float32] = mapped.astype(np.float32)
        return calibrated


def calibrate(bridged: NDArray[np.float32], native: NDArray[np.float32]) -> Calibration:
    """Learn from what queries found, rank by rank.

    Args:
        bridged: (q, r) scores across the bridge, best first.
        native: (q, r) scores of the same queries within the new space, best first.
    """
    means = (scores.mean(axis=0, dtype=np.float64)[::-1] for scores in (bridged, native))
    rising = (np.maximum.accumulate(scores).astype(np.float32) for scores in means)
    return Calibration(*rising)
