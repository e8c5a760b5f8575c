"""One run under way: what it was started with, and what it has measured so far."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.artifacts import StageOutput
from pipeline.config import Config
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.progress import track
from pipeline.execution.runner import Runner
from pipeline.execution.work import Done, StoreSpec, Task
from pipeline.release import Lease
from pipeline.storage import Store

__all__ = ["Session"]


@dataclass
class Session:
    """One run under way: what it was started with, and what it has measured so far."""

    config: Config
    spec: StoreSpec
    store: Store
    runner: Runner
    lease: Lease
    seconds: dict[str, float] = field(default_factory=dict)
    tasks: int = 0
    reused: int = 0
    task_peak_mb: float = 0.0
    """Largest resident memory of a worker that did tasks."""
    actor_peak_mb: float = 0.0
    """The same of an encoder actor."""
    bytes_by_path: dict[str, int] = field(default_factory=dict)
    """Sizes of the files that this run wrote or reused."""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)

    def perform(
        self, stage: str, tasks: Sequence[Task], *, encoder: EncoderInForce | None = None
    ) -> Iterator[tuple[int, Done]]:
        """Results as they finish, counted and shown."""
        spec = encoder.spec if encoder is not None else None
        finished = self.runner.run(tasks) if spec is None else self.runner.encode(tasks, spec)
        for place, done in track(finished, label=stage, total=len(tasks)):
            self.tasks += 1
            self.reused += done.reused
            self.bytes_by_path.update({ref.path: ref.bytes for ref in done.output.files.values()})
            if spec is None:
                self.task_peak_mb = max(self.task_peak_mb, done.peak_mb)
            else:
                self.actor_peak_mb = max(self.actor_peak_mb, done.peak_mb)
            yield place, done

    def measured(self) -> dict[str, object]:
        """What the run took, beside what the estimate says."""
        return {
            "seconds": self.seconds,
            "tasks": self.tasks,
            "tasks_reused": self.reused,
            "bytes": sum(self.bytes_by_path.values()),
            "task_memory_mb": round(self.task_peak_mb),
            "actor_memory_mb": round(self.actor_peak_mb),
        }

    def outputs(
        self, stage: str, tasks: Sequence[Task], *, encoder: EncoderInForce | None = None
    ) -> list[StageOutput]:
        """Results in the order of the tasks."""
        with self.timed(stage):
            found = dict(self.perform(stage, tasks, encoder=encoder))
        return [found[place].output for place in range(len(tasks))]
