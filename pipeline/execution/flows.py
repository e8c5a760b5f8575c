"""`run`, from a corpus to a published release: the order of the stages and what each hands to the next.

Every stage is a list of tasks for a runner; what is done is skipped by receipt. The run holds the lease of the root from
before it writes its plan until it has published. The alias entry that it may follow is read as soon as it has the lease, so
that it sees what the run before it published, and never undoes what is published while it works.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import pyarrow as pa
import structlog

from pipeline.artifacts import (
    IndexManifest,
    Plan,
    ReleaseRecord,
    arrow_schema,
)
from pipeline.config import Config, SizedConfig
from pipeline.corpus import (
    count_changes,
    count_reasons,
    plan_corpus,
)
from pipeline.embedding.cache import (
    Cache,
    Redrives,
    bucket_count,
    open_cache,
    read_redrives,
)
from pipeline.errors import ConfigError
from pipeline.execution.building import FittedTree, build_index, cut_rows, index_sizes
from pipeline.execution.current import Current, skipped
from pipeline.execution.documents import DocumentFiles, check_any_is_left, read_documents
from pipeline.execution.encoders import GIVEN, EncoderInForce, encoder_in_force
from pipeline.execution.encoding import Embedded, embed
from pipeline.execution.estimates import Estimate, Serving, check_fits, estimate, expected_vectors, sized
from pipeline.execution.judgement import judge, read_questions
from pipeline.execution.learning import AskedPairs, Parent, binarizer_in_force, read_pairs
from pipeline.execution.ledger import Ledger
from pipeline.execution.migrating import OldSide, Settled
from pipeline.execution.publishing import publish_index
from pipeline.execution.session import BuildSession, working
from pipeline.execution.standins import documents_as_queries
from pipeline.execution.work import StoreSpec, versions
from pipeline.filters import parse_filter
from pipeline.index.condemned import drop_condemned, letters_of
from pipeline.index.vectors import VectorSource, sample_queries
from pipeline.partitioning import Workload, read_workload
from pipeline.release import (
    Lease,
    claim_root,
    files_are_there,
    hold_root,
    is_held,
    mark_plan_done,
    write_plan,
)
from pipeline.schemas import condemned_schema
from pipeline.storage import Store, canonical_json, open_store, split_uri
from pipeline.tables import read_columns

__all__ = ["inputs_key", "provenance", "run"]


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
    before = Current.find(store)
    prepared = _prepare(config, store, ledger, before)
    if begin is None and (same := _unchanged_while_held(store, prepared)) is not None:
        return _unchanged(same, time.perf_counter() - start)
    with hold_root(store, "run", config.lease) as lease:
        current = Current.find(store)
        if begin is not None:
            begin(store, prepared.encoder)
        redrives = read_redrives(store, prepared.encoder.fingerprint)
        if lease.waited or current != before or redrives != prepared.redrives:
            # Another job was first, and what it published may be of a newer corpus than was found before; or it began a redrive,
            # as `begin` does, which changes what there is to do even where nothing came of it.
            prepared = _prepare(config, store, ledger, current)
        if (same := _unchanged_release(store, current, prepared)) is not None:
            # A run that died between its alias entry and this line left its plan open.
            mark_plan_done(store, prepared.plan)
            return _unchanged(same, time.perf_counter() - start)
        _check_encoder(current, prepared.encoder)
        write_plan(store, prepared.plan)
        ledger.seconds["plan"] = round(time.perf_counter() - start, 3)
        with _session(spec, runner_of, lease, prepared, ledger) as session:
            summary = _build_and_publish(session, prepared, current)
        mark_plan_done(store, prepared.plan)
        return summary


def _check_encoder(current: Current | None, encoder: EncoderInForce) -> None:
    """Refuse another encoder than that of a release that migrates: what is in its space already would be lost."""
    if current is None or current.query_encoder.fingerprint == encoder.fingerprint:
        return
    name = current.query_encoder.name
    if current.manifest.bridges:
        problem = f"{current.place} answers queries of {name}, the configuration names {encoder.space}"
        remedy = f"set `encoder: {name}`, or go back first: `strata rollback`"
        raise ConfigError("encoder", problem, remedy)
    if encoder.spec is not None:
        structlog.get_logger().warning(
            "all_documents_are_embedded_anew",
            release=current.record.release,
            encoder_before=name,
            encoder=encoder.label,
            hint="strata upgrade answers queries of the new encoder from what is there; strata backfill goes by parts",
        )


@contextmanager
def _session(
    spec: StoreSpec,
    runner_of: Callable[[], Any],
    lease: Lease,
    prepared: "_Prepared",
    ledger: Ledger,
) -> Iterator[BuildSession]:
    """Start the runner, and what watches the run."""
    config, expected = prepared.config, prepared.cost.memory_by_stage
    with working(runner_of, ledger, config.corpus.identity) as (runner, memory):
        yield BuildSession(config, spec, spec.open(), runner, lease, expected, memory, ledger)


@dataclass(frozen=True)
class _Prepared:
    """What is known before any work."""

    plan: Plan
    encoder: EncoderInForce
    config: SizedConfig
    serving: Serving
    cost: Estimate
    redrives: Redrives
    workload: Workload | None
    inputs: str


def _prepare(config: Config, store: Store, ledger: Ledger, current: Current | None) -> _Prepared:
    plan = plan_corpus(config.corpus, config.storage)
    claim_root(store, config.corpus)
    encoder = encoder_in_force(store, config, plan)
    _check_examples(config, plan, encoder)
    buckets = bucket_count(store, encoder.fingerprint, expected_vectors(plan, config))
    cpus = config.ray.num_cpus or os.cpu_count() or 1
    settled, serving = sized(plan, config, dims=encoder.dims)
    cost = estimate(plan, settled, dims=encoder.dims, text_buckets=buckets, cpus=cpus)
    ledger.facts |= {"plan": plan.fingerprint, "estimate": cost.as_dict()}
    structlog.get_logger().info(
        "planned", plan=plan.fingerprint, rows=plan.rows, shards=len(plan.shards), encoder=encoder.label
    )
    check_fits(cost.memory_by_stage, settled)
    redrives = read_redrives(store, encoder.fingerprint)
    # Until a release is in one space, its partitions stay cut as they are.
    migrates = current is not None and bool(current.manifest.bridges)
    workload = None if migrates else _workload_of(settled, plan)
    inputs = inputs_key(settled, plan, encoder, workload, redrives=len(redrives))
    return _Prepared(plan, encoder, settled, serving, cost, redrives, workload, inputs)


def _workload_of(config: SizedConfig, plan: Plan) -> Workload | None:
    """Past queries that the layout is learned from; what of them does not fit the attributes is told."""
    if config.layout.workload is None:
        return None
    workload = read_workload(config.layout.workload, config.storage, arrow_schema(plan.attributes))
    if workload.unreadable:
        structlog.get_logger().warning(
            "workload_filters_set_aside", share=round(workload.unreadable, 4), first=workload.reason
        )
    return workload


def _unchanged_release(store: Store, current: Current | None, prepared: _Prepared) -> ReleaseRecord | None:
    """The current release, if it is whole and was made of the same; None if there is work to do."""
    if current is None or current.record.summary.get("inputs") != prepared.inputs:
        return None
    return current.record if files_are_there(store, current.record) else None


def _unchanged_while_held(store: Store, prepared: _Prepared) -> ReleaseRecord | None:
    """The same where another job holds the root; None where nobody does.

    True at this moment, and nothing is written: as if this run had come before the one that holds the root.
    """
    return _unchanged_release(store, Current.find(store), prepared) if is_held(store) else None


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
    return skipped(current, seconds, added=0, changed=0, removed=0, encoded=0)


def inputs_key(
    config: SizedConfig, plan: Plan, encoder: EncoderInForce, workload: Workload | None, *, redrives: int
) -> str:
    """Fingerprint of everything that determines the release; `workload` is None where that does not cut its partitions.

    Which texts are condemned is found by the work itself; it changes with the plan, the encoder and the redrives alone.
    """
    judged = [config.evaluation.queries, config.evaluation.qrels]
    pairs = config.binarizer.pairs
    judged += [pairs.queries, pairs.qrels] if pairs is not None else []
    contents = [_content_hash(uri, config) for uri in judged if uri is not None]
    settings = config.model_dump(
        mode="json", include={"corpus", "binarizer", "layout", "search", "evaluation", "gates", "seed"}
    )
    # Where the corpus lies does not matter, what it holds does: that is the plan's fingerprint.
    settings["corpus"].pop("uri")
    settings["evaluation"].pop("examples")
    settings["binarizer"].pop("gpus")
    settings["layout"].pop("workload")
    value = {
        "plan": plan.fingerprint,
        "encoder": [encoder.fingerprint, encoder.query_fingerprint],
        "redrives": redrives,
        "settings": settings,
        "workload": [workload.fingerprint, config.serving.storage] if workload is not None else None,
        "judged": contents,
        "versions": versions(),
    }
    return hashlib.sha256(canonical_json(value)).hexdigest()[:40]


def provenance(config: Config) -> dict[str, Any]:
    """What a release says of how it was made."""
    return {"configuration": config.model_dump(mode="json"), "versions": versions()}


def _content_hash(uri: str, config: Config) -> str:
    folder, name = split_uri(uri)
    return hashlib.sha256(open_store(folder, config.storage).read(name)).hexdigest()


# ------------------------------------------------------------------------------------------------ stages


def _build_and_publish(session: BuildSession, prepared: _Prepared, current: Current | None) -> dict[str, Any]:
    parent = Parent(current.record.release, current.manifest) if current is not None else None
    plan, encoder = prepared.plan, prepared.encoder
    cache = open_cache(
        session.store,
        encoder.fingerprint,
        dims=encoder.dims,
        rows=expected_vectors(plan, session.config),
        redrives=prepared.redrives,
    )
    # Before anything is built: a query that cannot be encoded ends the run.
    questions = read_questions(session, encoder)
    made = _made(session, prepared, cache, parent, read_pairs(session, encoder, questions))
    documents, embedded, old = made.documents, made.embedded, made.old
    if current is not None and old is not None:
        letters = cast("list[str]", current.record.summary["dead_letter_files"])
        kept = letters_of(session.store, letters, old.settled.condemned)
        documents = replace(documents, dead_letters=documents.dead_letters + kept)
    stand_ins = (
        partial(sample_queries, session.store, made.source)
        if old is None
        else partial(documents_as_queries, session, made.manifest.documents, cache)
    )
    manifest, measured = judge(session, questions, made.manifest, made.source, stand_ins)
    summary: dict[str, Any] = {
        "index": manifest.index,
        "documents": documents.documents,
        "vectors": sum(one.rows for one in manifest.partitions),
        **_count_changes_since(session, manifest, parent),
        "encoded": embedded.encoded,
        "dead_letters": documents.num_dead_letters,
        "dead_letters_by_reason": count_reasons(session.store, documents.dead_letters),
        "dead_letter_files": [ref.path for ref in documents.dead_letters],
        "redrives": cache.generation,
        "encoder": encoder.label,
        **index_sizes(manifest),
        **measured,
        "plan": plan.fingerprint,
        "inputs": prepared.inputs,
        **({} if old is None else {"made_of": old.side.made_of(prepared.inputs)}),
        "estimate": prepared.cost.as_dict(),
        "serving": asdict(prepared.serving),
        **provenance(session.config),
        "skipped": False,
    }
    return publish_index(session, manifest, summary, current)


@dataclass(frozen=True)
class _Old:
    """The side of a release that migrates which is in earlier spaces."""

    side: OldSide
    settled: Settled
    """What becomes of it."""


@dataclass(frozen=True)
class _Made:
    """An index that is not judged yet, and what it is made of."""

    manifest: IndexManifest
    documents: DocumentFiles
    embedded: Embedded
    source: VectorSource
    """What it holds in the space of the encoder."""
    old: _Old | None
    """Of the release before, where that migrates."""


def _made(
    session: BuildSession,
    prepared: _Prepared,
    cache: Cache,
    parent: Parent | None,
    asked: AskedPairs | None,
) -> _Made:
    """From documents to an index; while a release migrates, those that are not in an earlier space are in the new one."""
    plan, encoder = prepared.plan, prepared.encoder
    documents = read_documents(session, plan, encoder, cache)
    old = _old_of(session, plan, documents, cache, parent)
    if old is not None:
        documents = replace(documents, texts=old.settled.texts, vectors=old.settled.vectors)
    embedded = embed(session, plan, documents, encoder, cache)
    documents = _without_condemned(session.config, plan, documents, embedded)
    source = VectorSource(documents.texts, cache, plan.attributes, embedded.condemned)

    def build(cut: FittedTree) -> IndexManifest:
        binarizer = binarizer_in_force(session, documents, source, encoder, parent, asked)
        return build_index(session, plan, encoder, documents, source, binarizer, cut)

    if old is None:
        manifest = build(cut_rows(session, plan, documents, source, prepared.workload))
    else:
        manifest = old.side.beside(session, plan, documents, source, old.settled, build)
    return _Made(manifest, documents, embedded, source, old)


def _old_of(
    session: BuildSession, plan: Plan, documents: DocumentFiles, cache: Cache, parent: Parent | None
) -> _Old | None:
    """None where the release before is in one space, or there is none."""
    side = OldSide.of(parent)
    if side is None:
        return None
    side.check_attributes(plan.attributes)
    members = side.members(session, buckets=len(documents.files))
    return _Old(side, side.settled(session, documents.files, members, text_buckets=cache.buckets))


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
    check_any_is_left(config, plan, left)
    return left


# ------------------------------------------------------------------------------------------------ publishing


def _count_changes_since(
    session: BuildSession, manifest: IndexManifest, parent: Parent | None
) -> dict[str, int]:
    """Documents added, changed and removed since the current release."""
    if parent is None:
        return {"added": manifest.num_documents, "changed": 0, "removed": 0}
    with session.timed("compare"):
        changes = count_changes(_compared(session.store, parent.manifest), _compared(session.store, manifest))
    return {"added": changes.added, "changed": changes.changed, "removed": changes.removed}


def _compared(store: Store, manifest: IndexManifest) -> Iterator[Any]:
    """What makes a document another one, bucket by bucket; its text counts by its hash, unless the vector was ready-made."""
    columns = ["vector_id", "doc_id", "chunk_no", "text_hash", *(a.name for a in manifest.attributes)]
    columns += ["text"] if manifest.encoder["model"] == GIVEN else []
    condemned = [read_columns(store, ref.path) for ref in manifest.condemned]
    gone = pa.concat_tables([condemned_schema().empty_table(), *condemned])
    return (drop_condemned(read_columns(store, ref.path, columns), gone) for ref in manifest.documents)
