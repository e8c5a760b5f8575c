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

import numpy as np
import structlog

from pipeline.artifacts import AliasEntry, BridgeInfo, FileRef, IndexManifest, ReleaseRecord
from pipeline.config import Config
from pipeline.embedding.cache import Cache, find_cache, open_cache, read_redrives
from pipeline.errors import ConfigError, DataError, MissingFileError, QualityGateError
from pipeline.evaluation.judging import TUNING_QUERIES
from pipeline.evaluation.stage import write_query_vectors
from pipeline.execution.building import index_sizes
from pipeline.execution.encoders import GIVEN, EncoderInForce, check_encoder_of_queries, named_encoder
from pipeline.execution.encoding import encode_texts
from pipeline.execution.judgement import Judged, Questions, measure_index, read_questions
from pipeline.execution.ledger import Ledger
from pipeline.execution.neighbours import exact_neighbours
from pipeline.execution.publishing import publish_index
from pipeline.execution.session import Session, working
from pipeline.execution.work import StoreSpec, Task, digest, versions
from pipeline.index.reader import IndexReader
from pipeline.release import hold_root, read_alias, read_manifest, read_release
from pipeline.spaces import EncoderIdentity
from pipeline.storage import Store
from pipeline.upgrade.stage import (
    AskedOfBoth,
    SampledTexts,
    cutoff_for,
    judge_bridges,
    read_stand_ins,
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
        before = _Before.read(store)
        new = named_encoder(store, config, encoder)
        if before.query_encoder.fingerprint == new.fingerprint:
            return _unchanged(before.record, time.perf_counter() - start)
        before.check_can_change(new)
        with working(runner_of, ledger, config.corpus.identity) as (runner, memory):
            session = Session(config, spec, spec.open(), runner, lease, {}, memory, ledger)
            return _Upgrade(session, before, new).published()


def _unchanged(current: ReleaseRecord, seconds: float) -> dict[str, Any]:
    structlog.get_logger().info("nothing_changed", release=current.release)
    return {
        **current.summary,
        "release": current.release,
        "encoded": 0,
        "skipped": True,
        "seconds": {"total": round(seconds, 3)},
    }


@dataclass(frozen=True)
class _Before:
    """What serves as the upgrade starts."""

    alias: AliasEntry
    record: ReleaseRecord
    manifest: IndexManifest
    cache: Cache
    """Of the vectors that the index holds."""

    @classmethod
    def read(cls, store: Store) -> "_Before":
        alias = read_alias(store)
        if alias is None:
            raise MissingFileError(store.uri, "no release is published here", "run `strata run CONF` first")
        record = read_release(store, alias.release)
        manifest = read_manifest(store, record)
        place = f"release {record.release}"
        if manifest.encoder["model"] == GIVEN:
            problem = "has vectors that came with the corpus: there is nothing to embed anew"
            raise ConfigError(place, problem, "bring the new vectors, and run `strata run`")
        spaces = {partition.space for partition in manifest.partitions}
        if len(spaces) > 1:
            problem = f"has vectors of {len(spaces)} encoders, between which it migrates"
            raise DataError(place, problem, "finish `strata backfill`, or roll back, and upgrade then")
        cache = find_cache(store, spaces.pop())
        if cache is None:
            raise MissingFileError(store.uri, "the cache of its vectors is gone", "run `strata run`")
        return cls(alias, record, manifest, cache)

    @property
    def query_encoder(self) -> EncoderIdentity:
        return EncoderIdentity.model_validate(self.manifest.encoder)

    @property
    def vector_encoder(self) -> EncoderIdentity:
        bridge = self.manifest.bridge_to(self.cache.encoder)
        return self.query_encoder if bridge is None else EncoderIdentity.model_validate(bridge.encoder)

    def check_can_change(self, new: EncoderInForce) -> None:
        if new.fingerprint == self.vector_encoder.fingerprint:
            problem = f"already has vectors of {self.vector_encoder}, and queries of {self.query_encoder}"
            remedy = "for queries of the former roll back: `strata rollback`"
            raise ConfigError(f"release {self.record.release}", problem, remedy)

    @property
    def vectors(self) -> int:
        return sum(partition.rows for partition in self.manifest.partitions)


class _Upgrade:
    """One upgrade under way.

    Args:
        session: The job.
        before: What serves.
        new: The encoder that queries shall have.
    """

    def __init__(self, session: Session, before: _Before, new: EncoderInForce) -> None:
        self._session, self._before, self._new = session, before, new
        store, identity = session.store, new.fingerprint
        redrives = read_redrives(store, identity)
        self._cache = open_cache(store, identity, dims=new.dims, rows=before.vectors, redrives=redrives)

    def published(self) -> dict[str, Any]:
        """The summary of the release."""
        session, before = self._session, self._before
        # Before anything is embedded: a query that cannot be encoded ends the job.
        questions = read_questions(session, self._new)
        asked = self._asked_of_both(questions)
        sampled = self._sampled(questions)
        encoded = encode_texts(session, sampled, self._new, self._cache)
        task = self._judging(sampled, asked)
        (output,) = session.outputs("upgrade", [task])
        ladder = json.loads(session.store.read(output.files["ladder"].path))
        self._check(ladder)
        manifest = self._bridged(output.files)
        judged = self._judged(questions, sampled)
        asked_in_all = np.concatenate([judged.vectors, judged.tuning])
        exact = exact_neighbours(session, manifest, asked_in_all)
        manifest, measured = measure_index(session, judged, exact, manifest)
        session.seconds["total"] = round(sum(session.seconds.values()), 3)
        return publish_index(
            session, manifest, self._summary(manifest, measured, ladder, encoded), before.alias, before.record
        )

    # -------------------------------------------------------------------------------------------- queries

    def _asked_of_both(self, questions: Questions | None) -> AskedOfBoth | None:
        """The same questions as they are asked now, in the space of the vectors, and as the new encoder asks them."""
        if questions is None:
            return None
        session = self._session
        old = read_questions(session, self._old_encoder())
        assert old is not None  # noqa: S101 - the same files
        (side,) = IndexReader(session.store, self._before.manifest).sides()
        return AskedOfBoth(
            new=write_query_vectors(session.store, questions.vectors),
            old=write_query_vectors(session.store, side.queries(old.vectors)),
            query_ids=questions.query_ids,
            qrels=questions.qrels,
        )

    def _old_encoder(self) -> EncoderInForce:
        """The one that queries have now, as it is configured."""
        config, manifest = self._session.config, self._before.manifest
        name = self._before.query_encoder.name
        check_encoder_of_queries(config, manifest, name)
        return named_encoder(self._session.store, config, name)

    # -------------------------------------------------------------------------------------------- sample

    def _sampled(self, questions: Questions | None) -> tuple[FileRef, ...]:
        session, before = self._session, self._before
        qrels = questions.qrels if questions is not None else {}
        wanted = frozenset(doc for grades in qrels.values() for doc in grades)
        share = session.config.upgrade.sample_documents / max(1, before.vectors)
        arguments: dict[str, Any] = {
            "cutoff": cutoff_for(share),
            "wanted": wanted,
            "buckets": self._cache.buckets,
        }
        inputs = {**arguments, "cutoff": arguments["cutoff"].hex(), "wanted": sorted(wanted)}
        tasks = [
            Task("sample", {**inputs, "documents": ref}, partial(sample_texts, documents=ref), arguments)
            for ref in before.manifest.documents
        ]
        return tuple(output.files["texts"] for output in session.outputs("sample", tasks))

    def _judging(self, sampled: tuple[FileRef, ...], asked: AskedOfBoth | None) -> Task:
        config, before = self._session.config, self._before
        arguments: dict[str, Any] = {
            "encoders": (self._new.space, before.vector_encoder),
            "asked": asked,
            "sampled": SampledTexts(sampled, before.vectors),
            "config": config.upgrade,
            "seed": config.seed,
        }
        caches = self._cache, before.cache
        inputs = {
            **arguments,
            "asked": None if asked is None else vars(asked),
            "sampled": {"texts": digest(sampled), "corpus": before.vectors},
            "redrives": [cache.generation for cache in caches],
        }
        return Task("upgrade", inputs, partial(judge_bridges, caches=caches, **arguments))

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
            if name not in NEVER_NAMED and rung[metric]["gain"][0] >= -tolerance
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
            encoder=old.model_dump(mode="json"), kind=card["kind"], files=(files["bridge"], files["weights"])
        )
        return self._before.manifest.model_copy(
            update={
                "encoder": self._new.identity,
                "encoder_settings": self._new.settings,
                "dims": self._new.dims,
                "bridges": (bridge,),
            }
        )

    def _judged(self, questions: Questions | None, sampled: tuple[FileRef, ...]) -> Judged:
        """Queries that the index is measured and its search is tuned on."""
        reported = 0 if questions is not None else self._session.config.evaluation.sample_queries
        count = reported + TUNING_QUERIES
        vectors, names = read_stand_ins(self._session.store, sampled, self._cache, count)
        if questions is None:
            return Judged.of_documents(vectors, names, reported)
        return Judged.of_questions(questions, vectors)

    def _summary(
        self, manifest: IndexManifest, measured: Mapping[str, Any], ladder: Mapping[str, Any], encoded: int
    ) -> dict[str, Any]:
        kept = {
            name: self._before.record.summary[name] for name in KEPT if name in self._before.record.summary
        }
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
            "upgrade": _priced(ladder, self._session, encoded),
            "inputs": digest({"parent": self._before.record.index, "manifest": manifest.index}),
            "configuration": self._session.config.model_dump(mode="json"),
            "versions": versions(),
            "skipped": False,
        }


KEPT = (
    "documents", "vectors", "dead_letters", "dead_letters_by_reason", "dead_letter_files", "redrives", "plan", "estimate",
    "serving",
)  # fmt: skip
"""Of the summary of the release before: what an upgrade leaves as it is."""
NEVER_NAMED = frozenset({"naive swap", "status quo", "oracle ceiling"})
"""Rungs that nobody can climb to."""


def _priced(ladder: Mapping[str, Any], session: Session, encoded: int) -> dict[str, Any]:
    """The ladder with what its rungs cost, by what encoding took here: in seconds, and in money where hours have a price."""
    seconds = session.seconds.get("embed", 0.0) / encoded if encoded else None
    price = session.config.report.machines_price_per_hour
    rungs = []
    for rung in ladder["rungs"]:
        took = None if seconds is None else round(seconds * rung["documents_embedded"], 1)
        money = None if took is None or price is None else round(took / 3600 * price, 4)
        rungs.append({**rung, "seconds": took, "cost": money})
    return {**ladder, "rungs": rungs}
