"""Ways to score codes that lost, kept to be measured beside those that won: each with the plain computation's results."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import faiss
import numpy as np
import torch

from pipeline.binarization import Binarizer, Codes, decode
from pipeline.binarization.codec import quantize
from pipeline.binarization.scoring import expand_queries, sign_patterns

INT8_TILE = 2048
UNPACK_ROWS = 256


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """(q, k) columns of the largest, in any order."""
    return np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:]


def unpacked_products(binarizer: Binarizer, values: np.ndarray, code: np.ndarray) -> np.ndarray:
    """(q, n) products of expanded queries with unpacked bits: no value is put together from its levels."""
    expanded = expand_queries(binarizer, values)
    products = np.empty((len(values), len(code)), np.float32)
    for start in range(0, len(code), UNPACK_ROWS):
        block = slice(start, start + UNPACK_ROWS)
        products[:, block] = expanded @ np.unpackbits(code[block], axis=1).astype(np.float32).T
    return 2 * products - expanded.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Int8Tiles:
    """8-bit integer products, a tile of decoded codes at a time; queries in 8 bits, too.

    Values are scaled to ±127 dimension by dimension, the scale goes into the query.
    """

    binarizer: Binarizer
    codes: Codes

    def products(self, values: np.ndarray, start: int) -> np.ndarray:
        """(q, INT8_TILE or less) products of one tile."""
        scale = 127 / sum(np.pad(w, (0, len(values[0]) - len(w))) for w in self.binarizer.level_weights)
        tile = np.rint(decode(self.binarizer, self.codes.code[start : start + INT8_TILE]) * scale)
        query = values / scale
        steps = np.abs(query).max(axis=1, keepdims=True) / 127
        integers = torch._int_mm(
            torch.from_numpy(np.rint(query / steps).astype(np.int8)),
            torch.from_numpy(tile.astype(np.int8)).T,
        )
        return integers.numpy() * steps.astype(np.float32)

    def best(self, values: np.ndarray, k: int) -> np.ndarray:
        """(q, k) rows."""
        rows, scores = [], []
        for start in range(0, len(self.codes.code), INT8_TILE):
            tile = slice(start, start + INT8_TILE)
            found = self.products(values, start) * self.codes.factor[tile].astype(np.float32)
            found += self.codes.offset[tile].astype(np.float32)
            columns = top(found, min(k, found.shape[1]))
            rows.append(columns + start)
            scores.append(np.take_along_axis(found, columns, axis=1))
        best = top(np.hstack(scores), k)
        return np.take_along_axis(np.hstack(rows), best, axis=1)


@dataclass(frozen=True)
class BitPlanes:
    """Symmetric products by popcount: of each pair of levels, and of each block, whose weights are one number.

    ⟨v_q, v_x⟩ = Σ over level pairs (s, t) and blocks of w_s·w_t·(dimensions - 2·popcount(plane_s(q) xor plane_t(x))).
    Source: BEBR, arXiv 2302.08714, section on symmetric distances, in the form with one popcount a pair.
    """

    binarizer: Binarizer
    planes: list[np.ndarray]
    """Of each level (n, words) uint64: its blocks one after the other, each filled up with zeros to whole words."""

    @classmethod
    def of(cls, binarizer: Binarizer, code: np.ndarray) -> "BitPlanes":
        return cls(binarizer, _word_planes(binarizer, code))

    def products(self, values_of: np.ndarray) -> np.ndarray:
        """(q, n) of (q, m_0) rotated queries."""
        code, value = quantize(self.binarizer, values_of)
        factor = np.square(values_of).sum(axis=1) / (values_of * value).sum(axis=1)
        mine = _word_planes(self.binarizer, code)
        words = [-(-(b.stop - b.start) // 64) for b in self.binarizer.blocks]
        weights = np.repeat(self.binarizer.weights, words, axis=0)
        dims = np.repeat([b.stop - b.start for b in self.binarizer.blocks], words) / np.repeat(words, words)
        products = np.zeros((len(values_of), len(self.planes[0])), np.float32)
        for s, t in product(range(len(mine)), repeat=2):
            shared = min(mine[s].shape[1], mine[t].shape[1])
            pair = weights[:shared, s] * weights[:shared, t]
            products += float(pair @ dims[:shared])
            for query in range(len(values_of)):
                unequal = np.bitwise_count(self.planes[t][:, :shared] ^ mine[s][query, :shared])
                products[query] -= unequal.astype(np.float32) @ (2 * pair)
        return products * factor[:, None].astype(np.float32)


def _word_planes(binarizer: Binarizer, code: np.ndarray) -> list[np.ndarray]:
    planes, first = [], 0
    for m in binarizer.levels:
        level = code[:, first : first + m // 8]
        pieces = [level[:, b.start // 8 : b.stop // 8] for b in binarizer.blocks if b.stop <= m]
        padded = [np.pad(p, ((0, 0), (0, -p.shape[1] % 8))) for p in pieces]
        planes.append(np.ascontiguousarray(np.hstack(padded)).view(np.uint64))
        first += m // 8
    return planes


def hamming_by_words(code: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
    """Nearest of packed bits by numpy alone."""
    words = np.ascontiguousarray(np.pad(code, ((0, 0), (0, -code.shape[1] % 8)))).view(np.uint64)

    def best(query_code: np.ndarray, k: int) -> np.ndarray:
        mine = np.pad(query_code, ((0, 0), (0, -query_code.shape[1] % 8))).view(np.uint64)
        distances = np.stack([np.bitwise_count(words ^ one).sum(axis=1, dtype=np.uint16) for one in mine])
        return np.argpartition(distances, k, axis=1)[:, :k]

    return best


def uncorrected_fast_scan(code: np.ndarray) -> faiss.IndexPQFastScan:
    """Fast-scan over the stored bits, ranked without factors and offsets."""
    bits = 8 * code.shape[1]
    nibbles = faiss.IndexPQ(bits, bits // 4, 4, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(np.tile(sign_patterns(4).ravel(), bits // 4), nibbles.pq.centroids)
    nibbles.is_trained = True
    nibbles.add_sa_codes(code >> 4 | code << 4)
    return faiss.IndexPQFastScan(nibbles)
