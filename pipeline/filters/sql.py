"""Reads WHERE texts: sqlglot's tree in, predicates out. The only module here that knows sqlglot.

Each node type that is read is named in `READERS`; every other is refused, so a new sqlglot can widen nothing.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from sqlglot import Dialect, exp
from sqlglot.errors import ParseError, SqlglotError

from pipeline.errors import FilterError
from pipeline.filters.attributes import COMPARABLE, Attribute, Raw, Scope, convert, parse_instant
from pipeline.filters.predicates import (
    ListContains,
    NullTest,
    Operator,
    Predicate,
    Truth,
    all_of,
    any_of,
    comparison,
    integer_bound,
    negate,
)

__all__ = ["read_predicate"]

SUPPORTED: Final = (
    "supported are = <> < <= > >= IN, NOT IN, BETWEEN, IS NULL between one column and literals, AND, OR, NOT, "
    "TRUE, FALSE, boolean columns and list_contains(column, 'element')"
)
OPERATORS: Final[dict[Any, Operator]] = {
    exp.EQ: "=",
    exp.NEQ: "<>",
    exp.LT: "<",
    exp.LTE: "<=",
    exp.GT: ">",
    exp.GTE: ">=",
}
MIRRORED: Final[dict[Operator, Operator]] = {
    "=": "=",
    "<>": "<>",
    "<": ">",
    "<=": ">=",
    ">": "<",
    ">=": "<=",
}


def read_predicate(scope: Scope) -> Predicate:
    """Parse the scope's text and check it against the scope's columns.

    Raises:
        FilterError: As `parse_filter` describes.
    """
    try:
        return _predicate(_parsed(scope), scope)
    except RecursionError:
        raise scope.error(
            "nested too deeply", "use fewer parentheses; IN takes any number of values"
        ) from None


def _parsed(scope: Scope) -> exp.Expression:
    try:
        conditions = Dialect.get_or_raise("duckdb").parse_into(exp.Condition, scope.text)
    except SqlglotError as error:
        raise scope.error(f"not a SQL condition: {_described(error)}", SUPPORTED) from error
    if len(conditions) != 1 or conditions[0] is None:
        found = "an empty text" if conditions == [None] else f"{len(conditions)} separated by semicolons"
        raise scope.error(f"expected one condition, found {found}", "join conditions by AND or OR")
    return conditions[0]


def _described(error: SqlglotError) -> str:
    if isinstance(error, ParseError) and error.errors:
        first = error.errors[0]
        # sqlglot names its own classes where an operand is missing.
        missing = first["description"].startswith("Required keyword")
        problem = "something is missing" if missing else first["description"]
        return f"{problem} near {first['highlight']!r}, character {first['col']}"
    return str(error)


def _predicate(node: exp.Expression, scope: Scope) -> Predicate:
    read = READERS.get(type(node))
    if read is None:
        raise _refusal("a condition", node, scope)
    return read(node, scope)


def _refusal(expected: str, node: exp.Expression, scope: Scope) -> FilterError:
    return scope.error(f"expected {expected}, found {_written(node)}", SUPPORTED)


def _paren(node: exp.Expression, scope: Scope) -> Predicate:
    return _predicate(node.this, scope)


def _not(node: exp.Expression, scope: Scope) -> Predicate:
    return negate(_predicate(node.this, scope))


def _and(node: exp.Expression, scope: Scope) -> Predicate:
    return all_of([_predicate(operand, scope) for operand in node.flatten()])


def _or(node: exp.Expression, scope: Scope) -> Predicate:
    return any_of([_predicate(operand, scope) for operand in node.flatten()])


def _truth(node: exp.Expression, _scope: Scope) -> Predicate:
    return Truth(bool(node.this) if isinstance(node, exp.Boolean) else None)


def _bare_column(node: exp.Expression, scope: Scope) -> Predicate:
    attribute = _attribute(node, scope)
    if attribute.kind != "bool":
        raise scope.error(
            f"column {attribute.name} has type {attribute.kind} and is no condition by itself",
            "only a bool column is; compare it with a literal",
        )
    return comparison(attribute.name, "=", value=True)


def _comparison(node: exp.Expression, scope: Scope) -> Predicate:
    operator = OPERATORS[type(node)]
    left, right = node.left.unnest(), node.right.unnest()
    if isinstance(right, exp.Column) and not isinstance(left, exp.Column):
        left, right, operator = right, left, MIRRORED[operator]
    return _compared(_attribute(left, scope), operator, right, scope)


def _compared(attribute: Attribute, operator: Operator, literal: exp.Expression, scope: Scope) -> Predicate:
    raw = _raw(literal, scope)
    if raw is None and attribute.kind in COMPARABLE:
        return Truth(None)
    value = None if raw is None else convert(raw, attribute.kind)
    if value is None:
        raise scope.mismatch(attribute, _written(literal))
    if isinstance(value, Decimal):
        return comparison(attribute.name, *integer_bound(operator, value))
    return comparison(attribute.name, operator, value)


def _between(node: exp.Expression, scope: Scope) -> Predicate:
    _expect_arguments(node, {"this", "low", "high"}, scope)
    attribute = _attribute(node.this, scope)
    low, high = node.args["low"], node.args["high"]
    return all_of([_compared(attribute, ">=", low, scope), _compared(attribute, "<=", high, scope)])


def _in(node: exp.Expression, scope: Scope) -> Predicate:
    _expect_arguments(node, {"this", "expressions"}, scope)
    if not node.expressions:
        raise _refusal("at least one literal after IN", node, scope)
    attribute = _attribute(node.this, scope)
    return any_of([_compared(attribute, "=", literal, scope) for literal in node.expressions])


def _is(node: exp.Expression, scope: Scope) -> Predicate:
    if not isinstance(node.expression, exp.Null):
        raise _refusal("NULL or NOT NULL after IS", node, scope)
    return NullTest(_attribute(node.this, scope).name, negated=False)


def _list_contains(node: exp.Expression, scope: Scope) -> Predicate:
    _expect_arguments(node, {"this", "expression"}, scope)
    attribute, raw = _attribute(node.this, scope), _raw(node.expression, scope)
    if attribute.kind != "list<string>":
        raise scope.error(
            f"column {attribute.name} has type {attribute.kind}, list_contains needs a list<string>",
            f"write {attribute.name} = {_written(node.expression)} or IN (…)",
        )
    if raw is None:
        return Truth(None)
    if not isinstance(raw, str):
        raise scope.mismatch(attribute, _written(node.expression))
    return ListContains(attribute.name, raw, negated=False)


def _expect_arguments(node: exp.Expression, expected: set[str], scope: Scope) -> None:
    """Refuse variants such as IN (SELECT …), whose meaning sits in further arguments of the node."""
    if {name for name, value in node.args.items() if value} - expected:
        raise _refusal("literals only", node, scope)


def _attribute(node: exp.Expression, scope: Scope) -> Attribute:
    column = node.unnest()
    if type(column) is not exp.Column or not isinstance(column.this, exp.Identifier) or column.table:
        raise _refusal("a column", column, scope)
    return scope.attribute(column.name)


def _raw(node: exp.Expression, scope: Scope) -> Raw | None:
    literal = node.unnest()
    read = LITERALS.get(type(literal))
    if read is None:
        hint = " (a string takes single quotes)" if isinstance(literal, exp.Column) else ""
        raise _refusal(f"a literal{hint}", literal, scope)
    return read(literal, scope)


def _null(_node: exp.Expression, _scope: Scope) -> None:
    return None


def _boolean(node: exp.Expression, _scope: Scope) -> bool:
    return bool(node.this)


def _literal(node: exp.Expression, scope: Scope) -> Raw:
    if node.is_string:
        return str(node.this)
    try:
        return Decimal(node.this)
    except InvalidOperation:
        raise _refusal("a number", node, scope) from None


def _negative(node: exp.Expression, scope: Scope) -> Raw:
    number = _raw(node.this, scope)
    if not isinstance(number, Decimal):
        raise _refusal("a number after -", node, scope)
    # The operator would round to the 28 digits of the decimal context.
    return number.copy_negate()


def _cast(node: exp.Expression, scope: Scope) -> Raw:
    target, text = node.to.this.name, node.this
    if node.to.expressions or not (isinstance(text, exp.Literal) and text.is_string):
        raise _refusal("a literal", node, scope)
    instant = parse_instant(text.this)
    if target not in {"TIMESTAMP", "TIMESTAMPNTZ", "TIMESTAMPTZ", "DATE"} or instant is None:
        raise _refusal("TIMESTAMP '2024-01-31 12:00:00' or DATE '2024-01-31'", node, scope)
    _expect_no_lost_part(target, text.this, instant, node, scope)
    return instant


def _expect_no_lost_part(
    target: str, text: str, instant: datetime, node: exp.Expression, scope: Scope
) -> None:
    """Refuse what SQL engines drop without a word: the time of a DATE, the zone of a TIMESTAMP."""
    if target == "DATE" and len(text) > len("2024-01-31"):
        raise _refusal("a DATE without a time", node, scope)
    as_written = datetime.fromisoformat(text).replace(tzinfo=UTC)
    if target != "TIMESTAMPTZ" and as_written != instant:
        raise _refusal("a TIMESTAMP without a zone, or TIMESTAMPTZ", node, scope)


def _written(node: exp.Expression) -> str:
    inner = node.unnest()
    if type(inner) is exp.Cast:
        return f"{inner.to.this.name.removesuffix('NTZ')} {inner.this.sql('duckdb')}"
    return str(inner.sql("duckdb"))


READERS: Final[dict[Any, Callable[[Any, Scope], Predicate]]] = {
    **dict.fromkeys(OPERATORS, _comparison),
    exp.Paren: _paren,
    exp.Not: _not,
    exp.And: _and,
    exp.Or: _or,
    exp.Boolean: _truth,
    exp.Null: _truth,
    exp.Column: _bare_column,
    exp.Between: _between,
    exp.In: _in,
    exp.Is: _is,
    exp.ArrayContains: _list_contains,
}
LITERALS: Final[dict[Any, Callable[[Any, Scope], Raw | None]]] = {
    exp.Null: _null,
    exp.Boolean: _boolean,
    exp.Literal: _literal,
    exp.Neg: _negative,
    exp.Cast: _cast,
}
