"""`run`, from a corpus to a published release: the order of the stages and what each hands to the next.

Every stage is a list of tasks for a runner; what is done is skipped by receipt. The alias entry that the run may follow
is read first of all, so that a slow run never undoes what another published meanwhile.
"""

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from pipeline import postings
from pipeline.artifacts import (
    AliasEntry,
    FileRef,
    IndexManifest,
    Plan,
    ReleaseRecord,
    SearchDefaults,
    StageOutput,
)
from pipeline.config import Config
from pipeline.corpus import (
    check_error_budget,
    count_changes,
    merge_documents,
    plan_corpus,
    read_shard,
)
from pipeline.embedding.stage import Cache, encode_unit, open_cache, plan_units, store_given
from pipeline.errors import QualityGateError
from pipeline.evaluation.judging import gate_failures, judge_against_exact, judge_against_qrels
from pipeline.evaluation.queries import Queries, read_qrels, read_queries
from pipeline.evaluation.stage import (
    encode_query_texts,
    exact_bucket,
    measure_search,
    merge_exact,
    read_query_vectors,
    write_query_vectors,
)
from pipeline.execution.encoders import EncoderInForce, encoder_in_force
from pipeline.execution.estimates import check_fits, estimate
from pipeline.execution.progress import track
from pipeline.execution.runner import Runner
from pipeline.execution.work import Done, StoreSpec, Task, versions
from pipeline.index.reader import IndexReader
from pipeline.index.stage import (
    VectorSource,
    build_segment,
    finish_partition,
    place_bucket,
    sample_vectors,
    train_index,
)
from pipeline.index.training import sample_rows
from pipeline.release import (
    claim_root,
    files_are_there,
    mark_plan_done,
    publish,
    read_alias,
    read_manifest,
    read_release,
    was_withdrawn,
    write_plan,
)
from pipeline.storage import Store, canonical_json, open_store, split_uri
from pipeline.tables import read_columns

__all__ = ["run"]

TUNING_QUERIES = 200
"""Document vectors on which the number of probes is chosen; never the queries that are reported."""
NEIGHBOURS = 100
"""Depth of the exact rankings: recall@100 needs it."""


@dataclass
class _Run:
    """One run under way: what it was started with, and what it has measured so far."""

    config: Config
    spec: StoreSpec
    store: Store
    runner: Runner
    seconds: dict[str, float] = field(default_factory=dict)
    tasks: int = 0
    reused: int = 0
    peak_mb: float = 0.0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)

    def perform(
        self, stage: str, tasks: Sequence[Task], *, encoder: EncoderInForce | None = None
    ) -> Iterator[tuple[int, Done]]:
        """Results as they finish, counted and shown."""
        spec = encoder.spec if encoder is not None else None
        finished = self.runner.run(tasks) if spec is None else self.runner.encode(tasks, spec)
        for place, done in track(finished, label=stage, total=len(tasks)):
            self.tasks += 1
            self.reused += done.reused
            self.peak_mb = max(self.peak_mb, done.peak_mb)
            yield place, done

    def outputs(
        self, stage: str, tasks: Sequence[Task], *, encoder: EncoderInForce | None = None
    ) -> list[StageOutput]:
        """Results in the order of the tasks."""
        with self.timed(stage):
            found = dict(self.perform(stage, tasks, encoder=encoder))
        return [found[place].output for place in range(len(tasks))]


def run(config: Config, spec: StoreSpec, runner_of: Callable[[], Any]) -> dict[str, Any]:
    """Take the corpus to a published release, or find that nothing changed.

    Args:
        config: The run.
        spec: The root.
        runner_of: Gives a context manager of a Runner; asked only if there is work.

    Returns:
        The summary that the job prints.

    Raises:
        QualityGateError: The index is whole but below the gates.
        PublishConflictError: Another run published meanwhile.
        DataError: The corpus breaks its contract.
    """
    start = time.perf_counter()
    store = spec.open()
    claim_root(store, config.corpus)
    started_at = read_alias(store)
    plan = plan_corpus(config.corpus, config.storage)
    encoder = encoder_in_force(store, config, plan)
    check_fits(estimate(plan, config, dims=encoder.dims, cpus=1), config)
    inputs = _inputs_key(config, plan, encoder)
    current = read_release(store, started_at.release) if started_at is not None else None
    if current is not None and current.summary.get("inputs") == inputs and files_are_there(store, current):
        return _unchanged(current, time.perf_counter() - start)
    write_plan(store, plan)
    with runner_of() as runner:
        this = _Run(config, spec, store, runner)
        this.seconds["plan"] = round(time.perf_counter() - start, 3)
        summary = _build_and_publish(this, plan, encoder, started_at, current, inputs)
    mark_plan_done(store, plan)
    return summary


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


def _inputs_key(config: Config, plan: Plan, encoder: EncoderInForce) -> str:
    """Fingerprint of everything that determines the release."""
    judged = [config.evaluation.queries, config.evaluation.qrels]
    contents = [_content_hash(uri, config) for uri in judged if uri is not None]
    settings = config.model_dump(
        mode="json", include={"corpus", "binarizer", "layout", "search", "evaluation", "gates", "seed"}
    )
    # Where the corpus lies does not matter, what it holds does: that is the plan's fingerprint.
    settings["corpus"].pop("uri")
    value = {
        "plan": plan.fingerprint,
        "encoder": encoder.fingerprint,
        "settings": settings,
        "judged": contents,
        "versions": versions(),
    }
    return hashlib.sha256(canonical_json(value)).hexdigest()[:40]


def _content_hash(uri: str, config: Config) -> str:
    folder, name = split_uri(uri)
    return hashlib.sha256(open_store(folder, config.storage).read(name)).hexdigest()


# ------------------------------------------------------------------------------------------------ stages


@dataclass(frozen=True)
class _Documents:
    """The corpus in the root."""

    files: tuple[FileRef, ...]
    texts: tuple[FileRef, ...]
    dead_letters: tuple[FileRef, ...]
    documents: int
    vectors: int
    num_dead_letters: int


def _build_and_publish(
    this: _Run,
    plan: Plan,
    encoder: EncoderInForce,
    started_at: AliasEntry | None,
    current: ReleaseRecord | None,
    inputs: str,
) -> dict[str, Any]:
    cache = open_cache(this.store, encoder.fingerprint, dims=encoder.dims, rows=plan.rows)
    documents = _read_documents(this, plan, encoder, cache)
    encoded = _embed(this, documents, encoder, cache)
    source = VectorSource(documents.texts, cache, plan.attributes)
    trained, manifest = _build(this, plan, encoder, documents, source)
    manifest, measured = _judge(this, encoder, manifest, source, trained)
    summary: dict[str, Any] = {
        "index": manifest.index,
        "documents": documents.documents,
        "vectors": documents.vectors,
        **_changes(this, manifest, current),
        "encoded": encoded,
        "dead_letters": documents.num_dead_letters,
        "dead_letter_files": [ref.path for ref in documents.dead_letters],
        "encoder": encoder.label,
        **_sizes(manifest),
        **measured,
        "plan": plan.fingerprint,
        "inputs": inputs,
        "skipped": False,
    }
    return _publish(this, manifest, summary, started_at, current)


def _read_documents(this: _Run, plan: Plan, encoder: EncoderInForce, cache: Cache) -> _Documents:
    config = this.config
    shape = {
        "corpus": config.corpus.model_dump(mode="json", exclude={"uri", "name", "error_budget"}),
        "attributes": plan.attributes,
    }
    reads = [
        Task(
            "read",
            {
                "file": plan.files[s.file_no].content,
                "path": plan.files[s.file_no].path,
                "shard": s,
                "buckets": plan.document_buckets,
                "dims": plan.embedding_dims,
                "tokenizer": encoder.tokenizer_hash,
                **shape,
            },
            partial(
                read_shard,
                plan=plan,
                shard=s,
                corpus=config.corpus,
                storage=config.storage,
                tokenizer_json=encoder.tokenizer_json,
            ),
        )
        for s in plan.shards
    ]
    with this.timed("read"):
        shards = _within_budget(this, reads, plan)
    rows = [output.files["rows"] for output in shards]
    merges = [
        Task(
            "merge",
            {
                "rows": rows,
                "bucket": bucket,
                "buckets": plan.document_buckets,
                "text_buckets": cache.buckets,
                "files": [f.path for f in plan.files],
                **shape,
            },
            partial(
                merge_documents, bucket=bucket, shard_rows_files=rows, plan=plan, text_buckets=cache.buckets
            ),
        )
        for bucket in range(plan.document_buckets)
    ]
    merged = this.outputs("merge", merges)
    letters = [
        output.files["dead_letters"] for output in [*shards, *merged] if "dead_letters" in output.files
    ]
    _check_budget(this, plan, letters)
    return _Documents(
        files=tuple(output.files["documents"] for output in merged),
        texts=tuple(output.files["texts"] for output in merged),
        dead_letters=tuple(letters),
        documents=_total(merged, "documents"),
        vectors=_total(merged, "vectors"),
        num_dead_letters=sum(ref.rows for ref in letters),
    )


def _within_budget(this: _Run, tasks: Sequence[Task], plan: Plan) -> list[StageOutput]:
    """Read shards until done, or until more rows are bad than the budget allows for the whole corpus."""
    found: dict[int, StageOutput] = {}
    letters: list[FileRef] = []
    for place, done in this.perform("read", tasks):
        found[place] = done.output
        if "dead_letters" in done.output.files:
            letters.append(done.output.files["dead_letters"])
            _check_budget(this, plan, letters)
    return [found[place] for place in range(len(tasks))]


def _check_budget(this: _Run, plan: Plan, letters: Sequence[FileRef]) -> None:
    bad = sum(ref.rows for ref in letters)
    check_error_budget(this.store, this.config.corpus, rows=plan.rows, bad_rows=bad, dead_letters=letters)


def _embed(this: _Run, documents: _Documents, encoder: EncoderInForce, cache: Cache) -> int:
    """Fill the cache; returns the number of texts encoded now."""
    buckets = range(cache.buckets)
    inputs = {"texts": documents.texts, "encoder": encoder.fingerprint}
    if encoder.ready_made:
        tasks = [
            Task(
                "given",
                {**inputs, "bucket": b, "buckets": cache.buckets},
                partial(store_given, cache=cache, bucket=b, texts=documents.texts),
            )
            for b in buckets
        ]
        this.outputs("embed", tasks)
        return 0
    unit_texts = this.config.embedding.unit_texts
    # What is missing depends on the cache, so that the plan of units is made anew each time: it has no receipt to reuse.
    attempt = uuid.uuid4().hex
    plans = [
        Task(
            "units",
            {**inputs, "bucket": b, "attempt": attempt},
            partial(plan_units, cache=cache, bucket=b, texts=documents.texts, unit_texts=unit_texts),
        )
        for b in buckets
    ]
    planned = this.outputs("embed", plans)
    units = [
        Task(
            "encode",
            {"unit": unit, "encoder": encoder.fingerprint},
            partial(encode_unit, cache=cache, bucket=b, unit=unit),
        )
        for b, output in zip(buckets, planned, strict=True)
        for unit in output.files.values()
    ]
    return _total(this.outputs("embed", units, encoder=encoder), "encoded")


def _build(
    this: _Run, plan: Plan, encoder: EncoderInForce, documents: _Documents, source: VectorSource
) -> tuple[StageOutput, IndexManifest]:
    config = this.config
    inputs = {"texts": documents.texts, "encoder": encoder.fingerprint, "attributes": plan.attributes}
    rows = sample_rows(documents.vectors, config.layout)
    settings = {"layout": config.layout, "binarizer": config.binarizer, "seed": config.seed}
    train = partial(
        train_index,
        source=source,
        num_vectors=documents.vectors,
        sample_rows=rows,
        layout=config.layout,
        binarizer=config.binarizer,
        seed=config.seed,
    )
    trained = this.outputs("train", [Task("train", {**inputs, **settings, "rows": rows}, train)])[0]
    places = [
        Task(
            "place",
            {**inputs, "bucket": b, "trained": trained.files},
            partial(place_bucket, source=source, bucket=b, trained_files=trained.files),
        )
        for b in range(source.cache.buckets)
    ]
    placed = [output.files["placed"] for output in this.outputs("place", places)]
    segments = [
        Task(
            "build",
            {"placed": placed, "segment": no, "attributes": plan.attributes},
            partial(build_segment, placed=placed, segment_no=no, attributes=plan.attributes),
        )
        for no in range(int(trained.numbers["segments"]))
    ]
    built = this.outputs("build", segments)
    with this.timed("build"):
        partition = finish_partition(this.store, built, trained.files, space=encoder.fingerprint)
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
        partitions=(partition,),
        search=SearchDefaults(probes=int(trained.numbers["lists"]), rerank=config.search.rerank),
        statistics=_list_statistics(this.store, partition.directory),
    )
    return trained, manifest


def _list_statistics(store: Store, directory: FileRef) -> dict[str, float]:
    sizes = read_columns(store, directory.path, ["num_entries"])["num_entries"].to_numpy()
    return {
        "lists": float(len(sizes)),
        "list_rows_mean": float(sizes.mean()),
        "list_rows_max": float(sizes.max()),
        "list_rows_cv": float(sizes.std() / sizes.mean()),
    }


# ------------------------------------------------------------------------------------------------ judging


@dataclass(frozen=True)
class _Judged:
    """Queries that a release is reported on."""

    vectors: NDArray[np.float32]
    query_ids: tuple[str, ...]
    own_documents: tuple[str | None, ...]
    """For a document that stands in as a query: the document, which does not count as its own neighbour."""
    recall_queries: tuple[str, ...]
    """Those held against exact search."""
    qrels: Mapping[str, Mapping[str, float]]


def _judge(
    this: _Run, encoder: EncoderInForce, manifest: IndexManifest, source: VectorSource, trained: StageOutput
) -> tuple[IndexManifest, dict[str, Any]]:
    """Choose the number of probes on document vectors, then measure the index on the queries."""
    judged = _judged_queries(this, encoder, source)
    tuning, _ = sample_vectors(this.store, source, TUNING_QUERIES, from_end=True)
    asked = write_query_vectors(this.store, np.concatenate([judged.vectors, tuning]))
    layout = trained.files["layout"]
    inputs = {
        "texts": source.texts,
        "encoder": encoder.fingerprint,
        "queries": asked,
        "layout": layout,
        "depth": NEIGHBOURS + 1,
    }
    tasks = [
        Task(
            "exact",
            {**inputs, "bucket": b},
            partial(
                exact_bucket, source=source, bucket=b, queries=asked, layout=layout, depth=NEIGHBOURS + 1
            ),
        )
        for b in range(source.cache.buckets)
    ]
    files = [output.files["exact"] for output in this.outputs("judge", tasks)]
    with this.timed("judge"):
        exact = merge_exact(this.store, files, asked.rows, depth=NEIGHBOURS + 1)
        probes = this.config.search.probes or _tuned_probes(
            this, tuning, exact[len(judged.vectors) :], manifest
        )
        manifest = _identified(
            manifest.model_copy(
                update={"search": SearchDefaults(probes=probes, rerank=manifest.search.rerank)}
            )
        )
        reader = IndexReader(this.store, manifest)
        rankings, costs = measure_search(reader, judged.vectors, k=NEIGHBOURS + 1)
        found = _without_self(judged, rankings)
        truth = _without_self(judged, [list(e.doc_ids) for e in exact[: len(judged.vectors)]])
        numbers = judge_against_exact(found, {q: truth[q] for q in judged.recall_queries})
        if judged.qrels:
            numbers |= judge_against_qrels(found, truth, judged.qrels)
    rounded = {name: round(value, 4) for name, value in (numbers | costs).items()}
    return manifest, {**rounded, "probes": probes, "rerank": manifest.search.rerank}


def _tuned_probes(
    this: _Run, tuning: NDArray[np.float32], exact: Sequence[Any], manifest: IndexManifest
) -> int:
    """Fewest probes that reach the lists of the wanted share of true neighbours; a query's own list does not count."""
    heads = IndexReader(this.store, manifest).heads()
    ranks = []
    for distances, neighbours in zip(postings.head_distances(tuning, heads), exact, strict=True):
        rank_of = np.empty(len(heads), dtype=np.int64)
        rank_of[np.argsort(distances, kind="stable")] = np.arange(len(heads))
        ranks.append(rank_of[list(neighbours.list_nos[1:11])])
    return postings.probes_for_coverage(np.concatenate(ranks), this.config.search.target_coverage)


def _identified(manifest: IndexManifest) -> IndexManifest:
    """The manifest under the hash of its content."""
    content = canonical_json(manifest.model_dump(mode="json", exclude={"index"}))
    return manifest.model_copy(update={"index": hashlib.sha256(content).hexdigest()[:32]})


def _judged_queries(this: _Run, encoder: EncoderInForce, source: VectorSource) -> _Judged:
    evaluation = this.config.evaluation
    if evaluation.queries is None:
        return _document_queries(this, source)
    queries = read_queries(evaluation.queries, this.config.storage)
    qrels = read_qrels(evaluation.qrels, this.config.storage) if evaluation.qrels is not None else {}
    by_hash = sorted(
        range(len(queries)), key=lambda i: hashlib.sha256(queries.query_ids[i].encode()).digest()
    )
    sample = {queries.query_ids[i] for i in by_hash[: evaluation.sample_queries]}
    judged = {q for q in queries.query_ids if q in qrels}
    recall = {q for q in judged or sample if q in sample} or judged
    kept = queries.subset([i for i, q in enumerate(queries.query_ids) if q in recall | judged])
    vectors = _query_vectors(this, kept, encoder)
    return _Judged(
        vectors,
        kept.query_ids,
        (None,) * len(kept),
        tuple(sorted(recall)),
        {q: qrels[q] for q in kept.query_ids if q in qrels},
    )


def _document_queries(this: _Run, source: VectorSource) -> _Judged:
    """Document vectors as queries, other ones than those that tune."""
    wanted = this.config.evaluation.sample_queries
    vectors, doc_ids = sample_vectors(this.store, source, wanted + TUNING_QUERIES, from_end=True)
    vectors, names = vectors[:wanted], tuple(doc_ids[:wanted])
    return _Judged(vectors, names, names, names, {})


def _query_vectors(this: _Run, queries: Queries, encoder: EncoderInForce) -> NDArray[np.float32]:
    if queries.vectors is not None:
        return queries.vectors / np.linalg.norm(queries.vectors, axis=1, keepdims=True)
    inputs = {"texts": queries.texts, "encoder": encoder.fingerprint}
    task = Task("queries", inputs, partial(encode_query_texts, texts=queries.texts or ()))
    output = this.outputs("judge", [task], encoder=encoder)[0]
    return read_query_vectors(this.store, output.files["queries"])


def _without_self(judged: _Judged, rankings: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    pairs = zip(judged.query_ids, judged.own_documents, rankings, strict=True)
    return {query: [doc for doc in ranking if doc != own][:NEIGHBOURS] for query, own, ranking in pairs}


# ------------------------------------------------------------------------------------------------ publishing


def _changes(this: _Run, manifest: IndexManifest, current: ReleaseRecord | None) -> dict[str, int]:
    """Documents added, changed and removed since the current release."""
    if current is None:
        return {"added": manifest.num_documents, "changed": 0, "removed": 0}
    before = read_manifest(this.store, current)
    tables = [
        (read_columns(this.store, ref.path) for ref in files)
        for files in (before.documents, manifest.documents)
    ]
    with this.timed("compare"):
        changes = count_changes(*tables)
    return {"added": changes.added, "changed": changes.changed, "removed": changes.removed}


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
    this: _Run,
    manifest: IndexManifest,
    summary: dict[str, Any],
    started_at: AliasEntry | None,
    current: ReleaseRecord | None,
) -> dict[str, Any]:
    data = canonical_json(manifest.model_dump(mode="json"))
    path = f"indexes/{manifest.index}/manifest.json"
    this.store.write(path, data)
    ref = FileRef(path=path, rows=0, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    before = int(str(current.summary.get("documents", 0))) if current is not None else 0
    failures = gate_failures(this.config.gates, summary, removed=summary["removed"], documents_before=before)
    if failures:
        problem = "not published: " + "; ".join(failures)
        raise QualityGateError(
            f"index {manifest.index}", problem, "the current release stays; change the index or the gates"
        )
    this.seconds["total"] = round(sum(this.seconds.values()), 3)
    summary |= {
        "seconds": this.seconds,
        "tasks": this.tasks,
        "tasks_reused": this.reused,
        "peak_worker_mb": round(this.peak_mb),
    }
    if was_withdrawn(this.store, manifest.index):
        structlog.get_logger().warning("rolled_back_index_not_published_again", index=manifest.index)
        return {**summary, "release": started_at.release if started_at is not None else 0, "published": False}
    record = publish(
        this.store,
        manifest,
        ref,
        summary,
        started_at=started_at,
        now=datetime.now(UTC),
        token=uuid.uuid4().hex,
    )
    return {**summary, "release": record.release, "published": True}


def _total(outputs: Sequence[StageOutput], name: str) -> int:
    return int(sum(output.numbers.get(name, 0) for output in outputs))
