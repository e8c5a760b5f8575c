"""Stages of a backfill: what a leaf costs and gains, the texts to embed anew, which documents move, which tombstones they leave.

A leaf is a posting list of a partition in an earlier space, with the vectors that are its own. Documents move whole: with one
chunk all others of its document. Rows are matched with documents through a shuffle by bucket of documents, and with vectors
through one by bucket of text hashes, so that no task holds more than a segment or a bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import BridgeInfo, FileRef, Partition, Segment, StageOutput
from pipeline.corpus.changes import is_same
from pipeline.corpus.identity import DOC_HASH_BYTES, bucket_of, hash_matrix, sort_keys
from pipeline.embedding.cache import Cache, CachedBucket
from pipeline.evaluation.stage import read_query_vectors
from pipeline.index.batch import Batch, answer, routes_of
from pipeline.index.bridges import load_crossing
from pipeline.index.condemned import drop_condemned
from pipeline.index.reader import IndexReader, load_manifest
from pipeline.index.tombstones import live_rows, read_tombstones, write_tombstones
from pipeline.index.vectors import cached_vectors
from pipeline.postings import Probing
from pipeline.schemas import condemned_schema
from pipeline.spaces import EncoderIdentity
from pipeline.storage import Store
from pipeline.tables import hash_keys, read_bucket, read_columns, write_bucketed, write_table
from pipeline.upgrade.ordering import LOOKED_AT, by_priority, smoothed_losses

__all__ = [
    "Allowance",
    "Chosen",
    "DocumentBucket",
    "Moving",
    "OldSegment",
    "bury_rows",
    "choose_leaves",
    "list_members",
    "look_into_leaves",
    "name_members",
    "read_chosen",
    "rebucket_documents",
    "settle_documents",
    "sum_leaves",
    "texts_to_embed",
    "texts_without_vector",
    "weigh_leaves",
    "weigh_texts",
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
NAMED = pa.schema(
    [
        pa.field("text_hash", pa.binary(16), nullable=False),
        pa.field("vector_id", pa.binary(16), nullable=False),
    ]
)
WEIGHED = pa.schema(
    [
        pa.field("vector_id", pa.binary(16), nullable=False),
        pa.field("is_missing", pa.bool_(), nullable=False),
        pa.field("is_stuck", pa.bool_(), nullable=False),
        pa.field("is_judged", pa.bool_(), nullable=False),
        pa.field("missed", pa.float64(), nullable=False),
    ]
)
"""Of a row, whether the new encoder has yet to embed its text, cannot, or has; and where it has, how far the bridge takes the new
vector from the old one."""
LEAVES = pa.schema(
    [
        pa.field("leaf", pa.int32(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("to_embed", pa.int64(), nullable=False),
        pa.field("stuck", pa.int64(), nullable=False),
        pa.field("judged", pa.int64(), nullable=False),
        pa.field("missed", pa.float64(), nullable=False),
    ]
)
"""Of a leaf: rows; texts that are embedded if it moves, with all other chunks of its documents; rows of documents that stay, as
one of their texts cannot be embedded; rows whose text is embedded, and the sum of how far the bridge misses these."""
OF_SEGMENT = pa.schema([pa.field("segment", pa.int32(), nullable=False), *LEAVES])
GONE = pa.schema(
    [pa.field("segment", pa.int32(), nullable=False), pa.field("row", pa.int32(), nullable=False)]
)
TEXTS = pa.schema(
    [
        pa.field("text_hash", pa.binary(16), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
HASHES = pa.schema([pa.field("text_hash", pa.binary(16), nullable=False)])

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
class Moving:
    """What a backfill moves."""

    chosen: Chosen
    stuck: tuple[FileRef, ...]
    """Files of `texts_without_vector`: documents with such a text stay."""


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
    rows = np.flatnonzero(live_rows(store, old.segment))
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


def name_members(
    store: Store, bucket: DocumentBucket, members: Sequence[FileRef], *, text_buckets: int
) -> StageOutput:
    """Texts of the rows of one bucket of documents.

    Args:
        store: The root.
        bucket: Of documents.
        members: Files of `list_members`.
        text_buckets: Buckets of the new encoder's cache.

    Returns:
        File `named`: rows of NAMED by bucket of text hash.
    """
    table = _members_of(store, members, bucket.number)
    documents = read_columns(store, bucket.documents.path, ["vector_id", "text_hash"])
    at = _rows_of(hash_keys(table["vector_id"]), documents)
    named = pa.table([documents["text_hash"].take(pa.array(at)), table["vector_id"]], schema=NAMED)
    of_row = bucket_of(hash_matrix(named["text_hash"]), text_buckets)
    return StageOutput(files={"named": write_bucketed(store, "scratch/named", named, of_row)})


def weigh_texts(
    store: Store,
    bucket: int,
    named: Sequence[FileRef],
    caches: tuple[Cache, Cache],
    bridge: BridgeInfo,
    encoder: EncoderIdentity,
    document_buckets: int,
) -> StageOutput:
    """What the caches tell of the rows of one bucket of texts.

    Args:
        store: The root.
        bucket: Of the new encoder's cache.
        named: Files of `name_members`.
        caches: Of the new encoder and of the old one.
        bridge: From the new one's space into the old one's.
        encoder: The new one.
        document_buckets: As of `list_members`.

    Returns:
        File `weighed`: WEIGHED by bucket of documents.
    """
    table = pa.concat_tables([NAMED.empty_table(), *(read_bucket(store, ref.path, bucket) for ref in named)])
    hashes, text_of = np.unique(hash_keys(table["text_hash"]), return_inverse=True)
    new, old = caches
    cached = CachedBucket(store, new, bucket)
    is_there = np.isin(hashes, cached.keys)
    missed = np.zeros(len(hashes))
    if is_there.any():
        crossing = load_crossing(store, bridge, encoder)
        wanted = cached_vectors(store, old, hashes[is_there])
        found = crossing.queries(cached.read(hashes[is_there]))
        missed[is_there] = np.where(wanted.is_there, 1 - np.einsum("nd,nd->n", found, wanted.vectors), 0)
    is_stuck = ~is_there & np.isin(hashes, hash_keys(cached.condemned["text_hash"]))
    columns = [one[text_of] for one in (~is_there & ~is_stuck, is_stuck, is_there, missed)]
    weighed = pa.table([table["vector_id"], *map(pa.array, columns)], schema=WEIGHED)
    of_row = bucket_of(hash_matrix(weighed["vector_id"]), document_buckets)
    return StageOutput(files={"weighed": write_bucketed(store, "scratch/weighed", weighed, of_row)})


def weigh_leaves(
    store: Store, bucket: int, members: Sequence[FileRef], weighed: Sequence[FileRef]
) -> StageOutput:
    """What one bucket of documents tells of the leaves that they are in: they move whole.

    Args:
        store: The root.
        bucket: Of documents.
        members: Files of `list_members`.
        weighed: Files of `weigh_texts`.

    Returns:
        File `leaves`: OF_SEGMENT by segment.
    """
    rows = _members_of(store, members, bucket).sort_by("vector_id")
    parts = [read_bucket(store, ref.path, bucket) for ref in weighed]
    told = pa.concat_tables([WEIGHED.empty_table(), *parts]).sort_by("vector_id")
    leaves = _by_leaf(rows, told)
    return StageOutput(
        files={"leaves": write_bucketed(store, "scratch/leaves", leaves, leaves["segment"].to_numpy())}
    )


def _by_leaf(rows: pa.Table, told: pa.Table) -> pa.Table:
    """Sums over the rows of a leaf, as OF_SEGMENT; of MEMBERS and what is told of each."""
    is_missing, is_stuck, is_judged, missed = (told[name].to_numpy() for name in WEIGHED.names[1:])
    documents, of_row = np.unique(_documents_of(rows), return_inverse=True)
    stays = np.bincount(of_row, is_stuck, minlength=len(documents)) > 0
    to_embed = np.where(stays, 0, np.bincount(of_row, is_missing, minlength=len(documents)))
    leaves, at = np.unique(
        (rows["segment"].to_numpy().astype(np.int64) << 32) + rows["leaf"].to_numpy(), return_inverse=True
    )
    # A document counts once for each leaf that it has a chunk in.
    pairs = np.unique(of_row.astype(np.int64) * len(leaves) + at)

    def summed(values: NDArray[np.generic]) -> NDArray[np.float64]:
        return np.bincount(at, values, minlength=len(leaves)).astype(np.float64)

    columns = [
        leaves >> 32,
        leaves & 0xFFFFFFFF,
        summed(np.ones(len(at))),
        np.bincount(
            pairs % max(1, len(leaves)), to_embed[pairs // max(1, len(leaves))], minlength=len(leaves)
        ),
        summed(stays[of_row]),
        summed(is_judged),
        summed(missed),
    ]
    arrays = [
        pa.array(column).cast(field.type, safe=False)
        for column, field in zip(columns, OF_SEGMENT, strict=True)
    ]
    return pa.table(arrays, schema=OF_SEGMENT)


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
    leaves, at = np.unique(table["leaf"].to_numpy(), return_inverse=True)
    # One after the other: sums of many threads would have other last bits from run to run.
    sums = [
        np.bincount(at, table[name].to_numpy().astype(np.float64), minlength=len(leaves))
        for name in LEAVES.names[1:]
    ]
    arrays = [
        pa.array(column).cast(field.type, safe=False)
        for column, field in zip([leaves, *sums], LEAVES, strict=True)
    ]
    found = pa.table(arrays, schema=LEAVES)
    return StageOutput(files={"leaves": write_table(store, "scratch/leaves", LEAVES, [found])})


CHOSEN = pa.schema(
    [pa.field("segment", pa.int32(), nullable=False), pa.field("leaf", pa.int32(), nullable=False)]
)
HITS = pa.schema([*CHOSEN, pa.field("weight", pa.float64(), nullable=False)])


def look_into_leaves(
    store: Store,
    rows: tuple[int, int],
    manifest: FileRef,
    first_segments: Mapping[int, int],
    queries: FileRef,
    weights: Sequence[float],
) -> StageOutput:
    """Leaves whose documents past queries look at, across the bridge.

    Args:
        store: The root.
        rows: Which of the queries, [start, stop).
        manifest: Of the release.
        first_segments: By the place of each partition in an earlier space, the number of its first segment.
        queries: File of `write_query_vectors`.
        weights: Of each query.

    Returns:
        File `hits`: rows of HITS, a leaf at most once.
    """
    reader = IndexReader(store, load_manifest(store, manifest))
    vectors = read_query_vectors(store, queries)[slice(*rows)]
    weight_of = np.array(weights[slice(*rows)])
    rule = Probing(reader.manifest.search.lists, reader.manifest.search.margin)
    keys, found = [np.zeros(0, np.int64)], [np.zeros(0)]
    for side in reader.sides():
        if side.crossing is None:
            continue
        batch = Batch(side.queries(vectors), [None] * len(vectors), LOOKED_AT, rule)
        places = answer(batch, routes_of(reader, side, {None}), threads=1).places
        query, rank = np.nonzero(places >= 0)
        place = places[query, rank]
        for one in side.partitions:
            mine = np.flatnonzero(place >> 32 == one.number)
            segment, leaf = one.part.leaves_of(place[mine] & 0xFFFFFFFF)
            keys.append((first_segments[one.number] + segment.astype(np.int64) << 32) + leaf)
            found.append(weight_of[query[mine]])
    leaves, at = np.unique(np.concatenate(keys), return_inverse=True)
    sums = np.bincount(at, np.concatenate(found), minlength=len(leaves))
    columns = [leaves >> 32, leaves & 0xFFFFFFFF, sums]
    table = pa.table([pa.array(c).cast(f.type) for c, f in zip(columns, HITS, strict=True)], schema=HITS)
    return StageOutput(files={"hits": write_table(store, "scratch/hits", HITS, [table])})


@dataclass(frozen=True)
class Allowance:
    """How far one backfill goes."""

    to_embed: int
    """Texts that it embeds, at most."""
    to_move: int | None = None
    """Rows that are enough; None: all."""


def choose_leaves(
    store: Store, leaves: Sequence[FileRef], hits: Sequence[FileRef], *, allowed: Allowance
) -> StageOutput:
    """Leaves in the order in which it pays to move them, as many as are allowed.

    Args:
        store: The root.
        leaves: File of `sum_leaves` of each segment.
        hits: Files of `look_into_leaves`.
        allowed: How far it goes.

    Returns:
        File `chosen`: rows of CHOSEN; numbers `rows`, `to_embed` of these, `leaves` of all, and `smallest`: what the
        first of all has to embed.
    """
    tables = [read_columns(store, ref.path) for ref in leaves]
    segment = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    table = pa.concat_tables(tables)
    leaf, rows, to_embed, stuck, judged, missed = (table[name].to_numpy() for name in LEAVES.names)
    looks = _looks(store, hits, (segment.astype(np.int64) << 32) + leaf)
    order = by_priority(looks, smoothed_losses(missed, judged), rows)
    order = order[rows[order] > stuck[order]]
    moving = order[: np.searchsorted(np.cumsum(to_embed[order]), allowed.to_embed, side="right")]
    if allowed.to_move is not None:
        moved_before = np.cumsum(rows[moving] - stuck[moving]) - (rows[moving] - stuck[moving])
        moving = moving[moved_before < allowed.to_move]
    columns = [segment[moving], leaf[moving]]
    chosen = pa.table([pa.array(c).cast(f.type) for c, f in zip(columns, CHOSEN, strict=True)], schema=CHOSEN)
    numbers = {
        "rows": int((rows[moving] - stuck[moving]).sum()),
        "to_embed": int(to_embed[moving].sum()),
        "leaves": len(leaf),
        "smallest": int(to_embed[order[0]]) if len(order) else 0,
    }
    return StageOutput(
        files={"chosen": write_table(store, "scratch/chosen", CHOSEN, [chosen])}, numbers=numbers
    )


def _looks(store: Store, hits: Sequence[FileRef], keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """(l,) weight of the queries that look into each leaf, whose keys (l,) rise."""
    found = np.zeros(len(keys))
    for ref in hits:
        table = read_columns(store, ref.path)
        wanted = (table["segment"].to_numpy().astype(np.int64) << 32) + table["leaf"].to_numpy()
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        here = keys[at] == wanted
        np.add.at(found, at[here], table["weight"].to_numpy()[here])
    return found


def read_chosen(store: Store, ref: FileRef) -> Chosen:
    """What `choose_leaves` wrote."""
    table = read_columns(store, ref.path)
    segment, leaf = (table[name].to_numpy().astype(np.int64) for name in CHOSEN.names)
    return {int(number): np.sort(leaf[segment == number]) for number in np.unique(segment)}


# ------------------------------------------------------------------------------------------------ what moves


def texts_to_embed(
    store: Store, bucket: DocumentBucket, members: Sequence[FileRef], chosen: Chosen, *, text_buckets: int
) -> StageOutput:
    """Texts of the documents of one bucket that are to move.

    Returns:
        File `texts`: rows of TEXTS by bucket of the new encoder's cache.
    """
    table = _members_of(store, members, bucket.number)
    moving = table.filter(pa.array(_with_their_documents(table, _is_chosen(table, chosen))))
    rows = read_columns(store, bucket.documents.path, [*TEXTS.names, "vector_id"])
    at = _rows_of(hash_keys(moving["vector_id"]), rows)
    texts = rows.take(pa.array(at)).select(TEXTS.names).cast(TEXTS).replace_schema_metadata(None)
    of_row = bucket_of(hash_matrix(texts["text_hash"]), text_buckets)
    return StageOutput(files={"texts": write_bucketed(store, "scratch/moving", texts, of_row)})


def texts_without_vector(store: Store, bucket: int, texts: Sequence[FileRef], cache: Cache) -> StageOutput:
    """Those of the texts of one bucket that have no vector once all were tried: they cannot be embedded.

    Returns:
        File `stuck`: rows of HASHES.
    """
    tables = [read_bucket(store, ref.path, bucket, ["text_hash"]) for ref in texts]
    hashes = pa.concat_tables([HASHES.empty_table(), *tables]).replace_schema_metadata(None)
    keys = hash_keys(hashes["text_hash"])
    stuck = hashes.filter(pa.array(~np.isin(keys, CachedBucket(store, cache, bucket).keys)))
    return StageOutput(files={"stuck": write_table(store, "scratch/stuck", HASHES, [stuck])})


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
    moving: Moving | None,
    condemned: Sequence[FileRef],
    text_buckets: int,
) -> StageOutput:
    """Tell which documents of one bucket are in the new space, and which rows of the old ones are no longer there.

    A document stays in an earlier space as long as none of its chunks changes, goes, or is in a leaf that is chosen; and where
    the new encoder cannot embed one of them.

    Args:
        store: The root.
        bucket: Of documents.
        members: Files of `list_members`.
        moving: What moves without having changed; None: nothing, and all that is not in an earlier space is yet to be embedded.
        condemned: Rows of documents that are in no index.
        text_buckets: Buckets of the new encoder's cache.

    Returns:
        Files `texts` (documents_schema by bucket of text hash, sorted by text_hash and vector_id), `gone` (GONE by segment) and
        `condemned` (those rows of documents that stay); numbers `stay`, `move`.
    """
    table = _members_of(store, members, bucket.number)
    now = read_columns(store, bucket.documents.path).replace_schema_metadata(None)
    is_kept = ~_with_their_documents(table, ~_is_unchanged(store, bucket, table, now))
    stays = is_kept & ~_moves(store, table, now, moving)
    gone = table.filter(pa.array(~stays)).select(GONE.names)
    old_side = np.unique(_documents_of(table)[stays])
    moved = now.filter(pa.array(~np.isin(_documents_of(now), old_side)))
    schema = condemned_schema()
    lost = pa.concat_tables([schema.empty_table(), *(read_columns(store, ref.path) for ref in condemned)])
    if moving is not None:
        moved = drop_condemned(moved, lost)
    of_staying = lost.filter(pa.array(np.isin(_documents_of(lost), old_side)))
    return StageOutput(
        files={
            "texts": _write_texts(store, moved, text_buckets),
            "gone": write_bucketed(store, "scratch/gone", gone, gone["segment"].to_numpy()),
            "condemned": write_table(store, "condemned", schema, [of_staying.cast(schema)]),
        },
        numbers={"stay": int(stays.sum()), "move": moved.num_rows},
    )


def _moves(store: Store, members: pa.Table, documents: pa.Table, moving: Moving | None) -> NDArray[np.bool_]:
    """(n,) which members move: of documents with a chunk in a chosen leaf, none of which has a text that cannot be embedded."""
    if moving is None:
        return np.zeros(members.num_rows, np.bool_)
    found = _with_their_documents(members, _is_chosen(members, moving.chosen))
    if found.any() and moving.stuck:
        found &= ~_with_their_documents(members, _has_stuck_text(store, members, documents, moving.stuck))
    return found


def _is_unchanged(
    store: Store, bucket: DocumentBucket, members: pa.Table, now: pa.Table
) -> NDArray[np.bool_]:
    """(n,) which members are rows of documents still, and the same, in documents that got no further chunk."""
    known = hash_keys(now["vector_id"])
    same = now.filter(pa.array(_is_as_before(store, bucket, now))) if bucket.before else now
    found = np.isin(hash_keys(members["vector_id"]), hash_keys(same["vector_id"]))
    if not bucket.before:
        return found
    added = now.filter(pa.array(~np.isin(known, hash_keys(same["vector_id"]))))
    return found & ~np.isin(_documents_of(members), _documents_of(added))


def _is_as_before(store: Store, bucket: DocumentBucket, now: pa.Table) -> NDArray[np.bool_]:
    then = pa.concat_tables([read_bucket(store, ref.path, bucket.number) for ref in bucket.before])
    return is_same(then.replace_schema_metadata(None), now.drop_columns(["text"]))


def _has_stuck_text(
    store: Store, members: pa.Table, documents: pa.Table, stuck: Sequence[FileRef]
) -> NDArray[np.bool_]:
    """(n,) which members have a text that cannot be embedded."""
    hashes = np.concatenate([hash_keys(read_columns(store, ref.path)["text_hash"]) for ref in stuck])
    known = hash_keys(documents["vector_id"])
    ids = hash_keys(members["vector_id"])
    at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return (known[at] == ids) & np.isin(hash_keys(documents["text_hash"])[at], hashes)


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
    tables = [read_bucket(store, ref.path, bucket) for ref in members]
    return pa.concat_tables([MEMBERS.empty_table(), *tables])


def _documents_of(rows: pa.Table) -> NDArray[np.bytes_]:
    """(n,) the document's bytes of each vector_id."""
    return sort_keys(hash_matrix(rows["vector_id"])[:, :DOC_HASH_BYTES])


def _with_their_documents(members: pa.Table, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(n,) those of the members, and all others of their documents."""
    documents = _documents_of(members)
    return np.isin(documents, np.unique(documents[which]))


def _is_chosen(members: pa.Table, chosen: Chosen) -> NDArray[np.bool_]:
    segment, leaf = (members[name].to_numpy() for name in ("segment", "leaf"))
    found = np.zeros(members.num_rows, np.bool_)
    for number in np.intersect1d(segment, list(chosen)).tolist():
        here = np.flatnonzero(segment == number)
        found[here] = np.isin(leaf[here], chosen[number])
    return found


def _rows_of(ids: NDArray[np.bytes_], documents: pa.Table) -> NDArray[np.int64]:
    """Rows of documents, which are sorted by vector_id, that have these ids; all of them are there."""
    return np.searchsorted(hash_keys(documents["vector_id"]), ids)
