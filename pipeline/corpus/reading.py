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
from pipeline.corpus.jsonl import line_blocks, numbered_lines, parse_line
from pipeline.corpus.rules import BadRow, BadRowError, CheckedRow, RowSpec, check_row
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
        CorruptArtifactError: Its bytes cannot be decoded.
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
    lines = numbered_lines(line_blocks(pieces, f"{source.uri}/{file.path}"), shard.first_row)
    while batch := list(islice(lines, BATCH_ROWS)):
        yield check_lines(spec, batch)


def _read_parquet(source: Store, file: SourceFile, shard: ShardSpec, spec: RowSpec) -> Iterator[CheckedBatch]:
    for first_row, batch in _parquet_batches(source, file, shard, spec.columns):
        yield check_columns(spec, {name: batch.column(name) for name in spec.columns}, first_row)


def _parquet_batches(
    source: Store, file: SourceFile, shard: ShardSpec, columns: tuple[str, ...]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(first row, batch) of the shard's rows, decoding only the row groups that overlap it."""
    stop_row = shard.first_row + shard.rows
    with open_source(source, file.path) as parquet:
        groups, row = _overlapping_groups(parquet.metadata, shard.first_row, stop_row)
        for batch in parquet.iter_batches(
            BATCH_ROWS, row_groups=groups, columns=list(columns), use_threads=False
        ):
            skipped = max(0, shard.first_row - row)
            if skipped < batch.num_rows:
                yield row + skipped, batch.slice(skipped, stop_row - row - skipped)
            row += batch.num_rows
            if row >= stop_row:
                return
    raise _corrupt(f"{source.uri}/{file.path}", f"expected row {row}, found the end")


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
