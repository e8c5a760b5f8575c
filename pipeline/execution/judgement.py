"""Judging an index before it is published: exact neighbours, how far a search looks, recall, nDCG and costs."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import structlog
import threadpoolctl
from numpy.typing import NDArray

from pipeline.artifacts import IndexManifest, SearchDefaults, SearchPoint
from pipeline.errors import DataError
from pipeline.evaluation.judging import (
    NEIGHBOURS,
    TUNING_QUERIES,
    curve_points,
    judge_against_exact,
    judge_against_qrels,
)
from pipeline.evaluation.queries import Queries, read_qrels, read_queries
from pipeline.evaluation.stage import (
    ExactNeighbours,
    measure_search,
    measure_setting,
    rank,
)
from pipeline.evaluation.tuning import depths_of, tune
from pipeline.execution.asking import query_vectors
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.neighbours import Exact, exact_neighbours
from pipeline.execution.runner import THREADS_PER_TASK
from pipeline.execution.session import Session
from pipeline.index.reader import IndexReader, Side
from pipeline.index.vectors import VectorSource
from pipeline.measures import least_near
from pipeline.postings import MOST_MARGIN, WANTED, Probing, Setting
from pipeline.storage import canonical_json

__all__ = ["Questions", "judge", "read_questions"]

FEWEST_TUNING_QUERIES = 50
"""With fewer queries to spare, document vectors tune, which lie nearer to the heads than texts of people do."""
CURVE_QUERIES = 200
"""Reported queries on which recall is measured at other settings."""


@dataclass(frozen=True)
class Questions:
    """Queries that people ask, encoded: they need nothing of the index."""

    vectors: NDArray[np.float32]
    """(q, d), those that are reported first, then those that only tune."""
    query_ids: tuple[str, ...]
    """Of the reported ones."""
    recall_queries: tuple[str, ...]
    qrels: Mapping[str, Mapping[str, float]]
    are_given: bool
    """Whether they came as vectors."""

    @property
    def reported(self) -> NDArray[np.float32]:
        """Vectors of the reported ones."""
        return self.vectors[: len(self.query_ids)]


StandIns = Callable[[int], tuple[NDArray[np.float32], Sequence[str | None]]]
"""Gives so many documents that stand in for queries, or fewer: vectors (n, d) and doc_ids."""


@dataclass(frozen=True)
class Judged:
    """Queries that a release is reported on."""

    vectors: NDArray[np.float32]
    query_ids: tuple[str, ...]
    own_documents: tuple[str | None, ...]
    """For a document that stands in as a query: the document, which does not count as its own neighbour."""
    recall_queries: tuple[str, ...]
    """Those held against exact search."""
    tuning: NDArray[np.float32]
    """(t, d) queries that choose how far a search looks."""
    tuning_documents: tuple[str | None, ...]
    """Of each the document that stands in, as `own_documents`."""
    qrels: Mapping[str, Mapping[str, float]]

    @classmethod
    def of_questions(cls, questions: Questions, stand_ins: StandIns) -> "Judged":
        """Queries that people ask; documents tune where none of them is to spare."""
        reported = len(questions.query_ids)
        spare = questions.vectors[reported:]
        tuning, names = (spare, [None] * len(spare)) if len(spare) else stand_ins(TUNING_QUERIES)
        return cls(
            vectors=questions.reported,
            query_ids=questions.query_ids,
            own_documents=(None,) * reported,
            recall_queries=questions.recall_queries,
            tuning=tuning,
            tuning_documents=tuple(names),
            qrels=questions.qrels,
        )

    @classmethod
    def of_documents(cls, stand_ins: StandIns, reported: int) -> "Judged":
        """Documents as queries, other ones than those that tune, as far as there are enough."""
        vectors, names = stand_ins(reported + TUNING_QUERIES)
        # In a corpus too small for both, the reported ones tune as well: there is nothing else.
        is_enough = len(vectors) >= reported + FEWEST_TUNING_QUERIES
        tuning = slice(reported, None) if is_enough else slice(-TUNING_QUERIES, None)
        numbers = tuple(str(i) for i in range(len(names[:reported])))
        return cls(
            vectors=vectors[:reported],
            query_ids=numbers,
            own_documents=tuple(names[:reported]),
            recall_queries=numbers,
            tuning=vectors[tuning],
            tuning_documents=tuple(names[tuning]),
            qrels={},
        )

    def subset(self, rows: Sequence[int]) -> "Judged":
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
        are_given=queries.vectors is not None,
    )


def judge(
    session: Session,
    questions: Questions | None,
    manifest: IndexManifest,
    source: VectorSource | None,
    stand_ins: StandIns,
) -> tuple[IndexManifest, dict[str, Any]]:
    """Choose how far a search looks on spare queries, then measure the index on the reported ones.

    Args:
        session: The run.
        questions: What `read_questions` found.
        manifest: The index.
        source: What it holds in the space of its encoder, as float32; None: what it has stored is taken.
        stand_ins: Gives documents that stand in for queries.
    """
    judged = _judged_queries(session, questions, stand_ins)
    asked = np.concatenate([judged.vectors, judged.tuning])
    return _measure_index(session, judged, exact_neighbours(session, manifest, asked, source), manifest)


def _judged_queries(session: Session, questions: Questions | None, stand_ins: StandIns) -> Judged:
    """The queries that an index is reported on and tuned by."""
    if questions is None:
        return Judged.of_documents(stand_ins, session.config.evaluation.sample_queries)
    return Judged.of_questions(questions, stand_ins)


def _measure_index(
    session: Session, judged: Judged, exact: Exact, manifest: IndexManifest
) -> tuple[IndexManifest, dict[str, Any]]:
    """Choose how far a search looks, then measure the index.

    Args:
        session: The run.
        judged: Queries.
        exact: Of those that are reported, then of those that tune, what an exact search finds.
        manifest: The index.

    Returns:
        The index with its defaults, under the name that its content has; figures for the summary.
    """
    # Threads change bits of products, and a bit of a distance can change what is chosen.
    reported = exact.of(slice(len(judged.vectors))).whole
    with session.timed("judge"), threadpoolctl.threadpool_limits(THREADS_PER_TASK):
        chosen, tried = _tuned(session, judged, exact.of(slice(len(judged.vectors), None)), manifest)
        _warn_of_a_miss(chosen, session.config.evaluation.target_recall)
        manifest = _identified(manifest.model_copy(update={"search": _defaults(chosen, tried)}))
        reader = IndexReader(session.store, manifest)
        numbers = _measure(reader, judged, reported)
    with session.timed("curve"), threadpoolctl.threadpool_limits(THREADS_PER_TASK):
        curve = _recall_curve(reader, judged, reported)
    return manifest, {
        **_rounded(numbers),
        "lists_at_most": chosen.probing.lists,
        "margin": manifest.search.margin,
        "rerank": chosen.rerank,
        "tuning_recall": round(chosen.recall, 4),
        "target_recall": session.config.evaluation.target_recall,
        "recall_curve": curve,
    }


def _warn_of_a_miss(chosen: Setting, target: float) -> None:
    if chosen.sure_recall < target:
        structlog.get_logger().warning(
            "target_recall_not_reached",
            target_recall=target,
            tuning_recall=round(chosen.recall, 4),
            standard_error=round(chosen.error, 4),
            hint="raise binarizer.bytes, or leave search.* to be chosen",
        )


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in numbers.items()}


def _recall_curve(
    reader: IndexReader, judged: Judged, exact: Sequence[ExactNeighbours]
) -> list[dict[str, float]]:
    """Recall and costs of reported queries at settings around the default, which is one of them."""
    place = {query: i for i, query in enumerate(judged.query_ids)}
    rows = [place[query] for query in judged.recall_queries[:CURVE_QUERIES]]
    asked = judged.subset(rows)
    truth = _truth(asked, [exact[i] for i in rows])
    own = any(name is not None for name in asked.own_documents)
    default = reader.manifest.search
    curve = []
    for point in curve_points(default):
        probing = Probing(point.lists, point.margin)
        rankings, costs = measure_setting(
            reader, asked.vectors, k=10 + own, probing=probing, rerank=point.rerank
        )
        numbers = costs | judge_against_exact(_without_self(asked, rankings), truth)
        setting = {"lists": point.lists, "margin": point.margin, "rerank": point.rerank}
        curve.append({**setting, **_rounded(numbers)})
    return curve


def _measure(reader: IndexReader, judged: Judged, exact: Sequence[ExactNeighbours]) -> dict[str, float]:
    own = any(name is not None for name in judged.own_documents)
    rankings, costs = measure_search(reader, judged.vectors, k=10 + own)
    found = _without_self(judged, rankings)
    truth = _truth(judged, exact)
    numbers = costs | judge_against_exact(found, {query: truth[query] for query in judged.recall_queries})
    if judged.qrels:
        deep = _without_self(judged, rank(reader, judged.vectors, k=NEIGHBOURS))
        numbers |= judge_against_qrels(found, deep, truth, judged.qrels)
    return numbers


def _tuned(
    session: Session, judged: Judged, exact: Exact, manifest: IndexManifest
) -> tuple[Setting, list[Setting]]:
    """The cheapest setting that finds the wanted share of true neighbours in each space; of the largest all that none beats."""
    reader = IndexReader(session.store, manifest)
    found = [
        (sum(one.part.live_rows for one in side.partitions), *_tuned_side(session, judged, own, reader, side))
        for side, own in zip(reader.sides(), exact.sides, strict=True)
    ]
    _, chosen, tried = max(found, key=lambda one: one[0])
    settings = [setting for _, setting, _ in found]
    probing = Probing(max(one.probing.lists for one in settings), max(one.probing.margin for one in settings))
    return replace(chosen, probing=probing, rerank=max(one.rerank for one in settings)), tried


def _tuned_side(
    session: Session, judged: Judged, exact: Sequence[ExactNeighbours], reader: IndexReader, side: Side
) -> tuple[Setting, list[Setting]]:
    wanted = [_as_near(one, own) for one, own in zip(exact, judged.tuning_documents, strict=True)]
    asked = [i for i, ids in enumerate(wanted) if ids]
    search = session.config.search
    if not asked:  # one document alone has no neighbour
        return Setting(Probing(search.lists or 1, MOST_MARGIN), depths_of(search)[0], 1.0, 0.0, 1.0, 0.0), []
    return tune(
        reader,
        side,
        judged.tuning[asked],
        [wanted[i] for i in asked],
        search,
        session.config.evaluation.target_recall,
    )


def _as_near(exact: ExactNeighbours, own: str | None) -> tuple[bytes, ...]:
    """vector_ids of the ten nearest and of what is as near as the tenth, but for a document's own."""
    rows = [row for row, name in enumerate(exact.doc_ids) if name != own]
    scores = [exact.scores[row] for row in rows]
    if not scores:
        return ()
    least = least_near(scores, WANTED)
    return tuple(exact.vector_ids[row] for row, score in zip(rows, scores, strict=True) if score >= least)


def _defaults(chosen: Setting, tried: Sequence[Setting]) -> SearchDefaults:
    """What a release says of how far its searches look."""
    points = [_point(one) for one in tried]
    return SearchDefaults(**_point(chosen).model_dump(), curve=tuple(points))


def _point(one: Setting) -> SearchPoint:
    return SearchPoint(
        lists=one.probing.lists,
        margin=min(one.probing.margin, MOST_MARGIN),
        rerank=one.rerank,
        tuning_recall=round(one.recall, 6),
        bytes=round(one.bytes),
    )


def _identified(manifest: IndexManifest) -> IndexManifest:
    """The manifest under the hash of its content."""
    content = canonical_json(manifest.model_dump(mode="json", exclude={"index"}))
    return manifest.model_copy(update={"index": hashlib.sha256(content).hexdigest()[:32]})


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


def _truth(judged: Judged, exact: Sequence[ExactNeighbours]) -> dict[str, dict[str, float]]:
    return _without_self(judged, [dict(zip(one.doc_ids, one.scores, strict=True)) for one in exact])


def _without_self(judged: Judged, rankings: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of each query, scores of its documents but the one that stands in for it."""
    return {
        query: {doc: ranking[doc] for doc in [doc for doc in ranking if doc != own][:NEIGHBOURS]}
        for query, own, ranking in zip(judged.query_ids, judged.own_documents, rankings, strict=True)
    }
