"""Units of work on Ray, or one after the other in this process.

Both runners obey one interface, so that every stage runs without Ray in unit tests. Work in flight is bounded; a lost
worker's unit is given to another; results come as they finish, each with its place among the tasks.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol, Self

from pipeline.config import ClusterConfig, EmbeddingConfig
from pipeline.embedding.bisecting import check_works
from pipeline.embedding.encoder import TextEncoder, load_encoder
from pipeline.errors import TransientError
from pipeline.execution.attempts import perform_attempt, perform_logged, report_failure, with_failures
from pipeline.execution.cluster import NodeShape, Request, check_request, cores, node_shapes, start
from pipeline.execution.encoders import EncoderSpec
from pipeline.execution.logs import bound_run
from pipeline.execution.metrics import Metrics, NoMetrics, RayMetrics
from pipeline.execution.pool import ActorPool, result_of
from pipeline.execution.work import Done, StoreSpec, Task, perform

__all__ = [
    "THREADS_PER_TASK",
    "InlineRunner",
    "RayRunner",
    "Runner",
    "encoder_actor_count",
    "task_request",
]

MB = 1024 * 1024
THREADS_PER_TASK = 1
"""Part of the plan, not of the cluster: distances change bits with the number of threads (DESIGN §4)."""


class Runner(Protocol):
    """Something that performs tasks."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        """Perform tasks in any order; yields (place among the tasks, result) as they finish."""
        ...

    def encode(self, tasks: Sequence[Task], spec: EncoderSpec) -> Iterator[tuple[int, Done]]:
        """Perform tasks whose stage function wants an encoder as its last argument."""
        ...

    def metrics(self, corpus: str) -> Metrics:
        """Where the figures of a run on this corpus go."""
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

    def metrics(self, corpus: str) -> Metrics:
        assert corpus  # noqa: S101
        return NoMetrics()


def encoder_actor_count(
    embedding: EmbeddingConfig, *, nodes: Sequence[NodeShape], memory_mb: float, tasks: int
) -> int:
    """Encoder actors to start: one per GPU share, or one per `threads_per_actor` cores, on one node each.

    Args:
        embedding: The settings.
        nodes: What the cluster has or may start; where any has a GPU, the actors go to GPUs.
        memory_mb: What one actor reserves.
        tasks: Units of work; there are never more actors.

    Raises:
        ConfigError: No node has room for an actor.
    """
    request = _actor_request(embedding, nodes, memory_mb)
    check_request(request, nodes)
    room = sum(node.count * _actors_on(node, request) for node in nodes)
    return max(1, min(embedding.actors or room, room, tasks))


def _actor_request(embedding: EmbeddingConfig, nodes: Sequence[NodeShape], memory_mb: float) -> Request:
    gpus = any(node.gpus for node in nodes)
    return Request(
        "an encoder actor",
        cpus=0 if gpus else embedding.threads_per_actor,
        gpus=(embedding.gpus_per_actor or 1.0) if gpus else 0.0,
        memory_mb=memory_mb,
        settings={
            "cpus": "embedding.threads_per_actor",
            "gpus": "embedding.gpus_per_actor",
            "memory_mb": "embedding.memory_mb_per_actor",
        },
    )


def task_request(
    config: ClusterConfig, gpus: float | None, *, nodes: Sequence[NodeShape], memory_mb: float
) -> Request:
    """What one task reserves: a core of a node for tasks; or its share of a GPU, wherever one is, as encoder actors do.

    Args:
        config: Which nodes are for tasks.
        gpus: Share that the task asks for; None: a whole GPU.
        nodes: What the cluster has or may start; where none has a GPU with as much memory beside it, a core has to do.
        memory_mb: What one task reserves.
    """
    settings = {"cpus": "ray.num_cpus", "memory_mb": "ray.task_memory_mb"}
    share = 1.0 if gpus is None else gpus
    on_gpu = Request("a task", gpus=share, memory_mb=memory_mb, settings=settings)
    if share and any(on_gpu.fits(node) for node in nodes):
        return on_gpu
    cpus, labels = THREADS_PER_TASK, config.task_labels
    return Request("a task", cpus=cpus, memory_mb=memory_mb, settings=settings, labels=labels)


def _actors_on(node: NodeShape, request: Request) -> int:
    amounts = [
        (node.cpus, request.cpus),
        (node.gpus, request.gpus),
        (node.memory_mb, request.memory_mb),
    ]
    return min(math.floor(has / need + 1e-9) for has, need in amounts if need)


class RayRunner(AbstractContextManager["RayRunner"]):
    """Performs tasks on a Ray cluster: the one named in the configuration, or a local one that lives as long as this.

    Args:
        store: The root.
        config: Where the work runs.
    """

    def __init__(self, store: StoreSpec, config: ClusterConfig) -> None:
        self._store = store
        self._config = config
        self._open = ExitStack()

    def __enter__(self) -> Self:
        import ray

        if not ray.is_initialized():
            start(self._config)
            self._open.callback(ray.shutdown)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _memory_mb(self, wanted: float, nodes: Sequence[NodeShape]) -> float:
        """What to reserve: a machine of our own has to do with what it has, one thing at a time."""
        if self._config.address is None and self._config.memory_mb is None:
            return min(wanted, max(node.memory_mb for node in nodes))
        return wanted

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        import ray

        nodes = node_shapes(self._config)
        memory = self._memory_mb(self._config.task_memory_mb, nodes)
        requests = {
            gpus: task_request(self._config, gpus, nodes=nodes, memory_mb=memory)
            for gpus in {task.gpus for task in tasks}
        }
        for request in requests.values():
            check_request(request, nodes)
        remotes = {
            (gpus, ends): ray.remote(
                **_reserved(requests[gpus]),
                max_retries=self._config.max_retries,
                retry_exceptions=[TransientError],
                max_calls=int(ends),
            )(perform_attempt)
            for gpus, ends in {(task.gpus, task.ends_worker) for task in tasks}
        }
        shared, run = _Shared(), bound_run()

        def submit(place: int) -> Any:
            task = tasks[place]
            return remotes[task.gpus, task.ends_worker].remote(
                run, task.without_shared(), shared.of(task), self._store, THREADS_PER_TASK
            )

        yield from _windowed(submit, tasks, self._config.max_in_flight or 2 * cores(nodes))

    def encode(self, tasks: Sequence[Task], spec: EncoderSpec) -> Iterator[tuple[int, Done]]:
        if not tasks:
            return
        import ray

        nodes = node_shapes(self._config)
        memory = self._memory_mb(spec.embedding.memory_mb_per_actor, nodes)
        count = encoder_actor_count(spec.embedding, nodes=nodes, memory_mb=memory, tasks=len(tasks))
        request = _actor_request(spec.embedding, nodes, memory)
        remote = ray.remote(_EncoderActor).options(
            **_reserved(request),
            # The pool restarts and retries: Ray would charge a death to every task that waited at the actor.
            max_restarts=0,
            max_task_retries=0,
        )
        device, run, shared = "cuda" if request.gpus else None, bound_run(), _Shared()
        pool = ActorPool(
            start=lambda: remote.remote(spec, self._store, device, run),
            submit=lambda actor, task, attempt: actor.perform.remote(
                task.without_shared(), shared.of(task), attempt
            ),
            record=lambda task: perform(task, task.shared, self._store, THREADS_PER_TASK),
            size=count,
            max_retries=self._config.max_retries,
        )
        yield from pool.run(tasks)

    def metrics(self, corpus: str) -> Metrics:
        return self._open.enter_context(RayMetrics(corpus))


def _reserved(request: Request) -> dict[str, Any]:
    """A request in Ray's words."""
    return {
        "num_cpus": request.cpus,
        "num_gpus": request.gpus,
        "memory": int(request.memory_mb * MB),
        "label_selector": dict(request.labels) or None,
    }


class _Shared:
    """Shared arguments in the object store, each mapping once."""

    def __init__(self) -> None:
        # Each mapping beside its reference: while it is held, no other one gets its id.
        self._references: dict[int, tuple[Mapping[str, Any], Any]] = {}

    def of(self, task: Task) -> Any:
        """The task's shared arguments, or Ray's reference of them."""
        import ray

        shared = task.shared
        if not shared:
            return shared
        if id(shared) not in self._references:
            self._references[id(shared)] = (shared, ray.put(shared))
        return self._references[id(shared)][1]


class _EncoderActor:
    """A worker that keeps one encoder loaded."""

    def __init__(self, spec: EncoderSpec, store: StoreSpec, device: str | None, run: str | None) -> None:
        self._spec, self._store, self._device, self._run = spec, store, device, run

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return _load(self._spec, self._device)

    def load(self) -> None:
        """Answer once the encoder is loaded: in a method, its errors come out as themselves."""
        _ = self._encoder

    def perform(self, task: Task, shared: Mapping[str, Any], attempt: int) -> Done:
        threads = self._spec.embedding.threads_per_actor
        return perform_logged(self._run, attempt, task, shared, self._store, threads, self._encoder)


def _windowed(submit: Any, tasks: Sequence[Task], window: int) -> Iterator[tuple[int, Done]]:
    """Keep at most `window` tasks submitted.

    When the caller stops, they are left to finish, or to end with the job. Cancelling them would be of little use, and Ray
    2.60 aborts the whole driver if a task that is being cancelled finishes at that moment (task_manager.cc, "Tried to
    complete task that was not pending"): the exit code of Ctrl-C would be lost.
    """
    import ray

    running: dict[Any, int] = {}
    waiting = iter(range(len(tasks)))
    while True:
        while len(running) < window and (place := next(waiting, None)) is not None:
            running[submit(place)] = place
        if not running:
            return
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            place = running.pop(reference)
            yield place, _outcome(reference, tasks[place])


def _outcome(reference: Any, task: Task) -> Done:
    """A task's result, with what went wrong before it; a failure for good is reported."""
    try:
        return with_failures(result_of(reference), reference, task)
    except Exception as error:
        report_failure(error, reference, task)
        raise
