"""What is written of the attributes of a partition prunes it where no row can match, and only there."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.filters import evaluate, parse_filter
from pipeline.partitioning import merged, summary_of
from pipeline.partitioning.summaries import region_of
from tests.unit.filters.test_parity import TABLE, conditions, parity

KEPT = ["year", "score", "section", "Title", "public", "published", "tags"]
PLAIN = TABLE.select(KEPT)


def region(rows, schema):
    return region_of(summary_of(rows, schema).to_pylist()[0], schema)


@parity
@given(
    where=conditions,
    few=st.lists(st.integers(0, TABLE.num_rows - 1), max_size=12),
    more=st.lists(st.integers(0, TABLE.num_rows - 1), max_size=12),
)
def test_where_a_row_passes_its_summary_says_so(where, few, more):
    one, other = PLAIN.take(pa.array(few, pa.int64())), PLAIN.take(pa.array(more, pa.int64()))
    both = merged([summary_of(rows, PLAIN.schema) for rows in (one, other)], PLAIN.schema)
    known = region_of(both.to_pylist()[0], PLAIN.schema)
    filter_ = parse_filter(where, TABLE.schema)
    if evaluate(filter_, TABLE.take(pa.array([*few, *more], pa.int64()))).any():
        assert known.may_hold(filter_.predicate)


SCHEMA = pa.schema([("n", pa.int64()), ("s", pa.string()), ("t", pa.list_(pa.string()))])


def rows(numbers):
    return pa.table(
        {
            "n": pa.array(numbers, pa.int64()),
            "s": pa.array([None if n is None else f"name {n}" for n in numbers], pa.string()),
            "t": pa.array([[f"tag {n}", "all"] for n in numbers], SCHEMA.field("t").type),
        }
    )


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("count", [20, 1500])
def test_what_does_not_occur_is_known_of_few_values_and_of_many(count, several):
    numbers = [2 * i for i in range(count)]
    if several:
        half = count // 2
        parts = [summary_of(rows(part), SCHEMA) for part in (numbers[:half], numbers[half:])]
        known = region_of(merged(parts, SCHEMA).to_pylist()[0], SCHEMA)
    else:
        known = region(rows(numbers), SCHEMA)

    def may(where):
        return known.may_hold(parse_filter(where, SCHEMA).predicate)

    assert not may("n IS NULL")
    assert not may("n < 0")
    assert not may(f"n > {numbers[-1]}")
    assert may(f"n >= {numbers[-1]}")
    for column, text in (("n = {}", "{}"), ("s = 'name {}'", "{}"), ("list_contains(t, 'tag {}')", "{}")):
        absent = [2 * i + 1 for i in range(count - 1)]
        assert all(may(column.format(text.format(one))) for one in numbers[:50])
        assert sum(may(column.format(text.format(one))) for one in absent) < 0.1 * len(absent)


def test_more_values_than_a_filter_can_tell_apart_leave_the_least_and_the_greatest():
    known = region(rows(list(range(10_000))), SCHEMA)
    assert not known.may_hold(parse_filter("n = 10001", SCHEMA).predicate)
    assert known.may_hold(parse_filter("list_contains(t, 'never')", SCHEMA).predicate)


def test_a_column_of_nulls_alone_has_no_value():
    known = region(rows([None, None]), SCHEMA)
    assert known.may_hold(parse_filter("n IS NULL", SCHEMA).predicate)
    assert not known.may_hold(parse_filter("n >= 0 OR n < 0", SCHEMA).predicate)


def test_long_strings_are_not_written_out():
    long = pa.table({"s": ["x" * 10_000]}, schema=pa.schema([("s", pa.string())]))
    summary = summary_of(long, long.schema)
    assert summary.nbytes < 5000
    known = region(long, long.schema)
    assert known.may_hold(parse_filter(f"s = '{'x' * 10_000}'", long.schema).predicate)
    assert not known.may_hold(parse_filter("s = 'y'", long.schema).predicate)


NUMBERS = [None, float("nan"), -0.0, 0.0, 1.5, 200.0, float("inf"), -float("inf")]
COMPARED = [
    "f = 0",
    "f = 1.5",
    "f < 10",
    "f > 100",
    "f >= 1e999",
    "f IS NULL",
    "f NOT IN (0, 1.5)",
    "f BETWEEN 1 AND 2",
]


@given(
    parts=st.lists(st.lists(st.sampled_from(NUMBERS), max_size=4), min_size=1, max_size=4),
    where=st.sampled_from(COMPARED),
)
def test_segments_of_any_numbers_are_described_so_that_no_match_is_lost(parts, where):
    schema = pa.schema([("f", pa.float64())])
    tables = [pa.table({"f": pa.array(part, pa.float64())}) for part in parts]
    known = region_of(merged([summary_of(one, schema) for one in tables], schema).to_pylist()[0], schema)
    filter_ = parse_filter(where, schema)
    if any(evaluate(filter_, one).any() for one in tables):
        assert known.may_hold(filter_.predicate)


@given(
    parts=st.lists(
        st.lists(st.sampled_from([None, -(2**62), 0, 10**15, 2**62]), max_size=4), min_size=1, max_size=3
    ),
    where=st.sampled_from(["at < '2001-01-01'", "at >= '2001-01-01'", "at = '1970-01-01'", "at IS NULL"]),
)
def test_instants_beyond_the_years_of_python_are_described_too(parts, where):
    kind = pa.timestamp("us", "UTC")
    schema = pa.schema([("at", kind)])
    tables = [pa.table({"at": pa.array(part, pa.int64()).cast(kind)}) for part in parts]
    known = region_of(merged([summary_of(one, schema) for one in tables], schema).to_pylist()[0], schema)
    filter_ = parse_filter(where, schema)
    if any(evaluate(filter_, one).any() for one in tables):
        assert known.may_hold(filter_.predicate)
