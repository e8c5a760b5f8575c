"""The same texts by two encoders that have nothing of their axes in common."""

import numpy as np

from pipeline.spaces.bridges import normalized
from pipeline.upgrade.exam import Pairs
from tests.unit.binarization.test_learning import clustered

OLD_DIMS, NEW_DIMS = 32, 48


def two_encoders(n, seed=3):
    """(n, 32) by an old encoder, and (n, 48) by a new one that sees more and turns and moves it all."""
    rng = np.random.default_rng(seed)
    old, more = clustered(n), 0.5 * clustered(n, NEW_DIMS - OLD_DIMS, seed=8)
    turn = np.linalg.qr(rng.standard_normal((NEW_DIMS, NEW_DIMS)))[0]
    return old, normalized(np.hstack([old, more]) @ turn + 0.05 * rng.standard_normal(NEW_DIMS))


def pairs_of(old, new, rows):
    return Pairs(new[rows], old[rows])
