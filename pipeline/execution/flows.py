"""`run`, from a corpus to a published release: the order of the stages and what each hands to the next.

Every stage is a list of tasks for a runner; what is done is skipped by receipt. The run holds the lease of the root from
before it writes its plan until it has published. The alias entry that it may follow is read as soon as it has the lease, so
that it sees what the run before it published, and never undoes what is published while it works.
"""

import hashlib
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa
import structlog

from pipeline.artifacts import (
    AliasEntry,
    FileRef,
    IndexManifest,
    Plan,
    ReleaseRecord,
    SearchDefaults,
    StageOutput,
    arrow_schema,
)
from pipeline.config import Config
from pipeline.corpus import (
    check_error_budget,
    count_changes,
    count_reasons,
    merge_documents,
    plan_corpus,
    read_shard,
)
from pipeline.embedding.stage import Cache, bucket_count, open_cache, read_redrives
from pipeline.errors import ConfigError, DataError, QualityGateError
from pipeline.evaluation.judging import check_gates
from pipeline.execution.encoders import GIVEN, EncoderInForce, encoder_in_force
from pipeline.execution.encoding import DocumentFiles, Embedded, embed
from pipeline.execution.estimates import Estimate, check_fits, estimate
from pipeline.execution.judgement import judge
from pipeline.execution.ledger import Ledger
from pipeline.execution.memory import PeakMemory
from pipeline.execution.metrics import Metrics
from pipeline.execution.session import Session
from pipeline.execution.work import StoreSpec, Task, digest, versions
from pipeline.filters import parse_filter
from pipeline.index.condemned import drop_condemned
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
from pipeline.release import (
    claim_root,
    files_are_there,
    hold_root,
    is_held,
    mark_plan_done,
    publish,
    read_alias,
    read_manifest,
    read_release,
    record_rejection,
    was_withdrawn,
    write_plan,
)
from pipeline.schemas import condemned_schema
from pipeline.storage import Store, canonical_json, open_store, split_uri
from pipeline.tables import read_columns

__all__ = ["run"]


def run(
    config: Config,
    spec: StoreSpec,
    runner_of: Callable[[], Any],
    ledger: Ledger | None = None,
    *,
    begin: Callable[[Store, EncoderInForce], None] | None = None,
) -> dict[str, Any]:
    """Take the corpus to a published release, or find that nothing changed.

    Args:
        config: The run.
        spec: The root.
        runner_of: Gives a context manager of a Runner; asked only if there is work.
        ledger: Filled as the run goes on, for whoever records how it ended.
        begin: Called once the root is held and the encoder known, before anything is judged to be done already.

    Returns:
        The summary that the job prints.

    Raises:
        QualityGateError: The index is whole but below the gates.
        PublishConflictError: Another run published meanwhile.
        RootBusyError: Another job holds the root.
        LeaseLostError: Another job took the root over, because this one gave no sign of life.
        DataError: The corpus breaks its contract.
    """
    start = time.perf_counter()
    ledger = ledger if ledger is not None else Ledger()
    store = spec.open()
    before = read_alias(store)
    prepared = _prepare(config, store, ledger)
    if begin is None and (same := _unchanged_while_held(store, prepared)) is not None:
        return _unchanged(same, time.perf_counter() - start)
    with hold_root(store, "run", config.lease) as lease:
        started_at = read_alias(store)
        if begin is not None:
            begin(store, prepared.encoder)
        if lease.waited or started_at != before or begin is not None:
            # Another job was first, and what it published may be of a newer corpus than was found before; or `begin` changed
            # what there is to do.
            prepared = _prepare(config, store, ledger)
        if (same := _unchanged_release(store, started_at, prepared)) is not None:
            # A run that died between its alias entry and this line left its plan open.
            mark_plan_done(store, prepared.plan)
            return _unchanged(same, time.perf_counter() - start)
        current = read_release(store, started_at.release) if started_at is not None else None
        write_plan(store, prepared.plan)
        planned = time.perf_counter()
        with runner_of() as runner, PeakMemory() as memory:
            ledger.metrics = runner.metrics(config.corpus.identity)
            session = Session(config, spec, store, runner, lease, prepared.cost, memory, ledger)
            session.seconds.update(
                plan=round(planned - start, 3), start=round(time.perf_counter() - planned, 3)
            )
            with _announced(ledger.metrics):
                summary = _build_and_publish(session, prepared, started_at, current)
        mark_plan_done(store, prepared.plan)
    return summary


@dataclass(frozen=True)
class _Prepared:
    """What is known before any work."""

    plan: Plan
    encoder: EncoderInForce
    cost: Estimate
    inputs: str


def _prepare(config: Config, store: Store, ledger: Ledger) -> _Prepared:
    plan = plan_corpus(config.corpus, config.storage)
    claim_root(store, config.corpus)
    encoder = encoder_in_force(store, config, plan)
    _check_examples(config, plan, encoder)
    buckets = bucket_count(store, encoder.fingerprint, plan.rows)
    cpus = config.ray.num_cpus or os.cpu_count() or 1
    cost = estimate(plan, config, dims=encoder.dims, text_buckets=buckets, cpus=cpus)
    ledger.facts |= {"plan": plan.fingerprint, "estimate": cost.as_dict()}
    structlog.get_logger().info(
        "planned", plan=plan.fingerprint, rows=plan.rows, shards=len(plan.shards), encoder=encoder.label
    )
    check_fits(cost, config)
    redrives = read_redrives(store, encoder.fingerprint)
    return _Prepared(plan, encoder, cost, _inputs_key(config, plan, encoder, redrives=len(redrives)))


def _unchanged_release(store: Store, alias: AliasEntry | None, prepared: _Prepared) -> ReleaseRecord | None:
    """The release that the alias names, if it is whole and was made of the same; None if there is work to do."""
    if alias is None:
        return None
    current = read_release(store, alias.release)
    same = current.summary.get("inputs") == prepared.inputs
    return current if same and files_are_there(store, current) else None


def _unchanged_while_held(store: Store, prepared: _Prepared) -> ReleaseRecord | None:
    """The same where another job holds the root; None where nobody does.

    True at this moment, and nothing is written: as if this run had come before the one that holds the root.
    """
    return _unchanged_release(store, read_alias(store), prepared) if is_held(store) else None


@contextmanager
def _announced(metrics: Metrics) -> Iterator[None]:
    """Say that a run is under way, for as long as it is."""
    metrics.record("strata_run_started_timestamp_seconds", time.time())
    metrics.record("strata_run_state", 1)
    try:
        yield
    finally:
        metrics.record("strata_run_state", 0)


def _check_examples(config: Config, plan: Plan, encoder: EncoderInForce) -> None:
    """Refuse example searches that could not be shown, before the work instead of after it."""
    if config.evaluation.examples and encoder.spec is None:
        raise ConfigError(
            "evaluation.examples", "are texts, and no encoder is configured", "configure one, or remove them"
        )
    for example in config.evaluation.examples:
        if example.filter is not None:
            parse_filter(example.filter, arrow_schema(plan.attributes))


def _unchanged(current: ReleaseRecord, seconds: float) -> dict[str, Any]:
    structlog.get_logger().info("nothing_changed", release=current.release)
    zero = {"added": 0, "changed": 0, "removed": 0, "encoded": 0}
    return {
        **current.summary,
        **zero,
        "release": current.release,
        "skipped": True,
        "seconds": {"total": round(seconds, 3)},
    }


def _inputs_key(config: Config, plan: Plan, encoder: EncoderInForce, *, redrives: int) -> str:
    """Fingerprint of everything that determines the release.

    Which texts are condemned is found by the work itself; it changes with the plan, the encoder and the redrives alone.
    """
    judged = [config.evaluation.queries, config.evaluation.qrels]
    contents = [_content_hash(uri, config) for uri in judged if uri is not None]
    settings = config.model_dump(
        mode="json", include={"corpus", "binarizer", "layout", "search", "evaluation", "gates", "seed"}
    )
    # Where the corpus lies does not matter, what it holds does: that is the plan's fingerprint.
    settings["corpus"].pop("uri")
    settings["evaluation"].pop("examples")
    value = {
        "plan": plan.fingerprint,
        "encoder": [encoder.fingerprint, encoder.query_fingerprint],
        "redrives": redrives,
        "settings": settings,
        "judged": contents,
        "versions": versions(),
    }
    return hashlib.sha256(canonical_json(value)).hexdigest()[:40]


def _provenance(config: Config) -> dict[str, Any]:
    """What a release says of how it was made."""
    return {"configuration": config.model_dump(mode="json"), "versions": versions()}


def _content_hash(uri: str, config: Config) -> str:
    folder, name = split_uri(uri)
    return hashlib.sha256(open_store(folder, config.storage).read(name)).hexdigest()


# ------------------------------------------------------------------------------------------------ stages


def _build_and_publish(
    session: Session, prepared: _Prepared, started_at: AliasEntry | None, current: ReleaseRecord | None
) -> dict[str, Any]:
    plan, encoder = prepared.plan, prepared.encoder
    cache = open_cache(session.store, encoder.fingerprint, dims=encoder.dims, rows=plan.rows)
    documents = _read_documents(session, plan, encoder, cache)
    embedded = embed(session, plan, documents, encoder, cache)
    documents = _without_condemned(session.config, plan, documents, embedded)
    source = VectorSource(documents.texts, cache, plan.attributes, embedded.condemned)
    placed, manifest = _build(session, plan, encoder, documents, source)
    manifest, measured = judge(session, encoder, manifest, source, placed)
    summary: dict[str, Any] = {
        "index": manifest.index,
        "documents": documents.documents,
        "vectors": documents.vectors,
        **_changes(session, manifest, current),
        "encoded": embedded.encoded,
        "dead_letters": documents.num_dead_letters,
        "dead_letters_by_reason": count_reasons(session.store, documents.dead_letters),
        "dead_letter_files": [ref.path for ref in documents.dead_letters],
        "redrives": cache.generation,
        "encoder": encoder.label,
        **_sizes(manifest),
        **measured,
        "plan": plan.fingerprint,
        "inputs": prepared.inputs,
        "estimate": prepared.cost.as_dict(),
        **_provenance(session.config),
        "skipped": False,
    }
    return _publish(session, manifest, summary, started_at, current)


def _without_condemned(
    config: Config, plan: Plan, documents: DocumentFiles, embedded: Embedded
) -> DocumentFiles:
    """The documents that a search can return, with the dead letters of the others."""
    left = replace(
        documents,
        dead_letters=documents.dead_letters + embedded.dead_letters,
        documents=documents.documents - embedded.documents,
        vectors=documents.vectors - embedded.rows,
    )
    _check_any_is_left(config, plan, left)
    return left


def _check_any_is_left(config: Config, plan: Plan, documents: DocumentFiles) -> None:
    if documents.documents == 0:
        problem = f"no document is left of {plan.rows} rows: all were set aside"
        raise DataError(config.corpus.uri, problem, "see the reasons in the dead-letter table")


def _read_documents(session: Session, plan: Plan, encoder: EncoderInForce, cache: Cache) -> DocumentFiles:
    with session.timed("read"):
        shards = _within_budget(session, _read_tasks(session.config, plan, encoder), plan)
    rows = tuple(output.files["rows"] for output in shards)
    merged = session.outputs("merge", _merge_tasks(session.config, plan, rows, cache))
    letters = [
        output.files["dead_letters"] for output in [*shards, *merged] if "dead_letters" in output.files
    ]
    _check_budget(session, plan, letters)
    documents = DocumentFiles(
        files=tuple(output.files["documents"] for output in merged),
        texts=tuple(output.files["texts"] for output in merged),
        places=tuple(output.files["places"] for output in merged),
        dead_letters=tuple(letters),
        documents=_total(merged, "documents"),
        vectors=_total(merged, "vectors"),
    )
    _check_any_is_left(session.config, plan, documents)
    return documents


def _shape(config: Config, plan: Plan) -> dict[str, Any]:
    """What of the configuration shapes documents; where the corpus lies and how many rows may be bad do not."""
    corpus = config.corpus.model_dump(mode="json", exclude={"uri", "name", "error_budget"})
    return {
        "corpus": corpus,
        "attributes": plan.attributes,
        "dims": plan.embedding_dims,
        "buckets": plan.document_buckets,
    }


def _read_tasks(config: Config, plan: Plan, encoder: EncoderInForce) -> list[Task]:
    shared = {
        "plan": plan,
        "corpus": config.corpus,
        "storage": config.storage,
        "tokenizer_json": encoder.tokenizer_json,
    }
    inputs = {"tokenizer": encoder.tokenizer_hash, **_shape(config, plan)}
    return [
        Task(
            "read",
            {**inputs, "file": plan.files[shard.file_no], "shard": shard},
            partial(read_shard, shard=shard),
            shared,
        )
        for shard in plan.shards
    ]


def _merge_tasks(config: Config, plan: Plan, rows: tuple[FileRef, ...], cache: Cache) -> list[Task]:
    shared = {"shard_rows_files": rows, "plan": plan, "text_buckets": cache.buckets}
    names = [file.path for file in plan.files]
    content = {"rows": rows, "text_buckets": cache.buckets, "files": names, **_shape(config, plan)}
    # Receipts from before a bucket's places were written do not stand for it.
    inputs = digest({**content, "places": True})
    return [
        Task("merge", {"of": inputs, "bucket": bucket}, partial(merge_documents, bucket=bucket), shared)
        for bucket in range(plan.document_buckets)
    ]


def _within_budget(session: Session, tasks: Sequence[Task], plan: Plan) -> list[StageOutput]:
    """Read shards until done, or until more rows are bad than the budget allows for the whole corpus."""
    found: dict[int, StageOutput] = {}
    letters: list[FileRef] = []
    for place, done in session.perform("read", tasks):
        found[place] = done.output
        if "dead_letters" in done.output.files:
            letters.append(done.output.files["dead_letters"])
            _check_budget(session, plan, letters)
    return [found[place] for place in range(len(tasks))]


def _check_budget(session: Session, plan: Plan, letters: Sequence[FileRef]) -> None:
    bad = sum(ref.rows for ref in letters)
    check_error_budget(
        session.store, session.config.corpus, rows=plan.rows, bad_rows=bad, dead_letters=letters
    )


def _build(
    session: Session, plan: Plan, encoder: EncoderInForce, documents: DocumentFiles, source: VectorSource
) -> tuple[tuple[FileRef, ...], IndexManifest]:
    """Train, place, build; the manifest has every list as its number of probes until the index is judged."""
    config = session.config
    trained = _train(session, documents, source, encoder)
    inputs = {
        "texts": digest(documents.texts),
        "encoder": encoder.fingerprint,
        "attributes": plan.attributes,
        "trained": trained.files,
    }
    shared = {"source": source, "trained_files": trained.files}
    places = [
        Task(
            "place",
            {**inputs, "bucket": b, "condemned": source.condemned.get(b)},
            partial(place_bucket, bucket=b),
            shared,
        )
        for b in range(source.cache.buckets)
    ]
    placed = tuple(output.files["placed"] for output in session.outputs("place", places))
    shape = digest({"placed": placed, "attributes": plan.attributes})
    parts = {"placed": placed, "attributes": plan.attributes}
    segments = [
        Task("build", {"of": shape, "segment": no}, partial(build_segment, segment_no=no), parts)
        for no in range(int(trained.numbers["segments"]))
    ]
    built = session.outputs("build", segments)
    with session.timed("build"):
        partition = finish_partition(session.store, built, trained.files, space=encoder.fingerprint)
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
    session: Session, documents: DocumentFiles, source: VectorSource, encoder: EncoderInForce
) -> StageOutput:
    """Binarizer and heads: the first level in one task, the second level by groups of branches."""
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
    cuts = [
        Task(
            "cut",
            {**inputs, "bucket": b, "condemned": source.condemned.get(b)},
            partial(cut_sample, bucket=b),
            shared,
        )
        for b in range(min(source.cache.buckets, math.ceil(share * source.cache.buckets)))
    ]
    samples = tuple(output.files["sample"] for output in session.outputs("train", cuts))
    shared = {"samples": samples, "branches": branches, "seed": config.seed}
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
            trunk.files,
            grown,
            num_vectors=documents.vectors,
            segment_rows=config.layout.segment_rows,
        )


def _trunk_task(
    config: Config, documents: DocumentFiles, source: VectorSource, encoder: EncoderInForce
) -> Task:
    settings: dict[str, Any] = {
        "num_vectors": documents.vectors,
        "sample_rows": sample_rows(documents.vectors, config.layout),
        "layout": config.layout,
        "binarizer": config.binarizer,
        "seed": config.seed,
    }
    inputs = {
        "texts": documents.texts,
        "encoder": encoder.fingerprint,
        "condemned": source.condemned,
        **settings,
    }
    return Task("train", inputs, partial(train_index, source=source, **settings))


def _list_statistics(store: Store, directory: FileRef) -> dict[str, float]:
    sizes = read_columns(store, directory.path, ["num_entries"])["num_entries"].to_numpy()
    return {
        "lists": float(len(sizes)),
        "list_rows_mean": float(sizes.mean()),
        "list_rows_max": float(sizes.max()),
        "list_rows_cv": float(sizes.std() / sizes.mean()),
    }


# ------------------------------------------------------------------------------------------------ publishing


def _changes(session: Session, manifest: IndexManifest, current: ReleaseRecord | None) -> dict[str, int]:
    """Documents added, changed and removed since the current release."""
    if current is None:
        return {"added": manifest.num_documents, "changed": 0, "removed": 0}
    before = read_manifest(session.store, current)
    with session.timed("compare"):
        changes = count_changes(_compared(session.store, before), _compared(session.store, manifest))
    return {"added": changes.added, "changed": changes.changed, "removed": changes.removed}


def _compared(store: Store, manifest: IndexManifest) -> Iterator[Any]:
    """What makes a document another one, bucket by bucket; its text counts by its hash, unless the vector was ready-made."""
    columns = ["vector_id", "doc_id", "chunk_no", "text_hash", *(a.name for a in manifest.attributes)]
    columns += ["text"] if manifest.encoder["model"] == GIVEN else []
    condemned = [read_columns(store, ref.path) for ref in manifest.condemned]
    gone = pa.concat_tables([condemned_schema().empty_table(), *condemned])
    return (drop_condemned(read_columns(store, ref.path, columns), gone) for ref in manifest.documents)


def _sizes(manifest: IndexManifest) -> dict[str, Any]:
    files = [ref for p in manifest.partitions for s in p.segments for ref in (s.lists,)]
    scanned = sum(ref.bytes for ref in files) + sum(
        p.heads.bytes + p.directory.bytes for p in manifest.partitions
    )
    vectors = sum(s.vectors.bytes for p in manifest.partitions for s in p.segments)
    documents = max(manifest.num_documents, 1)
    return {
        "code_bytes": manifest.partitions[0].codes.code_bytes,
        "levels": list(manifest.partitions[0].codes.levels),
        "index_bytes_per_document": round(scanned / documents, 1),
        "vectors_bytes_per_document": round(vectors / documents, 1),
        "float32_bytes_per_document": round(
            4 * manifest.dims * sum(p.rows for p in manifest.partitions) / documents, 1
        ),
        "lists": int(manifest.statistics["lists"]),
        "list_rows_cv": round(manifest.statistics["list_rows_cv"], 3),
    }


def _publish(
    session: Session,
    manifest: IndexManifest,
    summary: dict[str, Any],
    started_at: AliasEntry | None,
    current: ReleaseRecord | None,
) -> dict[str, Any]:
    data = canonical_json(manifest.model_dump(mode="json"))
    path = f"indexes/{manifest.index}/manifest.json"
    session.store.write(path, data)
    ref = FileRef(path=path, rows=0, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    before = int(str(current.summary.get("documents", 0))) if current is not None else 0
    session.ledger.facts["judged"] = summary
    for name in ("recall_at_10", "ndcg_at_10"):
        if name in summary:
            session.ledger.metrics.record(f"strata_{name}", summary[name])
    gates = check_gates(session.config.gates, summary, removed=summary["removed"], documents_before=before)
    session.seconds["total"] = round(sum(session.seconds.values()), 3)
    summary |= session.measured() | {"gates": [asdict(gate) for gate in gates]}
    if not all(gate.passed for gate in gates):
        record_rejection(session.store, manifest.index, summary)
        problem = "not published: " + "; ".join(gate.problem for gate in gates if not gate.passed)
        raise QualityGateError(
            f"index {manifest.index}", problem, "the current release stays; change the index or the gates"
        )
    if was_withdrawn(session.store, manifest.index):
        structlog.get_logger().warning("rolled_back_index_not_published_again", index=manifest.index)
        return {**summary, "release": started_at.release if started_at is not None else 0, "published": False}
    session.lease.check()
    record = publish(
        session.store,
        manifest,
        ref,
        summary,
        started_at=started_at,
        now=datetime.now(UTC),
        token=uuid.uuid4().hex,
    )
    session.ledger.metrics.record("strata_release", record.release)
    return {**summary, "release": record.release, "published": True}


def _total(outputs: Sequence[StageOutput], name: str) -> int:
    return int(sum(output.numbers.get(name, 0) for output in outputs))
