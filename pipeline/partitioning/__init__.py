"""Which rows form a partition, and which partitions a filter can reach (HQI, arXiv 2304.01926).

`workload` counts the filters of past queries, `growing` cuts rows by them, `tree` tells rows their partition, `summaries`
describe its attributes, `drift` tells whether partitions still serve what is asked; `stage` keeps all that. Routing by what
is known of a partition never loses a match.
"""

from pipeline.partitioning.drift import PAYS, Reach, reach_of, unseen_share
from pipeline.partitioning.growing import SAMPLE_ROWS, TreeLimits, grow_tree, limits_for
from pipeline.partitioning.stage import (
    joined_partitions,
    read_fitted,
    read_partition_tree,
    read_regions,
    read_workload,
    regions_of_paths,
    write_fitted,
    write_partition_tree,
    write_partitions,
)
from pipeline.partitioning.summaries import merged, summary_of
from pipeline.partitioning.tree import NOT_ASKED, ONLY_PARTITION, UNCUT, PartitionTree
from pipeline.partitioning.workload import Workload, summarize

__all__ = [
    "NOT_ASKED",
    "ONLY_PARTITION",
    "PAYS",
    "SAMPLE_ROWS",
    "UNCUT",
    "PartitionTree",
    "Reach",
    "TreeLimits",
    "Workload",
    "grow_tree",
    "joined_partitions",
    "limits_for",
    "merged",
    "reach_of",
    "read_fitted",
    "read_partition_tree",
    "read_regions",
    "read_workload",
    "regions_of_paths",
    "summarize",
    "summary_of",
    "unseen_share",
    "write_fitted",
    "write_partition_tree",
    "write_partitions",
]
