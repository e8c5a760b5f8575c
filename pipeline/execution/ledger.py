"""What a run did so far, stage by stage: counted as tasks finish, and there for the run's record however the run ends."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import structlog

from pipeline.execution.attempts import WORKER_LOST
from pipeline.execution.metrics import Metrics, NoMetrics
from pipeline.execution.work import Done, Task

__all__ = ["Ledger", "StageFigures", "StageWatch"]

MB = 1024 * 1024
MOST_REASONS = 30
"""Kinds of dead letters that get a series of their own; further ones count as `other`."""


@dataclass
class StageFigures:
    """What one stage did."""

    tasks: int = 0
    done: int = 0
    reused: int = 0
    retried: int = 0
    """Attempts that were made again."""
    workers_lost: int = 0
    rows: int = 0
    """In the files that it wrote or reused."""
    bytes: int = 0
    seconds: float = 0.0
    peak_memory_mb: int = 0
    """Largest anonymous memory of a worker while it worked on it."""


@dataclass
class Ledger:
    """Figures and facts of one run.

    Args:
        stages: Figures by the stage of the tasks.
        facts: What is known of the run besides: plan, estimate.
        seconds: Wall time by part of the run.
        dead_letters: Rows set aside by kind of reason.
    """

    stages: dict[str, StageFigures] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    dead_letters: Counter[str] = field(default_factory=Counter)
    metrics: Metrics = field(default_factory=NoMetrics)

    def kind_of_letter(self, reason: str) -> str:
        """The reason, or `other` where there are too many kinds already."""
        return reason if reason in self.dead_letters or len(self.dead_letters) < MOST_REASONS else "other"

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        stages = {
            name: asdict(figures) | {"seconds": round(figures.seconds, 3)}
            for name, figures in self.stages.items()
        }
        return {
            **self.facts,
            "seconds_by_part": self.seconds,
            "stages": stages,
            "dead_letters_by_reason": dict(self.dead_letters),
        }


class StageWatch:
    """Counts, logs and exports what the tasks of one stage do, from its start to its end.

    Args:
        ledger: Where it is counted.
        tasks: All tasks of the stage; where there are none, there is no stage.
        limit_mb: Memory that one worker may take.
    """

    def __init__(self, ledger: Ledger, tasks: Sequence[Task], limit_mb: int) -> None:
        self._ledger, self._total, self._limit_mb = ledger, len(tasks), limit_mb
        self._stage = tasks[0].stage if tasks else None
        self._start, self._all_done = time.perf_counter(), False

    def __enter__(self) -> Self:
        if self._stage is not None:
            self._figures.tasks += self._total
            structlog.get_logger().info("stage_started", stage=self._stage, tasks=self._total)
            record, stage = self._ledger.metrics.record, self._stage
            record("strata_stage_tasks", self._figures.tasks, stage=stage)
            record("strata_stage_tasks_done", self._figures.done, stage=stage)
            record("strata_worker_memory_limit_bytes", self._limit_mb * MB, stage=stage)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._stage is None:
            return
        figures = self._figures
        figures.seconds += time.perf_counter() - self._start
        shown = asdict(figures) | {"seconds": round(figures.seconds, 3)}
        if kind is None:
            structlog.get_logger().info("stage_finished", stage=self._stage, **shown)
            return
        if isinstance(error, Exception):
            self._ledger.metrics.record("strata_tasks_total", stage=self._stage, outcome="failed")
        # GeneratorExit: whoever took the results stopped, for a reason that is told where it arose.
        structlog.get_logger().warning("stage_stopped", stage=self._stage, reason=kind.__name__, **shown)

    @property
    def _figures(self) -> StageFigures:
        assert self._stage is not None  # noqa: S101
        return self._ledger.stages.setdefault(self._stage, StageFigures())

    def saw(self, done: Done) -> None:
        """Count one finished task."""
        figures, files = self._figures, done.output.files.values()
        figures.done += 1
        figures.reused += done.reused
        figures.retried += len(done.failures)
        figures.workers_lost += done.failures.count(WORKER_LOST)
        figures.rows += sum(ref.rows for ref in files)
        figures.bytes += sum(ref.bytes for ref in files)
        figures.peak_memory_mb = max(figures.peak_memory_mb, round(done.peak_mb))
        self._export(done)

    def _export(self, done: Done) -> None:
        record, stage, figures = self._ledger.metrics.record, self._stage or "", self._figures
        files = done.output.files.values()
        record("strata_tasks_total", stage=stage, outcome="reused" if done.reused else "done")
        record("strata_rows_total", sum(ref.rows for ref in files), stage=stage)
        record("strata_bytes_total", sum(ref.bytes for ref in files), stage=stage)
        record("strata_stage_tasks_done", figures.done, stage=stage)
        record("strata_worker_peak_memory_bytes", figures.peak_memory_mb * MB, stage=stage)
        if not done.reused:
            record("strata_task_seconds", done.seconds, stage=stage)
            record("strata_texts_encoded_total", done.output.numbers.get("encoded", 0))
        for reason in done.failures:
            record("strata_retries_total", stage=stage, reason=reason)
        record("strata_worker_deaths_total", done.failures.count(WORKER_LOST), stage=stage)
        for reason, count in done.letters.items():
            kind = self._ledger.kind_of_letter(reason)
            self._ledger.dead_letters[kind] += count
            record("strata_dead_letters_total", count, reason=kind)
