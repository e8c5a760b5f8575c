"""Values of the row that asks, put into the text of its filter."""

from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SchemaMismatchError
from pipeline.filters import evaluate, parse_filter, with_constants


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ("it's", pa.string(), "x = 'it''s'"),
        (7, pa.int64(), "x = 7"),
        (-0.5, pa.float64(), "x = -0.5"),
        (float("inf"), pa.float64(), "x = 1e999"),
        (-float("inf"), pa.float64(), "x = -1e999"),
        (True, pa.bool_(), "x = TRUE"),
        (None, pa.int64(), "x = NULL"),
        (datetime(2024, 1, 31, 12, tzinfo=UTC), pa.timestamp("us", "UTC"), "x = '2024-01-31T12:00:00+00:00'"),
    ],
)
def test_each_kind_of_value_is_written_so_that_it_equals_itself(value, kind, text):
    rows = pa.table({"x": pa.array([value], kind)})
    (found,) = with_constants(["x = {q.x}"], rows, place="here")
    assert found == text
    assert evaluate(parse_filter(found, rows.schema), rows).tolist() == [value is not None]


@given(st.lists(st.one_of(st.none(), st.text()), max_size=20))
def test_no_string_can_leave_its_quotes(values):
    rows = pa.table({"name": pa.array(values, pa.string())})
    texts = with_constants(["name = {q.name}"] * len(values), rows, place="here")
    for at, (text, value) in enumerate(zip(texts, values, strict=True)):
        passes = evaluate(parse_filter(text, rows.schema), rows)
        assert passes[at] == (value is not None)
        assert passes.tolist() == [other == value and value is not None for other in values]


def test_nothing_compares_with_nan():
    rows = pa.table({"x": [float("nan"), 1.0]})
    first, second = with_constants(["x >= {q.x}"] * 2, rows, place="here")
    assert not evaluate(parse_filter(first, rows.schema), rows).any()
    assert evaluate(parse_filter(second, rows.schema), rows).all()


def test_rows_without_places_or_without_a_filter_stay_as_they_are():
    rows = pa.table({"x": [1, 2, 3], "y": [4, 5, 6]})
    texts = ["x > 1", None, "x > {q.x} AND y < {q.y}"]
    assert with_constants(texts, rows, place="here") == ["x > 1", None, "x > 3 AND y < 6"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = {q.gone}", r"asks for {q.gone}, found columns x, tags"),
        ("x = {q.tags}", "in `tags`, found"),
        ("x = '{q.x}'", "stands in quotes"),
    ],
)
def test_what_cannot_be_put_in_is_refused(text, problem):
    rows = pa.table({"x": [float("nan")], "tags": [["a"]]})
    with pytest.raises(SchemaMismatchError, match=problem):
        with_constants([text], rows, place="here")
