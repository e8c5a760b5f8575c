"""Judging an index before it is published: exact neighbours, the number of probes, recall, nDCG and costs."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import structlog
import threadpoolctl
from numpy.typing import NDArray

from pipeline import postings
from pipeline.artifacts import FileRef, IndexManifest, SearchDefaults
from pipeline.errors import DataError
from pipeline.evaluation.judging import (
    NEIGHBOURS,
    TUNING_QUERIES,
    judge_against_exact,
    judge_against_qrels,
    probe_ladder,
)
from pipeline.evaluation.queries import Queries, read_qrels, read_queries
from pipeline.evaluation.stage import (
    ExactNeighbours,
    exact_bucket,
    measure_probes,
    measure_search,
    merge_exact,
    rank,
    write_query_vectors,
)
from pipeline.execution.asking import query_vectors
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.runner import THREADS_PER_TASK
from pipeline.execution.session import Session
from pipeline.execution.work import Task, digest
from pipeline.index.reader import IndexReader
from pipeline.index.stage import VectorSource, sample_vectors
from pipeline.storage import canonical_json

__all__ = ["Questions", "judge", "read_questions"]

FEWEST_TUNING_QUERIES = 50
"""With fewer queries to spare, document vectors tune, which lie nearer to the heads than texts of people do."""
CURVE_QUERIES = 200
"""Reported queries on which recall is measured at other numbers of probes."""


@dataclass(frozen=True)
class Questions:
    """Queries that people ask, encoded: they need nothing of the index."""

    vectors: NDArray[np.float32]
    """(q, d), those that are reported first, then those that only tune."""
    query_ids: tuple[str, ...]
    """Of the reported ones."""
    recall_queries: tuple[str, ...]
    qrels: Mapping[str, Mapping[str, float]]

    @property
    def reported(self) -> NDArray[np.float32]:
        """Vectors of the reported ones."""
        return self.vectors[: len(self.query_ids)]


@dataclass(frozen=True)
class _Judged:
    """Queries that a release is reported on."""

    vectors: NDArray[np.float32]
    query_ids: tuple[str, ...]
    own_documents: tuple[str | None, ...]
    """For a document that stands in as a query: the document, which does not count as its own neighbour."""
    recall_queries: tuple[str, ...]
    """Those held against exact search."""
    tuning: NDArray[np.float32]
    """(t, d) queries that choose the number of probes."""
    tuned_on_documents: bool
    qrels: Mapping[str, Mapping[str, float]]

    def subset(self, rows: Sequence[int]) -> "_Judged":
        """Some of the queries, by their rows."""
        return replace(
            self,
            vectors=self.vectors[list(rows)],
            query_ids=tuple(self.query_ids[i] for i in rows),
            own_documents=tuple(self.own_documents[i] for i in rows),
            recall_queries=tuple(self.query_ids[i] for i in rows),
        )


def read_questions(session: Session, encoder: EncoderInForce) -> Questions | None:
    """The configured queries, in their roles and with their vectors; None where documents stand in for queries.

    Raises:
        DataError: The queries or their judgments break their contract, or one cannot be encoded.
        ConfigError: They are texts, and no encoder is configured.
    """
    evaluation = session.config.evaluation
    if evaluation.queries is None:
        return None
    queries = _unfiltered(
        read_queries(evaluation.queries, session.config.storage, dims=encoder.dims), evaluation.queries
    )
    qrels = read_qrels(evaluation.qrels, session.config.storage) if evaluation.qrels is not None else {}
    judged = [q for q in queries.query_ids if q in qrels]
    if qrels and not judged:
        problem = f"none of its {len(qrels)} judged queries is among those of {evaluation.queries}"
        raise DataError(str(evaluation.qrels), problem, "make query-id agree with query_id")
    recall = sorted(judged or queries.query_ids, key=_by_hash)[: evaluation.sample_queries]
    wanted = {*recall, *judged}
    spare = sorted({*queries.query_ids} - wanted, key=_by_hash)[:TUNING_QUERIES]
    spare = spare if len(spare) >= FEWEST_TUNING_QUERIES else []
    place = {query: i for i, query in enumerate(queries.query_ids)}
    reported = [query for query in queries.query_ids if query in wanted]
    return Questions(
        vectors=query_vectors(
            session,
            "judge",
            queries.subset([place[q] for q in [*reported, *spare]]),
            encoder,
            place=evaluation.queries,
        ),
        query_ids=tuple(reported),
        recall_queries=tuple(recall),
        qrels={query: qrels[query] for query in judged},
    )


def judge(
    session: Session,
    encoder: EncoderInForce,
    questions: Questions | None,
    manifest: IndexManifest,
    source: VectorSource,
    placed: Sequence[FileRef],
) -> tuple[IndexManifest, dict[str, Any]]:
    """Choose the number of probes on spare queries, then measure the index on the reported ones.

    Args:
        session: The run.
        encoder: Names the space of the vectors.
        questions: What `read_questions` found.
        manifest: The index.
        source: What it holds.
        placed: Files of `place_bucket`, in the order of the buckets.
    """
    judged = _judged_queries(session, questions, source)
    asked = write_query_vectors(session.store, np.concatenate([judged.vectors, judged.tuning]))
    inputs = {
        "texts": digest(source.texts),
        "encoder": encoder.fingerprint,
        "queries": asked,
        "depth": NEIGHBOURS + 1,
    }
    shared = {"source": source, "queries": asked, "depth": NEIGHBOURS + 1}
    tasks = [
        Task(
            "exact",
            {**inputs, "bucket": b, "placed": placed[b], "condemned": source.condemned.get(b)},
            partial(exact_bucket, bucket=b, placed=placed[b]),
            shared,
        )
        for b in range(source.cache.buckets)
    ]
    files = [output.files["exact"] for output in session.outputs("judge", tasks)]
    # Threads change bits of products, and a bit of a distance can change the number of probes.
    with session.timed("judge"), threadpoolctl.threadpool_limits(THREADS_PER_TASK):
        exact = merge_exact(session.store, files, asked.rows, depth=NEIGHBOURS + 1)
        probes = session.config.search.probes or _tuned_probes(
            session, judged, exact[len(judged.vectors) :], manifest
        )
        search = SearchDefaults(probes=probes, rerank=manifest.search.rerank)
        manifest = _identified(manifest.model_copy(update={"search": search}))
        reader = IndexReader(session.store, manifest)
        numbers = _measure(reader, judged, exact[: len(judged.vectors)])
    with session.timed("curve"), threadpoolctl.threadpool_limits(THREADS_PER_TASK):
        curve = _recall_curve(reader, judged, exact[: len(judged.vectors)])
    return manifest, {
        **_rounded(numbers),
        "probes": probes,
        "rerank": manifest.search.rerank,
        "recall_curve": curve,
    }


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in numbers.items()}


def _recall_curve(
    reader: IndexReader, judged: _Judged, exact: Sequence[ExactNeighbours]
) -> list[dict[str, float]]:
    """Recall and costs at numbers of probes around the default, at the depth that users search."""
    place = {query: i for i, query in enumerate(judged.query_ids)}
    rows = [place[query] for query in judged.recall_queries[:CURVE_QUERIES]]
    asked = judged.subset(rows)
    truth = _without_self(asked, [list(exact[i].doc_ids) for i in rows])
    own = any(name is not None for name in asked.own_documents)
    curve = []
    lists = sum(partition.heads.rows for partition in reader.manifest.partitions)
    for probes in probe_ladder(reader.manifest.search.probes, lists=lists):
        rankings, costs = measure_probes(reader, asked.vectors, k=10 + own, probes=probes)
        numbers = costs | judge_against_exact(_without_self(asked, rankings), truth)
        curve.append({"probes": probes, **_rounded(numbers)})
    return curve


def _measure(reader: IndexReader, judged: _Judged, exact: Sequence[ExactNeighbours]) -> dict[str, float]:
    own = any(name is not None for name in judged.own_documents)
    rankings, costs = measure_search(reader, judged.vectors, k=10 + own)
    found = _without_self(judged, rankings)
    truth = _without_self(judged, [list(neighbours.doc_ids) for neighbours in exact])
    numbers = costs | judge_against_exact(found, {query: truth[query] for query in judged.recall_queries})
    if judged.qrels:
        deep = _without_self(judged, rank(reader, judged.vectors, k=NEIGHBOURS))
        numbers |= judge_against_qrels(found, deep, truth, judged.qrels)
    return numbers


def _tuned_probes(
    session: Session, judged: _Judged, exact: Sequence[ExactNeighbours], manifest: IndexManifest
) -> int:
    """Fewest probes that reach the lists of the wanted share of true neighbours, and hold the least number of rows."""
    heads = IndexReader(session.store, manifest).heads()
    first = 1 if judged.tuned_on_documents else 0  # a document is its own nearest neighbour
    ranks = []
    for distances, neighbours in zip(postings.head_distances(judged.tuning, heads), exact, strict=True):
        rank_of = np.empty(len(heads), dtype=np.int64)
        rank_of[np.argsort(distances, kind="stable")] = np.arange(len(heads))
        ranks.append(rank_of[np.array(neighbours.list_nos[first : first + 10], dtype=np.int64)])
    search = session.config.search
    rows = sum(partition.rows for partition in manifest.partitions)
    floor = min(len(heads), math.ceil(search.min_scan_rows * len(heads) / rows))
    return max(floor, postings.probes_for_coverage(np.concatenate(ranks), search.target_coverage))


def _identified(manifest: IndexManifest) -> IndexManifest:
    """The manifest under the hash of its content."""
    content = canonical_json(manifest.model_dump(mode="json", exclude={"index"}))
    return manifest.model_copy(update={"index": hashlib.sha256(content).hexdigest()[:32]})


def _judged_queries(session: Session, questions: Questions | None, source: VectorSource) -> _Judged:
    if questions is None:
        return _document_queries(session, source)
    reported = len(questions.query_ids)
    tuning = questions.vectors[reported:]
    is_spare = len(tuning) > 0
    if not is_spare:
        tuning, _ = sample_vectors(session.store, source, TUNING_QUERIES, from_end=True)
    return _Judged(
        vectors=questions.reported,
        query_ids=questions.query_ids,
        own_documents=(None,) * reported,
        recall_queries=questions.recall_queries,
        tuning=tuning,
        tuned_on_documents=not is_spare,
        qrels=questions.qrels,
    )


def _unfiltered(queries: Queries, uri: str) -> Queries:
    """Queries that are judged: exact neighbours are those in the whole corpus, which a filtered query does not ask for."""
    rows = [i for i, text in enumerate(queries.filters) if text is None]
    if not rows:
        raise DataError(
            uri, "has filtered queries only", "give queries without a filter to judge the index on"
        )
    if len(rows) < len(queries):
        structlog.get_logger().warning(
            "filtered_queries_not_judged", queries=len(queries) - len(rows), file=uri
        )
    return queries.subset(rows)


def _by_hash(query: str) -> bytes:
    return hashlib.sha256(query.encode()).digest()


def _document_queries(session: Session, source: VectorSource) -> _Judged:
    """Document vectors as queries, other ones than those that tune."""
    wanted = session.config.evaluation.sample_queries
    vectors, names = sample_vectors(session.store, source, wanted + TUNING_QUERIES, from_end=True)
    # In a corpus too small for both, the reported ones tune as well: there is nothing else.
    vectors, names, tuning = vectors[:wanted], names[:wanted], vectors[-TUNING_QUERIES:]
    numbers = tuple(str(i) for i in range(len(names)))
    return _Judged(vectors, numbers, tuple(names), numbers, tuning, tuned_on_documents=True, qrels={})


def _without_self(judged: _Judged, rankings: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    pairs = zip(judged.query_ids, judged.own_documents, rankings, strict=True)
    return {query: [doc for doc in ranking if doc != own][:NEIGHBOURS] for query, own, ranking in pairs}
