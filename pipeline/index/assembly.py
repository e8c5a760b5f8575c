"""Rows with their vectors → placed rows → lists of primaries → entries of posting lists. Pure: tables in, tables out."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.binarization import Binarizer, binarize, rotate_queries, score
from pipeline.clustering import charged_lists, pair_distances
from pipeline.index.training import Layout
from pipeline.postings import MOST, kept_entries, longest_list, replicas_of, split_rows
from pipeline.schemas import COPY_DISTANCE, COPY_LIST, DISTANCE, LIST_NO, PART, lists_schema
from pipeline.tables import to_matrix, vector_array

__all__ = [
    "NO_PART",
    "CutLists",
    "Settled",
    "cut_entries",
    "entries_of",
    "entries_schema",
    "place_rows",
    "placed_schema",
    "settle_rows",
    "settled_lists_schema",
    "without_parts",
]

PLACED_AMONG = 16
"""Nearest heads among which a vector's lists are found. *Measured*: with 32 as many copies and as much recall."""
NO_PART = -1
"""Part of a replica whose list may have been split after it was placed."""


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _each(kind: pa.DataType, size: int) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False), size)


def _code_fields(code_bytes: int) -> list[pa.Field]:
    return [lists_schema(code_bytes).field(name) for name in ("code", "factor", "offset")]


# ------------------------------------------------------------------------------------------------ placing


def placed_schema(dims: int, code_bytes: int, max_replicas: int, attributes: pa.Schema) -> pa.Schema:
    """One row per vector between placing and settling: its lists, its codes, and what the vectors file holds."""
    copies = [
        _required(COPY_LIST, _each(pa.int32(), max_replicas - 1)),
        _required(COPY_DISTANCE, _each(pa.float32(), max_replicas - 1)),
    ]
    fixed = [
        _required(LIST_NO, pa.int32()),
        _required(DISTANCE, pa.float32()),
        _required("vector_id", pa.binary(16)),
        _required("doc_id", pa.string()),
        _required("embedding", _each(pa.float16(), dims)),
        *_code_fields(code_bytes),
    ]
    return pa.schema([*fixed, *(copies if max_replicas > 1 else []), *attributes])


def place_rows(
    rows: pa.Table,
    vectors: NDArray[np.float32],
    layout: Layout,
    binarizer: Binarizer,
    attributes: pa.Schema,
) -> pa.Table:
    """Assign rows to lists and binarize their vectors.

    Args:
        rows: (n) rows with vector_id, doc_id and the attributes.
        vectors: (n, d) float32 unit vectors.
        layout: The lists.
        binarizer: Of the codes.
        attributes: Schema of the attributes.

    Returns:
        (n) rows of `placed_schema`.
    """
    near = layout.grown.near(vectors, layout.partition_tree.assign(rows), PLACED_AMONG)
    primary = charged_lists(near, layout.grown.prices.now)
    copies = replicas_of(near, primary, layout.heads, max_replicas=layout.max_replicas)
    codes = binarize(binarizer, vectors)
    schema = placed_schema(vectors.shape[1], codes.code.shape[1], layout.max_replicas, attributes)
    own = (near.list_no == primary[:, None]).argmax(axis=1)
    columns = {
        LIST_NO: pa.array(primary),
        DISTANCE: pa.array(near.distance[np.arange(len(own)), own]),
        "embedding": vector_array(vectors.astype(np.float16)),
        "code": _binary(codes.code),
        "factor": pa.array(codes.factor),
        "offset": pa.array(codes.offset),
    }
    if layout.max_replicas > 1:
        columns |= {
            COPY_LIST: vector_array(copies.list_no),
            COPY_DISTANCE: vector_array(copies.distance),
        }
    return pa.table(
        [columns[name] if name in columns else rows[name] for name in schema.names], schema=schema
    )


def _binary(matrix: NDArray[np.uint8]) -> pa.Array:
    """(n, width) bytes as a fixed_size_binary column."""
    buffer = pa.py_buffer(np.ascontiguousarray(matrix))
    return pa.Array.from_buffers(pa.binary(matrix.shape[1]), len(matrix), [None, buffer])


# ------------------------------------------------------------------------------------------------ settling


@dataclass(frozen=True)
class Settled:
    """The primaries of one segment in their final order."""

    rows: pa.Table
    """(n) placed rows by list, part, distance, vector_id; with the column `part`."""
    list_no: NDArray[np.int32]
    """(lists,) as it was placed, rising; a list that was split comes several times."""
    part: NDArray[np.int32]
    """(lists,) part of a list that was split, else 0."""
    heads: NDArray[np.float32]
    """(lists, d)."""
    first: NDArray[np.int64]
    """(lists,) first row of each."""
    primaries: NDArray[np.int64]
    """(lists,) rows of each, at least 1."""


def settle_rows(placed: pa.Table, layout: Layout) -> Settled:
    """Put rows in primary order; a list of more than `MOST` times the rows that it should have becomes several.

    Args:
        placed: (n) rows of `placed_schema`, of whole lists.
        layout: The lists.
    """
    keys = [(name, "ascending") for name in (LIST_NO, DISTANCE, "vector_id")]
    rows = placed.sort_by(keys)
    list_no, distance = rows[LIST_NO].to_numpy(), rows[DISTANCE].to_numpy().copy()
    part = np.zeros(len(list_no), np.int32)
    split: dict[int, NDArray[np.float32]] = {}
    numbers, firsts, counts = np.unique(list_no, return_index=True, return_counts=True)
    for number, first, count in zip(numbers.tolist(), firsts.tolist(), counts.tolist(), strict=True):
        if count <= MOST * layout.rows_per_list:
            continue
        here = slice(first, first + count)
        vectors = to_matrix(rows["embedding"].slice(first, count)).astype(np.float32)
        own = np.random.SeedSequence([layout.seed, number]).generate_state(1)[0] >> 1
        found = split_rows(vectors, mean_rows=layout.rows_per_list, seed=int(own))
        parts = _real(vectors, found.part, found.heads) if layout.real_heads else found.heads
        part[here], split[number] = found.part, parts
        distance[here] = pair_distances(vectors, parts, np.arange(count), found.part)
    rows = rows.append_column(_required(PART, pa.int32()), pa.array(part))
    rows = rows.set_column(
        rows.schema.get_field_index(DISTANCE), rows.schema.field(DISTANCE), pa.array(distance)
    )
    rows = rows.sort_by([(LIST_NO, "ascending"), (PART, "ascending"), *keys[1:]])
    return _numbered(rows, layout.heads, split)


def _real(
    vectors: NDArray[np.float32], part: NDArray[np.int32], means: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(parts, d) of each part the vector nearest to its mean."""
    distance = pair_distances(vectors, means, np.arange(len(part)), part)
    order = np.lexsort((distance, part))
    return vectors[order[np.searchsorted(part[order], np.arange(len(means)))]]


def _numbered(rows: pa.Table, heads: NDArray[np.float32], split: dict[int, NDArray[np.float32]]) -> Settled:
    list_no, part = rows[LIST_NO].to_numpy(), rows[PART].to_numpy()
    starts = np.flatnonzero(np.diff(list_no, prepend=-1) | np.diff(part, prepend=-1))
    numbers, parts = list_no[starts], part[starts]
    own = heads[numbers].copy()
    for number, of_parts in split.items():
        here = numbers == number
        own[here] = of_parts[parts[here]]
    sizes = np.diff(starts, append=len(list_no))
    return Settled(rows, numbers, parts, own, starts, sizes)


def settled_lists_schema(dims: int) -> pa.Schema:
    """One row per list of a segment: what it was placed as, its head, and where its primaries lie."""
    return pa.schema(
        [
            _required("list_no", pa.int32()),
            _required("part", pa.int32()),
            _required("head", _each(pa.float32(), dims)),
            _required("first_row", pa.int32()),
            _required("num_primaries", pa.int32()),
            _required("vector_ids_at", pa.int64()),
            _required("embeddings_at", pa.int64()),
            _required("doc_ids_at", pa.int64()),
            _required("doc_ids_bytes", pa.int32()),
        ]
    )


def entries_schema(code_bytes: int) -> pa.Schema:
    """One row per entry of a posting list on its way from the segment of its vector to that of its list."""
    return pa.schema(
        [
            _required("list_no", pa.int32()),
            _required("part", pa.int32()),
            _required("replica_no", pa.int8()),
            _required("distance", pa.float32()),
            *_code_fields(code_bytes),
            _required("segment", pa.int32()),
            _required("row", pa.int32()),
        ]
    )


def entries_of(settled: Settled, segment_no: int) -> pa.Table:
    """Entries of the rows of one segment, replicas included.

    Args:
        settled: Its rows.
        segment_no: Its number.

    Returns:
        Rows of `entries_schema`; `row` counts within the segment.
    """
    rows = settled.rows
    n = rows.num_rows
    at, replica_no = np.arange(n, dtype=np.int32), np.zeros(n, np.int8)
    list_no, part = rows[LIST_NO].to_numpy(), rows[PART].to_numpy()
    distance = rows[DISTANCE].to_numpy()
    if COPY_LIST in rows.schema.names:
        lists, apart = to_matrix(rows[COPY_LIST]), to_matrix(rows[COPY_DISTANCE])
        row, copy = np.nonzero(lists >= 0)
        at = np.concatenate([at, row.astype(np.int32)])
        replica_no = np.concatenate([replica_no, (copy + 1).astype(np.int8)])
        list_no = np.concatenate([list_no, lists[row, copy]])
        part = np.concatenate([part, np.full(len(row), NO_PART, np.int32)])
        distance = np.concatenate([distance, apart[row, copy]])
    codes = rows.select(["code", "factor", "offset"]).take(pa.array(at))
    schema = entries_schema(codes.schema.field("code").type.byte_width)
    columns = {
        "list_no": pa.array(list_no.astype(np.int32)),
        "part": pa.array(part),
        "replica_no": pa.array(replica_no),
        "distance": pa.array(distance.astype(np.float32)),
        "segment": pa.array(np.full(len(at), segment_no, np.int32)),
        "row": pa.array(at),
    }
    return pa.table(
        [columns[name] if name in columns else codes[name] for name in schema.names], schema=schema
    )


# ------------------------------------------------------------------------------------------------ building


def without_parts(entries: pa.Table, binarizer: Binarizer, lists: pa.Table) -> pa.Table:
    """Entries with the part that each belongs to: a replica of a list that was split goes where its code is nearest.

    Args:
        entries: (n) rows of `entries_schema`.
        binarizer: Of their codes.
        lists: Rows of `settled_lists_schema`, all lists of the entries.
    """
    list_no, part = entries["list_no"].to_numpy(), entries["part"].to_numpy().copy()
    distance = entries["distance"].to_numpy().copy()
    part[part == NO_PART] = 0
    numbers = lists["list_no"].to_numpy()
    for number in np.unique(numbers[lists["part"].to_numpy() > 0]):
        copies = np.flatnonzero((list_no == number) & (entries["replica_no"].to_numpy() > 0))
        if not len(copies):
            continue
        heads = to_matrix(lists["head"].filter(pa.array(numbers == number))).astype(np.float32)
        apart = _estimated_distances(heads, binarizer, entries.take(pa.array(copies)))
        part[copies], distance[copies] = apart.argmin(axis=0), apart.min(axis=0)
    entries = entries.set_column(1, entries.schema.field("part"), pa.array(part))
    place = entries.schema.get_field_index("distance")
    return entries.set_column(place, entries.schema.field("distance"), pa.array(distance))


def _estimated_distances(
    heads: NDArray[np.float32], binarizer: Binarizer, entries: pa.Table
) -> NDArray[np.float32]:
    """(heads, n) squared L2 to unit vectors, estimated from their codes."""
    code = np.frombuffer(b"".join(entries["code"].to_pylist()), np.uint8).reshape(entries.num_rows, -1)
    factor, offset = (entries[name].to_numpy() for name in ("factor", "offset"))
    products = score(binarizer, rotate_queries(binarizer, heads), code, factor, offset)
    products += (heads @ binarizer.mean)[:, None]
    apart: NDArray[np.float32] = 1 + np.einsum("ld,ld->l", heads, heads)[:, None] - 2 * products
    return apart.astype(np.float32)


@dataclass(frozen=True)
class CutLists:
    """Entries of one segment's lists as they are written."""

    entries: pa.Table
    """Rows of `entries_schema`, by list, part, distance, row."""
    counts: NDArray[np.int64]
    """(lists,) entries of each list, in the order of the settled lists."""
    radius: NDArray[np.float32]
    """(lists,) largest distance of an entry."""


def cut_entries(entries: pa.Table, lists: pa.Table, *, rows_per_list: int, most: int) -> CutLists:
    """Sort the entries of one segment into lists and drop the farthest replicas beyond a cap.

    Args:
        entries: (n) rows of `entries_schema`, whose part is known and whose `row` counts through the partition.
        lists: Rows of `settled_lists_schema`, in storage order.
        rows_per_list: Primaries that a list should have.
        most: Entries of a list, whatever the others have.
    """
    names = list(zip(lists["list_no"].to_pylist(), lists["part"].to_pylist(), strict=True))
    place = {name: at for at, name in enumerate(names)}
    pairs = zip(entries["list_no"].to_pylist(), entries["part"].to_pylist(), strict=True)
    at = np.fromiter((place[pair] for pair in pairs), np.int64, entries.num_rows)
    distance = entries["distance"].to_numpy()
    primaries = lists["num_primaries"].to_numpy()
    if len(primaries):
        all_entries = np.bincount(at, minlength=len(names))
        most = min(most, longest_list(all_entries, primaries, least=rows_per_list))
    kept = kept_entries(at, entries["replica_no"].to_numpy(), distance, most=most)
    order = np.lexsort((entries["row"].to_numpy(), distance, at))
    order = order[kept[order]]
    counts = np.bincount(at[order], minlength=len(names))
    radius = distance[order[np.cumsum(counts) - 1]]
    return CutLists(entries.take(pa.array(order)), counts, radius)
