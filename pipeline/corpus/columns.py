"""The rules of `rules` over whole Arrow columns: what is clean is never looked at row by row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import arrow_schema
from pipeline.corpus.conversion import (
    converted,
    family_of,
    ids_of,
    joined_text,
    raw_bytes,
    usable_vectors,
)
from pipeline.corpus.rules import BadRow, BadRowError, RowSpec, check_row

__all__ = ["CheckedBatch", "check_columns", "plain_row", "unit_rows", "valid_schema"]


@dataclass(frozen=True)
class CheckedBatch:
    """Rows of one batch, the good apart from the bad."""

    num_rows: int
    """Rows read, good and bad."""
    rows: NDArray[np.int64]
    """(n,) place of each good row in its file, from 0."""
    table: pa.Table
    """(n) good rows: doc_id, text and the attributes."""
    vectors: NDArray[np.float32] | None
    """(n, d) unit vectors; None where texts are encoded."""
    bad: list[BadRow]


def valid_schema(spec: RowSpec) -> pa.Schema:
    """Columns of `CheckedBatch.table`."""
    return pa.schema([("doc_id", pa.string()), ("text", pa.string()), *arrow_schema(spec.attributes)])


def check_columns(spec: RowSpec, columns: Mapping[str, pa.Array], first_row: int) -> CheckedBatch:
    """Check whole columns and gather the rows that pass.

    Args:
        spec: Which column means what.
        columns: (n,) every column of the spec.
        first_row: Place of the first row in its file.
    """
    ids = ids_of(columns[spec.id])
    text = joined_text(spec, columns)
    attributes = [converted(columns[a.name], a.type) for a in spec.attributes]
    bad = np.logical_or.reduce([ids.bad, text.bad, *(a.bad for a in attributes)])
    vectors = None
    if spec.embedding is not None:
        raw, bad_vector = usable_vectors(columns[spec.embedding], spec.dims or 0)
        bad |= bad_vector
        vectors = unit_rows(raw[~bad[~bad_vector]])
    good = np.flatnonzero(~bad)
    table = pa.Table.from_arrays(
        [ids.values, text.values, *(a.values for a in attributes)], schema=valid_schema(spec)
    )
    # Taking every row would copy the texts for nothing.
    table = table if len(good) == len(bad) else table.take(pa.array(good))
    found = [_explained(spec, columns, int(i), first_row) for i in np.flatnonzero(bad)]
    return CheckedBatch(len(bad), good + first_row, table, vectors, found)


def plain_row(columns: Mapping[str, pa.Array], index: int) -> dict[str, Any]:
    """One row as the plain path takes it: strings as raw bytes, since they may not be UTF-8.

    Times are left out: they break no rule, and years beyond 9999 have no Python value.
    """
    return {
        name: raw_bytes(array.slice(index, 1))[0].as_py()
        for name, array in columns.items()
        if family_of(array.type) != "timestamp"
    }


def unit_rows(matrix: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows scaled to unit length.

    Args:
        matrix: (n, d) finite, no row all zero.

    Returns:
        (n, d), bit for bit the same for a row whatever the other rows are, and without negative zeros.
    """
    wide = matrix.astype(np.float64)
    # Squares of float64 can overflow or vanish: bring the largest component to 1 first.
    wide /= np.abs(wide).max(axis=1, keepdims=True, initial=np.finfo(np.float64).smallest_subnormal)
    wide /= np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    return wide.astype(np.float32) + np.float32(0)


def _explained(spec: RowSpec, columns: Mapping[str, pa.Array], index: int, first_row: int) -> BadRow:
    try:
        check_row(spec, plain_row(columns, index))
    except BadRowError as error:
        return BadRow(first_row + index, error.doc_id, error.reason)
    raise AssertionError(f"row {first_row + index} fails whole-column checks and passes the plain ones")
