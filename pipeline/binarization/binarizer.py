"""The transform that makes codes, as arrays; to and from named tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.binarization.network import PREFIX, Network, network_of, network_shapes, network_tensors
from pipeline.errors import CorruptArtifactError

__all__ = ["Binarizer", "Block", "Learned", "blocks_of", "from_tensors", "to_tensors"]


@dataclass(frozen=True)
class Block:
    """Rotated dimensions [start, stop) that have the same number of levels."""

    start: int
    stop: int
    num_levels: int


def blocks_of(levels: tuple[int, ...], borders: tuple[int, ...] | None = None) -> tuple[Block, ...]:
    """Dimensions grouped by their number of levels, most levels first: (192, 128, 128) → 128 of 3, 64 of 1."""
    edges = [0, *(borders or sorted(set(levels)))]
    return tuple(Block(start, stop, sum(m >= stop for m in levels)) for start, stop in pairwise(edges))


@dataclass(frozen=True, eq=False)
class Learned:
    """What is learned from pairs of a query and a document that it wants."""

    query_map: NDArray[np.float32]
    """(d, m_0) takes centred queries to where the values of codes are."""
    expectation: NDArray[np.float32]
    """(d, d) takes a centred document to the centred query that is to be expected of who wants it."""
    spread: NDArray[np.float32]
    """(m_0,) mean square of the queries around the expected ones, by rotated dimension: what an error there costs."""
    scales: NDArray[np.float32]
    """(s,) multiples of the weights, among which each vector gets its own."""

    @cached_property
    def products(self) -> NDArray[np.float64]:
        """(d, m_0 + d) expectation @ query_map beside the expectation."""
        expectation = self.expectation.astype(np.float64)
        return np.hstack([expectation @ self.query_map, expectation])


@dataclass(frozen=True, eq=False)
class Binarizer:
    """A rotation, the weights of the signs, and what was learned on top of them.

    The code of x is the greedy expansion of z = (x - mean) @ rotation in signs: level t holds the signs of what the
    levels before it leave of the first m_t dimensions, level after level, eight dimensions a byte, the first dimension
    in the highest bit, 1 for a value >= 0.
    """

    mean: NDArray[np.float32]
    """(d,) subtracted first."""
    rotation: NDArray[np.float32]
    """(d, m_0) orthonormal columns, or rows where m_0 > d."""
    levels: tuple[int, ...]
    """m_0 >= m_1 >= ..., multiples of 8: dimensions of each level."""
    weights: NDArray[np.float32]
    """(num_blocks, num_levels) weight of a sign, by block and level; zero where the block has fewer levels."""
    learned: Learned | None = None
    """None: the closed-form baseline."""
    network: Network | None = None
    """Chooses the signs in the place of the greedy expansion."""
    borders: tuple[int, ...] | None = None
    """Ends of the blocks, where they are not all the distinct levels: of a truncated binarizer."""

    @property
    def query_map(self) -> NDArray[np.float32]:
        """(d, m_0) takes centred queries to where the values of codes are."""
        return self.rotation if self.learned is None else self.learned.query_map

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The rows of `weights`."""
        return blocks_of(self.levels, self.borders)

    @property
    def code_bytes(self) -> int:
        """Bytes of one code."""
        return sum(self.levels) // 8

    @cached_property
    def level_weights(self) -> tuple[NDArray[np.float32], ...]:
        """For each level t: (m_t,) weight of each dimension's sign."""
        widths = [block.stop - block.start for block in self.blocks]
        by_dimension = np.repeat(self.weights, widths, axis=0)
        return tuple(np.ascontiguousarray(by_dimension[:m, t]) for t, m in enumerate(self.levels))

    def truncated(self, levels: tuple[int, ...]) -> "Binarizer":
        """Reads the coarser codes that `truncate_codes` cuts off: fewer levels, fewer dimensions, or both.

        Their factors and offsets stay those of the whole codes.

        Args:
            levels: At most as many as here, each at most as large, multiples of 8, not growing.

        Raises:
            ValueError: They are not.
        """
        check_prefix(levels, self.levels)
        m = levels[0]
        borders = tuple(sorted({min(block.stop, m) for block in self.blocks} | set(levels)))
        of_block = [next(b for b, block in enumerate(self.blocks) if block.stop >= stop) for stop in borders]
        learned = self.learned
        return Binarizer(
            self.mean,
            self.rotation[:, :m],
            levels,
            self.weights[of_block, : len(levels)],
            learned and replace(learned, query_map=learned.query_map[:, :m], spread=learned.spread[:m]),
            borders=borders,
        )


def check_prefix(levels: tuple[int, ...], whole: tuple[int, ...]) -> None:
    """Whether codes of these levels are prefixes of codes of those.

    Raises:
        ValueError: They are not.
    """
    falling = list(levels) == sorted(levels, reverse=True) and all(m > 0 and m % 8 == 0 for m in levels)
    shorter = 0 < len(levels) <= len(whole) and all(m <= n for m, n in zip(levels, whole, strict=False))
    if not falling or not shorter:
        raise ValueError(f"expected a prefix of levels {whole} in multiples of 8, found {levels}")


def to_tensors(binarizer: Binarizer) -> dict[str, NDArray[np.float32]]:
    """Arrays to store, by name; the levels are stored beside them.

    Raises:
        ValueError: The binarizer is truncated: its codes are those of the whole one, which is what to store.
    """
    if binarizer.borders is not None:
        raise ValueError(
            "a truncated binarizer is not stored: store the whole one, and truncate what is read"
        )
    tensors = {name: getattr(binarizer, name) for name in ("mean", "rotation", "weights")}
    if binarizer.learned is not None:
        tensors |= {field.name: getattr(binarizer.learned, field.name) for field in fields(Learned)}
    if binarizer.network is not None:
        tensors |= network_tensors(binarizer.network)
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def from_tensors(tensors: Mapping[str, NDArray[np.float32]], levels: tuple[int, ...]) -> Binarizer:
    """The binarizer that `to_tensors` took apart.

    Raises:
        CorruptArtifactError: A tensor is missing, or its shape or type does not fit the levels.
    """
    found = {name: (str(array.dtype), array.shape) for name, array in sorted(tensors.items())}
    dims = tensors["mean"].shape[0] if "mean" in tensors and tensors["mean"].ndim == 1 else 0
    expected = {
        "mean": ("float32", (dims,)),
        "rotation": ("float32", (dims, levels[0])),
        "weights": ("float32", (len(blocks_of(levels)), len(levels))),
    }
    learned = {
        "query_map": ("float32", (dims, levels[0])),
        "expectation": ("float32", (dims, dims)),
        "spread": ("float32", (levels[0],)),
        "scales": ("float32", (np.size(tensors.get("scales", ())),)),
    }
    is_learned = any(name in tensors for name in learned)
    has_network = any(name.startswith(PREFIX) for name in tensors)
    hidden = np.size(tensors.get(f"{PREFIX}.encoder.0.inner_bias", ()))
    network = {
        name: ("float32", shape)
        for name, shape in network_shapes(dims, levels, hidden).items()
        if has_network
    }
    if found != expected | (learned if is_learned else {}) | network:
        raise CorruptArtifactError(
            "binarizer",
            f"expected tensors {expected | network} or with {learned}, found {found}",
            "fit it anew",
        )
    return Binarizer(
        tensors["mean"],
        tensors["rotation"],
        levels,
        tensors["weights"],
        Learned(**{name: tensors[name] for name in learned}) if is_learned else None,
        network_of(tensors, len(levels)) if has_network else None,
    )
