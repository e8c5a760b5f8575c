"""Our Parquet is ordinary and raw-addressable; whatever another tool makes of it is still read right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import schemas, tables
from pipeline.artifacts import FileRef
from pipeline.errors import CorruptArtifactError, IncompatibleModelsError, MissingFileError
from pipeline.storage import LocalStore, Store, sha256_of_file
from pipeline.tables import (
    RawFile,
    fixed_width,
    hash_keys,
    open_parquet,
    read_bucket,
    read_columns,
    to_matrix,
    vector_array,
    write_addressed,
    write_bucketed,
    write_table,
)
from tests.rewriters import REWRITERS

ATTRIBUTES = pa.schema(
    [
        pa.field("year", pa.int64()),
        pa.field("section", pa.string()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("price", pa.float64()),
        pa.field("open", pa.bool_()),
        pa.field("seen", pa.timestamp("us", tz="UTC")),
    ]
)
SCHEMAS = {
    "documents": schemas.documents_schema(ATTRIBUTES),
    "embeddings": schemas.embeddings_schema(24),
    "heads": schemas.heads_schema(24),
    "directory": schemas.DIRECTORY,
    "lists": schemas.lists_schema(12),
    "vectors": schemas.vectors_schema(24, ATTRIBUTES),
    "dead_letters": schemas.DEAD_LETTERS,
    "results": schemas.RESULTS,
}
SIZES = (0, 1, 127, 128, 129, 300)
"""About the borders of a row group of 128 rows."""


@pytest.fixture(autouse=True)
def _small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", 128)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "root"))


def _values(kind: pa.DataType, n: int, rng: np.random.Generator, *, nullable: bool) -> pa.Array:
    """Random values of one type; a third of them null where that is allowed."""
    mask = rng.random(n) < 0.3 if nullable else np.zeros(n, dtype=bool)
    if pa.types.is_fixed_size_list(kind):
        matrix = rng.standard_normal((n, kind.list_size)).astype(kind.value_type.to_pandas_dtype())
        return vector_array(matrix)
    makers: list[tuple[Callable[[pa.DataType], bool], Callable[[], list[Any]]]] = [
        (pa.types.is_fixed_size_binary, lambda: [rng.bytes(kind.byte_width) for _ in range(n)]),
        (pa.types.is_list, lambda: [[f"tag {rng.integers(5)}"] * int(rng.integers(3)) for _ in range(n)]),
        (pa.types.is_string, lambda: [f"text {rng.integers(50)}" for _ in range(n)]),
        (pa.types.is_floating, lambda: list(rng.standard_normal(n).astype(kind.to_pandas_dtype()))),
        (pa.types.is_boolean, lambda: [bool(b) for b in rng.integers(2, size=n)]),
        (lambda _: True, lambda: rng.integers(0, 1000, n).tolist()),
    ]
    values = next(make for fits, make in makers if fits(kind))()
    return pa.array([None if m else v for m, v in zip(mask, values, strict=True)], type=kind)


def _table(schema: pa.Schema, n: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns = [_values(field.type, n, rng, nullable=field.nullable) for field in schema]
    return pa.table(columns, schema=schema)


def _raw_columns(schema: pa.Schema) -> list[str]:
    return [name for name in schema.names if name in schemas.RAW_COLUMNS]


def _expected(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """(rows, width) bytes, by decoding with pyarrow one value at a time."""
    width = fixed_width(column.type)
    if pa.types.is_fixed_size_binary(column.type):
        data = b"".join(column.to_pylist())
    else:
        kind = column.type.value_type if pa.types.is_fixed_size_list(column.type) else column.type
        data = np.array(column.to_pylist(), dtype=kind.to_pandas_dtype()).tobytes()
    return np.frombuffer(data, np.uint8).reshape(len(column), width)


def _spans(n: int) -> list[tuple[int, int]]:
    return [(0, n), (n // 2, n), (n // 3, n // 2), (n, n), (max(0, n - 1), n), (0, min(n, 1))]


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_raw_addressed_bytes_are_the_decoded_values(any_store: Store, name: str, n: int) -> None:
    schema = SCHEMAS[name]
    table = _table(schema, n)
    ref = write_table(any_store, "data", schema, [table])
    assert ref.rows == n
    file = RawFile(any_store, ref, _raw_columns(schema))
    assert file.rows == n
    for column in _raw_columns(schema):
        assert file.is_raw(column)
        expected = _expected(table[column])
        found = file.read(column, _spans(n))
        for (start, stop), data in zip(_spans(n), found, strict=True):
            np.testing.assert_array_equal(data, expected[start:stop])


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_written_is_read(store: LocalStore, name: str) -> None:
    table = _table(SCHEMAS[name], 300)
    ref = write_table(store, "data", SCHEMAS[name], [table.slice(0, 100), table.slice(100)])
    assert read_columns(store, ref.path).equals(table)


def test_each_piece_starts_a_row_group(store: LocalStore) -> None:
    table = _table(SCHEMAS["lists"], 300)
    pieces = [table.slice(0, 50), table.slice(50, 0), table.slice(50, 200), table.slice(250)]
    ref = write_table(store, "data", SCHEMAS["lists"], pieces)
    with open_parquet(store, ref.path) as file:
        groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
    assert groups == [50, 128, 72, 50]


def test_a_row_group_of_wide_vectors_is_bounded_by_bytes(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP_BYTES", 16 * 96)
    ref = write_table(store, "data", SCHEMAS["heads"], [_table(SCHEMAS["heads"], 40)])
    with open_parquet(store, ref.path) as file:
        assert [file.metadata.row_group(g).num_rows for g in range(3)] == [16, 16, 8]


def test_columns_may_come_in_another_order(store: LocalStore) -> None:
    schema = SCHEMAS["lists"]
    table = _table(schema, 10)
    ref = write_table(store, "data", schema, [table.select(list(reversed(schema.names)))])
    assert read_columns(store, ref.path).equals(table)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    refs = [
        write_table(
            LocalStore(str(tmp_path / root)), "d", SCHEMAS["vectors"], [_table(SCHEMAS["vectors"], 200)]
        )
        for root in ("a", "b")
    ]
    assert refs[0] == refs[1]
    assert (tmp_path / "a" / refs[0].path).read_bytes() == (tmp_path / "b" / refs[1].path).read_bytes()


def test_a_failed_writer_leaves_nothing(any_store: Store) -> None:
    def pieces() -> Any:
        yield _table(SCHEMAS["lists"], 10)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_table(any_store, "data", SCHEMAS["lists"], pieces())
    assert list(any_store.list("")) == []


# ------------------------------------------------------------------------------------------------ other readers


@pytest.mark.parametrize("n", [1, 300])
@pytest.mark.parametrize("name", SCHEMAS)
def test_duckdb_reads_our_files(store: LocalStore, name: str, n: int) -> None:
    table = _table(SCHEMAS[name], n)
    path = Path(store.uri) / write_table(store, "data", SCHEMAS[name], [table]).path
    found = duckdb.sql(f"SELECT * FROM read_parquet('{path}')").to_arrow_table()
    assert found.column_names == table.column_names
    for column in table.column_names:
        _assert_same_values(found[column], table[column])


@pytest.mark.parametrize("n", [0, 1, 300])
@pytest.mark.parametrize("name", SCHEMAS)
def test_polars_reads_our_files(store: LocalStore, name: str, n: int) -> None:
    table = _table(SCHEMAS[name], n)
    path = Path(store.uri) / write_table(store, "data", SCHEMAS[name], [table]).path
    found = pl.read_parquet(path)
    assert found.columns == table.column_names
    for column in table.column_names:
        _assert_same_values(found[column].to_arrow(), table[column])


def _assert_same_values(found: pa.Array | pa.ChunkedArray, expected: pa.ChunkedArray) -> None:
    assert _comparable(found.to_pylist()) == _comparable(expected.to_pylist())


def _comparable(values: list[Any]) -> list[Any]:
    return [
        list(map(float, v)) if isinstance(v, list) and v and not isinstance(v[0], str) else v for v in values
    ]


# ------------------------------------------------------------------------------------------------ rewritten files


@pytest.mark.parametrize("n", [1, 300])
@pytest.mark.parametrize("name", ["embeddings", "heads", "lists", "vectors"])
@pytest.mark.parametrize("tool", REWRITERS)
def test_a_rewritten_file_gives_the_same_values(store: LocalStore, tool: str, name: str, n: int) -> None:
    table = _table(SCHEMAS[name], n)
    ref = _rewritten(store, write_table(store, "data", SCHEMAS[name], [table]), REWRITERS[tool])
    file = RawFile(store, ref, _raw_columns(SCHEMAS[name]))
    for column in _raw_columns(SCHEMAS[name]):
        expected = _expected(table[column])
        for (start, stop), data in zip(_spans(n), file.read(column, _spans(n)), strict=True):
            np.testing.assert_array_equal(data, expected[start:stop])


def _rewritten(store: LocalStore, ref: FileRef, rewrite: Callable[[Path, Path], None]) -> FileRef:
    source, target = Path(store.uri) / ref.path, Path(store.uri) / "rewritten.parquet"
    rewrite(source, target)
    return FileRef(
        path=target.name, rows=ref.rows, bytes=target.stat().st_size, sha256=sha256_of_file(target)
    )


def test_a_column_with_nulls_is_never_addressed_raw(store: LocalStore, tmp_path: Path) -> None:
    table = pa.table({"row": pa.array([1, None, 3], pa.int32())})
    target = tmp_path / "root" / "x.parquet"
    target.parent.mkdir()
    pq.write_table(table, target, compression="none", use_dictionary=False)
    ref = FileRef(path="x.parquet", rows=3, bytes=target.stat().st_size, sha256="")
    assert not RawFile(store, ref, ["row"]).is_raw("row")


# ------------------------------------------------------------------------------------------------ buckets


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    buckets=st.lists(st.integers(0, 6), max_size=300),
    seed=st.integers(0, 9),
)
def test_buckets_hold_every_row_once_in_order(store: LocalStore, buckets: list[int], seed: int) -> None:
    table = _table(SCHEMAS["documents"], len(buckets), seed)
    ref = write_bucketed(store, "scratch", table, np.array(buckets, dtype=np.int64))
    for bucket in range(8):
        rows = pa.array([i for i, b in enumerate(buckets) if b == bucket], pa.int64())
        assert read_bucket(store, ref.path, bucket).equals(table.take(rows))


def test_a_bucket_gives_the_columns_asked_for(store: LocalStore) -> None:
    table = _table(SCHEMAS["documents"], 10)
    ref = write_bucketed(store, "scratch", table, np.arange(10) % 2)
    assert read_bucket(store, ref.path, 1, ["text", "year"]).column_names == ["text", "year"]


def test_a_bucket_says_what_made_it_and_not_which_buckets_its_file_has(store: LocalStore) -> None:
    made = schemas.made_by("space", "binarizers/b")
    table = _table(SCHEMAS["documents"], 10).replace_schema_metadata(made)
    ref = write_bucketed(store, "scratch", table, np.arange(10) % 2)
    assert read_bucket(store, ref.path, 1).schema.metadata == made


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (("elsewhere", "binarizers/b"), "expected vectors of space here, found vectors of space elsewhere"),
        (("here", "binarizers/c"), "expected codes of binarizers/b, found codes of binarizers/c"),
    ],
)
def test_a_file_made_by_another_is_not_opened_for_raw_reads(
    store: LocalStore, other: tuple[str, str], problem: str
) -> None:
    schema = SCHEMAS["lists"].with_metadata(schemas.made_by(*other))
    ref = write_table(store, "data", schema, [_table(SCHEMAS["lists"], 3)])
    assert RawFile(store, ref, ["row"], schemas.made_by(*other)).rows == 3
    with pytest.raises(IncompatibleModelsError, match=problem):
        RawFile(store, ref, ["row"], schemas.made_by("here", "binarizers/b"))


def test_a_file_that_does_not_say_what_made_it_is_opened(store: LocalStore) -> None:
    ref = write_table(store, "data", SCHEMAS["lists"], [_table(SCHEMAS["lists"], 3)])
    assert RawFile(store, ref, ["row"], schemas.made_by("here", "binarizers/b")).rows == 3


def test_a_file_without_buckets_is_refused(store: LocalStore) -> None:
    ref = write_table(store, "data", SCHEMAS["lists"], [_table(SCHEMAS["lists"], 3)])
    with pytest.raises(CorruptArtifactError, match="cut into buckets"):
        read_bucket(store, ref.path, 0)


# ------------------------------------------------------------------------------------------------ damage


def test_a_file_that_is_not_parquet_is_corrupt(any_store: Store) -> None:
    any_store.write("x.parquet", b"PAR1 but not really")
    with pytest.raises(CorruptArtifactError, match="not readable Parquet"):
        open_parquet(any_store, "x.parquet")
    with pytest.raises(MissingFileError):
        open_parquet(any_store, "absent.parquet")


@pytest.mark.parametrize("reader", [read_columns, lambda s, p: read_bucket(s, p, 0)])
def test_a_damaged_page_is_corrupt(store: LocalStore, reader: Callable[[Store, str], pa.Table]) -> None:
    table = _table(SCHEMAS["documents"], 100)
    ref = write_bucketed(store, "data", table, np.zeros(100, dtype=np.int64))
    path = Path(store.uri) / ref.path
    data = bytearray(path.read_bytes())
    with open_parquet(store, ref.path) as file:
        names = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
        chunk = file.metadata.row_group(0).column(names.index("text"))
    data[chunk.data_page_offset : chunk.data_page_offset + 60] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match="not readable Parquet"):
        reader(store, ref.path)


def test_a_truncated_file_is_corrupt_under_raw_reads(any_store: Store) -> None:
    ref = write_table(any_store, "data", SCHEMAS["lists"], [_table(SCHEMAS["lists"], 100)])
    file = RawFile(any_store, ref, ["code"])
    any_store.write(ref.path, any_store.read(ref.path)[:100])
    with pytest.raises(CorruptArtifactError, match=r"truncated|ends before"):
        file.read_all("code")


def test_reading_leaves_no_file_open(store: LocalStore, recwarn: pytest.WarningsRecorder) -> None:
    ref = write_table(store, "data", SCHEMAS["lists"], [_table(SCHEMAS["lists"], 100)])
    read_columns(store, ref.path)
    store.write("x.parquet", b"not parquet")
    with pytest.raises(CorruptArtifactError):
        open_parquet(store, "x.parquet")
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]


# ------------------------------------------------------------------------------------------------ arrays


@given(st.integers(0, 5), st.integers(1, 4))
def test_a_matrix_survives_the_column(n: int, d: int) -> None:
    matrix = np.arange(n * d, dtype=np.float16).reshape(n, d)
    column = vector_array(matrix)
    np.testing.assert_array_equal(to_matrix(column), matrix)
    np.testing.assert_array_equal(to_matrix(pa.chunked_array([column, column])), np.vstack([matrix, matrix]))


@pytest.mark.parametrize("start", [0, 3])
def test_hash_keys_sort_as_the_bytes_do(start: int) -> None:
    rng = np.random.default_rng(1)
    hashes = [rng.bytes(16) for _ in range(50)] + [b"\x00" * 16, b"a" + b"\x00" * 15]
    column = pa.chunked_array([pa.array(hashes, pa.binary(16))]).slice(start)
    keys = hash_keys(column)
    order = np.argsort(keys, kind="stable")
    assert [hashes[start:][i] for i in order] == sorted(hashes[start:])


def test_hash_keys_of_no_rows() -> None:
    assert len(hash_keys(pa.chunked_array([], pa.binary(16)))) == 0


def test_written_columns_lie_where_it_is_said(store: LocalStore) -> None:
    schema = pa.schema(
        [
            pa.field("code", pa.binary(3), nullable=False),
            pa.field("doc_id", pa.string(), nullable=False),
            pa.field("n", pa.int64(), nullable=False),
            pa.field("tag", pa.string()),
        ]
    )
    table = _table(schema, 227)
    pieces = [table.slice(0, 100), table.slice(100, 7), table.slice(107)]
    written = write_addressed(store, "data", schema, pieces, raw=frozenset({"code", "doc_id", "n"}))
    data = store.read(written.ref.path)
    assert set(written.starts) == set(written.ends) == {"code", "doc_id", "n"}
    for group, piece in enumerate(pieces):
        expected = {
            "code": b"".join(piece["code"].to_pylist()),
            "doc_id": b"".join(
                len(d).to_bytes(4, "little") + d.encode() for d in piece["doc_id"].to_pylist()
            ),
            "n": piece["n"].to_numpy().tobytes(),
        }
        for name, values in expected.items():
            start, end = int(written.starts[name][group]), int(written.ends[name][group])
            assert data[start:end].endswith(values)
            header = data[start : start + tables.HEADER_BYTES]
            assert tables.is_one_plain_page(header, end - start, piece.num_rows)
    assert read_columns(store, written.ref.path).equals(table)
