"""In which order leaves are embedded anew: where the workload looks, weighed by what crossing the bridge loses there."""

import numpy as np
from numpy.typing import NDArray

from pipeline.upgrade.ranking import ranked

__all__ = ["LOOKED_AT", "by_priority", "hits_of", "smoothed_losses"]

LOOKED_AT = 50
"""Documents of each query across the bridge that count as hits: what the new model puts first is among them, not in front."""
PRIOR = 8
"""Texts of the mean loss that each leaf is reckoned to have beside its own: few texts of a leaf say little."""
SURPRISE = 0.01
"""Share of all looks that is reckoned to fall evenly on all documents, where the workload did not look: leaves that nobody asked
for come last, those first of which the bridge misses most."""


def hits_of(
    bridged: NDArray[np.float32], weights: NDArray[np.float64], documents: NDArray[np.float32]
) -> NDArray[np.float64]:
    """(n,) weight of the queries that look at each document across the bridge.

    Args:
        bridged: (q, d_old) queries of the workload in the old space.
        weights: (q,)
        documents: (n, d_old)
    """
    found = ranked(bridged, documents, LOOKED_AT)
    looks = np.repeat(weights, found.shape[1])
    return np.bincount(found.ravel(), looks, minlength=len(documents)).astype(np.float64)


def smoothed_losses(missed: NDArray[np.float64], judged: NDArray[np.int64]) -> NDArray[np.float64]:
    """(l,) mean distance between where the bridge takes new vectors of a leaf's texts and their old ones.

    Sources: FastFill, arXiv 2303.04766 (backfill first where the map is least certain); here measured, on texts that both
    encoders have embedded.

    Args:
        missed: (l,) sum of the distances of each leaf's texts.
        judged: (l,) how many these are.
    """
    mean = missed.sum() / max(1, judged.sum())
    losses: NDArray[np.float64] = (missed + PRIOR * mean) / (judged + PRIOR)
    return losses


def by_priority(
    hits: NDArray[np.float64], losses: NDArray[np.float64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(l,) leaves, those first that gain most for each document embedded; of equal ones the first. Without any looks, by losses.

    Args:
        hits: (l,) weight of the queries that look into each leaf, once for each document that they look at.
        losses: (l,) from `smoothed_losses`.
        sizes: (l,) documents of each, at least one.
    """
    evenly = SURPRISE * hits.sum() / sizes.sum() if hits.any() else 1.0
    priority = (hits / sizes + evenly) * losses
    order: NDArray[np.int64] = np.argsort(-priority, kind="stable")
    return order
