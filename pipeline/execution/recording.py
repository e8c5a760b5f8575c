"""A run's id, its first and last log line, and its record in the root, whether it finished, failed or was stopped."""

import hashlib
import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import structlog

from pipeline.artifacts import RunRecord
from pipeline.config import Config
from pipeline.errors import ConfigError, StorageUnavailableError
from pipeline.execution.ledger import Ledger
from pipeline.execution.work import versions
from pipeline.release import write_run
from pipeline.storage import canonical_json, open_store

__all__ = ["RunUnderWay", "recorded"]

Status = Literal["finished", "failed", "stopped"]


SIGNALLED = 128
"""Exit codes above it are those of signals, as shells have them."""


@dataclass
class RunUnderWay:
    """What its record will say."""

    config: Config
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    ledger: Ledger = field(default_factory=Ledger)
    summary: dict[str, Any] = field(default_factory=dict)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.perf_counter)


@contextmanager
def recorded(config: Config, exit_code_of: Callable[[BaseException], int]) -> Iterator[RunUnderWay]:
    """Log and record a run.

    The run's id is on every log line inside. That the record cannot be written is logged, and changes nothing else.

    Args:
        config: The run.
        exit_code_of: Exit code of the job for an error.

    Yields:
        Where to put the summary; its ledger is for `flows.run`.
    """
    under_way = RunUnderWay(config)
    with structlog.contextvars.bound_contextvars(run=under_way.run):
        log = structlog.get_logger()
        log.info("run_started", root=config.root, corpus=config.corpus.identity, config=_fingerprint(config))
        try:
            yield under_way
        except BaseException as error:
            code = exit_code_of(error)
            status: Status = "stopped" if code > SIGNALLED else "failed"
            _keep(under_way, status, code, error)
            event = "run_failed" if status == "failed" else "run_stopped"
            # Why is told once, where the job ends.
            log.log(logging.ERROR, event, exit_code=code, reason=type(error).__name__.strip("_"))
            raise
        _keep(under_way, "finished", 0, None)
        log.info("run_finished", exit_code=0, **_short(under_way))


def _short(under_way: RunUnderWay) -> dict[str, Any]:
    shown = ("release", "documents", "encoded", "dead_letters", "recall_at_10", "skipped")
    found = {name: under_way.summary[name] for name in shown if name in under_way.summary}
    return found | {"seconds": round(time.perf_counter() - under_way.clock, 3)}


def _record(under_way: RunUnderWay, status: Status, code: int, error: BaseException | None) -> RunRecord:
    config = under_way.config
    facts = under_way.ledger.as_dict()
    if status == "finished":
        facts.pop("judged", None)
    return RunRecord(
        run=under_way.run,
        status=status,
        exit_code=code,
        error=type(error).__name__.strip("_") if error is not None else None,
        message=str(error) if error is not None else None,
        started=under_way.started,
        finished=datetime.now(UTC),
        seconds=round(time.perf_counter() - under_way.clock, 3),
        root=config.root,
        corpus=config.corpus.identity,
        config=_fingerprint(config),
        settings=config.model_dump(mode="json"),
        versions=versions(),
        host=_host(),
        summary=under_way.summary,
        **facts,
    )


def _keep(under_way: RunUnderWay, status: Status, code: int, error: BaseException | None) -> None:
    config, log = under_way.config, structlog.get_logger()
    if _shut_out(error, config.root):
        log.warning("run_not_recorded", message=f"{config.root} cannot be written")
        return
    try:
        record = _record(under_way, status, code, error)
        if not write_run(open_store(config.root, config.storage), record):
            log.warning("run_not_recorded", message=f"{record.root} belongs to another corpus")
    except Exception as problem:  # noqa: BLE001  (how the run ended matters more than its record)
        log.warning("run_not_recorded", reason=type(problem).__name__, message=str(problem))


def _shut_out(error: BaseException | None, root: str) -> bool:
    """Whether the run ended because the root refused or did not answer: asking it again takes as long as that took."""
    kinds = (ConfigError, StorageUnavailableError)
    return isinstance(error, kinds) and error.place.startswith(root)


def _fingerprint(config: Config) -> str:
    return hashlib.sha256(canonical_json(config.model_dump(mode="json"))).hexdigest()[:16]


def _host() -> dict[str, object]:
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
