"""The recurrent network of BEBR that chooses the signs of a code: forward pass, in numpy; training is `training`'s."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

__all__ = ["Network", "Perceptron", "network_of", "network_shapes", "network_tensors"]

PREFIX = "network"


@dataclass(frozen=True, eq=False)
class Perceptron:
    """One block: a linear map, and beside it Linear - BatchNorm - ReLU - Linear with the normalization folded in."""

    linear: NDArray[np.float32]
    """(i, o)."""
    inner: NDArray[np.float32]
    """(i, h); h may be 0: then the block is linear."""
    inner_bias: NDArray[np.float32]
    """(h,)."""
    outer: NDArray[np.float32]
    """(h, o)."""
    outer_bias: NDArray[np.float32]
    """(o,)."""

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, i) → (n, o)."""
        hidden = np.maximum(x @ self.inner.astype(np.float64) + self.inner_bias, 0)
        out: NDArray[np.float64] = (
            x @ self.linear.astype(np.float64) + hidden @ self.outer.astype(np.float64) + self.outer_bias
        )
        return out


@dataclass(frozen=True, eq=False)
class Network:
    """Residual blocks that make signs, and reconstruction blocks that say what the signs so far already hold.

    With x the centred vector, v_t the weighted signs of the levels before t: f = l_0·normalize(x), u_0 = W_0(f),
    u_t = W_t(f - l_t·normalize(B_t(v_t))); level t holds the signs of u_t.

    Source: BEBR, arXiv 2302.08714, section 3.2. There all l_t are 1; with the lengths that vectors and values have, maps
    that are a rotation and its inverse make the signs of the closed form.
    """

    encoders: tuple[Perceptron, ...]
    """W_t, d → m_t, one for each level."""
    decoders: tuple[Perceptron, ...]
    """B_t, m_0 → d, one for each level but the first."""
    lengths: NDArray[np.float32]
    """(num_levels,) l_t."""

    def signs(
        self, centred: NDArray[np.float64], level_weights: tuple[NDArray[np.float32], ...]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Choose the signs of vectors.

        Args:
            centred: (n, d) vectors less the mean.
            level_weights: For each level t: (m_t,) weight of each dimension's sign.

        Returns:
            (n, code_bytes) bit planes, and (n, m_0) the values that they sum to.
        """
        direction = _brought_to(self.lengths[0], centred)
        value = np.zeros((len(centred), len(level_weights[0])), np.float32)
        planes = []
        for t, weight in enumerate(level_weights):
            left = direction
            if t > 0:
                left = direction - _brought_to(
                    self.lengths[t], self.decoders[t - 1](value.astype(np.float64))
                )
            # In float64 a sum that changes with the batch changes by 1e-16: signs of values that small are improbable.
            positive = self.encoders[t](left) >= 0
            planes.append(np.packbits(positive, axis=1))
            value[:, : len(weight)] += np.where(positive, weight, -weight)
        return np.hstack(planes), value


def _brought_to(length: float, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows at a length; zeros stay."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    scaled: NDArray[np.float64] = x * np.divide(length, norms, out=np.zeros_like(norms), where=norms > 0)
    return scaled


def _blocks(network: Network) -> dict[str, Perceptron]:
    named = {f"{PREFIX}.encoder.{t}": block for t, block in enumerate(network.encoders)}
    return named | {f"{PREFIX}.decoder.{t}": block for t, block in enumerate(network.decoders)}


def network_tensors(network: Network) -> dict[str, NDArray[np.float32]]:
    """Arrays to store, by name."""
    tensors = {
        f"{name}.{field.name}": getattr(block, field.name)
        for name, block in _blocks(network).items()
        for field in fields(Perceptron)
    }
    return tensors | {f"{PREFIX}.lengths": network.lengths}


def network_shapes(dims: int, levels: tuple[int, ...], hidden: int) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a network from (dims,) to these levels."""
    edges = [(f"{PREFIX}.encoder.{t}", dims, m) for t, m in enumerate(levels)]
    edges += [(f"{PREFIX}.decoder.{t}", levels[0], dims) for t in range(len(levels) - 1)]
    shapes: dict[str, tuple[int, ...]] = {f"{PREFIX}.lengths": (len(levels),)}
    for name, inputs, outputs in edges:
        shapes |= {
            f"{name}.linear": (inputs, outputs),
            f"{name}.inner": (inputs, hidden),
            f"{name}.inner_bias": (hidden,),
            f"{name}.outer": (hidden, outputs),
            f"{name}.outer_bias": (outputs,),
        }
    return shapes


def network_of(tensors: Mapping[str, NDArray[np.float32]], num_levels: int) -> Network:
    """The network that `network_tensors` took apart."""

    def block(name: str) -> Perceptron:
        return Perceptron(**{field.name: tensors[f"{name}.{field.name}"] for field in fields(Perceptron)})

    return Network(
        tuple(block(f"{PREFIX}.encoder.{t}") for t in range(num_levels)),
        tuple(block(f"{PREFIX}.decoder.{t}") for t in range(num_levels - 1)),
        tensors[f"{PREFIX}.lengths"],
    )
