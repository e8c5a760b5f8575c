"""How well the partitions that there are serve a workload, and what fitting them anew would bring. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.filters import Region
from pipeline.partitioning.workload import Workload

__all__ = ["PAYS", "Reach", "reach_of", "unseen_share"]

PAYS = 0.8
"""Of the cost of the partitions that there are: below it, a new layout is worth building."""


@dataclass(frozen=True)
class Reach:
    """What a query of a workload looks into, by the weight of its filter."""

    rows: float
    """Of the partitions that may hold a match."""
    partitions: float

    def cost(self, open_rows: int) -> float:
        """In rows: a partition more costs a query as much as so many."""
        return self.rows + open_rows * self.partitions


def reach_of(regions: Sequence[Region], rows: Sequence[float], workload: Workload) -> Reach:
    """What the queries of a workload look into.

    Args:
        regions: What the rows of each partition can have.
        rows: Of each partition.
        workload: Past queries; those without a filter look into all.
    """
    pairs = list(zip(regions, rows, strict=True))
    total_rows, total = workload.unfiltered * sum(rows), workload.unfiltered * len(rows)
    for one, weight in zip(workload.filters, workload.weights, strict=True):
        reached = [count for region, count in pairs if region.may_hold(one.predicate)]
        total_rows += weight * sum(reached)
        total += weight * len(reached)
    share = workload.unfiltered + sum(workload.weights)
    return Reach(total_rows / (share or 1.0), total / (share or 1.0))


def unseen_share(fitted: Mapping[str, float], workload: Workload) -> float:
    """Share of a workload's filtered queries whose filter the layout was not fitted to; 0 where none is filtered.

    Args:
        fitted: Canonical texts of filters, with their weights.
        workload: Past queries.
    """
    total = sum(workload.weights)
    unseen = (w for one, w in zip(workload.filters, workload.weights, strict=True) if one.text not in fitted)
    return sum(unseen) / total if total else 0.0
