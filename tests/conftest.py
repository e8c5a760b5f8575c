"""Stores and data that tests share."""

import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from hypothesis import settings
from moto.server import ThreadedMotoServer

from pipeline.config import StorageConfig
from pipeline.storage import LocalStore, S3Store, Store
from tests.ceph.cluster import ACCESS_KEY, INSTALL, SECRET_KEY, CephCluster, missing_programs

# A shared machine is slow at times, which is no defect; CI draws the same examples every time, a developer new ones.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


BUCKET = "strata-tests"


OUTSIDE = "STRATA_TEST_S3_ENDPOINT"
"""Environment variable that names a running S3 server, with its credentials in the usual variables; absent: one is started."""


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server on a free loopback port, with made-up credentials in the environment; or the one that OUTSIDE names."""
    if OUTSIDE in os.environ:
        yield os.environ[OUTSIDE]
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        server.start()
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True).mkdir(BUCKET)
        yield endpoint
        server.stop()


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server as a process of its own, which a busy test does not slow down."""
    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("wb") as out, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            endpoint = _announced(log, process)
            s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True).mkdir(BUCKET)
            yield endpoint
        finally:
            process.kill()
            process.wait()


def _announced(log: Path, process: subprocess.Popen[bytes]) -> str:
    """The address that the server says it listens on."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return found[0]
        time.sleep(0.05)
    pytest.fail(f"the S3 server did not start: {log.read_text()}")


@pytest.fixture
def s3_process_root() -> str:
    """A fresh prefix on that server."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def s3_config(s3_endpoint: str) -> StorageConfig:
    """Settings of the S3 server."""
    return StorageConfig(endpoint_url=s3_endpoint)


@pytest.fixture
def s3_root(s3_endpoint: str) -> str:
    """A fresh prefix on the S3 server."""
    assert s3_endpoint
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def ceph() -> Iterator[CephCluster]:
    """A real Ceph with a bucket, as the environment's S3."""
    if missing_programs():
        pytest.skip(f"needs {', '.join(missing_programs())}: {INSTALL}")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ceph-") as home:
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        # Ceph answers 411 to the checksums in trailers that newer clients send unasked.
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        patch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        start = time.monotonic()
        with CephCluster(Path(home)) as cluster:
            print(f"\nCeph serves after {time.monotonic() - start:.0f} s")
            s3fs.S3FileSystem(endpoint_url=cluster.url, skip_instance_cache=True).mkdir(BUCKET)
            yield cluster


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "local":
        return LocalStore(str(tmp_path / "root"))
    return S3Store(request.getfixturevalue("s3_root"), request.getfixturevalue("s3_config"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The corpora beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the corpora in {folder}")
    return folder
