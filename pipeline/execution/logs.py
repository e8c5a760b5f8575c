"""Structured logs: words on a terminal, elsewhere one JSON object per line with the same fields on every line.

Every JSON line has `timestamp`, `level`, `event`, `run`, `stage`, `shard` and `attempt`, null where a line is about something
larger; whatever else it says follows. What is known of the present piece of work is bound through structlog's context.
"""

import io
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

__all__ = ["StrayOutput", "bound_run", "configure_logging"]

ON_EVERY_LINE = ("timestamp", "level", "event", "run", "stage", "shard", "attempt")


def configure_logging() -> None:
    """Send structured logs to stderr: words on a terminal, one JSON object per line elsewhere."""
    words = sys.stderr.isatty()
    shape: list[Any] = [
        structlog.processors.format_exc_info,
        _with_all_fields,
        structlog.processors.JSONRenderer(default=str),
    ]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.dev.ConsoleRenderer()] if words else shape),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _with_all_fields(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    return {name: event.get(name) for name in ON_EVERY_LINE} | dict(event)


def bound_run() -> str | None:
    """Id of the run under way here; None outside of one."""
    found = structlog.contextvars.get_contextvars().get("run")
    return None if found is None else str(found)


class StrayOutput(io.TextIOBase):
    """A stand-in for stdout: what a library prints there becomes log lines, and stdout keeps the summary alone."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                structlog.get_logger().warning("library_output", text=line)
        return len(text)

    def writable(self) -> bool:
        return True
