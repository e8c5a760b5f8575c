"""Bridges by gradient descent: tuned against the frozen old vectors, with and without a residual layer. Imports torch.

New vectors of documents ask, and the bridge is moved until old vectors are ranked as the new ones are: of each query, those
near in the new space, and those that the bridge as it is now takes for near (dynamic hard negatives). Nothing of the index
moves.

Sources: ADORE, arXiv 2104.08051 (query side trained against a frozen index, negatives found anew); Drift-Adapter, arXiv
2509.23471 (residual perceptron beside a linear map, trained by regression).
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.binarization.descending import descend, divergence, to_array, to_device
from pipeline.binarization.learning import Look
from pipeline.spaces.bridges import Bridge, Residual
from pipeline.upgrade.ranking import ranked

__all__ = ["regress_residual", "tune_bridge", "with_residual"]

HIDDEN = 512
NEAR = 32
"""Of a query, the nearest in the new space that it learns to find, and the nearest across the bridge that it learns to tell
from them."""
MAX_STEPS = 2000
SEARCHED_EVERY = 100
"""Steps between two searches for what the bridge takes for near."""
TUNING_RATE = 1e-4
"""*Measured*, MiniLM to mpnet, overlap@10 of other queries than those trained on and chosen by: 1e-4 .451, 3e-4 .447, 1e-3 .444,
the last of which fits best where it was trained."""
REGRESSION_RATE = 1e-3
OWN = -1.0
"""Score of a document that is the query itself: least of all, on both sides."""


def with_residual(bridge: Bridge, rng: np.random.Generator, hidden: int = HIDDEN) -> Bridge:
    """The bridge with a hidden layer that adds nothing yet."""
    start, stop = bridge.matrix.shape
    # Centred unit vectors have coordinates of about 1 / sqrt(d): units see them at unit variance.
    inner = rng.standard_normal((start, hidden), np.float32)
    layer = Residual(inner, np.zeros(hidden, np.float32), np.zeros((hidden, stop), np.float32))
    return replace(bridge, residual=layer)


def tune_bridge(
    bridge: Bridge,
    new: NDArray[np.float32],
    old: NDArray[np.float32],
    *,
    recall: Callable[[Bridge], float],
    seed: int,
) -> tuple[Bridge, tuple[Look, ...]]:
    """Move a bridge until it ranks old vectors as new ones rank each other; stop early, and keep what found most.

    Args:
        bridge: To start from.
        new: (n, d_new) float32 unit vectors, which are the queries, too.
        old: (n, d_old) float32 unit vectors of the same texts.
        recall: Of a bridge, for held-out queries.
        seed: Of the order of the queries.

    Returns:
        The best bridge seen, which may be the one that it started from; the curve, from step 0.
    """
    objective = _Rankings(replace(bridge, kind="tuned"), new, old)
    return descend(objective, bridge, queries=len(new), max_steps=MAX_STEPS, recall=recall, seed=seed)


def regress_residual(
    bridge: Bridge,
    new: NDArray[np.float32],
    old: NDArray[np.float32],
    *,
    recall: Callable[[Bridge], float],
    seed: int,
) -> tuple[Bridge, tuple[Look, ...]]:
    """Move a bridge with a hidden layer until it brings new vectors near the old ones of their texts; as `tune_bridge`."""
    objective = _Distances(replace(bridge, kind="residual"), new, old)
    return descend(objective, bridge, queries=len(new), max_steps=MAX_STEPS, recall=recall, seed=seed)


class _Moving(torch.nn.Module):  # type: ignore[misc]
    """A bridge whose arrays are parameters, all but the mean of the space that queries come from."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()
        self._start = bridge
        self._mean_from = to_device(bridge.mean_from)
        self.mean_to = torch.nn.Parameter(to_device(bridge.mean_to))
        self.matrix = torch.nn.Parameter(to_device(bridge.matrix))
        layer = bridge.residual
        arrays = () if layer is None else (layer.inner, layer.inner_bias, layer.outer)
        self.layer = torch.nn.ParameterList([to_device(array) for array in arrays])

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        centred = queries - self._mean_from
        mapped = centred @ self.matrix + self.mean_to
        if len(self.layer) > 0:
            inner, bias, outer = self.layer
            mapped = mapped + torch.relu(centred @ inner + bias) @ outer
        return torch.nn.functional.normalize(mapped, dim=1)

    def bridge(self) -> Bridge:
        """With the parameters as they are now."""
        layer = [to_array(parameter) for parameter in self.layer]
        return replace(
            self._start,
            mean_to=to_array(self.mean_to),
            matrix=to_array(self.matrix),
            residual=Residual(*layer) if layer else None,
        )


class _Objective:
    rate: float

    def __init__(self, bridge: Bridge, new: NDArray[np.float32], old: NDArray[np.float32]) -> None:
        self._moving = _Moving(bridge)
        self._new, self._old = to_device(new), to_device(old)

    def groups(self) -> list[dict[str, object]]:
        """The bridge's arrays."""
        return [{"params": list(self._moving.parameters()), "lr": self.rate}]

    def after_step(self) -> None:
        """Nothing else moves."""

    def result(self) -> Bridge:
        """The bridge as it is now."""
        return self._moving.bridge()


class _Distances(_Objective):
    """From bridged new vectors to old ones of the same texts."""

    rate = REGRESSION_RATE

    def loss(self, picked: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
        """Mean of 1 - cosine."""
        return 1 - (self._moving(self._new[picked]) * self._old[picked]).sum(1).mean()


class _Rankings(_Objective):
    """Between the rankings of new vectors among each other and of old ones across the bridge."""

    rate = TUNING_RATE

    def __init__(self, bridge: Bridge, new: NDArray[np.float32], old: NDArray[np.float32]) -> None:
        super().__init__(bridge, new, old)
        self._arrays = new, old
        self._own = np.arange(len(new))
        self._near = torch.as_tensor(ranked(new, new, NEAR, own=self._own))
        self._steps, self._taken_for_near = 0, self._search()

    def _search(self) -> torch.Tensor:
        new, old = self._arrays
        return torch.as_tensor(ranked(self.result().apply(new), old, NEAR, own=self._own))

    def loss(self, picked: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
        """Divergence of the two rankings of what either takes for near, for any of the queries."""
        rows = torch.unique(torch.cat([self._near[picked], self._taken_for_near[picked]]))
        queries = self._new[picked]
        is_own = (rows[None] == picked[:, None]).to(queries.device)
        products = (queries @ self._new[rows].T).masked_fill(is_own, OWN)
        scores = (self._moving(queries) @ self._old[rows].T).masked_fill(is_own, OWN)
        return divergence(scores, products)

    def after_step(self) -> None:
        """Look for hard negatives anew, now and then."""
        self._steps += 1
        if self._steps % SEARCHED_EVERY == 0:
            self._taken_for_near = self._search()
