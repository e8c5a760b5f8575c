"""Rows that are in no index because their text cannot be encoded: where they stand in the corpus, and why."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import FileRef, Plan, StageOutput
from pipeline.corpus.identity import DOC_HASH_BYTES, bucket_of, hash_matrix, sort_keys, vector_ids
from pipeline.corpus.stage import read_dead_letters
from pipeline.embedding.cache import Cache, CachedBucket
from pipeline.schemas import DEAD_LETTERS, FILE_NO, VECTOR_ID, condemned_schema
from pipeline.storage import Store
from pipeline.tables import RawFile, read_bucket, read_columns, write_table

__all__ = ["count_condemned", "drop_condemned", "letters_of", "list_condemned"]

FOLDER, LETTERS_FOLDER = "condemned", "dead_letters"
ENCODE = "encode"
"""Stage of these dead letters."""


def list_condemned(
    store: Store,
    *,
    cache: Cache,
    bucket: int,
    texts: Sequence[FileRef],
    documents: Sequence[FileRef],
    places: Sequence[FileRef],
    plan: Plan,
) -> StageOutput:
    """Rows of one bucket of texts whose text is condemned.

    Args:
        store: The root.
        cache: The encoder's cache.
        bucket: Bucket of text hashes.
        texts: Files of the document shuffle that hold texts by bucket.
        documents: One file per document bucket, in bucket order.
        places: Beside each of them, where its rows stand in the corpus.
        plan: The frozen plan.

    Returns:
        Files `condemned` (condemned_schema, sorted by vector_id: the same whoever found them when) and `dead_letters`,
        if there are such rows.
    """
    condemned = CachedBucket(store, cache, bucket).condemned
    columns = ["vector_id", "doc_id", "chunk_no", "text_hash"]
    rows = pa.concat_tables([read_bucket(store, ref.path, bucket, columns) for ref in texts])
    rows = rows.filter(pc.is_in(rows["text_hash"], condemned["text_hash"].combine_chunks()))
    if rows.num_rows == 0:
        return StageOutput(files={})
    rows = rows.take(pa.array(np.argsort(sort_keys(hash_matrix(rows["vector_id"])), kind="stable")))
    places_in_corpus = _Places(store, documents, places).of(hash_matrix(rows["vector_id"]))
    listed = rows.select(["vector_id", "text_hash"]).append_column(
        "chunks", pa.array(places_in_corpus.chunks)
    )
    why = condemned.take(pc.index_in(rows["text_hash"], condemned["text_hash"].combine_chunks()))
    letters = _letters(rows, places_in_corpus, why, plan)
    schema = condemned_schema()
    return StageOutput(
        files={
            "condemned": write_table(store, FOLDER, schema, [listed.cast(schema)]),
            "dead_letters": write_table(store, LETTERS_FOLDER, DEAD_LETTERS, [letters]),
        },
        numbers={"rows": rows.num_rows},
    )


class _InCorpus(NamedTuple):
    """Where rows stand."""

    file_no: NDArray[np.int32]
    """(n,) of the plan."""
    row: NDArray[np.int64]
    chunks: NDArray[np.int32]
    """(n,) of the document, this one among them."""


def _letters(rows: pa.Table, places: _InCorpus, why: pa.Table, plan: Plan) -> pa.Table:
    """Dead letters of condemned rows, as DEAD_LETTERS."""
    columns = {
        "file": [plan.files[n].path for n in places.file_no],
        "row": places.row,
        "doc_id": rows["doc_id"],
        "stage": [ENCODE] * rows.num_rows,
        "reason": why["reason"],
        "chunk_no": rows["chunk_no"],
        "text_hash_hex": [value.hex() for value in rows["text_hash"].to_pylist()],
        "attempts": why["attempts"],
        "error": why["error"],
    }
    return pa.table(columns, schema=DEAD_LETTERS)


def letters_of(store: Store, letters: Sequence[str], condemned: Sequence[FileRef]) -> tuple[FileRef, ...]:
    """Dead letters of condemned rows that nobody tries again.

    Args:
        store: The root.
        letters: Paths of the dead letters of an earlier release.
        condemned: Files of condemned rows.

    Returns:
        A file of those letters, if there is any.
    """
    rows = [hash_matrix(read_columns(store, ref.path, ["vector_id"])["vector_id"]) for ref in condemned]
    wanted = sort_keys(np.concatenate([np.zeros((0, VECTOR_ID.byte_width), np.uint8), *rows]))
    if not len(wanted):
        return ()
    table = read_dead_letters(store, [FileRef(path=path, rows=0, bytes=0, sha256="") for path in letters])
    table = table.filter(pc.equal(table["stage"], ENCODE))
    ids = vector_ids(table["doc_id"].combine_chunks(), table["chunk_no"].to_numpy())
    found = table.filter(pa.array(np.isin(sort_keys(ids), wanted)))
    return (write_table(store, LETTERS_FOLDER, DEAD_LETTERS, [found]),) if found.num_rows else ()


def count_condemned(store: Store, files: Sequence[FileRef]) -> tuple[int, int]:
    """Rows that are condemned, and documents of which every row is.

    Args:
        store: The root.
        files: `condemned` of every bucket.
    """
    tables = [read_columns(store, ref.path, ["vector_id", "chunks"]) for ref in files]
    if not tables:
        return 0, 0
    table = pa.concat_tables(tables)
    documents = sort_keys(hash_matrix(table["vector_id"])[:, :DOC_HASH_BYTES])
    _, first, counts = np.unique(documents, return_index=True, return_counts=True)
    return table.num_rows, int((counts == table["chunks"].to_numpy()[first]).sum())


def drop_condemned(table: pa.Table, condemned: pa.Table, *, by: str = "vector_id") -> pa.Table:
    """Rows of a table that are not listed as condemned.

    Args:
        table: Rows with the column `by`.
        condemned: Rows of condemned_schema.
        by: vector_id, or text_hash.
    """
    if condemned.num_rows == 0:
        return table
    return table.filter(pc.invert(pc.is_in(table[by], condemned[by].combine_chunks())))


class _Places:
    """Where rows of documents stand in the corpus; opens the files of one document bucket after the other."""

    def __init__(self, store: Store, documents: Sequence[FileRef], places: Sequence[FileRef]) -> None:
        self._store, self._documents, self._places = store, documents, places

    def of(self, ids: NDArray[np.uint8]) -> _InCorpus:
        """Places of vector ids, (n, 16), that are there."""
        count = len(ids)
        found = _InCorpus(np.zeros(count, np.int32), np.zeros(count, np.int64), np.zeros(count, np.int32))
        buckets = bucket_of(ids, len(self._documents))
        for bucket in np.unique(buckets):
            here = np.flatnonzero(buckets == bucket)
            known = RawFile(self._store, self._documents[bucket], ["vector_id"]).read_all("vector_id")
            at = np.searchsorted(sort_keys(known), sort_keys(ids[here]))
            places = read_columns(self._store, self._places[bucket].path)
            found.file_no[here] = places[FILE_NO].to_numpy()[at]
            found.row[here] = places["row"].to_numpy()[at]
            names, wanted = (sort_keys(matrix[:, :DOC_HASH_BYTES]) for matrix in (known, ids[here]))
            first, after = (np.searchsorted(names, wanted, side=side) for side in ("left", "right"))
            found.chunks[here] = after - first
        return found
