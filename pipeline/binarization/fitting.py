"""Fit a binarizer in closed form: centre, principal components, a random rotation within each block, step sizes.

The baseline that a learned binarizer must beat (DESIGN, section 6). The random rotation makes the dimensions of a block
alike and nearly normal, which is what one set of weights and RaBitQ's estimator ask for.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.binarization.binarizer import Binarizer, Block, blocks_of
from pipeline.binarization.levels import GAUSSIAN_STEPS, levels_of
from pipeline.config import BinarizerConfig

__all__ = ["fit_binarizer", "fit_weights", "principal_components", "rotated", "with_weights"]

ROWS_PER_BLOCK = 16_384
"""Fixed: the bits of the covariance depend on it."""
WEIGHT_VALUES = 1 << 18
"""Most values that the weights of one block are fitted on, about."""
MIN_WEIGHT_VALUES = 1 << 12
"""On fewer values the weights of a normal variable are kept."""
WEIGHT_ITERATIONS = 20


def fit_binarizer(
    sample: NDArray[np.float32], *, config: BinarizerConfig, rng: np.random.Generator
) -> Binarizer:
    """Fit the closed-form binarizer.

    The spectrum is shrunk towards its mean by (d / (n + d))², which leaves large samples as they are and keeps a
    sample with fewer rows than dimensions from giving all bits to the directions that it happens to span (measured,
    200 rows, 96 bytes: recall@10 .719 → .838). Same sample, rng state, threads, hardware and numpy: same bits.

    Sources: RaBitQ, arXiv 2405.12497 (random rotation); RBE, arXiv 1802.06466 (recurrent signs).

    Args:
        sample: (n, d) float32, n >= 1, finite.
        config: Size of the codes.
        rng: Of the rotations.

    Raises:
        ConfigError: The vectors are too narrow for the size asked for.
        ValueError: The sample is empty or not finite.
    """
    if not sample.size or not np.isfinite(sample).all():
        raise ValueError(f"sample must be finite, with a row at least; found shape {sample.shape}")
    mean = sample.mean(axis=0, dtype=np.float64)
    eigenvalues, components = principal_components(sample, mean)
    levels = levels_of(config, eigenvalues)
    blocks = blocks_of(levels)
    # Dimensions beyond the vectors' have no variance of their own: the rotation of the last block gives them theirs.
    beyond = max(0, levels[0] - len(mean))
    eigenvalues, components = np.pad(eigenvalues, (0, beyond)), np.pad(components, ((0, 0), (0, beyond)))
    rotation = np.hstack([rotated(components[:, b.start : b.stop], rng) for b in blocks])
    return with_weights(sample, mean, rotation, levels, eigenvalues)


def with_weights(
    sample: NDArray[np.float32],
    mean: NDArray[np.float64],
    rotation: NDArray[np.float64],
    levels: tuple[int, ...],
    variances: NDArray[np.float64],
) -> Binarizer:
    """A binarizer of a given rotation.

    Args:
        sample: (n, d) float32.
        mean: (d,).
        rotation: (d, m_0).
        levels: Dimensions of each level.
        variances: (m_0,) or more, of the rotated dimensions, whose mean over a block scales its weights.
    """
    blocks = blocks_of(levels)
    weights = np.zeros((len(blocks), len(levels)))
    for block_no, block in enumerate(blocks):
        spread = np.sqrt(variances[block.start : block.stop].mean())
        values = _block_values(sample, mean, rotation, block)
        weights[block_no, : block.num_levels] = spread * fit_weights(values, block.num_levels)
    return Binarizer(mean.astype(np.float32), rotation.astype(np.float32), levels, weights.astype(np.float32))


def principal_components(
    x: NDArray[np.float32], mean: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(d,) shrunk variances, not growing, and (d, d) components as columns, each with its largest entry positive."""
    n, d = x.shape
    covariance = np.zeros((d, d))
    for start in range(0, n, ROWS_PER_BLOCK):
        centred = x[start : start + ROWS_PER_BLOCK] - mean
        covariance += centred.T @ centred
    ascending, columns = np.linalg.eigh(covariance / n)
    eigenvalues, columns = np.maximum(ascending[::-1], 0), columns[:, ::-1]
    shrinkage = (d / (n + d)) ** 2
    # Identical rows say nothing of the spread; that of unit vectors without a preferred direction stands in.
    target = float(eigenvalues.mean()) or 1 / d
    largest = columns[np.argmax(np.abs(columns), axis=0), np.arange(d)]
    return (1 - shrinkage) * eigenvalues + shrinkage * target, columns * np.where(largest < 0, -1, 1)


def rotated(columns: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """The columns after a uniformly random rotation among themselves."""
    width = columns.shape[1]
    q, r = np.linalg.qr(rng.standard_normal((width, width)))
    turned: NDArray[np.float64] = columns @ (q * np.where(np.diag(r) < 0, -1, 1))
    return turned


def _block_values(
    x: NDArray[np.float32], mean: NDArray[np.float64], rotation: NDArray[np.float64], block: Block
) -> NDArray[np.float64]:
    """Rotated values of evenly spaced rows within one block, flat."""
    rows = max(1, WEIGHT_VALUES // (block.stop - block.start))
    step = -(-len(x) // rows)
    values: NDArray[np.float64] = (x[::step] - mean) @ rotation[:, block.start : block.stop]
    return values.reshape(-1)


def fit_weights(values: NDArray[np.float64], num_levels: int) -> NDArray[np.float64]:
    """Weights of successive signs for values scaled to unit root mean square.

    Starts from the uniform quantizer of a normal variable; alternates between greedy signs and least squares, as
    Lloyd-Max does between cells and centres. Source: Lloyd, IEEE Trans. IT-28(2), 1982.

    Args:
        values: (n,) of zero mean, any scale.
        num_levels: 1 to 8.

    Returns:
        (num_levels,) positive, falling.
    """
    weights = np.array(
        [GAUSSIAN_STEPS[num_levels - 1] * 2.0 ** (num_levels - 2 - t) for t in range(num_levels)]
    )
    scale = float(np.sqrt(np.square(values).mean()))
    if len(values) < MIN_WEIGHT_VALUES or scale == 0:
        return weights
    values = values / scale
    for _ in range(WEIGHT_ITERATIONS):
        signs = _successive_signs(values, weights)
        fitted = np.linalg.lstsq(signs @ signs.T, signs @ values, rcond=None)[0].astype(
            np.float64, copy=False
        )
        # Odd distributions can turn the order of the levels round; greedy signs need it.
        if fitted[-1] <= 0 or np.any(np.diff(fitted) >= 0):
            break
        weights = fitted
    return weights


def _successive_signs(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(num_levels, n) greedy signs: each level's sign of what the levels before it leave."""
    residual = values.copy()
    signs = np.empty((len(weights), len(values)))
    for t, weight in enumerate(weights):
        signs[t] = np.where(residual >= 0, 1.0, -1.0)
        residual -= weight * signs[t]
    return signs
