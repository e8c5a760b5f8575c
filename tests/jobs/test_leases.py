"""Jobs that meet at one root: real processes, one after the other, whatever their order, and those that were killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.release.leases import lease_log
from pipeline.storage import LocalStore
from tests.integration.roads import rows_of
from tests.jobs.test_command_line import REPOSITORY, small, strata, summary_of

pytestmark = pytest.mark.ray


@contextlib.contextmanager
def started(*words):
    """A job in a process group of its own, killed at the end if it has not ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process):
    """Exit code, summary and log of a job that is let run to its end."""
    out, err = process.communicate(timeout=240)
    return process.returncode, json.loads(out.strip().splitlines()[-1]), err


def until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def has_begun(folder, seq=1):
    return (folder / "root" / f"leases/root/{seq:08d}.beat").exists


def states(folder: Path):
    return [(entry["state"], entry["job"]) for entry in lease_log(LocalStore(str(folder / "root"))).entries()]


def test_two_runs_of_one_configuration_at_once_make_one_release(tmp_path):
    conf = small(tmp_path, rows_of(600))
    with started("run", conf) as one, started("run", conf) as two:
        found = [ended(process) for process in (one, two)]
    assert [code for code, _, _ in found] == [0, 0], [err for _, _, err in found]
    assert {summary["release"] for _, summary, _ in found} == {1}
    assert sorted(summary["skipped"] for _, summary, _ in found) == [False, True]
    status = summary_of(strata("status", conf, check=0))
    assert (len(status["releases"]), status["lease"]) == (1, None)


def test_runs_of_different_settings_at_once_follow_each_other_or_leave(tmp_path):
    conf = small(tmp_path, rows_of(600))
    other = ("--set", "binarizer.bytes=8")
    with started("run", conf) as first:
        until(has_begun(tmp_path))
        with started("run", conf, *other) as second:
            left = strata("run", conf, *other, "--set", "lease.on_busy=leave", check=75)
            assert summary_of(left)["error"] == "RootBusyError"
            for part in ("`strata run`", f"pid {first.pid}", "since 20", "lease.on_busy: wait"):
                assert part in summary_of(left)["message"]
            assert summary_of(strata("status", conf, check=0))["lease"]["pid"] == first.pid
            found = [ended(first), ended(second)]
    assert [(code, summary["release"]) for code, summary, _ in found] == [(0, 1), (0, 2)]
    assert found[1][1]["code_bytes"] == 8
    assert "waiting_for_root" in found[1][2]
    for release in (1, 2):
        assert summary_of(strata("verify", conf, "--release", release, check=0))["problems"] == []
    assert states(tmp_path) == [("held", "run"), ("released", "run")] * 2


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_rerun_does_not_wait_for_a_run_that_was_stopped(tmp_path, how, code):
    conf = small(tmp_path, rows_of(600))
    with started("run", conf) as process:
        until(has_begun(tmp_path))
        os.kill(process.pid, how)
        process.wait(timeout=60)
        assert process.returncode == code
        again = strata("run", conf, check=0)
    assert summary_of(again)["documents"] == 600
    # Killed, it gave nothing back; its lock was open, and nobody listened for its beats.
    gave_back = [("released", "run")] if how == signal.SIGTERM else []
    assert states(tmp_path) == [("held", "run"), *gave_back, ("held", "run"), ("released", "run")]
    taken = [json.loads(line) for line in again.stderr.splitlines() if '"lease_taken_over"' in line]
    assert [line["silent_s"] for line in taken] == ([] if gave_back else [0.0])


@pytest.mark.parametrize("first", ["run", "gc"])
def test_a_run_that_needs_what_gc_deletes_publishes_a_whole_release(tmp_path, first):
    """Release 1 is retired and its files are old; they go, or the run that makes them again reuses them."""
    conf = small(tmp_path, rows_of(600))
    for size in (16, 8):
        strata("run", conf, "--set", f"binarizer.bytes={size}", check=0)
    commands = {
        "run": ("run", conf, "--set", "binarizer.bytes=16"),
        "gc": ("gc", conf, "--set", "release.keep=1", "--set", "release.grace_hours=0"),
    }
    then = "gc" if first == "run" else "run"
    with started(*commands[first]) as one:
        until(has_begun(tmp_path, seq=5), seconds=60)
        with started(*commands[then]) as two:
            found = {first: ended(one), then: ended(two)}
    assert [code for code, _, _ in found.values()] == [0, 0], [err for _, _, err in found.values()]
    assert found["run"][1]["release"] == 3
    assert found["gc"][1]["retired"] == ([1, 2] if first == "run" else [1])
    assert summary_of(strata("verify", conf, check=0))["problems"] == []
    assert [job for _, job in states(tmp_path)[4:]] == [first, first, then, then]
