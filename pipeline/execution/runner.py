"""Units of work on Ray, or one after the other in this process.

Both runners obey one interface, so that every stage runs without Ray in unit tests. Work in flight is bounded; a lost
worker's unit is given to another; results come as they finish, each with its place among the tasks.
"""

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from pipeline.config import ClusterConfig, EmbeddingConfig, EncoderConfig, StorageConfig
from pipeline.embedding.bisecting import check_works
from pipeline.embedding.encoder import Dtype, TextEncoder, load_encoder
from pipeline.errors import ConfigError, TransientError
from pipeline.execution.pool import ActorPool, result_of
from pipeline.execution.work import Done, StoreSpec, Task, perform

__all__ = ["THREADS_PER_TASK", "EncoderSpec", "InlineRunner", "RayRunner", "Runner", "encoder_actor_count"]

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
    encoder = load_encoder(
        spec.config,
        dtype=spec.dtype,
        name=spec.name,
        storage=spec.storage,
        batch_tokens=spec.embedding.batch_tokens,
        device=device,
        threads=spec.embedding.threads_per_actor,
    )
    check_works(encoder.encode_documents, dims=encoder.identity.dims, name=spec.name)
    return encoder


class InlineRunner:
    """Performs tasks one after the other, here: the twin of RayRunner for tests and for debugging.

    Args:
        store: The root.
    """

    def __init__(self, store: StoreSpec) -> None:
        self._store = store

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        for place, task in enumerate(tasks):
            yield place, perform(task, task.shared, self._store, THREADS_PER_TASK)

    def encode(self, tasks: Sequence[Task], spec: EncoderSpec) -> Iterator[tuple[int, Done]]:
        if not tasks:
            return
        encoder = _load(spec, None)
        for place, task in enumerate(tasks):
            yield (
                place,
                perform(task, task.shared, self._store, spec.embedding.threads_per_actor, encoder),
            )


def encoder_actor_count(
    embedding: EmbeddingConfig, *, nodes: Sequence[tuple[float, float]], tasks: int
) -> int:
    """Encoder actors to start: one per GPU share, or one per `threads_per_actor` cores, on one node each.

    Args:
        embedding: The settings.
        nodes: (cores, GPUs) of each node; where any has a GPU, the actors go to GPUs.
        tasks: Units of work; there are never more actors.

    Raises:
        ConfigError: No node has room for an actor.
    """
    gpus = any(gpu for _, gpu in nodes)
    need = (embedding.gpus_per_actor or 1.0) if gpus else embedding.threads_per_actor
    room = sum(math.floor((gpu if gpus else cpu) / need + 1e-9) for cpu, gpu in nodes)
    if room == 0:
        name, what = ("gpus_per_actor", "GPUs") if gpus else ("threads_per_actor", "cores")
        most = max((gpu if gpus else cpu) for cpu, gpu in nodes)
        problem = f"an actor needs {need:g} {what}, the largest node has {most:g}"
        raise ConfigError(f"embedding.{name}", problem, "lower it")
    return max(1, min(embedding.actors or room, room, tasks))


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
        shared = _Shared()

        def submit(place: int) -> Any:
            task = tasks[place]
            return remote.remote(task.without_shared(), shared.of(task), self._store, THREADS_PER_TASK)

        yield from _windowed(submit, len(tasks), self._config.max_in_flight or 2 * _cpus())

    def encode(self, tasks: Sequence[Task], spec: EncoderSpec) -> Iterator[tuple[int, Done]]:
        if not tasks:
            return
        import ray

        nodes = [
            (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in ray.nodes()
            if node["Alive"]
        ]
        gpus = any(gpu for _, gpu in nodes)
        remote = ray.remote(_EncoderActor).options(
            num_cpus=0 if gpus else spec.embedding.threads_per_actor,
            num_gpus=(spec.embedding.gpus_per_actor or 1.0) if gpus else 0,
            # The pool restarts and retries: Ray would charge a death to every task that waited at the actor.
            max_restarts=0,
            max_task_retries=0,
        )
        shared = _Shared()
        pool = ActorPool(
            start=lambda: remote.remote(spec, self._store, "cuda" if gpus else None),
            submit=lambda actor, task: actor.perform.remote(task.without_shared(), shared.of(task)),
            record=lambda task: perform(task, task.shared, self._store, THREADS_PER_TASK),
            size=encoder_actor_count(spec.embedding, nodes=nodes, tasks=len(tasks)),
            max_retries=self._config.max_retries,
        )
        yield from pool.run(tasks)


class _Shared:
    """Shared arguments in the object store, each mapping once."""

    def __init__(self) -> None:
        self._references: dict[int, Any] = {}

    def of(self, task: Task) -> Any:
        import ray

        if id(task.shared) not in self._references:
            self._references[id(task.shared)] = ray.put(task.shared)
        return self._references[id(task.shared)]


class _EncoderActor:
    """A worker that keeps one encoder loaded."""

    def __init__(self, spec: EncoderSpec, store: StoreSpec, device: str | None) -> None:
        self._spec, self._store, self._device = spec, store, device

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return _load(self._spec, self._device)

    def load(self) -> None:
        """Answer once the encoder is loaded: in a method, its errors come out as themselves."""
        _ = self._encoder

    def perform(self, task: Task, shared: Mapping[str, Any]) -> Done:
        return perform(task, shared, self._store, self._spec.embedding.threads_per_actor, self._encoder)


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
                yield running.pop(reference), result_of(reference)
    finally:
        for reference in running:
            ray.cancel(reference, force=False)
