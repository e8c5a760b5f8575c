"""Kinds of attributes, and the check of names and literals against them before anything is evaluated.

Reading the SQL text itself is in `sql`.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

import pyarrow as pa

from pipeline.errors import FilterError

__all__ = ["COMPARABLE", "Attribute", "Raw", "Scope", "convert", "kind_of", "parse_instant"]

Raw = bool | Decimal | str | datetime
"""A literal as written: a datetime is one that was marked TIMESTAMP, TIMESTAMPTZ or DATE."""

EXPECTED: Final = {
    "string": "compare it with a string in single quotes",
    "int": "compare it with a number",
    "float": "compare it with a number",
    "bool": "compare it with TRUE or FALSE",
    "timestamp": "compare it with TIMESTAMP '2024-01-31 12:00:00', DATE '2024-01-31' or a string like those",
    "list<string>": "use list_contains(column, 'element')",
}
"""What to write instead, for each kind that filters can read."""

# Four-digit years and at most microseconds: what both DuckDB and `datetime` read, and read alike.
INSTANT: Final = re.compile(
    r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d(:?\d\d)?)?)?", re.ASCII
)
MAX_SHOWN_CHARS: Final = 200  # of a filter in an error: generated IN lists run to megabytes


@dataclass(frozen=True, slots=True)
class Attribute:
    """A column that a filter names."""

    name: str
    kind: str
    """A key of `EXPECTED`, or the Arrow type of a column that only IS NULL can read."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The text being read and the columns that it may name; words the errors."""

    text: str
    attributes: pa.Schema

    def error(self, problem: str, remedy: str) -> FilterError:
        """Make the error for this filter; the caller raises it."""
        shown = self.text if len(self.text) <= MAX_SHOWN_CHARS else self.text[:MAX_SHOWN_CHARS] + "…"
        return FilterError(f'filter "{shown}"', problem, remedy)

    def attribute(self, name: str) -> Attribute:
        """Find a column by its exact name.

        Raises:
            FilterError: There is none; names the nearest and all known ones.
        """
        for field in self.attributes:
            if field.name == name:
                return Attribute(name, kind_of(field.type) or str(field.type))
        known = {field.name: kind_of(field.type) or str(field.type) for field in self.attributes}
        listed = ", ".join(f"{column} {kind}" for column, kind in known.items()) or "none"
        raise self.error(f"unknown column {name}{_nearest(name, list(known))}", f"known columns: {listed}")

    def mismatch(self, attribute: Attribute, written: str) -> FilterError:
        """Make the error for a literal, or an operation on it, that the column's kind does not allow."""
        expected = EXPECTED.get(attribute.kind, "only IS NULL and IS NOT NULL read columns of this type")
        return self.error(
            f"column {attribute.name} has type {attribute.kind} and cannot be compared with {written}",
            expected,
        )


def _nearest(name: str, known: list[str]) -> str:
    folded = {column.casefold(): column for column in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.0)
    return f", nearest known column {folded[close[0]]}" if close else ""


def kind_of(arrow_type: pa.DataType) -> str | None:
    """Name the kind of a column by the words of the config's `AttributeType`, or None if filters have none.

    float32 has none: DuckDB compares it after rounding the literal to float32, a reader of the file may not.
    """
    types = pa.types
    if types.is_dictionary(arrow_type):
        return kind_of(arrow_type.value_type)
    if types.is_list(arrow_type) or types.is_large_list(arrow_type):
        return "list<string>" if kind_of(arrow_type.value_type) == "string" else None
    kinds: tuple[tuple[str, bool], ...] = (
        ("string", types.is_string(arrow_type) or types.is_large_string(arrow_type)),
        ("int", types.is_integer(arrow_type) and not types.is_uint64(arrow_type)),
        ("float", types.is_float64(arrow_type)),
        ("bool", types.is_boolean(arrow_type)),
        ("timestamp", types.is_timestamp(arrow_type)),
    )
    return next((kind for kind, matches in kinds if matches), None)


def convert(raw: Raw, kind: str) -> bool | Decimal | float | str | datetime | None:
    """Convert a literal to the kind of the column it is compared with.

    Returns:
        A Decimal, unrounded, for int, else a `predicates.Value`; None if the kind has no such value.
    """
    conversion = CONVERSIONS.get(kind)
    return None if conversion is None else conversion(raw)


def parse_instant(text: str) -> datetime | None:
    """Read ISO 8601 as an instant in UTC, which is also what a missing zone means; None if it is not that."""
    if not INSTANT.fullmatch(text):
        return None
    try:
        instant = datetime.fromisoformat(text)
        return instant.astimezone(UTC) if instant.tzinfo else instant.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def _string(raw: Raw) -> str | None:
    return raw if isinstance(raw, str) else None


def _int(raw: Raw) -> Decimal | None:
    return raw if isinstance(raw, Decimal) else None


def _float(raw: Raw) -> float | None:
    # + 0.0 because -0.0 and 0.0 are one value that two texts would name.
    return float(raw) + 0.0 if isinstance(raw, Decimal) else None


def _bool(raw: Raw) -> bool | None:
    return raw if isinstance(raw, bool) else None


def _timestamp(raw: Raw) -> datetime | None:
    if isinstance(raw, str):
        return parse_instant(raw)
    return raw if isinstance(raw, datetime) else None


CONVERSIONS: Final[dict[str, Callable[[Raw], bool | Decimal | float | str | datetime | None]]] = {
    "string": _string,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "timestamp": _timestamp,
}
COMPARABLE: Final = frozenset(CONVERSIONS)
"""Kinds that compare with literals; of other columns even `= NULL` is refused."""
