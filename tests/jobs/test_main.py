"""Exit codes of jobs that are stopped while native code runs; options that exclude each other."""

import pytest
import typer

from jobs._main import _TerminatedError, exit_code_of
from jobs.search import _check_cascade, _check_options
from pipeline.errors import StorageUnavailableError


def _behind(stop, kind):
    """An error that native code made of a stop, or one that was raised while a stop was handled."""
    error = (SystemError if kind == "cause" else StorageUnavailableError)("place", "no answer")
    setattr(error, f"__{kind}__", stop)
    return error


@pytest.mark.parametrize("kind", ["cause", "context"])
@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (_TerminatedError(), 143)])
def test_an_error_that_a_signal_caused_has_the_exit_code_of_the_signal(stop, code, kind):
    assert exit_code_of(stop) == code
    assert exit_code_of(_behind(stop, kind)) == code


def test_other_errors_keep_their_codes():
    assert exit_code_of(StorageUnavailableError("place", "no answer")) == 75
    assert exit_code_of(ValueError("a defect")) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"items": False}, "either --queries or --items"),
        ({"queries": "q", "items": True}, "either --queries or --items"),
        ({"items": True, "out": "r.parquet"}, "end with a slash"),
        ({"items": True, "rerank": 5}, "are of --queries"),
        ({"items": True, "encoder": "other"}, "are of --queries"),
        ({"queries": "q", "items": False, "where": "year = 1"}, "--filter is of --items"),
    ],
)
def test_options_of_a_search_that_say_nothing_together_are_refused(options, problem):
    given = {
        "queries": None,
        "out": "r/",
        "where": None,
        "rerank": None,
        "encoder": None,
    } | options
    with pytest.raises(typer.BadParameter, match=problem):
        _check_options(**given)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("r/", 50, None), "--cascade is of --queries into a file"),
        (("r.parquet", None, 2), "--admit is of --cascade"),
    ],
)
def test_options_of_a_cascade_that_say_nothing_together_are_refused(options, problem):
    with pytest.raises(typer.BadParameter, match=problem):
        _check_cascade(*options)
