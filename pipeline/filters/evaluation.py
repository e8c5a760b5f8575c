"""Evaluates filters on tables: Arrow columns in, truth per row out.

Arrow's own kernels differ from SQL in three places, mended here: `is_in` calls null a non-member, comparisons
with NaN are false (in SQL as DuckDB has it NaN is the greatest float), and `is_in` tells -0.0 from 0.0.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import reduce
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import SchemaMismatchError
from pipeline.filters.attributes import kind_of
from pipeline.filters.parsing import Filter
from pipeline.filters.predicates import (
    INT64_MAX,
    INT64_MIN,
    Comparison,
    Conjunction,
    Disjunction,
    ListContains,
    Membership,
    NullTest,
    Operator,
    Predicate,
    Truth,
    Value,
    integer_bound,
)

__all__ = ["evaluate", "evaluate_many"]

COMPARE: Final[dict[Operator, Any]] = {
    "=": pc.equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
KINDS: Final[dict[type, str]] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "string",
    datetime: "timestamp",
}
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def evaluate(filter: Filter, table: pa.Table) -> NDArray[np.bool_]:  # noqa: A002 - the contract's word
    """Tell which rows pass: those for which the condition is TRUE, not FALSE or NULL.

    Args:
        filter: From `parse_filter`, with a schema in which the columns have the same kinds as in the table.
        table: n rows with at least `filter.columns`.

    Returns:
        (n,) bool.

    Raises:
        SchemaMismatchError: A column is absent, repeated, or of another kind than the filter was checked for.
    """
    (passes,) = evaluate_many([filter], table)
    return passes


def evaluate_many(filters: Iterable[Filter], table: pa.Table) -> Iterator[NDArray[np.bool_]]:
    """`evaluate` of each of several filters; what they have in common is evaluated once."""
    known: dict[Predicate, Any] = {}
    for one in filters:
        truth = _truth(one.predicate, table, known)
        if isinstance(truth, pa.Scalar):
            yield np.full(table.num_rows, truth.as_py() is True)
        else:
            yield np.asarray(pc.fill_null(truth, fill_value=False).to_numpy(), dtype=np.bool_)


def _truth(predicate: Predicate, table: pa.Table, known: dict[Predicate, Any]) -> Any:
    """Give a boolean column with nulls, or a boolean scalar for what holds alike in all rows."""
    if isinstance(predicate, Conjunction | Disjunction):
        kleene = pc.and_kleene if isinstance(predicate, Conjunction) else pc.or_kleene
        return reduce(kleene, (_truth(operand, table, known) for operand in predicate.operands))
    if predicate not in known:
        known[predicate] = _truth_of_one(predicate, table)
    return known[predicate]


def _truth_of_one(
    predicate: Truth | Comparison | Membership | NullTest | ListContains, table: pa.Table
) -> Any:
    match predicate:
        case Truth(value):
            return pa.scalar(value, pa.bool_())
        case Comparison(name, operator, value):
            return _compared(_column(table, name, KINDS[type(value)]), operator, value)
        case Membership(name, values, negated):
            return _member(_column(table, name, KINDS[type(values[0])]), values, negated=negated)
        case NullTest(name, negated):
            return (pc.is_valid if negated else pc.is_null)(_column(table, name))
        case ListContains(name, element, negated):
            return _contains(_column(table, name, "list<string>"), element, negated=negated)


def _column(table: pa.Table, name: str, kind: str | None = None) -> pa.ChunkedArray:
    index = table.schema.get_field_index(name)
    if index < 0:
        raise SchemaMismatchError("filtered table", f"no or several columns {name}", "read filter.columns")
    column = table.column(index)
    if kind is not None and kind_of(column.type) != kind:
        raise SchemaMismatchError(
            "filtered table",
            f"column {name} should have type {kind}, found {column.type}",
            "parse the filter with the table's schema",
        )
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _compared(column: pa.ChunkedArray, operator: Operator, value: Value) -> pa.ChunkedArray:
    comparable, [literal] = _comparable(column, [value])
    if pa.types.is_int64(comparable.type):
        operator, literal = integer_bound(operator, Decimal(literal))
    truth = COMPARE[operator](comparable, pa.scalar(literal, comparable.type))
    if pa.types.is_floating(comparable.type) and operator in {">", ">="}:
        truth = pc.or_(truth, pc.is_nan(comparable))
    return truth


def _member(column: pa.ChunkedArray, values: Sequence[Value], *, negated: bool) -> pa.ChunkedArray:
    comparable, literals = _comparable(column, values)
    if pa.types.is_int64(comparable.type):
        literals = [literal for literal in literals if INT64_MIN <= literal <= INT64_MAX]
    if pa.types.is_floating(comparable.type):
        comparable = pc.add(comparable, 0.0)
    found = pc.is_in(comparable, value_set=pa.array(literals, comparable.type))
    return _known(column, pc.invert(found) if negated else found)


def _known(column: pa.ChunkedArray, truth: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.is_valid(column), truth, pa.scalar(None, pa.bool_()))


def _comparable(column: pa.ChunkedArray, values: Sequence[Value]) -> tuple[pa.ChunkedArray, list[Any]]:
    """Bring a column and literals of its kind to one type; integers and instants to int64, exactly.

    The literals may lie beyond int64 only where the column counts nanoseconds, which end in 2262.
    """
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64()), list(values)
    if not pa.types.is_timestamp(column.type):
        return column, list(values)
    nanoseconds = column.type.unit == "ns"
    ticks = column if nanoseconds else column.cast(pa.timestamp("us", column.type.tz))
    per_microsecond = 1000 if nanoseconds else 1
    return ticks.cast(pa.int64()), [_microseconds(value) * per_microsecond for value in values]


def _microseconds(value: Value) -> int:
    assert isinstance(value, datetime)  # noqa: S101 - `_column` has compared the kinds
    return (value - EPOCH) // timedelta(microseconds=1)


def _contains(column: pa.ChunkedArray, element: str, *, negated: bool) -> pa.ChunkedArray:
    chunks = [_hits(chunk, element) ^ negated for chunk in column.chunks]
    return _known(column, pa.chunked_array(chunks, pa.bool_()))


def _hits(lists: pa.Array, element: str) -> NDArray[np.bool_]:
    # elements: all elements of the chunk's lists, and for each the row of its list
    elements, rows = pc.list_flatten(lists), pc.list_parent_indices(lists)
    hits = np.zeros(len(lists), np.bool_)
    found = pc.fill_null(pc.equal(elements, element), fill_value=False)
    hits[rows.filter(found).to_numpy()] = True
    return hits
