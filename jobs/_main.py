"""What every job shares: arguments, exit codes, signals, the summary line. What a job does is in its own file.

stdout carries one JSON object, the summary, as its last line; logs, progress and tables go to stderr. Exit codes:
0 ok, 2 usage, 3 publish conflict, 4 quality gate failed, 65 bad data, 75 transient, 78 bad config, 130 and 143 stopped.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, NoReturn

import structlog
import typer

from pipeline.errors import PipelineError
from pipeline.execution.logs import StrayOutput, configure_logging

__all__ = ["Conf", "Overrides", "exit_code_of", "finish", "run_command"]

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
        with contextlib.redirect_stdout(StrayOutput()):
            summary, code = work(), 0
    except (Exception, KeyboardInterrupt, _TerminatedError) as error:  # noqa: BLE001  (a defect too gets an exit code)
        code = exit_code_of(error)
        summary = _failure(error, code)
    print(json.dumps(summary, default=str), flush=True)  # noqa: T201  (the contract: the last line of stdout)
    return code


def exit_code_of(error: BaseException) -> int:
    """Exit code of a job that ends with this error."""
    stop = _stop_behind(error)
    if stop is not None:
        return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED
    return error.exit_code if isinstance(error, PipelineError) else FAILED


def _stop_behind(error: BaseException) -> BaseException | None:
    """The signal that an error came of: native code turns an exception raised in it into a SystemError."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt | _TerminatedError):
        found = found.__cause__ or found.__context__
    return found


def _failure(error: BaseException, code: int) -> dict[str, Any]:
    error = _stop_behind(error) or error
    name, message = type(error).__name__.strip("_"), str(error)
    if code in (INTERRUPTED, TERMINATED):
        message = "stopped; finished work is kept: run the same command again to go on"
    elif code == FAILED:
        message = f"{name}: {message}"
    defect = error if code == FAILED else None
    structlog.get_logger().error("job_stopped", error=name, message=message, exit_code=code, exc_info=defect)
    return {"error": name, "message": message, "exit_code": code}


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _TerminatedError


def run_command(command: Callable[..., None]) -> None:
    """Run one job's command as a program of its own: `python -m jobs.<name>`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()
