"""What is known of rows decides which filters can match among them: never a lost match, and exact on one column."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.filters import NullTest, Region, atoms_of, evaluate, filter_of, parse_filter
from tests.unit.filters.test_parity import ATTRIBUTES, TABLE, conditions, parity

SCHEMA = pa.schema([("n", pa.int64()), ("s", pa.string()), ("f", pa.float64()), ("t", pa.list_(pa.string()))])


def atoms(where):
    return list(dict.fromkeys(atoms_of(parse_filter(where, ATTRIBUTES).predicate)))


@parity
@given(known=st.lists(st.tuples(conditions, st.integers(0, 9), st.booleans()), max_size=4), where=conditions)
def test_where_a_row_passes_the_filter_the_region_says_that_one_may(known, where):
    region, rows = Region(), TABLE
    for text, choice, holds in known:
        found = atoms(text)
        if found:
            atom = found[choice % len(found)]
            region = region.where(atom, holds=holds)
            passes = evaluate(filter_of(atom), rows)
            rows = rows.filter(pa.array(passes if holds else ~passes))
    assert rows.num_rows == 0 or not region.is_empty
    filter_ = parse_filter(where, ATTRIBUTES)
    passes = evaluate(filter_, rows)
    if passes.any():
        assert region.may_hold(filter_.predicate)
    if region.must_hold(filter_.predicate):
        assert passes.all()


@parity
@given(where=conditions)
def test_atoms_tell_rows_apart_as_finely_as_the_filter(where):
    filter_ = parse_filter(where, ATTRIBUTES)
    parts = atoms(where)
    assert not any(getattr(one, "negated", False) for one in parts)
    columns = [evaluate(filter_of(one), TABLE).tolist() for one in parts]
    columns += [evaluate(filter_of(NullTest(one, negated=False)), TABLE).tolist() for one in filter_.columns]
    passes = evaluate(filter_, TABLE).tolist()
    groups = {}
    for row, passing in enumerate(passes):
        assert groups.setdefault(tuple(column[row] for column in columns), passing) == passing


def region(*known):
    found = Region()
    for text, holds in known:
        found = found.where(parse_filter(text, SCHEMA).predicate, holds=holds)
    return found


@pytest.mark.parametrize(
    ("known", "where", "may"),
    [
        ([("n >= 5", True)], "n < 5", False),
        ([("n >= 5", True)], "n <= 5", True),
        ([("n >= 5", True)], "n IS NULL", False),
        ([("n >= 5", False)], "n IS NULL", True),
        ([("n >= 5", False)], "n > 5", False),
        ([("n IN (1, 2, 3)", True), ("n = 2", False)], "n = 2", False),
        ([("n IN (1, 2, 3)", True), ("n = 2", False)], "n > 1", True),
        ([("n IN (1, 2, 3)", True), ("n > 2", False)], "n NOT IN (1, 2)", False),
        ([("n IS NULL", True)], "n <> 3", False),
        ([("n IS NULL", True)], "s = 'a'", True),
        ([("n IS NULL", False)], "n IS NULL", False),
        ([("f > 1", False), ("f IS NULL", False)], "f > 2 OR f IS NULL", False),
        ([("s = 'a'", True)], "s IN ('b', 'c') AND n = 1", False),
        ([("s = 'a'", True)], "s IN ('a', 'c') AND (n = 1 OR n = 2)", True),
        ([("s = 'a'", True), ("n = 3", False)], "n = 3 OR s = 'b'", False),
        ([("list_contains(t, 'x')", False)], "list_contains(t, 'x')", False),
        ([("list_contains(t, 'x')", False)], "list_contains(t, 'y')", True),
        ([("list_contains(t, 'x')", True)], "NOT list_contains(t, 'x')", False),
        ([("list_contains(t, 'x')", True)], "t IS NULL", False),
        ([], "n = 1 AND n = 2", False),
        ([], "NULL", False),
    ],
)
def test_conditions_on_one_column_are_decided_exactly(known, where, may):
    assert region(*known).may_hold(parse_filter(where, SCHEMA).predicate) is may


@pytest.mark.parametrize(
    ("known", "where", "must"),
    [
        ([("n >= 5", True)], "n >= 5", True),
        ([("n >= 5", True)], "n >= 4", True),
        ([("n >= 5", True)], "n >= 6", False),
        ([("n >= 5", True)], "n IS NOT NULL", True),
        ([("n >= 5", False)], "n < 5", False),
        ([("n >= 5", False), ("n IS NULL", False)], "n < 5", True),
        ([("s = 'a'", True)], "s IN ('a', 'b')", True),
        ([("s = 'a'", True)], "s = 'a' AND n >= 5", False),
        ([("s = 'a'", True)], "s = 'a' OR n >= 5", True),
        ([("s IN ('a', 'b')", True)], "s = 'a' OR s = 'b'", True),
        ([("list_contains(t, 'x')", True)], "list_contains(t, 'x')", True),
        ([("list_contains(t, 'x')", False)], "NOT list_contains(t, 'x')", False),
        ([], "TRUE", True),
        ([], "NULL", False),
    ],
)
def test_a_region_says_of_a_filter_that_all_rows_pass_it(known, where, must):
    assert region(*known).must_hold(parse_filter(where, SCHEMA).predicate) is must
