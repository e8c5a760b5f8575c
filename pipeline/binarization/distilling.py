"""Distil the order of float inner products into the two maps of a learned binarizer, by gradient descent. Imports torch.

The codes stay as they are: of each of many queries the nearest vectors are scored by code, and query map and expectation
are moved so that the distribution of those scores comes near that of the float ones.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.binarization.binarizer import Binarizer
from pipeline.binarization.codec import binarize, decode
from pipeline.binarization.descending import (
    MAP_LEARNING_RATE,
    NEIGHBOURS_PER_QUERY,
    Maps,
    descend,
    divergence,
    to_device,
)
from pipeline.binarization.learning import Look, Neighbours

__all__ = ["distil"]

MAX_STEPS = 2000
"""Measured recall@10 at 48 bytes, 65,536 vectors: start .782, 500 .781, 1,000 .782, 1,500 .783, 2,000 .785."""


def distil(
    binarizer: Binarizer,
    sample: NDArray[np.float32],
    neighbours: Neighbours,
    *,
    recall: Callable[[Binarizer], float],
    seed: int,
) -> tuple[Binarizer, tuple[Look, ...]]:
    """Train the maps of a learned binarizer; stop early, and keep what found most.

    Args:
        binarizer: A learned one.
        sample: (n, d) float32 unit vectors.
        neighbours: Nearest rows of some rows of the sample, which stand in for queries.
        recall: Of a binarizer, for held-out queries.
        seed: Of the order of the queries.

    Returns:
        The best binarizer seen, which may be the one given; the curve, from step 0.
    """
    objective = _Distillation(binarizer, sample, neighbours)
    queries = len(neighbours.rows)
    return descend(objective, binarizer, queries=queries, max_steps=MAX_STEPS, recall=recall, seed=seed)


class _Distillation:
    """Vectors with their codes on a device, and the two maps."""

    def __init__(self, binarizer: Binarizer, sample: NDArray[np.float32], neighbours: Neighbours) -> None:
        self._start = binarizer
        codes = binarize(binarizer, sample)
        centred: NDArray[np.float32] = sample - binarizer.mean
        self._x = to_device(centred)
        self._value = to_device(decode(binarizer, codes.code))
        self._factor = to_device(codes.factor.astype(np.float32))
        self._along_mean = to_device(centred @ binarizer.mean)
        self._rows, self._nearest = (to_device(a) for a in neighbours)
        self._maps = Maps(binarizer)

    def groups(self) -> list[dict[str, object]]:
        """Both maps."""
        return [{"params": list(self._maps.parameters()), "lr": MAP_LEARNING_RATE}]

    def loss(self, picked: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Of queries among neighbours of theirs: all are candidates of each, the others' are far ones."""
        ranks = torch.randperm(self._nearest.shape[1], generator=generator)[:NEIGHBOURS_PER_QUERY]
        picked = picked.to(self._x.device)
        rows = self._nearest[picked][:, ranks.to(self._x.device)].reshape(-1)
        queries, x, along_mean = self._x[self._rows[picked]], self._x[rows], self._along_mean[rows]
        scores = self._maps.scores(queries, x, self._value[rows], self._factor[rows])
        return divergence(scores + along_mean, queries @ x.T + along_mean)

    def after_step(self) -> None:
        """Codes do not move."""

    def result(self) -> Binarizer:
        """With the maps as they are now."""
        return replace(self._start, learned=self._maps.learned())
