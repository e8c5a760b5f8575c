"""The frozen shard plan: which files the corpus has, what their columns are, and how they are cut.

Parquet is planned from its footers, JSONL in one pass over its bytes. The plan depends on content and configuration
alone: a copied corpus has the same fingerprint, whatever the folder or the cluster.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import Attribute, Plan, ShardSpec, SourceFile
from pipeline.config import CorpusConfig, StorageConfig
from pipeline.corpus.agreement import FileColumns, check_attribute_names, sampled_columns, settle_attributes
from pipeline.corpus.conversion import LIST_OF_NUMBERS, family_of
from pipeline.corpus.jsonl import line_blocks, parse_line, scan_lines
from pipeline.corpus.reading import open_source
from pipeline.corpus.rules import BadRowError
from pipeline.corpus.sources import content_of, find_source_files, read_pieces
from pipeline.errors import DataError, SchemaMismatchError
from pipeline.storage import ObjectInfo, Store, canonical_json, open_store

__all__ = ["plan_corpus"]

SAMPLE_ROWS, LATER_SAMPLE_ROWS = 1000, 100
"""Rows of the first JSONL file whose types are taken, and of each later file whose types are compared."""
BUCKET_ROWS = 65_536
BUCKET_BYTES = 256 * 1024 * 1024
"""Bounds of a document bucket: one task holds it whole."""
MAX_BUCKETS = 4096


@dataclass(frozen=True)
class _ScannedFile:
    source: SourceFile
    columns: FileColumns | None
    """None for a JSONL file without a row."""
    starts: tuple[tuple[int, int], ...]
    """(first byte, first row) of each shard; empty for Parquet."""
    text_bytes: int
    dims: tuple[int, ...]
    """Lengths of sampled vectors."""
    fixed_dims: int | None
    """Width that the column's type states."""


def plan_corpus(config: CorpusConfig, storage: StorageConfig) -> Plan:
    """Look at every file once and freeze the shards.

    Args:
        config: The corpus section.
        storage: How to reach S3.

    Raises:
        ConfigError: An attribute has a reserved name.
        DataError: No file, no document, or no vector where vectors should be.
        CorruptArtifactError: A file is truncated or not of its format.
        SchemaMismatchError: A column is missing, of a wrong type, or differs between files.
    """
    check_attribute_names(config)
    sources = find_source_files(config, storage)
    store = open_store(sources.folder, storage)
    scan = _scan_parquet if config.format == "parquet" else _scan_jsonl
    scanned: list[_ScannedFile] = []
    for file in sources.files:
        is_first = not any(f.columns for f in scanned)
        scanned.append(scan(store, file, config, SAMPLE_ROWS if is_first else LATER_SAMPLE_ROWS))
    rows = sum(file.source.rows for file in scanned)
    if rows == 0:
        raise DataError(
            config.uri, f"no documents: its {len(scanned)} files have no rows", "check corpus.uri"
        )
    attributes = settle_attributes(config, _known_columns(config, scanned))
    return _frozen(config, sources.folder, scanned, attributes)


def _known_columns(config: CorpusConfig, scanned: Sequence[_ScannedFile]) -> list[FileColumns]:
    known = [file.columns for file in scanned if file.columns is not None]
    if not known:
        problem = f"none of the first {SAMPLE_ROWS} rows is a JSON object"
        raise DataError(config.uri, problem, "JSONL has one JSON object on each line; check corpus.format")
    return known


def _frozen(
    config: CorpusConfig, folder: str, scanned: Sequence[_ScannedFile], attributes: tuple[Attribute, ...]
) -> Plan:
    rows = sum(file.source.rows for file in scanned)
    text_bytes = sum(file.text_bytes for file in scanned)
    dims = _embedding_dims(config, scanned) if config.embedding is not None else None
    content: dict[str, Any] = {
        "format": config.format,
        "files": tuple(file.source for file in scanned),
        "shards": tuple(_shards(scanned, config.shard_rows)),
        "attributes": attributes,
        "embedding_dims": dims,
        "document_buckets": _document_buckets(rows, text_bytes + 4 * rows * (dims or 0)),
        "rows": rows,
        "text_bytes": text_bytes,
    }
    plan = Plan(fingerprint="", corpus_folder=folder, **content)
    hashed = canonical_json(plan.model_dump(mode="json", exclude={"fingerprint", "corpus_folder"}))
    return plan.model_copy(update={"fingerprint": hashlib.sha256(hashed).hexdigest()})


def _document_buckets(rows: int, num_bytes: int) -> int:
    buckets = 1
    while buckets < MAX_BUCKETS and (rows > buckets * BUCKET_ROWS or num_bytes > buckets * BUCKET_BYTES):
        buckets *= 2
    return buckets


def _shards(scanned: Sequence[_ScannedFile], shard_rows: int) -> Iterator[ShardSpec]:
    shard_no = 0
    for file_no, file in enumerate(scanned):
        for i, taken in enumerate(range(0, file.source.rows, shard_rows)):
            rows = min(shard_rows, file.source.rows - taken)
            place = _byte_range(file, i) if file.starts else {"first_row": taken}
            yield ShardSpec(shard_no=shard_no, file_no=file_no, rows=rows, **place)
            shard_no += 1


def _byte_range(file: _ScannedFile, index: int) -> dict[str, int]:
    # Blank lines before the first row belong to the first shard, so that the shards cover the file.
    starts = [(0, 0), *file.starts[1:], (file.source.size, 0)]
    (first_byte, first_row), (stop_byte, _) = starts[index], starts[index + 1]
    return {"first_row": first_row, "first_byte": first_byte, "stop_byte": stop_byte}


# ------------------------------------------------------------------------------------------------ vectors


def _embedding_dims(config: CorpusConfig, scanned: Sequence[_ScannedFile]) -> int:
    stated = [(file, file.fixed_dims) for file in scanned if file.fixed_dims is not None]
    for file, dims in stated:
        if dims != stated[0][1]:
            problem = f"column {config.embedding!r}: expected {stated[0][1]} dimensions as in {stated[0][0].source.path}"
            raise SchemaMismatchError(
                _place(file), f"{problem}, found {dims}", "keep vectors of one encoder in a corpus"
            )
    # The commonest length, not the first: one bad row must not make all the others bad.
    seen = Counter(dims for file in scanned for dims in file.dims if dims > 0)
    if not stated and not seen:
        problem = f"column {config.embedding!r} has no vector in the sampled rows"
        raise DataError(config.uri, problem, "check corpus.embedding")
    return stated[0][1] if stated else seen.most_common(1)[0][0]


def _place(file: _ScannedFile) -> str:
    return file.columns.place if file.columns is not None else file.source.path


# ------------------------------------------------------------------------------------------------ Parquet


def _scan_parquet(store: Store, file: ObjectInfo, config: CorpusConfig, sample_rows: int) -> _ScannedFile:
    with open_source(store, file.path) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        columns = _parquet_columns(f"{store.uri}/{file.path}", schema)
        dims: tuple[int, ...] = ()
        fixed_dims = None
        if config.embedding is not None and columns.families.get(config.embedding) == LIST_OF_NUMBERS:
            fixed_dims = _fixed_dims(schema.field(config.embedding).type)
            dims = () if fixed_dims else _sampled_dims(parquet, config.embedding, sample_rows)
        return _ScannedFile(
            source=_source_file(store, file, metadata.num_rows),
            columns=columns,
            starts=(),
            text_bytes=_column_bytes(metadata, config.text),
            dims=dims,
            fixed_dims=fixed_dims,
        )


def _source_file(store: Store, file: ObjectInfo, rows: int) -> SourceFile:
    return SourceFile(path=file.path, size=file.size, content=content_of(store, file), rows=rows)


def _parquet_columns(place: str, schema: pa.Schema) -> FileColumns:
    for name, count in Counter(schema.names).items():
        if count > 1:
            raise SchemaMismatchError(place, f"column {name!r} is there {count} times", "rename one of them")
    return FileColumns(place, {field.name: family_of(field.type) for field in schema}, is_sampled=False)


def _fixed_dims(kind: pa.DataType) -> int | None:
    return int(kind.list_size) if pa.types.is_fixed_size_list(kind) else None


def _sampled_dims(parquet: pq.ParquetFile, column: str, sample_rows: int) -> tuple[int, ...]:
    """Lengths of the vectors in the first batch that has one."""
    for batch in parquet.iter_batches(sample_rows, columns=[column], use_threads=False):
        lengths = tuple(len(vector) for vector in batch.column(column) if vector.is_valid)
        if lengths:
            return lengths
    return ()


def _column_bytes(metadata: pq.FileMetaData, columns: Sequence[str]) -> int:
    wanted = [
        i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] in columns
    ]
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    return sum(group.column(i).total_uncompressed_size for group in groups for i in wanted)


# ------------------------------------------------------------------------------------------------ JSONL


def _scan_jsonl(store: Store, file: ObjectInfo, config: CorpusConfig, sample_rows: int) -> _ScannedFile:
    place = f"{store.uri}/{file.path}"
    digest = hashlib.sha256()
    blocks = line_blocks(_hashed(read_pieces(store, file.path, 0, file.size), digest))
    scan = scan_lines(blocks, config.shard_rows, sample_rows, place)
    sample = list(_objects(scan.head))
    vectors = [row.get(config.embedding) for row in sample] if config.embedding is not None else []
    return _ScannedFile(
        source=SourceFile(
            path=file.path, size=file.size, content=file.etag or digest.hexdigest(), rows=scan.rows
        ),
        columns=sampled_columns(place, sample, config) if sample else None,
        starts=tuple(scan.starts),
        text_bytes=file.size,
        dims=tuple(len(vector) for vector in vectors if isinstance(vector, list)),
        fixed_dims=None,
    )


def _hashed(pieces: Iterator[bytes], digest: "hashlib._Hash") -> Iterator[bytes]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _objects(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(BadRowError):
            yield parse_line(line)
