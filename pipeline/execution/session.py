"""One run under way: what it was started with, and what it has measured so far."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from pipeline.artifacts import FileRef, Plan, StageOutput
from pipeline.config import SizedConfig
from pipeline.corpus import check_error_budget
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.estimates import Estimate
from pipeline.execution.ledger import Ledger, StageWatch
from pipeline.execution.memory import PeakMemory
from pipeline.execution.progress import track
from pipeline.execution.runner import Runner
from pipeline.execution.work import Done, StoreSpec, Task
from pipeline.release import Lease
from pipeline.storage import Store

__all__ = ["Session"]


@dataclass
class Session:
    """One run under way: what it was started with, and what it has measured so far."""

    config: SizedConfig
    spec: StoreSpec
    store: Store
    runner: Runner
    lease: Lease
    estimate: Estimate
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
                kind: {"estimate_mb": self.estimate.memory_by_stage.get(kind), "peak_mb": peak}
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
