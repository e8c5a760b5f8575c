import operator
from datetime import UTC
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.filters import Comparison, ListContains, NullTest, Truth, negate, parse_filter, to_sql
from pipeline.filters.predicates import all_of, any_of, comparison, integer_bound

HOLDS = {
    "=": operator.eq,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
int64s = st.integers(-(2**63), 2**63 - 1)
operators = st.sampled_from(list(HOLDS))
numbers = st.one_of(
    st.decimals(allow_nan=False, allow_infinity=False),
    st.integers(-(2**66), 2**66).map(Decimal),
    st.builds(
        lambda whole, half: Decimal(whole) + half,
        st.integers(-9, 9),
        st.sampled_from([Decimal("0.5"), Decimal(0)]),
    ),
)

leaves = st.one_of(
    st.builds(Truth, st.sampled_from([True, False, None])),
    st.builds(comparison, st.just("year"), operators, int64s),
    st.builds(
        comparison, st.just("score"), operators, st.floats(allow_nan=False).map(lambda value: value + 0.0)
    ),
    st.builds(comparison, st.just("public"), operators, st.booleans()),
    st.builds(comparison, st.just("odd \"'name"), operators, st.text()),
    st.builds(
        comparison,
        st.just("published"),
        operators,
        st.datetimes(timezones=st.just(UTC)),
    ),
    st.builds(NullTest, st.just("year"), st.booleans()),
    st.builds(ListContains, st.just("tags"), st.text("ab'\\\n"), st.booleans()),
)
predicates = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(all_of), st.lists(inner, max_size=4).map(any_of), inner.map(negate)
    ),
    max_leaves=10,
)
ATTRIBUTES = pa.schema(
    {
        "year": pa.int64(),
        "score": pa.float64(),
        "public": pa.bool_(),
        "odd \"'name": pa.string(),
        "published": pa.timestamp("us", tz="UTC"),
        "tags": pa.list_(pa.string()),
    }
)


@given(predicate=predicates)
def test_a_text_reads_back_as_the_predicate_it_was_written_from(predicate):
    assert parse_filter(to_sql(predicate), ATTRIBUTES).predicate == predicate


@given(predicate=predicates)
def test_to_negate_twice_changes_nothing(predicate):
    assert negate(negate(predicate)) == predicate


@given(parts=st.lists(predicates, max_size=4), seed=st.randoms(use_true_random=False))
def test_the_order_of_operands_does_not_matter(parts, seed):
    shuffled = seed.sample(parts, len(parts))
    assert (all_of(parts), any_of(parts)) == (all_of(shuffled), any_of(shuffled))


@given(symbol=operators, value=int64s | st.integers(-9, 9), number=numbers)
def test_an_integer_bound_holds_for_the_integers_that_the_number_does(symbol, value, number):
    bound_symbol, bound = integer_bound(symbol, number)
    assert HOLDS[bound_symbol](value, bound) == HOLDS[symbol](value, number)


@given(symbol=operators, number=numbers)
def test_an_integer_bound_is_an_int64(symbol, number):
    _, bound = integer_bound(symbol, number)
    assert -(2**63) <= bound < 2**63


@pytest.mark.parametrize("number", [Decimal("1e400000"), Decimal("-1e400000"), Decimal("1e-400000")])
def test_a_number_of_any_scale_has_an_integer_bound_at_once(number):
    assert integer_bound("<", number)[0] in {"<", "<=", ">="}


def test_and_over_nothing_is_true_and_or_over_nothing_is_false():
    assert (all_of([]), any_of([])) == (Truth(value=True), Truth(value=False))


def test_null_is_kept_where_it_can_matter():
    recent = Comparison("year", ">", 2020)
    assert to_sql(all_of([recent, Truth(None)])) == '"year" > 2020 AND NULL'
