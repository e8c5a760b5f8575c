"""`upgrade`: a new encoder for queries, a bridge to the vectors that are there, and a release of both if it finds no less.

Nothing of the index is rewritten. The new encoder embeds a sample of the documents, into its cache, where a later backfill finds
them.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from threadpoolctl import threadpool_limits

from pipeline.artifacts import BridgeInfo, FileRef, IndexManifest
from pipeline.config import Config
from pipeline.embedding.cache import Cache, find_cache, open_cache, read_redrives
from pipeline.errors import ConfigError, MissingFileError, QualityGateError
from pipeline.evaluation.stage import write_query_vectors
from pipeline.execution.building import index_sizes
from pipeline.execution.current import Current, skipped
from pipeline.execution.encoders import GIVEN, EncoderInForce, check_encoder_of_queries, named_encoder
from pipeline.execution.encoding import encode_texts
from pipeline.execution.estimates import check_fits, migration_memory, sized
from pipeline.execution.flows import inputs_key, provenance
from pipeline.execution.judgement import Questions, judge, read_questions
from pipeline.execution.ledger import Ledger
from pipeline.execution.publishing import publish_index
from pipeline.execution.runner import THREADS_PER_TASK
from pipeline.execution.session import Session, working
from pipeline.execution.standins import documents_as_queries
from pipeline.execution.work import StoreSpec, Task, digest
from pipeline.index.reader import IndexReader
from pipeline.release import hold_root, read_plan
from pipeline.spaces import EncoderIdentity
from pipeline.storage import Store
from pipeline.upgrade.stage import (
    AskedOfBoth,
    SampledTexts,
    cutoff_for,
    judge_bridges,
    sample_texts,
)

__all__ = ["upgrade"]


def upgrade(
    config: Config,
    spec: StoreSpec,
    runner_of: Callable[[], Any],
    ledger: Ledger | None = None,
    *,
    encoder: str,
) -> dict[str, Any]:
    """Let queries of a new encoder search the vectors of the current release, if that finds no less.

    Args:
        config: Names the root, the encoders, the queries and judgments.
        spec: The root.
        runner_of: Gives a context manager of a Runner.
        ledger: Filled as the job goes on, for whoever records how it ended.
        encoder: Name of the new encoder.

    Returns:
        The summary that the job prints, with the ladder.

    Raises:
        QualityGateError: Across the bridge less is found than before, beyond the tolerance; the message names what would pass.
        ConfigError: The encoder is not configured, or there are no texts to embed.
        PublishConflictError: Another job published meanwhile.
        RootBusyError: Another job holds the root.
    """
    start = time.perf_counter()
    ledger = ledger if ledger is not None else Ledger()
    store = spec.open()
    with hold_root(store, "upgrade", config.lease) as lease:
        current = Current.read(store)
        new = named_encoder(store, config, encoder)
        if current.query_encoder.fingerprint == new.fingerprint:
            structlog.get_logger().info("nothing_changed", release=current.record.release)
            return skipped(current.record, time.perf_counter() - start, encoded=0)
        before = _Before.of(store, current)
        before.check_can_change(config, new)
        plan = read_plan(store, current.manifest.plan)
        settled, _ = sized(plan, config, dims=new.dims)
        expected = migration_memory(
            plan, settled, dims=(new.dims, before.cache.dims), text_buckets=before.cache.buckets
        )
        check_fits(expected, settled)
        redrives = read_redrives(store, new.fingerprint)
        inputs = inputs_key(settled, plan, new, None, redrives=len(redrives))
        with working(runner_of, ledger, config.corpus.identity) as (runner, memory):
            session = Session(config, spec, spec.open(), runner, lease, expected, memory, ledger)
            return _Upgrade(session, before, new, inputs).published()


@dataclass(frozen=True)
class _Before:
    """What serves as the upgrade starts, all of it in one space."""

    current: Current
    cache: Cache
    """Of the vectors that the index holds."""

    @classmethod
    def of(cls, store: Store, current: Current) -> "_Before":
        """Of a release whose vectors an encoder of ours made.

        Raises:
            ConfigError: Its vectors came with the corpus, are of several encoders, or an earlier version of strata built it.
        """
        manifest, place = current.manifest, current.place
        if manifest.encoder["model"] == GIVEN:
            problem = "has vectors that came with the corpus: there is nothing to embed anew"
            raise ConfigError(place, problem, "bring the new vectors, and run `strata run`")
        spaces = {partition.space for partition in manifest.partitions}
        if len(spaces) > 1:
            problem = f"has vectors of {len(spaces)} encoders, between which it migrates"
            raise ConfigError(place, problem, "finish `strata backfill`, or roll back, and upgrade then")
        if manifest.cuts and manifest.partition_tree is None:
            problem = "was built by a version of strata that did not keep the tree of its partitions"
            raise ConfigError(place, problem, "run `strata run` once, and upgrade then")
        cache = find_cache(store, spaces.pop())
        if cache is None:
            raise MissingFileError(store.uri, "the cache of its vectors is gone", "run `strata run`")
        return cls(current, cache)

    @property
    def vector_encoder(self) -> EncoderIdentity:
        """Encoder of the vectors: that of the queries, unless a bridge leads to them."""
        bridge = self.current.manifest.bridge_to(self.cache.encoder)
        return (
            self.current.query_encoder if bridge is None else EncoderIdentity.model_validate(bridge.encoder)
        )

    def check_can_change(self, config: Config, new: EncoderInForce) -> None:
        """Refuse what is a rollback, what would cut documents anew, and queries that nobody can encode twice.

        Raises:
            ConfigError: The message says what to do.
        """
        place, old = self.current.place, self.vector_encoder
        if new.fingerprint == old.fingerprint:
            problem = f"already has vectors of {old}, and queries of {self.current.query_encoder}"
            raise ConfigError(place, problem, "for queries of the former roll back: `strata rollback`")
        if config.corpus.chunk is not None and config.corpus.chunk.tokenizer is None:
            problem = f"documents are cut by the tokenizer of the encoder in force, so that {new.space.name} would cut them anew"
            remedy = f"set `corpus.chunk.tokenizer: {old.name}`, and run `strata run` once"
            raise ConfigError("corpus.chunk", problem, remedy)


class _Upgrade:
    """One upgrade under way.

    Args:
        session: The job.
        before: What serves.
        new: The encoder that queries shall have.
        inputs: What a run with that encoder would name its inputs: it finds nothing to do.
    """

    def __init__(self, session: Session, before: _Before, new: EncoderInForce, inputs: str) -> None:
        self._session, self._before, self._new, self._inputs = session, before, new, inputs
        store, identity = session.store, new.fingerprint
        redrives = read_redrives(store, identity)
        self._cache = open_cache(
            store, identity, dims=new.dims, rows=before.current.vectors, redrives=redrives
        )

    def published(self) -> dict[str, Any]:
        """The summary of the release."""
        session, before = self._session, self._before
        # Before anything is embedded: a query that cannot be encoded ends the job.
        questions = read_questions(session, self._new)
        asked = self._asked_of_both(questions)
        sampled = self._sampled(questions)
        encoded = encode_texts(session, sampled, self._new, self._cache, rows=before.current.vectors)
        task = self._judging(sampled, asked)
        (output,) = session.outputs("upgrade", [task])
        ladder = json.loads(session.store.read(output.files["ladder"].path))
        self._check(ladder)
        manifest = self._bridged(output.files)
        stand_ins = partial(documents_as_queries, session, manifest.documents, self._cache)
        manifest, measured = judge(session, questions, manifest, None, stand_ins)
        self._check_whole(measured)
        session.seconds["total"] = round(sum(session.seconds.values()), 3)
        summary = self._summary(manifest, measured, ladder, encoded)
        return publish_index(session, manifest, summary, before.current)

    # -------------------------------------------------------------------------------------------- queries

    def _asked_of_both(self, questions: Questions | None) -> AskedOfBoth | None:
        """The same questions as they are asked now, in the space of the vectors, and as the new encoder asks them."""
        if questions is None:
            return None
        session = self._session
        if questions.are_given:
            place = str(session.config.evaluation.queries)
            problem = "has vectors, and nobody knows which encoder made them"
            raise ConfigError(place, problem, "give the texts of the queries: both encoders have to ask")
        old = read_questions(session, self._old_encoder())
        assert old is not None  # noqa: S101 - the same files
        (side,) = IndexReader(session.store, self._before.current.manifest).sides()
        # Threads change bits of products.
        with threadpool_limits(THREADS_PER_TASK):
            crossed = side.queries(old.vectors)
        return AskedOfBoth(
            new=write_query_vectors(session.store, questions.vectors),
            old=write_query_vectors(session.store, crossed),
            query_ids=questions.query_ids,
            qrels=questions.qrels,
        )

    def _old_encoder(self) -> EncoderInForce:
        """The one that queries have now, as it is configured."""
        config, manifest = self._session.config, self._before.current.manifest
        name = self._before.current.query_encoder.name
        check_encoder_of_queries(config, manifest, name)
        return named_encoder(self._session.store, config, name)

    # -------------------------------------------------------------------------------------------- sample

    def _sampled(self, questions: Questions | None) -> tuple[FileRef, ...]:
        session, before = self._session, self._before
        qrels = questions.qrels if questions is not None else {}
        wanted = frozenset(doc for grades in qrels.values() for doc in grades)
        share = session.config.upgrade.sample_documents / max(1, before.current.vectors)
        arguments: dict[str, Any] = {
            "cutoff": cutoff_for(share),
            "wanted": wanted,
            "buckets": self._cache.buckets,
        }
        of = digest({**arguments, "cutoff": arguments["cutoff"].hex(), "wanted": sorted(wanted)})
        tasks = [
            Task("sample", {"of": of, "documents": ref}, partial(sample_texts, documents=ref), arguments)
            for ref in before.current.manifest.documents
        ]
        return tuple(output.files["texts"] for output in session.outputs("sample", tasks))

    def _judging(self, sampled: tuple[FileRef, ...], asked: AskedOfBoth | None) -> Task:
        config, before = self._session.config, self._before
        largest = max(before.current.manifest.partitions, key=lambda one: one.rows)
        codes = largest.codes.binarizer
        arguments: dict[str, Any] = {
            "encoders": (self._new.space, before.vector_encoder),
            "cascade_depths": config.upgrade.cascade_depths,
            "asked": asked,
            "sampled": SampledTexts(sampled, before.current.vectors, codes),
            "seed": config.seed,
        }
        caches = self._cache, before.cache
        inputs = {
            **arguments,
            "asked": None if asked is None else vars(asked),
            "sampled": {"texts": digest(sampled), "corpus": before.current.vectors, "codes": codes},
            "redrives": [cache.generation for cache in caches],
        }
        call = partial(judge_bridges, caches=caches, **arguments)
        return Task("upgrade", inputs, call, ends_worker=True)

    # -------------------------------------------------------------------------------------------- index

    def _check(self, ladder: Mapping[str, Any]) -> None:
        """Refuse a bridge across which less is found than is found now, beyond the tolerance."""
        metric, tolerance = str(ladder["judged_by"]), self._session.config.upgrade.tolerance
        rungs = {rung["name"]: rung for rung in ladder["rungs"]}
        bridged = rungs[ladder["chosen"]][metric]
        if bridged["gain"][0] >= -tolerance:
            return
        passing = [
            f"{name} ({rung[metric]['value']:.4f}, {rung['documents_embedded']:,} documents embedded)"
            for name, rung in rungs.items()
            if name.startswith(REACHABLE) and rung[metric]["gain"][0] >= -tolerance
        ]
        self._session.ledger.facts["judged"] = {"upgrade": dict(ladder)}
        gain, low, high = bridged["gain"]
        problem = (
            f"not published: across the best bridge ({ladder['chosen']}) {metric} is {bridged['value']:.4f}, "
            f"{-gain:.4f} below the status quo (interval of the difference [{low:+.4f}, {high:+.4f}]), "
            f"upgrade.tolerance allows {tolerance:g}"
        )
        remedy = f"what would pass: {passing[0]}" if passing else "no rung of the ladder would pass"
        raise QualityGateError(
            f"upgrade to {self._new.label}", problem, f"the current release stays; {remedy}"
        )

    def _bridged(self, files: Mapping[str, FileRef]) -> IndexManifest:
        """The same partitions for queries of the new encoder."""
        old = self._before.vector_encoder
        card = json.loads(self._session.store.read(files["bridge"].path))
        bridge = BridgeInfo(
            encoder=old.model_dump(mode="json"),
            kind=card["kind"],
            files=(files["bridge"], files["weights"], files["ladder"]),
        )
        return self._before.current.manifest.model_copy(
            update={
                "encoder": self._new.identity,
                "encoder_settings": self._new.settings,
                "dims": self._new.dims,
                "bridges": (bridge,),
            }
        )

    def _check_whole(self, measured: Mapping[str, Any]) -> None:
        """The same on the whole index, where a sample of the documents leaves too little to go wrong."""
        before, tolerance = self._before.current.record.summary, self._session.config.upgrade.tolerance
        if "ndcg_at_10" not in measured or "ndcg_at_10" not in before:
            return
        was, found = float(str(before["ndcg_at_10"])), float(measured["ndcg_at_10"])
        if found < was - tolerance:
            problem = (
                f"not published: nDCG@10 of the whole index is {found:.4f} across the bridge, {was:.4f} as it is now, "
                f"upgrade.tolerance allows {tolerance:g} less"
            )
            raise QualityGateError(f"upgrade to {self._new.label}", problem, "the current release stays")

    def _summary(
        self, manifest: IndexManifest, measured: Mapping[str, Any], ladder: Mapping[str, Any], encoded: int
    ) -> dict[str, Any]:
        kept = self._before.current.kept(KEPT)
        return {
            **kept,
            "index": manifest.index,
            "added": 0,
            "changed": 0,
            "removed": 0,
            "encoded": encoded,
            "encoder": self._new.label,
            "vectors_of": str(self._before.vector_encoder.name),
            **index_sizes(manifest),
            **measured,
            "upgrade": self._priced(ladder, encoded),
            "seconds_per_document": self._seconds_per_document(encoded),
            "inputs": self._inputs,
            "made_of": digest({"parent": self._before.current.record.index, "inputs": self._inputs}),
            **provenance(self._session.config),
            "skipped": False,
        }

    def _seconds_per_document(self, encoded: int) -> float | None:
        """What embedding one took here; None where too few were embedded to tell."""
        seconds = self._session.seconds.get("embed", 0.0)
        return round(seconds / encoded, 6) if encoded >= FEWEST_TIMED else None

    def _priced(self, ladder: Mapping[str, Any], encoded: int) -> dict[str, Any]:
        """The ladder with what its rungs cost in seconds, and in money where hours have a price."""
        seconds, price = (
            self._seconds_per_document(encoded),
            self._session.config.report.machines_price_per_hour,
        )
        rungs = []
        for rung in ladder["rungs"]:
            took = None if seconds is None else round(seconds * rung["documents_embedded"], 1)
            money = None if took is None or price is None else round(took / 3600 * price, 4)
            rungs.append({**rung, "seconds": took, "cost": money})
        return {**ladder, "rungs": rungs}


FEWEST_TIMED = 50
KEPT = (
    "documents", "vectors", "dead_letters", "dead_letters_by_reason", "dead_letter_files", "redrives", "plan", "estimate",
    "serving",
)  # fmt: skip
"""Of the summary of the release before: what an upgrade leaves as it is."""
REACHABLE = ("cascade", "backfill", "full")
"""Beginnings of the names of rungs that a search or a job of ours climbs to."""
