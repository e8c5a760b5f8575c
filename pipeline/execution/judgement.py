"""Judging an index before it is published: exact neighbours, the number of probes, recall, nDCG and costs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import postings
from pipeline.artifacts import IndexManifest, SearchDefaults, StageOutput
from pipeline.errors import DataError
from pipeline.evaluation.judging import judge_against_exact, judge_against_qrels
from pipeline.evaluation.queries import Queries, read_qrels, read_queries
from pipeline.evaluation.stage import (
    ExactNeighbours,
    encode_query_texts,
    exact_bucket,
    measure_search,
    merge_exact,
    read_query_vectors,
    write_query_vectors,
)
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.session import Session
from pipeline.execution.work import Task
from pipeline.index.reader import IndexReader
from pipeline.index.stage import VectorSource, sample_vectors
from pipeline.storage import canonical_json

__all__ = ["judge"]

TUNING_QUERIES = 200
"""Document vectors on which the number of probes is chosen; never the queries that are reported."""
NEIGHBOURS = 100
"""Depth of the exact rankings: recall@100 needs it."""


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


def judge(
    session: Session,
    encoder: EncoderInForce,
    manifest: IndexManifest,
    source: VectorSource,
    trained: StageOutput,
) -> tuple[IndexManifest, dict[str, Any]]:
    """Choose the number of probes on document vectors, then measure the index on the queries."""
    judged = _judged_queries(session, encoder, source)
    tuning, _ = sample_vectors(session.store, source, TUNING_QUERIES, from_end=True)
    asked = write_query_vectors(session.store, np.concatenate([judged.vectors, tuning]))
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
    files = [output.files["exact"] for output in session.outputs("judge", tasks)]
    with session.timed("judge"):
        exact = merge_exact(session.store, files, asked.rows, depth=NEIGHBOURS + 1)
        probes = session.config.search.probes or _tuned_probes(
            session, tuning, exact[len(judged.vectors) :], manifest
        )
        manifest = _identified(
            manifest.model_copy(
                update={"search": SearchDefaults(probes=probes, rerank=manifest.search.rerank)}
            )
        )
        reader = IndexReader(session.store, manifest)
        rankings, costs = measure_search(reader, judged.vectors, k=NEIGHBOURS + 1)
        found = _without_self(judged, rankings)
        truth = _without_self(judged, [list(e.doc_ids) for e in exact[: len(judged.vectors)]])
        numbers = judge_against_exact(found, {q: truth[q] for q in judged.recall_queries})
        if judged.qrels:
            numbers |= judge_against_qrels(found, truth, judged.qrels)
    rounded = {name: round(value, 4) for name, value in (numbers | costs).items()}
    return manifest, {**rounded, "probes": probes, "rerank": manifest.search.rerank}


def _tuned_probes(
    session: Session, tuning: NDArray[np.float32], exact: Sequence[ExactNeighbours], manifest: IndexManifest
) -> int:
    """Fewest probes that reach the lists of the wanted share of true neighbours; a query's own list does not count."""
    heads = IndexReader(session.store, manifest).heads()
    ranks = []
    for distances, neighbours in zip(postings.head_distances(tuning, heads), exact, strict=True):
        rank_of = np.empty(len(heads), dtype=np.int64)
        rank_of[np.argsort(distances, kind="stable")] = np.arange(len(heads))
        ranks.append(rank_of[list(neighbours.list_nos[1:11])])
    return postings.probes_for_coverage(np.concatenate(ranks), session.config.search.target_coverage)


def _identified(manifest: IndexManifest) -> IndexManifest:
    """The manifest under the hash of its content."""
    content = canonical_json(manifest.model_dump(mode="json", exclude={"index"}))
    return manifest.model_copy(update={"index": hashlib.sha256(content).hexdigest()[:32]})


def _judged_queries(session: Session, encoder: EncoderInForce, source: VectorSource) -> _Judged:
    evaluation = session.config.evaluation
    if evaluation.queries is None:
        return _document_queries(session, source)
    queries = read_queries(evaluation.queries, session.config.storage)
    qrels = read_qrels(evaluation.qrels, session.config.storage) if evaluation.qrels is not None else {}
    judged = [q for q in queries.query_ids if q in qrels]
    if qrels and not judged:
        problem = f"none of its {len(qrels)} judged queries is among those of {evaluation.queries}"
        raise DataError(str(evaluation.qrels), problem, "make query-id agree with query_id")
    recall = sorted(judged or queries.query_ids, key=lambda q: hashlib.sha256(q.encode()).digest())
    recall = recall[: evaluation.sample_queries]
    wanted = {*recall, *judged}
    kept = queries.subset([i for i, q in enumerate(queries.query_ids) if q in wanted])
    vectors = _query_vectors(session, kept, encoder)
    return _Judged(vectors, kept.query_ids, (None,) * len(kept), tuple(recall), {q: qrels[q] for q in judged})


def _document_queries(session: Session, source: VectorSource) -> _Judged:
    """Document vectors as queries, other ones than those that tune."""
    wanted = session.config.evaluation.sample_queries
    vectors, doc_ids = sample_vectors(session.store, source, wanted + TUNING_QUERIES, from_end=True)
    vectors, names = vectors[:wanted], tuple(doc_ids[:wanted])
    numbers = tuple(str(i) for i in range(len(names)))
    return _Judged(vectors, numbers, names, numbers, {})


def _query_vectors(session: Session, queries: Queries, encoder: EncoderInForce) -> NDArray[np.float32]:
    if queries.vectors is not None:
        return queries.vectors / np.linalg.norm(queries.vectors, axis=1, keepdims=True)
    inputs = {"texts": queries.texts, "encoder": encoder.fingerprint}
    task = Task("queries", inputs, partial(encode_query_texts, texts=queries.texts or ()))
    output = session.outputs("judge", [task], encoder=encoder)[0]
    return read_query_vectors(session.store, output.files["queries"])


def _without_self(judged: _Judged, rankings: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    pairs = zip(judged.query_ids, judged.own_documents, rankings, strict=True)
    return {query: [doc for doc in ranking if doc != own][:NEIGHBOURS] for query, own, ranking in pairs}
