"""Worker processes and encoder actors of a real run, killed by SIGKILL while they work: the run itself goes on to the same bytes."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from pipeline.release import verify
from pipeline.storage import LocalStore
from tests.integration.roads import data_files, rows_of
from tests.jobs.test_command_line import REPOSITORY, small, strata, summary_of

ROWS = 1500
DEADLINE_SECONDS = 240
VICTIMS = {
    "read": ("ray::perform", "scratch/rows/*"),
    "encode": ("ray::_EncoderActor", "embeddings/*/*/*.parquet"),
    "build": ("ray::perform", "partitions/*.lists.parquet"),
}
"""By stage: the title of a process that works on it, and files that show that the stage has begun."""


def _kill_one(driver, title) -> int | None:
    """SIGKILL a worker of the driver while it has a task; its pid."""
    for child in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
            # Between two tasks a worker's title says IDLE, an actor's names only its class.
            if child.cmdline()[0].startswith(title):
                child.kill()
                return child.pid
    return None


def _kill_in(stage, driver, root) -> bool:
    """Wait for the stage and kill one of its workers; False if the run was over before."""
    title, files = VICTIMS[stage]
    deadline = time.monotonic() + DEADLINE_SECONDS
    while driver.poll() is None and time.monotonic() < deadline:
        if any(root.glob(files)) and _kill_one(driver, title) is not None:
            return True
        time.sleep(0.002)
    return False


@pytest.mark.ray
def test_a_run_that_loses_a_worker_of_every_kind_ends_in_the_same_bytes(tmp_path):
    layout = {"rows_per_list": 25, "segment_rows": 100}
    conf = small(tmp_path, rows_of(ROWS), layout=layout, embedding={"unit_texts": 50}, ray={"num_cpus": 2})
    strata("run", conf, "--set", f"root={tmp_path}/calm", check=0)
    root = tmp_path / "root"
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs", "run", str(conf)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    try:
        killed = [stage for stage in VICTIMS if _kill_in(stage, driver, root)]
        out, err = driver.communicate(timeout=DEADLINE_SECONDS)
    finally:
        driver.kill()
    assert driver.returncode == 0, err
    assert killed == list(VICTIMS)
    summary = summary_of(subprocess.CompletedProcess([], 0, out, err))
    assert summary["documents"] == ROWS
    assert data_files(LocalStore(str(root))) == data_files(LocalStore(str(tmp_path / "calm")))
    assert verify(LocalStore(str(root)), None).problems == ()
