"""How many posting lists, which of them a query probes, and how they are cut into segments: pure arithmetic.

Heads are found by `pipeline.clustering`; the files are written and read by `pipeline.index`. Present form: k-means lists
without replicas, a fixed number of probes. SPANN's closure assignment and distance pruning (arXiv 2111.08566, Eq. 2
and 3) will stand behind `select_probes` and beside it.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["head_distances", "list_count", "probes_for_coverage", "segments_of_lists", "select_probes"]


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


def head_distances(queries: NDArray[np.float32], heads: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared L2 distances of queries (q, d) to heads (l, d), as (q, l); SPANN's rules are on squared distances."""
    norms = np.einsum("ld,ld->l", heads, heads)
    return np.einsum("qd,qd->q", queries, queries)[:, None] + norms[None, :] - 2.0 * (queries @ heads.T)


def select_probes(
    distances: NDArray[np.float32], passing: NDArray[np.int64], *, probes: int, min_rows: int
) -> NDArray[np.int64]:
    """Posting lists that one query probes, nearest first.

    Lists without a passing row are left out, so that a filter spends no probe on them; more lists than `probes` are
    taken where those hold fewer than `min_rows` passing rows.

    Args:
        distances: (l,) squared distances of the query to the heads.
        passing: (l,) rows of each list that pass the filter.
        probes: Lists to probe.
        min_rows: Passing rows that the probed lists must hold, if that many exist.
    """
    alive = np.flatnonzero(passing > 0)
    order = alive[np.argsort(distances[alive], kind="stable")]
    enough = int(np.searchsorted(np.cumsum(passing[order]), min_rows)) + 1
    return order[: max(probes, enough)]


def probes_for_coverage(ranks: NDArray[np.int64], target: float) -> int:
    """Fewest probes whose lists hold a share `target` of the true neighbours.

    Args:
        ranks: (n,) for each true neighbour of each tuning query, the rank of its list among the query's lists, from 0.
        target: Share in (0, 1].

    Returns:
        At least 1: also where there are no neighbours, in a corpus of one document.
    """
    if not len(ranks):
        return 1
    ordered = np.sort(ranks)
    last = min(len(ordered), int(np.ceil(target * len(ordered)))) - 1
    return int(ordered[last]) + 1
