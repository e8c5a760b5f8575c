"""K-means for posting lists: arrays in, arrays out.

centroids.py   sample → centroids                              faiss
assignment.py  vectors → nearest head and distance             numpy; a row's result depends on the row and the heads alone
ordering.py    heads → depth-first order for storage           numpy

Not here: how many lists, which of them a query probes, replicas (`pipeline.postings`).
"""

from pipeline.clustering.assignment import (
    SEARCHED_BRANCHES,
    BranchedHeads,
    assign,
    assign_in_branches,
    nearest,
)
from pipeline.clustering.centroids import train_centroids
from pipeline.clustering.ordering import order_depth_first

__all__ = [
    "SEARCHED_BRANCHES",
    "BranchedHeads",
    "assign",
    "assign_in_branches",
    "nearest",
    "order_depth_first",
    "train_centroids",
]
