"""`evaluate` against DuckDB: the same WHERE on the same Arrow table, for the text as written and the canonical one."""

import random
from datetime import UTC, datetime

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.filters import evaluate, parse_filter

INTS = [None, -(2**63), -3, 0, 1, 2, 2020, 2**53, 2**53 + 1, 2**63 - 1]
FLOATS = [None, float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 0.5, 1.5, 2.0, 2.0**53, 0.1, 1e300]
STRINGS = [None, "", "a", "A", "b", "it's", "é", 'q"', "a\\b", "zz"]
INSTANTS = [None, *(datetime(2020, 1, day, hour, tzinfo=UTC) for day in (1, 2) for hour in (0, 12))]
LISTS = [None, [], ["a"], ["a", None], [None], ["b", "a", "a"], ["it's"]]
BOOLS = [None, True, False]

ATTRIBUTES = pa.schema(
    {
        "year": pa.int64(),
        "count": pa.int32(),
        "score": pa.float64(),
        "section": pa.string(),
        "Title": pa.large_string(),
        "public": pa.bool_(),
        "published": pa.timestamp("us", tz="UTC"),
        "fetched": pa.timestamp("ns"),
        "tags": pa.list_(pa.string()),
        "more tags": pa.large_list(pa.string()),
    }
)


def make_table(num_rows: int) -> pa.Table:
    draw = random.Random(7)
    values = {
        "year": INTS,
        "count": [None, -3, 0, 1, 2, 2020],
        "score": FLOATS,
        "section": STRINGS,
        "Title": STRINGS,
        "public": BOOLS,
        "published": INSTANTS,
        "fetched": [instant and instant.replace(tzinfo=None) for instant in INSTANTS],
        "tags": LISTS,
        "more tags": LISTS,
    }
    table = pa.table({name: draw.choices(values[name], k=num_rows) for name in ATTRIBUTES.names}, ATTRIBUTES)
    # Chunks that start inside a buffer: kernels on lists must not count from the buffer's start.
    return pa.concat_tables([table.slice(0, 100), table.slice(100, 3), table.slice(103)])


TABLE = make_table(400)


@pytest.fixture(scope="module")
def connection():
    connected = duckdb.connect()
    connected.execute("SET TimeZone = 'UTC'")
    connected.register("documents", TABLE.append_column("row", pa.array(range(TABLE.num_rows))))
    yield connected
    connected.close()


def duckdb_rows(connection: duckdb.DuckDBPyConnection, where: str) -> list[int]:
    query = f'SELECT "row" FROM documents WHERE {where} ORDER BY 1'
    return [row for (row,) in connection.execute(query).fetchall()]


def strata_rows(where: str) -> list[int]:
    return np.flatnonzero(evaluate(parse_filter(where, ATTRIBUTES), TABLE)).tolist()


def sql_string(text: str | None) -> str:
    return "'" + (text or "").replace("'", "''") + "'"


ints = st.sampled_from(
    [
        "NULL",
        "-9223372036854775808",
        "-3",
        "0",
        "+1",
        "1.0",
        "1.5",
        "-2.5",
        "2",
        "2020",
        "9007199254740993",
        "9007199254740992.5",
        "9223372036854775807",
        "9223372036854775808",
        "-99999999999999999999999",
        "(0)",
    ]
)
floats = st.sampled_from(
    [
        "NULL",
        "0",
        "-0.0",
        "0.5",
        ".5",
        "1.5e0",
        "2",
        "-1e300",
        "1e300",
        "1e999",
        "-1e999",
        "0.1",
        "9007199254740993",
    ]
)
strings = st.sampled_from(["NULL", *map(sql_string, STRINGS)])
instants = st.sampled_from(
    [
        "NULL",
        "'2020-01-01'",
        "DATE '2020-01-02'",
        "TIMESTAMP '2020-01-01 12:00:00'",
        "'2020-01-02T12:00:00Z'",
        "TIMESTAMP '2020-01-01 12:00:00.000001'",
        "date '1999-12-31'",
    ]
)
zoned_instants = instants | st.sampled_from(
    [
        "'2020-01-01 14:00+02'",
        "TIMESTAMPTZ '2020-01-02 01:30:00+01:30'",
        "'0001-01-01'",
        "'9999-12-31 23:59:59.999999'",
    ]
)
bools = st.sampled_from(["NULL", "TRUE", "false"])

COLUMNS = {
    "year": ints,
    '"year"': ints,
    "count": ints,
    "score": floats,
    "section": strings,
    '"Title"': strings,
    "public": bools,
    "published": zoned_instants,
    "fetched": instants,
}
OPERATORS = ["=", "==", "!=", "<>", "<", "<=", ">", ">="]


@st.composite
def comparisons(draw: st.DrawFn) -> str:
    column = draw(st.sampled_from(list(COLUMNS)))
    literal, further = draw(COLUMNS[column]), draw(st.lists(COLUMNS[column], max_size=4))
    operator = draw(st.sampled_from(OPERATORS))
    members = ", ".join([literal, *further])
    return draw(
        st.sampled_from(
            [
                f"{column} {operator} {literal}",
                f"{literal}{operator}{column}",
                f"{column} in ({members})",
                f"{column} NOT IN ({members})",
                f"{column} BETWEEN {literal} AND {further[0] if further else literal}",
                f"{column} not between {literal} AND {further[0] if further else literal}",
                f"{column} IS NULL",
                f"{column} is not null",
            ]
        )
    )


leaves = st.one_of(
    comparisons(),
    st.builds("list_contains({}, {})".format, st.sampled_from(["tags", '"more tags"']), strings),
    st.sampled_from(["public", "TRUE", "FALSE", "NULL", "tags IS NULL", '"more tags" IS NOT NULL']),
)


def joined(conditions: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(conditions, min_size=2, max_size=4).map(lambda parts: "(" + " AND ".join(parts) + ")"),
        st.lists(conditions, min_size=2, max_size=4).map(lambda parts: "(" + "\n or ".join(parts) + ")"),
        conditions.map("NOT ({})".format),
        conditions.map("not {}".format),
    )


conditions = st.recursive(leaves, joined, max_leaves=8)

parity = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@parity
@given(where=conditions)
def test_the_rows_that_pass_are_those_duckdb_selects(connection, where):
    assert strata_rows(where) == duckdb_rows(connection, where)


@parity
@given(where=conditions)
def test_the_rows_that_pass_the_negation_are_those_duckdb_selects(connection, where):
    # With the test above this pins all three truth values: a NULL passes neither.
    assert strata_rows(f"NOT ({where})") == duckdb_rows(connection, f"NOT ({where})")


@parity
@given(where=conditions)
def test_the_canonical_text_means_the_same_in_duckdb(connection, where):
    assert duckdb_rows(connection, parse_filter(where, ATTRIBUTES).text) == duckdb_rows(connection, where)


@parity
@given(where=conditions)
def test_the_canonical_text_reads_back_as_the_same_filter(where):
    parsed = parse_filter(where, ATTRIBUTES)
    assert parse_filter(parsed.text, ATTRIBUTES) == parsed
