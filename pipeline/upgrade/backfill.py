"""Stages of a backfill: what a leaf costs and gains, the texts to embed anew, which rows move, which tombstones they leave.

A leaf is a posting list of a partition in an earlier space, with the vectors that are its own. Rows that stay are those of these
partitions that have no tombstone; all other documents are in the new space. Rows are matched with documents through a shuffle by
bucket of documents, so that no task holds more than a segment or a bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import BridgeInfo, FileRef, Partition, Segment, StageOutput
from pipeline.corpus.changes import is_same
from pipeline.corpus.identity import bucket_of, hash_matrix, sort_keys
from pipeline.embedding.cache import Cache
from pipeline.index.bridges import load_crossing
from pipeline.index.condemned import drop_condemned
from pipeline.index.tombstones import read_tombstones, write_tombstones
from pipeline.schemas import condemned_schema
from pipeline.spaces import EncoderIdentity
from pipeline.storage import Store
from pipeline.tables import hash_keys, read_bucket, read_columns, write_bucketed, write_table
from pipeline.upgrade.stage import SAMPLED, cached_vectors

__all__ = [
    "LEAVES",
    "Chosen",
    "DocumentBucket",
    "OldSegment",
    "bury_rows",
    "list_members",
    "rebucket_documents",
    "settle_documents",
    "sum_leaves",
    "texts_to_embed",
    "weigh_leaves",
]

MEMBERS = pa.schema(
    [
        pa.field("vector_id", pa.binary(16), nullable=False),
        pa.field("segment", pa.int32(), nullable=False),
        pa.field("leaf", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ]
)
"""Rows in an earlier space: number of the segment among all such, of the list in its partition, of the row in the segment."""
LEAVES = pa.schema(
    [
        pa.field("leaf", pa.int32(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("to_embed", pa.int64(), nullable=False),
        pa.field("judged", pa.int64(), nullable=False),
        pa.field("missed", pa.float64(), nullable=False),
    ]
)
"""Of a leaf: rows, those whose text the new encoder has not embedded, those that it has, and the sum of how far the bridge takes
their new vectors from the old ones."""
OF_SEGMENT = pa.schema([pa.field("segment", pa.int32(), nullable=False), *LEAVES])
GONE = pa.schema(
    [pa.field("segment", pa.int32(), nullable=False), pa.field("row", pa.int32(), nullable=False)]
)

Chosen = Mapping[int, NDArray[np.int64]]
"""By number of the segment, its leaves that move, rising."""


@dataclass(frozen=True)
class DocumentBucket:
    """One bucket of documents."""

    number: int
    documents: FileRef
    """As they are now."""
    before: tuple[FileRef, ...] = ()
    """Files of `rebucket_documents` of the documents as they were when they were embedded; none: they are the same."""


@dataclass(frozen=True)
class OldSegment:
    """A segment of a partition in an earlier space."""

    number: int
    """Among all such segments of an index."""
    partition: Partition
    place: int
    """Among the segments of the partition."""

    @property
    def segment(self) -> Segment:
        """Its files."""
        return self.partition.segments[self.place]


def list_members(store: Store, old: OldSegment, *, buckets: int) -> StageOutput:
    """Rows of a segment without a tombstone, by bucket of their documents.

    Args:
        store: The root.
        old: The segment.
        buckets: Of documents.

    Returns:
        File `members`: rows of MEMBERS.
    """
    ids = read_columns(store, old.segment.vectors.path, ["vector_id"])["vector_id"]
    live = np.ones(len(ids), np.bool_)
    if old.segment.tombstones is not None:
        live[read_tombstones(store, old.segment.tombstones)] = False
    rows = np.flatnonzero(live)
    columns = [
        ids.take(pa.array(rows)),
        pa.array(np.full(len(rows), old.number, np.int32)),
        pa.array(_leaf_of_rows(store, old)[rows].astype(np.int32)),
        pa.array(rows.astype(np.int32)),
    ]
    table = pa.table(columns, schema=MEMBERS)
    of_row = bucket_of(hash_matrix(table["vector_id"]), buckets)
    return StageOutput(files={"members": write_bucketed(store, "scratch/members", table, of_row)})


def _leaf_of_rows(store: Store, old: OldSegment) -> NDArray[np.int64]:
    """(rows of the segment,) the list that each is an own vector of."""
    names = ["segment", "list_no", "first_row", "num_primaries"]
    table = read_columns(store, old.partition.directory.path, names)
    segment, leaf, first, count = (table[name].to_numpy().astype(np.int64) for name in names)
    here = np.flatnonzero((segment == old.place) & (count > 0))
    here = here[np.argsort(first[here])]
    return np.repeat(leaf[here], count[here])


# ------------------------------------------------------------------------------------------------ what pays


def weigh_leaves(
    store: Store,
    bucket: DocumentBucket,
    members: Sequence[FileRef],
    caches: tuple[Cache, Cache],
    bridge: BridgeInfo,
    encoder: EncoderIdentity,
) -> StageOutput:
    """What the rows of one bucket of documents tell of the leaves that they are in.

    Args:
        store: The root.
        bucket: Of documents.
        members: Files of `list_members`.
        caches: Of the new encoder and of the old one.
        bridge: From the new one's space into the old one's.
        encoder: The new one.

    Returns:
        File `leaves`: LEAVES by segment.
    """
    table = _members_of(store, members, bucket.number)
    hashes, text_of = np.unique(_hashes_of(store, bucket.documents, table), return_inverse=True)
    new, old = caches
    is_there, vectors = cached_vectors(store, new, hashes)
    crossing = load_crossing(store, bridge, encoder)
    missed = np.zeros(len(hashes))
    judged = np.flatnonzero(is_there)
    if len(judged):
        _, wanted = cached_vectors(store, old, hashes[judged])
        missed[judged] = 1 - np.einsum("nd,nd->n", crossing.queries(vectors[judged]), wanted)
    found = _by_leaf(table, is_there[text_of], missed[text_of])
    segments = found["segment"].to_numpy()
    return StageOutput(files={"leaves": write_bucketed(store, "scratch/leaves", found, segments)})


def _by_leaf(members: pa.Table, is_there: NDArray[np.bool_], missed: NDArray[np.float64]) -> pa.Table:
    """Sums over rows of a leaf, as OF_SEGMENT."""
    keys = (members["segment"].to_numpy().astype(np.int64) << 32) + members["leaf"].to_numpy()
    leaves, at = np.unique(keys, return_inverse=True)
    count = len(leaves)
    rows, there = np.bincount(at, minlength=count), np.bincount(at, is_there, minlength=count)
    columns = [
        leaves >> 32,
        leaves & 0xFFFFFFFF,
        rows,
        rows - there,
        there,
        np.bincount(at, missed, minlength=count),
    ]
    return pa.table(
        [pa.array(c).cast(f.type, safe=False) for c, f in zip(columns, OF_SEGMENT, strict=True)],
        schema=OF_SEGMENT,
    )


def sum_leaves(store: Store, weighed: Sequence[FileRef], number: int) -> StageOutput:
    """What all buckets tell of the leaves of one segment.

    Args:
        store: The root.
        weighed: Files of `weigh_leaves`.
        number: The segment.

    Returns:
        File `leaves`: rows of LEAVES, by leaf.
    """
    table = pa.concat_tables([read_bucket(store, ref.path, number) for ref in weighed])
    names = LEAVES.names[1:]
    summed = table.group_by("leaf").aggregate([(name, "sum") for name in names]).sort_by("leaf")
    columns = [summed["leaf"], *(summed[f"{name}_sum"] for name in names)]
    found = pa.table(columns, names=LEAVES.names).cast(LEAVES)
    return StageOutput(files={"leaves": write_table(store, "scratch/leaves", LEAVES, [found])})


# ------------------------------------------------------------------------------------------------ what moves


def texts_to_embed(
    store: Store, bucket: DocumentBucket, members: Sequence[FileRef], chosen: Chosen, new: Cache
) -> StageOutput:
    """Texts of the rows of one bucket of documents that are to move.

    Returns:
        File `texts`: rows of SAMPLED by bucket of the new cache.
    """
    table = _members_of(store, members, bucket.number)
    moving = table.filter(pa.array(_is_chosen(table, chosen)))
    rows = read_columns(store, bucket.documents.path, [*SAMPLED.names, "vector_id"])
    at = _rows_of(hash_keys(moving["vector_id"]), rows)
    texts = rows.take(pa.array(at)).select(SAMPLED.names).cast(SAMPLED)
    of_row = bucket_of(hash_matrix(texts["text_hash"]), new.buckets)
    return StageOutput(files={"texts": write_bucketed(store, "scratch/moving", texts, of_row)})


def rebucket_documents(store: Store, documents: FileRef, *, buckets: int) -> StageOutput:
    """One file of the documents of a release, by other buckets, without their texts.

    Returns:
        File `documents`.
    """
    table = read_columns(store, documents.path).replace_schema_metadata(None).drop_columns(["text"])
    of_row = bucket_of(hash_matrix(table["vector_id"]), buckets)
    return StageOutput(files={"documents": write_bucketed(store, "scratch/before", table, of_row)})


def settle_documents(
    store: Store,
    bucket: DocumentBucket,
    members: Sequence[FileRef],
    *,
    chosen: Chosen,
    condemned: Sequence[FileRef],
    new: Cache,
) -> StageOutput:
    """Tell which rows of one bucket of documents are in the new space, and which of the old ones are no longer there.

    A row of an earlier space stays as long as its document has not changed and its leaf is not chosen; one whose text the new
    encoder cannot embed stays, too.

    Args:
        store: The root.
        bucket: Of documents.
        members: Files of `list_members`.
        chosen: Leaves that move.
        condemned: Rows of documents that are in no index.
        new: Cache of the new encoder.

    Returns:
        Files `texts` (documents_schema by bucket of text hash, sorted by text_hash and vector_id) and `gone` (GONE by segment);
        numbers `stay`, `move`.
    """
    table = _members_of(store, members, bucket.number)
    now = read_columns(store, bucket.documents.path).replace_schema_metadata(None)
    stays = _is_unchanged(store, bucket, table, now)
    stays &= ~_can_move(store, new, now, table, stays & _is_chosen(table, chosen))
    gone = table.filter(pa.array(~stays)).select(GONE.names)
    moved = now.filter(pa.array(~np.isin(hash_keys(now["vector_id"]), hash_keys(table["vector_id"])[stays])))
    lost = [read_columns(store, ref.path) for ref in condemned]
    moved = drop_condemned(moved, pa.concat_tables([condemned_schema().empty_table(), *lost]))
    return StageOutput(
        files={
            "texts": _write_texts(store, moved, new.buckets),
            "gone": write_bucketed(store, "scratch/gone", gone, gone["segment"].to_numpy()),
        },
        numbers={"stay": int(stays.sum()), "move": moved.num_rows},
    )


def _is_unchanged(
    store: Store, bucket: DocumentBucket, members: pa.Table, now: pa.Table
) -> NDArray[np.bool_]:
    """(n,) which members are documents still, and the same."""
    if bucket.before:
        then = pa.concat_tables([read_bucket(store, ref.path, bucket.number) for ref in bucket.before])
        now = now.filter(pa.array(is_same(then, now.drop_columns(["text"]))))
    return np.isin(hash_keys(members["vector_id"]), hash_keys(now["vector_id"]))


def _can_move(
    store: Store, new: Cache, documents: pa.Table, members: pa.Table, wanted: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """(n,) which of the wanted members have a text that the new encoder has embedded."""
    found = np.zeros(len(wanted), np.bool_)
    rows = np.flatnonzero(wanted)
    hashes, text_of = np.unique(_hashes_in(documents, members.take(pa.array(rows))), return_inverse=True)
    is_there, _ = cached_vectors(store, new, hashes)
    found[rows] = is_there[text_of]
    return found


def bury_rows(store: Store, gone: Sequence[FileRef], old: OldSegment) -> StageOutput:
    """Put a tombstone on the rows of one segment that are no longer there.

    Returns:
        File `tombstones`, if any row of it has one.
    """
    rows = [read_bucket(store, ref.path, old.number)["row"].to_numpy().astype(np.int64) for ref in gone]
    if old.segment.tombstones is not None:
        rows.append(read_tombstones(store, old.segment.tombstones))
    buried = np.concatenate([np.zeros(0, np.int64), *rows])
    if not len(buried):
        return StageOutput(files={})
    return StageOutput(files={"tombstones": write_tombstones(store, buried)})


def _write_texts(store: Store, rows: pa.Table, buckets: int) -> FileRef:
    hashes = hash_matrix(rows["text_hash"])
    # Documents are sorted by vector_id, which a stable sort keeps among equal texts.
    order = np.argsort(sort_keys(hashes), kind="stable")
    return write_bucketed(
        store, "scratch/texts", rows.take(pa.array(order)), bucket_of(hashes[order], buckets)
    )


def _members_of(store: Store, members: Sequence[FileRef], bucket: int) -> pa.Table:
    return pa.concat_tables(
        [MEMBERS.empty_table(), *(read_bucket(store, ref.path, bucket) for ref in members)]
    )


def _is_chosen(members: pa.Table, chosen: Chosen) -> NDArray[np.bool_]:
    segment, leaf = (members[name].to_numpy() for name in ("segment", "leaf"))
    found = np.zeros(members.num_rows, np.bool_)
    for number, leaves in chosen.items():
        here = np.flatnonzero(segment == number)
        found[here] = np.isin(leaf[here], leaves)
    return found


def _hashes_of(store: Store, documents: FileRef, members: pa.Table) -> NDArray[np.bytes_]:
    """Text hashes of members of a bucket of documents."""
    return _hashes_in(read_columns(store, documents.path, ["vector_id", "text_hash"]), members)


def _hashes_in(documents: pa.Table, members: pa.Table) -> NDArray[np.bytes_]:
    return hash_keys(documents["text_hash"])[_rows_of(hash_keys(members["vector_id"]), documents)]


def _rows_of(ids: NDArray[np.bytes_], documents: pa.Table) -> NDArray[np.int64]:
    """Rows of documents, which are sorted by vector_id, that have these ids; all of them are there."""
    return np.searchsorted(hash_keys(documents["vector_id"]), ids)
