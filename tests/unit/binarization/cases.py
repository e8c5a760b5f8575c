"""Binarizers and codes of every shape, and the plain computation that every kernel is held against."""

import numpy as np
from hypothesis import strategies as st

from pipeline.binarization import Binarizer, Codes, decode
from pipeline.binarization.binarizer import blocks_of


def binarizer_of(levels: tuple[int, ...], seed: int) -> Binarizer:
    """A binarizer with falling random weights; its transform is the identity."""
    rng = np.random.default_rng(seed)
    blocks = blocks_of(levels)
    weights = np.sort(rng.uniform(0.05, 1, (len(blocks), len(levels))), axis=1)[:, ::-1]
    used = np.array([[t < block.num_levels for t in range(len(levels))] for block in blocks])
    return Binarizer(
        np.zeros(levels[0], np.float32),
        np.eye(levels[0], dtype=np.float32),
        levels,
        (weights * used).astype(np.float32),
    )


LEVELS = st.lists(st.integers(1, 12), min_size=1, max_size=8).map(
    lambda groups: tuple(8 * g for g in sorted(groups, reverse=True))
)
BINARIZERS = st.builds(binarizer_of, LEVELS, st.integers(0, 99))


def random_codes(binarizer: Binarizer, n: int, rng: np.random.Generator) -> Codes:
    return Codes(
        rng.integers(0, 256, (n, binarizer.code_bytes), dtype=np.uint8),
        rng.uniform(0.9, 1.3, n).astype(np.float16),
        rng.normal(0, 1, n).astype(np.float16),
    )


def plain_scores(binarizer: Binarizer, rotated: np.ndarray, codes: Codes, mode: str) -> np.ndarray:
    """(q, n) float64, with nothing shared with the kernels but `decode`."""
    query = rotated.astype(np.float64)
    if mode == "symmetric":
        value = np.zeros_like(query)
        for m, weight in zip(binarizer.levels, binarizer.level_weights, strict=True):
            value[:, :m] += np.where(rotated[:, :m] >= value[:, :m].astype(np.float32), weight, -weight)
        query = value * ((query * query).sum(axis=1) / (query * value).sum(axis=1))[:, None]
    products = query @ decode(binarizer, codes.code).T.astype(np.float64)
    return products * codes.factor.astype(np.float64) + codes.offset.astype(np.float64)
