"""Train the recurrent network that chooses the signs of codes, together with the maps that read them. Imports torch.

Starts as the closed form: rotation and its inverse as linear maps, perceptrons beside them that add nothing yet. Two losses:
the order of float inner products, as scored by code, which an index is judged by; and BEBR's contrast of codes, which makes
a query's code find the document's.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize, pad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.binarization.binarizer import Binarizer
from pipeline.binarization.descending import (
    MAP_LEARNING_RATE,
    NEIGHBOURS_PER_QUERY,
    Maps,
    descend,
    divergence,
    to_array,
    to_device,
)
from pipeline.binarization.learning import Look, Neighbours
from pipeline.binarization.network import Network, Perceptron

__all__ = ["Batch", "CodeMaker", "Recurrent", "contrast", "start_network", "train_network", "weighted_signs"]

LEARNING_RATE = 1e-4
"""Of the network, where straight-through gradients are rough."""
MAX_STEPS = 1000
LENGTH_ROWS = 4096
"""Vectors that the lengths of reconstructions are measured on."""
LEAST_PRODUCT = 1e-3
"""Of a vector with its value, in training: what divides must not vanish."""
HARDEST = 5
"""Negatives of each query that count: the most similar ones. Source: BEBR's released configuration."""
CONTRAST_TEMPERATURE = 0.05
"""BEBR's released configuration."""
QUEUE_ROWS = 4096
"""Codes of earlier steps that negatives come from, too."""
AVERAGING = 0.99
"""Of the network that fills the queue, by step."""


CONTRAST_SHARE = 1.0
"""Weight of the contrast beside the divergence of rankings. Measured recall@10, 48 bytes, 500 steps from .782: weight 0 .786,
.1 .782, 1 .786, which are one within the noise of a training."""


def start_network(
    binarizer: Binarizer, sample: NDArray[np.float32], *, hidden: int, rng: np.random.Generator
) -> Binarizer:
    """Put on top of a learned binarizer a network that makes the signs of the closed form, of vectors of equal length.

    Args:
        binarizer: A learned one.
        sample: (n, d) float32 unit vectors, to measure lengths on.
        hidden: Units of each perceptron; 0: none.
        rng: Of the perceptrons' first layers; their last ones start at zero.
    """
    assert binarizer.learned is not None  # noqa: S101
    rotation, levels = binarizer.rotation, binarizer.levels
    network = Network(
        tuple(_start_block(rotation[:, :m], hidden, rng) for m in levels),
        tuple(_start_block(rotation.T, hidden, rng) for _ in levels[1:]),
        _start_lengths(binarizer, sample[:LENGTH_ROWS].astype(np.float64) - binarizer.mean),
    )
    # The directions of vectors are coded, so that no step size has to be looked for.
    one_scale = replace(binarizer.learned, scales=np.ones(1, np.float32))
    return replace(binarizer, learned=one_scale, network=network)


def _start_block(linear: NDArray[np.float32], hidden: int, rng: np.random.Generator) -> Perceptron:
    """Adds nothing to the linear map yet."""
    inputs, outputs = linear.shape
    xavier = np.sqrt(2 / (inputs + hidden))
    return Perceptron(
        linear=np.ascontiguousarray(linear),
        inner=(xavier * rng.standard_normal((inputs, hidden))).astype(np.float32),
        inner_bias=np.zeros(hidden, np.float32),
        outer=np.zeros((hidden, outputs), np.float32),
        outer_bias=np.zeros(outputs, np.float32),
    )


def _start_lengths(binarizer: Binarizer, centred: NDArray[np.float64]) -> NDArray[np.float32]:
    """(num_levels,) root mean square of vectors, and mean length of what the levels before each hold of them."""
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    lengths = [float(np.sqrt(np.square(norms).mean()))]
    z = centred * (lengths[0] / np.maximum(norms, np.finfo(np.float32).tiny)) @ binarizer.rotation
    value = np.zeros(z.shape, np.float32)
    for weight in binarizer.level_weights[:-1]:
        m = len(weight)
        value[:, :m] += np.where(z[:, :m] >= value[:, :m], weight, -weight)
        lengths.append(float(np.linalg.norm(value @ binarizer.rotation.T, axis=1).mean()))
    return np.array(lengths, np.float32)


def train_network(
    binarizer: Binarizer,
    sample: NDArray[np.float32],
    neighbours: Neighbours,
    *,
    recall: Callable[[Binarizer], float],
    seed: int,
) -> tuple[Binarizer, tuple[Look, ...]]:
    """Train network and maps; stop early, and keep what found most.

    Source: BEBR, arXiv 2302.08714, section 3.3 (contrast, hardest negatives, queue); its trainer is SGD, ours Adam.

    Args:
        binarizer: One with a network, from `start_network`.
        sample: (n, d) float32 unit vectors.
        neighbours: Nearest rows of some rows of the sample, which stand in for queries; the first is the wanted one.
        recall: Of a binarizer, for held-out queries.
        seed: Of the order of the queries.

    Returns:
        The best binarizer seen, which may be the one given; the curve, from step 0.
    """
    objective = Recurrent(binarizer, sample, neighbours)
    queries = len(neighbours.rows)
    return descend(objective, binarizer, queries=queries, max_steps=MAX_STEPS, recall=recall, seed=seed)


class _Block(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, start: Perceptron) -> None:
        super().__init__()
        self.linear = torch.nn.Parameter(to_device(start.linear))
        self.inner, self.inner_bias, self.outer, self.outer_bias = (
            torch.nn.Parameter(to_device(array))
            for array in (start.inner, start.inner_bias, start.outer, start.outer_bias)
        )
        self.normalization = torch.nn.BatchNorm1d(len(start.inner_bias), device=self.linear.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x @ self.linear + self.outer_bias
        if not len(self.inner_bias):
            return out
        hidden = torch.relu(self.normalization(x @ self.inner + self.inner_bias))
        return out + hidden @ self.outer

    def perceptron(self) -> Perceptron:
        """With the normalization folded into the first layer."""
        n = self.normalization
        scale = n.weight / torch.sqrt(n.running_var + n.eps)
        return Perceptron(
            linear=to_array(self.linear),
            inner=to_array(self.inner * scale),
            inner_bias=to_array((self.inner_bias - n.running_mean) * scale + n.bias),
            outer=to_array(self.outer),
            outer_bias=to_array(self.outer_bias),
        )


class CodeMaker(torch.nn.Module):  # type: ignore[misc]
    """The network, with straight-through gradients."""

    def __init__(self, binarizer: Binarizer) -> None:
        assert binarizer.network is not None  # noqa: S101
        super().__init__()
        start = binarizer.network
        self.encoders = torch.nn.ModuleList(_Block(block) for block in start.encoders)
        self.decoders = torch.nn.ModuleList(_Block(block) for block in start.decoders)
        self.lengths = torch.nn.Parameter(to_device(start.lengths))
        self._weights = [to_device(weight) for weight in binarizer.level_weights]

    def forward(self, centred: torch.Tensor) -> torch.Tensor:
        """(n, d) → (n, m_0) values of their codes."""
        direction = self.lengths[0].detach() * normalize(centred)
        value = torch.zeros(len(centred), len(self._weights[0]), device=centred.device)
        for t, weight in enumerate(self._weights):
            left = direction
            if t > 0:
                left = direction - self.lengths[t] * normalize(self.decoders[t - 1](value))
            signs = weighted_signs(self.encoders[t](left), weight)
            value = value + pad(signs, (0, value.shape[1] - len(weight)))
        return value

    def network(self) -> Network:
        """With the parameters as they are now."""
        return Network(
            tuple(block.perceptron() for block in self.encoders),
            tuple(block.perceptron() for block in self.decoders),
            to_array(self.lengths),
        )


def weighted_signs(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Forwards ±weight; backwards the identity where |u| <= weight, else nothing. BEBR's, with the step for its 1."""
    straight = torch.clamp(u, -weight, weight)
    return straight + (torch.where(u >= 0, weight, -weight) - straight).detach()


class Batch(NamedTuple):
    """Some queries, and neighbours of theirs: all are candidates of each, the others' are far ones."""

    queries: torch.Tensor
    """(b, d) centred."""
    rows: torch.Tensor
    """(n,) of the candidates, in the sample."""
    x: torch.Tensor
    """(n, d) centred."""
    along_mean: torch.Tensor
    """(n,) their inner products with the mean."""
    products: torch.Tensor
    """(b, n) inner products of centred queries and candidates as they are."""
    wanted: torch.Tensor
    """(b,) the candidate that each query wants."""
    near: torch.Tensor
    """(b, k) rows of each query itself and of what is near to it."""

    def known(self, rows: torch.Tensor) -> torch.Tensor:
        """(b, r) whether a row is no negative of a query: near to it, or below 0."""
        known: torch.Tensor = (self.near[:, :, None] == rows).any(dim=1) | (rows < 0)
        return known


class Batches:
    """Vectors on a device, from which batches are drawn.

    Args:
        sample: (n, d) float32 unit vectors.
        mean: (d,) that they are centred by.
        neighbours: Nearest rows of some rows of the sample.
    """

    def __init__(
        self, sample: NDArray[np.float32], mean: NDArray[np.float32], neighbours: Neighbours
    ) -> None:
        centred: NDArray[np.float32] = sample - mean
        self.x = to_device(centred)
        self._along_mean = to_device(centred @ mean)
        self._rows, self._nearest = (to_device(a) for a in neighbours)

    def draw(self, picked: torch.Tensor, generator: torch.Generator) -> Batch:
        """Neighbours of some queries: the wanted one of each, and others at random."""
        others = 1 + torch.randperm(self._nearest.shape[1] - 1, generator=generator)
        ranks = torch.cat([torch.zeros(1, dtype=torch.int64), others[: NEIGHBOURS_PER_QUERY - 1]])
        picked = picked.to(self.x.device)
        candidates = self._nearest[picked][:, ranks.to(self.x.device)]
        rows = candidates.reshape(-1)
        queries, x, along_mean = self.x[self._rows[picked]], self.x[rows], self._along_mean[rows]
        return Batch(
            queries=queries,
            rows=rows,
            x=x,
            along_mean=along_mean,
            products=queries @ x.T + along_mean,
            wanted=torch.arange(len(picked), device=rows.device) * candidates.shape[1],
            near=torch.cat([self._rows[picked][:, None], self._nearest[picked]], dim=1),
        )


class Recurrent:
    """Network, maps, and the queue of earlier codes."""

    def __init__(self, binarizer: Binarizer, sample: NDArray[np.float32], neighbours: Neighbours) -> None:
        self._start = binarizer
        self._batches = Batches(sample, binarizer.mean, neighbours)
        self._rotation = to_device(binarizer.rotation)
        self.maps, self.maker = Maps(binarizer), CodeMaker(binarizer)
        average = get_ema_multi_avg_fn(AVERAGING)
        self._averaged = AveragedModel(self.maker, multi_avg_fn=average, use_buffers=True)
        device = self._batches.x.device
        self._queue = torch.zeros(QUEUE_ROWS, binarizer.levels[0], device=device)
        self._queued_rows = torch.full((QUEUE_ROWS,), -1, device=device)
        self._wanted = self._queued_rows[:0]

    def groups(self) -> list[dict[str, object]]:
        """Network and maps."""
        return [
            {"params": list(self.maker.parameters()), "lr": LEARNING_RATE},
            {"params": list(self.maps.parameters()), "lr": MAP_LEARNING_RATE},
        ]

    def loss(self, picked: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Divergence of rankings, and a share of the contrast."""
        batch = self.batch(picked, generator)
        return self.loss_of(batch, self.maker(batch.queries))

    def loss_of(self, batch: Batch, query_values: torch.Tensor) -> torch.Tensor:
        """Of codes among each other; (b, m_0) values of the queries' own."""
        value = self.maker(batch.x)
        scores = self.maps.scores(batch.queries, batch.x, value, self._factors(batch.x, value))
        ranking = divergence(scores + batch.along_mean, batch.products)
        pool, pool_rows = torch.cat([value, self._queue]), torch.cat([batch.rows, self._queued_rows])
        return ranking + CONTRAST_SHARE * contrast(query_values, pool, batch.wanted, batch.known(pool_rows))

    def batch(self, picked: torch.Tensor, generator: torch.Generator) -> Batch:
        """Neighbours of some queries, the wanted ones of which go into the queue after the step."""
        batch = self._batches.draw(picked, generator)
        self._wanted = batch.rows[batch.wanted]
        return batch

    def _factors(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # Of the rotation, not of the network: one that may move both sides of the product runs away.
        z = x @ self._rotation
        factors: torch.Tensor = (z * z).sum(1) / (z * value).sum(1).clamp_min(LEAST_PRODUCT)
        return factors

    def after_step(self) -> None:
        """The average follows; what it makes of the wanted documents goes into the queue, the oldest out of it."""
        self._averaged.update_parameters(self.maker)
        with torch.no_grad():
            fresh = self._averaged(self._batches.x[self._wanted])
        self._queue = torch.cat([fresh, self._queue])[:QUEUE_ROWS]
        self._queued_rows = torch.cat([self._wanted, self._queued_rows])[:QUEUE_ROWS]

    def result(self) -> Binarizer:
        """With the parameters as they are now."""
        return replace(self._start, learned=self.maps.learned(), network=self.maker.network())


def contrast(
    queries: torch.Tensor, documents: torch.Tensor, wanted: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """InfoNCE in both directions on cosines of values, against the hardest negatives.

    Source: BEBR, arXiv 2302.08714, section 3.3; the number of negatives is that of its released configuration.

    Args:
        queries: (b, m) values of codes.
        documents: (n, m) values of codes.
        wanted: (b,) the document of each query.
        known: (b, n) whether a document is near the query, and so none of its negatives.

    Returns:
        Nats, the sum of both directions' means.
    """
    cosines = normalize(queries) @ normalize(documents).T
    found = cosines.gather(1, wanted[:, None])
    backwards = cosines[:, wanted].T
    near = known[:, wanted].T | torch.eye(len(wanted), dtype=torch.bool, device=known.device)
    return _against_hardest(found, cosines, known) + _against_hardest(found, backwards, near)


def _against_hardest(found: torch.Tensor, cosines: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    hardest = cosines.masked_fill(known, -torch.inf).topk(min(HARDEST, cosines.shape[1]), dim=1).values
    logits = torch.cat([found, hardest], dim=1) / CONTRAST_TEMPERATURE
    return torch.nn.functional.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64))
