"""What a page shows, frozen: the figures of one index, and of the releases around it.

Summaries of earlier versions of strata lack newer figures; every field of `Measured` has a default that says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.artifacts import IndexManifest
from pipeline.config import ReportConfig

__all__ = [
    "CurvePoint",
    "DeadLetters",
    "Figures",
    "Gate",
    "ListSizes",
    "Measured",
    "ReleaseLine",
    "StageMemory",
]


V = TypeVar("V")

PARTS = (
    "plan",
    "start",
    "read",
    "merge",
    "embed",
    "learn",
    "train",
    "place",
    "build",
    "judge",
    "curve",
    "compare",
)
"""Parts of a run that are timed, in order of time: a summary at rest has its keys sorted."""
KINDS = (
    "read", "merge", "units", "encode", "given", "condemned", "queries", "wanted", "pairs", "learn", "train", "cut",
    "grow", "place", "build", "exact", "driver",
)  # fmt: skip
"""Tasks whose memory is measured, in order of time; the driver beside them."""


def _in_order(found: Mapping[str, V], order: Sequence[str]) -> dict[str, V]:
    """Names that the order does not have come last."""
    places = {name: place for place, name in enumerate(order)}
    return dict(sorted(found.items(), key=lambda item: (places.get(item[0], len(order)), item[0])))


class _Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CurvePoint(_Lenient):
    """What a setting of search gives and costs."""

    lists: int
    margin: float
    rerank: int
    recall_at_10: float
    lists_per_query: float
    scanned_fraction: float
    bytes_per_query: float


class Gate(_Lenient):
    """One gate as the run found it."""

    gate: str
    threshold: float
    measured: float | None = None
    passed: bool
    problem: str = ""


class StageMemory(_Lenient):
    """Memory of the largest task of a stage, in MB."""

    estimate_mb: float | None = None
    peak_mb: float | None = None


class Interval(_Lenient):
    """A figure with the interval that holds it with 95 % confidence; an end that is infinite is None."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float | None] | None) -> "Interval | None":
        """Of a list of the three, as summaries have it."""
        if values is None or values[0] is None:
            return None
        return cls(value=values[0], low=values[1], high=values[2])


class LadderFigure(_Lenient):
    """One measure of a rung."""

    value: float
    gain: tuple[float | None, ...]
    """To the status quo, by query: mean, low, high."""
    share_kept: tuple[float | None, ...] | None = None
    """Of the gain of a full backfill; None where that gains nothing that is sure."""


class LadderRung(_Lenient):
    """What one way to answer new queries finds, and what it takes."""

    name: str
    documents_embedded: int
    ndcg_at_10: LadderFigure | None = None
    recall_at_100: LadderFigure | None = None
    overlap_at_10: LadderFigure | None = None
    seconds: float | None = None
    cost: float | None = None


class Ladder(_Lenient):
    """What an upgrade was judged by."""

    chosen: str
    judged_by: str
    queries: int
    judged_queries: int
    documents: int
    rungs: tuple[LadderRung, ...]


class Measured(_Lenient):
    """What a run reported, as far as its version of strata measured it."""

    documents: int = 0
    vectors: int | None = None
    added: int | None = None
    changed: int | None = None
    removed: int | None = None
    encoded: int | None = None
    dead_letters: int | None = None
    dead_letter_files: tuple[str, ...] = ()
    encoder: str | None = None
    recall_at_10: float | None = None
    ndcg_at_10: float | None = None
    exact_ndcg_at_10: float | None = None
    recall_at_100: float | None = None
    exact_recall_at_100: float | None = None
    judged_queries: float | None = None
    recall_curve: tuple[CurvePoint, ...] = ()
    gates: tuple[Gate, ...] | None = None
    bytes_per_query: float | None = None
    requests_per_query: float | None = None
    lists_per_query: float | None = None
    scanned_fraction: float | None = None
    rounds: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    seconds: Mapping[str, float] = {}
    tasks: int | None = None
    tasks_reused: int | None = None
    tasks_retried: int | None = None
    bytes: int | None = None
    task_memory_mb: float | None = None
    actor_memory_mb: float | None = None
    memory_by_stage: Mapping[str, StageMemory] = {}
    estimate: Mapping[str, Any] = {}
    configuration: Mapping[str, Any] = {}
    versions: Mapping[str, str] = {}
    upgrade: Ladder | None = None
    """Of the release that an upgrade made."""


@dataclass(frozen=True)
class DeadLetters:
    """Rows set aside."""

    reasons: tuple[tuple[str, int], ...] = ()
    """Kinds of reasons with their numbers of rows, commonest first."""
    examples: tuple[Mapping[str, Any], ...] = ()
    """The first rows of the table (schemas.DEAD_LETTERS)."""
    unreadable: str = ""
    """Why they are not shown; empty where they are."""


@dataclass(frozen=True)
class ReleaseLine:
    """One release among its neighbours."""

    release: int
    created: str
    measured: Measured
    state: str
    """`current`, `rolled back`, `retired`, `replaced`, or `not published`."""


class ListSizes(NamedTuple):
    """Sizes of posting lists."""

    primaries: NDArray[np.int64]
    """(lists,) vectors whose own list it is."""
    entries: NDArray[np.int64]
    """(lists,) those and copies of others."""


@dataclass(frozen=True)
class Figures:
    """Everything that one page shows."""

    root: str
    release: int | None
    """None for an index that its gates kept from being published."""
    created: str | None
    """ISO 8601, UTC; None for such an index."""
    state: str
    manifest: IndexManifest
    measured: Measured
    list_sizes: ListSizes | None
    """None where the directory is gone."""
    dead_letters: DeadLetters
    cache_bytes: int
    """Of every text that was ever encoded for this root with this encoder."""
    history: tuple[ReleaseLine, ...]
    prices: ReportConfig

    @property
    def is_good(self) -> bool | None:
        """Whether every gate was passed; None where that was not recorded."""
        gates = self.measured.gates
        return None if gates is None else all(gate.passed for gate in gates)

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds of each stage, in order of time, without their sum."""
        found = {stage: s for stage, s in self.measured.seconds.items() if stage != "total"}
        return _in_order(found, PARTS)

    @property
    def stage_memory(self) -> dict[str, StageMemory]:
        """Memory of each stage, in order of time."""
        return _in_order(self.measured.memory_by_stage, KINDS)

    @property
    def stage_rows(self) -> dict[str, int]:
        """Rows that went through the stages whose speed is one of rows."""
        vectors = self.manifest_rows
        read = self.measured.estimate.get("rows", self.measured.documents)
        rows = {"read": int(read), "merge": vectors, "place": vectors, "build": vectors}
        return rows | ({"embed": self.measured.encoded} if self.measured.encoded else {})

    @property
    def manifest_rows(self) -> int:
        """Vectors of the index."""
        return sum(partition.rows for partition in self.manifest.partitions)

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """Stored bytes of this index by what they are for, and of the caches behind it."""
        partitions = self.manifest.partitions
        return {
            "documents": sum(ref.bytes for ref in self.manifest.documents),
            "codes": sum(s.lists.bytes for p in partitions for s in p.segments),
            "heads": sum(ref.bytes for p in partitions for ref in p.navigation),
            "vectors": sum(s.vectors.bytes for p in partitions for s in p.segments),
            "cache": self.cache_bytes,
        }

    @property
    def float32_bytes(self) -> int:
        """What the vectors alone take as float32."""
        return 4 * sum(self.manifest.dims_of(part) * part.rows for part in self.manifest.partitions)


def is_default(point: CurvePoint, figures: Figures) -> bool:
    """Whether a point of the curve is what searches use that name nothing."""
    search = figures.manifest.search
    return (point.lists, point.rerank) == (search.lists, search.rerank) and abs(
        point.margin - search.margin
    ) < MARGIN_STEP


MARGIN_STEP = 1e-4
"""Margins are reported to four places."""
