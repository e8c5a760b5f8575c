"""Parquet at rest: ordinary tables, tables cut into buckets for a shuffle, and raw-addressable columns.

A raw-addressable column (DESIGN §4) is non-nullable, of fixed width, PLAIN, uncompressed and has one page per
row group, so its values are one contiguous run in the file at

    data_page_offset + total_compressed_size - num_values * width

and a reader fetches rows [a, b) by byte range, while DuckDB, Polars or Spark read an ordinary table. The property
is asserted on every file written. A file that another tool rewrote is detected by its page header and decoded.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.artifacts import FileRef
from pipeline.errors import CorruptArtifactError, IncompatibleModelsError
from pipeline.schemas import BINARIZER_KEY, RAW_COLUMNS, SPACE_KEY
from pipeline.storage import Store, adopt_file, is_whole

__all__ = [
    "RawFile",
    "Written",
    "check_made_by",
    "fixed_width",
    "group_rows",
    "hash_keys",
    "is_as_written",
    "is_one_plain_page",
    "open_parquet",
    "read_bucket",
    "read_columns",
    "to_matrix",
    "vector_array",
    "write_addressed",
    "write_bucketed",
    "write_table",
]

GROUP_ROWS = 16_384
GROUP_BYTES = 16 * 1024 * 1024
"""Bounds of a row group (DESIGN §4): one row of a 500k-row page costs 800 ms to a Parquet reader, of an 8k-row page 13 ms."""

BUCKETS_KEY = b"strata.buckets"
HEADER_BYTES = 64
"""More than a page header and the level bytes' length take."""

VALUE_TYPES = {
    "factor": pa.float16(),
    "offset": pa.float16(),
    "head": pa.float32(),
    "radius": pa.float32(),
}
"""Types of raw-addressable numbers, those of an embedding aside: a tool that rewrites a file may widen them."""


def fixed_width(kind: pa.DataType) -> int:
    """Bytes of one value of a fixed-width type, lists of fixed size included."""
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * fixed_width(kind.value_type)
    return int(kind.bit_width) // 8


def vector_array(matrix: NDArray[np.floating] | NDArray[np.integer]) -> pa.Array:
    """A (n, d) matrix as a non-nullable fixed-size list column, without copying."""
    n, d = matrix.shape
    values = pa.array(np.ascontiguousarray(matrix).reshape(n * d))
    kind = pa.list_(pa.field("element", values.type, nullable=False), d)
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


def to_matrix(column: pa.Array | pa.ChunkedArray) -> NDArray[np.floating]:
    """A fixed-size list column as a (n, d) matrix."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def hash_keys(column: pa.ChunkedArray) -> NDArray[np.bytes_]:
    """A column of 16-byte hashes as (n,) S16, which compares and sorts as the bytes do."""
    array = column.combine_chunks()
    buffer = array.buffers()[1]
    data = np.frombuffer(buffer, np.uint8) if buffer is not None else np.zeros(0, np.uint8)
    return data[array.offset * 16 : (array.offset + len(array)) * 16].view("S16")


# ------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Written:
    """A file as it was written, and where each row group's columns lie in it."""

    ref: FileRef
    starts: Mapping[str, NDArray[np.int64]]
    """By column, (groups,) first byte of its page in each row group: of the page's header."""
    ends: Mapping[str, NDArray[np.int64]]
    """By column, (groups,) byte behind its page. The values of a raw-addressable column are what its page ends with."""

    def values_at(self, column: str, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """(groups,) byte where a column's values start, of whose values each row group has so many bytes."""
        return self.ends[column] - sizes


def write_table(
    store: Store,
    folder: str,
    schema: pa.Schema,
    tables: Iterable[pa.Table],
    *,
    suffix: str = ".parquet",
    metadata: Callable[[], dict[bytes, bytes]] | None = None,
) -> FileRef:
    """Write tables as `write_addressed` does."""
    return write_addressed(store, folder, schema, tables, suffix=suffix, metadata=metadata).ref


def write_addressed(
    store: Store,
    folder: str,
    schema: pa.Schema,
    tables: Iterable[pa.Table],
    *,
    suffix: str = ".parquet",
    metadata: Callable[[], dict[bytes, bytes]] | None = None,
    raw: frozenset[str] = RAW_COLUMNS,
) -> Written:
    """Write tables one after the other into one content-named file; each starts a row group of its own.

    Args:
        store: Where to.
        folder: Folder in the store.
        schema: Schema of every table; its metadata goes into the footer.
        tables: Pieces, in order; only one is held at a time.
        suffix: End of the name.
        metadata: Asked after the last piece for key-value pairs of the footer.
        raw: Columns that are written raw-addressable. Of strings each value stands behind its length in 4 bytes.
    """
    rows, most = 0, group_rows(schema, raw)
    with store.staging() as local:
        with pq.ParquetWriter(local, schema, **_writer_options(schema, raw)) as writer:
            for table in tables:
                if table.num_rows == 0:
                    continue
                writer.write_table(table.select(schema.names).cast(schema), row_group_size=most)
                rows += table.num_rows
            if metadata is not None:
                writer.add_key_value_metadata(metadata())
        chunks = _addressed_chunks(local, [field for field in schema if field.name in raw])
        tail = _digest_of_tail(_tail_of(local))
        path, size, digest = adopt_file(store, local, folder, suffix)
    starts = {name: [c.data_page_offset for c in found] for name, found in chunks.items()}
    ends = {
        name: [c.data_page_offset + c.total_compressed_size for c in found] for name, found in chunks.items()
    }
    return Written(
        FileRef(path=path, rows=rows, bytes=size, sha256=digest, tail=tail),
        {name: np.array(places, np.int64) for name, places in starts.items()},
        {name: np.array(places, np.int64) for name, places in ends.items()},
    )


def group_rows(schema: pa.Schema, raw: frozenset[str] = RAW_COLUMNS) -> int:
    """Most rows of a row group."""
    widest = max(
        (fixed_width(f.type) for f in schema if f.name in raw and _is_fixed_width(f.type)), default=1
    )
    return max(1, min(GROUP_ROWS, GROUP_BYTES // widest))


def _writer_options(schema: pa.Schema, raw: frozenset[str]) -> dict[str, Any]:
    addressed = [_leaf(field) for field in schema if field.name in raw]
    ordinary = [_leaf(field) for field in schema if field.name not in raw]
    return {
        "compression": {**dict.fromkeys(addressed, "none"), **dict.fromkeys(ordinary, "zstd")},
        "use_dictionary": [leaf for leaf in ordinary if leaf != "doc_id"],
        "column_encoding": dict.fromkeys(addressed, "PLAIN"),
        "write_statistics": ordinary,
        "data_page_size": 2 * GROUP_BYTES,
        "max_rows_per_page": 2 * GROUP_ROWS,
        "store_schema": True,
    }


def _leaf(field: pa.Field) -> str:
    is_list = pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
    return f"{field.name}.list.element" if is_list else field.name


def _addressed_chunks(local: Path, fields: Sequence[pa.Field]) -> dict[str, list[pq.ColumnChunkMetaData]]:
    """Column chunks of raw-addressable columns, which are checked to be so."""
    with local.open("rb") as file:
        found = pq.read_metadata(file)
        chunks = {field.name: _chunks(found, field) for field in fields}
        for name, of_column in chunks.items():
            for chunk in of_column:
                file.seek(chunk.data_page_offset)
                one_page = is_one_plain_page(
                    file.read(HEADER_BYTES), chunk.total_compressed_size, chunk.num_values
                )
                assert one_page, f"{name} of {local} is not raw-addressable"  # noqa: S101  (an invariant of the writer)
    return chunks


def write_bucketed(
    store: Store, folder: str, table: pa.Table, buckets: NDArray[np.integer], *, suffix: str = ".parquet"
) -> FileRef:
    """Write a table cut into buckets, for a shuffle: row groups end at bucket borders, order within a bucket is kept.

    Args:
        store: Where to.
        folder: Folder in the store.
        table: (n) rows.
        buckets: (n,) bucket of each row.
        suffix: End of the name.
    """
    order = np.argsort(buckets, kind="stable")
    sizes = np.bincount(buckets) if len(buckets) else np.zeros(0, dtype=np.int64)
    stops = np.cumsum(sizes)
    table = table.take(pa.array(order))
    group = group_rows(table.schema)
    pieces = [
        (bucket, table.slice(start, min(group, stop - start)))
        for bucket, stop in enumerate(stops)
        for start in range(stop - sizes[bucket], stop, group)
    ]
    names = json.dumps([bucket for bucket, _ in pieces]).encode()
    return write_table(
        store,
        folder,
        table.schema,
        (piece for _, piece in pieces),
        suffix=suffix,
        metadata=lambda: {BUCKETS_KEY: names},
    )


# ------------------------------------------------------------------------------------------------ reading


class _OwningFile(pq.ParquetFile):  # type: ignore[misc]  # pyarrow is untyped here
    """Closes the stream that it was opened on; a plain ParquetFile leaves that to whoever opened it."""

    def close(self, force: bool = True) -> None:
        super().close(force=force)


@contextlib.contextmanager
def _readable(store: Store, path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        problem = f"is not readable Parquet ({' '.join(str(error).split())})"
        raise CorruptArtifactError(f"{store.uri}/{path}", problem, "run `strata verify`") from error


def open_parquet(store: Store, path: str) -> pq.ParquetFile:
    """Open a Parquet file of ours; CorruptArtifactError where it cannot be read."""
    with _readable(store, path), contextlib.ExitStack() as on_failure:
        stream = on_failure.enter_context(store.open_input(path))
        file = _OwningFile(stream, pre_buffer=False)
        on_failure.pop_all()
        return file


def read_columns(store: Store, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a whole file."""
    with open_parquet(store, path) as file, _readable(store, path):
        return file.read(columns=list(columns) if columns is not None else None, use_threads=False)


def read_bucket(store: Store, path: str, bucket: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of one bucket of a file that `write_bucketed` wrote."""
    with open_parquet(store, path) as file, _readable(store, path):
        footer = file.metadata.metadata or {}
        if BUCKETS_KEY not in footer:
            problem = "expected a file cut into buckets, found none in the footer"
            raise CorruptArtifactError(f"{store.uri}/{path}", problem, "run `strata verify`")
        groups = [i for i, name in enumerate(json.loads(footer[BUCKETS_KEY])) if name == bucket]
        wanted = list(columns) if columns is not None else None
        # The footer's list of buckets is true of this file alone and must not travel into another.
        kept = {key: footer[key] for key in MADE_BY if key in footer}
        return file.read_row_groups(groups, columns=wanted, use_threads=False).replace_schema_metadata(kept)


MADE_BY = {SPACE_KEY: "vectors of space", BINARIZER_KEY: "codes of"}


def check_made_by(place: str, footer: Mapping[bytes, bytes] | None, expected: Mapping[bytes, bytes]) -> None:
    """Refuse a file of another encoder or binarizer; one that does not say (a tool that rewrites files may drop it) passes.

    Args:
        place: The file, for the message.
        footer: Its key-value metadata.
        expected: What `schemas.made_by` says of it.

    Raises:
        IncompatibleModelsError: Names what was expected and what was found.
    """
    for key, value in expected.items():
        found = (footer or {}).get(key, value)
        if found != value:
            problem = f"expected {MADE_BY[key]} {value.decode()}, found {MADE_BY[key]} {found.decode()}"
            remedy = "restore the file, or roll back to another release and build the index anew"
            raise IncompatibleModelsError(place, problem, remedy)


FOOTER_TAIL = 64 * 1024
"""Bytes at the end of a file in which its key-value metadata stands: behind the row groups, before the offset of the footer."""


def _tail_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - FOOTER_TAIL))
        return file.read()


def _digest_of_tail(tail: bytes) -> str:
    return hashlib.sha256(tail).hexdigest()[:32]


def _made_by_footer(tail: bytes) -> dict[bytes, bytes]:
    """What a file of ours says made it, from its last bytes alone: a footer of a thousand row groups takes long to parse."""
    found = {}
    for key in MADE_BY:
        # Thrift compact: field 1, length, key; field 2, length, value.
        mark = b"\x18" + bytes([len(key)]) + key + b"\x18"
        place = tail.rfind(mark)
        if place >= 0:
            stream = io.BytesIO(tail[place + len(mark) :])
            found[key] = stream.read(_varint(stream))
    return found


def is_as_written(store: Store, ref: FileRef, made_by: Mapping[bytes, bytes]) -> bool:
    """Whether a file is the recorded one, by its size and its end: then what its manifest says of places in it holds.

    Args:
        store: Where the file is.
        ref: The file, as its manifest records it.
        made_by: What made it, as `schemas.made_by` says it.

    Raises:
        IncompatibleModelsError: It is the recorded one, and says otherwise.
    """
    if not is_whole(store, ref):
        return False
    (tail,) = store.read_ranges(ref.path, [(max(0, ref.bytes - FOOTER_TAIL), ref.bytes)]).chunks
    if _digest_of_tail(tail) != ref.tail:
        return False
    check_made_by(f"{store.uri}/{ref.path}", _made_by_footer(tail), made_by)
    return True


@dataclass(frozen=True)
class _RawColumn:
    width: int
    value_offsets: NDArray[np.int64]
    """(groups,) byte where the values of a row group start; -1 where the chunk must be decoded."""


class RawFile:
    """Row-addressed reads of the raw-addressable columns of one file.

    Args:
        store: Where the file is.
        ref: The file, as its manifest records it.
        columns: Columns that will be read.
        made_by: What its vectors and codes are to be made by, as `schemas.made_by` says it.

    Raises:
        IncompatibleModelsError: The file says otherwise.
    """

    def __init__(
        self, store: Store, ref: FileRef, columns: Sequence[str], made_by: Mapping[bytes, bytes] | None = None
    ) -> None:
        self._store = store
        self._ref = ref
        with open_parquet(store, ref.path) as file:
            metadata, schema = file.metadata, file.schema_arrow
            check_made_by(f"{store.uri}/{ref.path}", metadata.metadata, made_by or {})
            widths = {name: _width(file, schema.field(name)) for name in columns}
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._kinds = {name: _stored_kind(name, schema) for name in columns}
        self._raw = {name: self._locate(metadata, schema.field(name), widths[name]) for name in columns}
        self.bytes_read = 0
        self.requests = 0

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return int(self._starts[-1])

    def width(self, column: str) -> int:
        """Bytes of a value."""
        return self._raw[column].width

    def places(self, column: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) byte where the value of each row starts, of a column that is raw."""
        raw = self._raw[column]
        group = np.searchsorted(self._starts, rows, side="right") - 1
        return raw.value_offsets[group] + (rows - self._starts[group]) * raw.width

    def is_raw(self, column: str) -> bool:
        """Whether every row of a column is read by byte range."""
        return bool((self._raw[column].value_offsets >= 0).all())

    def read(self, column: str, spans: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8]]:
        """Values of rows [start, stop) of each span, as (rows, width) bytes."""
        raw = self._raw[column]
        if not self.is_raw(column):
            return self._decode(column, spans)
        pieces = [list(self._pieces(raw, start, stop)) for start, stop in spans]
        fetched = self._store.read_ranges(self._ref.path, [piece for span in pieces for piece in span])
        self.bytes_read += fetched.bytes_read
        self.requests += fetched.requests
        chunks = iter(fetched.chunks)
        joined = [b"".join(next(chunks) for _ in span) for span in pieces]
        return [
            np.frombuffer(data, np.uint8).reshape(stop - start, raw.width)
            for data, (start, stop) in zip(joined, spans, strict=True)
        ]

    def read_all(self, column: str) -> NDArray[np.uint8]:
        """All values of a column, as (rows, width) bytes."""
        return self.read(column, [(0, self.rows)])[0]

    def _pieces(self, raw: _RawColumn, start: int, stop: int) -> Iterator[tuple[int, int]]:
        group = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first, end = int(self._starts[group]), min(stop, int(self._starts[group + 1]))
            base = int(raw.value_offsets[group])
            yield base + (start - first) * raw.width, base + (end - first) * raw.width
            start, group = end, group + 1

    def _locate(self, metadata: pq.FileMetaData, field: pa.Field, width: int) -> _RawColumn:
        chunks = _chunks(metadata, field)
        # A type of no fixed width holds no run of values to point into.
        if not _is_fixed_width(field.type) or fixed_width(self._kinds[field.name]) != fixed_width(field.type):
            return _RawColumn(width, np.full(len(chunks), -1, dtype=np.int64))
        headers = self._store.read_ranges(
            self._ref.path,
            [
                (c.data_page_offset, c.data_page_offset + min(HEADER_BYTES, c.total_compressed_size))
                for c in chunks
            ],
        )
        offsets = [
            c.data_page_offset + c.total_compressed_size - metadata.row_group(g).num_rows * width
            if _is_contiguous(headers.chunks[g], c, metadata.row_group(g).num_rows, field)
            else -1
            for g, c in enumerate(chunks)
        ]
        return _RawColumn(width, np.array(offsets, dtype=np.int64))

    def _decode(self, column: str, spans: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8]]:
        found = []
        with open_parquet(self._store, self._ref.path) as file, _readable(self._store, self._ref.path):
            for start, stop in spans:
                first = int(np.searchsorted(self._starts, start, side="right")) - 1
                last = max(first, int(np.searchsorted(self._starts, stop, side="left")) - 1)
                groups = list(range(first, min(last + 1, file.metadata.num_row_groups)))
                chunks = _chunks(file.metadata, file.schema_arrow.field(column))
                table = file.read_row_groups(groups, columns=[column], use_threads=False)
                array = table.column(0).combine_chunks().slice(start - int(self._starts[first]), stop - start)
                found.append(_bytes_of(array, self._kinds[column], self._raw[column].width))
                self.requests += 1
                self.bytes_read += sum(int(chunks[g].total_compressed_size) for g in groups)
        return found


def _is_fixed_width(kind: pa.DataType) -> bool:
    if pa.types.is_fixed_size_list(kind):
        return _is_fixed_width(kind.value_type)
    return bool(
        pa.types.is_fixed_size_binary(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    )


def _stored_kind(name: str, schema: pa.Schema) -> pa.DataType:
    """Type of a column as we write it: of its elements for vectors, a tool that rewrites a file may have widened it."""
    kind = VALUE_TYPES.get(name, schema.field(name).type)
    if name == "embedding":
        kind = pa.float32() if "text_hash" in schema.names else pa.float16()
    found = schema.field(name).type
    return pa.list_(kind, found.list_size) if pa.types.is_fixed_size_list(found) else kind


def _width(file: pq.ParquetFile, field: pa.Field) -> int:
    """Bytes of one value as we write it; where the type does not tell, the first row does."""
    kind = _stored_kind(field.name, file.schema_arrow)
    if not pa.types.is_list(field.type) and not pa.types.is_large_list(field.type) and _is_fixed_width(kind):
        return fixed_width(kind)
    first = next(file.iter_batches(1, columns=[field.name], use_threads=False), None)
    if first is None or first.num_rows == 0:
        return 0
    values = len(first.column(0)[0].as_py())
    return values * fixed_width(kind) if _is_fixed_width(kind) else values


def _bytes_of(array: pa.Array, kind: pa.DataType, width: int) -> NDArray[np.uint8]:
    if _is_binary(array.type):
        values = np.frombuffer(b"".join(array.to_pylist()), np.uint8)
    else:
        flat = array.flatten() if _is_list(array.type) else array
        value = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
        values = flat.to_numpy(zero_copy_only=False).astype(value.to_pandas_dtype(), copy=False)
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(array), width)


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_fixed_size_binary(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _chunks(metadata: pq.FileMetaData, field: pa.Field) -> list[pq.ColumnChunkMetaData]:
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    column = next(i for i, name in enumerate(names) if name.split(".")[0] == field.name)
    return [metadata.row_group(g).column(column) for g in range(metadata.num_row_groups)]


def _is_contiguous(header: bytes, chunk: pq.ColumnChunkMetaData, rows: int, field: pa.Field) -> bool:
    """Whether the values of a chunk are one run at its end: one PLAIN page, not compressed, nothing null."""
    per_row = field.type.list_size if pa.types.is_fixed_size_list(field.type) else 1
    if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page or chunk.num_values != rows * per_row:
        return False
    required = not field.nullable and (per_row == 1 or not field.type.value_field.nullable)
    no_nulls = required or (chunk.statistics is not None and chunk.statistics.null_count == 0)
    return no_nulls and is_one_plain_page(header, chunk.total_compressed_size, chunk.num_values)


def is_one_plain_page(header: bytes, chunk_bytes: int, chunk_values: int) -> bool:
    """Whether the first page of a chunk is its only one, PLAIN, and holds as many values (Thrift compact)."""
    stream = io.BytesIO(header)
    sizes: dict[int, int] = {}
    field_no = 0
    try:
        while (head := stream.read(1)[0]) & 0x0F == I32_FIELD:
            field_no += head >> 4
            sizes[field_no] = _zigzag(stream)
        data_page, values_field = stream.tell(), stream.read(1)[0]
        num_values = _zigzag(stream)
        encoding_field, encoding = stream.read(1)[0], _zigzag(stream)
    except IndexError:
        return False
    is_data_page_v1 = (
        sizes.get(1) == 0 and field_no + (head >> 4) == DATA_PAGE_FIELD and values_field == NEXT_I32
    )
    is_plain = encoding_field == NEXT_I32 and encoding == 0
    end_of_header = chunk_bytes - sizes.get(3, -1)
    is_whole = num_values == chunk_values and data_page < end_of_header <= HEADER_BYTES
    return is_data_page_v1 and is_plain and is_whole


I32_FIELD = 5
"""Type of a 32-bit field in Thrift's compact protocol."""
NEXT_I32 = 0x10 | I32_FIELD
"""Header of a 32-bit field that follows the one before by number."""
DATA_PAGE_FIELD = 5
"""Number of data_page_header in Parquet's PageHeader."""


def _zigzag(stream: io.BytesIO) -> int:
    value = _varint(stream)
    return (value >> 1) ^ -(value & 1)


def _varint(stream: io.BytesIO) -> int:
    value, shift = 0, 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004  (the continuation bit)
            return value
        shift += 7
