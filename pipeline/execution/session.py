"""One job under way: what it was started with, and what it has measured so far."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from pipeline.artifacts import FileRef, Plan, StageOutput
from pipeline.config import Config, SizedConfig
from pipeline.corpus import check_error_budget
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.ledger import Ledger, StageWatch
from pipeline.execution.memory import PeakMemory
from pipeline.execution.metrics import Metrics
from pipeline.execution.progress import track
from pipeline.execution.runner import Runner
from pipeline.execution.work import Done, StoreSpec, Task
from pipeline.release import Lease
from pipeline.storage import Store

__all__ = ["BuildSession", "Session", "working"]


@dataclass
class Session:
    """One job under way: what it was started with, and what it has measured so far."""

    config: Config
    spec: StoreSpec
    store: Store
    runner: Runner
    lease: Lease
    expected_mb: Mapping[str, int]
    """Memory that was reckoned with, by stage."""
    memory: PeakMemory
    """Of this process, the driver."""
    ledger: Ledger
    tasks: int = 0
    reused: int = 0
    bytes_by_path: dict[str, int] = field(default_factory=dict)
    """Sizes of the files that this run wrote or reused."""

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by part of the run."""
        return self.ledger.seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with structlog.contextvars.bound_contextvars(stage=stage):
                yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)

    def perform(
        self, stage: str, tasks: Sequence[Task], *, encoder: EncoderInForce | None = None
    ) -> Iterator[tuple[int, Done]]:
        """Results as they finish, counted and shown."""
        spec = encoder.spec if encoder is not None else None
        finished = self.runner.run(tasks) if spec is None else self.runner.encode(tasks, spec)
        limit_mb = (
            self.config.ray.task_memory_mb if spec is None else self.config.embedding.memory_mb_per_actor
        )
        with StageWatch(self.ledger, tasks, limit_mb) as watch:
            for place, done in track(finished, label=stage, total=len(tasks)):
                watch.saw(done)
                self.tasks += 1
                self.reused += done.reused
                self.bytes_by_path.update({ref.path: ref.bytes for ref in done.output.files.values()})
                yield place, done

    def check_budget(self, plan: Plan, letters: Sequence[FileRef], *, condemned: int = 0) -> None:
        """See that the corpus is not too bad to go on.

        Args:
            plan: Of the corpus.
            letters: Files of the rows that were set aside.
            condemned: Texts without a vector whose rows are not among those yet.

        Raises:
            ErrorBudgetError: More rows are bad than the configuration allows.
        """
        check_error_budget(
            self.store,
            self.config.corpus,
            rows=plan.rows,
            bad_rows=sum(ref.rows for ref in letters),
            dead_letters=letters,
            condemned=condemned,
        )

    def measured(self) -> dict[str, object]:
        """What the run took, beside what the estimate says."""
        peaks = {kind: figures.peak_memory_mb for kind, figures in self.ledger.stages.items()}
        peaks["driver"] = round(self.memory.peak_mb)
        return {
            "seconds": self.seconds,
            "tasks": self.tasks,
            "tasks_reused": self.reused,
            "bytes": sum(self.bytes_by_path.values()),
            "memory_by_stage": {
                kind: {"estimate_mb": self.expected_mb.get(kind), "peak_mb": peak}
                for kind, peak in peaks.items()
                if peak
            },
        }

    def outputs(
        self, stage: str, tasks: Sequence[Task], *, encoder: EncoderInForce | None = None
    ) -> list[StageOutput]:
        """Results in the order of the tasks."""
        with self.timed(stage):
            found = dict(self.perform(stage, tasks, encoder=encoder))
        return [found[place].output for place in range(len(tasks))]


@dataclass
class BuildSession(Session):
    """A run that builds an index: its sizes are settled."""

    config: SizedConfig


@contextmanager
def _announced(metrics: Metrics) -> Iterator[None]:
    """Say that a job is under way, for as long as it is."""
    metrics.record("strata_run_started_timestamp_seconds", time.time())
    metrics.record("strata_run_state", 1)
    try:
        yield
    finally:
        metrics.record("strata_run_state", 0)


@contextmanager
def working(runner_of: Callable[[], Any], ledger: Ledger, corpus: str) -> Iterator[tuple[Runner, PeakMemory]]:
    """Start a runner, and what watches the job.

    Args:
        runner_of: Gives a context manager of a runner.
        ledger: Whose metrics the runner takes.
        corpus: Identity of the corpus.
    """
    start = time.perf_counter()
    with runner_of() as runner, PeakMemory() as memory:
        ledger.metrics = runner.metrics(corpus)
        ledger.seconds["start"] = round(time.perf_counter() - start, 3)
        with _announced(ledger.metrics):
            yield runner, memory
