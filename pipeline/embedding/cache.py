"""The embedding cache: a text is encoded once per encoder, ever.

    embeddings/<encoder>/cache.json                  dims and number of buckets, fixed by the first run
    embeddings/<encoder>/<bucket>/<hash>.parquet     text_hash, embedding; sorted by text_hash
    embeddings/<encoder>/<bucket>/<hash>.condemned.parquet     texts that cannot be encoded, and why
    embeddings/<encoder>/<bucket>/log/<seq>.json     which files count
    embeddings/<encoder>/redrives/<seq>.json         condemnations that are forgotten from then on; <seq>.done.json: the
                                                     run that followed came to its end

`CachedBucket` fetches vectors by text hash. Whatever crashes, what a log names counts, and nothing else.

A text that cannot be encoded is condemned: no run tries it again until a redrive forgets that. A condemnation says after how
many redrives it was made, so that one append to one log forgets all earlier ones, and a slow worker of an older run
condemns nothing that was redriven meanwhile.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import FORMAT_VERSION, FileRef
from pipeline.embedding.bisecting import Condemned
from pipeline.errors import CorruptArtifactError, MissingFileError
from pipeline.schemas import TEXT_HASH, embeddings_schema
from pipeline.storage import Log, Store, canonical_json, exists, is_whole, side_by_side
from pipeline.tables import RawFile, hash_keys, read_columns, write_table

__all__ = [
    "Cache",
    "CachedBucket",
    "Redrives",
    "add_condemned",
    "add_vectors",
    "bucket_count",
    "cached_bytes",
    "condemned_texts",
    "find_cache",
    "finish_redrive",
    "first_of_each",
    "forget_condemned",
    "is_redrive_finished",
    "open_cache",
    "read_redrives",
    "text_bucket_count",
]

ROWS_PER_BUCKET = 65_536
MAX_BUCKETS = 4096

CONDEMNED = pa.schema(
    [
        pa.field("text_hash", TEXT_HASH, nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)
"""Texts that cannot be encoded; `reason` is one of bisecting.REASONS."""

Redrives = tuple[tuple[str, ...], ...]
"""The reasons that each redrive forgot, oldest first; none: every reason."""


@dataclass(frozen=True)
class Cache:
    """Vectors of one encoder."""

    folder: str
    buckets: int
    dims: int
    redrives: Redrives = ()
    """As they were when the run began."""

    @property
    def encoder(self) -> str:
        """Fingerprint of the encoder."""
        return self.folder.rpartition("/")[2]

    @property
    def generation(self) -> int:
        """Redrives so far: keys what is tried again after one."""
        return len(self.redrives)

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
    cache = find_cache(store, encoder)
    return cache.buckets if cache is not None else text_bucket_count(rows)


def open_cache(store: Store, encoder: str, *, dims: int, rows: int, redrives: Redrives = ()) -> Cache:
    """The cache of an encoder; the first run fixes the number of buckets.

    Args:
        store: The root.
        encoder: Fingerprint of the encoder.
        dims: Width of its vectors.
        rows: Rows of the corpus now.
        redrives: Those that the caller knows of; what they forgot is not condemned.

    Raises:
        CorruptArtifactError: The cache holds vectors of another width.
    """
    folder = f"embeddings/{encoder}"
    path = f"{folder}/cache.json"
    wanted = {"format": FORMAT_VERSION, "dims": dims, "buckets": text_bucket_count(rows)}
    if store.put_if_absent(path, canonical_json(wanted)):
        return Cache(folder, wanted["buckets"], dims, redrives)
    found = json.loads(store.read(path))
    if found["dims"] != dims:
        problem = f"expected vectors of {dims} dimensions, found {found['dims']}"
        raise CorruptArtifactError(f"{store.uri}/{path}", problem, "use another root, or delete this folder")
    return Cache(folder, int(found["buckets"]), dims, redrives)


def find_cache(store: Store, encoder: str) -> Cache | None:
    """The cache of an encoder as it is; None before a first run."""
    folder = f"embeddings/{encoder}"
    try:
        found = json.loads(store.read(f"{folder}/cache.json"))
    except MissingFileError:
        return None
    return Cache(folder, int(found["buckets"]), int(found["dims"]), read_redrives(store, encoder))


def cached_bytes(store: Store, encoder: str) -> int:
    """Bytes of all vectors in the cache of an encoder, by its logs; 0 where there is no cache."""
    cache = find_cache(store, encoder)
    if cache is None:
        return 0
    entries = side_by_side(lambda bucket: cache.log(store, bucket).entries(), range(cache.buckets))
    files = [entry["file"] for bucket in entries for entry in bucket if "file" in entry]
    return sum({file["path"]: int(file["bytes"]) for file in files}.values())


# ------------------------------------------------------------------------------------------------ redrives


def condemned_texts(store: Store, cache: Cache) -> dict[int, pa.Table]:
    """By bucket, the texts that were condemned up to the redrives of this cache and not forgotten by them, as CONDEMNED.

    Those that got a vector since are among them. With an earlier state of the redrives, it is what the next one forgot.
    """

    def find(bucket: int) -> pa.Table:
        entries = cache.log(store, bucket).entries()
        known = [entry for entry in entries if entry.get("generation", 0) <= cache.generation]
        return _condemned(store, cache, known)

    return dict(enumerate(side_by_side(find, range(cache.buckets))))


def read_redrives(store: Store, encoder: str) -> Redrives:
    """The redrives of an encoder's cache so far."""
    return tuple(tuple(entry["reasons"]) for entry in _redrive_log(store, encoder).entries())


def forget_condemned(store: Store, encoder: str, *, after: Redrives, reasons: Sequence[str]) -> Redrives:
    """Forget condemnations, so that the next run tries their texts again; nothing is deleted.

    Args:
        store: The root.
        encoder: Fingerprint of the encoder.
        after: The redrives that the caller knows of; where another job began one meanwhile, the new one follows it.
        reasons: The reasons to forget; none: all.

    Returns:
        The redrives with the new one.
    """
    log = _redrive_log(store, encoder)
    entry = {"reasons": sorted(reasons)}
    seq = len(after) + 1
    while not log.append(seq, entry):
        seq += 1
    return read_redrives(store, encoder)


def finish_redrive(store: Store, encoder: str, number: int) -> None:
    """Record that the run after a redrive came to its end."""
    store.put_if_absent(_end_path(encoder, number), canonical_json({"state": "done"}))


def is_redrive_finished(store: Store, encoder: str, number: int) -> bool:
    """Whether the run after a redrive came to its end."""
    return exists(store, _end_path(encoder, number))


def _end_path(encoder: str, number: int) -> str:
    return f"embeddings/{encoder}/redrives/{number:08d}.done.json"


def _redrive_log(store: Store, encoder: str) -> Log:
    return Log(store, f"embeddings/{encoder}/redrives")


# ------------------------------------------------------------------------------------------------ buckets


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
        entries = cache.log(store, bucket).entries()
        self._files = [(file, _raw_keys(file)) for file in _files(store, entries)]
        self.condemned = self._without_vector(_condemned(store, cache, entries))
        """Texts that are condemned now, as CONDEMNED sorted by text_hash; none of them has a vector."""

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

    def _without_vector(self, table: pa.Table) -> pa.Table:
        return table.filter(pa.array(~np.isin(hash_keys(table["text_hash"]), self.keys)))


def add_vectors(store: Store, cache: Cache, bucket: int, table: pa.Table) -> FileRef:
    """Write vectors, columns text_hash and embedding sorted by text_hash, and append the file to the bucket's log."""
    ref = write_table(store, cache.bucket_folder(bucket), embeddings_schema(cache.dims), [table])
    _log(store, cache, bucket, {"file": ref.model_dump(mode="json")})
    return ref


def add_condemned(
    store: Store, cache: Cache, bucket: int, hashes: pa.ChunkedArray, failed: Sequence[Condemned]
) -> FileRef:
    """Write which rows of these hashes are condemned, and append the file to the bucket's log."""
    rows = pa.array([found.row for found in failed], pa.int64())
    columns = [[found[i] for found in failed] for i in (1, 2, 3)]
    table = pa.table([hashes.take(rows), *columns], schema=CONDEMNED)
    ref = write_table(store, cache.bucket_folder(bucket), CONDEMNED, [table], suffix=".condemned.parquet")
    _log(store, cache, bucket, {"condemned": ref.model_dump(mode="json"), "generation": cache.generation})
    return ref


def _log(store: Store, cache: Cache, bucket: int, entry: dict[str, Any]) -> None:
    log = cache.log(store, bucket)
    seq = log.newest() + 1
    while not log.append(seq, entry):
        seq += 1


def _files(store: Store, entries: Sequence[dict[str, Any]]) -> Iterator[RawFile]:
    """Files that the log names; one that is gone or cut short holds no vectors, and its texts are encoded again."""
    for ref in _named(entries, "file"):
        if is_whole(store, ref):
            yield RawFile(store, ref, ["text_hash", "embedding"])


def _condemned(store: Store, cache: Cache, entries: Sequence[dict[str, Any]]) -> pa.Table:
    """Condemnations that no redrive forgot; the latest of each text. A file that is gone condemns nothing."""
    tables = [CONDEMNED.empty_table()]
    for entry in reversed([entry for entry in entries if "condemned" in entry]):
        ref = FileRef.model_validate(entry["condemned"])
        later = cache.redrives[entry["generation"] :]
        if () not in later and is_whole(store, ref):
            table = read_columns(store, ref.path)
            forgotten = pa.array([reason for reasons in later for reason in reasons], pa.string())
            tables.append(table.filter(pc.invert(pc.is_in(table["reason"], forgotten))))
    return first_of_each(pa.concat_tables(tables))


def _named(entries: Sequence[dict[str, Any]], role: str) -> list[FileRef]:
    refs = {entry[role]["path"]: FileRef.model_validate(entry[role]) for entry in entries if role in entry}
    return list(refs.values())


def _raw_keys(file: RawFile) -> NDArray[np.bytes_]:
    return np.ascontiguousarray(file.read_all("text_hash")).view("S16").reshape(-1)


def first_of_each(table: pa.Table) -> pa.Table:
    """One row per text_hash, the first of its rows, sorted by it."""
    table = table.take(pc.sort_indices(table, sort_keys=[("text_hash", "ascending")]))
    keys = hash_keys(table["text_hash"])
    return table.filter(pa.array(_starts_a_run(keys)))


def _starts_a_run(keys: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    return first
