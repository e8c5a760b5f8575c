"""Queries and relevance judgments from Parquet, JSONL or TSV files, local or on S3."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import StorageConfig
from pipeline.errors import CorruptArtifactError, DataError, SchemaMismatchError
from pipeline.filters import with_constants
from pipeline.storage import open_store, split_uri
from pipeline.tables import to_matrix

__all__ = ["Queries", "read_qrels", "read_queries"]

MEND = "mend the row"


@dataclass(frozen=True)
class Queries:
    """Queries in file order."""

    query_ids: tuple[str, ...]
    texts: tuple[str, ...] | None
    """None where the file has vectors."""
    vectors: NDArray[np.float32] | None
    """(q, d); None where the file has texts."""
    filters: tuple[str | None, ...]
    weights: tuple[float, ...] = ()
    """Of each; none: all count the same."""

    def __len__(self) -> int:
        return len(self.query_ids)

    def subset(self, rows: list[int]) -> "Queries":
        """The queries of some rows."""
        return Queries(
            tuple(self.query_ids[i] for i in rows),
            tuple(self.texts[i] for i in rows) if self.texts is not None else None,
            self.vectors[rows] if self.vectors is not None else None,
            tuple(self.filters[i] for i in rows),
            tuple(self.weights[i] for i in rows) if self.weights else (),
        )


def _content(uri: str, storage: StorageConfig) -> bytes:
    folder, name = split_uri(uri)
    return open_store(folder, storage).read(name)


def _table(uri: str, storage: StorageConfig) -> pa.Table:
    data = _content(uri, storage)
    try:
        if uri.endswith(".parquet"):
            return pq.read_table(pa.BufferReader(data))
        rows = _objects(uri, data.decode("utf-8-sig"))
        # Arrow takes the columns from the first row alone, and a filter may first stand on a later line.
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    except (pa.ArrowException, ValueError) as error:
        raise CorruptArtifactError(
            uri, f"is not readable ({error})", "give Parquet, or JSONL with one object per line"
        ) from error


def _objects(uri: str, text: str) -> list[dict[str, Any]]:
    # Not splitlines: a JSON string may hold U+2028 and its like.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_object(f"{uri} line {number}", line) for number, line in lines]


def _object(place: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SchemaMismatchError(place, f"expected a JSON object ({error})", "mend the line") from error
    if not isinstance(value, dict):
        raise SchemaMismatchError(
            place, f"expected a JSON object, found a {type(value).__name__}", "mend the line"
        )
    return value


def read_queries(uri: str, storage: StorageConfig, *, dims: int | None = None) -> Queries:
    """Read queries: query_id (or _id), text or embedding, optional weight and filter, with `{q.NAME}` a value of the row.

    Args:
        uri: Parquet, or JSONL with one object per line.
        storage: How to reach S3.
        dims: Width that vectors must have; None: any.

    Raises:
        SchemaMismatchError: A column is missing, its values have the wrong type, or a vector cannot be searched for.
        DataError: There is no query, or a query_id stands twice.
    """
    table = _table(uri, storage)
    names = table.column_names
    id_column = next((name for name in ("query_id", "_id") if name in names), None)
    content = next((name for name in ("embedding", "text") if name in names), None)
    if id_column is None or content is None:
        problem = f"expected columns query_id and text or embedding, found {', '.join(names) or 'none'}"
        raise SchemaMismatchError(uri, problem, "rename the columns")
    if table.num_rows == 0:
        raise DataError(uri, "has no queries", "give at least one")
    if table[id_column].null_count:
        row = table[id_column].to_pylist().index(None)
        raise SchemaMismatchError(f"{uri} row {row}", f"expected a value in `{id_column}`, found null", MEND)
    query_ids = tuple(str(value) for value in table[id_column].to_pylist())
    if len(set(query_ids)) != len(query_ids):
        raise DataError(uri, "a query_id stands twice", "make them unique: results are reported by query_id")
    filters = table["filter"].to_pylist() if "filter" in names else [None] * table.num_rows
    texts = tuple(_strings(uri, table["text"])) if content == "text" else None
    vectors = _vectors(uri, table["embedding"], dims) if content == "embedding" else None
    weights = tuple(_weights(uri, table["weight"])) if "weight" in names else ()
    return Queries(query_ids, texts, vectors, tuple(with_constants(filters, table, place=uri)), weights)


def _weights(uri: str, column: pa.ChunkedArray) -> list[float]:
    values = column.to_pylist()
    for row, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            problem = f"expected a number from 0 in `weight`, found {value!r}"
            raise SchemaMismatchError(f"{uri} row {row}", problem, MEND)
    return [1.0 if value is None else float(value) for value in values]


def _strings(uri: str, column: pa.ChunkedArray) -> list[str]:
    values = column.to_pylist()
    wrong = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    if wrong is not None:
        raise SchemaMismatchError(
            f"{uri} row {wrong}", f"expected a string in `text`, found {values[wrong]!r}", MEND
        )
    return values


def _vectors(uri: str, column: pa.ChunkedArray, dims: int | None) -> NDArray[np.float32]:
    vectors = _matrix(uri, column)
    if dims is not None and vectors.shape[1] != dims:
        problem = f"expected vectors of {dims} dimensions, found {vectors.shape[1]}"
        raise SchemaMismatchError(uri, problem, "encode the queries as the corpus was encoded")
    # A null has become NaN by now. None of these has a nearest neighbour, and a search would answer all the same.
    for fault, is_bad in (
        ("null, NaN or infinite values", ~np.isfinite(vectors).all(axis=1)),
        ("zeros only", ~vectors.any(axis=1)),
    ):
        if is_bad.any():
            problem = f"expected a vector with a direction in `embedding`, found {fault}"
            raise SchemaMismatchError(f"{uri} row {int(is_bad.argmax())}", problem, MEND)
    return vectors


def _matrix(uri: str, column: pa.ChunkedArray) -> NDArray[np.float32]:
    if not _holds_numbers(column.type):
        problem = f"expected lists of numbers in `embedding`, found {column.type}"
        raise SchemaMismatchError(uri, problem, "mend the rows")
    # What float32 cannot hold becomes infinite, and is refused as such.
    with np.errstate(over="ignore"):
        if pa.types.is_fixed_size_list(column.type) and column.null_count == 0:
            return to_matrix(column).astype(np.float32)
        rows = column.to_pylist()
        widths = {len(row) if row is not None else 0 for row in rows}
        if len(widths) != 1 or 0 in widths:
            problem = f"expected vectors of one width in `embedding`, found widths {sorted(widths)}"
            raise SchemaMismatchError(uri, problem, "mend the rows")
        return np.array(rows, dtype=np.float32)


def _holds_numbers(kind: pa.DataType) -> bool:
    types = pa.types
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return types.is_null(kind)
    return any(fits(kind.value_type) for fits in (types.is_floating, types.is_integer, types.is_null))


def read_qrels(uri: str, storage: StorageConfig) -> dict[str, dict[str, float]]:
    """Read judgments: query-id, corpus-id, score, in a TSV with a header or a Parquet.

    Returns:
        query_id → doc_id → grade; queries without a grade above 0 are left out.

    Raises:
        SchemaMismatchError: A column is missing, or a score is not a number.
    """
    rows = _table(uri, storage).to_pylist() if uri.endswith(".parquet") else _tsv(uri, storage)
    found: dict[str, dict[str, float]] = {}
    for number, row in enumerate(rows):
        try:
            query, doc, grade = str(row["query-id"]), str(row["corpus-id"]), float(row["score"])
        except (KeyError, TypeError, ValueError) as error:
            problem = f"expected query-id, corpus-id and a numeric score, found {dict(row)}"
            raise SchemaMismatchError(
                f"{uri} row {number}", problem, "the first line must name the columns"
            ) from error
        found.setdefault(query, {})[doc] = grade
    return {query: grades for query, grades in found.items() if max(grades.values()) > 0}


def _tsv(uri: str, storage: StorageConfig) -> list[Mapping[str, str]]:
    text = _content(uri, storage).decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
