"""A graph over many heads, which finds the nearest without measuring all: FAISS's HNSW. Arrays in, arrays out; bytes at rest."""

from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

__all__ = ["EXACT_HEADS", "LINK_BYTES", "HeadGraph"]

EXACT_HEADS = 16_384
"""Heads up to which all are measured: 25 MB at 384 dimensions, 1.5 ms a query on one core."""
LINKS, BUILD_DEPTH = 32, 128
"""Of a head on the lower level, twice as many; candidates of a new head."""
LINK_BYTES = 4 * 2 * LINKS + 32
"""Of a head in memory, beside its vector: links of the lowest level, its number, and what tells where these are."""
SEARCH_DEPTH = 4
"""Candidates of a search, in units of the heads asked for: a list missed here is missed for good."""


class HeadGraph:
    """The nearest heads of queries by HNSW.

    Heads go in in random order: Elliott and Clark (arXiv 2405.17813) found recall to move by up to 12 points with the order
    alone, and storage order, where neighbours come together, to be among the worst.

    Args:
        index: Of the heads, by their numbers.
    """

    def __init__(self, index: faiss.IndexIDMap) -> None:
        self._index = index

    @classmethod
    def build(cls, heads: NDArray[np.float32]) -> "HeadGraph":
        """A graph over (num_lists, d) heads; with one thread, the same heads give the same bytes."""
        graph = faiss.IndexHNSWFlat(heads.shape[1], LINKS)
        graph.hnsw.efConstruction = BUILD_DEPTH
        index, order = faiss.IndexIDMap(graph), np.random.default_rng(len(heads)).permutation(len(heads))
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            index.add_with_ids(np.ascontiguousarray(heads[order]), order)
        finally:
            faiss.omp_set_num_threads(threads)
        return cls(index)

    @classmethod
    def from_bytes(cls, data: bytes) -> "HeadGraph":
        """What `write` wrote."""
        return cls(faiss.deserialize_index(np.frombuffer(data, np.uint8)))  # type: ignore[arg-type]  # of the type that was written

    def write(self, path: Path) -> None:
        """For storage, as FAISS's IndexIDMap over IndexHNSWFlat: the heads are in it.

        Raises:
            OSError: The disk fails.
        """
        path.write_bytes(faiss.serialize_index(self._index).tobytes())

    def nearest(
        self, queries: NDArray[np.float32], count: int, among: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Numbers and squared L2 distances of the nearest heads, nearest first.

        Args:
            queries: (q, d) float32.
            count: Heads per query, at most those there are.
            among: (num_lists,) which heads count; None: all.

        Returns:
            (q, count) each; -1 and infinity where the graph ends.
        """
        depth = max(64, SEARCH_DEPTH * count)
        parameters = faiss.SearchParametersHNSW(efSearch=depth)  # type: ignore[attr-defined]  # not in the stub
        if among is not None:
            bits = np.packbits(among, bitorder="little")
            parameters.sel = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]  # wrapped
        distances, numbers = self._index.search(queries, count, params=parameters)
        return numbers, np.where(numbers >= 0, distances, np.inf).astype(np.float32)
