"""Progress to stderr: a bar on a terminal, one log line per interval elsewhere (bars fill the logs of cron and CI)."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import structlog
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["track"]

T = TypeVar("T")

INTERVAL_S = 10.0


def track(items: Iterable[T], *, label: str, total: int) -> Iterator[T]:
    """Pass items through and show how many came."""
    return _bar(items, label, total) if sys.stderr.isatty() else _lines(items, label, total)


def _bar(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    columns = (
        TextColumn(f"{label:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(label, total=total)
        for item in items:
            progress.advance(bar)
            yield item


def _lines(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    log = structlog.get_logger()
    shown = time.monotonic()
    for count, item in enumerate(items, 1):
        if time.monotonic() - shown >= INTERVAL_S:
            shown = time.monotonic()
            log.info("progress", stage=label, done=count, total=total)
        yield item
