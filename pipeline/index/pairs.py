"""Pairs of queries and documents that they want, as vectors: documents are looked up by name, bucket by bucket.

Of a document in several chunks, a query wants the one nearest to it.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import FileRef, StageOutput
from pipeline.index.binarizers import PAIR_COLUMNS
from pipeline.index.vectors import VectorSource, iterate_vectors
from pipeline.storage import Store
from pipeline.tables import read_columns, to_matrix, vector_array, write_table

__all__ = ["find_wanted", "gather_pairs", "write_wanted"]

WANTED = pa.schema(
    [pa.field("query", pa.int32(), nullable=False), pa.field("doc_id", pa.string(), nullable=False)]
)
"""A pair: row of the query's vector, name of the document."""


def write_wanted(store: Store, queries: Sequence[int], doc_ids: Sequence[str]) -> FileRef:
    """Put pairs, (p,) rows of query vectors and (p,) names of documents, where every task can read them."""
    return write_table(store, "scratch/wanted", WANTED, [pa.table([queries, doc_ids], schema=WANTED)])


def find_wanted(
    store: Store, source: VectorSource, bucket: int, *, queries: FileRef, wanted: FileRef
) -> StageOutput:
    """Vectors of the wanted documents that lie in one bucket.

    Args:
        store: The root.
        source: Live documents and their vectors.
        bucket: Bucket of text hashes.
        queries: Query vectors, column `embedding`.
        wanted: File of `write_wanted`.

    Returns:
        File `found`: pair, product, embedding; of each pair at most one row.
    """
    table, asking = read_columns(store, wanted.path), _vectors(store, queries)
    best = _Nearest(table.num_rows, source.cache.dims)
    query_rows = table["query"].to_numpy()
    pairs_of: dict[str, list[int]] = {}
    for pair, name in enumerate(table["doc_id"].to_pylist()):
        pairs_of.setdefault(name, []).append(pair)
    for rows, vectors in iterate_vectors(store, source, bucket, only=pa.array(pairs_of, pa.string())):
        for name, vector in zip(rows["doc_id"].to_pylist(), vectors, strict=True):
            pairs = np.array(pairs_of[name])
            products = asking[query_rows[pairs]] @ vector
            best.offer(pairs, products, np.broadcast_to(vector, (len(pairs), len(vector))))
    found = best.found
    columns = {
        "pair": pa.array(found, pa.int32()),
        "product": pa.array(best.products[found]),
        "embedding": vector_array(best.vectors[found]),
    }
    table = pa.table(columns)
    ref = write_table(store, "scratch/found", table.schema, [table])
    return StageOutput(files={"found": ref}, numbers={"rows": ref.rows})


def gather_pairs(store: Store, *, queries: FileRef, wanted: FileRef, found: Sequence[FileRef]) -> StageOutput:
    """Pairs whose document is in the corpus.

    Args:
        store: The root.
        queries: Query vectors, column `embedding`.
        wanted: File of `write_wanted`.
        found: Files of `find_wanted`, in the order of the buckets.

    Returns:
        File `pairs`: vectors of the query and of the document, float32, in the order of the wanted ones; number `pairs`.
    """
    asking = _vectors(store, queries)
    query_rows = read_columns(store, wanted.path, ["query"])["query"].to_numpy()
    best = _Nearest(len(query_rows), asking.shape[1])
    for ref in found:
        if ref.rows:
            table = read_columns(store, ref.path)
            best.offer(table["pair"].to_numpy(), table["product"].to_numpy(), to_matrix(table["embedding"]))
    kept = best.found
    vectors = (asking[query_rows[kept]], best.vectors[kept])
    table = pa.table(dict(zip(PAIR_COLUMNS, map(vector_array, vectors), strict=True)))
    ref = write_table(store, "scratch/pairs", table.schema, [table])
    return StageOutput(files={"pairs": ref}, numbers={"pairs": ref.rows})


def _vectors(store: Store, ref: FileRef) -> NDArray[np.float32]:
    return to_matrix(read_columns(store, ref.path, ["embedding"])["embedding"]).astype(np.float32)


class _Nearest:
    """Of each pair, the nearest chunk of its document so far."""

    def __init__(self, pairs: int, dims: int) -> None:
        self.products = np.full(pairs, -np.inf, np.float32)
        self.vectors = np.zeros((pairs, dims), np.float32)

    @property
    def found(self) -> NDArray[np.intp]:
        """Pairs that have one."""
        return np.flatnonzero(np.isfinite(self.products))

    def offer(
        self, pairs: NDArray[np.integer], products: NDArray[np.floating], vectors: NDArray[np.floating]
    ) -> None:
        """(p,) distinct pairs, their products with a chunk each, (p, d) the chunks; of equal ones the first stays."""
        nearer = products > self.products[pairs]
        self.products[pairs[nearer]] = products[nearer]
        self.vectors[pairs[nearer]] = vectors[nearer]
