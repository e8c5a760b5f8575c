"""The ladder of an upgrade: what new queries find, rung by rung, from a naive swap to a full backfill.

Every rung is searched exactly, on the same queries and documents, so that what differs is the spaces alone.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.spaces.bridges import Bridge, normalized, slerp
from pipeline.spaces.calibration import Calibration
from pipeline.upgrade.choosing import Choice
from pipeline.upgrade.closed import complete_orthogonally
from pipeline.upgrade.exam import DEPTH, TOP, Exam, Rung
from pipeline.upgrade.heads import StoredCodes, find_by_codes
from pipeline.upgrade.ranking import ranked_by, scores_of

__all__ = ["FULL", "NAIVE", "ORACLE", "STATUS_QUO", "cascade", "climb", "half_migrated"]

NAIVE, STATUS_QUO, FULL, ORACLE = "naive swap", "status quo", "full backfill", "oracle ceiling"


def climb(
    exam: Exam,
    choice: Choice,
    *,
    depths: Sequence[int],
    order: NDArray[np.int64],
    stored: StoredCodes | None = None,
) -> Iterator[Rung]:
    """Each rung: first what embeds no document anew, then cascades and backfills, then what nothing goes beyond.

    Args:
        exam: What is asked, of what.
        choice: Bridges, and what goes with the best of them.
        depths: Candidates of the cascades.
        order: (n,) documents in the order of their backfill.
        stored: Codes of the documents, and the compatible head; None: no rung is judged by codes alone.
    """
    bridged = choice.bridge.apply(exam.new_queries)
    yield Rung(NAIVE, exam.find(_resized(exam.new_queries, exam.old.shape[1]), exam.old))
    yield Rung(STATUS_QUO, exam.find(exam.old_queries, exam.old))
    if stored is not None:
        found = find_by_codes(exam, stored.binarizer, stored.codes, exam.old_queries)
        yield Rung("status quo by codes alone", found)
        found = find_by_codes(exam, stored.reader, stored.codes, exam.new_queries)
        yield Rung("compatible head by codes alone", found)
    yield from _across(exam, choice)
    mixed = slerp(exam.old_queries, bridged, choice.share)
    yield Rung(f"SLERP {choice.share:.1f} with {choice.chosen}", exam.find(mixed, exam.old))
    yield from (cascade(exam, bridged, depth) for depth in depths)
    for percent in (10, 25, 50):
        migrated = np.zeros(len(exam.old), np.bool_)
        migrated[order[: round(percent / 100 * len(order))]] = True
        found = half_migrated(exam, bridged, migrated, choice.calibration)
        yield Rung(f"backfill of {percent} %", found, embedded=int(migrated.sum()))
    yield Rung(FULL, exam.wanted, embedded=len(exam.new))
    yield _oracle(exam)


def _across(exam: Exam, choice: Choice) -> Iterator[Rung]:
    """What needs neither the old encoder nor a document embedded anew."""
    relative = exam.find(choice.anchors.of_queries(exam.new_queries), choice.anchors.of_documents(exam.old))
    yield Rung("relative representations", relative)
    if exam.new.shape[1] >= exam.old.shape[1]:
        prefix = _prefix(choice.bridges["procrustes"], exam.new_queries)
        yield Rung("orthogonal completion", exam.find(prefix, exam.old))
    for name, bridge in choice.bridges.items():
        yield Rung(name, exam.find(bridge.apply(exam.new_queries), exam.old))


def _prefix(bridge: Bridge, queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """(q, d_old) first dimensions of completed new vectors, where the old ones are."""
    whole = complete_orthogonally(bridge)[:, : len(bridge.mean_to)]
    return normalized(queries @ whole - bridge.mean_from @ whole + bridge.mean_to)


def cascade(exam: Exam, bridged: NDArray[np.float32], depth: int) -> Rung:
    """Candidates across the bridge, embedded by the new encoder, and ranked in its space.

    Args:
        exam: What is asked, of what.
        bridged: (q, d_old) queries in the old space.
        depth: Candidates per query.
    """
    candidates = exam.find(bridged, exam.old, max(depth, DEPTH))
    first = candidates[:, :depth]
    scores = scores_of(exam.new_queries, exam.new, first)
    ranked = np.take_along_axis(first, np.argsort(-scores, axis=1, kind="stable"), axis=1)
    found = np.hstack([ranked, candidates[:, depth:]])[:, :DEPTH]
    return Rung(f"cascade of {depth}", found, embedded=len(np.unique(first)))


def half_migrated(
    exam: Exam, bridged: NDArray[np.float32], migrated: NDArray[np.bool_], calibration: Calibration
) -> NDArray[np.int64]:
    """(q, DEPTH) rows that are found where some documents are in the new space and the others across the bridge.

    Args:
        exam: What is asked, of what.
        bridged: (q, d_old) queries in the old space.
        migrated: (n,) which documents are in the new space.
        calibration: Of scores across the bridge.
    """
    new, old, order = exam.new[migrated], exam.old[~migrated], np.argsort(~migrated, kind="stable")
    place, gauge = np.argsort(order, kind="stable"), calibration.gauge(exam.new_queries, bridged)

    def scores(block: slice) -> NDArray[np.float32]:
        native = exam.new_queries[block] @ new.T
        return np.hstack([native, gauge.of(bridged[block] @ old.T, block)])[:, place]

    return ranked_by(scores, len(exam.old), DEPTH, own=exam.own)


def _oracle(exam: Exam) -> Rung:
    """What no bridge can beat by far: the mean of the old vectors of what is wanted asks for them."""
    queries = normalized(exam.old[exam.wanted[:, :TOP]].mean(axis=1))
    asked = queries.copy()
    for i in exam.judged:
        asked[i] = exam.old[[row for row, grade in exam.grades[i].items() if grade > 0]].mean(axis=0)
    graded = exam.find(normalized(asked), exam.old) if exam.judged else None
    return Rung(ORACLE, exam.find(queries, exam.old), found_by_grades=graded)


def _resized(queries: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Queries cut to a width, or filled up with zeros: what a naive swap comes to."""
    resized = np.zeros((len(queries), width), np.float32)
    common = min(width, queries.shape[1])
    resized[:, :common] = queries[:, :common]
    return resized
