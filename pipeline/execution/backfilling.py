"""`backfill`: the leaves that gain most are embedded anew, and move into the space of the release's encoder.

Which leaves move is decided once for a release and a budget, from what the caches hold then, and remembered by a receipt: a
backfill that died goes on with the same ones.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import structlog

from pipeline.artifacts import FileRef, IndexManifest, Plan
from pipeline.config import Config, SizedConfig
from pipeline.embedding.cache import Cache, find_cache, open_cache, read_redrives
from pipeline.errors import ConfigError, MissingFileError
from pipeline.evaluation.queries import read_queries
from pipeline.evaluation.stage import write_query_vectors
from pipeline.execution.asking import query_vectors
from pipeline.execution.building import FittedTree, build_index, index_sizes
from pipeline.execution.current import Current, skipped
from pipeline.execution.documents import DocumentFiles
from pipeline.execution.encoders import EncoderInForce, check_encoder_of_queries, named_encoder
from pipeline.execution.encoding import encode_texts
from pipeline.execution.estimates import Serving, check_fits, estimate, migration_memory, sized
from pipeline.execution.flows import inputs_key, provenance
from pipeline.execution.judgement import judge, read_questions
from pipeline.execution.learning import AskedPairs, Parent, binarizer_in_force, read_pairs
from pipeline.execution.ledger import Ledger
from pipeline.execution.migrating import OldSide, Settled, plain_leaves
from pipeline.execution.publishing import publish_index
from pipeline.execution.session import BuildSession, working
from pipeline.execution.standins import documents_as_queries
from pipeline.execution.work import StoreSpec, Task, digest
from pipeline.index.vectors import VectorSource
from pipeline.release import hold_root, mark_plan_done, read_plan, unfinished_work, write_plan
from pipeline.storage import Store
from pipeline.upgrade.backfill import (
    Allowance,
    Chosen,
    DocumentBucket,
    Moving,
    choose_leaves,
    look_into_leaves,
    name_members,
    read_chosen,
    sum_leaves,
    texts_to_embed,
    texts_without_vector,
    weigh_leaves,
    weigh_texts,
)

__all__ = ["Count", "Reach", "backfill"]

JOB = "backfill"
"""The kind of work that it marks on a plan."""


@dataclass(frozen=True)
class Count:
    """A number of documents, or a fraction of all."""

    documents: int | None = None
    fraction: float = 1.0
    """Of all vectors of the index, where no number is named."""

    @classmethod
    def parse(cls, option: str, text: str) -> "Count":
        """What an option says: `20000`, `0.1`, `10%`.

        Raises:
            ConfigError: It is neither.
        """
        try:
            if text.endswith("%"):
                return cls(None, _fraction(float(text[:-1]) / 100))
            return cls(int(text)) if text.isdecimal() and int(text) else cls(None, _fraction(float(text)))
        except ValueError as error:
            problem = f"expected a number of documents or a fraction of them, found {text!r}"
            raise ConfigError(option, problem, "for example 20000, 0.1 or 10%") from error

    def of(self, vectors: int) -> int:
        """Documents, where the index has so many vectors."""
        return self.documents if self.documents is not None else round(self.fraction * vectors)


def _fraction(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError("not a fraction")
    return value


@dataclass(frozen=True)
class Reach:
    """How far a backfill goes."""

    budget: Count = Count()
    """Documents that it embeds, at most."""
    to: Count = Count()
    """Documents in the new space that are enough: asked for again, nothing is left to do."""

    def beyond(self, moved: int, vectors: int) -> Allowance:
        """What is left of it, where so many of all vectors are in the new space."""
        wanted = self.to.of(vectors)
        return Allowance(self.budget.of(vectors), None if wanted >= vectors else max(0, wanted - moved))


def backfill(
    config: Config,
    spec: StoreSpec,
    runner_of: Callable[[], Any],
    ledger: Ledger | None = None,
    *,
    reach: Reach,
    watch: bool = False,
) -> dict[str, Any]:
    """Embed the next leaves anew, best first, and publish a release in which they are in the new space.

    Args:
        config: Names the root, the encoders, the workload.
        spec: The root.
        runner_of: Gives a context manager of a Runner.
        ledger: Filled as the job goes on, for whoever records how it ended.
        reach: How far it goes.
        watch: Tell what would move and what it would cost, and embed nothing.

    Returns:
        The summary that the job prints.

    Raises:
        QualityGateError: The index is below the gates.
        ConfigError: The encoder of the release is not configured, or the budget is smaller than the next leaf.
        PublishConflictError: Another job published meanwhile.
        RootBusyError: Another job holds the root.
    """
    start = time.perf_counter()
    ledger = ledger if ledger is not None else Ledger()
    store = spec.open()
    with hold_root(store, JOB, config.lease) as lease:
        current = Current.read(store)
        plan = read_plan(store, current.manifest.plan)
        if not watch and current.record.summary.get("work", 0) == unfinished_work(store, plan, JOB):
            # A backfill that died behind its alias entry: what it was to embed is embedded.
            mark_plan_done(store, plan, JOB)
            return _left_alone(current, "backfill_had_published", time.perf_counter() - start)
        if not current.manifest.bridges:
            return _left_alone(current, "nothing_to_backfill", time.perf_counter() - start)
        work = _Work.prepared(config, store, current, plan)
        with working(runner_of, ledger, config.corpus.identity) as (runner, memory):
            session = BuildSession(
                work.config, spec, spec.open(), runner, lease, work.expected_mb, memory, ledger
            )
            job = _Backfill(session, current, work, reach)
            if watch:
                return job.watched()
            chosen = job.chosen()
            if not chosen:
                return _left_alone(current, "nothing_to_backfill", time.perf_counter() - start)
            number = write_plan(store, plan, JOB)
            summary = job.published(chosen, number)
        mark_plan_done(store, plan, JOB)
    return summary


def _left_alone(current: Current, why: str, seconds: float, *, encoded: int = 0) -> dict[str, Any]:
    """The summary where no document moves."""
    left = OldSide(current.manifest).rows
    structlog.get_logger().info(why, release=current.record.release, in_earlier_spaces=left)
    figures = {"in_earlier_spaces": left, "fraction_new": _fraction_new(current, left)}
    return skipped(
        current.record, seconds, encoded=encoded, documents_embedded=encoded, documents_moved=0, **figures
    )


def _fraction_new(current: Current, left: int) -> float:
    return round(1 - left / max(1, current.vectors), 6)


@dataclass(frozen=True)
class _Work:
    """What is known before any work."""

    config: SizedConfig
    plan: Plan
    encoder: EncoderInForce
    serving: Serving
    expected_mb: dict[str, int]
    inputs: str

    @classmethod
    def prepared(cls, config: Config, store: Store, current: Current, plan: Plan) -> "_Work":
        name = current.query_encoder.name
        check_encoder_of_queries(config, current.manifest, name)
        encoder = named_encoder(store, config, name)
        settled, serving = sized(plan, config, dims=encoder.dims)
        cache = find_cache(store, encoder.fingerprint)
        buckets = cache.buckets if cache is not None else 1
        cpus = config.ray.num_cpus or os.cpu_count() or 1
        cost = estimate(plan, settled, dims=encoder.dims, text_buckets=buckets, cpus=cpus)
        dims = encoder.dims, max(map(current.manifest.dims_of, current.manifest.partitions))
        expected = cost.memory_by_stage | migration_memory(plan, settled, dims=dims, text_buckets=buckets)
        check_fits(expected, settled)
        redrives = read_redrives(store, encoder.fingerprint)
        inputs = inputs_key(settled, plan, encoder, None, redrives=len(redrives))
        return cls(settled, plan, encoder, serving, expected, inputs)


class _Backfill:
    """One backfill under way.

    Args:
        session: The job.
        current: What serves.
        work: What is known before any work.
        reach: How far it goes.
    """

    def __init__(self, session: BuildSession, current: Current, work: _Work, reach: Reach) -> None:
        self._session, self._current, self._work = session, current, work
        self._old, encoder = OldSide(current.manifest), work.encoder
        self._allowed = reach.beyond(current.vectors - self._old.rows, current.vectors)
        redrives = read_redrives(session.store, encoder.fingerprint)
        self._cache = open_cache(
            session.store, encoder.fingerprint, dims=encoder.dims, rows=current.vectors, redrives=redrives
        )
        self._members = self._old.members(session, buckets=len(current.manifest.documents))
        self._order = _Order(session, current, work.encoder, self._old, self._members)

    def watched(self) -> dict[str, Any]:
        """What would move, and what it would cost."""
        chosen, numbers = self._order.chosen(self._cache, self._allowed, remember=False)
        seconds = self._current.record.summary.get("seconds_per_document")
        report = self._session.config.report
        took = None if seconds is None else float(str(seconds)) * numbers["to_embed"]
        price = report.machines_price_per_hour
        return {
            "release": self._current.record.release,
            "watched": True,
            "documents_embedded": 0,
            "documents_to_embed": int(numbers["to_embed"]),
            "documents_to_move": int(numbers["rows"]),
            "leaves": sum(map(len, chosen.values())),
            "leaves_in_all": int(numbers["leaves"]),
            "fraction_new": _fraction_new(self._current, self._old.rows),
            "seconds_to_embed": None if took is None else round(took, 1),
            "cost": None if took is None or price is None else round(took / 3600 * price, 4),
            "currency": report.currency,
        }

    def chosen(self) -> Chosen:
        """Leaves that move; none where nothing is left to do.

        Raises:
            ConfigError: The budget is smaller than the next leaf.
        """
        return self._order.chosen(self._cache, self._allowed, remember=True)[0]

    def published(self, chosen: Chosen, number: int) -> dict[str, Any]:
        """The summary of the release.

        Args:
            chosen: Leaves that move.
            number: Of the work on the plan, by which a job that comes after a crash knows the release.
        """
        session, current, work = self._session, self._current, self._work
        # Before anything is embedded: a query that cannot be encoded ends the job.
        questions = read_questions(session, work.encoder)
        texts = self._texts(chosen)
        encoded = encode_texts(session, texts, work.encoder, self._cache, rows=current.vectors)
        settled = self._settled(Moving(chosen, self._stuck(texts)))
        left = sum(one.rows for one in settled.partitions)
        if left == self._old.rows:
            return _left_alone(current, "nothing_moved", sum(session.seconds.values()), encoded=encoded)
        manifest = self._built(settled, read_pairs(session, work.encoder, questions))
        stand_ins = partial(documents_as_queries, session, manifest.documents, self._cache)
        manifest, measured = judge(session, questions, manifest, None, stand_ins)
        summary = {
            **current.kept(KEPT),
            "index": manifest.index,
            "added": 0,
            "changed": 0,
            "removed": 0,
            "encoded": encoded,
            "documents_embedded": encoded,
            "documents_moved": self._old.rows - left,
            "fraction_new": _fraction_new(current, left),
            "encoder": work.encoder.label,
            **index_sizes(manifest),
            **measured,
            "inputs": work.inputs,
            "work": number,
            "made_of": self._old.made_of(work.inputs, plain_leaves(chosen)),
            "serving": asdict(work.serving),
            **provenance(session.config),
            "skipped": False,
        }
        return publish_index(session, manifest, summary, current)

    def _settled(self, moving: Moving) -> Settled:
        return self._old.settled(
            self._session,
            self._current.manifest.documents,
            self._members,
            text_buckets=self._cache.buckets,
            moving=moving,
        )

    def _built(self, settled: Settled, asked: AskedPairs | None) -> IndexManifest:
        """The index after the move."""
        session, work, manifest = self._session, self._work, self._current.manifest
        documents = DocumentFiles(
            files=manifest.documents,
            texts=settled.texts,
            places=(),
            dead_letters=(),
            documents=manifest.num_documents,
            vectors=settled.vectors,
        )
        source = VectorSource(settled.texts, self._cache, work.plan.attributes)
        parent = Parent(self._current.record.release, manifest)

        def build(cut: FittedTree) -> IndexManifest:
            binarizer = binarizer_in_force(session, documents, source, work.encoder, parent, asked)
            return build_index(session, work.plan, work.encoder, documents, source, binarizer, cut)

        index = self._old.beside(session, work.plan, documents, source, settled, build)
        # All rows that are in no index are still there: their documents moved with what they have.
        return index.model_copy(update={"condemned": manifest.condemned})

    def _texts(self, chosen: Chosen) -> tuple[FileRef, ...]:
        """Texts of the documents that are to move."""
        arguments: dict[str, Any] = {
            "members": self._members,
            "chosen": chosen,
            "text_buckets": self._cache.buckets,
        }
        of = digest(arguments | {"chosen": plain_leaves(chosen)})
        tasks = [
            Task(
                "moving",
                {"of": of, "documents": ref, "bucket": number},
                partial(texts_to_embed, bucket=DocumentBucket(number, ref)),
                arguments,
            )
            for number, ref in enumerate(self._current.manifest.documents)
        ]
        return tuple(output.files["texts"] for output in self._session.outputs("migrate", tasks))

    def _stuck(self, texts: tuple[FileRef, ...]) -> tuple[FileRef, ...]:
        """Those of them that cannot be embedded."""
        arguments: dict[str, Any] = {"texts": texts, "cache": self._cache}
        tasks = [
            Task(
                "stuck",
                {"texts": digest(texts), "bucket": bucket},
                partial(texts_without_vector, bucket=bucket),
                arguments,
                remember=False,
            )
            for bucket in range(self._cache.buckets)
        ]
        files = (output.files["stuck"] for output in self._session.outputs("migrate", tasks))
        return tuple(ref for ref in files if ref.rows)


class _Order:
    """In which order it pays to move leaves.

    Args:
        session: The job.
        current: What serves.
        encoder: Of the release.
        old: Its partitions in earlier spaces.
        members: Their rows, by bucket of documents.
    """

    def __init__(
        self,
        session: BuildSession,
        current: Current,
        encoder: EncoderInForce,
        old: OldSide,
        members: tuple[FileRef, ...],
    ) -> None:
        self._session, self._current, self._encoder = session, current, encoder
        self._old, self._members = old, members

    def chosen(
        self, cache: Cache, allowed: Allowance, *, remember: bool
    ) -> tuple[Chosen, dict[str, int | float]]:
        """Leaves that move, as many as are allowed, and figures of them and of all.

        Args:
            cache: Of the encoder.
            allowed: How far it goes.
            remember: Whether another job on this release with this budget has to choose the same.

        Raises:
            ConfigError: The first of them has more.
        """
        session, workload = self._session, self._workload()
        arguments: dict[str, Any] = {
            "leaves": self._leaves(cache),
            "hits": self._hits(workload),
            "allowed": allowed,
        }
        inputs = {
            "release": self._current.record.index,
            "allowed": asdict(allowed),
            "workload": digest(workload),
            "redrives": cache.generation,
        }
        task = Task("choose", inputs, partial(choose_leaves, **arguments), remember=remember)
        (output,) = session.outputs("migrate", [task])
        numbers = output.numbers
        least = int(numbers["smallest"])
        if not numbers["rows"] and least > allowed.to_embed and allowed.to_move != 0:
            problem = f"allows {allowed.to_embed:,} documents, and the next leaf has {least:,} to embed"
            raise ConfigError("--budget", problem, f"name {least} or more")
        return read_chosen(session.store, output.files["chosen"]), numbers

    def _leaves(self, cache: Cache) -> tuple[FileRef, ...]:
        """What each leaf costs and gains, by segment."""
        session, documents = self._session, self._current.manifest.documents
        arguments: dict[str, Any] = {"members": self._members, "text_buckets": cache.buckets}
        of = digest(arguments)
        tasks = [
            Task(
                "name_members",
                {"of": of, "documents": ref, "bucket": number},
                partial(name_members, bucket=DocumentBucket(number, ref)),
                arguments,
            )
            for number, ref in enumerate(documents)
        ]
        named = tuple(output.files["named"] for output in session.outputs("migrate", tasks))
        told: dict[str, Any] = {"members": self._members, "weighed": self._weighed(cache, named)}
        by_document = [
            Task("weigh_leaves", {"bucket": b}, partial(weigh_leaves, bucket=b), told, remember=False)
            for b in range(len(documents))
        ]
        weighed = tuple(output.files["leaves"] for output in session.outputs("migrate", by_document))
        sums = [
            Task(
                "leaves",
                {"of": digest(weighed), "segment": one.number},
                partial(sum_leaves, weighed=weighed, number=one.number),
                remember=False,
            )
            for one in self._old.segments
        ]
        return tuple(output.files["leaves"] for output in session.outputs("migrate", sums))

    def _weighed(self, cache: Cache, named: tuple[FileRef, ...]) -> tuple[FileRef, ...]:
        session, manifest = self._session, self._current.manifest
        (bridge,) = manifest.bridges
        old = find_cache(session.store, bridge.space)
        if old is None:
            place = f"{session.store.uri}/embeddings/{bridge.space}"
            raise MissingFileError(place, "the vectors of the earlier encoder are gone", "run `strata run`")
        arguments: dict[str, Any] = {
            "named": named,
            "caches": (cache, old),
            "bridge": bridge,
            "encoder": self._current.query_encoder,
            "document_buckets": len(manifest.documents),
        }
        # No receipt: what the cache holds changes. What is chosen by it is remembered.
        tasks = [
            Task("weigh_texts", {"bucket": b}, partial(weigh_texts, bucket=b), arguments, remember=False)
            for b in range(cache.buckets)
        ]
        return tuple(output.files["weighed"] for output in session.outputs("migrate", tasks))

    def _workload(self) -> dict[str, Any] | None:
        """Past queries with their weights, encoded."""
        config = self._session.config
        uri = config.upgrade.workload
        if uri is None:
            return None
        queries = read_queries(uri, config.storage, dims=self._encoder.dims)
        vectors = query_vectors(self._session, "migrate", queries, self._encoder, place=uri)
        weights = queries.weights or (1.0,) * len(queries)
        return {"queries": write_query_vectors(self._session.store, vectors), "weights": weights}

    def _hits(self, workload: dict[str, Any] | None) -> tuple[FileRef, ...]:
        """What the workload looks into, by block of its queries."""
        if workload is None:
            return ()
        release = self._current.record
        count = workload["queries"].rows
        shared = {"manifest": release.manifest, "first_segments": self._old.first_segments, **workload}
        of = digest({"index": release.index, **workload})
        tasks = [
            Task(
                "look",
                {"of": of, "rows": [start, start + LOOKS_AT_ONCE]},
                partial(look_into_leaves, rows=(start, start + LOOKS_AT_ONCE)),
                shared,
            )
            for start in range(0, count, LOOKS_AT_ONCE)
        ]
        return tuple(output.files["hits"] for output in self._session.outputs("migrate", tasks))


LOOKS_AT_ONCE = 4096
"""Queries of a workload that one task answers."""
KEPT = (
    "documents",
    "vectors",
    "dead_letters",
    "dead_letters_by_reason",
    "dead_letter_files",
    "redrives",
    "plan",
    "estimate",
    "seconds_per_document",
)
"""Of the summary of the release before: what a backfill leaves as it is."""
