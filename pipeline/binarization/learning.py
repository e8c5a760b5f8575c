"""Learn from pairs of a query and a document that it wants what the closed form cannot know: where queries are to be expected.

A closed-form code is as good for a query from anywhere; but who wants a document asks from near it. Of the centred query q
of a centred document x, pairs tell the expectation q̄ = x·E and the spread around it. So

* the error that a code leaves at q̄ is known when the code is made: the offset takes it back;
* what is left to fear is the error along the spread: of several step sizes each vector gets the one that leaves least of it.

Codes, factors and offsets keep their shape, and what a code is depends on its vector alone.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.binarization.binarizer import Binarizer, Learned
from pipeline.binarization.codec import scale_costs

__all__ = [
    "Look",
    "Neighbours",
    "Pairs",
    "content_keys",
    "is_held_out",
    "learn_binarizer",
    "mine_neighbours",
    "without",
]

NEIGHBOURS = 50
"""Nearest vectors of a vector that are looked for."""
WANTING = 20
"""Those of them that stand in for queries that want its document."""
MAX_ANCHORS = 40_000
"""Vectors whose neighbours are looked for. Measured gain of recall@10 by distilling, 48 bytes: of 16,384 .002, of 40,000 .003."""
MAX_WANTED = 8192
"""Documents whose pairs the closed form takes: 163,840 pairs for 147,456 numbers at 384 dimensions."""
RIDGE = 0.01
"""Of the mean variance: pairs of near-duplicates alone would make every query its document."""
CANDIDATE_SCALES = np.geomspace(0.6, 1.67, 21)
NUM_SCALES = 8
"""Measured recall@10 at 48 bytes: 5 scales .777, 13 .780; each costs a quantization."""
SCALE_ROWS = 4096
"""Vectors on which the step sizes are chosen."""
ROWS_PER_BLOCK = 8192
"""Bounds memory."""
STRENGTH = 0.75
"""Share of the expectation to reckon with: pairs that decide a top 10 are nearer than the average pair. Measured recall@10 at
48 bytes: 0 .772, .35 .777, .5 .779, .7 .779, 1 .779; at 96: .898, .900, .902, .902, .903."""
HELD_OUT_ONE_IN = 32


@dataclass(frozen=True)
class Pairs:
    """Queries, and documents that they want."""

    queries: NDArray[np.float32]
    """(n, d)."""
    documents: NDArray[np.float32]
    """(m, d); may be the same array."""
    query_rows: NDArray[np.int64]
    """(p,) the query of each pair."""
    document_rows: NDArray[np.int64]
    """(p,) its document."""

    def blocks(self, mean: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Centred queries and documents, (b, d) float64 each, pair by pair."""
        for start in range(0, len(self.query_rows), ROWS_PER_BLOCK):
            block = slice(start, start + ROWS_PER_BLOCK)
            yield (
                self.queries[self.query_rows[block]].astype(np.float64) - mean,
                self.documents[self.document_rows[block]].astype(np.float64) - mean,
            )


@dataclass(frozen=True)
class Look:
    """How far a training has come."""

    step: int
    loss: float | None
    """Mean over the steps since the last look, nats; None before the first."""
    recall: float
    """Of held-out queries, by codes alone."""


def is_held_out(vectors: NDArray[np.float32], *, one_in: int = HELD_OUT_ONE_IN) -> NDArray[np.bool_]:
    """(n,) whether a vector is for validation: by its content, so that equal ones are never on both sides."""
    return content_keys(vectors) % one_in == 0


def content_keys(vectors: NDArray[np.float32]) -> NDArray[np.uint64]:
    """(n,) hashes: equal vectors have equal ones."""
    digests = (
        hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in np.ascontiguousarray(vectors)
    )
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


class Neighbours(NamedTuple):
    """Nearest rows of some rows of a sample."""

    rows: NDArray[np.int64]
    """(a,) of mined ones rising; where queries of people were given, further rows are theirs."""
    nearest: NDArray[np.int64]
    """(a, k) rows with the largest inner products, largest first, without the row itself."""

    def pairs(self, sample: NDArray[np.float32]) -> Pairs:
        """The neighbours in the place of queries that want the row's document."""
        step = -(-len(self.rows) // MAX_WANTED)
        wanting = self.nearest[::step, :WANTING]
        documents = np.repeat(self.rows[::step], wanting.shape[1])
        return Pairs(sample, sample, wanting.reshape(-1), documents)


def mine_neighbours(sample: NDArray[np.float32], rng: np.random.Generator) -> Neighbours:
    """Find the nearest neighbours of some vectors.

    Args:
        sample: (n, d) float32 unit vectors, n >= 2.
        rng: Chooses the vectors.
    """
    rows = np.sort(rng.choice(len(sample), min(len(sample), MAX_ANCHORS), replace=False))
    k = min(NEIGHBOURS, len(sample) - 1)
    _, found = faiss.knn(sample[rows], sample, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
    # Of equal vectors another one may come first: then the last is dropped in the place of the row itself.
    return Neighbours(rows, without(found, rows))


def without(found: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """(a, k) found rows, best first → (a, k - 1) without one of each: (a,) rows where it is among them, else the last."""
    others = found != rows[:, None]
    others[others.all(axis=1), -1] = False
    return found[others].reshape(len(rows), -1)


def learn_binarizer(binarizer: Binarizer, pairs: Pairs) -> Binarizer:
    """Put on top of a binarizer what pairs tell of the queries that want a document.

    Args:
        binarizer: In closed form.
        pairs: Queries with their documents.
    """
    expectation = _regression(pairs, binarizer.mean)
    learned = Learned(
        query_map=binarizer.rotation,
        expectation=(STRENGTH * expectation).astype(np.float32),
        spread=_spread(pairs, binarizer, expectation),
        scales=CANDIDATE_SCALES.astype(np.float32),
    )
    rows = np.unique(pairs.document_rows)[:SCALE_ROWS]
    best = scale_costs(replace(binarizer, learned=learned), pairs.documents[rows]).argmin(axis=0)
    chosen = np.quantile(CANDIDATE_SCALES[best], (np.arange(NUM_SCALES) + 0.5) / NUM_SCALES)
    scales = np.unique(chosen.astype(np.float32))
    return replace(binarizer, learned=replace(learned, scales=scales))


def _regression(pairs: Pairs, mean: NDArray[np.float32]) -> NDArray[np.float64]:
    """(d, d) E that takes documents to their queries best, in ridge regression."""
    d = len(mean)
    square, product = np.zeros((d, d)), np.zeros((d, d))
    for q, x in pairs.blocks(mean):
        square += x.T @ x
        product += x.T @ q
    square[np.diag_indices(d)] += RIDGE * np.trace(square) / d + np.finfo(np.float32).tiny
    solved: NDArray[np.float64] = np.linalg.solve(square, product).astype(np.float64, copy=False)
    return solved


def _spread(pairs: Pairs, binarizer: Binarizer, expectation: NDArray[np.float64]) -> NDArray[np.float32]:
    total = np.zeros(binarizer.rotation.shape[1])
    moved = expectation @ binarizer.rotation
    for q, x in pairs.blocks(binarizer.mean):
        total += np.square(q @ binarizer.rotation - x @ moved).sum(axis=0)
    return (total / len(pairs.query_rows)).astype(np.float32)
