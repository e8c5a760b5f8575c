"""A binarizer of a new encoder's vectors whose codes and queries can be compared with stored codes of an old one. Imports torch.

The first m_old dimensions of the new rotation are turned to where the values of the old codes are; the others complete it,
so that nothing of a new vector is lost among new ones. What such a start cannot reach is trained: besides the losses of the
network itself, new queries are to rank the old codes as new vectors rank, and new codes to find the old codes of what they
want. Old vectors, the old encoder and the old binarizer's training are not needed: only its codes of the sample.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.binarization.binarizer import Binarizer, check_prefix
from pipeline.binarization.codec import Codes, decode
from pipeline.binarization.descending import MAP_LEARNING_RATE, descend, divergence, to_array, to_device
from pipeline.binarization.fitting import principal_components, rotated, with_weights
from pipeline.binarization.learning import Look, Neighbours, learn_binarizer
from pipeline.binarization.training import (
    CONTRAST_SHARE,
    MAX_STEPS,
    Batch,
    Batches,
    Recurrent,
    contrast,
    start_network,
)

__all__ = ["CompatibleHead", "fit_compatible", "fit_reader", "train_compatible", "train_reader"]


@dataclass(frozen=True, eq=False)
class CompatibleHead:
    """A binarizer of new vectors, and how new queries read old codes."""

    binarizer: Binarizer
    """Of new vectors, for codes among each other."""
    reader: Binarizer
    """Levels and weights of the old codes, mean and query map of the new head's first m_old dimensions: for `rotate_queries`
    of new queries and `score` with stored old codes, symmetric or not. It makes no codes."""


def fit_compatible(
    sample: NDArray[np.float32],
    old: Binarizer,
    old_codes: Codes,
    *,
    levels: tuple[int, ...],
    rng: np.random.Generator,
) -> CompatibleHead:
    """Fit the head in closed form: Procrustes onto the old codes' values, completed by principal components of the rest.

    Sources: OCA, arXiv 2408.08793 and BT², arXiv 2211.03989 (orthogonal completion); Procrustes: Schönemann, 1966.

    Args:
        sample: (n, d) float32 unit vectors of the new encoder.
        old: Binarizer of the old codes.
        old_codes: Stored codes of the same n texts, row by row.
        levels: Of the new codes; the old ones are a prefix of them, and old dimensions end where a level ends.
        rng: Of the rotations.

    Raises:
        ValueError: The levels do not fit, sample and codes are not of the same rows, or all rows are alike.
    """
    check_prefix(old.levels, levels)
    if old.levels[0] not in levels or not old.levels[0] <= levels[0] <= sample.shape[1]:
        raise ValueError(
            f"expected levels that end at the old codes' {old.levels[0]} dimensions, and within the vectors' "
            f"{sample.shape[1]}, found {levels}"
        )
    _check(sample, old_codes)
    mean = sample.mean(axis=0, dtype=np.float64)
    turned, scale = _onto_codes(sample - mean, old, old_codes)
    rotation, variances = _completed(sample, mean, turned, levels, rng)
    binarizer = with_weights(sample, mean, rotation, levels, variances)
    return CompatibleHead(
        binarizer, _reader(binarizer.mean, scale * binarizer.query_map[:, : old.levels[0]], old)
    )


def fit_reader(sample: NDArray[np.float32], old: Binarizer, old_codes: Codes) -> Binarizer:
    """Fit how new queries read old codes in closed form, whatever becomes of new codes: the reader of `fit_compatible`.

    Args:
        sample: (n, d) float32 unit vectors of the new encoder.
        old: Binarizer of the old codes.
        old_codes: Stored codes of the same n texts, row by row.

    Raises:
        ValueError: The vectors are narrower than the codes, sample and codes are not of the same rows, or all rows are alike.
    """
    if old.levels[0] > sample.shape[1]:
        raise ValueError(
            f"expected vectors of the codes' {old.levels[0]} dimensions, found {sample.shape[1]}"
        )
    _check(sample, old_codes)
    mean = sample.mean(axis=0, dtype=np.float64)
    turned, scale = _onto_codes(sample - mean, old, old_codes)
    return _reader(mean, scale * turned, old)


def _check(sample: NDArray[np.float32], codes: Codes) -> None:
    if len(sample) == 0 or (sample == sample[0]).all() or (codes.code == codes.code[0]).all():
        raise ValueError(f"expected vectors and codes that differ, found {len(sample)} alike")
    if len(codes.code) != len(sample):
        raise ValueError(f"expected codes of {len(sample)} vectors, found {len(codes.code)}")


def _onto_codes(
    centred: NDArray[np.float64], old: Binarizer, codes: Codes
) -> tuple[NDArray[np.float64], float]:
    """(d, m) orthonormal columns that bring centred vectors nearest to the values of codes, and the scale."""
    value = decode(old, codes.code) * codes.factor.astype(np.float32)[:, None]
    return _procrustes(centred, value - value.mean(axis=0, dtype=np.float64))


def _procrustes(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """(d, m) orthonormal columns that bring x nearest to y, and the scale that brings it nearer still."""
    u, singular, v = np.linalg.svd(x.T @ y, full_matrices=False)
    turned = u @ v
    return turned, float(singular.sum() / np.square(x @ turned).sum())


def _completed(
    sample: NDArray[np.float32],
    mean: NDArray[np.float64],
    turned: NDArray[np.float64],
    levels: tuple[int, ...],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(d, m_0) the turned columns and principal components of what they leave; (m_0,) variances."""
    m = turned.shape[1]
    others = np.linalg.qr(turned, mode="complete")[0][:, m:]
    rest = ((sample - mean) @ others).astype(np.float32)
    eigenvalues, components = principal_components(rest, np.zeros(rest.shape[1]))
    stops = sorted(stop for stop in set(levels) if stop > m)
    added = [
        others @ rotated(components[:, start - m : stop - m], rng)
        for start, stop in zip([m, *stops], stops, strict=False)
    ]
    own = np.square((sample - mean) @ turned).mean(axis=0)
    return np.hstack([turned, *added]), np.concatenate([own, eigenvalues[: levels[0] - m]])


def _reader(mean: NDArray[np.floating], query_map: NDArray[np.floating], old: Binarizer) -> Binarizer:
    return replace(
        old,
        mean=mean.astype(np.float32),
        rotation=query_map.astype(np.float32),
        learned=None,
        network=None,
    )


def train_compatible(
    head: CompatibleHead,
    sample: NDArray[np.float32],
    old_codes: Codes,
    neighbours: Neighbours,
    *,
    hidden: int,
    recall: Callable[[CompatibleHead], float],
    seed: int,
) -> tuple[CompatibleHead, tuple[Look, ...]]:
    """Train the head's network and maps; stop early, and keep what found most.

    Source: BEBR, arXiv 2302.08714, section 3.4 (contrast with stored old codes, first m_old dimensions of longer ones).

    Args:
        head: From `fit_compatible`.
        sample: (n, d) float32 unit vectors of the new encoder.
        old_codes: Stored codes of the same texts.
        neighbours: Nearest rows of some rows of the sample, by new vectors.
        hidden: Units of each perceptron; 0: none.
        recall: Of a head, for held-out queries.
        seed: Of every random choice.

    Returns:
        The best head seen, which may be the one that it started from; the curve, from step 0.
    """
    learned = learn_binarizer(head.binarizer, neighbours.pairs(sample))
    network = start_network(learned, sample, hidden=hidden, rng=np.random.default_rng(seed))
    start = replace(head, binarizer=network)
    objective = _Compatible(start, sample, old_codes, neighbours)
    queries = len(neighbours.rows)
    return descend(objective, start, queries=queries, max_steps=MAX_STEPS, recall=recall, seed=seed)


def train_reader(
    reader: Binarizer,
    sample: NDArray[np.float32],
    old_codes: Codes,
    neighbours: Neighbours,
    *,
    recall: Callable[[Binarizer], float],
    seed: int,
) -> tuple[Binarizer, tuple[Look, ...]]:
    """Train nothing but how new queries read old codes: a small part of what `train_compatible` takes.

    Args:
        reader: From `fit_reader`.
        sample: (n, d) float32 unit vectors of the new encoder.
        old_codes: Stored codes of the same texts.
        neighbours: Nearest rows of some rows of the sample, by new vectors.
        recall: Of a reader, for held-out queries.
        seed: Of every random choice.

    Returns:
        The best reader seen, which may be the one that it started from; the curve, from step 0.
    """
    objective = _ReaderAlone(Batches(sample, reader.mean, neighbours), _Reading(reader, old_codes))
    queries = len(neighbours.rows)
    return descend(objective, reader, queries=queries, max_steps=MAX_STEPS, recall=recall, seed=seed)


class _Reading:
    """The map of new queries to old codes, and those codes."""

    def __init__(self, reader: Binarizer, old_codes: Codes) -> None:
        self._start = reader
        self._map = torch.nn.Parameter(to_device(reader.query_map))
        self.value = to_device(decode(reader, old_codes.code))
        self._factor, self._offset = (to_device(a.astype(np.float32)) for a in old_codes[1:])

    def group(self) -> dict[str, object]:
        """The map, for an optimizer."""
        return {"params": [self._map], "lr": MAP_LEARNING_RATE}

    def loss(self, batch: Batch) -> torch.Tensor:
        """Divergence of the ranking by old codes from that by new vectors."""
        factor, offset = self._factor[batch.rows], self._offset[batch.rows]
        scores = batch.queries @ self._map @ self.value[batch.rows].T * factor + offset
        return divergence(scores, batch.products)

    def result(self) -> Binarizer:
        """With the map as it is now."""
        return replace(self._start, rotation=to_array(self._map))


class _ReaderAlone:
    """The reader, whatever becomes of new codes."""

    def __init__(self, batches: Batches, reading: _Reading) -> None:
        self._batches, self._reading = batches, reading

    def groups(self) -> list[dict[str, object]]:
        """Its map."""
        return [self._reading.group()]

    def loss(self, picked: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """With the old codes of the queries' neighbours."""
        return self._reading.loss(self._batches.draw(picked, generator))

    def after_step(self) -> None:
        """Nothing follows the map."""

    def result(self) -> Binarizer:
        """With the map as it is now."""
        return self._reading.result()


class _Compatible:
    """The network among its own codes, and the old codes that it has to get on with."""

    def __init__(
        self, head: CompatibleHead, sample: NDArray[np.float32], old_codes: Codes, neighbours: Neighbours
    ) -> None:
        self._own = Recurrent(head.binarizer, sample, neighbours)
        self._reading = _Reading(head.reader, old_codes)

    def groups(self) -> list[dict[str, object]]:
        """Network, maps, and the map of queries to old codes."""
        return [*self._own.groups(), self._reading.group()]

    def loss(self, picked: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Of new codes among each other, and with the old codes of the same documents."""
        batch = self._own.batch(picked, generator)
        value = self._reading.value[batch.rows]
        query_values = self._own.maker(batch.queries)
        against_old = contrast(
            query_values[:, : value.shape[1]], value, batch.wanted, batch.known(batch.rows)
        )
        return (
            self._own.loss_of(batch, query_values) + self._reading.loss(batch) + CONTRAST_SHARE * against_old
        )

    def after_step(self) -> None:
        """The queue of new codes moves on; old codes stay."""
        self._own.after_step()

    def result(self) -> CompatibleHead:
        """With the parameters as they are now."""
        return CompatibleHead(self._own.result(), self._reading.result())
