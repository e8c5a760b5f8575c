"""One attempt at a task, as the worker that makes it and the driver that waits for it see it.

Ray starts a failed task anew and tells the driver nothing of it. So a worker binds run, stage, shard and attempt to its log
lines, and leaves a note in the cluster's key-value store when an attempt fails. When a later attempt succeeds, the
driver reads the notes: an earlier attempt with a note failed for the reason in it, one without a note lost its worker.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import structlog

from pipeline.execution.logs import configure_logging
from pipeline.execution.work import Done, StoreSpec, Task, perform

__all__ = ["WORKER_LOST", "perform_attempt", "perform_logged", "report_failure", "with_failures"]

NOTES = "strata-attempts"
WORKER_LOST = "WorkerLost"
"""Reason of an attempt that ended without a word."""


def perform_attempt(
    run: str | None, task: Task, shared: Mapping[str, Any], spec: StoreSpec, threads: int
) -> Done:
    """Perform a task that Ray starts anew when it fails, and leave a note if this attempt does.

    Args:
        run: Id of the run.
        task: The unit.
        shared: Its shared arguments.
        spec: The root.
        threads: Threads of numerical libraries.
    """
    attempt = _attempt()
    try:
        return perform_logged(run, attempt, task, shared, spec, threads)
    except Exception as error:
        _leave_note(attempt, error)
        raise


def perform_logged(
    run: str | None,
    attempt: int,
    task: Task,
    shared: Mapping[str, Any],
    spec: StoreSpec,
    threads: int,
    *extra: Any,
) -> Done:
    """Perform a task in a Ray worker; logs to the worker's log file.

    Args:
        run: Id of the run.
        attempt: Which attempt this is, from 1.
        task: The unit.
        shared: Its shared arguments.
        spec: The root.
        threads: Threads of numerical libraries.
        extra: Passed to the stage function after the store.
    """
    configure_logging()
    log = structlog.get_logger()
    with structlog.contextvars.bound_contextvars(
        run=run, stage=task.stage, shard=task.shard, attempt=attempt
    ):
        try:
            done = perform(task, shared, spec, threads, *extra)
        except Exception as error:
            log.warning("attempt_failed", reason=type(error).__name__, message=str(error))
            raise
        rows = sum(ref.rows for ref in done.output.files.values())
        log.info("task_done", reused=done.reused, seconds=round(done.seconds, 3), rows=rows)
    return replace(done, attempt=attempt)


def _attempt() -> int:
    """Which attempt this is, from 1; Ray 2.60 counts lost workers and errors alike, and says so only here."""
    import ray

    return int(ray._private.worker.global_worker.core_worker.get_current_task_attempt_number()) + 1  # noqa: SLF001


def _leave_note(attempt: int, error: Exception) -> None:
    import ray
    from ray.experimental.internal_kv import _internal_kv_put

    task_id = ray.get_runtime_context().get_task_id()
    note = {
        "reason": type(error).__name__,
        "message": str(error),
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    # The error itself matters more than the note about it.
    with contextlib.suppress(ray.exceptions.RayError):
        _internal_kv_put(f"{task_id}/{attempt}", json.dumps(note), namespace=NOTES)


def _take_notes(reference: Any) -> dict[int, dict[str, str]]:
    """Notes of a task's failed attempts, by attempt; they are gone afterwards. Those that cannot be read are left out."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list

    prefix = f"{reference.task_id().hex()}/"
    notes: dict[int, dict[str, str]] = {}
    try:
        for key in _internal_kv_list(prefix, namespace=NOTES):
            notes[int(key.decode().removeprefix(prefix))] = json.loads(_internal_kv_get(key, namespace=NOTES))
        if notes:
            _internal_kv_del(prefix, del_by_prefix=True, namespace=NOTES)
    except ray.exceptions.RayError as error:
        # What the task came to matters more than the notes about it.
        structlog.get_logger().warning("notes_not_read", reason=type(error).__name__, message=str(error))
    return notes


def with_failures(done: Done, reference: Any, task: Task) -> Done:
    """A result with the reasons of the attempts before it, each of which is logged.

    Args:
        done: Result of the attempt that succeeded.
        reference: Ray's reference of the call.
        task: The unit.
    """
    if done.attempt == 1:
        return done
    notes = _take_notes(reference)
    lost = {"reason": WORKER_LOST, "message": "the worker died, or its node"}
    failures = [notes.get(attempt, lost) for attempt in range(1, done.attempt)]
    log = structlog.get_logger()
    for attempt, note in enumerate(failures, 1):
        log.warning("task_retried", **_place(task), attempt=attempt, **note)
    return replace(done, failures=tuple(note["reason"] for note in failures))


def report_failure(error: Exception, reference: Any, task: Task) -> None:
    """Log that a task failed for good: of our own errors, and of what Ray wraps as the error of a task."""
    attempt = max(_take_notes(reference), default=None)
    cause = getattr(error, "cause", None) or error
    structlog.get_logger().error(
        "task_failed", **_place(task), attempt=attempt, reason=type(cause).__name__, message=str(cause)
    )


def _place(task: Task) -> dict[str, Any]:
    return {"stage": task.stage, "shard": task.shard}
