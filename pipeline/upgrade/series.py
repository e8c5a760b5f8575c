"""Several upgrades in a row: every query model against every index version, and the literature's scores of that matrix."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Compatibility", "compatibility"]


@dataclass(frozen=True)
class Compatibility:
    """How well newer models get on with older indexes."""

    average_compatibility: float
    """AC: share of the pairs of a newer query model and an older index that beat the older model on its own index."""
    average_multimodel: float
    """AM: mean over every query model and every index that is not newer."""
    update_gain: float
    """Of the newest model on the oldest index: share of what a full backfill gains over the oldest model; nan if that gains
    nothing."""


def compatibility(matrix: NDArray[np.float64]) -> Compatibility:
    """Scores of a matrix of figures, the larger the better.

    Sources: AC and AM, CoReS, arXiv 2111.07632, section 4; update gain, BCT, arXiv 2003.11942, section 3.3.

    Args:
        matrix: (t, t) row: model of the queries, column: version of the index, oldest first.

    Raises:
        ValueError: The matrix is not square, or of fewer than two models.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:  # noqa: PLR2004
        raise ValueError(f"expected a square matrix of two or more models, found {matrix.shape}")
    own = np.diag(matrix)
    newer, older = np.tril_indices(len(matrix), -1)
    gain = own[-1] - own[0]
    return Compatibility(
        average_compatibility=float((matrix[newer, older] > own[older]).mean()),
        average_multimodel=float(matrix[np.tril_indices(len(matrix))].mean()),
        update_gain=float((matrix[-1, 0] - own[0]) / gain) if gain > 0 else float("nan"),
    )
