"""Gradient descent on what makes or reads codes, stopped early by held-out recall. Imports torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.binarization.binarizer import Binarizer, Learned
from pipeline.binarization.learning import Look

__all__ = ["Maps", "Objective", "descend", "divergence", "to_array", "to_device"]

QUERIES_PER_STEP = 64
NEIGHBOURS_PER_QUERY = 32
MAP_LEARNING_RATE = 3e-4
"""Measured at 48 bytes, maps alone: 1e-3 loses what this gains."""
TEMPERATURE = 0.03
"""Of both softmaxes: differences among the nearest ten of text encoders are of this size."""
WARM_UP_STEPS = 50
EPOCHS = 4
LOOKS = 4
PATIENCE = 3
"""Looks without a better recall that end the training: the first steps are the largest, and can lose what later ones gain."""


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Objective(Protocol[T_co]):
    """What a training moves, and what it lowers."""

    def groups(self) -> list[dict[str, object]]:
        """Parameters with their learning rates, as torch's optimizers take them."""

    def loss(self, picked: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Of some queries: (b,) numbers of the neighbours' rows."""

    def after_step(self) -> None:
        """Follow the parameters."""

    def result(self) -> T_co:
        """With the parameters as they are now."""


def descend(
    objective: Objective[T],
    start: T,
    *,
    queries: int,
    max_steps: int,
    recall: Callable[[T], float],
    seed: int,
) -> tuple[T, tuple[Look, ...]]:
    """Train; stop early, and keep what found most.

    One thread, so that the same inputs give the same bits on the same hardware.

    Args:
        objective: What is trained.
        start: What it starts from.
        queries: Queries to train on.
        max_steps: Most steps.
        recall: Of a result, for held-out queries.
        seed: Of the order of the queries.

    Returns:
        The best result seen, which may be the start; the curve, from step 0.
    """
    best, curve = start, [Look(0, None, recall(start))]
    steps = min(max_steps, max(1, EPOCHS * queries // QUERIES_PER_STEP))
    with _one_thread():
        descent = _Descent(objective, queries, steps, seed)
        while descent.step < steps and _goes_on(curve):
            loss = descent.advance(-(-steps // LOOKS))
            candidate = objective.result()
            look = Look(descent.step, loss, recall(candidate))
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


class _Descent:
    """Adam, its schedule, and the order of the queries."""

    def __init__(self, objective: Objective[object], queries: int, steps: int, seed: int) -> None:
        self._objective, self._queries, self._steps = objective, queries, steps
        self.step = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.Adam(objective.groups())
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)

    def _rate(self, step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.0, 1 - step / self._steps)

    def advance(self, steps: int) -> float:
        """Take steps; returns their mean loss."""
        stop, total = min(self.step + steps, self._steps), 0.0
        taken = stop - self.step
        while self.step < stop:
            picked = torch.randint(self._queries, (QUERIES_PER_STEP,), generator=self._generator)
            loss = self._objective.loss(picked, self._generator)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._schedule.step()
            self._objective.after_step()
            total += loss.item()
            self.step += 1
        return total / taken


def to_device(array: NDArray[np.generic]) -> torch.Tensor:
    """A copy on the GPU, where there is one."""
    return torch.tensor(array, device="cuda" if torch.cuda.is_available() else "cpu")


class Maps(torch.nn.Module):  # type: ignore[misc]
    """The two maps of a learned binarizer, and the scores that they give."""

    def __init__(self, binarizer: Binarizer) -> None:
        assert binarizer.learned is not None  # noqa: S101
        super().__init__()
        self._start: Learned = binarizer.learned
        self.query_map = torch.nn.Parameter(to_device(self._start.query_map))
        self.expectation = torch.nn.Parameter(to_device(self._start.expectation))

    def scores(
        self, queries: torch.Tensor, x: torch.Tensor, value: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """(q, n) estimated inner products of centred queries (q, d) and centred vectors (n, d) with their codes."""
        expected = x @ self.expectation
        missed = (expected * x).sum(1) - factor * (expected @ self.query_map * value).sum(1)
        estimates: torch.Tensor = queries @ self.query_map @ value.T * factor + missed
        return estimates

    def learned(self) -> Learned:
        """With the maps as they are now."""
        return replace(
            self._start, query_map=to_array(self.query_map), expectation=to_array(self.expectation)
        )


def to_array(parameter: torch.Tensor) -> NDArray[np.float32]:
    """A copy in numpy."""
    array: NDArray[np.float32] = parameter.detach().cpu().numpy().copy()
    return array


def divergence(estimates: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the rankings that estimates (q, n) and inner products (q, n) stand for."""
    wanted = torch.log_softmax(products / TEMPERATURE, dim=1)
    found = torch.log_softmax(estimates / TEMPERATURE, dim=1)
    return torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
