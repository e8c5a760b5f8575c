"""`ray job submit` of a run to a head with token authentication: what infra/README.md says of one machine."""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.roads import rows_of, settings, write_config, write_parquet

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"
PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
         "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")  # fmt: skip


@dataclass(frozen=True)
class Head:
    dashboard: str
    gcs: str
    token: str

    def environment(self, **more):
        base = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        known = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}
        return {**base, "PYTHONPATH": str(REPOSITORY), **known, **more}

    def submit(self, *entrypoint, **more):
        return subprocess.run(
            [RAY, "job", "submit", "--address", self.dashboard, "--", *entrypoint],
            env=self.environment(**more), capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip


def _free_ports(count):
    """Ports that nothing listens on; held together, so that they differ."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def _ours(token):
    """Processes that were started with our token, whatever group they put themselves in."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if token.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                yield int(path.parent.name)


def _end(token):
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in list(_ours(token)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 6
        while list(_ours(token)) and time.monotonic() < deadline:
            time.sleep(0.1)


@contextmanager
def _started():
    folder = tempfile.mkdtemp(prefix="st-", dir="/tmp")  # sockets need a short path
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    head = Head(
        f"http://127.0.0.1:{ports['dashboard-port']}", f"127.0.0.1:{ports['port']}", secrets.token_hex(32)
    )
    log = Path(folder) / "start.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block",  "--num-cpus", "2",
             "--object-store-memory", "100000000", "--temp-dir", folder,
             *(f"--{name}={port}" for name, port in ports.items())],
            env=head.environment(), stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        _wait(head, process, log)
        yield head
    finally:
        _end(head.token)
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def _asked(head, token):
    """Status of the dashboard's answer to a list of jobs."""
    connection = http.client.HTTPConnection(head.dashboard.removeprefix("http://"), timeout=10)
    connection.request("GET", "/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with contextlib.closing(connection):
        return connection.getresponse().status


def _wait(head, process, log):
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            if _asked(head, head.token) == 200:
                return
        time.sleep(0.25)
    raise AssertionError(f"the head did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def head():
    with _started() as found:
        yield found
    assert list(_ours(found.token)) == []


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("submitted")
    write_parquet(folder / "corpus.parquet", rows_of(200))
    content = settings(folder / "root", folder / "corpus.parquet", evaluation={"sample_queries": 20})
    return write_config(folder / "conf.yaml", content | {"ray": {"address": "auto"}})


def test_a_submitted_run_ends_with_its_summary(head, conf):
    done = head.submit(sys.executable, "-m", "jobs.run", str(conf))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    assert summary["release"] == 1
    assert summary["documents"] == 200
    assert summary["published"] is True


def test_a_failing_run_fails_the_job_and_names_its_exit_code(head, conf):
    done = head.submit(sys.executable, "-m", "jobs.run", str(conf), "--set", "ray.task_memory_mb=10000000",
                       "--set", f"root={conf.parent}/other")  # fmt: skip
    assert done.returncode != 0
    assert "failed with exit code 78" in done.stdout + done.stderr
    assert "the largest node has" in done.stdout


@pytest.mark.parametrize(
    "wrong", [{"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}]
)
def test_without_the_token_nothing_is_submitted(head, conf, wrong):
    done = head.submit(sys.executable, "-m", "jobs.status", str(conf), **wrong)
    assert done.returncode != 0
    assert "401" in done.stdout + done.stderr or "uthenti" in done.stdout + done.stderr
    assert _asked(head, wrong["RAY_AUTH_TOKEN"]) in {401, 403}


def test_a_driver_without_a_token_is_told_so(head, conf, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.run", str(conf), "--set", f"ray.address={head.gcs}", "--set", f"root={tmp_path}/root"],
        env=head.environment(RAY_AUTH_TOKEN="", HOME=str(tmp_path)), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 78, done.stdout + done.stderr
    assert "RAY_AUTH_TOKEN" in json.loads(done.stdout.splitlines()[-1])["message"]
