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

from pipeline.config import LeaseConfig, load_config
from pipeline.release import hold_root, read_release, verify
from pipeline.release.leases import lease_log
from pipeline.storage import LocalStore
from tests.integration.roads import run_inline
from tests.jobs.test_command_line import REPOSITORY, small, strata, summary_of

pytestmark = pytest.mark.ray


@contextlib.contextmanager
def started(*words, log=None):
    """A job in a process group of its own, killed at the end if it has not ended; its log may go to a file."""
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(log.open("w")) if log else subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *map(str, words)],
            stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
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


def _run_two_at_once(tmp_path, conf, *other):
    """Start two runs while the root is held, and let it go once both wait; the second has settings of its own."""
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    with contextlib.ExitStack() as stack:
        with hold_root(LocalStore(str(tmp_path / "root")), "test", LeaseConfig()):
            one = stack.enter_context(started("run", conf, log=logs[0]))
            two = stack.enter_context(started("run", conf, *other, log=logs[1]))
            until(lambda: all("waiting_for_root" in log.read_text() for log in logs))
        found = [ended(process)[:2] for process in (one, two)]
    assert [code for code, _ in found] == [0, 0], [log.read_text() for log in logs]
    return [summary for _, summary in found]


@pytest.mark.slow
def test_two_runs_of_one_configuration_at_once_make_one_release(tmp_path):
    conf = small(tmp_path)
    found = _run_two_at_once(tmp_path, conf)
    assert {summary["release"] for summary in found} == {1}
    assert sorted(summary["skipped"] for summary in found) == [False, True]
    status = summary_of(strata("status", conf, check=0))
    assert (len(status["releases"]), status["lease"]) == (1, None)


@pytest.mark.slow
def test_two_runs_of_different_settings_at_once_follow_each_other(tmp_path):
    conf = small(tmp_path)
    found = _run_two_at_once(tmp_path, conf, "--set", "binarizer.bytes=8")
    assert sorted(summary["release"] for summary in found) == [1, 2]
    assert [summary["code_bytes"] for summary in found] == [16, 8]
    store = LocalStore(str(tmp_path / "root"))
    assert [verify(store, read_release(store, release)).problems for release in (1, 2)] == [(), ()]
    assert states(tmp_path)[2:] == [("held", "run"), ("released", "run")] * 2


def test_a_job_may_leave_a_root_that_is_held(tmp_path):
    conf = small(tmp_path)
    with hold_root(LocalStore(str(tmp_path / "root")), "run", LeaseConfig(stale_after_s=3)) as lease:
        for job in ("run", "gc"):
            left = strata(job, conf, "--set", "lease.on_busy=leave", check=75)
            assert summary_of(left)["error"] == "RootBusyError"
            for part in ("`strata run`", f"pid {os.getpid()}", "since 20", "lease.on_busy: wait"):
                assert part in summary_of(left)["message"]
        assert summary_of(strata("status", conf, check=0))["lease"]["pid"] == os.getpid()
        strata("gc", conf, "--dry-run", check=0)
        lease.check()


@pytest.mark.parametrize(
    ("how", "code"),
    [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_rerun_does_not_wait_for_a_run_that_was_stopped(tmp_path, how, code):
    conf = small(tmp_path)
    with started("run", conf) as process:
        until(has_begun(tmp_path))
        os.kill(process.pid, how)
        process.wait(timeout=60)
        assert process.returncode == code
        again = strata("run", conf, check=0)
    assert summary_of(again)["documents"] == 200
    # Killed, it gave nothing back; its lock was open, and nobody listened for its beats.
    gave_back = [("released", "run")] if how == signal.SIGTERM else []
    assert states(tmp_path) == [("held", "run"), *gave_back, ("held", "run"), ("released", "run")]
    taken = [json.loads(line) for line in again.stderr.splitlines() if '"lease_taken_over"' in line]
    assert [line["silent_s"] for line in taken] == ([] if gave_back else [0.0])


@pytest.mark.parametrize("first", [pytest.param("run", marks=pytest.mark.slow), "gc"])
def test_a_run_that_needs_what_gc_deletes_publishes_a_whole_release(tmp_path, first):
    """Release 1 is retired and its files are old; they go, or the run that makes them again reuses them."""
    conf = small(tmp_path)
    for size in (16, 8):
        run_inline(load_config(conf, (f"binarizer.bytes={size}",)))
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
