"""WHERE texts as values: parsed, type-checked against the attributes, evaluated with three-valued logic.

The grammar and its reading are in `sql`, the normal form and the canonical text in `predicates`, the
evaluation on tables in `evaluation`, and in `regions` whether rows of which little is known can pass at all.
"""

from pipeline.filters.constants import with_constants
from pipeline.filters.evaluation import evaluate, evaluate_many
from pipeline.filters.parsing import Filter, filter_of, parse_filter
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
    all_of,
    any_of,
    columns_of,
    negate,
    to_sql,
)
from pipeline.filters.regions import Atom, Region, Values, atoms_of

__all__ = [
    "Atom",
    "Comparison",
    "Conjunction",
    "Disjunction",
    "Filter",
    "ListContains",
    "Membership",
    "NullTest",
    "Operator",
    "Predicate",
    "Region",
    "Truth",
    "Value",
    "Values",
    "all_of",
    "any_of",
    "atoms_of",
    "columns_of",
    "evaluate",
    "evaluate_many",
    "filter_of",
    "negate",
    "parse_filter",
    "to_sql",
    "with_constants",
]
