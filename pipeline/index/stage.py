"""The build stages on the root: place (a bucket) → settle (a segment) → build (a segment) → one partition.

Two out-of-core shuffles: `place_bucket` and `settle_segment` bring rows from buckets of texts to the segment of their
primary list, `settle_segment` and `build_segment` bring entries from there to the segments of the lists that have a
copy. No step holds more than one bucket or one segment, and the heads.
"""

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import (
    Attribute,
    CodesInfo,
    FileRef,
    Origin,
    Partition,
    Segment,
    StageOutput,
    arrow_schema,
)
from pipeline.index.assembly import (
    CutLists,
    Settled,
    cut_entries,
    entries_of,
    place_rows,
    placed_schema,
    settle_rows,
    settled_lists_schema,
    without_parts,
)
from pipeline.index.binarizers import load_binarizer
from pipeline.index.models import folder_of
from pipeline.index.training import Layout
from pipeline.index.vectors import SLICE_ROWS, VectorSource, iterate_vectors
from pipeline.partitioning import ONLY_PARTITION, UNCUT, PartitionTree, merged, summary_of, write_partitions
from pipeline.postings import HeadGraph
from pipeline.schemas import (
    DIRECTORY,
    LIST_NO,
    RAW_COLUMNS,
    SPACE_KEY,
    VECTOR_ID,
    heads_schema,
    lists_schema,
    made_by,
    vectors_schema,
)
from pipeline.storage import Store, adopt_file
from pipeline.tables import (
    RawFile,
    Written,
    check_made_by,
    group_rows,
    read_bucket,
    read_columns,
    vector_array,
    write_addressed,
    write_bucketed,
    write_table,
)

__all__ = [
    "Built",
    "SegmentPlaces",
    "build_segment",
    "codes_info",
    "describe_partitions",
    "finish_partition",
    "graph_heads",
    "place_bucket",
    "settle_segment",
]

PLAIN_ID = frozenset({"doc_id"})
IN_VECTORS = ("vector_ids_at", "embeddings_at", "doc_ids_at", "doc_ids_bytes")


def place_bucket(
    store: Store, source: VectorSource, bucket: int, layout: Layout, binarizer_file: FileRef
) -> StageOutput:
    """Assign the rows of one bucket to lists, binarize them and cut them by segment; the file says what made them.

    Args:
        store: The root.
        source: Live documents and their vectors.
        bucket: Bucket of text hashes.
        layout: Lists and segments.
        binarizer_file: The card of the binarizer.
    """
    folder = folder_of(binarizer_file)
    binarizer = load_binarizer(store, folder, dims=source.cache.dims)
    schema = placed_schema(source.cache.dims, binarizer.code_bytes, layout.max_replicas, source.schema)
    pieces = [
        place_rows(rows, found, layout, binarizer, source.schema)
        for rows, found in iterate_vectors(store, source, bucket)
    ]
    placed = pa.concat_tables(pieces) if pieces else schema.empty_table()
    placed = placed.replace_schema_metadata(made_by(source.cache.encoder, folder))
    ref = write_bucketed(store, "scratch/placed", placed, layout.segments[placed[LIST_NO].to_numpy()])
    return StageOutput(files={"placed": ref}, numbers={"rows": placed.num_rows})


def settle_segment(
    store: Store,
    placed: Sequence[FileRef],
    segment_no: int,
    attributes: tuple[Attribute, ...],
    layout: Layout,
) -> StageOutput:
    """Put the rows of one segment in primary order, write their vectors, and send out the entries of all lists they are in.

    Args:
        store: The root.
        placed: Files of `place_bucket`, in the order of the buckets.
        segment_no: The segment.
        attributes: Of the documents.
        layout: Lists and segments.

    Returns:
        Files `vectors`, `entries` (cut by segment), `lists` and, where there are partitions, `summary` (of the attributes);
        numbers `rows`, `entries`, `lists`, and `split`: lists that there are because others were too long.

    Raises:
        IncompatibleModelsError: The placed rows come from more than one encoder or binarizer.
    """
    unsorted = _bucket_of_all(store, placed, segment_no)
    made = unsorted.schema.metadata
    settled = settle_rows(unsorted, layout)
    space = {SPACE_KEY: made[SPACE_KEY]}
    schema = vectors_schema(layout.heads.shape[1], arrow_schema(attributes)).with_metadata(space)
    starts = _group_starts(settled, most=group_rows(schema))
    vectors = _write_vectors(store, schema, settled, starts)
    entries = entries_of(settled, segment_no).replace_schema_metadata(made)
    of_entry = layout.segments[entries["list_no"].to_numpy()]
    lists = _lists_table(settled, vectors, starts)
    files = {
        "vectors": vectors.ref,
        "entries": write_bucketed(store, "scratch/entries", entries, of_entry),
        "lists": write_table(store, "scratch/lists", lists.schema, [lists]),
    }
    if layout.partition_tree.cuts:
        summary = summary_of(settled.rows, arrow_schema(attributes))
        files["summary"] = write_table(store, "scratch/summaries", summary.schema, [summary])
    numbers = {
        "rows": settled.rows.num_rows,
        "entries": entries.num_rows,
        "lists": lists.num_rows,
        "split": int((settled.part > 0).sum()),
    }
    return StageOutput(files=files, numbers=numbers)


def _write_vectors(store: Store, schema: pa.Schema, settled: Settled, starts: NDArray[np.int64]) -> Written:
    pieces = list(_row_groups(settled, starts))
    raw = RAW_COLUMNS | PLAIN_ID
    written = write_addressed(store, "partitions", schema, pieces, suffix=".vectors.parquet", raw=raw)
    _check_groups(written, sum(piece.num_rows > 0 for piece in pieces))
    return written


def _bucket_of_all(store: Store, files: Sequence[FileRef], bucket: int) -> pa.Table:
    """Rows of one bucket of all files, with what made all of them as metadata."""
    tables = [read_bucket(store, ref.path, bucket) for ref in files]
    for ref, table in zip(files, tables, strict=True):
        check_made_by(f"{store.uri}/{ref.path}", table.schema.metadata, tables[0].schema.metadata)
    return pa.concat_tables(tables)


def _check_groups(written: Written, pieces: int) -> None:
    """See that every piece is a row group: addresses of one that was cut would be those of another."""
    (groups,) = {len(ends) for ends in written.ends.values()}
    if groups != pieces:
        raise ValueError(f"{written.ref.path}: expected {pieces} row groups, found {groups}")


def _group_starts(settled: Settled, *, most: int) -> NDArray[np.int64]:
    """First row of each row group of at most so many rows: groups end at list borders, a list is never cut."""
    starts = [0]
    for first, rows in zip(settled.first.tolist(), settled.primaries.tolist(), strict=True):
        if first + rows - starts[-1] > min(SLICE_ROWS, most) and first > starts[-1]:
            starts.append(first)
    return np.array(starts, np.int64)


def _row_groups(settled: Settled, starts: NDArray[np.int64]) -> Iterator[pa.Table]:
    stops = np.append(starts[1:], settled.rows.num_rows)
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        yield settled.rows.slice(start, stop - start)


def _lists_table(settled: Settled, vectors: Written, starts: NDArray[np.int64]) -> pa.Table:
    """Rows of `settled_lists_schema`."""
    group = np.searchsorted(starts, settled.first, side="right") - 1
    last = np.append(starts[1:], settled.rows.num_rows)[group] - 1
    # A doc_id stands behind its length in 4 bytes.
    sizes = pc.add(pc.binary_length(settled.rows["doc_id"]), 4).to_numpy().astype(np.int64)
    dims = settled.heads.shape[1]
    widths = {"vector_id": VECTOR_ID.byte_width, "embedding": 2 * dims, "doc_id": sizes}

    def values_at(column: str) -> NDArray[np.int64]:
        """A row group's page ends with its values."""
        ends = np.cumsum(np.broadcast_to(widths[column], sizes.shape))
        behind = ends[last] - np.append(0, ends)[settled.first]
        return vectors.ends[column][group] - behind

    columns = [
        pa.array(settled.list_no),
        pa.array(settled.part),
        vector_array(settled.heads),
        pa.array(settled.first, pa.int32()),
        pa.array(settled.primaries, pa.int32()),
        *(pa.array(values_at(column)) for column in ("vector_id", "embedding", "doc_id")),
        pa.array(np.add.reduceat(sizes, settled.first), pa.int32()),
    ]
    return pa.table(columns, schema=settled_lists_schema(dims))


class SegmentPlaces(NamedTuple):
    """Where segments stand in their partitions, by their number through all partitions."""

    numbers: tuple[int, ...]
    """Of each among those of its partition."""
    first_rows: tuple[int, ...]
    """Of each, the first of its rows within its partition."""

    @classmethod
    def of(cls, rows: NDArray[np.int64], first_segments: NDArray[np.int64]) -> "SegmentPlaces":
        """Places by the rows of each segment and the first segment of each partition, and how many there are in all."""
        numbers = np.arange(len(rows))
        first = first_segments[np.searchsorted(first_segments, numbers, side="right") - 1]
        before = np.cumsum(rows) - rows
        return cls(tuple((numbers - first).tolist()), tuple((before - before[first]).tolist()))


def build_segment(
    store: Store,
    entries: Sequence[FileRef],
    lists: FileRef,
    segment_no: int,
    places: SegmentPlaces,
    binarizer_file: FileRef,
    *,
    rows_per_list: int,
) -> StageOutput:
    """Gather the entries of one segment's posting lists and write them, a list to a row group.

    Args:
        store: The root.
        entries: Files of `settle_segment`, in the order of the segments.
        lists: The segment's own file of lists.
        segment_no: The segment.
        places: Of all segments.
        binarizer_file: The card of the binarizer.
        rows_per_list: Primaries that a list should have.

    Returns:
        Files `lists` and `directory_part`; numbers `entries`, `dropped`.

    Raises:
        IncompatibleModelsError: The entries come from more than one encoder or binarizer.
    """
    table = _bucket_of_all(store, entries, segment_no)
    made, sent = table.schema.metadata, table.num_rows
    own = read_columns(store, lists.path)
    table = _of_lists(_rows_of_partition(table, places.first_rows), own)
    dims = own.schema.field("head").type.list_size
    binarizer = load_binarizer(store, folder_of(binarizer_file), dims=dims)
    schema = lists_schema(binarizer.code_bytes).with_metadata(made)
    whole = without_parts(table, binarizer, own)
    cut = cut_entries(whole, own, rows_per_list=rows_per_list, most=group_rows(schema))
    written = _write_lists(store, schema, cut)
    part = _directory_part(
        own,
        cut.counts,
        written,
        segment=places.numbers[segment_no],
        first_row=places.first_rows[segment_no],
        code_bytes=binarizer.code_bytes,
    )
    part = part.append_column(heads_schema(dims).field("radius"), pa.array(cut.radius))
    part = part.append_column(heads_schema(dims).field("head"), own["head"])
    return StageOutput(
        files={
            "lists": written.ref,
            "directory_part": write_table(store, "scratch/directories", part.schema, [part]),
        },
        numbers={"entries": cut.entries.num_rows, "dropped": sent - cut.entries.num_rows},
    )


def _write_lists(store: Store, schema: pa.Schema, cut: CutLists) -> Written:
    """A list to a row group."""
    firsts = np.cumsum(cut.counts) - cut.counts
    pieces = [
        cut.entries.slice(first, count)
        for first, count in zip(firsts.tolist(), cut.counts.tolist(), strict=True)
    ]
    written = write_addressed(store, "partitions", schema, pieces, suffix=".lists.parquet")
    _check_groups(written, len(pieces))
    return written


def _rows_of_partition(entries: pa.Table, first_rows: Sequence[int]) -> pa.Table:
    """Entries whose `row` counts through the partition instead of its segments."""
    rows = entries["row"].to_numpy().astype(np.int64)
    rows += np.array(first_rows, np.int64)[entries["segment"].to_numpy()]
    place = entries.schema.get_field_index("row")
    field = entries.schema.field("row")
    return entries.set_column(place, field, pa.array(rows).cast(field.type))


def _of_lists(entries: pa.Table, lists: pa.Table) -> pa.Table:
    """Entries of lists that there are: one that no vector calls its own is none, and copies for it go."""
    return entries.filter(pc.is_in(entries["list_no"], value_set=lists["list_no"].combine_chunks()))


def _directory_part(
    lists: pa.Table,
    counts: NDArray[np.int64],
    written: Written,
    *,
    segment: int,
    first_row: int,
    code_bytes: int,
) -> pa.Table:
    """Rows of DIRECTORY, the lists numbered from 0."""
    widths = {"code": code_bytes, "factor": 2, "offset": 2, "row": 4}
    columns = {
        "segment": np.full(len(counts), segment),
        "list_no": np.arange(len(counts)),
        "first_entry": np.cumsum(counts) - counts,
        "num_entries": counts,
        "num_primaries": lists["num_primaries"].to_numpy(),
        "first_row": lists["first_row"].to_numpy() + first_row,
        "list_at": written.starts["code"],
        **{name: lists[name].to_numpy() for name in IN_VECTORS},
        **{f"{name}_at": written.values_at(name, counts * width) for name, width in widths.items()},
    }
    return pa.table([pa.array(columns[f.name]).cast(f.type) for f in DIRECTORY], schema=DIRECTORY)


def graph_heads(store: Store, heads: FileRef) -> StageOutput:
    """Link the heads of a partition that has too many of them to measure all.

    Returns:
        File `graph`.
    """
    vectors = RawFile(store, heads, ["head"]).read_all("head").view(np.float32)
    with store.staging() as local:
        HeadGraph.build(vectors).write(local)
        path, size, digest = adopt_file(store, local, "partitions", ".heads.hnsw")
    return StageOutput(files={"graph": FileRef(path=path, rows=heads.rows, bytes=size, sha256=digest)})


class Built(NamedTuple):
    """What the tasks made of one segment."""

    settled: StageOutput
    built: StageOutput


def finish_partition(
    store: Store,
    segments: Sequence[Built],
    codes: CodesInfo,
    *,
    space: str,
    tree: PartitionTree = UNCUT,
    partition_id: int = ONLY_PARTITION,
) -> Partition:
    """Write directory and heads, and describe the partition.

    Args:
        store: The root.
        segments: In order.
        codes: Shape of its codes, from `codes_info`.
        space: Fingerprint of the encoder.
        tree: That told rows their partition.
        partition_id: Number of the partition.
    """
    parts = [read_columns(store, one.built.files["directory_part"].path) for one in segments]
    firsts = np.cumsum([0, *(part.num_rows for part in parts)])
    parts = [
        part.set_column(1, DIRECTORY.field(1), pa.array(np.arange(first, first + part.num_rows), pa.int32()))
        for first, part in zip(firsts.tolist(), parts, strict=False)
    ]
    directory = write_addressed(
        store,
        "partitions",
        DIRECTORY,
        [part.select(DIRECTORY.names) for part in parts],
        suffix=".directory.parquet",
        raw=frozenset(DIRECTORY.names),
    )
    dims = parts[0].schema.field("head").type.list_size
    schema = heads_schema(dims).with_metadata(made_by(space))
    heads = write_table(
        store, "partitions", schema, [part.select(schema.names) for part in parts], suffix=".heads.parquet"
    )
    return Partition(
        partition_id=partition_id,
        path=tree.readable_path(partition_id) if tree.cuts else "",
        bits=tree.bits(partition_id),
        space=space,
        codes=codes,
        heads=heads,
        directory=directory.ref,
        segments=tuple(
            Segment(lists=one.built.files["lists"], vectors=one.settled.files["vectors"]) for one in segments
        ),
        rows=sum(one.settled.files["vectors"].rows for one in segments),
    )


def describe_partitions(
    store: Store,
    partitions: Sequence[Partition],
    settled: Sequence[Sequence[StageOutput]],
    attributes: tuple[Attribute, ...],
) -> FileRef:
    """Write what is known of the attributes of each partition.

    Args:
        store: The root.
        partitions: All of an index.
        settled: What `settle_segment` made of the segments of each.
        attributes: Of the documents.
    """
    schema = arrow_schema(attributes)
    described = [part.model_dump(include={"partition_id", "rows", "path", "bits"}) for part in partitions]
    summaries = [
        merged([read_columns(store, one.files["summary"].path) for one in of_partition], schema)
        for of_partition in settled
    ]
    return write_partitions(store, described, summaries, schema)


def codes_info(store: Store, files: dict[str, FileRef], origin: Origin | None = None) -> CodesInfo:
    """What the manifest says of a binarizer.

    Args:
        store: The root.
        files: Files `binarizer` and `weights`.
        origin: Why this one.
    """
    card = json.loads(store.read(files["binarizer"].path))
    return CodesInfo(
        binarizer=folder_of(files["binarizer"]),
        levels=card["levels"],
        code_bytes=sum(card["levels"]) // 8,
        files=(files["binarizer"], files["weights"]),
        method=card["method"],
        held_out_recall=card["held_out_recall"],
        # Kept ones may be older than these.
        judged_on=card.get("judged_on", "vectors"),
        given_pairs=card.get("given_pairs", 0),
        origin=origin,
    )
