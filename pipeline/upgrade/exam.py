"""What the rungs of an upgrade are judged on: queries and documents with vectors of both encoders, and what they want."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.measures import ROUNDING, ndcg_at_k, recall_at_k
from pipeline.upgrade.ranking import ranked, scores_of

__all__ = ["DEPTH", "Exam", "Figures", "Pairs", "Rung"]

DEPTH = 100
"""Documents of each query that are judged."""
TOP = 10


@dataclass(frozen=True, eq=False)
class Pairs:
    """Vectors of the same texts in both spaces, row by row."""

    new: NDArray[np.float32]
    """(n, d_new) unit vectors."""
    old: NDArray[np.float32]
    """(n, d_old)"""

    def __len__(self) -> int:
        return len(self.new)


@dataclass(frozen=True, eq=False)
class Rung:
    """What one way to answer new queries finds, and what it takes."""

    name: str
    found: NDArray[np.int64]
    """(q, DEPTH) rows of documents, best first."""
    embedded: int = 0
    """Documents that the new encoder had to embed."""
    found_by_grades: NDArray[np.int64] | None = None
    """Of an oracle: what it finds for who graded, where `found` is for who asks the new model."""


@dataclass(frozen=True, eq=False)
class Figures:
    """How good a rung is, query by query, so that rungs are compared in pairs."""

    overlap_at_10: NDArray[np.float64]
    """(q,) share of the new model's own first ten."""
    ndcg_at_10: NDArray[np.float64] | None
    """(j,) of the queries that are judged; None where none is."""
    recall_at_100: NDArray[np.float64] | None
    """(j,)"""


@dataclass(frozen=True, eq=False)
class Exam:
    """Queries and documents with vectors of both encoders, row by row."""

    old: NDArray[np.float32]
    """(n, d_old) unit vectors of the documents."""
    new: NDArray[np.float32]
    """(n, d_new)"""
    old_queries: NDArray[np.float32]
    """(q, d_old)"""
    new_queries: NDArray[np.float32]
    """(q, d_new)"""
    own: NDArray[np.int64]
    """(q,) row of the document that stands in as the query, which is left out of what is found; -1: none."""
    grades: tuple[Mapping[int, float], ...] = ()
    """By query, of documents' rows; none of a query that nobody judged. No tuple entries: nobody judged any."""

    @cached_property
    def wanted(self) -> NDArray[np.int64]:
        """(q, DEPTH) what new vectors of all documents find."""
        return self.find(self.new_queries, self.new)

    @property
    def judged(self) -> list[int]:
        """Queries with a document of a grade above 0."""
        return [i for i, grades in enumerate(self.grades) if any(grade > 0 for grade in grades.values())]

    def of(self, queries: NDArray[np.int64]) -> "Exam":
        """The same with some of the queries."""
        grades = tuple(self.grades[i] for i in queries.tolist()) if self.grades else ()
        asked = self.old_queries[queries], self.new_queries[queries], self.own[queries]
        return Exam(self.old, self.new, *asked, grades)

    def find(
        self, queries: NDArray[np.float32], documents: NDArray[np.float32], k: int = DEPTH
    ) -> NDArray[np.int64]:
        """(q, k) rows of the nearest documents, but for each query's own."""
        return ranked(queries, documents, k, own=self.own)

    def overlap(self, found: NDArray[np.int64]) -> NDArray[np.float64]:
        """(q,) share of the first ten found that the new model takes for as near as its own tenth; copies are as good."""
        scores = scores_of(self.new_queries, self.new, found[:, :TOP])
        return (scores >= self._least).mean(axis=1)

    @cached_property
    def _least(self) -> NDArray[np.float32]:
        last = self.wanted[:, :TOP][:, -1:]
        return scores_of(self.new_queries, self.new, last) - np.float32(ROUNDING)

    def figures(self, rung: Rung) -> Figures:
        """How good it is."""
        judged, found = self.judged, rung.found_by_grades if rung.found_by_grades is not None else rung.found
        overlap = self.overlap(rung.found)
        if not judged:
            return Figures(overlap, None, None)
        pairs = [(found[i].tolist(), self.grades[i]) for i in judged]
        return Figures(
            overlap,
            np.array([ndcg_at_k(rows, grades, TOP) for rows, grades in pairs]),
            np.array([recall_at_k(rows, grades, DEPTH) for rows, grades in pairs]),
        )
