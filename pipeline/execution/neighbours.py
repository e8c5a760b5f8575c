"""Exact neighbours of queries in every space that an index has vectors in: what its searches are held against."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from heapq import merge
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.artifacts import IndexManifest
from pipeline.evaluation.judging import NEIGHBOURS
from pipeline.evaluation.stage import (
    ExactNeighbours,
    exact_bucket,
    exact_segment,
    merge_exact,
    write_query_vectors,
)
from pipeline.execution.runner import THREADS_PER_TASK
from pipeline.execution.session import Session
from pipeline.execution.work import Task, digest
from pipeline.index.reader import IndexReader, Side
from pipeline.index.vectors import VectorSource

__all__ = ["Exact", "exact_neighbours"]

DEPTH = NEIGHBOURS + 1


@dataclass(frozen=True)
class Exact:
    """Exact rankings of queries, side by side: one for each space of an index, with scores that compare."""

    sides: tuple[tuple[ExactNeighbours, ...], ...]

    def of(self, queries: slice) -> "Exact":
        """The same for some of the queries."""
        return Exact(tuple(side[queries] for side in self.sides))

    @cached_property
    def whole(self) -> tuple[ExactNeighbours, ...]:
        """Of each query, the nearest documents of all sides."""
        return tuple(_merged(own) for own in zip(*self.sides, strict=True))


def _merged(found: Sequence[ExactNeighbours]) -> ExactNeighbours:
    if len(found) == 1:
        return found[0]
    rows = [zip(one.scores, one.doc_ids, one.vector_ids, strict=True) for one in found]
    best: dict[str, tuple[float, bytes]] = {}
    for score, doc_id, vector_id in merge(*rows, key=lambda row: -row[0]):
        best.setdefault(doc_id, (score, vector_id))
    kept = list(best.items())[:DEPTH]
    return ExactNeighbours(
        doc_ids=tuple(doc_id for doc_id, _ in kept),
        vector_ids=tuple(vector_id for _, (_, vector_id) in kept),
        scores=tuple(score for _, (score, _) in kept),
    )


def exact_neighbours(
    session: Session,
    manifest: IndexManifest,
    queries: NDArray[np.float32],
    source: VectorSource | None = None,
) -> Exact:
    """Search exactly in every space.

    Args:
        session: The job.
        manifest: The index.
        queries: (q, d) unit vectors of its encoder.
        source: Its vectors in that encoder's own space as float32; None: those that it holds.
    """
    sides = IndexReader(session.store, manifest).sides()
    # Threads change bits of products, and with them what is found.
    with threadpool_limits(THREADS_PER_TASK):
        return Exact(tuple(_of_side(session, manifest, side, queries, source) for side in sides))


def _of_side(
    session: Session,
    manifest: IndexManifest,
    side: Side,
    queries: NDArray[np.float32],
    source: VectorSource | None,
) -> tuple[ExactNeighbours, ...]:
    crossed = side.queries(queries)
    asked, gauge = write_query_vectors(session.store, crossed), side.gauge(queries, crossed)
    shared: dict[str, Any] = {"queries": asked, "depth": DEPTH}
    if side.crossing is None and source is not None:
        inputs = {"texts": digest(source.texts), "encoder": source.cache.encoder, **shared}
        tasks = [
            Task(
                "exact",
                {**inputs, "bucket": b, "condemned": source.condemned.get(b)},
                partial(exact_bucket, bucket=b),
                {"source": source, **shared},
            )
            for b in range(source.cache.buckets)
        ]
    else:
        numbers = [one.number for one in side.partitions]
        segments = [segment for number in numbers for segment in manifest.partitions[number].segments]
        tasks = [
            Task("exact", {**shared, "segment": one}, partial(exact_segment, segment=one), shared)
            for one in segments
        ]
    files = [output.files["exact"] for output in session.outputs("judge", tasks)]
    with session.timed("judge"):
        found = merge_exact(session.store, files, asked.rows, depth=DEPTH)
    if gauge is None:
        return tuple(found)
    return tuple(
        one.with_scores(gauge.of(np.array(one.scores, np.float32), query).tolist())
        for query, one in enumerate(found)
    )
