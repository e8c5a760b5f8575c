"""Rows with their vectors → placed rows → the tables of a segment. Pure: tables in, tables out."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import clustering
from pipeline.binarization import binarize
from pipeline.index.training import TrainedLayout
from pipeline.schemas import DISTANCE, LIST_NO, directory_schema
from pipeline.tables import vector_array

__all__ = ["directory_part", "place_rows", "placed_schema", "sort_placed"]

DIRECTORY_PART = directory_schema().append(pa.field("radius", pa.float32(), nullable=False))
"""Directory rows of one segment, with the radius that goes to the heads."""


def placed_schema(dims: int, code_bytes: int, attributes: pa.Schema) -> pa.Schema:
    """One row per vector between placing and building: its list, its codes, and what the vectors file holds."""
    fixed = [
        pa.field(LIST_NO, pa.int32(), nullable=False),
        pa.field(DISTANCE, pa.float32(), nullable=False),
        pa.field("vector_id", pa.binary(16), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field(
            "embedding", pa.list_(pa.field("element", pa.float16(), nullable=False), dims), nullable=False
        ),
        pa.field("code", pa.binary(code_bytes), nullable=False),
        pa.field("factor", pa.float16(), nullable=False),
        pa.field("offset", pa.float16(), nullable=False),
    ]
    return pa.schema([*fixed, *attributes])


def place_rows(
    rows: pa.Table, vectors: NDArray[np.float32], trained: TrainedLayout, attributes: pa.Schema
) -> pa.Table:
    """Assign rows to lists and binarize their vectors.

    Args:
        rows: (n) rows with vector_id, doc_id and the attributes.
        vectors: (n, d) float32 unit vectors.
        trained: Heads and binarizer.
        attributes: Schema of the attributes.

    Returns:
        (n) rows of `placed_schema`.
    """
    list_nos, distances = clustering.assign_in_branches(vectors, trained.tree)
    codes = binarize(trained.binarizer, vectors)
    schema = placed_schema(vectors.shape[1], codes.code.shape[1], attributes)
    columns = {
        LIST_NO: pa.array(list_nos),
        DISTANCE: pa.array(distances),
        "embedding": vector_array(vectors.astype(np.float16)),
        "code": _binary(codes.code),
        "factor": pa.array(codes.factor),
        "offset": pa.array(codes.offset),
    }
    return pa.table(
        [columns[name] if name in columns else rows[name] for name in schema.names], schema=schema
    )


def sort_placed(placed: pa.Table) -> pa.Table:
    """Placed rows in primary order: by list, then distance to the head, then vector_id."""
    keys = [(LIST_NO, "ascending"), (DISTANCE, "ascending"), ("vector_id", "ascending")]
    return placed.sort_by(keys)


def directory_part(placed: pa.Table, segment_no: int) -> pa.Table:
    """Directory rows of one segment.

    Args:
        placed: Rows in primary order.
        segment_no: Number of the segment within the partition.
    """
    list_nos, first, counts = np.unique(placed[LIST_NO].to_numpy(), return_index=True, return_counts=True)
    distances = placed[DISTANCE].to_numpy()
    # Rows of a list are sorted by distance, so its last row is the farthest.
    radius = distances[first + counts - 1] if len(first) else np.zeros(0, np.float32)
    columns = [np.full(len(first), segment_no), list_nos, first, counts, radius]
    return pa.table(
        [pa.array(c).cast(f.type) for c, f in zip(columns, DIRECTORY_PART, strict=True)],
        schema=DIRECTORY_PART,
    )


def _binary(matrix: NDArray[np.uint8]) -> pa.Array:
    """(n, width) bytes as a fixed_size_binary column."""
    buffer = pa.py_buffer(np.ascontiguousarray(matrix))
    return pa.Array.from_buffers(pa.binary(matrix.shape[1]), len(matrix), [None, buffer])
