"""Balanced k-means for posting lists: arrays in, arrays out.

centroids.py   sample → centroids                              faiss
assignment.py  vectors → nearest heads and distances           numpy; a row's result depends on the row and the heads alone
balancing.py   prices that make lists even                     numpy
ordering.py    heads → depth-first order for storage           numpy

Not here: how many lists, which of them a query probes, replicas (`pipeline.postings`).
"""

from pipeline.clustering.assignment import (
    SEARCHED_BRANCHES,
    HeadTree,
    NearHeads,
    assign,
    near_heads,
    nearest,
    pair_distances,
)
from pipeline.clustering.balancing import Membership, Prices, charged_lists, recentred, repriced
from pipeline.clustering.centroids import train_centroids
from pipeline.clustering.ordering import order_depth_first

__all__ = [
    "SEARCHED_BRANCHES",
    "HeadTree",
    "Membership",
    "NearHeads",
    "Prices",
    "assign",
    "charged_lists",
    "near_heads",
    "nearest",
    "order_depth_first",
    "pair_distances",
    "recentred",
    "repriced",
    "train_centroids",
]
