"""Which rows form a partition, and which partitions a filter can reach.

Present form: one partition, which every query reaches. The workload-aware tree (HQI, arXiv 2304.01926) will cut rows
by workload predicates behind these two functions; routing must stay conservative: never a lost match.
"""

from collections.abc import Sequence

from pipeline.artifacts import Partition
from pipeline.filters import Filter

__all__ = ["ONLY_PARTITION", "route"]

ONLY_PARTITION = 0
"""The partition that every row belongs to."""


def route(partitions: Sequence[Partition], where: Filter | None) -> list[Partition]:
    """Partitions that may hold a row passing the filter: all of them, as none is described by a predicate."""
    del where
    return list(partitions)
