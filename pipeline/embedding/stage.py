"""Filling the embedding cache, task by task.

`plan_units` finds the texts of one bucket that have no vector yet and cuts them into units; `encode_unit` encodes one;
`condemn` stands for one that could not; `store_given` adds ready-made vectors. Whatever crashes, only units in flight are
encoded again.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.artifacts import FileRef, StageOutput
from pipeline.embedding.bisecting import Condemned, encode_around
from pipeline.embedding.cache import Cache, CachedBucket, add_condemned, add_vectors, first_of_each
from pipeline.embedding.encoder import TextEncoder
from pipeline.schemas import TEXT_HASH
from pipeline.storage import Store
from pipeline.tables import hash_keys, read_bucket, read_columns, vector_array, write_table

__all__ = ["condemn", "encode_unit", "plan_units", "store_given"]

GIVEN_FILE_ROWS = 16_384
"""Rows of one file of ready-made vectors."""

UNIT_SCHEMA = pa.schema(
    [pa.field("text_hash", TEXT_HASH, nullable=False), pa.field("text", pa.string(), nullable=False)]
)


def plan_units(
    store: Store, cache: Cache, bucket: int, texts: Sequence[FileRef], *, unit_texts: int
) -> StageOutput:
    """Cut the texts of one bucket that have no vector into units of work.

    Args:
        store: The root.
        cache: The encoder's cache.
        bucket: Bucket of text hashes.
        texts: Files of the document shuffle that hold texts by bucket.
        unit_texts: Texts of one unit.

    Returns:
        Files `unit-000000`, … to encode; numbers: texts (distinct), missing, condemned (which no unit holds).
    """
    table, missing, condemned = _missing(store, cache, bucket, texts, "text")
    units = [missing.slice(start, unit_texts) for start in range(0, missing.num_rows, unit_texts)]
    files = {
        f"unit-{i:06d}": write_table(store, "scratch/units", UNIT_SCHEMA, [unit])
        for i, unit in enumerate(units)
    }
    numbers = {"texts": table.num_rows, "missing": missing.num_rows, "condemned": condemned}
    return StageOutput(files=files, numbers=numbers)


def store_given(store: Store, cache: Cache, bucket: int, texts: Sequence[FileRef]) -> StageOutput:
    """Add the ready-made vectors of one bucket that the cache has not yet; arguments as `plan_units`."""
    table, missing, _ = _missing(store, cache, bucket, texts, "embedding")
    starts = range(0, missing.num_rows, GIVEN_FILE_ROWS)
    files = {
        f"given-{i:06d}": add_vectors(store, cache, bucket, missing.slice(a, GIVEN_FILE_ROWS))
        for i, a in enumerate(starts)
    }
    return StageOutput(files=files, numbers={"texts": table.num_rows, "missing": missing.num_rows})


def encode_unit(
    store: Store,
    encoder: TextEncoder,
    *,
    cache: Cache,
    bucket: int,
    unit: FileRef,
    rows: tuple[int, int] | None = None,
) -> StageOutput:
    """Encode the texts of one unit and add them to the cache; those that the encoder fails on are condemned.

    Args:
        store: The root.
        encoder: The encoder in force.
        cache: Its cache.
        bucket: The unit's bucket.
        unit: File of `plan_units`.
        rows: Rows [start, stop) of the unit; absent: all.

    Returns:
        Files `embeddings` and `condemned`, where there are such texts; numbers encoded, condemned.
    """
    table = _rows_of(store, unit, rows)
    vectors, failed = encode_around(encoder.encode_documents, table["text"].to_pylist(), dims=cache.dims)
    is_good = np.ones(table.num_rows, dtype=bool)
    is_good[[found.row for found in failed]] = False
    files = {}
    if is_good.any():
        hashes = table["text_hash"].filter(pa.array(is_good))
        done = pa.table({"text_hash": hashes, "embedding": vector_array(vectors[is_good])})
        files["embeddings"] = add_vectors(store, cache, bucket, done)
    if failed:
        files["condemned"] = add_condemned(store, cache, bucket, table["text_hash"], failed)
    return StageOutput(files=files, numbers={"encoded": int(is_good.sum()), "condemned": len(failed)})


def condemn(  # noqa: PLR0913  (which texts, and what is known of them)
    store: Store,
    *,
    cache: Cache,
    bucket: int,
    unit: FileRef,
    rows: tuple[int, int],
    reason: str,
    attempts: int,
    error: str,
) -> StageOutput:
    """Condemn rows [start, stop) of a unit, as `encode_unit` would if it could come back from what they do to it."""
    table = _rows_of(store, unit, rows)
    found = [Condemned(row, reason, attempts, error) for row in range(table.num_rows)]
    ref = add_condemned(store, cache, bucket, table["text_hash"], found)
    return StageOutput(files={"condemned": ref}, numbers={"encoded": 0, "condemned": table.num_rows})


def _rows_of(store: Store, unit: FileRef, rows: tuple[int, int] | None) -> pa.Table:
    table = read_columns(store, unit.path)
    start, stop = rows if rows is not None else (0, table.num_rows)
    return table.slice(start, stop - start)


def _missing(
    store: Store, cache: Cache, bucket: int, texts: Sequence[FileRef], column: str
) -> tuple[pa.Table, pa.Table, int]:
    """Distinct texts of a bucket, sorted by hash; those of them to be encoded; the number that is condemned."""
    pieces = [read_bucket(store, ref.path, bucket, ["text_hash", column]) for ref in texts]
    table = first_of_each(pa.concat_tables(pieces))
    cached = CachedBucket(store, cache, bucket)
    missing = table.filter(pa.array(~np.isin(hash_keys(table["text_hash"]), cached.keys)))
    is_condemned = np.isin(hash_keys(missing["text_hash"]), hash_keys(cached.condemned["text_hash"]))
    return table, missing.filter(pa.array(~is_condemned)), int(is_condemned.sum())
