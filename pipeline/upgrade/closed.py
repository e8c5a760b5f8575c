"""Bridges in closed form, from vectors of the same texts in both spaces: drift, Procrustes, ridge; and anchors, and completion.

Rows of the two samples belong to the same texts. Maps are reckoned in float64; as of all products, their last bits can change
with the number of threads.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.spaces.bridges import Bridge, BridgeKind, normalized

__all__ = [
    "ANCHORS",
    "Anchors",
    "complete_orthogonally",
    "fit_drift",
    "fit_procrustes",
    "fit_ridge",
    "pick_anchors",
]

ANCHORS = 1024
"""*Measured*, MiniLM to mpnet, overlap@10: 384 anchors .191, 1,000 .203, 4,000 .217, which take four times the memory."""
ORTHOGONAL = 1e-4
"""By how much products of float32 columns may miss those of orthonormal ones."""


def fit_drift(new: NDArray[np.float32], old: NDArray[np.float32]) -> Bridge:
    """Take the mean drift back: for a new model that is a fine-tune of the old one, whose axes are still the same.

    Source: query drift compensation, arXiv 2506.00037.

    Args:
        new: (n, d) float32 unit vectors.
        old: (n, d) float32 unit vectors of the same texts, of the same width.

    Raises:
        ValueError: The widths differ, or the rows do not fit.
    """
    _check(new, old)
    if new.shape[1] != old.shape[1]:
        raise ValueError(f"expected spaces of one width, found {new.shape[1]} and {old.shape[1]}")
    return _bridge("drift", new, old, np.eye(new.shape[1]))


def fit_procrustes(new: NDArray[np.float32], old: NDArray[np.float32]) -> Bridge:
    """The orthogonal map that brings centred new vectors nearest to centred old ones; of fewer texts than dimensions one of many.

    Orthonormal columns where the new space is the wider one, rows where the old one is. Not scaled to the least squared error:
    that shrinks what tells queries apart beside the mean that is added back. *Measured*, MiniLM to mpnet, overlap of the first
    ten with the new model's own: .401 scaled, .427 as it is.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31, 1966; centred.

    Args:
        new: (n, d_new) float32 unit vectors.
        old: (n, d_old) float32 unit vectors of the same texts.

    Raises:
        ValueError: The rows do not fit.
    """
    _check(new, old)
    u, _, v = np.linalg.svd(_centred(new).T @ _centred(old), full_matrices=False)
    return _bridge("procrustes", new, old, u @ v)


def fit_ridge(new: NDArray[np.float32], old: NDArray[np.float32], strength: float) -> Bridge:
    """The linear map of least squared error, held back by a ridge.

    Source: Hoerl and Kennard, "Ridge regression", Technometrics 12, 1970.

    Args:
        new: (n, d_new) float32 unit vectors.
        old: (n, d_old) float32 unit vectors of the same texts.
        strength: Of the ridge, in mean variances of a new dimension, above 0.

    Raises:
        ValueError: The rows do not fit, or the strength is not above 0.
    """
    _check(new, old)
    if strength <= 0:
        raise ValueError(f"expected a strength above 0, found {strength}")
    x, y = _centred(new), _centred(old)
    covariance = x.T @ x / len(x)
    ridge = strength * np.trace(covariance) / len(covariance)
    eye = np.eye(len(covariance))
    return _bridge("ridge", new, old, np.linalg.solve(covariance + ridge * eye, x.T @ y / len(x)))


def complete_orthogonally(bridge: Bridge) -> NDArray[np.float32]:
    """The orthogonal transform of new vectors whose first d_old dimensions are the bridge's: one vector serves both spaces.

    Products of transformed new vectors are those of the new vectors themselves: nothing is lost among them.

    Sources: OCA, arXiv 2408.08793; BT², arXiv 2211.03989.

    Args:
        bridge: From `fit_procrustes`, from a space at least as wide as the one it goes to.

    Returns:
        (d_new, d_new) orthogonal. Of a new query x, `(x @ result)[:d_old]` is, but for the means, the bridged one.

    Raises:
        ValueError: The bridge's columns are not orthonormal.
    """
    start, stop = bridge.matrix.shape
    matrix = bridge.matrix.astype(np.float64)
    if start < stop or not np.allclose(matrix.T @ matrix, np.eye(stop), atol=ORTHOGONAL):
        raise ValueError(
            f"expected a Procrustes bridge into a space no wider than {start}, found a {bridge.kind} one into {stop}"
        )
    rest = np.linalg.qr(matrix, mode="complete")[0][:, stop:]
    u, _, v = np.linalg.svd(np.hstack([matrix, rest]))
    whole: NDArray[np.float32] = (u @ v).astype(np.float32)
    return whole


@dataclass(frozen=True, eq=False)
class Anchors:
    """Texts in both spaces, by the products with which vectors of either are expressed alike.

    Old documents are expressed from their stored vectors; nothing is embedded again. Source: relative representations, arXiv
    2209.15430, with centred anchors.
    """

    new: NDArray[np.float32]
    """(a, d_new) centred unit vectors."""
    old: NDArray[np.float32]
    """(a, d_old)"""
    mean_new: NDArray[np.float32]
    mean_old: NDArray[np.float32]

    def of_queries(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """(q, a) unit vectors of new queries (q, d_new)."""
        return normalized(normalized(queries - self.mean_new) @ self.new.T)

    def of_documents(self, documents: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, a) unit vectors of old documents (n, d_old)."""
        return normalized(normalized(documents - self.mean_old) @ self.old.T)


def pick_anchors(
    new: NDArray[np.float32], old: NDArray[np.float32], count: int, rng: np.random.Generator
) -> Anchors:
    """Anchors from some rows of the samples (n, d_new) and (n, d_old).

    Raises:
        ValueError: The rows do not fit.
    """
    _check(new, old)
    rows = np.sort(rng.choice(len(new), min(count, len(new)), replace=False))
    means = new.mean(axis=0, dtype=np.float64), old.mean(axis=0, dtype=np.float64)
    mean_new, mean_old = (mean.astype(np.float32) for mean in means)
    return Anchors(normalized(new[rows] - mean_new), normalized(old[rows] - mean_old), mean_new, mean_old)


def _check(new: NDArray[np.float32], old: NDArray[np.float32]) -> None:
    if len(new) != len(old) or len(new) < 2:  # noqa: PLR2004
        raise ValueError(
            f"expected at least two texts in both spaces, found {len(new)} new and {len(old)} old vectors"
        )


def _centred(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    centred: NDArray[np.float64] = wide - wide.mean(axis=0)
    return centred


def _bridge(
    kind: BridgeKind, new: NDArray[np.float32], old: NDArray[np.float32], matrix: NDArray[np.float64]
) -> Bridge:
    mean_new, mean_old = (v.mean(axis=0, dtype=np.float64).astype(np.float32) for v in (new, old))
    return Bridge(kind, mean_new, mean_old, matrix.astype(np.float32))
