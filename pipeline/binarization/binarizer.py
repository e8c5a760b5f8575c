"""The transform that makes codes, as arrays; to and from named tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptArtifactError

__all__ = ["Binarizer", "Block", "blocks_of", "from_tensors", "to_tensors"]


@dataclass(frozen=True)
class Block:
    """Rotated dimensions [start, stop) that have the same number of levels."""

    start: int
    stop: int
    num_levels: int


def blocks_of(levels: tuple[int, ...]) -> tuple[Block, ...]:
    """Dimensions grouped by their number of levels, most levels first: (192, 128, 128) → 128 of 3, 64 of 1."""
    edges = [0, *sorted(set(levels))]
    return tuple(Block(start, stop, sum(m >= stop for m in levels)) for start, stop in pairwise(edges))


@dataclass(frozen=True, eq=False)
class Binarizer:
    """A rotation and the weights of the signs.

    The code of x is the greedy expansion of z = (x - mean) @ rotation in signs: level t holds the signs of what the
    levels before it leave of the first m_t dimensions, level after level, eight dimensions a byte, the first dimension
    in the highest bit, 1 for a value >= 0.
    """

    mean: NDArray[np.float32]
    """(d,) subtracted first."""
    rotation: NDArray[np.float32]
    """(d, m_0) orthonormal columns."""
    levels: tuple[int, ...]
    """m_0 >= m_1 >= ..., multiples of 8: dimensions of each level."""
    weights: NDArray[np.float32]
    """(num_blocks, num_levels) weight of a sign, by block and level; zero where the block has fewer levels."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The rows of `weights`."""
        return blocks_of(self.levels)

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


def to_tensors(binarizer: Binarizer) -> dict[str, NDArray[np.float32]]:
    """Arrays to store, by name; the levels are stored beside them."""
    return {
        "mean": np.ascontiguousarray(binarizer.mean),
        "rotation": np.ascontiguousarray(binarizer.rotation),
        "weights": np.ascontiguousarray(binarizer.weights),
    }


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
    if found != expected:
        raise CorruptArtifactError("binarizer", f"expected tensors {expected}, found {found}", "fit it anew")
    return Binarizer(tensors["mean"], tensors["rotation"], levels, tensors["weights"])
