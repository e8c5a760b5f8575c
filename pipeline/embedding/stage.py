"""The embedding cache: a text is encoded once per encoder, ever.

    embeddings/<encoder>/cache.json                  dims and number of buckets, fixed by the first run
    embeddings/<encoder>/<bucket>/<hash>.parquet     text_hash, embedding; sorted by text_hash
    embeddings/<encoder>/<bucket>/log/<seq>.json     which files count

`plan_units` finds the texts of one bucket that have no vector yet and cuts them into units; `encode_unit` encodes one;
`store_given` adds ready-made vectors; `CachedBucket` fetches vectors by text hash. Whatever crashes, only units in
flight are encoded again.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import FORMAT_VERSION, FileRef, StageOutput
from pipeline.embedding.encoder import TextEncoder
from pipeline.errors import CorruptArtifactError, MissingFileError
from pipeline.schemas import TEXT_HASH, embeddings_schema
from pipeline.storage import Log, Store, canonical_json
from pipeline.tables import RawFile, hash_keys, read_bucket, read_columns, vector_array, write_table

__all__ = [
    "Cache",
    "CachedBucket",
    "bucket_count",
    "cached_bytes",
    "encode_unit",
    "open_cache",
    "plan_units",
    "store_given",
    "text_bucket_count",
]

ROWS_PER_BUCKET = 65_536
MAX_BUCKETS = 4096
GIVEN_FILE_ROWS = 16_384
"""Rows of one file of ready-made vectors."""
REQUESTS_AT_ONCE = 16
"""Reads of small log entries wait for the store, not for the processor."""

UNIT_SCHEMA = pa.schema(
    [pa.field("text_hash", TEXT_HASH, nullable=False), pa.field("text", pa.string(), nullable=False)]
)


@dataclass(frozen=True)
class Cache:
    """Vectors of one encoder."""

    folder: str
    buckets: int
    dims: int

    def bucket_folder(self, bucket: int) -> str:
        """Folder of one bucket."""
        return f"{self.folder}/{bucket:04d}"

    def log(self, store: Store, bucket: int) -> Log:
        """The log of one bucket."""
        return Log(store, f"{self.bucket_folder(bucket)}/log")


def text_bucket_count(rows: int) -> int:
    """Power of two that gives a bucket at most ROWS_PER_BUCKET of the rows."""
    return min(MAX_BUCKETS, 1 << max(0, -(-rows // ROWS_PER_BUCKET) - 1).bit_length())


def bucket_count(store: Store, encoder: str, rows: int) -> int:
    """Buckets that the cache of an encoder has, or that a first run on `rows` rows would give it."""
    try:
        return int(json.loads(store.read(f"embeddings/{encoder}/cache.json"))["buckets"])
    except MissingFileError:
        return text_bucket_count(rows)


def open_cache(store: Store, encoder: str, *, dims: int, rows: int) -> Cache:
    """The cache of an encoder; the first run fixes the number of buckets.

    Args:
        store: The root.
        encoder: Fingerprint of the encoder.
        dims: Width of its vectors.
        rows: Rows of the corpus now.

    Raises:
        CorruptArtifactError: The cache holds vectors of another width.
    """
    folder = f"embeddings/{encoder}"
    path = f"{folder}/cache.json"
    wanted = {"format": FORMAT_VERSION, "dims": dims, "buckets": text_bucket_count(rows)}
    if store.put_if_absent(path, canonical_json(wanted)):
        return Cache(folder, wanted["buckets"], dims)
    found = json.loads(store.read(path))
    if found["dims"] != dims:
        problem = f"expected vectors of {dims} dimensions, found {found['dims']}"
        raise CorruptArtifactError(f"{store.uri}/{path}", problem, "use another root, or delete this folder")
    return Cache(folder, int(found["buckets"]), dims)


def cached_bytes(store: Store, encoder: str) -> int:
    """Bytes of all vectors in the cache of an encoder, by its logs; 0 where there is no cache."""
    try:
        found = json.loads(store.read(f"embeddings/{encoder}/cache.json"))
    except MissingFileError:
        return 0
    cache = Cache(f"embeddings/{encoder}", int(found["buckets"]), int(found["dims"]))
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        entries = pool.map(lambda bucket: cache.log(store, bucket).entries(), range(cache.buckets))
        sizes = {e["file"]["path"]: int(e["file"]["bytes"]) for bucket in entries for e in bucket}
    return sum(sizes.values())


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
        Files `unit-000000`, … to encode; numbers: texts (distinct), missing.
    """
    table, missing = _missing(store, cache, bucket, texts, "text")
    units = [missing.slice(start, unit_texts) for start in range(0, missing.num_rows, unit_texts)]
    files = {
        f"unit-{i:06d}": write_table(store, "scratch/units", UNIT_SCHEMA, [unit])
        for i, unit in enumerate(units)
    }
    return StageOutput(files=files, numbers={"texts": table.num_rows, "missing": missing.num_rows})


def store_given(store: Store, cache: Cache, bucket: int, texts: Sequence[FileRef]) -> StageOutput:
    """Add the ready-made vectors of one bucket that the cache has not yet; arguments as `plan_units`."""
    table, missing = _missing(store, cache, bucket, texts, "embedding")
    starts = range(0, missing.num_rows, GIVEN_FILE_ROWS)
    files = {
        f"given-{i:06d}": _add(store, cache, bucket, missing.slice(a, GIVEN_FILE_ROWS))
        for i, a in enumerate(starts)
    }
    return StageOutput(files=files, numbers={"texts": table.num_rows, "missing": missing.num_rows})


def encode_unit(
    store: Store, encoder: TextEncoder, *, cache: Cache, bucket: int, unit: FileRef
) -> StageOutput:
    """Encode the texts of one unit and add them to the cache.

    Args:
        store: The root.
        encoder: The encoder in force.
        cache: Its cache.
        bucket: The unit's bucket.
        unit: File of `plan_units`.
    """
    table = read_columns(store, unit.path)
    vectors = encoder.encode_documents(table["text"].to_pylist())
    done = pa.table(
        {"text_hash": table["text_hash"], "embedding": vector_array(vectors.astype(np.float32, copy=False))}
    )
    return StageOutput(
        files={"embeddings": _add(store, cache, bucket, done)}, numbers={"encoded": table.num_rows}
    )


class CachedBucket:
    """Vectors of one bucket by text hash; opens the bucket's files once.

    Args:
        store: The root.
        cache: The encoder's cache.
        bucket: Bucket of text hashes.
    """

    def __init__(self, store: Store, cache: Cache, bucket: int) -> None:
        self._place = f"{store.uri}/{cache.bucket_folder(bucket)}"
        self._dims = cache.dims
        self._files = [(file, _raw_keys(file)) for file in _files(store, cache, bucket)]

    @property
    def keys(self) -> NDArray[np.bytes_]:
        """(n,) S16 hashes of the texts that have a vector."""
        return np.concatenate([np.zeros(0, "S16"), *(keys for _, keys in self._files)])

    def read(self, hashes: NDArray[np.bytes_]) -> NDArray[np.float32]:
        """Vectors of texts.

        Args:
            hashes: (n,) S16, sorted and distinct.

        Returns:
            (n, d) float32.

        Raises:
            CorruptArtifactError: A text has no vector.
        """
        vectors = np.empty((len(hashes), self._dims), dtype=np.float32)
        absent = np.ones(len(hashes), dtype=bool)
        for file, keys in self._files:
            places = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
            here = absent & (keys[places] == hashes)
            if here.any():
                first, last = int(places[here].min()), int(places[here].max()) + 1
                vectors[here] = file.read("embedding", [(first, last)])[0].view(np.float32)[
                    places[here] - first
                ]
                absent &= ~here
        if absent.any():
            raise CorruptArtifactError(
                self._place, f"{int(absent.sum())} texts have no vector", "rerun `strata run`"
            )
        return vectors


def _missing(
    store: Store, cache: Cache, bucket: int, texts: Sequence[FileRef], column: str
) -> tuple[pa.Table, pa.Table]:
    """Distinct texts of a bucket, sorted by hash, and those of them without a vector."""
    pieces = [read_bucket(store, ref.path, bucket, ["text_hash", column]) for ref in texts]
    table = _first_of_each(pa.concat_tables(pieces))
    known = CachedBucket(store, cache, bucket).keys
    return table, table.filter(pa.array(~np.isin(hash_keys(table["text_hash"]), known)))


def _add(store: Store, cache: Cache, bucket: int, table: pa.Table) -> FileRef:
    """Write vectors and append the file to the bucket's log."""
    ref = write_table(store, cache.bucket_folder(bucket), embeddings_schema(cache.dims), [table])
    log, entry = cache.log(store, bucket), {"file": ref.model_dump(mode="json")}
    seq = log.newest() + 1
    while not log.append(seq, entry):
        seq += 1
    return ref


def _files(store: Store, cache: Cache, bucket: int) -> Iterator[RawFile]:
    """Files that the log names; one that is gone or cut short holds no vectors, and its texts are encoded again."""
    refs = {
        entry["file"]["path"]: FileRef.model_validate(entry["file"])
        for entry in cache.log(store, bucket).entries()
    }
    for ref in refs.values():
        with contextlib.suppress(MissingFileError):
            if store.head(ref.path).size == ref.bytes:
                yield RawFile(store, ref, ["text_hash", "embedding"])


def _raw_keys(file: RawFile) -> NDArray[np.bytes_]:
    return np.ascontiguousarray(file.read_all("text_hash")).view("S16").reshape(-1)


def _first_of_each(table: pa.Table) -> pa.Table:
    """One row per text_hash, sorted by it."""
    table = table.take(pc.sort_indices(table, sort_keys=[("text_hash", "ascending")]))
    keys = hash_keys(table["text_hash"])
    return table.filter(pa.array(_starts_a_run(keys)))


def _starts_a_run(keys: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    return first
