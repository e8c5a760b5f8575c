"""Distil the order of float inner products into the two maps of a learned binarizer, by gradient descent. Imports torch.

The codes stay as they are: of each of many queries the nearest vectors are scored by code, and query map and expectation
are moved so that the distribution of those scores comes near that of the float ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.binarization.binarizer import Binarizer
from pipeline.binarization.codec import binarize, decode
from pipeline.binarization.learning import Look, Neighbours

__all__ = ["distil"]

QUERIES_PER_STEP = 64
NEIGHBOURS_PER_QUERY = 32
TEMPERATURE = 0.03
"""Of both softmaxes: differences among the nearest ten of text encoders are of this size."""
LEARNING_RATE = 3e-4
"""Measured at 48 bytes: 1e-3 loses what 3e-4 gains."""
WARM_UP_STEPS = 50
MAX_STEPS = 2000
"""Measured recall@10 at 48 bytes, 65,536 vectors: start .782, 500 .781, 1,000 .782, 1,500 .783, 2,000 .785."""
EPOCHS = 4
LOOKS = 4
PATIENCE = 3
"""Looks without a better recall that end the training: the first steps are the largest, and can lose what later ones gain."""


def distil(
    binarizer: Binarizer,
    sample: NDArray[np.float32],
    neighbours: Neighbours,
    *,
    recall: Callable[[Binarizer], float],
    seed: int,
) -> tuple[Binarizer, tuple[Look, ...]]:
    """Train the maps of a learned binarizer; stop early, and keep what found most.

    One thread, so that the same inputs give the same bits on the same hardware.

    Args:
        binarizer: A learned one.
        sample: (n, d) float32 unit vectors.
        neighbours: Nearest rows of some rows of the sample, which stand in for queries.
        recall: Of a binarizer, for held-out queries.
        seed: Of the order of the queries.

    Returns:
        The best binarizer seen, which may be the one given; the curve, from step 0.
    """
    best, curve = binarizer, [Look(0, None, recall(binarizer))]
    with _one_thread():
        training = _Training(binarizer, sample, neighbours, seed)
        while training.step < training.steps and _goes_on(curve):
            loss = training.advance(-(-training.steps // LOOKS))
            candidate = training.binarizer()
            look = Look(training.step, loss, recall(candidate))
            if look.recall > max(seen.recall for seen in curve):
                best = candidate
            curve.append(look)
    return best, tuple(curve)


def _goes_on(curve: list[Look]) -> bool:
    found = [look.recall for look in curve]
    return len(found) - 1 - int(np.argmax(found)) < PATIENCE


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Training:
    """Vectors with their codes on a device, the two maps, and how far it has come."""

    def __init__(
        self, binarizer: Binarizer, sample: NDArray[np.float32], neighbours: Neighbours, seed: int
    ) -> None:
        assert binarizer.learned is not None  # noqa: S101
        self._start, self._learned = binarizer, binarizer.learned
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        codes = binarize(binarizer, sample)
        centred: NDArray[np.float32] = sample - binarizer.mean
        self._x = self._put(centred)
        self._value = self._put(decode(binarizer, codes.code))
        self._factor = self._put(codes.factor.astype(np.float32))
        self._along_mean = self._put(centred @ binarizer.mean)
        self._rows, self._nearest = (torch.from_numpy(a).to(self._device) for a in neighbours)
        self._query_map, self._expectation = (
            torch.nn.Parameter(self._put(m)) for m in (self._learned.query_map, self._learned.expectation)
        )
        self.step = 0
        self.steps = min(MAX_STEPS, EPOCHS * len(neighbours.rows) // QUERIES_PER_STEP)
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.Adam([self._query_map, self._expectation], lr=LEARNING_RATE)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)

    def _put(self, array: NDArray[np.float32]) -> torch.Tensor:
        return torch.tensor(array, device=self._device)

    def _rate(self, step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.0, 1 - step / self.steps)

    def advance(self, steps: int) -> float:
        """Take steps; returns their mean loss."""
        stop, total = min(self.step + steps, self.steps), 0.0
        taken = stop - self.step
        while self.step < stop:
            loss = self._loss(*self._batch())
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._schedule.step()
            total += loss.item()
            self.step += 1
        return total / taken

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of queries, and of neighbours of theirs: all are candidates of each, the others' are far ones."""
        picked = torch.randint(len(self._rows), (QUERIES_PER_STEP,), generator=self._generator)
        ranks = torch.randperm(self._nearest.shape[1], generator=self._generator)[:NEIGHBOURS_PER_QUERY]
        rows = self._nearest[picked.to(self._device)][:, ranks.to(self._device)]
        return self._rows[picked.to(self._device)], rows.reshape(-1)

    def _loss(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        x, value, factor = self._x[rows], self._value[rows], self._factor[rows]
        along_mean = self._along_mean[rows]
        expected = x @ self._expectation
        missed = (expected * x).sum(1) - factor * (expected @ self._query_map * value).sum(1)
        scores = self._x[queries] @ self._query_map @ value.T * factor + missed + along_mean
        wanted = torch.log_softmax((self._x[queries] @ x.T + along_mean) / TEMPERATURE, dim=1)
        found = torch.log_softmax(scores / TEMPERATURE, dim=1)
        return torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)

    def binarizer(self) -> Binarizer:
        """With the maps as they are now."""
        maps = {
            "query_map": self._query_map.detach().cpu().numpy().copy(),
            "expectation": self._expectation.detach().cpu().numpy().copy(),
        }
        return replace(self._start, learned=replace(self._learned, **maps))
