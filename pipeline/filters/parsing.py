"""From a WHERE text to a `Filter`: the entry to this package. The grammar is in `sql`."""

from dataclasses import dataclass

import pyarrow as pa

from pipeline.filters.attributes import Scope
from pipeline.filters.predicates import Predicate, columns_of, to_sql

__all__ = ["Filter", "filter_of", "parse_filter"]


@dataclass(frozen=True, slots=True)
class Filter:
    """A WHERE condition that fits a schema of attributes; made by `parse_filter`."""

    text: str
    """Canonical SQL: filters that differ only in trivial ways have the same; `parse_filter` reads it back."""
    columns: tuple[str, ...]
    """Columns that the predicate reads, sorted; one whose test was folded away (`… OR TRUE`) is not among them."""
    predicate: Predicate
    """The condition in negation normal form."""


def parse_filter(text: str, attributes: pa.Schema) -> Filter:
    """Read a WHERE condition and check it against the attributes.

    Comparisons of a column with a literal, IN, BETWEEN, IS NULL, AND, OR, NOT, TRUE, FALSE, NULL, bare boolean
    columns and `list_contains(column, 'element')`, with SQL's three-valued logic. Column names are matched
    exactly; a timestamp without a zone is in UTC; numbers are compared with int columns without rounding and
    with float columns as the nearest float64.

    Args:
        text: The condition, in DuckDB's dialect, without the word WHERE.
        attributes: Columns that the filter may name.

    Returns:
        The filter.

    Raises:
        FilterError: The text is not one condition of the supported kind, names an unknown column, or compares
            a column with a literal of another kind.
    """
    # sqlglot takes 0.1 s to import, which opening a release without a filter need not pay.
    from pipeline.filters.sql import read_predicate

    predicate = read_predicate(Scope(text, attributes))
    return filter_of(predicate)


def filter_of(predicate: Predicate) -> Filter:
    """A filter of a predicate that fits the attributes."""
    return Filter(to_sql(predicate), tuple(sorted(columns_of(predicate))), predicate)
