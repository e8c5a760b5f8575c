"""The heads on the root: train → cut (a bucket) → grow (some branches) → sort, recentre (some branches, in rounds) → layout.

`cut_sample` and `grow_branches` are the two halves of an out-of-core shuffle from buckets of texts to branches, `sort_sample`
and `recentre` those of one from the branches that a vector was sampled in to those whose list it is in now. No step holds
more than one bucket or one group of branches, and all heads.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import clustering, postings
from pipeline.artifacts import FileRef, StageOutput
from pipeline.clustering import HeadTree, Membership, Prices, recentred, repriced
from pipeline.config import SizedLayout
from pipeline.index.training import (
    GrownTree,
    after_round,
    real_heads,
    sort_into_lists,
    train_branch,
    train_trunk,
)
from pipeline.index.vectors import VectorSource, iterate_vectors, sample_by_partition
from pipeline.partitioning import (
    SAMPLE_ROWS,
    PartitionTree,
    TreeLimits,
    Workload,
    grow_tree,
    write_fitted,
    write_partition_tree,
)
from pipeline.schemas import heads_schema
from pipeline.storage import Store
from pipeline.tables import (
    RawFile,
    hash_keys,
    read_bucket,
    read_columns,
    to_matrix,
    vector_array,
    write_bucketed,
    write_table,
)

__all__ = [
    "cut_partitions",
    "cut_sample",
    "grow_branches",
    "members_of",
    "read_tree",
    "recentre",
    "segments_of",
    "snap_heads",
    "sort_sample",
    "train_index",
]


def cut_partitions(
    store: Store, source: VectorSource, *, workload: Workload, limits: TreeLimits
) -> StageOutput:
    """Grow the tree of partitions on the attributes of a sample.

    Returns:
        Files `tree` and `workload` (what of it was fitted to); numbers `partitions`, `sampled`.
    """
    columns = ["text_hash", "vector_id", *source.schema.names]
    sample = pa.concat_tables([read_bucket(store, ref.path, 0, columns) for ref in source.texts]).slice(0, 0)
    for bucket in range(source.cache.buckets):
        if sample.num_rows < SAMPLE_ROWS:
            rows = pa.concat_tables([read_bucket(store, ref.path, bucket, columns) for ref in source.texts])
            rows = rows.sort_by([("text_hash", "ascending"), ("vector_id", "ascending")])
            sample = pa.concat_tables([sample, rows.slice(0, SAMPLE_ROWS - sample.num_rows)])
    tree = grow_tree(sample, workload, limits)
    numbers = {"partitions": tree.num_partitions, "sampled": sample.num_rows}
    files = {"tree": write_partition_tree(store, tree), "workload": write_fitted(store, workload)}
    return StageOutput(files=files, numbers=numbers)


def train_index(
    store: Store,
    source: VectorSource,
    *,
    partition_tree: PartitionTree,
    num_vectors: int,
    sample_rows: int,
    layout: SizedLayout,
    seed: int,
) -> StageOutput:
    """Train the first level of the heads' tree on a sample.

    Returns:
        File `branches` (scratch: centroids, lists to make in each, groups, partitions); numbers `branches`, `groups`.
    """
    sample, partitions = sample_by_partition(store, source, sample_rows, partition_tree)
    trunk = train_trunk(
        sample,
        partitions,
        num_partitions=partition_tree.num_partitions,
        num_vectors=num_vectors,
        layout=layout,
        seed=seed,
    )
    schema = _numbered_heads(source.cache.dims, pa.int32(), "lists", "group", "partition")
    numbers = [pa.array(column) for column in (trunk.lists, trunk.groups, trunk.partitions)]
    table = pa.table([vector_array(trunk.branches), *numbers], schema=schema)
    return StageOutput(
        files={"branches": write_table(store, "scratch/branches", schema, [table])},
        numbers={"branches": len(trunk.branches), "groups": int(trunk.groups.max()) + 1},
    )


def _numbered_heads(dims: int, kind: pa.DataType, *names: str) -> pa.Schema:
    numbers = [pa.field(name, kind, nullable=False) for name in names]
    return pa.schema([heads_schema(dims).field("head"), *numbers])


def cut_sample(
    store: Store,
    source: VectorSource,
    bucket: int,
    branches: FileRef,
    partition_tree: PartitionTree,
    *,
    share: float,
) -> StageOutput:
    """Cut the sample rows of one bucket by the group of the nearest branch of their partition.

    Args:
        store: The root.
        source: Live documents and their vectors.
        bucket: Bucket of text hashes.
        branches: File of `train_index`.
        partition_tree: Tells rows their partition.
        share: In (0, 1].

    Returns:
        File `sample`: branch, embedding (float16 will do for k-means), in order of text hash, cut by group.
    """
    table = read_columns(store, branches.path)
    centroids, groups = to_matrix(table["head"]).astype(np.float32), table["group"].to_numpy()
    edges = np.searchsorted(table["partition"].to_numpy(), np.arange(partition_tree.num_partitions + 1))
    element = pa.field("element", pa.float16(), nullable=False)
    schema = pa.schema(
        [
            pa.field("branch", pa.int32(), nullable=False),
            pa.field("embedding", pa.list_(element, source.cache.dims), nullable=False),
        ]
    )
    pieces = [schema.empty_table()]
    for rows, vectors in iterate_vectors(store, source, bucket):
        count = int((_hash_shares(rows["text_hash"]) < share).sum())
        if not count:
            break  # rows come in the order of their hashes
        kept = vectors[:count]
        numbers = _nearest_branches(kept, partition_tree.assign(rows.slice(0, count)), centroids, edges)
        pieces.append(pa.table([pa.array(numbers), vector_array(kept.astype(np.float16))], schema=schema))
    sample = pa.concat_tables(pieces)
    ref = write_bucketed(store, "scratch/samples", sample, groups[sample["branch"].to_numpy()])
    return StageOutput(files={"sample": ref}, numbers={"rows": ref.rows})


def _nearest_branches(
    vectors: NDArray[np.float32],
    partitions: NDArray[np.int32],
    centroids: NDArray[np.float32],
    edges: NDArray[np.int64],
) -> NDArray[np.int32]:
    """(n,) the branch of each vector, of those of its partition: `edges[p]` is the first of partition p."""
    found = np.empty(len(vectors), np.int32)
    for number in np.unique(partitions):
        own, first = partitions == number, int(edges[number])
        found[own] = clustering.assign(vectors[own], centroids[first : edges[number + 1]])[0] + first
    return found


def _hash_shares(hashes: pa.ChunkedArray) -> NDArray[np.float64]:
    """(n,) where each hash stands among all possible ones, in [0, 1)."""
    prefix = np.ascontiguousarray(hash_keys(hashes)).view(">u4").reshape(-1, 4)[:, 0]
    shares: NDArray[np.float64] = prefix / 2.0**32
    return shares


def grow_branches(
    store: Store,
    samples: Sequence[FileRef],
    group: int,
    branches: FileRef,
    *,
    max_rows: int,
    rounds: int,
    seed: int,
) -> StageOutput:
    """Train the heads of one group of branches.

    Args:
        store: The root.
        samples: Files of `cut_sample`, in the order of the buckets.
        group: The group.
        branches: File of `train_index`.
        max_rows: Most rows that one branch is trained on: those with the lowest hashes, a uniform sample of it.
        rounds: To do at once, where this group is the only one.
        seed: Of every random choice; each branch draws from its own.

    Returns:
        Files `heads`: rows of `heads_of_round` in storage order, and `sample`: that of the group, in one file for the rounds;
        numbers `lists`, and `sampled`: rows of the group.
    """
    table = read_columns(store, branches.path)
    centroids, groups = to_matrix(table["head"]).astype(np.float32), table["group"].to_numpy()
    wanted = table["lists"].to_numpy()
    sample = pa.concat_tables([read_bucket(store, ref.path, group) for ref in samples])
    of_row, vectors = sample["branch"].to_numpy(), _vectors_of(sample)
    own = np.flatnonzero(groups == group)
    grown = []
    for branch in own:
        drawn = np.random.SeedSequence([seed, int(branch)]).generate_state(1)[0] >> 1
        rows = vectors[np.flatnonzero(of_row == branch)[:max_rows]].astype(np.float32)
        grown.append(train_branch(rows, centroids[branch], num_lists=int(wanted[branch]), seed=int(drawn)))
    starts = np.concatenate([[0], np.cumsum([len(heads) for heads in grown])])
    heads = np.concatenate(grown)
    partitions = table["partition"].to_numpy()
    tree = GrownTree(HeadTree.of(heads, centroids[own], starts), Prices.none(len(heads)), partitions[own])
    held = np.zeros(len(heads), np.int64)
    if rounds:
        tree, held = _rounds(tree, vectors.astype(np.float32), partitions[of_row], rounds)
    numbers = np.repeat(own, np.diff(starts))
    files = {
        "heads": _write_heads(store, tree.tree.heads, tree.prices, numbers, held),
        "sample": write_table(store, "scratch/samples", sample.schema, [sample]),
    }
    return StageOutput(files=files, numbers={"lists": len(heads), "sampled": len(vectors)})


def _rounds(
    grown: GrownTree, vectors: NDArray[np.float32], partitions: NDArray[np.integer], rounds: int
) -> tuple[GrownTree, NDArray[np.int64]]:
    mean_rows = max(len(vectors), 1) / len(grown.tree.heads)
    held = np.zeros(len(grown.tree.heads), np.int64)
    for _ in range(rounds):
        members = sort_into_lists(vectors, partitions, grown)
        held = members.over(0, len(held)).rows
        grown = after_round(grown, members, mean_rows=mean_rows)
    return grown, held


def _write_heads(
    store: Store,
    heads: NDArray[np.float32],
    prices: Prices,
    branch: NDArray[np.integer],
    held: NDArray[np.integer],
) -> FileRef:
    schema = heads_of_round(heads.shape[1])
    columns = [
        vector_array(heads),
        pa.array(branch, pa.int32()),
        pa.array(prices.now),
        pa.array(prices.base),
        pa.array(held, pa.int32()),
    ]
    return write_table(store, "scratch/heads", schema, [pa.table(columns, schema=schema)])


def heads_of_round(dims: int) -> pa.Schema:
    """Heads between rounds: their branch, price and its lasting part, and sample rows that their lists held."""
    numbers = {"branch": pa.int32(), "price": pa.float32(), "base": pa.float32(), "sample_rows": pa.int32()}
    fields = [pa.field(name, kind, nullable=False) for name, kind in numbers.items()]
    return pa.schema([heads_schema(dims).field("head"), *fields])


def _vectors_of(sample: pa.Table) -> NDArray[np.float16]:
    return to_matrix(sample["embedding"]).astype(np.float16, copy=False)


def read_tree(store: Store, branches: FileRef, heads: Sequence[FileRef]) -> GrownTree:
    """Branches, and the heads of all groups with their prices.

    Args:
        store: The root.
        branches: File of `train_index`.
        heads: Files of `grow_branches` or `recentre`, in the order of the groups.
    """
    # Byte ranges instead of decoding: a decoded column of a million heads takes five times their size for a moment.
    vectors = np.concatenate([RawFile(store, ref, ["head"]).read_all("head") for ref in heads])
    table = pa.concat_tables([read_columns(store, ref.path, ["branch", "price", "base"]) for ref in heads])
    trunk = read_columns(store, branches.path, ["head", "partition"])
    centroids = to_matrix(trunk["head"]).astype(np.float32)
    starts = np.searchsorted(table["branch"].to_numpy(), np.arange(len(centroids) + 1))
    prices = Prices(table["price"].to_numpy(), table["base"].to_numpy())
    tree = HeadTree.of(vectors.view(np.float32), centroids, starts)
    return GrownTree(tree, prices, trunk["partition"].to_numpy())


def sort_sample(
    store: Store,
    sample: FileRef,
    grown: GrownTree,
    group_of_list: NDArray[np.int32],
) -> StageOutput:
    """What the lists hold of the sample rows of one group of branches.

    Args:
        store: The root.
        sample: File of `grow_branches`.
        grown: All heads.
        group_of_list: (num_lists,) the group whose task moves each list's head.

    Returns:
        File `members`: list_no, rows, gap, total, of lists that hold any, cut by group; numbers `lists_of_GROUP`, of each
        group that has any of them.
    """
    table = read_columns(store, sample.path)
    partitions = grown.partitions[table["branch"].to_numpy()]
    members = sort_into_lists(_vectors_of(table).astype(np.float32), partitions, grown)
    columns = [
        pa.array(members.lists, pa.int32()),
        pa.array(members.rows, pa.int32()),
        pa.array(members.gap),
        vector_array(members.total),
    ]
    schema = pa.schema(
        [
            pa.field(name, column.type, nullable=False)
            for name, column in zip(("list_no", "rows", "gap", "total"), columns, strict=True)
        ]
    )
    table = pa.table(columns, schema=schema)
    groups = group_of_list[members.lists]
    ref = write_bucketed(store, "scratch/members", table, groups)
    numbers, counts = np.unique(groups, return_counts=True)
    held = {members_of(group): count for group, count in zip(numbers.tolist(), counts.tolist(), strict=True)}
    return StageOutput(files={"members": ref}, numbers=held)


def members_of(group: int) -> str:
    """Name of the number of `sort_sample` that tells whether its file holds any list of a group."""
    return f"lists_of_{group}"


def recentre(
    store: Store,
    members: Sequence[FileRef],
    group: int,
    grown: GrownTree,
    group_of_list: NDArray[np.int32],
    *,
    mean_rows: float,
) -> StageOutput:
    """Heads and prices of one group's lists after a round.

    Args:
        store: The root.
        members: Files of `sort_sample` that hold lists of the group, in the order of the groups.
        group: The group.
        grown: All heads before the round.
        group_of_list: (num_lists,) the group of each list, rising.
        mean_rows: Sample rows that a list should hold.

    Returns:
        File `heads`: rows of `heads_of_round` in storage order; number `lists`.
    """
    first, stop = (int(edge) for edge in np.searchsorted(group_of_list, [group, group + 1]))
    dims = grown.tree.heads.shape[1]
    held = Membership(
        np.arange(first, stop),
        np.zeros(stop - first, np.int64),
        np.zeros((stop - first, dims)),
        np.zeros(stop - first),
    )
    for ref in members:
        held = held.plus(_members_of(read_bucket(store, ref.path, group)).over(first, stop))
    before = Prices(grown.prices.now[first:stop], grown.prices.base[first:stop])
    heads = recentred(grown.tree.heads[first:stop], held)
    branch = np.searchsorted(grown.tree.starts, np.arange(first, stop), side="right") - 1
    ref = _write_heads(store, heads, repriced(before, held, mean_rows=mean_rows), branch, held.rows)
    return StageOutput(files={"heads": ref}, numbers={"lists": ref.rows})


def _members_of(table: pa.Table) -> Membership:
    """What a file of `sort_sample` says."""
    return Membership(
        table["list_no"].to_numpy().astype(np.int64),
        table["rows"].to_numpy().astype(np.int64),
        to_matrix(table["total"]).astype(np.float64),
        table["gap"].to_numpy(),
    )


def snap_heads(store: Store, sample: FileRef, heads: FileRef) -> StageOutput:
    """Put a vector of the sample in the place of each head of one group: the nearest one.

    Returns:
        File `heads`, as it was otherwise.
    """
    table = read_columns(store, heads.path)
    vectors = _vectors_of(read_columns(store, sample.path)).astype(np.float32)
    real = real_heads(vectors, to_matrix(table["head"]).astype(np.float32))
    table = table.set_column(0, table.schema.field("head"), vector_array(real))
    ref = write_table(store, "scratch/heads", table.schema, [table])
    return StageOutput(files={"heads": ref}, numbers={"lists": ref.rows})


def segments_of(
    store: Store,
    heads: Sequence[FileRef],
    partitions: NDArray[np.integer],
    *,
    num_vectors: int,
    segment_rows: int,
) -> NDArray[np.int32]:
    """Cut the lists of each partition into segments.

    Args:
        store: The root.
        heads: Files of the last round, in the order of the groups.
        partitions: (num_lists,) of each list, rising from 0 without gaps.
        num_vectors: Vectors of the corpus.
        segment_rows: Rows of a segment, about.

    Returns:
        (num_lists,) segment of each list, not falling, from 0 without gaps.
    """
    sizes = np.concatenate([read_columns(store, ref.path, ["sample_rows"])["sample_rows"] for ref in heads])
    expected = sizes * (num_vectors / max(int(sizes.sum()), 1))
    found, first = [], 0
    for own in np.split(expected, np.flatnonzero(np.diff(partitions)) + 1):
        found.append(postings.segments_of_lists(own, segment_rows) + np.int32(first))
        first = int(found[-1][-1]) + 1
    return np.concatenate(found)
