"""Start a RayJob from its suspended template, wait for its end, exit with strata's own exit code.

Runs as the only container of a Kubernetes Job, so that `concurrencyPolicy: Forbid` forbids a second run and not only a second
submission, and so that the Job's `podFailurePolicy` sees exit codes: KubeRay's submitter ends with 0 whatever the Ray job did.

A pod that is evicted finds the RayJob of the pod before it by its label and waits for that one. Deleting the Job deletes the
RayJob, its owner's garbage, and that stops the run. Needs the standard library only.

Environment: NAMESPACE, JOB_NAME, JOB_UID (downward API); TEMPLATE, name of the suspended RayJob; DEADLINE_SECONDS, by when after
the first attempt every attempt has ended; POLL_SECONDS; ENTRYPOINT, in place of the template's; HEAD_ONLY, "true" for jobs that
need no workers.
"""

import json
import logging
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["Api", "Launch", "exit_code", "launch", "main"]

TRANSIENT, MISCONFIGURED = 75, 78
OUTAGE_SECONDS = 600
"""How long the API server may be away before the launcher gives up; the Job's next pod goes on."""
LABEL = "strata/launch"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
LOG = logging.getLogger("launch")
ENTRYPOINT_FAILED = re.compile(r"failed with exit code (-?\d+)")


class Api:
    """RayJobs of one namespace.

    Args:
        server: URL of the API server.
        namespace: Where the RayJobs are.
        account: Folder with the service account's `token` and `ca.crt`; the token is read again for every call, for it expires.
    """

    def __init__(self, server: str, namespace: str, account: Path) -> None:
        self._url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account = account
        authority = account / "ca.crt"
        self._context = ssl.create_default_context(cafile=authority) if authority.exists() else None

    def get(self, name: str) -> dict[str, Any]:
        """One RayJob."""
        return self._call(f"{self._url}/{name}")

    def list(self, label: str, value: str) -> list[dict[str, Any]]:
        """RayJobs with a label."""
        items: list[dict[str, Any]] = self._call(f"{self._url}?labelSelector={label}%3D{value}")["items"]
        return items

    def create(self, rayjob: Mapping[str, Any]) -> dict[str, Any]:
        """Create a RayJob."""
        return self._call(self._url, json.dumps(rayjob).encode())

    def _call(self, url: str, body: bytes | None = None) -> dict[str, Any]:
        token = (self._account / "token").read_text(encoding="utf-8").strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(url, data=body, headers=headers)  # noqa: S310  (the API server's own URL)
        with urllib.request.urlopen(request, timeout=30, context=self._context) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
            return found


@dataclass(frozen=True)
class Launch:
    """What to start, and for whom."""

    template: str
    job_name: str
    job_uid: str
    deadline_seconds: int
    entrypoint: str | None = None
    head_only: bool = False

    def rayjob(self, template: Mapping[str, Any], attempt: int, *, seconds_left: int) -> dict[str, Any]:
        """A running copy of the template, owned by the Kubernetes Job, that ends before the Job's time is over."""
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": self.job_name, "uid": self.job_uid}
        spec = {**template["spec"], "suspend": False}
        spec["activeDeadlineSeconds"] = min(seconds_left, spec.get("activeDeadlineSeconds", seconds_left))
        if self.entrypoint is not None:
            spec["entrypoint"] = self.entrypoint
        if self.head_only:
            alone = {"workerGroupSpecs": [], "enableInTreeAutoscaling": False}
            spec["rayClusterSpec"] = {**spec["rayClusterSpec"], **alone}
        metadata = template["metadata"]
        return {
            "apiVersion": template["apiVersion"],
            "kind": template["kind"],
            "metadata": {
                "name": f"{self.job_name}-{attempt}",
                "namespace": metadata["namespace"],
                "labels": {**metadata.get("labels", {}), LABEL: self.job_name},
                "ownerReferences": [owner],
            },
            "spec": spec,
        }


def exit_code(status: Mapping[str, Any]) -> int | None:
    """Exit code that the status of a RayJob stands for; None while it runs.

    The entrypoint's own code where it ran to its end; 78 where KubeRay refused the manifest; 75 where something around it failed:
    no nodes, a lost head, a deadline, a signal. A rerun finds what was finished.
    """
    if status.get("jobDeploymentStatus") not in {"Complete", "Failed"}:
        return None
    if status.get("jobStatus") == "SUCCEEDED":
        return 0
    if status.get("reason") == "ValidationFailed":
        return MISCONFIGURED
    found = ENTRYPOINT_FAILED.search(status.get("message", ""))
    code = int(found.group(1)) if found else -1
    return code if code > 0 else TRANSIENT


def launch(api: Api, what: Launch, *, poll_seconds: float) -> int:
    """Start the RayJob, or find the one that an earlier pod of this Job started, and wait for it.

    Returns:
        Exit code of the run.
    """
    rayjob = _started(api, what)
    name = rayjob["metadata"]["name"]
    LOG.info("waiting for RayJob %s", name)
    seen, last_answer = "", time.monotonic()
    while True:
        status = rayjob.get("status", {})
        state = f"{status.get('jobDeploymentStatus', '')} {status.get('jobStatus', '')}".strip() or "new"
        if state != seen:
            LOG.info("%s: %s %s", name, state, status.get("rayClusterName", ""))
            seen = state
        if (code := exit_code(status)) is not None:
            LOG.info(
                "%s: exit code %d %s\n%s", name, code, status.get("reason", ""), status.get("message", "")
            )
            return code
        time.sleep(poll_seconds)
        try:
            rayjob, last_answer = api.get(name), time.monotonic()
        except urllib.error.HTTPError as error:
            if error.code in {401, 403, 404}:
                raise
            LOG.warning("the API server answered %s", error)
        except OSError as error:
            LOG.warning("the API server does not answer (%s)", error)
        if time.monotonic() - last_answer > OUTAGE_SECONDS:
            raise TimeoutError(f"no answer from the API server for {OUTAGE_SECONDS} seconds")


def _started(api: Api, what: Launch) -> dict[str, Any]:
    earlier = sorted(api.list(LABEL, what.job_name), key=lambda one: _attempt(one["metadata"]["name"]))
    if earlier and exit_code(earlier[-1].get("status", {})) in {None, 0}:
        return earlier[-1]
    attempt, left = 1, what.deadline_seconds
    if earlier:
        attempt = _attempt(earlier[-1]["metadata"]["name"]) + 1
        first = datetime.fromisoformat(earlier[0]["metadata"]["creationTimestamp"])
        left -= int((datetime.now(UTC) - first).total_seconds())
    if left <= 0:
        raise TimeoutError(f"no time is left of {what.deadline_seconds} seconds for another attempt")
    return api.create(what.rayjob(api.get(what.template), attempt, seconds_left=left))


def _attempt(name: str) -> int:
    return int(name.rpartition("-")[2])


def main(environment: Mapping[str, str], account: Path = ACCOUNT) -> int:
    """Launch what the environment says."""
    host, port = environment["KUBERNETES_SERVICE_HOST"], environment["KUBERNETES_SERVICE_PORT"]
    scheme = "https" if (account / "ca.crt").exists() else "http"
    api = Api(f"{scheme}://{host}:{port}", environment["NAMESPACE"], account)
    what = Launch(
        template=environment["TEMPLATE"],
        job_name=environment["JOB_NAME"],
        job_uid=environment["JOB_UID"],
        deadline_seconds=int(environment["DEADLINE_SECONDS"]),
        entrypoint=environment.get("ENTRYPOINT"),
        head_only=environment.get("HEAD_ONLY") == "true",
    )
    try:
        return launch(api, what, poll_seconds=float(environment.get("POLL_SECONDS", "10")))
    except urllib.error.HTTPError as error:
        body = error.read().decode(errors="replace")
        LOG.error("the API server refuses: %s %s %s", error.code, error.url, body)  # noqa: TRY400  (no defect here)
        return MISCONFIGURED if error.code in {400, 401, 403, 404, 422} else TRANSIENT
    except OSError as error:
        LOG.error("gave up: %s", error)  # noqa: TRY400
        return TRANSIENT


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(message)s")
    sys.exit(main(os.environ))
