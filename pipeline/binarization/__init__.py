"""Float vectors to codes, and scores of codes: the closed-form baseline of DESIGN §6. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import BinarizerConfig

__all__ = ["Binarizer", "Codes", "binarize", "decode", "fit_binarizer", "from_tensors", "rotate_queries", "score", "to_tensors"]


@dataclass(frozen=True)
class Binarizer:
    mean: NDArray[np.float32]
    rotation: NDArray[np.float32]
    levels: tuple[int, ...]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Codes:
    code: NDArray[np.uint8]
    factor: NDArray[np.float16]
    offset: NDArray[np.float16]


def _blocks(levels):
    edges = [0, *sorted(set(levels))]
    return [(a, b, sum(m >= b for m in levels)) for a, b in zip(edges, edges[1:])]


def fit_binarizer(sample, *, config: BinarizerConfig, rng) -> Binarizer:
    mean = sample.mean(0)
    ev, u = np.linalg.eigh(np.cov((sample - mean).T.astype(np.float64)))
    u = u[:, ::-1]
    d = sample.shape[1]
    if config.levels:
        levels = config.levels
    elif config.bits_per_dim:
        levels = (d,) * config.bits_per_dim
    else:
        bits = 8 * (config.bytes or 96)
        m = max(8, d // 3 // 8 * 8)
        levels = (2 * m, 2 * m, m, m) if bits == 6 * m else (bits // 2, bits // 2) if bits // 2 <= d else (d,) * (bits // d)
    rot = u[:, : levels[0]].copy()
    for a, b, _ in _blocks(levels):
        rot[:, a:b] = rot[:, a:b] @ np.linalg.qr(rng.standard_normal((b - a, b - a)))[0]
    rot = rot.astype(np.float32)
    z = (sample - mean) @ rot
    weights = np.zeros((len(_blocks(levels)), len(levels)), np.float32)
    for i, (a, b, n) in enumerate(_blocks(levels)):
        s = z[:, a:b].std()
        weights[i, :n] = s * (2.0 if n > 1 else 0.8) * 2.0 ** -np.arange(1, n + 1)
    return Binarizer(mean, rot, levels, weights)


def binarize(b: Binarizer, vectors) -> Codes:
    centred = vectors - b.mean
    z = centred @ b.rotation
    r = z.copy()
    value = np.zeros_like(z)
    planes = [np.zeros((len(z), m), bool) for m in b.levels]
    for i, (lo, hi, n) in enumerate(_blocks(b.levels)):
        for t in range(n):
            bit = r[:, lo:hi] >= 0
            planes[t][:, lo:hi] = bit
            step = np.where(bit, b.weights[i, t], -b.weights[i, t])
            value[:, lo:hi] += step
            r[:, lo:hi] -= step
    dot = np.einsum("nd,nd->n", z, value)
    factor = np.where(dot > 1e-6, np.einsum("nd,nd->n", z, z) / np.maximum(dot, 1e-6), 1.0)
    return Codes(np.concatenate([np.packbits(p, axis=1) for p in planes], axis=1), factor.astype(np.float16), (centred @ b.mean).astype(np.float16))


def decode(b: Binarizer, code) -> NDArray[np.float32]:
    value = np.zeros((len(code), b.levels[0]), np.float32)
    start = 0
    for t, m in enumerate(b.levels):
        signs = np.unpackbits(code[:, start : start + m // 8], axis=1).astype(np.float32) * 2 - 1
        start += m // 8
        for i, (lo, hi, n) in enumerate(_blocks(b.levels)):
            if n > t:
                value[:, lo:hi] += b.weights[i, t] * signs[:, lo:hi]
    return value


def rotate_queries(b: Binarizer, queries):
    return (queries - b.mean) @ b.rotation


def score(b: Binarizer, rotated, code, factor, offset):
    return (rotated @ decode(b, code).T) * factor.astype(np.float32) + offset.astype(np.float32)


def to_tensors(b: Binarizer):
    return {"mean": b.mean, "rotation": b.rotation, "weights": b.weights}


def from_tensors(tensors, levels) -> Binarizer:
    return Binarizer(tensors["mean"], tensors["rotation"], tuple(levels), tensors["weights"])
