"""How large posting lists and codes are, how often a vector is copied, what a server then holds in memory. Pure arithmetic."""

import math
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from pipeline.binarization.levels import default_code_bytes, most_code_bytes
from pipeline.config import MOST_ROWS_PER_LIST
from pipeline.postings import EXACT_HEADS, LINK_BYTES, MOST, list_count
from pipeline.schemas import DIRECTORY, vectors_schema
from pipeline.tables import group_rows

__all__ = ["Sizing", "longest_lists", "propose_sizing", "server_bytes"]

PROPOSED_ROWS = 100
"""Rows of a posting list. *Measured* on 446,418 real vectors of 384 dimensions, kB and requests of a query that finds
.95 / .99: lists of 100, codes of 32 bytes 193, 80 / 692, 264; 48 bytes 213, 53 / 708, 129; 96 bytes 309, 43 / 1,217, 95; lists
of 400, 48 bytes 541, 69 / 1,531, 113; 96 bytes 921, 35 / 2,729, 63."""
CODES = {"ssd": 1, "object_store": 2}
"""Of `default_code_bytes`: larger codes leave fewer vectors to fetch, of which an object store makes each dear."""
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
    code_bytes: int
    server_bytes: int
    """Anonymous memory of an opened release, libraries and filters not counted, with the lists that splitting adds."""


def server_bytes(lists: int, dims: int) -> int:
    """Memory of an opened release: heads, directory, binarizer; a graph is there twice while it is opened.

    Attribute columns and the row of every entry come on top once a query filters.

    Args:
        lists: Posting lists.
        dims: Width of the vectors.
    """
    head = 2 * (4 * dims + LINK_BYTES) if lists > EXACT_HEADS else 4 * dims
    return lists * (head + 8 * len(DIRECTORY.names)) + MATRICES * 4 * dims * dims


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
        storage: What a server reads the lists from; the size of codes follows from it.
        memory_bytes: What a server may hold; lists grow until their heads fit, or are as long as they may be.
        rows_per_list: Rows of a list, if they are given.
        max_replicas: Lists of a vector, if they are given.
    """
    most = longest_lists(dims)
    size = rows_per_list or min(PROPOSED_ROWS, most)
    if rows_per_list is None and memory_bytes is not None:
        while size < most and _built_bytes(rows, size, dims) > memory_bytes:
            size = min(most, math.ceil(size * GROWTH))
    return Sizing(
        rows_per_list=size,
        max_replicas=max_replicas or PROPOSED_REPLICAS,
        lists=list_count(rows, size),
        code_bytes=min(CODES[storage] * default_code_bytes(dims), most_code_bytes(dims)),
        server_bytes=_built_bytes(rows, size, dims),
    )


def _built_bytes(rows: int, size: int, dims: int) -> int:
    return server_bytes(round(BUILT * list_count(rows, size)), dims)


BUILT = 1.07
"""Lists that are built to those that were planned, as lists that grow too long are split: 1.064 was measured."""
GROWTH = 1.05
"""Of the rows of a list, from one that does not fit to the next that is tried."""
