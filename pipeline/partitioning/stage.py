"""The workload, the tree and the description of partitions at rest."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import FileRef
from pipeline.config import StorageConfig
from pipeline.errors import CorruptArtifactError, SchemaMismatchError
from pipeline.filters import Atom, Region, parse_filter
from pipeline.partitioning.summaries import region_of, summary_schema
from pipeline.partitioning.tree import Cut, PartitionTree, narrowed
from pipeline.partitioning.workload import Workload, summarize
from pipeline.storage import Store, open_store, split_uri
from pipeline.tables import read_columns, write_table

__all__ = [
    "joined_partitions",
    "read_fitted",
    "read_partition_tree",
    "read_regions",
    "read_workload",
    "regions_of_paths",
    "write_partition_tree",
    "write_partitions",
]

TREE = pa.schema(
    [
        pa.field("cut", pa.string(), nullable=False),
        pa.field("if_true", pa.int32(), nullable=False),
        pa.field("otherwise", pa.int32(), nullable=False),
    ]
)
"""One row a node; a child below 0 is ~partition."""
FITTED = pa.schema(
    [pa.field("filter", pa.string(), nullable=False), pa.field("weight", pa.float64(), nullable=False)]
)
"""Filters that a layout was fitted to."""
DESCRIPTION = pa.schema(
    [
        pa.field("partition_id", pa.int32(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("bits", pa.string(), nullable=False),
    ]
)
"""Of a partition, before the summaries of its attributes."""


def read_workload(uri: str, storage: StorageConfig, attributes: pa.Schema) -> Workload:
    """Read past queries: Parquet with `filter`, null where a query has none, and optionally `weight`.

    Args:
        uri: Local or on S3; other columns, such as query vectors, may stand beside and are not read.
        storage: How to reach S3.
        attributes: Columns that filters may name.

    Raises:
        MissingFileError: It is not there.
        CorruptArtifactError: It is not Parquet.
        SchemaMismatchError: A column is missing or has values of another type.
    """
    folder, name = split_uri(uri)
    data = open_store(folder, storage).read(name)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = [one for one in ("filter", "weight") if one in file.schema_arrow.names]
        table = file.read(columns=names)
    except pa.ArrowException as error:
        raise CorruptArtifactError(uri, f"is not readable ({error})", "give Parquet") from error
    if "filter" not in names:
        raise SchemaMismatchError(uri, "expected a column filter", "rename the column")
    return summarize(zip(_filters(uri, table), _weights(uri, table), strict=True), attributes)


def _filters(uri: str, table: pa.Table) -> list[str | None]:
    kind = table["filter"].type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise SchemaMismatchError(uri, f"expected strings in `filter`, found {kind}", "cast the column")
    return cast(list[str | None], table["filter"].to_pylist())


def _weights(uri: str, table: pa.Table) -> list[float]:
    if "weight" not in table.column_names:
        return [1.0] * table.num_rows
    kind = table["weight"].type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise SchemaMismatchError(uri, f"expected numbers in `weight`, found {kind}", "cast the column")
    weights = table["weight"].to_pylist()
    wrong = next((i for i, one in enumerate(weights) if one is None or not 0 <= one < float("inf")), None)
    if wrong is not None:
        found = weights[wrong]
        raise SchemaMismatchError(
            f"{uri} row {wrong}", f"expected a weight from 0, found {found}", "mend the row"
        )
    return [float(one) for one in weights]


def write_fitted(store: Store, workload: Workload) -> FileRef:
    """Keep what a layout was fitted to: the filters and their shares of the queries."""
    table = pa.table(
        [[one.text for one in workload.filters], pa.array(workload.weights, pa.float64())], schema=FITTED
    )
    return write_table(store, "partitions", FITTED, [table], suffix=".workload.parquet")


def read_fitted(store: Store, ref: FileRef) -> dict[str, float]:
    """Canonical texts of filters of `write_fitted`, with their weights."""
    table = read_columns(store, ref.path)
    return dict(zip(table["filter"].to_pylist(), table["weight"].to_pylist(), strict=True))


def write_partition_tree(store: Store, tree: PartitionTree) -> FileRef:
    """Keep a tree."""
    rows = [dict(zip(TREE.names, node, strict=True)) for node in tree.nodes]
    table = pa.Table.from_pylist(rows, schema=TREE)
    return write_table(store, "partitions", TREE, [table], suffix=".tree.parquet")


def read_partition_tree(store: Store, ref: FileRef, attributes: pa.Schema) -> PartitionTree:
    """A tree of `write_partition_tree`."""
    return PartitionTree(
        tuple(
            Cut(as_atom(row["cut"], attributes), row["if_true"], row["otherwise"])
            for row in read_columns(store, ref.path).to_pylist()
        )
    )


def joined_partitions(store: Store, tables: Sequence[tuple[FileRef, Sequence[int]]]) -> FileRef:
    """Descriptions of some partitions of several tables of `write_partitions`, one table after the other.

    Args:
        store: The root.
        tables: With the same attributes; of each, places of the partitions that are wanted.
    """
    parts = [read_columns(store, ref.path).take(pa.array(rows, pa.int64())) for ref, rows in tables]
    table = pa.concat_tables(parts)
    return write_table(store, "partitions", table.schema, [table], suffix=".partitions.parquet")


def as_atom(text: str, attributes: pa.Schema) -> Atom:
    """A predicate on one column from its text."""
    return cast(Atom, parse_filter(text, attributes).predicate)


def write_partitions(
    store: Store, described: Sequence[Mapping[str, Any]], summaries: Sequence[pa.Table], attributes: pa.Schema
) -> FileRef:
    """Write what is known of each partition, for readers and for other tools to prune by.

    Args:
        store: The root.
        described: Values of DESCRIPTION, of each partition.
        summaries: A row of `summary_schema` of each.
        attributes: Of the documents.
    """
    front = pa.Table.from_pylist([dict(one) for one in described], schema=DESCRIPTION)
    schema = pa.schema([*DESCRIPTION, *summary_schema(attributes)])
    summary = pa.concat_tables(summaries)
    table = pa.Table.from_arrays([*front.columns, *summary.columns], schema=schema)
    return write_table(store, "partitions", schema, [table], suffix=".partitions.parquet")


def read_regions(store: Store, ref: FileRef, cuts: Sequence[str], attributes: pa.Schema) -> list[Region]:
    """What the rows of each partition can have, in the order of the partitions.

    Args:
        store: The root.
        ref: File of `write_partitions`.
        cuts: Text of each cut, as the manifest has them.
        attributes: Of the documents.
    """
    atoms = [as_atom(text, attributes) for text in cuts]
    rows = read_columns(store, ref.path).to_pylist()
    return [narrowed(region_of(row, attributes), atoms, row["bits"]) for row in rows]


def regions_of_paths(bits: Sequence[str], cuts: Sequence[str], attributes: pa.Schema) -> list[Region]:
    """What the rows of partitions can have by their paths alone."""
    atoms = [as_atom(text, attributes) for text in cuts]
    return [narrowed(Region(), atoms, one) for one in bits]
