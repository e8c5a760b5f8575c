"""How large posting lists are, how often a vector is copied, and what a server then holds in memory. Pure arithmetic."""

import math
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from pipeline.config import MOST_ROWS_PER_LIST
from pipeline.postings import EXACT_HEADS, LINK_BYTES, MOST, list_count
from pipeline.schemas import DIRECTORY, vectors_schema
from pipeline.tables import group_rows

__all__ = ["Sizing", "longest_lists", "propose_sizing", "server_bytes"]

PROPOSED_ROWS = {"ssd": 100, "object_store": 400}
"""Rows of a posting list. Small lists read fewer bytes, large ones fewer requests, of which an object store makes one dear
and a disk does not."""
PROPOSED_REPLICAS = 2
"""Lists of a vector. *Measured* on 97,000 summaries, 100 a list, entries scanned to hold .95 and .99 of the true ten: 1: 6,500
and 21,500; 2: 3,820 and 13,160 at 1.8 entries a vector; 4: 4,010 and 14,100 at 2.3."""
MATRICES = 3
"""Of dims x dims float32: the binarizer's rotation, and a moment's copies of it while it is read."""


@dataclass(frozen=True)
class Sizing:
    """Sizes of a layout and the memory that it asks of a server."""

    rows_per_list: int
    max_replicas: int
    lists: int
    server_bytes: int
    """Anonymous memory of an opened release, libraries and filters not counted."""


def server_bytes(lists: int, dims: int) -> int:
    """Memory of an opened release: heads, their graph where there is one, directory, binarizer.

    Attribute columns come on top once a query filters by them, and the heads of a graph a second time.

    Args:
        lists: Posting lists.
        dims: Width of the vectors.
    """
    graph = LINK_BYTES if lists > EXACT_HEADS else 0
    directory = 8 * len(DIRECTORY.names)
    return lists * (4 * dims + graph + directory) + MATRICES * 4 * dims * dims


def longest_lists(dims: int) -> int:
    """Most `rows_per_list` for vectors of a width: the vectors of a list are one run of bytes, in one row group."""
    in_group = group_rows(vectors_schema(dims, pa.schema([])))
    return max(1, min(MOST_ROWS_PER_LIST, in_group // MOST))


def propose_sizing(
    rows: int,
    dims: int,
    *,
    storage: Literal["ssd", "object_store"],
    memory_bytes: int | None = None,
    rows_per_list: int | None = None,
    max_replicas: int | None = None,
) -> Sizing:
    """Sizes for a corpus; those that are given stay.

    Args:
        rows: Vectors of the corpus.
        dims: Width of the vectors.
        storage: What a server reads the lists from.
        memory_bytes: What a server may hold; lists grow until their heads fit, or are as long as they may be.
        rows_per_list: Rows of a list, if they are given.
        max_replicas: Lists of a vector, if they are given.
    """
    most = longest_lists(dims)
    size = rows_per_list or min(PROPOSED_ROWS[storage], most)
    if rows_per_list is None and memory_bytes is not None:
        while size < most and server_bytes(list_count(rows, size), dims) > memory_bytes:
            size = min(most, math.ceil(size * GROWTH))
    lists = list_count(rows, size)
    return Sizing(size, max_replicas or PROPOSED_REPLICAS, lists, server_bytes(lists, dims))


GROWTH = 1.05
"""Of the rows of a list, from one that does not fit to the next that is tried."""
