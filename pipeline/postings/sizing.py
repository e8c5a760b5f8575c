"""How many posting lists, and how they are cut into segments. Pure arithmetic."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["list_count", "segments_of_lists"]


def list_count(rows: int, rows_per_list: int) -> int:
    """Number of posting lists for a corpus: rows / rows_per_list, at least 1."""
    return max(1, round(rows / rows_per_list))


def segments_of_lists(expected_rows: NDArray[np.float64], segment_rows: int) -> NDArray[np.int32]:
    """Cut the lists, in order, into segments of about equal expected rows.

    Args:
        expected_rows: (num_lists,) rows that each list will hold, from a sample.
        segment_rows: Rows of a segment, about.

    Returns:
        (num_lists,) segment of each list, not falling, from 0 without gaps.
    """
    total = float(expected_rows.sum())
    num_segments = max(1, min(len(expected_rows), round(total / segment_rows)))
    middle = np.cumsum(expected_rows) - expected_rows / 2
    wanted = np.minimum((middle * num_segments / max(total, 1e-9)).astype(np.int64), num_segments - 1)
    return np.unique(wanted, return_inverse=True)[1].astype(np.int32)
