"""The driver and everything it started, killed without warning: the rerun ends in the same bytes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pipeline.storage import LocalStore
from tests.integration.roads import data_files, rows_of
from tests.jobs.test_command_line import REPOSITORY, small, strata, summary_of

ROWS = 1500


def _kill_after(conf, root, seconds):
    """Start a run and kill its whole process group; returns whether it was still at work."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "run", str(conf), "--set", f"root={root}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    time.sleep(seconds)
    at_work = process.poll() is None
    if at_work:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return at_work


def _kill_and_rerun(tmp_path, kills, seed):
    conf = small(tmp_path, rows_of(ROWS))
    calm = tmp_path / "calm"
    start = time.monotonic()
    strata("run", conf, "--set", f"root={calm}", check=0)
    whole = time.monotonic() - start
    wanted = data_files(LocalStore(str(calm)))
    rng = np.random.default_rng(seed)
    killed = 0
    for n in range(kills):
        root = tmp_path / f"root-{n}"
        killed += _kill_after(conf, root, rng.uniform(0.3, 1.0) * whole)
        summary = summary_of(strata("run", conf, "--set", f"root={root}", check=0))
        assert summary["documents"] == ROWS
        assert data_files(LocalStore(str(root))) == wanted
        assert summary_of(strata("verify", conf, "--set", f"root={root}", check=0))["problems"] == []
    print(f"\n{killed} of {kills} runs were killed at work; all reruns ended in the same bytes")
    return killed


@pytest.mark.ray
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    assert _kill_and_rerun(tmp_path, kills=2, seed=1) >= 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_runs_killed_at_random_moments_go_on_to_the_same_bytes(tmp_path):
    assert _kill_and_rerun(tmp_path, kills=20, seed=2) >= 12
