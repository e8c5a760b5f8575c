"""The launcher against a small API server that keeps RayJobs as Kubernetes would, in a process of its own as in its pod."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from tests.infra.manifests import built, problems

LAUNCHER = Path(__file__).resolve().parents[2] / "infra/kuberay/launch/launch_rayjob.py"
RUNS = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n{}"


class ApiServer:
    """RayJobs in memory; a job that is created goes through `script`, one status, or code of a failure, at each look."""

    def __init__(self):
        (template,) = [d for d in built("default") if d["kind"] == "RayJob"]
        self.rayjobs = {template["metadata"]["name"]: template}
        self.created, self.script, self.failures, self.tokens = [], [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.tokens.append(self.headers["Authorization"])
                self.answer(*outer.get(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(*outer.post(body))

            def answer(self, code, value):
                content = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def port(self):
        return self.server.server_address[1]

    def get(self, path):
        if self.failures:
            return self.failures.pop(0), {}
        url = urlparse(path)
        assert url.path.startswith("/apis/ray.io/v1/namespaces/strata/rayjobs")
        if selector := parse_qs(url.query).get("labelSelector"):
            key, _, value = selector[0].partition("=")
            items = [j for j in self.rayjobs.values() if j["metadata"].get("labels", {}).get(key) == value]
            return 200, {"items": items}
        name = url.path.rpartition("/")[2]
        if name not in self.rayjobs:
            return 404, {"message": f"rayjobs {name} not found"}
        if name in self.created and self.script:
            status = self.script.pop(0)
            if isinstance(status, int):
                return status, {}
            self.rayjobs[name]["status"] = status
        return 200, self.rayjobs[name]

    def post(self, body):
        name = body["metadata"]["name"]
        if name in self.rayjobs:
            return 409, {"message": "already exists"}
        self.add(body, datetime.now(UTC))
        self.created.append(name)
        return 201, body

    def add(self, body, created):
        body["metadata"]["creationTimestamp"] = created.strftime("%Y-%m-%dT%H:%M:%SZ")
        self.rayjobs[body["metadata"]["name"]] = body


@pytest.fixture
def api():
    server = ApiServer()
    yield server
    server.server.shutdown()
    server.server.server_close()


ADAPTER = "import sys, os; sys.path.insert(0, sys.argv[1]); import launch_rayjob as l; from pathlib import Path; sys.exit(l.main(os.environ, Path(sys.argv[2])))"


def _process(api, tmp_path, **more):
    (tmp_path / "token").write_text("the-token\n")
    environment = {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(api.port),
        "NAMESPACE": "strata",
        "JOB_NAME": "strata-run-29000000",
        "JOB_UID": "uid-1",
        "TEMPLATE": "strata-run",
        "DEADLINE_SECONDS": "1000",
        "POLL_SECONDS": "0.02",
    }
    return subprocess.Popen(
        [sys.executable, "-c", ADAPTER, str(LAUNCHER.parent), str(tmp_path)],
        env={**os.environ, **environment, **more}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _launch(api, tmp_path, **more):
    process = _process(api, tmp_path, **more)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def _status(deployment, job="", **more):
    return {"jobDeploymentStatus": deployment, "jobStatus": job, **more}


def test_a_copy_of_the_template_runs_to_its_end(api, tmp_path):
    api.script = [_status("Initializing"), _status("Running", "RUNNING"), _status("Complete", "SUCCEEDED")]
    code, err = _launch(api, tmp_path)
    assert code == 0, err
    made = api.rayjobs["strata-run-29000000-1"]
    assert made["spec"]["suspend"] is False
    assert made["spec"]["activeDeadlineSeconds"] == 1000
    assert made["metadata"]["ownerReferences"][0]["uid"] == "uid-1"
    assert made["spec"]["rayClusterSpec"] == api.rayjobs["strata-run"]["spec"]["rayClusterSpec"]
    assert api.rayjobs["strata-run"]["spec"]["suspend"] is True
    assert not list(problems({"spec": made["spec"]}, "RayJob"))
    assert set(api.tokens) == {"Bearer the-token"}


def test_a_job_without_workers_gets_its_own_command(api, tmp_path):
    api.script = [_status("Complete", "SUCCEEDED")]
    code, err = _launch(api, tmp_path, ENTRYPOINT="python -m jobs.gc x.yaml", HEAD_ONLY="true")
    assert code == 0, err
    spec = api.rayjobs["strata-run-29000000-1"]["spec"]
    assert spec["entrypoint"] == "python -m jobs.gc x.yaml"
    assert spec["rayClusterSpec"]["workerGroupSpecs"] == []
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    assert not list(problems({"spec": spec}, "RayJob"))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (_status("Failed", "FAILED", reason="AppFailed", message=RUNS.format(78, '{"error": "ConfigError"}')), 78),
        (_status("Failed", "FAILED", reason="AppFailed", message=RUNS.format(4, "")), 4),
        (_status("Failed", "FAILED", reason="AppFailed", message=RUNS.format(75, "")), 75),
        (_status("Failed", "FAILED", reason="AppFailed", message=RUNS.format(-9, "")), 75),
        (_status("Failed", "FAILED", reason="AppFailed", message="the head was lost"), 75),
        (_status("Failed", "", reason="PreRunningDeadlineExceeded"), 75),
        (_status("Failed", "RUNNING", reason="DeadlineExceeded"), 75),
        (_status("Failed", "", reason="ValidationFailed", message="spec is invalid"), 78),
        (_status("Complete", "STOPPED", message="stopped"), 75),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_run(api, tmp_path, status, code):
    api.script = [_status("Running", "RUNNING"), status]
    found, err = _launch(api, tmp_path)
    assert found == code, err


def test_a_new_pod_waits_for_the_run_of_the_one_that_was_evicted(api, tmp_path):
    api.script = [_status("Running", "RUNNING")] * 10_000
    first = _process(api, tmp_path)
    deadline = time.monotonic() + 30
    while not api.created and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=30)
    api.script = [_status("Complete", "SUCCEEDED")]
    code, err = _launch(api, tmp_path)
    assert code == 0, err
    assert api.created == ["strata-run-29000000-1"]


def test_a_retry_is_a_new_attempt_with_the_time_that_is_left(api, tmp_path):
    api.script = [_status("Failed", "FAILED", message=RUNS.format(75, ""))]
    assert _launch(api, tmp_path)[0] == 75
    first = api.rayjobs["strata-run-29000000-1"]
    api.add(first, datetime.now(UTC) - timedelta(seconds=400))
    api.script = [_status("Complete", "SUCCEEDED")]
    assert _launch(api, tmp_path)[0] == 0
    assert api.created == ["strata-run-29000000-1", "strata-run-29000000-2"]
    assert 590 <= api.rayjobs["strata-run-29000000-2"]["spec"]["activeDeadlineSeconds"] <= 600
    api.rayjobs["strata-run-29000000-2"]["status"] = _status("Failed", "FAILED", message=RUNS.format(75, ""))
    api.add(first, datetime.now(UTC) - timedelta(seconds=1001))
    code, err = _launch(api, tmp_path)
    assert (code, len(api.created)) == (75, 2)
    assert "no time is left" in err


def test_an_api_server_that_is_away_for_a_moment_is_waited_for(api, tmp_path):
    api.script = [_status("Running", "RUNNING"), 500, 503, _status("Complete", "SUCCEEDED")]
    code, err = _launch(api, tmp_path)
    assert code == 0, err
    assert [name for name in ("500", "503") if f"HTTP Error {name}" in err] == ["500", "503"]


@pytest.mark.parametrize(("failure", "code"), [(403, 78), (503, 75)])
def test_a_refusal_at_the_start_says_whether_a_retry_helps(api, tmp_path, failure, code):
    api.failures = [failure]
    found, err = _launch(api, tmp_path)
    assert found == code
    assert str(failure) in err


def test_a_template_that_is_not_there_is_not_retried(api, tmp_path):
    code, err = _launch(api, tmp_path, TEMPLATE="strata-nothing")
    assert code == 78
    assert "strata-nothing" in err
