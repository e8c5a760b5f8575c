"""The predicates a filter is made of, in negation normal form, and their canonical text.

There is no node for NOT, BETWEEN or IN with NULL: each has an equal in SQL's three-valued logic that needs
none of them (NOT (x < 5) is x >= 5, because NaN and all other values are totally ordered). `all_of`, `any_of`
and `comparison` keep the form normal, so filters that differ in trivial ways become the same predicate.
Reading SQL is in `sql`, evaluation in `evaluation`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import ROUND_FLOOR, Decimal
from typing import Final, Literal

__all__ = [
    "Comparison",
    "Conjunction",
    "Disjunction",
    "ListContains",
    "Membership",
    "NullTest",
    "Operator",
    "Predicate",
    "Truth",
    "Value",
    "all_of",
    "any_of",
    "columns_of",
    "comparison",
    "integer_bound",
    "negate",
    "to_sql",
]

Operator = Literal["=", "<>", "<", "<=", ">", ">="]
Value = bool | int | float | str | datetime
"""bool, int64, float64 without NaN and -0.0, string, and an instant with its zone set to UTC, respectively for
columns of those kinds."""

INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1
NEVER: Final[tuple[Operator, int]] = ("<", INT64_MIN)
ALWAYS: Final[tuple[Operator, int]] = (">=", INT64_MIN)

NEGATED: Final[dict[Operator, Operator]] = {
    "=": "<>",
    "<>": "=",
    "<": ">=",
    "<=": ">",
    ">": "<=",
    ">=": "<",
}


@dataclass(frozen=True, slots=True)
class Truth:
    """TRUE, FALSE or, as None, NULL."""

    value: bool | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A column against a literal; NULL where the column is null."""

    column: str
    operator: Operator
    value: Value


@dataclass(frozen=True, slots=True)
class Membership:
    """IN or NOT IN a list; NULL where the column is null."""

    column: str
    values: tuple[Value, ...]
    """At least two, distinct, ascending, of one kind."""
    negated: bool


@dataclass(frozen=True, slots=True)
class NullTest:
    """IS NULL or, negated, IS NOT NULL; never NULL itself."""

    column: str
    negated: bool


@dataclass(frozen=True, slots=True)
class ListContains:
    """Whether a list of strings holds a string; NULL where the list is null, not where an element is."""

    column: str
    value: str
    negated: bool


@dataclass(frozen=True, slots=True)
class Conjunction:
    """AND of at least two operands, none a conjunction, in the order of their texts."""

    operands: tuple["Predicate", ...]


@dataclass(frozen=True, slots=True)
class Disjunction:
    """OR of at least two operands, none a disjunction, in the order of their texts."""

    operands: tuple["Predicate", ...]


Predicate = Truth | Comparison | Membership | NullTest | ListContains | Conjunction | Disjunction


def comparison(column: str, operator: Operator, value: Value) -> Comparison:
    """Compare a column with a value of its kind; `b <> TRUE` becomes `b = FALSE`."""
    if isinstance(value, bool) and operator == "<>":
        return Comparison(column, "=", not value)
    return Comparison(column, operator, value)


def all_of(operands: Iterable[Predicate]) -> Predicate:
    """AND in normal form: flat, without TRUE and repetitions, FALSE if any operand is, `<>`s gathered."""
    return _joined(Conjunction, operands, absorbing=False)


def any_of(operands: Iterable[Predicate]) -> Predicate:
    """OR in normal form: flat, without FALSE and repetitions, TRUE if any operand is, `=`s gathered."""
    return _joined(Disjunction, operands, absorbing=True)


def _joined(
    join: type[Conjunction] | type[Disjunction], operands: Iterable[Predicate], *, absorbing: bool
) -> Predicate:
    flat = dict.fromkeys(part for operand in operands for part in _parts(join, operand))
    if Truth(absorbing) in flat:
        return Truth(absorbing)
    flat.pop(Truth(not absorbing), None)
    gathered = sorted(_gathered(flat, negated=join is Conjunction), key=to_sql)
    match gathered:
        case []:
            return Truth(not absorbing)
        case [alone]:
            return alone
    return join(tuple(gathered))


def _parts(join: type[Conjunction] | type[Disjunction], operand: Predicate) -> tuple[Predicate, ...]:
    if isinstance(operand, Conjunction | Disjunction) and isinstance(operand, join):
        return operand.operands
    return (operand,)


def _gathered(operands: Iterable[Predicate], *, negated: bool) -> Iterator[Predicate]:
    """Merge the (in)equalities of each column: x = 1 OR x = 2 is x IN (1, 2), dually for AND."""
    equality = "<>" if negated else "="
    values: dict[str, set[Value]] = {}
    for operand in operands:
        match operand:
            case Comparison(column, operator, value) if operator == equality:
                values.setdefault(column, set()).add(value)
            case Membership(column, members, flag) if flag == negated:
                values.setdefault(column, set()).update(members)
            case _:
                yield operand
    for column, members_of_column in values.items():
        yield _membership(column, members_of_column, negated=negated)


def _membership(column: str, values: set[Value], *, negated: bool) -> Predicate:
    if len(values) == 1:
        return comparison(column, "<>" if negated else "=", *values)
    if negated and values == {False, True} and all(isinstance(value, bool) for value in values):
        # <> of a truth value is written as = of the other: so is its being neither of the two.
        return Conjunction((Comparison(column, "=", value=False), Comparison(column, "=", value=True)))
    return Membership(column, tuple(sorted(values)), negated)


def negate(predicate: Predicate) -> Predicate:
    """NOT in normal form: NULL stays NULL, TRUE and FALSE swap."""
    match predicate:
        case Truth(value):
            return Truth(None if value is None else not value)
        case Comparison(column, operator, value):
            return comparison(column, NEGATED[operator], value)
        case Membership(column, values, negated):
            return _membership(column, set(values), negated=not negated)
        case NullTest() | ListContains():
            return replace(predicate, negated=not predicate.negated)
        case Conjunction(operands):
            return any_of(map(negate, operands))
        case Disjunction(operands):
            return all_of(map(negate, operands))


def integer_bound(operator: Operator, number: Decimal) -> tuple[Operator, int]:
    """Restate a comparison of an int64 with any number as one with an int64.

    x < 1.5 is x <= 1. What holds for no int64, or for all, becomes a comparison with the least one, so that a
    null still gives NULL.

    Args:
        operator: What stands between the int64 and the number.
        number: Finite, of any size and scale; nothing is rounded.

    Returns:
        An operator and an int64 that give the same truth for every int64.
    """
    if number > INT64_MAX:
        return ALWAYS if operator in {"<", "<=", "<>"} else NEVER
    if number < INT64_MIN:
        return ALWAYS if operator in {">", ">=", "<>"} else NEVER
    floor = int(number.to_integral_value(ROUND_FLOOR))
    if floor == number:
        return operator, floor
    if operator in {"=", "<>"}:
        return NEVER if operator == "=" else ALWAYS
    return ("<=" if operator in {"<", "<="} else ">"), floor


def columns_of(predicate: Predicate) -> frozenset[str]:
    """Name the columns whose values the predicate depends on."""
    match predicate:
        case Truth():
            return frozenset()
        case Conjunction(operands) | Disjunction(operands):
            return frozenset().union(*map(columns_of, operands))
        case _:
            return frozenset({predicate.column})


def to_sql(predicate: Predicate) -> str:
    """Write the canonical text: one per predicate, readable by `parse_filter` and by DuckDB.

    An instant is written as a string with its zone: DuckDB compares TIMESTAMPTZ literals with some timestamp
    types only, and reads TIMESTAMP literals in the zone of the session.
    """
    match predicate:
        case Truth(value):
            return "NULL" if value is None else str(value).upper()
        case Comparison(column, operator, value):
            return f"{_quoted(column)} {operator} {_literal(value)}"
        case Membership(column, values, negated):
            members = ", ".join(map(_literal, values))
            return f"{_quoted(column)} {'NOT ' * negated}IN ({members})"
        case NullTest(column, negated):
            return f"{_quoted(column)} IS {'NOT ' * negated}NULL"
        case ListContains(column, element, negated):
            return f"{'NOT ' * negated}list_contains({_quoted(column)}, {_literal(element)})"
        case Conjunction(operands) | Disjunction(operands):
            word = " AND " if isinstance(predicate, Conjunction) else " OR "
            return word.join(f"({to_sql(o)})" if isinstance(o, Disjunction) else to_sql(o) for o in operands)


def _quoted(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _literal(value: Value) -> str:
    match value:
        case bool():
            return str(value).upper()
        case datetime():
            return f"'{value.isoformat(sep=' ')}'"
        case str():
            return "'" + value.replace("'", "''") + "'"
        case float():
            # SQL has no literal for infinity; a number beyond the range of doubles reads as one.
            return repr(value).replace("inf", "1e999")
        case int():
            return str(value)
