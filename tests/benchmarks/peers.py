"""FAISS's quantizers on the same vectors: what a user would otherwise take for codes of a given size."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

FULL_TRAINING = "STRATA_BENCHMARK_FULL_TRAINING"
"""Environment variable; set, product quantizers are trained as FAISS does by itself, OPQ for minutes at each size."""
PQ_ROWS, PQ_ITERATIONS = 10_000, 8
"""Without it. FAISS's defaults are 65,536 rows and 25 iterations of k-means."""
OPQ_ITERATIONS, OPQ_PQ_ITERATIONS = 2, 5
"""As little as leaves OPQ of any use. FAISS's defaults are 50 iterations, each with 4 of k-means, and 40 to start."""
FIXED = ("RaBitQ", "RR384,RaBitQ2", "RR384,RaBitQ4", "SQ4", "SQ6", "SQ8")
"""Quantizers whose size follows from the vectors' 384 dimensions."""
PRODUCT = {
    48: ("PQ48", "PQ64", "OPQ48,PQ48", "OPQ60_360,PQ60"),
    96: ("PQ96", "PQ128", "OPQ96,PQ96", "OPQ120_360,PQ120"),
    192: ("PQ192", "OPQ192,PQ192"),
}
"""Product quantizers by our code bytes: of just these, which tells fitting times of equal size; the largest up to 1.2 times ours; and
the nearest that is not smaller than ours with factor and offset. 384 dimensions have none between 192 and 384 bytes."""
MIN_DIMS = 128
"""Principal components, at least, in the grid. Below, the missing ones cost more than bits bring: package summaries, recall
10@10, `PCAR104,RaBitQ3` (59 bytes) .604, `PCAR168,RaBitQ2` (62 bytes) .691."""
MAX_BITS = 6
"""Of RaBitQ in the grid. At 200 bytes 5 bits of 288 dimensions find more than 6 of 240 already: dictionary glosses, .964 and .938."""
QUERY_BITS = 8
"""Of a RaBitQ query; FAISS's default, 0, is a float query: 250 s instead of 1.2 s, and the same recall (.6649 and .6651)."""


@dataclass(frozen=True)
class Peer:
    """A FAISS quantizer on one set of vectors."""

    factory: str
    num_bytes: int
    """Per vector, with the factors that FAISS stores beside the code."""
    train_rows: int
    fit_s: float
    found: NDArray[np.int64]
    """(q, 100) places, nearest first."""


def measured(
    factory: str, sample: NDArray[np.float32], base: NDArray[np.float32], queries: NDArray[np.float32]
) -> Peer:
    """Train an index on the sample, fill it with the base and search it, by L2 distance of unit vectors."""
    index = faiss.index_factory(base.shape[1], factory, faiss.METRIC_L2)
    quantizer = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    rows = sample
    if "PQ" in factory:
        rows = _limited(index, quantizer, sample, base)
    if "RaBitQ" in factory:
        quantizer.qb = QUERY_BITS
    start = time.perf_counter()
    index.train(rows)
    fit_s = time.perf_counter() - start
    index.add(base)
    _, found = index.search(queries, 100)
    return Peer(factory, quantizer.code_size, len(rows), fit_s, found)


def fit_seconds(factory: str, sample: NDArray[np.float32]) -> float:
    """Time to train a product quantizer with FAISS's own numbers of iterations, without its order for Hamming distances."""
    index = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_L2)
    faiss.downcast_index(index.index).do_polysemous_training = False
    start = time.perf_counter()
    index.train(sample)
    return time.perf_counter() - start


def _limited(
    index: faiss.Index, quantizer: faiss.IndexPQ, sample: NDArray[np.float32], base: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Vectors to train a product quantizer on, after its number of iterations is set."""
    # It orders centroids for Hamming distances, which are not asked for; measured, it takes most of OPQ's time.
    quantizer.do_polysemous_training = False
    if FULL_TRAINING in os.environ:
        return base
    quantizer.pq.cp.niter = PQ_ITERATIONS
    if isinstance(index, faiss.IndexPreTransform):
        opq = faiss.downcast_VectorTransform(index.chain.at(0))
        opq.niter, opq.niter_pq, opq.niter_pq_0 = OPQ_ITERATIONS, OPQ_PQ_ITERATIONS, OPQ_PQ_ITERATIONS
    return sample[:PQ_ROWS]


def grid(num_bytes: int, *, most: float, dims: int) -> Iterator[str]:
    """`PCAR{n},RaBitQ{b}` and `PCAR{n},SQ{b}`: for each b the fewest n not smaller than a size, and the most within `most` times it."""
    for kind, all_bits in (("RaBitQ", range(1, MAX_BITS + 1)), ("SQ", (4, 6, 8))):
        for bits in all_bits:
            sizes = {n: _bytes(kind, bits, n) for n in range(MIN_DIMS, dims + 1, 8)}
            fitting = [n for n, size in sizes.items() if num_bytes <= size <= most * num_bytes]
            for n in sorted({min(fitting), max(fitting)}) if fitting else ():
                yield f"PCAR{n},{kind}{bits}"


def _bytes(kind: str, bits: int, dims: int) -> int:
    index = faiss.index_factory(dims, f"{kind}{bits}", faiss.METRIC_L2)
    return int(index.code_size)
