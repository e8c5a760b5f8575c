"""The build stages on the root: train → place (per bucket) → build (per segment) → finish.

`place_bucket` and `build_segment` are the two halves of an out-of-core shuffle from buckets of texts to segments of
posting lists; no step holds more than one bucket or one segment. `iterate_vectors` streams live documents joined with
their float32 vectors, which training, placing and exact search share.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from safetensors.numpy import load, save

from pipeline.artifacts import Attribute, CodesInfo, FileRef, Partition, Segment, StageOutput, arrow_schema
from pipeline.binarization import Binarizer, from_tensors, to_tensors
from pipeline.config import BinarizerConfig, LayoutConfig
from pipeline.embedding.stage import Cache, CachedBucket
from pipeline.index.assembly import DIRECTORY_PART, directory_part, place_rows, placed_schema, sort_placed
from pipeline.index.condemned import drop_condemned
from pipeline.index.training import TrainedLayout, train_layout
from pipeline.partitioning import ONLY_PARTITION
from pipeline.schemas import directory_schema, heads_schema, lists_schema, vectors_schema
from pipeline.storage import Store, canonical_json
from pipeline.tables import (
    hash_keys,
    read_bucket,
    read_columns,
    to_matrix,
    vector_array,
    write_bucketed,
    write_table,
)

__all__ = [
    "VectorSource",
    "build_segment",
    "finish_partition",
    "iterate_vectors",
    "load_binarizer",
    "place_bucket",
    "sample_vectors",
    "train_index",
]

SLICE_ROWS = 8192
"""Rows placed at once. Fixed: distances can change in the last bit with the size of a product."""


@dataclass(frozen=True)
class VectorSource:
    """Live documents by bucket of text hash, and the cache that holds their vectors."""

    texts: tuple[FileRef, ...]
    cache: Cache
    attributes: tuple[Attribute, ...]
    condemned: Mapping[int, FileRef] = field(default_factory=dict)
    """By bucket, rows that have no vector because their text cannot be encoded."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the attributes."""
        return arrow_schema(self.attributes)


def iterate_vectors(
    store: Store, source: VectorSource, bucket: int
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    """Rows of one bucket in slices, sorted by (text_hash, vector_id), with their vectors.

    Yields:
        (n) rows with vector_id, doc_id, text_hash and the attributes; (n, d) float32. n is at most SLICE_ROWS.
    """
    columns = ["vector_id", "doc_id", "text_hash", *source.schema.names]
    table = pa.concat_tables([read_bucket(store, ref.path, bucket, columns) for ref in source.texts])
    if bucket in source.condemned:
        table = drop_condemned(table, read_columns(store, source.condemned[bucket].path), by="text_hash")
    order = pc.sort_indices(table, sort_keys=[("text_hash", "ascending"), ("vector_id", "ascending")])
    table = table.take(order)
    cached = CachedBucket(store, source.cache, bucket)
    for start in range(0, table.num_rows, SLICE_ROWS):
        rows = table.slice(start, SLICE_ROWS)
        distinct, places = np.unique(hash_keys(rows["text_hash"]), return_inverse=True)
        yield rows, cached.read(distinct)[places]


def sample_vectors(
    store: Store, source: VectorSource, rows: int, *, from_end: bool = False
) -> tuple[NDArray[np.float32], list[str]]:
    """Vectors with the smallest (or largest) text hashes: a uniform sample that does not depend on the shards.

    Returns:
        (n, d) float32 and their doc_ids, in order of hash; n is `rows`, or less in a smaller corpus.
    """
    vectors: list[NDArray[np.float32]] = []
    names: list[list[str]] = []
    buckets = range(source.cache.buckets)
    for bucket in reversed(buckets) if from_end else buckets:
        slices = list(iterate_vectors(store, source, bucket))
        for table, found in reversed(slices) if from_end else slices:
            vectors.append(found)
            names.append(table["doc_id"].to_pylist())
        if sum(map(len, names)) >= rows:
            break
    if from_end:
        vectors, names = vectors[::-1], names[::-1]
    kept = slice(-rows, None) if from_end else slice(rows)
    return np.concatenate(vectors)[kept], [name for part in names for name in part][kept]


def train_index(
    store: Store,
    source: VectorSource,
    *,
    num_vectors: int,
    sample_rows: int,
    layout: LayoutConfig,
    binarizer: BinarizerConfig,
    seed: int,
) -> StageOutput:
    """Fit binarizer and heads on a sample.

    Returns:
        Files `layout` (heads and segments, scratch), `weights` and `binarizer` (the artifact).
    """
    sample, _ = sample_vectors(store, source, sample_rows)
    trained = train_layout(sample, num_vectors=num_vectors, layout=layout, binarizer=binarizer, seed=seed)
    schema = heads_schema(source.cache.dims).remove(1).append(pa.field("segment", pa.int32(), nullable=False))
    table = pa.table([vector_array(trained.heads), pa.array(trained.segments)], schema=schema)
    files = _write_binarizer(store, trained.binarizer)
    files["layout"] = write_table(store, "scratch/layouts", schema, [table])
    return StageOutput(
        files=files, numbers={"lists": len(trained.heads), "segments": int(trained.segments.max()) + 1}
    )


def _write_binarizer(store: Store, binarizer: Binarizer) -> dict[str, FileRef]:
    weights = save(to_tensors(binarizer))
    digest = hashlib.sha256(weights).hexdigest()
    card = canonical_json(
        {"format": 1, "kind": "rotation", "levels": list(binarizer.levels), "weights": digest}
    )
    folder = f"binarizers/{hashlib.sha256(card).hexdigest()[:32]}"
    files = {}
    for role, name, data in (
        ("weights", "weights.safetensors", weights),
        ("binarizer", "binarizer.json", card),
    ):
        store.write(f"{folder}/{name}", data)
        digest = hashlib.sha256(data).hexdigest()
        files[role] = FileRef(path=f"{folder}/{name}", rows=0, bytes=len(data), sha256=digest)
    return files


def load_binarizer(store: Store, folder: str) -> Binarizer:
    """Read a binarizer artifact."""
    card = json.loads(store.read(f"{folder}/binarizer.json"))
    return from_tensors(load(store.read(f"{folder}/weights.safetensors")), tuple(card["levels"]))


def _load_layout(store: Store, files: dict[str, FileRef]) -> TrainedLayout:
    table = read_columns(store, files["layout"].path)
    binarizer = load_binarizer(store, files["binarizer"].path.rpartition("/")[0])
    return TrainedLayout(binarizer, to_matrix(table["head"]).astype(np.float32), table["segment"].to_numpy())


def place_bucket(
    store: Store, source: VectorSource, bucket: int, trained_files: dict[str, FileRef]
) -> StageOutput:
    """Assign the rows of one bucket to lists, binarize them and cut them by segment.

    Args:
        store: The root.
        source: Live documents and their vectors.
        bucket: Bucket of text hashes.
        trained_files: Files of `train_index`.
    """
    trained = _load_layout(store, trained_files)
    schema = placed_schema(source.cache.dims, sum(trained.binarizer.levels) // 8, source.schema)
    pieces = [
        place_rows(rows, found, trained, source.schema)
        for rows, found in iterate_vectors(store, source, bucket)
    ]
    placed = pa.concat_tables(pieces) if pieces else schema.empty_table()
    segments = trained.segments[placed["list_no"].to_numpy()]
    ref = write_bucketed(store, "scratch/placed", placed, segments)
    return StageOutput(files={"placed": ref}, numbers={"rows": placed.num_rows})


def build_segment(
    store: Store, placed: Sequence[FileRef], segment_no: int, attributes: tuple[Attribute, ...]
) -> StageOutput:
    """Sort the placed rows of one segment into posting lists and write its files.

    Returns:
        Files `vectors`, `lists` and `directory_part`.
    """
    table = sort_placed(pa.concat_tables([read_bucket(store, ref.path, segment_no) for ref in placed]))
    dims, code_bytes = (
        table.schema.field("embedding").type.list_size,
        table.schema.field("code").type.byte_width,
    )
    rows = pa.array(np.arange(table.num_rows, dtype=np.int32))
    part = directory_part(table, segment_no)
    vectors = _whole_lists(table, part)
    lists = _whole_lists(table.append_column(pa.field("row", pa.int32(), nullable=False), rows), part)
    files = {
        "vectors": write_table(
            store,
            "partitions",
            vectors_schema(dims, arrow_schema(attributes)),
            vectors,
            suffix=".vectors.parquet",
        ),
        "lists": write_table(store, "partitions", lists_schema(code_bytes), lists, suffix=".lists.parquet"),
        "directory_part": write_table(store, "scratch/directories", DIRECTORY_PART, [part]),
    }
    return StageOutput(files=files, numbers={"rows": table.num_rows})


def _whole_lists(table: pa.Table, part: pa.Table) -> Iterator[pa.Table]:
    """Cut a segment into row groups that end at list borders."""
    start = 0
    stops = (part["first_entry"].to_numpy() + part["num_entries"].to_numpy()).astype(np.int64)
    while start < table.num_rows:
        within = stops[(stops > start) & (stops <= start + SLICE_ROWS)]
        # A list longer than a row group is cut by the writer.
        stop = int(within[-1]) if len(within) else int(stops[stops > start][0])
        yield table.slice(start, stop - start)
        start = stop


def finish_partition(
    store: Store, built: Sequence[StageOutput], trained_files: dict[str, FileRef], *, space: str
) -> Partition:
    """Write directory and heads, and describe the partition.

    Args:
        store: The root.
        built: Outputs of `build_segment`, in segment order.
        trained_files: Files of `train_index`.
        space: Fingerprint of the encoder.
    """
    trained = _load_layout(store, trained_files)
    parts = pa.concat_tables([read_columns(store, output.files["directory_part"].path) for output in built])
    radius = np.zeros(len(trained.heads), dtype=np.float32)
    radius[parts["list_no"].to_numpy()] = parts["radius"].to_numpy()
    schema = heads_schema(trained.heads.shape[1])
    heads = pa.table([vector_array(trained.heads), pa.array(radius)], schema=schema)
    directory = parts.select(directory_schema().names)
    levels = trained.binarizer.levels
    return Partition(
        partition_id=ONLY_PARTITION,
        space=space,
        codes=CodesInfo(
            binarizer=trained_files["binarizer"].path.rpartition("/")[0],
            levels=levels,
            code_bytes=sum(levels) // 8,
            files=(trained_files["binarizer"], trained_files["weights"]),
        ),
        heads=write_table(store, "partitions", schema, [heads], suffix=".heads.parquet"),
        directory=write_table(
            store, "partitions", directory_schema(), [directory], suffix=".directory.parquet"
        ),
        segments=tuple(Segment(lists=o.files["lists"], vectors=o.files["vectors"]) for o in built),
        rows=sum(output.files["vectors"].rows for output in built),
    )
