"""Bridges: maps of query vectors from the space of one encoder into the space of another, so that new queries search old vectors.

Pure numpy: who serves an index needs no torch to cross into its space. How bridges are found is in `pipeline.upgrade`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptArtifactError

__all__ = ["Bridge", "BridgeKind", "Residual", "bridge_of", "bridge_tensors", "normalized", "slerp"]

BridgeKind = Literal["drift", "procrustes", "ridge", "residual", "tuned"]

PARALLEL = 1e-6
"""Sine of an angle below which two directions are one."""


@dataclass(frozen=True, eq=False)
class Residual:
    """One hidden layer beside a linear map."""

    inner: NDArray[np.float32]
    """(d_from, h)"""
    inner_bias: NDArray[np.float32]
    """(h,)"""
    outer: NDArray[np.float32]
    """(h, d_to)"""

    def of(self, centred: NDArray[np.float32]) -> NDArray[np.float32]:
        """(q, d_to) what it adds for centred queries (q, d_from)."""
        hidden: NDArray[np.float32] = np.maximum(centred @ self.inner + self.inner_bias, 0) @ self.outer
        return hidden


@dataclass(frozen=True, eq=False)
class Bridge:
    """y = (x - mean_from) @ matrix + residual(x - mean_from) + mean_to, of unit length."""

    kind: BridgeKind
    """How it was found."""
    mean_from: NDArray[np.float32]
    """(d_from,) mean of the space that queries come from."""
    mean_to: NDArray[np.float32]
    """(d_to,) of the space that they go to: what is added to centred queries, about its mean."""
    matrix: NDArray[np.float32]
    """(d_from, d_to)"""
    residual: Residual | None = None

    def apply(self, queries: NDArray[np.floating]) -> NDArray[np.float32]:
        """(q, d_to) float32 unit vectors of (q, d_from) queries, which are normalized first.

        Raises:
            ValueError: The queries have another width.
        """
        if queries.ndim != 2 or queries.shape[1] != len(self.mean_from):  # noqa: PLR2004
            raise ValueError(f"expected queries (q, {len(self.mean_from)}), found {queries.shape}")
        centred = normalized(queries) - self.mean_from
        mapped = centred @ self.matrix + self.mean_to
        return normalized(mapped if self.residual is None else mapped + self.residual.of(centred))

    def with_mean(self, share: float) -> "Bridge":
        """With a share of the mean of the space that queries go to."""
        return replace(self, mean_to=np.float32(share) * self.mean_to)


def normalized(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n, d) float32 rows of unit length; a row of zeros stays one."""
    rows = vectors.astype(np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    length[length == 0] = 1
    unit: NDArray[np.float32] = rows / length
    return unit


def slerp(start: NDArray[np.float32], stop: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """(q, d) unit vectors on the arcs from rows of `start` to those of `stop`.

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.

    Args:
        start: (q, d) unit vectors.
        stop: (q, d) unit vectors.
        share: 0 is the start, 1 the stop. Between opposite directions there is no arc: half way a row of zeros.
    """
    cosine = np.clip(np.einsum("qd,qd->q", start, stop), -1, 1)[:, None]
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    is_apart = sine > PARALLEL
    safe = np.where(is_apart, sine, 1)
    near = np.where(is_apart, np.sin((1 - share) * angle) / safe, 1 - share)
    far = np.where(is_apart, np.sin(share * angle) / safe, share)
    return normalized(near * start + far * stop)


def bridge_tensors(bridge: Bridge) -> dict[str, NDArray[np.float32]]:
    """Arrays to store, by name; the kind is stored beside them."""
    tensors = {name: getattr(bridge, name) for name in ("mean_from", "mean_to", "matrix")}
    if bridge.residual is not None:
        tensors |= {name: getattr(bridge.residual, name) for name in ("inner", "inner_bias", "outer")}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}


def bridge_of(tensors: Mapping[str, NDArray[np.float32]], kind: BridgeKind) -> Bridge:
    """The bridge that `bridge_tensors` took apart.

    Raises:
        CorruptArtifactError: A tensor is missing, or its shape or type does not fit the others.
    """
    found = {name: (str(array.dtype), array.shape) for name, array in sorted(tensors.items())}
    start, stop, hidden = (np.size(tensors.get(name, ())) for name in ("mean_from", "mean_to", "inner_bias"))
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "matrix": ("float32", (start, stop)),
        "mean_from": ("float32", (start,)),
        "mean_to": ("float32", (stop,)),
    }
    if hidden:
        expected |= {
            "inner": ("float32", (start, hidden)),
            "inner_bias": ("float32", (hidden,)),
            "outer": ("float32", (hidden, stop)),
        }
    if found != expected or start * stop == 0:
        raise CorruptArtifactError("bridge", f"expected tensors {expected}, found {found}", "train it anew")
    residual = Residual(tensors["inner"], tensors["inner_bias"], tensors["outer"]) if hidden else None
    return Bridge(kind, tensors["mean_from"], tensors["mean_to"], tensors["matrix"], residual)
