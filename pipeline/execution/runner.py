"""Units of work on Ray, or one after the other in this process.

Both runners obey one interface, so that every stage runs without Ray in unit tests. Work in flight is bounded; a lost
worker's unit is given to another; results come as they finish, each with its place among the tasks.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from pipeline.config import ClusterConfig, EmbeddingConfig, EncoderConfig, StorageConfig
from pipeline.embedding.encoder import Dtype, TextEncoder, load_encoder
from pipeline.errors import ConfigError, PipelineError, TransientError
from pipeline.execution.work import Done, StoreSpec, Task, perform

__all__ = ["EncoderSpec", "InlineRunner", "RayRunner", "Runner", "encoder_actor_count"]

THREADS_PER_TASK = 1
"""Part of the plan, not of the cluster: distances change bits with the number of threads (DESIGN §4)."""


@dataclass(frozen=True)
class EncoderSpec:
    """How a worker loads the encoder in force."""

    name: str
    config: EncoderConfig
    dtype: Dtype
    embedding: EmbeddingConfig
    storage: StorageConfig


class Runner(Protocol):
    """Something that performs tasks."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        """Perform tasks in any order; yields (place among the tasks, result) as they finish."""
        ...

    def encode(self, tasks: Sequence[Task], spec: EncoderSpec) -> Iterator[tuple[int, Done]]:
        """Perform tasks whose stage function wants an encoder as its last argument."""
        ...


def _load(spec: EncoderSpec, device: str | None) -> TextEncoder:
    return load_encoder(
        spec.config,
        dtype=spec.dtype,
        name=spec.name,
        storage=spec.storage,
        batch_tokens=spec.embedding.batch_tokens,
        device=device,
        threads=spec.embedding.threads_per_actor,
    )


class InlineRunner:
    """Performs tasks one after the other, here: the twin of RayRunner for tests and for debugging.

    Args:
        store: The root.
    """

    def __init__(self, store: StoreSpec) -> None:
        self._store = store

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        for place, task in enumerate(tasks):
            yield place, perform(task, self._store, THREADS_PER_TASK)

    def encode(self, tasks: Sequence[Task], spec: EncoderSpec) -> Iterator[tuple[int, Done]]:
        if not tasks:
            return
        encoder = _load(spec, None)
        for place, task in enumerate(tasks):
            yield (
                place,
                perform(task, self._store, spec.embedding.threads_per_actor, encoder),
            )


def encoder_actor_count(embedding: EmbeddingConfig, *, cpus: int, gpus: float, tasks: int) -> int:
    """Encoder actors to start: one per GPU share, or one per `threads_per_actor` cores."""
    room = gpus / (embedding.gpus_per_actor or 1.0) if gpus else cpus / embedding.threads_per_actor
    return max(1, min(embedding.actors or math.floor(room), tasks))


class RayRunner(AbstractContextManager["RayRunner"]):
    """Performs tasks on a Ray cluster: the one named in the configuration, or a local one that lives as long as this.

    Args:
        store: The root.
        config: Where the work runs.
    """

    def __init__(self, store: StoreSpec, config: ClusterConfig) -> None:
        self._store = store
        self._config = config
        self._owned = False

    def __enter__(self) -> Self:
        import ray

        if not ray.is_initialized():
            _start(self._config)
            self._owned = True
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self._owned:
            ray.shutdown()

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        import ray

        remote = ray.remote(
            num_cpus=THREADS_PER_TASK,
            max_retries=self._config.max_retries,
            retry_exceptions=[TransientError],
        )(perform)

        def submit(place: int) -> Any:
            return remote.remote(tasks[place], self._store, THREADS_PER_TASK)

        window = self._config.max_in_flight or 2 * _cpus()
        yield from _windowed(submit, len(tasks), window)

    def encode(self, tasks: Sequence[Task], spec: EncoderSpec) -> Iterator[tuple[int, Done]]:
        if not tasks:
            return
        import ray

        resources = ray.cluster_resources()
        gpus = float(resources.get("GPU", 0.0))
        count = encoder_actor_count(spec.embedding, cpus=_cpus(), gpus=gpus, tasks=len(tasks))
        options = {"num_gpus": spec.embedding.gpus_per_actor or 1.0} if gpus else {}
        remote = ray.remote(_EncoderActor).options(
            num_cpus=0 if gpus else spec.embedding.threads_per_actor,
            max_restarts=-1,
            max_task_retries=self._config.max_retries,
            **options,
        )
        actors = [remote.remote(spec, self._store, "cuda" if gpus else None) for _ in range(count)]
        try:
            yield from _pooled(actors, tasks)
        finally:
            for actor in actors:
                ray.kill(actor)


class _EncoderActor:
    """A worker that keeps one encoder loaded."""

    def __init__(self, spec: EncoderSpec, store: StoreSpec, device: str | None) -> None:
        self._spec, self._store = spec, store
        self._encoder = _load(spec, device)

    def perform(self, task: Task) -> Done:
        return perform(task, self._store, self._spec.embedding.threads_per_actor, self._encoder)


def _start(config: ClusterConfig) -> None:
    import ray

    if config.address is None:
        # Ray 2.60 asks for a token even on this machine alone; a cluster of its own keeps its own setting.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            address=config.address or "local",
            num_cpus=config.num_cpus if config.address is None else None,
            include_dashboard=False if config.address is None else None,
            log_to_driver=False,
            configure_logging=False,
        )
    except ConnectionError as error:
        raise ConfigError(
            "ray.address", f"no Ray cluster answers at {config.address} ({error})", "start one"
        ) from error


def _cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def _windowed(submit: Any, count: int, window: int) -> Iterator[tuple[int, Done]]:
    """Keep at most `window` tasks submitted; whatever is left is cancelled when the caller stops."""
    import ray

    running: dict[Any, int] = {}
    waiting = iter(range(count))
    try:
        while True:
            while len(running) < window and (place := next(waiting, None)) is not None:
                running[submit(place)] = place
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                yield running.pop(reference), _result(reference)
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


def _pooled(actors: list[Any], tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
    """Give each actor two tasks at a time, so that none waits for the driver."""
    import ray

    running: dict[Any, tuple[int, Any]] = {}
    waiting = iter(range(len(tasks)))
    free = [actor for actor in actors for _ in range(2)]
    while True:
        while free and (place := next(waiting, None)) is not None:
            actor = free.pop(0)
            running[actor.perform.remote(tasks[place])] = (place, actor)
        if not running:
            return
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            place, actor = running.pop(reference)
            yield place, _result(reference)
            free.append(actor)


def _result(reference: Any) -> Done:
    """A task's result; our own errors come out as themselves."""
    import ray

    try:
        done: Done = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from error
        raise
    except (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.ActorDiedError,
        ray.exceptions.OutOfMemoryError,
    ) as error:
        raise TransientError(
            "ray", f"a worker died again and again ({error})", "rerun: finished work is kept"
        ) from error
    return done
