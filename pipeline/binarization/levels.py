"""How many levels of signs each rotated dimension gets."""

import numpy as np
from numpy.typing import NDArray

from pipeline.config import BinarizerConfig
from pipeline.errors import ConfigError

__all__ = [
    "GAUSSIAN_STEPS",
    "MAX_LEVELS",
    "choose_levels",
    "default_code_bytes",
    "levels_of",
    "most_code_bytes",
]

LEAST_CODE_BYTES = 48
"""Of `default_code_bytes`, where the vectors are wide enough."""
GAUSSIAN_STEPS = (1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
"""Best step of a uniform quantizer of a unit normal at 1 to 8 bits. Max, IRE Trans. IT-6, 1960, table II; 6 to 8 bits
by the same criterion."""
GAUSSIAN_DISTORTIONS = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.00030, 0.00009)
"""Mean squared error left by that quantizer at 0 to 8 bits."""
MAX_LEVELS = len(GAUSSIAN_STEPS)
MAX_EXPANSION = 8
"""Times the vectors' dimensions that a level may have."""
GROUP_DIMS = 8
"""Dimensions that get levels together: one byte of a plane. Measured: as good as 16 and better than 32 and above, and
every whole number of bytes is reachable."""
SPECTRUM_POWER = 1.5
"""An error of dimension i weighs by the documents' variance times the queries' to some power. Measured recall@10 of
package summaries at 48, 96, 192 bytes: power 1 .748, .883, .957; 1.5 .763, .892, .968; 2 .757, .892, .966."""


def most_code_bytes(dims: int) -> int:
    """All bits that `choose_levels` can spend."""
    return dims // GROUP_DIMS * MAX_LEVELS


def default_code_bytes(dims: int) -> int:
    """Size of a code where none is given: a bit for each dimension, more of narrow vectors.

    By it a search reads least, as long as re-reading candidates costs no more than their bytes; `sizing.PROPOSED_ROWS` has the
    figures.
    """
    return max(1, min(most_code_bytes(dims), max(LEAST_CODE_BYTES, dims // 8)))


def choose_levels(eigenvalues: NDArray[np.float64], code_bytes: int) -> tuple[int, ...]:
    """Spend the bits of a code where they reduce the error of inner products most.

    Greedy: the next 8 bits go to the group of 8 dimensions whose expected error, variance ** 1.5 times the
    distortion of a normal variable, falls most. Dimensions beyond a multiple of 8 get no bits.

    Args:
        eigenvalues: (d,) variances of the principal components, not growing, not negative.
        code_bytes: Bytes of one code.

    Returns:
        levels: Dimensions m_t of each level, multiples of 8, not growing; they sum to 8 * code_bytes.

    Raises:
        ConfigError: `code_bytes` is not between 1 and 8 bits for each of the first d // 8 * 8 dimensions.
    """
    groups = len(eigenvalues) // GROUP_DIMS
    _check_size(code_bytes, len(eigenvalues))
    variances = eigenvalues[: groups * GROUP_DIMS].reshape(groups, GROUP_DIMS).mean(axis=1)
    gains = -np.outer(variances**SPECTRUM_POWER, np.diff(GAUSSIAN_DISTORTIONS))
    depth = np.zeros(groups + 1, np.int64)
    depth[0] = MAX_LEVELS  # stands before the first group, whose depth nothing but MAX_LEVELS bounds
    for _ in range(code_bytes):
        allowed = np.flatnonzero(depth[1:] < depth[:-1])
        depth[1 + allowed[np.argmax(gains[allowed, depth[1 + allowed]])]] += 1
    return tuple(int((depth[1:] > t).sum()) * GROUP_DIMS for t in range(int(depth[1])))


def _check_size(code_bytes: int, dims: int) -> None:
    most = most_code_bytes(dims)
    if 1 <= code_bytes <= most:
        return
    remedy = f"give 1 to {most}" if most else f"vectors need at least {GROUP_DIMS} dimensions"
    raise ConfigError("binarizer.bytes", f"no code of {code_bytes} bytes for {dims} dimensions", remedy)


def levels_of(config: BinarizerConfig, eigenvalues: NDArray[np.float64]) -> tuple[int, ...]:
    """Levels that a configuration asks for.

    `bits_per_dim` covers the dimensions up to a multiple of 8: the last d % 8 principal components, which vary least,
    are left out.

    Args:
        config: bytes, levels or bits_per_dim.
        eigenvalues: (d,) variances of the principal components, not growing.

    Raises:
        ConfigError: The vectors are too narrow for it, or a dimension would have more than 8 levels.
    """
    dims = len(eigenvalues) // GROUP_DIMS * GROUP_DIMS
    if config.levels is not None:
        _check_levels(config.levels, len(eigenvalues))
        return config.levels
    if config.bits_per_dim is not None:
        if not dims:
            raise ConfigError(
                "binarizer.bits_per_dim",
                f"found vectors of {len(eigenvalues)} dimensions",
                "codes need 8 at least",
            )
        return (dims,) * config.bits_per_dim
    return choose_levels(eigenvalues, config.bytes or default_code_bytes(len(eigenvalues)))


def _check_levels(levels: tuple[int, ...], dims: int) -> None:
    # A block beyond the vectors' dimensions would hold nothing; one that reaches beyond spreads what it holds over more signs.
    if max((m for m in levels if m < levels[0]), default=0) >= dims or levels[0] > MAX_EXPANSION * dims:
        raise ConfigError(
            "binarizer.levels",
            f"vectors of {dims} dimensions cannot fill {levels}",
            f"give a first level of at most {MAX_EXPANSION * dims}, and all smaller ones below {dims}",
        )
    if len(levels) > MAX_LEVELS:
        raise ConfigError(
            "binarizer.levels", f"expected at most {MAX_LEVELS} levels, found {len(levels)}", "give fewer"
        )
