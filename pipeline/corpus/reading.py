"""One shard of the corpus as checked batches: the rows it holds, typed, apart from the rows to set aside.

Parquet goes the way of whole columns (`columns`), JSONL the way of single rows (`rules`). Nothing is written here.
"""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import Plan, ShardSpec, SourceFile
from pipeline.config import CorpusConfig
from pipeline.corpus.columns import CheckedBatch, check_columns, unit_rows, valid_schema
from pipeline.corpus.conversion import ids_of
from pipeline.corpus.jsonl import line_blocks, numbered_lines, parse_line
from pipeline.corpus.rules import UNREADABLE, BadRow, BadRowError, CheckedRow, RowSpec, check_row
from pipeline.corpus.sources import content_of, read_pieces
from pipeline.errors import CorruptArtifactError, DataError
from pipeline.storage import ObjectInfo, Store

__all__ = ["check_lines", "open_source", "read_batches", "row_spec"]

BATCH_ROWS = 4096
"""Rows decoded at once: enough that a batch's fixed costs vanish, few enough that long texts fit."""


def row_spec(plan: Plan, config: CorpusConfig) -> RowSpec:
    """Which column means what, with the types and the width that the plan found."""
    return RowSpec(
        id=config.id,
        text=config.text,
        separator=config.separator,
        attributes=plan.attributes,
        embedding=config.embedding,
        dims=plan.embedding_dims,
    )


def read_batches(source: Store, plan: Plan, shard: ShardSpec, config: CorpusConfig) -> Iterator[CheckedBatch]:
    """Read and check one shard, in the order of the file.

    A local file is hashed whole before each of its shards is read, since the plan knows its bytes by their hash alone.
    That costs about a second for each GB of the file, once per worker. While it is being read, its size and time tell of a
    change. An object on S3 is told by its etag.

    Args:
        source: The corpus folder.
        plan: The frozen plan.
        shard: One of the plan's shards.
        config: The corpus section that the plan was made with.

    Raises:
        DataError: The file is not the one that was planned.
        CorruptArtifactError: It has no valid footer. (Rows of a page that cannot be decoded are bad rows.)
    """
    file = plan.files[shard.file_no]
    found = _check_unchanged(source, file)
    read = _read_parquet if plan.format == "parquet" else _read_jsonl
    return _watched(read(source, file, shard, row_spec(plan, config)), source, found)


@contextlib.contextmanager
def open_source(source: Store, path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of the corpus, for as long as it is being decoded.

    Raises:
        CorruptArtifactError: It has no valid footer, or what is read of it cannot be decoded.
    """
    with source.open_input(path) as stream:
        try:
            yield pq.ParquetFile(stream, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise _corrupt(f"{source.uri}/{path}", " ".join(str(error).split())) from error


def check_lines(spec: RowSpec, lines: Iterable[tuple[int, bytes]]) -> CheckedBatch:
    """Check JSONL rows one by one.

    Args:
        spec: Which column means what.
        lines: (line number, line) of each row.
    """
    rows: list[int] = []
    good: list[CheckedRow] = []
    bad: list[BadRow] = []
    for line_no, line in lines:
        try:
            good.append(check_row(spec, parse_line(line)))
            rows.append(line_no)
        except BadRowError as error:
            bad.append(BadRow(line_no, error.doc_id, error.reason))
    vectors = None
    if spec.embedding is not None:
        given = [row.vector for row in good if row.vector is not None]
        vectors = unit_rows(np.array(given, dtype=np.float64).reshape(len(good), spec.dims or 0))
    return CheckedBatch(
        len(good) + len(bad), np.array(rows, dtype=np.int64), _table(spec, good), vectors, bad
    )


def _table(spec: RowSpec, good: list[CheckedRow]) -> pa.Table:
    schema = valid_schema(spec)
    values = [[row.doc_id for row in good], [row.text for row in good]]
    values += [[row.attributes[i] for row in good] for i in range(len(spec.attributes))]
    return pa.table([pa.array(v, f.type) for v, f in zip(values, schema, strict=True)], schema=schema)


def _check_unchanged(source: Store, file: SourceFile) -> ObjectInfo:
    # Asked before the bytes are hashed: whatever is written from then on changes what `_watched` finds.
    found = source.head(file.path)
    if found.size != file.size or content_of(source, found) != file.content:
        raise _changed(source, file.path)
    return found


def _watched(batches: Iterator[CheckedBatch], source: Store, before: ObjectInfo) -> Iterator[CheckedBatch]:
    yield from batches
    if not before.etag and source.head(before.path) != before:
        raise _changed(source, before.path)


def _changed(source: Store, path: str) -> DataError:
    place = f"{source.uri}/{path}"
    return DataError(place, "changed since it was planned", "let the corpus rest and rerun")


def _read_jsonl(source: Store, file: SourceFile, shard: ShardSpec, spec: RowSpec) -> Iterator[CheckedBatch]:
    pieces = read_pieces(source, file.path, shard.first_byte, shard.stop_byte)
    lines = numbered_lines(line_blocks(pieces), shard.first_row)
    while batch := list(islice(lines, BATCH_ROWS)):
        yield check_lines(spec, batch)


def _read_parquet(source: Store, file: SourceFile, shard: ShardSpec, spec: RowSpec) -> Iterator[CheckedBatch]:
    stop = shard.first_row + shard.rows
    with open_source(source, file.path) as parquet:
        groups, row = _overlapping_groups(parquet.metadata, shard.first_row, stop)
        for group in groups:
            for first_row, batch in _group_batches(parquet, group, row, spec):
                if first_row >= stop:
                    break  # a group may go on far beyond the shard
                skipped = max(0, shard.first_row - first_row)
                taken = batch.slice(skipped, stop - first_row - skipped)
                if taken.num_rows:
                    yield _checked(spec, taken, first_row + skipped)
            row += parquet.metadata.row_group(group).num_rows


def _group_batches(
    parquet: pq.ParquetFile, group: int, first_row: int, spec: RowSpec
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(first row, batch) of one row group. What follows a page that cannot be decoded comes with its ids alone."""
    rows, row = parquet.metadata.row_group(group).num_rows, first_row
    try:
        for batch in _decoded(parquet, group, list(spec.columns)):
            yield row, batch
            row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the file
    left = first_row + rows - row
    if left:
        yield row, _ids_alone(parquet, group, spec.id).slice(rows - left)


def _decoded(parquet: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    return parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)


def _ids_alone(parquet: pq.ParquetFile, group: int, column: str) -> pa.RecordBatch:
    """The ids of a row group some other column of which is damaged; nulls where they are."""
    try:
        ids = pa.concat_arrays([batch.column(column) for batch in _decoded(parquet, group, [column])])
    except (pa.ArrowException, OSError):
        ids = pa.nulls(parquet.metadata.row_group(group).num_rows, pa.string())
    return pa.record_batch({column: ids_of(ids).values})


def _checked(spec: RowSpec, batch: pa.RecordBatch, first_row: int) -> CheckedBatch:
    if set(batch.schema.names) == set(spec.columns):
        return check_columns(spec, {name: batch.column(name) for name in spec.columns}, first_row)
    bad = [BadRow(first_row + i, name, UNREADABLE) for i, name in enumerate(batch.column(0).to_pylist())]
    vectors = np.zeros((0, spec.dims or 0), np.float32) if spec.embedding is not None else None
    nothing = valid_schema(spec).empty_table()
    return CheckedBatch(len(bad), np.zeros(0, np.int64), nothing, vectors, bad)


def _overlapping_groups(metadata: pq.FileMetaData, first_row: int, stop_row: int) -> tuple[list[int], int]:
    """Row groups that hold some of rows [first, stop), and the row at which the first of them starts."""
    sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    stops = np.cumsum(sizes, dtype=np.int64)
    starts = stops - sizes
    groups = np.flatnonzero((stops > first_row) & (starts < stop_row))
    return groups.tolist(), int(starts[groups[0]])


def _corrupt(place: str, reason: str) -> CorruptArtifactError:
    problem = f"is not readable Parquet ({reason})"
    return CorruptArtifactError(place, problem, "copy the file again, or remove it")
