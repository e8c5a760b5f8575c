"""WHERE texts as values: parsed, type-checked against the attributes, evaluated with three-valued logic.

The grammar and its reading are in `sql`, the normal form and the canonical text in `predicates`, the
evaluation on tables in `evaluation`. Which files can hold a matching row is the concern of the index.
"""

from pipeline.filters.evaluation import evaluate
from pipeline.filters.parsing import Filter, parse_filter
from pipeline.filters.predicates import (
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
    columns_of,
    negate,
    to_sql,
)

__all__ = [
    "Comparison",
    "Conjunction",
    "Disjunction",
    "Filter",
    "ListContains",
    "Membership",
    "NullTest",
    "Operator",
    "Predicate",
    "Truth",
    "Value",
    "columns_of",
    "evaluate",
    "negate",
    "parse_filter",
    "to_sql",
]
