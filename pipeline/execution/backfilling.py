"""`backfill`: the leaves that gain most are embedded anew, and move into the space of the release's encoder.

Which leaves move is told once, from what the release and the caches hold as the backfill begins, and remembered by receipts: a
backfill that died goes on with the same ones.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from pipeline.artifacts import AliasEntry, FileRef, IndexManifest, Plan, ReleaseRecord
from pipeline.config import Config
from pipeline.embedding.cache import find_cache, open_cache, read_redrives
from pipeline.errors import ConfigError, MissingFileError
from pipeline.evaluation.queries import read_queries
from pipeline.execution.asking import query_vectors
from pipeline.execution.building import FittedTree, build_index, index_sizes
from pipeline.execution.documents import DocumentFiles
from pipeline.execution.encoders import EncoderInForce, check_encoder_of_queries, named_encoder
from pipeline.execution.encoding import encode_texts
from pipeline.execution.estimates import Serving, estimate, sized
from pipeline.execution.flows import inputs_key, provenance, workload_of
from pipeline.execution.judgement import judge, read_questions
from pipeline.execution.learning import Parent, binarizer_in_force, read_pairs
from pipeline.execution.ledger import Ledger
from pipeline.execution.migrating import OldSide
from pipeline.execution.publishing import publish_index
from pipeline.execution.session import BuildSession, working
from pipeline.execution.work import StoreSpec, Task, digest
from pipeline.index.batch import Batch, answer, routes_of
from pipeline.index.reader import IndexReader
from pipeline.index.vectors import VectorSource
from pipeline.postings import Probing
from pipeline.release import (
    hold_root,
    mark_plan_done,
    read_alias,
    read_manifest,
    read_plan,
    read_release,
    write_plan,
)
from pipeline.spaces import EncoderIdentity
from pipeline.storage import Store
from pipeline.tables import read_columns
from pipeline.upgrade.backfill import Chosen, DocumentBucket, sum_leaves, texts_to_embed, weigh_leaves
from pipeline.upgrade.ordering import LOOKED_AT, by_priority, smoothed_losses

__all__ = ["Budget", "backfill"]


@dataclass(frozen=True)
class Budget:
    """How many documents one backfill may embed."""

    documents: int | None = None
    fraction: float = 1.0
    """Of all vectors of the index, where no number is named."""

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """A number of documents, or a fraction of all: `20000`, `0.1`, `10%`.

        Raises:
            ConfigError: It is neither.
        """
        try:
            if text.endswith("%"):
                return cls(None, _fraction(float(text[:-1]) / 100))
            return cls(int(text)) if text.isdecimal() and int(text) else cls(None, _fraction(float(text)))
        except ValueError as error:
            problem = f"expected a number of documents or a fraction of them, found {text!r}"
            raise ConfigError("--budget", problem, "for example 20000, 0.1 or 10%") from error

    def of(self, vectors: int) -> int:
        """Documents, where the index has so many vectors."""
        return self.documents if self.documents is not None else int(self.fraction * vectors)


def _fraction(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError("not a fraction")
    return value


def backfill(
    config: Config,
    spec: StoreSpec,
    runner_of: Callable[[], Any],
    ledger: Ledger | None = None,
    *,
    budget: Budget,
    watch: bool = False,
) -> dict[str, Any]:
    """Embed the next leaves anew, best first, and publish a release in which they are in the new space.

    Args:
        config: Names the root, the encoders, the workload.
        spec: The root.
        runner_of: Gives a context manager of a Runner.
        ledger: Filled as the job goes on, for whoever records how it ended.
        budget: Documents to embed, at most.
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
    with hold_root(store, "backfill", config.lease) as lease:
        before = _Before.read(store)
        if not before.manifest.bridges:
            return _nothing_left(before, time.perf_counter() - start)
        work = _Work.prepared(config, store, before)
        write_plan(store, work.plan)
        with working(runner_of, ledger, config.corpus.identity) as (runner, memory):
            session = BuildSession(
                work.config, spec, spec.open(), runner, lease, work.expected_mb, memory, ledger
            )
            job = _Backfill(session, before, work, budget)
            summary = job.watched() if watch else job.published()
        mark_plan_done(store, work.plan)
    return summary


@dataclass(frozen=True)
class _Before:
    alias: AliasEntry
    record: ReleaseRecord
    manifest: IndexManifest

    @classmethod
    def read(cls, store: Store) -> "_Before":
        alias = read_alias(store)
        if alias is None:
            raise MissingFileError(store.uri, "no release is published here", "run `strata run CONF` first")
        record = read_release(store, alias.release)
        return cls(alias, record, read_manifest(store, record))

    @property
    def vectors(self) -> int:
        return sum(one.rows for one in self.manifest.partitions)


def _nothing_left(before: _Before, seconds: float) -> dict[str, Any]:
    structlog.get_logger().info("nothing_to_backfill", release=before.record.release)
    return {
        **before.record.summary,
        "release": before.record.release,
        "encoded": 0,
        "documents_embedded": 0,
        "fraction_new": 1.0,
        "skipped": True,
        "seconds": {"total": round(seconds, 3)},
    }


@dataclass(frozen=True)
class _Work:
    """What is known before any work."""

    config: Any
    plan: Plan
    encoder: EncoderInForce
    serving: Serving
    expected_mb: dict[str, int]
    inputs: str

    @classmethod
    def prepared(cls, config: Config, store: Store, before: _Before) -> "_Work":
        plan = read_plan(store, before.manifest.plan)
        name = str(before.manifest.encoder["name"])
        check_encoder_of_queries(config, before.manifest, name)
        encoder = named_encoder(store, config, name)
        settled, serving = sized(plan, config, dims=encoder.dims)
        cache = find_cache(store, encoder.fingerprint)
        buckets = cache.buckets if cache is not None else 1
        cpus = config.ray.num_cpus or os.cpu_count() or 1
        cost = estimate(plan, settled, dims=encoder.dims, text_buckets=buckets, cpus=cpus)
        redrives = read_redrives(store, encoder.fingerprint)
        inputs = inputs_key(settled, plan, encoder, workload_of(settled, plan), redrives=len(redrives))
        return cls(settled, plan, encoder, serving, cost.memory_by_stage, inputs)


@dataclass(frozen=True, eq=False)
class _Leaves:
    """Leaves in earlier spaces, by segment."""

    segment: NDArray[np.int64]
    leaf: NDArray[np.int64]
    rows: NDArray[np.int64]
    to_embed: NDArray[np.int64]
    judged: NDArray[np.int64]
    missed: NDArray[np.float64]


class _Backfill:
    """One backfill under way.

    Args:
        session: The job.
        before: What serves.
        work: What is known before any work.
        budget: Of documents.
    """

    def __init__(self, session: BuildSession, before: _Before, work: _Work, budget: Budget) -> None:
        self._session, self._before, self._work, self._budget = session, before, work, budget
        self._old = OldSide(before.manifest)
        encoder = work.encoder
        redrives = read_redrives(session.store, encoder.fingerprint)
        self._cache = open_cache(
            session.store, encoder.fingerprint, dims=encoder.dims, rows=before.vectors, redrives=redrives
        )

    def watched(self) -> dict[str, Any]:
        """What would move, and what it would cost."""
        leaves, order = self._in_order()
        moving = self._within_budget(leaves, order)
        seconds = self._session.config.report
        return {
            "release": self._before.record.release,
            "watched": True,
            "documents_embedded": 0,
            "documents_to_embed": int(leaves.to_embed[moving].sum()),
            "documents_that_move": int(leaves.rows[moving].sum()),
            "leaves": len(moving),
            "leaves_left": len(order) - len(moving),
            "fraction_new": self._fraction_new(self._old.rows),
            "fraction_after": self._fraction_new(self._old.rows - int(leaves.rows[moving].sum())),
            "currency": seconds.currency,
        }

    def published(self) -> dict[str, Any]:
        """The summary of the release."""
        session, before, work = self._session, self._before, self._work
        # Before anything is embedded: a query that cannot be encoded ends the job.
        questions = read_questions(session, work.encoder)
        asked = read_pairs(session, work.encoder, questions)
        leaves, order = self._in_order()
        chosen = _by_segment(leaves, self._within_budget(leaves, order))
        texts = self._texts(chosen)
        encoded = encode_texts(session, texts, work.encoder, self._cache)
        manifest = before.manifest
        settled = self._old.settled(
            session, manifest.documents, self._cache, chosen=chosen, condemned=manifest.condemned
        )
        documents = DocumentFiles(
            files=manifest.documents,
            texts=settled.texts,
            places=(),
            dead_letters=(),
            documents=manifest.num_documents,
            vectors=settled.vectors,
        )
        source = VectorSource(settled.texts, self._cache, work.plan.attributes)
        parent = Parent(before.record.release, manifest)

        def build(cut: FittedTree) -> IndexManifest:
            binarizer = binarizer_in_force(session, documents, source, work.encoder, parent, asked)
            return build_index(session, work.plan, work.encoder, documents, source, binarizer, cut)

        index = self._old.beside(session, work.plan, documents, source, settled.partitions, build)
        index = index.model_copy(update={"condemned": manifest.condemned})
        index, measured = judge(session, questions, index, source)
        left = sum(one.rows for one in settled.partitions)
        summary = {
            **_kept(before.record.summary),
            "index": index.index,
            "added": 0,
            "changed": 0,
            "removed": 0,
            "encoded": encoded,
            "documents_embedded": encoded,
            "documents_moved": self._old.rows - left,
            "fraction_new": self._fraction_new(left),
            "encoder": work.encoder.label,
            **index_sizes(index),
            **measured,
            "inputs": work.inputs,
            "serving": asdict(work.serving),
            **provenance(session.config),
            "skipped": False,
        }
        return publish_index(session, index, summary, before.alias, before.record)

    def _fraction_new(self, left: int) -> float:
        return round(1 - left / max(1, self._before.vectors), 6)

    # -------------------------------------------------------------------------------------------- what pays

    def _in_order(self) -> tuple[_Leaves, NDArray[np.int64]]:
        """Leaves, and the order in which it pays to move them."""
        leaves = self._leaves()
        losses = smoothed_losses(leaves.missed, leaves.judged)
        return leaves, by_priority(self._hits(leaves), losses, leaves.rows)

    def _within_budget(self, leaves: _Leaves, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leaves that move, in their order."""
        allowed = self._budget.of(self._before.vectors)
        spent = np.cumsum(leaves.to_embed[order])
        count = int(np.searchsorted(spent, allowed, side="right"))
        if not count:
            problem = f"allows {allowed:,} documents, and the next leaf has {int(spent[0]):,} to embed"
            raise ConfigError("--budget", problem, f"name {int(spent[0])} or more")
        return order[:count]

    def _leaves(self) -> _Leaves:
        session, manifest = self._session, self._before.manifest
        members = self._old.members(session, buckets=len(manifest.documents))
        weighed = [self._weighed(space, members) for space in sorted({one.space for one in manifest.bridges})]
        files = tuple(ref for of_space in weighed for ref in of_space)
        tasks = [
            Task(
                "leaves",
                {"of": digest(files), "segment": one.number},
                partial(sum_leaves, weighed=files, number=one.number),
            )
            for one in self._old.segments
        ]
        tables = [
            read_columns(session.store, output.files["leaves"].path)
            for output in session.outputs("migrate", tasks)
        ]
        columns = {
            name: np.concatenate([table[name].to_numpy() for table in tables])
            for name in ("leaf", "rows", "to_embed", "judged", "missed")
        }
        segment = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
        return _Leaves(segment=segment, **columns)

    def _weighed(self, space: str, members: tuple[FileRef, ...]) -> list[FileRef]:
        """What every bucket of documents tells of the leaves in one earlier space."""
        session, manifest, encoder = self._session, self._before.manifest, self._work.encoder
        bridge, old = manifest.bridge_to(space), find_cache(session.store, space)
        assert bridge is not None  # noqa: S101 - the space is that of a bridge
        if old is None:
            raise MissingFileError(
                session.store.uri, f"the cache of {space[:12]} is gone", "run `strata run`"
            )
        of = [one.number for one in self._old.segments if one.partition.space == space]
        arguments: dict[str, Any] = {
            "members": tuple(members[number] for number in of),
            "caches": (self._cache, old),
            "bridge": bridge,
            "encoder": EncoderIdentity.model_validate(manifest.encoder),
        }
        key = digest(
            {
                "members": arguments["members"],
                "bridge": bridge,
                "redrives": [self._cache.generation, old.generation],
                # What the caches hold changes; of one release it is told once.
                "release": self._before.record.release,
                "encoder": encoder.fingerprint,
            }
        )
        tasks = [
            Task(
                "weigh",
                {"of": key, "documents": ref, "bucket": number},
                partial(weigh_leaves, bucket=DocumentBucket(number, ref)),
                arguments,
            )
            for number, ref in enumerate(manifest.documents)
        ]
        return [output.files["leaves"] for output in session.outputs("migrate", tasks)]

    def _hits(self, leaves: _Leaves) -> NDArray[np.float64]:
        """Weight of past queries that look into each leaf."""
        config = self._session.config
        found = np.zeros(len(leaves.leaf))
        if config.upgrade.workload is None:
            return found
        uri = config.upgrade.workload
        queries = read_queries(uri, config.storage, dims=self._work.encoder.dims)
        vectors = query_vectors(self._session, "migrate", queries, self._work.encoder, place=uri)
        weights = np.array(queries.weights) if queries.weights else np.ones(len(queries))
        with self._session.timed("migrate"):
            for segment, leaf, weight in self._looks(vectors, weights):
                rows = np.flatnonzero(leaves.segment == segment)
                at = rows[np.searchsorted(leaves.leaf[rows], leaf)]
                np.add.at(found, at, weight)
        return found

    def _looks(self, vectors: NDArray[np.float32], weights: NDArray[np.float64]) -> Any:
        """Segments in earlier spaces, and of each the leaves that queries look into, with the weights of these."""
        manifest = self._before.manifest
        reader = IndexReader(self._session.store, manifest)
        rule = Probing(manifest.search.lists, manifest.search.margin)
        first = self._old.first_segments
        for side in reader.sides():
            if side.crossing is None:
                continue
            batch = Batch(side.queries(vectors), [None] * len(vectors), LOOKED_AT, rule)
            places = answer(batch, routes_of(reader, side, {None}), threads=1).places
            query, rank = np.nonzero(places >= 0)
            place, weight = places[query, rank], weights[query]
            for one in side.partitions:
                mine = np.flatnonzero(place >> 32 == one.number)
                segments, lists = one.part.leaves_of(place[mine] & 0xFFFFFFFF)
                for segment in np.unique(segments).tolist():
                    here = segments == segment
                    yield first[one.number] + segment, lists[here], weight[mine][here]

    # -------------------------------------------------------------------------------------------- what moves

    def _texts(self, chosen: Chosen) -> tuple[FileRef, ...]:
        session, manifest = self._session, self._before.manifest
        members = self._old.members(session, buckets=len(manifest.documents))
        arguments: dict[str, Any] = {"members": members, "chosen": chosen, "new": self._cache}
        key = digest(
            {
                "members": members,
                "chosen": {str(number): leaves.tolist() for number, leaves in chosen.items()},
                "buckets": self._cache.buckets,
            }
        )
        tasks = [
            Task(
                "moving",
                {"of": key, "documents": ref, "bucket": number},
                partial(texts_to_embed, bucket=DocumentBucket(number, ref)),
                arguments,
            )
            for number, ref in enumerate(manifest.documents)
        ]
        return tuple(output.files["texts"] for output in session.outputs("migrate", tasks))


def _by_segment(leaves: _Leaves, moving: NDArray[np.int64]) -> Chosen:
    return {
        int(number): np.sort(leaves.leaf[moving[leaves.segment[moving] == number]])
        for number in np.unique(leaves.segment[moving])
    }


KEPT = (
    "documents",
    "vectors",
    "dead_letters",
    "dead_letters_by_reason",
    "dead_letter_files",
    "redrives",
    "plan",
    "estimate",
)
"""Of the summary of the release before: what a backfill leaves as it is."""


def _kept(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in KEPT if name in summary}
