"""Closure assignment: the lists beside its own that also get a copy of a vector (SPANN, arXiv 2111.08566, section 3.2). Pure."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.clustering import NearHeads, pair_distances

__all__ = ["RNG_FACTOR", "Replicas", "replicas_of"]

RNG_FACTOR = 2.0
"""How much farther than a vector from a head, in squared L2, another head may be that takes the vector's place there.

SPANN's is 1, for heads that are vectors. Means lie nearer to each other than their members do, so that 1 copies hardly
anything. *Measured* on 97,000 summaries, 100 a list, entries scanned to hold .95 and .99 of the true ten: without
replicas 6,600 and 21,500; factor 1.5 4,700 and 14,700, 1.3 entries a vector; 2 4,080 and 13,700, 2.3; 2.5 4,300 and
13,400, 3.5.
"""


class Replicas(NamedTuple):
    """Further lists of n vectors, nearest first."""

    list_no: NDArray[np.int32]
    """(n, most); -1 behind a vector's last."""
    distance: NDArray[np.float32]
    """(n, most) squared L2 to the head; infinite behind a vector's last."""


def replicas_of(
    near: NearHeads,
    primary: NDArray[np.int32],
    heads: NDArray[np.float32],
    *,
    max_replicas: int,
    rng_factor: float = RNG_FACTOR,
) -> Replicas:
    """Choose further lists for vectors.

    Nearest first, a list is taken unless one that the vector is in already has a head so near to its head that whoever
    looks here looks there (the RNG rule): `rng_factor` times their squared distance is below that of the vector.

    Args:
        near: Candidates of n vectors.
        primary: (n,) the list that each is in for good.
        heads: (num_lists, d) float32.
        max_replicas: Copies of a vector, the primary one counted.
        rng_factor: The larger, the more copies.

    Returns:
        (n, max_replicas - 1) lists.
    """
    n, most = len(primary), max_replicas - 1
    taken = np.full((n, max_replicas), -1, np.int32)
    taken[:, 0] = primary
    distance = np.full((n, most), np.inf, np.float32)
    held = np.ones(n, np.int64)
    for list_no, apart in zip(near.list_no.T, near.distance.T, strict=True):
        rows = np.flatnonzero((list_no >= 0) & (list_no != primary) & (held <= most))
        for earlier in range(max_replicas):
            is_rival = taken[rows, earlier] >= 0
            rivals = rows[is_rival]
            between = pair_distances(heads, heads, list_no[rivals], taken[rivals, earlier])
            is_rival[is_rival] = rng_factor * between < apart[rivals]
            rows = rows[~is_rival]
        taken[rows, held[rows]] = list_no[rows]
        distance[rows, held[rows] - 1] = apart[rows]
        held[rows] += 1
    return Replicas(taken[:, 1:], distance)
