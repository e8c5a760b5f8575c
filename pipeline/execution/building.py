"""The build stages of a run: binarizer and heads are trained, rows placed and cut into segments, the partition finished."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pipeline.artifacts import FileRef, IndexManifest, Plan, SearchDefaults, StageOutput
from pipeline.config import Config
from pipeline.execution.documents import DocumentFiles
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.learning import AskedPairs, BinarizerInForce, Parent, binarizer_in_force
from pipeline.execution.session import Session
from pipeline.execution.work import Task, digest
from pipeline.index.stage import (
    VectorSource,
    build_segment,
    cut_sample,
    finish_layout,
    finish_partition,
    grow_branches,
    place_bucket,
    train_index,
)
from pipeline.index.training import grown_rows, sample_rows
from pipeline.storage import Store
from pipeline.tables import read_columns

__all__ = ["build_index", "index_sizes"]


def build_index(
    session: Session,
    plan: Plan,
    encoder: EncoderInForce,
    documents: DocumentFiles,
    source: VectorSource,
    parent: Parent | None,
    asked: AskedPairs | None,
) -> tuple[tuple[FileRef, ...], IndexManifest]:
    """Train, place, build; the manifest has every list as its number of probes until the index is judged."""
    config = session.config
    binarizer = binarizer_in_force(session, documents, source, encoder, parent, asked)
    trained = _train(session, documents, source, encoder, binarizer)
    inputs = {
        "texts": digest(documents.texts),
        "encoder": encoder.fingerprint,
        "attributes": plan.attributes,
        "trained": trained.files,
    }
    shared = {"source": source, "trained_files": trained.files}
    places = _of_buckets("place", inputs, place_bucket, shared, source, source.cache.buckets)
    placed = tuple(output.files["placed"] for output in session.outputs("place", places))
    shape = digest({"placed": placed, "attributes": plan.attributes})
    parts = {"placed": placed, "attributes": plan.attributes}
    segments = [
        Task("build", {"of": shape, "segment": no}, partial(build_segment, segment_no=no), parts)
        for no in range(int(trained.numbers["segments"]))
    ]
    built = session.outputs("build", segments)
    with session.timed("build"):
        partition = finish_partition(
            session.store, built, trained.files, space=encoder.fingerprint, origin=binarizer.origin
        )
    manifest = IndexManifest(
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
        partitions=(partition,),
        search=SearchDefaults(probes=int(trained.numbers["lists"]), rerank=config.search.rerank),
        statistics=_list_statistics(session.store, partition.directory),
    )
    return placed, manifest


def _train(
    session: Session,
    documents: DocumentFiles,
    source: VectorSource,
    encoder: EncoderInForce,
    binarizer: BinarizerInForce,
) -> StageOutput:
    """Heads: the first level in one task, the second level by groups of branches; and the binarizer beside them."""
    config = session.config
    trunk = session.outputs("train", [_trunk_task(config, documents, source, encoder)])[0]
    branches = trunk.files["branches"]
    share = grown_rows(documents.vectors, config.layout) / documents.vectors
    inputs = {
        "texts": digest(documents.texts),
        "encoder": encoder.fingerprint,
        "branches": branches,
        "share": share,
    }
    shared: dict[str, Any] = {"source": source, "branches": branches, "share": share}
    sampled = min(source.cache.buckets, math.ceil(share * source.cache.buckets))
    cuts = _of_buckets("cut", inputs, cut_sample, shared, source, sampled)
    samples = tuple(output.files["sample"] for output in session.outputs("train", cuts))
    shared = {
        "samples": samples,
        "branches": branches,
        "max_rows": config.layout.max_train_rows,
        "seed": config.seed,
    }
    groups = [
        Task(
            "grow",
            {"of": digest(shared), "group": group},
            partial(grow_branches, group=group),
            shared,
        )
        for group in range(int(trunk.numbers["groups"]))
    ]
    grown = [output.files["heads"] for output in session.outputs("train", groups)]
    with session.timed("train"):
        return finish_layout(
            session.store,
            {**trunk.files, **binarizer.files},
            grown,
            num_vectors=documents.vectors,
            segment_rows=config.layout.segment_rows,
        )


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
    config: Config, documents: DocumentFiles, source: VectorSource, encoder: EncoderInForce
) -> Task:
    """The first level of the heads' tree, on the first sample."""
    arguments: dict[str, Any] = {
        "sample_rows": sample_rows(documents.vectors, config.layout),
        "seed": config.seed,
        "num_vectors": documents.vectors,
        "layout": config.layout,
    }
    inputs = {"texts": documents.texts, "encoder": encoder.fingerprint, "condemned": source.condemned}
    return Task("train", {**inputs, **arguments}, partial(train_index, source=source, **arguments))


def _list_statistics(store: Store, directory: FileRef) -> dict[str, float]:
    sizes = read_columns(store, directory.path, ["num_entries"])["num_entries"].to_numpy()
    return {
        "lists": float(len(sizes)),
        "list_rows_mean": float(sizes.mean()),
        "list_rows_max": float(sizes.max()),
        "list_rows_cv": float(sizes.std() / sizes.mean()),
    }


def index_sizes(manifest: IndexManifest) -> dict[str, Any]:
    """Bytes and list sizes, for the summary."""
    files = [ref for p in manifest.partitions for s in p.segments for ref in (s.lists,)]
    scanned = sum(ref.bytes for ref in files) + sum(
        p.heads.bytes + p.directory.bytes for p in manifest.partitions
    )
    vectors = sum(s.vectors.bytes for p in manifest.partitions for s in p.segments)
    documents = max(manifest.num_documents, 1)
    codes = manifest.partitions[0].codes
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
            4 * manifest.dims * sum(p.rows for p in manifest.partitions) / documents, 1
        ),
        "lists": int(manifest.statistics["lists"]),
        "list_rows_cv": round(manifest.statistics["list_rows_cv"], 3),
    }
