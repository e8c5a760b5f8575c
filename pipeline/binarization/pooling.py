"""Given pairs of queries and documents beside the neighbours mined in a sample: one array of rows that all trainings pick from.

A training knows rows of one array, some of which want others. So the queries are put behind the documents; what is near, and
hence what gets a code, are documents only.
"""

from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.binarization.learning import (
    NEIGHBOURS,
    Neighbours,
    Pairs,
    content_keys,
    is_held_out,
    mine_neighbours,
    without,
)

__all__ = ["Pool", "fill_pool", "mined_pool", "split_pairs"]

HELD_OUT_PAIRS_ONE_IN = 8
"""There are fewer given queries than sample vectors, and they are worth more to judge by."""
MOST_REPEATS = 20
"""Of a given pair: a few hundred would be learned by heart."""


@dataclass(frozen=True)
class Pool:
    """What a training picks from."""

    vectors: NDArray[np.float32]
    """(n, d) documents, then queries."""
    documents: NDArray[np.float32]
    """(m, d) the first of them: the sample, then documents of given pairs that are not in it."""
    neighbours: Neighbours
    """Rows of the pool that look for others."""
    pairs: Pairs
    """For the closed form."""
    given: int = 0
    """Given pairs among these, each counted once."""


def split_pairs(pairs: Pairs, *, fewest: int) -> tuple[Pairs, NDArray[np.float32]]:
    """Hold queries out of given pairs, by their content.

    Documents that a sample would hold out as queries are left out with their pairs, so that no document is on both sides.

    Args:
        pairs: As they were given.
        fewest: Queries; where fewer would be held out, none are.

    Returns:
        The pairs to train on, with the documents of all; (q, d) distinct held-out queries in the order of their hashes.
    """
    allowed = ~is_held_out(pairs.documents)[pairs.document_rows]
    for_judging = is_held_out(pairs.queries, one_in=HELD_OUT_PAIRS_ONE_IN)
    held_out = pairs.queries[for_judging]
    _, first = np.unique(content_keys(held_out), return_index=True)
    if len(first) < fewest:
        return _chosen(pairs, allowed), held_out[:0]
    return _chosen(pairs, allowed & ~for_judging[pairs.query_rows]), held_out[first]


def _chosen(pairs: Pairs, chosen: NDArray[np.bool_]) -> Pairs:
    """Some of the pairs; documents that no sample holds out stay, wanted or not."""
    kept = ~is_held_out(pairs.documents)
    places = np.cumsum(kept) - 1
    return Pairs(
        pairs.queries,
        pairs.documents[kept],
        pairs.query_rows[chosen],
        places[pairs.document_rows[chosen]],
    )


def mined_pool(sample: NDArray[np.float32], rng: np.random.Generator) -> Pool:
    """A sample alone, whose vectors stand in for queries.

    Args:
        sample: (n, d) float32 unit vectors, n >= 2.
        rng: Chooses the vectors.
    """
    neighbours = mine_neighbours(sample, rng)
    return Pool(sample, sample, neighbours, neighbours.pairs(sample))


def fill_pool(mined: Pool, pairs: Pairs) -> Pool:
    """Add given pairs, each as often as makes them up to half of all.

    Args:
        mined: Of the sample.
        pairs: At least one.
    """
    documents, document_places = _joined(mined.documents, pairs.documents)
    wanting = pairs.queries[pairs.query_rows]
    queries, query_places = _joined(wanting[:0], wanting)
    wanted = document_places[pairs.document_rows]
    asking = len(documents) + query_places
    nearest = _nearest(queries, documents)[query_places]
    given = Neighbours(asking, _first(wanted, nearest))
    vectors = np.concatenate([documents, queries])
    return Pool(
        vectors,
        vectors[: len(documents)],
        _mixed(mined.neighbours, given),
        _mixed_pairs(vectors, mined.pairs, given),
        len(asking),
    )


def _joined(
    vectors: NDArray[np.float32], others: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Vectors, then those of others that are not among them, each once; and the places of all others in that."""
    both = np.concatenate([vectors, others])
    _, first, inverse = np.unique(content_keys(both), return_index=True, return_inverse=True)
    place = first[inverse]
    kept = place == np.arange(len(both))
    # Equal vectors of a sample are as many documents.
    kept[: len(vectors)] = True
    return both[kept], (np.cumsum(kept) - 1)[place[len(vectors) :]]


def _nearest(queries: NDArray[np.float32], documents: NDArray[np.float32]) -> NDArray[np.int64]:
    """(q, k) documents with the largest inner products, as many as mined ones have."""
    k = min(NEIGHBOURS, len(documents) - 1)
    _, found = faiss.knn(queries, documents, k, metric=faiss.METRIC_INNER_PRODUCT)
    return np.asarray(found)


def _first(wanted: NDArray[np.int64], nearest: NDArray[np.int64]) -> NDArray[np.int64]:
    """(p, k) the wanted document, then the nearest others: without it where it is among them, else without the farthest."""
    return np.concatenate([wanted[:, None], without(nearest, wanted)], axis=1)


def _mixed(mined: Neighbours, given: Neighbours) -> Neighbours:
    repeats = _repeats(len(mined.rows), len(given.rows))
    return Neighbours(
        np.concatenate([mined.rows, np.tile(given.rows, repeats)]),
        np.concatenate([mined.nearest, np.tile(given.nearest, (repeats, 1))]),
    )


def _mixed_pairs(vectors: NDArray[np.float32], mined: Pairs, given: Neighbours) -> Pairs:
    repeats = _repeats(len(mined.query_rows), len(given.rows))
    return Pairs(
        vectors,
        vectors,
        np.concatenate([mined.query_rows, np.tile(given.rows, repeats)]),
        np.concatenate([mined.document_rows, np.tile(given.nearest[:, 0], repeats)]),
    )


def _repeats(mined: int, given: int) -> int:
    return max(1, min(MOST_REPEATS, mined // given))
