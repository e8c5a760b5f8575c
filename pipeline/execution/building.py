"""The build stages of a run: binarizer and heads are trained, rows placed and cut into segments, the partition finished."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import structlog

from pipeline.artifacts import (
    CodesInfo,
    FileRef,
    IndexManifest,
    Partition,
    Plan,
    SearchDefaults,
    StageOutput,
    arrow_schema,
)
from pipeline.config import SizedConfig
from pipeline.execution.documents import DocumentFiles
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.learning import BinarizerInForce
from pipeline.execution.session import BuildSession
from pipeline.execution.work import Task, digest
from pipeline.index.growing import (
    cut_partitions,
    cut_sample,
    grow_branches,
    members_of,
    read_tree,
    recentre,
    segments_of,
    snap_heads,
    sort_sample,
    train_index,
)
from pipeline.index.sizing import server_bytes
from pipeline.index.stage import (
    Built,
    SegmentPlaces,
    build_segment,
    codes_info,
    describe_partitions,
    finish_partition,
    graph_heads,
    place_bucket,
    settle_segment,
)
from pipeline.index.training import ROUNDS, Layout, grown_rows, sample_rows
from pipeline.index.vectors import VectorSource
from pipeline.partitioning import UNCUT, PartitionTree, Workload, limits_for, read_partition_tree
from pipeline.postings import EXACT_HEADS, MOST_MARGIN
from pipeline.storage import Store
from pipeline.tables import read_columns

__all__ = ["FittedTree", "build_index", "cut_rows", "index_sizes"]


class FittedTree(NamedTuple):
    """The tree of partitions."""

    tree: PartitionTree
    file: FileRef | None
    workload: FileRef | None
    """What it was fitted to."""


def build_index(
    session: BuildSession,
    plan: Plan,
    encoder: EncoderInForce,
    documents: DocumentFiles,
    source: VectorSource,
    binarizer: BinarizerInForce,
    cut: FittedTree,
) -> IndexManifest:
    """Train, place, settle, build; the manifest probes every list until the index is judged."""
    config = session.config
    trees, layout = _layout(session, documents, source, encoder, cut.tree)
    card = binarizer.files["binarizer"]
    inputs = {
        "texts": digest(documents.texts),
        "encoder": encoder.fingerprint,
        "attributes": plan.attributes,
        "layout": digest(
            {"trees": trees, "segments": layout.segments.tolist(), "partitions": layout.partition_tree.nodes}
            | {
                name: getattr(layout, name)
                for name in ("rows_per_list", "max_replicas", "real_heads", "seed")
            }
        ),
        "binarizer": card,
    }
    built = _segments(session, source, inputs, layout, card)
    with session.timed("build"):
        codes = codes_info(session.store, binarizer.files, binarizer.origin)
        partitions, table = _finished(session.store, built, layout, codes, plan, space=encoder.fingerprint)
    lists = sum(one.heads.rows for one in partitions)
    _warn_of_memory(lists, encoder.dims, allowed=config.serving.memory_mb)
    partitions = [_with_graph(session, one) for one in partitions]
    return IndexManifest(
        index="",
        corpus=config.corpus.identity,
        plan=plan.fingerprint,
        encoder=encoder.identity,
        encoder_settings=encoder.settings,
        dims=encoder.dims,
        attributes=plan.attributes,
        documents=documents.files,
        document_buckets=plan.document_buckets,
        num_documents=documents.documents,
        condemned=tuple(source.condemned.values()),
        partitions=tuple(partitions),
        cuts=tuple(map(layout.partition_tree.text, range(len(layout.partition_tree.cuts)))),
        partition_tree=cut.file,
        partition_table=table,
        workload=cut.workload,
        search=SearchDefaults(lists=lists, margin=MOST_MARGIN, rerank=0),
        statistics=_list_statistics(session.store, partitions, built, planned=len(layout.heads)),
    )


def cut_rows(
    session: BuildSession,
    plan: Plan,
    documents: DocumentFiles,
    source: VectorSource,
    workload: Workload | None,
) -> FittedTree:
    """The tree of partitions: cuts by the workload, if there is one."""
    config, schema = session.config, arrow_schema(plan.attributes)
    if workload is None or not documents.vectors:
        return FittedTree(UNCUT, None, None)
    limits = limits_for(workload, config.layout, rows=documents.vectors, storage=config.serving.storage)
    inputs = {"texts": documents.texts, "attributes": plan.attributes, "workload": workload.fingerprint}
    call = partial(cut_partitions, source=source, workload=workload, limits=limits)
    (grown,) = session.outputs("train", [Task("partitions", inputs | {"limits": asdict(limits)}, call)])
    tree = read_partition_tree(session.store, grown.files["tree"], schema)
    return FittedTree(tree, grown.files["tree"] if tree.cuts else None, grown.files["workload"])


def _finished(
    store: Store, built: Sequence[Built], layout: Layout, codes: CodesInfo, plan: Plan, *, space: str
) -> tuple[list[Partition], FileRef | None]:
    """Partitions that have rows, the first in any case, and what is known of their attributes, if they are several."""
    tree, partitions, settled = layout.partition_tree, [], []
    for number, (first, stop) in enumerate(pairwise(layout.first_segments.tolist())):
        own = built[first:stop]
        if number and not any(one.settled.numbers["rows"] for one in own):
            continue
        partitions.append(finish_partition(store, own, codes, space=space, tree=tree, partition_id=number))
        settled.append([one.settled for one in own])
    if not tree.cuts:
        return partitions, None
    return partitions, describe_partitions(store, partitions, settled, plan.attributes)


def _with_graph(session: BuildSession, partition: Partition) -> Partition:
    """The partition with a graph over its heads, if they are too many to measure all."""
    if partition.heads.rows <= EXACT_HEADS:
        return partition
    graph = Task("graph", {"heads": partition.heads}, partial(graph_heads, heads=partition.heads))
    (linked,) = session.outputs("build", [graph])
    return partition.model_copy(update={"head_graph": linked.files["graph"]})


def _warn_of_memory(lists: int, dims: int, *, allowed: int | None) -> None:
    """Beyond what the plan could see: texts of more chunks than their lengths promise, or many copies, make more lists."""
    need = _server_mb(lists, dims)
    if allowed is not None and need > allowed:
        structlog.get_logger().warning(
            "server_memory_exceeded",
            lists=lists,
            server_memory_mb=need,
            allowed_mb=allowed,
            hint="raise layout.rows_per_list or serving.memory_mb",
        )


def _server_mb(lists: int, dims: int) -> int:
    return math.ceil(server_bytes(lists, dims) / 2**20)


def _segments(
    session: BuildSession,
    source: VectorSource,
    inputs: Mapping[str, Any],
    layout: Layout,
    card: FileRef,
) -> list[Built]:
    """Rows to the segments of their lists, entries to those of the lists that they are in.

    Args:
        session: The run.
        source: Live documents and their vectors.
        inputs: What determines the placed rows.
        layout: Lists and segments.
        card: Of the binarizer.
    """
    shared: dict[str, Any] = {"source": source, "layout": layout, "binarizer_file": card}
    places = _of_buckets("place", inputs, place_bucket, shared, source, source.cache.buckets)
    placed = tuple(output.files["placed"] for output in session.outputs("place", places))
    numbers = range(int(layout.segments.max()) + 1)
    of = digest({"placed": placed, "attributes": source.attributes, "layout": inputs["layout"]})
    shared = {"placed": placed, "attributes": source.attributes, "layout": layout}
    settled = session.outputs(
        "build",
        [
            Task("settle", {"of": of, "segment": no}, partial(settle_segment, segment_no=no), shared)
            for no in numbers
        ],
    )
    entries = tuple(output.files["entries"] for output in settled)
    sizes = np.array([output.files["vectors"].rows for output in settled])
    shared = {
        "entries": entries,
        "places": SegmentPlaces.of(sizes, layout.first_segments),
        "binarizer_file": card,
        "rows_per_list": layout.rows_per_list,
    }
    of = digest(shared)
    tasks = [
        Task(
            "build",
            {"of": of, "lists": output.files["lists"], "segment": no},
            partial(build_segment, lists=output.files["lists"], segment_no=no),
            shared,
        )
        for no, output in zip(numbers, settled, strict=True)
    ]
    return [Built(*pair) for pair in zip(settled, session.outputs("build", tasks), strict=True)]


def _layout(
    session: BuildSession,
    documents: DocumentFiles,
    source: VectorSource,
    encoder: EncoderInForce,
    partition_tree: PartitionTree,
) -> tuple[tuple[FileRef, ...], Layout]:
    """The first level in one task, the second by groups of branches, then rounds over all heads.

    Returns:
        Files of branches and heads, which determine the tree, and the layout.
    """
    config = session.config
    task = _trunk_task(config, documents, source, encoder, partition_tree)
    trunk = session.outputs("train", [task])[0]
    branches = trunk.files["branches"]
    cut = _cut(session, documents, source, encoder, branches, partition_tree)
    grown = _grow(session, branches, cut, groups=int(trunk.numbers["groups"]))
    heads = tuple(output.files["heads"] for output in grown)
    samples = tuple(output.files["sample"] for output in grown)
    if len(heads) > 1:
        heads = _rounds(session, branches, samples, heads)
    if config.layout.heads == "vectors":
        snap = [
            Task("snap", {"sample": sample, "heads": ref}, partial(snap_heads, sample=sample, heads=ref))
            for sample, ref in zip(samples, heads, strict=True)
        ]
        heads = tuple(output.files["heads"] for output in session.outputs("train", snap))
    with session.timed("train"):
        tree = read_tree(session.store, branches, heads)
        return (branches, *heads), Layout(
            grown=tree,
            segments=segments_of(
                session.store,
                heads,
                tree.of_list,
                num_vectors=documents.vectors,
                segment_rows=config.layout.segment_rows,
            ),
            partition_tree=partition_tree,
            rows_per_list=config.layout.rows_per_list,
            max_replicas=config.layout.max_replicas,
            real_heads=config.layout.heads == "vectors",
            seed=config.seed,
        )


def _cut(
    session: BuildSession,
    documents: DocumentFiles,
    source: VectorSource,
    encoder: EncoderInForce,
    branches: FileRef,
    partition_tree: PartitionTree,
) -> tuple[FileRef, ...]:
    """The second sample, by group of branches."""
    share = grown_rows(documents.vectors, session.config.layout) / documents.vectors
    inputs = {
        "texts": digest(documents.texts),
        "encoder": encoder.fingerprint,
        "branches": branches,
        "partitions": partition_tree.nodes,
        "share": share,
    }
    shared: dict[str, Any] = {
        "source": source,
        "branches": branches,
        "partition_tree": partition_tree,
        "share": share,
    }
    sampled = min(source.cache.buckets, math.ceil(share * source.cache.buckets))
    cuts = _of_buckets("cut", inputs, cut_sample, shared, source, sampled)
    return tuple(output.files["sample"] for output in session.outputs("train", cuts))


def _grow(
    session: BuildSession, branches: FileRef, samples: tuple[FileRef, ...], *, groups: int
) -> list[StageOutput]:
    shared: dict[str, Any] = {
        "samples": samples,
        "branches": branches,
        "max_rows": session.config.layout.max_train_rows,
        "rounds": ROUNDS if groups == 1 else 0,
        "seed": session.config.seed,
    }
    of = digest(shared)
    tasks = [
        Task("grow", {"of": of, "group": group}, partial(grow_branches, group=group), shared)
        for group in range(groups)
    ]
    return session.outputs("train", tasks)


def _rounds(
    session: BuildSession,
    branches: FileRef,
    samples: tuple[FileRef, ...],
    heads: tuple[FileRef, ...],
) -> tuple[FileRef, ...]:
    """Rounds over all branches: what the lists hold, by group of the sample; new heads, by group of the lists."""
    of_list = np.repeat(np.arange(len(heads), dtype=np.int32), [ref.rows for ref in heads])
    mean_rows = sum(ref.rows for ref in samples) / len(of_list)
    for _ in range(ROUNDS):
        with session.timed("train"):
            grown = read_tree(session.store, branches, heads)
        of = digest({"branches": branches, "heads": heads})
        shared: dict[str, Any] = {"grown": grown, "group_of_list": of_list}
        sort = [
            Task("sort", {"of": of, "sample": sample}, partial(sort_sample, sample=sample), shared)
            for sample in samples
        ]
        sorted_ = session.outputs("train", sort)
        shared |= {"mean_rows": mean_rows}
        move = []
        for group in range(len(heads)):
            members = tuple(one.files["members"] for one in sorted_ if members_of(group) in one.numbers)
            inputs = {"of": of, "members": members, "group": group, "mean_rows": mean_rows}
            call = partial(recentre, group=group, members=members)
            move.append(Task("recentre", inputs, call, shared))
        heads = tuple(output.files["heads"] for output in session.outputs("train", move))
    return heads


def _of_buckets(
    stage: str,
    inputs: Mapping[str, Any],
    call: Callable[..., StageOutput],
    shared: Mapping[str, Any],
    source: VectorSource,
    buckets: int,
) -> list[Task]:
    """One task for each of the first buckets of vectors, keyed by the bucket's rows without a vector, too."""
    return [
        Task(
            stage,
            {**inputs, "bucket": b, "condemned": source.condemned.get(b)},
            partial(call, bucket=b),
            shared,
        )
        for b in range(buckets)
    ]


def _trunk_task(
    config: SizedConfig,
    documents: DocumentFiles,
    source: VectorSource,
    encoder: EncoderInForce,
    partition_tree: PartitionTree,
) -> Task:
    """The first level of the heads' tree, on the first sample."""
    arguments: dict[str, Any] = {
        "sample_rows": sample_rows(documents.vectors, config.layout),
        "seed": config.seed,
        "num_vectors": documents.vectors,
        "layout": config.layout,
    }
    inputs = {
        "texts": documents.texts,
        "encoder": encoder.fingerprint,
        "condemned": source.condemned,
        "partitions": partition_tree.nodes,
    }
    call = partial(train_index, source=source, partition_tree=partition_tree, **arguments)
    return Task("train", {**inputs, **arguments}, call)


def _list_statistics(
    store: Store, partitions: Sequence[Partition], built: Sequence[Built], *, planned: int
) -> dict[str, float]:
    """How even the lists are: with copies and, as `primaries`, without. `planned`: lists before any was split."""
    columns = ["num_entries", "num_primaries"]
    directory = pa.concat_tables([read_columns(store, one.directory.path, columns) for one in partitions])
    rows = sum(one.rows for one in partitions)
    found = {"lists": float(directory.num_rows)}
    for name, column in (("list_rows", "num_entries"), ("primaries", "num_primaries")):
        sizes = directory[column].to_numpy()
        found |= {
            f"{name}_mean": float(sizes.mean()),
            f"{name}_max": float(sizes.max()),
            f"{name}_cv": float(sizes.std() / sizes.mean()),
        }
    made = sum(int(one.settled.numbers["lists"]) for one in built)
    split = sum(int(one.settled.numbers["split"]) for one in built)
    return found | {
        "lists_split": float(split),
        "lists_without_vectors": float(planned - made + split),
        "replicas_per_vector": float(directory["num_entries"].to_numpy().sum() / rows),
        "replicas_dropped": float(sum(one.built.numbers["dropped"] for one in built)),
    }


def index_sizes(manifest: IndexManifest) -> dict[str, Any]:
    """Bytes and list sizes, for the summary."""
    files = [ref for p in manifest.partitions for s in p.segments for ref in (s.lists,)]
    scanned = sum(ref.bytes for ref in files) + sum(
        sum(ref.bytes for ref in p.navigation) for p in manifest.partitions
    )
    vectors = sum(s.vectors.bytes for p in manifest.partitions for s in p.segments)
    documents = max(manifest.num_documents, 1)
    # While the release migrates, what is new is built with the newer binarizer.
    native = [p for p in manifest.partitions if manifest.bridge_to(p.space) is None]
    codes = (native or manifest.partitions)[0].codes
    dims = max(manifest.dims_of(p) for p in manifest.partitions)
    refresh = codes.origin.refresh if codes.origin is not None else None
    return {
        "code_bytes": codes.code_bytes,
        "levels": list(codes.levels),
        "binarizer": {
            "folder": codes.binarizer,
            "method": codes.method,
            "held_out_recall": {name: round(share, 4) for name, share in codes.held_out_recall.items()},
            "judged_on": codes.judged_on,
            "given_pairs": codes.given_pairs,
            "refresh": refresh.model_dump(mode="json") if refresh is not None else None,
        },
        "index_bytes_per_document": round(scanned / documents, 1),
        "vectors_bytes_per_document": round(vectors / documents, 1),
        "float32_bytes_per_document": round(
            4 * sum(manifest.dims_of(p) * p.rows for p in manifest.partitions) / documents, 1
        ),
        "partitions": len(manifest.partitions),
        "lists": int(manifest.statistics["lists"]),
        "server_memory_mb": _server_mb(int(manifest.statistics["lists"]), dims),
        "list_rows_cv": round(manifest.statistics["list_rows_cv"], 3),
        "primaries_cv": round(manifest.statistics["primaries_cv"], 3),
        "replicas_per_vector": round(manifest.statistics["replicas_per_vector"], 4),
    }
