"""Past queries as what a layout is learned from: their filters, counted. Pure."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa

from pipeline.errors import FilterError
from pipeline.filters import Filter, parse_filter

__all__ = ["Workload", "summarize"]

COVERAGE = 0.99
"""Share of the filtered weight that the filters kept must have: the rest are too rare to cut rows for."""
MOST_FILTERS = 4096
"""Distinct filters that are kept at most."""


@dataclass(frozen=True)
class Workload:
    """Filters of past queries with their share of all queries."""

    filters: tuple[Filter, ...]
    """Distinct, heaviest first."""
    weights: tuple[float, ...]
    """Share of the queries that have each filter."""
    unfiltered: float
    """Share of the queries that have none."""
    unreadable: float
    """Share of the queries whose filter does not fit the attributes."""
    reason: str
    """Why the first of those does not; empty where all do."""

    @property
    def fingerprint(self) -> str:
        """Of what a layout depends on."""
        content = [
            self.unfiltered,
            *((one.text, w) for one, w in zip(self.filters, self.weights, strict=True)),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def summarize(
    filters: Iterable[tuple[str | None, float]], attributes: pa.Schema, *, coverage: float = COVERAGE
) -> Workload:
    """Count filters by their canonical text and keep the heaviest.

    Args:
        filters: WHERE text of each past query, None where it has none, and its weight, at least 0.
        attributes: Columns that the filters may name.
        coverage: Share of the filtered weight that is kept.
    """
    asked: dict[str | None, list[float]] = {}
    for text, weight in filters:
        asked.setdefault(text, []).append(weight)
    # fsum: the same whatever the order of the queries.
    total = math.fsum(chain.from_iterable(asked.values())) or 1.0
    unfiltered = math.fsum(asked.pop(None, []))
    known: dict[str, Filter] = {}
    weights: dict[str, list[float]] = {}
    set_aside: dict[str, list[float]] = {}
    for text, own in asked.items():
        try:
            one = parse_filter(text or "", attributes)
        except FilterError as error:
            set_aside.setdefault(str(error), []).extend(own)
            continue
        known[one.text] = one
        weights.setdefault(one.text, []).extend(own)
    counted = {text: math.fsum(own) for text, own in weights.items()}
    order = sorted(counted, key=lambda text: (-counted[text], text))
    kept = _heaviest([counted[text] for text in order], coverage)
    return Workload(
        filters=tuple(known[text] for text in order[:kept]),
        weights=tuple(counted[text] / total for text in order[:kept]),
        unfiltered=unfiltered / total,
        unreadable=math.fsum(chain.from_iterable(set_aside.values())) / total,
        reason=next(iter(set_aside), ""),
    )


def _heaviest(weights: list[float], coverage: float) -> int:
    """How many of falling weights have a share of their sum."""
    needed, held = coverage * sum(weights), 0.0
    for kept, weight in enumerate(weights):
        if held >= needed or kept == MOST_FILTERS:
            return kept
        held += weight
    return len(weights)
