from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import SchemaMismatchError
from pipeline.filters import evaluate, parse_filter

NAN = float("nan")


def passing(where: str, column: pa.Array | pa.ChunkedArray) -> list[bool]:
    table = pa.table({"x": column})
    return evaluate(parse_filter(where, table.schema), table).tolist()


def test_the_answer_is_one_bool_per_row():
    passes = evaluate(
        parse_filter("x > 1", pa.schema({"x": pa.int64()})),
        pa.table({"x": pa.array([1, 2, None], pa.int64())}),
    )
    assert (passes.dtype, passes.shape, passes.tolist()) == (np.bool_, (3,), [False, True, False])


@pytest.mark.parametrize("where", ["x = 1", "x IN (1, 2)", "x IS NULL", "TRUE", "NULL", "x = 1 OR NULL"])
def test_a_table_without_rows_has_no_row_that_passes(where):
    empty = pa.table({"x": pa.chunked_array([], pa.int64())})
    passes = evaluate(parse_filter(where, empty.schema), empty)
    assert (passes.dtype, passes.shape) == (np.bool_, (0,))


def test_a_list_column_without_chunks_has_no_row_that_passes():
    assert passing("list_contains(x, 'a')", pa.chunked_array([], pa.list_(pa.string()))) == []


def test_null_is_neither_in_nor_not_in_a_list():
    column = pa.array([1, 3, None])
    assert passing("x IN (1, 2)", column) == [True, False, False]
    assert passing("x NOT IN (1, 2)", column) == [False, True, False]
    assert passing("x NOT IN (1, NULL)", column) == [False, False, False]


def test_nan_equals_no_literal_and_is_greater_than_all():
    column = pa.array([NAN, float("inf"), 1.0, None])
    assert passing("x > 1e999", column) == [True, False, False, False]
    assert passing("x >= 2", column) == [True, True, False, False]
    assert passing("NOT x <= 2", column) == [True, True, False, False]
    assert passing("x <> 1", column) == [True, True, False, False]
    assert passing("x NOT IN (1, 2)", column) == [True, True, False, False]


def test_both_zeros_are_one_value():
    column = pa.array([0.0, -0.0])
    assert passing("x = -0.0", column) == [True, True]
    assert passing("x IN (0, 1)", column) == [True, True]
    assert passing("x < 0", column) == [False, False]


def test_large_integers_are_compared_without_rounding():
    column = pa.array([2**53, 2**53 + 1, 2**63 - 1, -(2**63)])
    assert passing("x = 9007199254740993", column) == [False, True, False, False]
    assert passing("x > 9007199254740992.5", column) == [False, True, True, False]
    assert passing("x < 9223372036854775808", column) == [True, True, True, True]
    assert passing("x <= -9223372036854775809", column) == [False, False, False, False]
    assert passing("x IN (9007199254740992, 0.5, 1e30)", column) == [True, False, False, False]


def test_a_number_that_no_integer_equals_still_leaves_null_unknown():
    column = pa.array([1, None])
    assert passing("x <> 1.5", column) == [True, False]
    assert passing("NOT x = 1.5", column) == [True, False]
    assert passing("x < 1e300", column) == [True, False]


@pytest.mark.parametrize("arrow_type", [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint32()])
def test_narrow_integers_are_compared_with_any_number(arrow_type):
    column = pa.array([1, 2, None], arrow_type)
    assert passing("x < 5000000000", column) == [True, True, False]
    assert passing("x IN (2, 5000000000)", column) == [False, True, False]


@pytest.mark.parametrize(
    "arrow_type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_strings_are_compared_by_code_point_in_every_layout(arrow_type):
    column = pa.array(["a", "Z", "é", None], arrow_type)
    assert passing("x > 'Z'", column) == [True, False, True, False]
    assert passing("x IN ('Z', 'é')", column) == [False, True, True, False]
    assert passing("x IS NULL", column) == [False, False, False, True]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Zurich"])
def test_timestamps_are_compared_as_instants_in_every_unit_and_zone(unit, zone):
    instants = [datetime(2024, 1, 31, tzinfo=UTC), datetime(2024, 1, 31, 12, tzinfo=UTC), None]
    column = pa.array(instants, pa.timestamp(unit, zone))
    assert passing("x = '2024-01-31'", column) == [True, False, False]
    assert passing("x >= TIMESTAMPTZ '2024-01-31 13:00:00+01:00'", column) == [False, True, False]
    assert passing("x IN ('2024-01-31T12:00Z', '1999-01-01')", column) == [False, True, False]
    assert passing("x > '2024-01-31 00:00:00.000001'", column) == [False, True, False]


def test_nanoseconds_are_compared_without_rounding_and_with_years_they_cannot_hold():
    column = pa.array([1_000, 1_001, None], pa.timestamp("ns", tz="UTC"))
    assert passing("x = '1970-01-01 00:00:00.000001'", column) == [True, False, False]
    assert passing("x > '1970-01-01 00:00:00.000001'", column) == [False, True, False]
    assert passing("x < '9999-01-01'", column) == [True, True, False]
    assert passing("x NOT IN ('0001-01-01', '9999-01-01')", column) == [True, True, False]


@pytest.mark.parametrize("arrow_type", [pa.list_(pa.string()), pa.large_list(pa.large_string())])
def test_a_list_contains_an_element_beside_nulls_and_across_chunks(arrow_type):
    whole = pa.array([["a"], ["b", "a", "a"], None, [], [None], ["b", None]], arrow_type)
    column = pa.chunked_array([whole.slice(1, 2), whole.slice(3)])
    assert passing("list_contains(x, 'a')", column) == [True, False, False, False, False]
    assert passing("NOT list_contains(x, 'a')", column) == [False, False, True, True, True]
    assert passing("x IS NULL", column) == [False, True, False, False, False]


def test_null_tests_read_columns_of_any_type():
    assert passing("x IS NOT NULL", pa.array([[0.5], None], pa.list_(pa.float32()))) == [True, False]


def test_columns_that_the_filter_does_not_read_may_be_absent_or_of_any_type():
    parsed = parse_filter("x = 1", pa.schema({"x": pa.int64(), "y": pa.string()}))
    assert evaluate(parsed, pa.table({"x": [1], "z": [b""]})).tolist() == [True]


@pytest.mark.parametrize("table", [pa.table({"y": [1]}), pa.table([[1], [2]], names=["x", "x"])])
def test_a_table_without_exactly_one_such_column_is_refused(table):
    with pytest.raises(SchemaMismatchError, match="no or several columns x"):
        evaluate(parse_filter("x = 1", pa.schema({"x": pa.int64()})), table)


@pytest.mark.parametrize("where", ["x = 1", "x IN (1, 2)", "x > 0 AND x IS NOT NULL"])
def test_a_column_of_another_kind_than_the_filter_was_checked_for_is_refused(where):
    with pytest.raises(SchemaMismatchError, match="column x should have type int, found string"):
        evaluate(parse_filter(where, pa.schema({"x": pa.int64()})), pa.table({"x": ["1"]}))
