"""What every job shares: arguments, exit codes, signals, the summary line. What a job does is in its own file.

stdout carries one JSON object, the summary, as its last line; logs, progress and tables go to stderr. Exit codes:
0 ok, 2 usage, 3 publish conflict, 4 quality gate failed, 65 bad data, 75 transient, 78 bad config, 130 and 143 stopped.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, NoReturn

import structlog
import typer

from pipeline.errors import PipelineError
from pipeline.execution.progress import configure_logging

__all__ = ["Conf", "Overrides", "finish", "run_command"]

Conf = Annotated[str, typer.Argument(metavar="CONF", help="YAML of the run; see conf/README.md.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set search.rerank=200")
]

INTERRUPTED, TERMINATED, FAILED = 130, 143, 1


class _TerminatedError(BaseException):
    """SIGTERM came: a scheduler stops the job."""


def finish(work: Callable[[], dict[str, Any]]) -> NoReturn:
    """Do a job's work, print its summary, and exit with the code that its outcome has."""
    configure_logging()
    signal.signal(signal.SIGTERM, _terminate)
    code = _outcome(work)
    # Threads of native libraries can abort the interpreter while it shuts down (seen once: -6 instead of 65), and a
    # scheduler acts on the code. Everything is written and closed by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _outcome(work: Callable[[], dict[str, Any]]) -> int:
    try:
        summary, code = work(), 0
    except PipelineError as error:
        summary, code = _failure(error, str(error), error.exit_code)
    except (KeyboardInterrupt, _TerminatedError) as stop:
        code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED
        summary, code = _failure(
            stop, "stopped; finished work is kept: run the same command again to go on", code
        )
    except Exception as error:  # noqa: BLE001  (the last place that can turn a defect into an exit code)
        traceback.print_exc()
        summary, code = _failure(error, f"{type(error).__name__}: {error}", FAILED)
    print(json.dumps(summary, default=str), flush=True)  # noqa: T201  (the contract: the last line of stdout)
    return code


def _failure(error: BaseException, message: str, code: int) -> tuple[dict[str, Any], int]:
    name = type(error).__name__.strip("_")
    structlog.get_logger().error("job_stopped", error=name, message=message, exit_code=code)
    return {"error": name, "message": message, "exit_code": code}, code


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _TerminatedError


def run_command(command: Callable[..., None]) -> None:
    """Run one job's command as a program of its own: `python -m jobs.<name>`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()
