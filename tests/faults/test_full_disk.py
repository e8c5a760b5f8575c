"""A disk that is really full: a small tmpfs in a mount namespace of its own, which needs no rights on most Linux systems."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pipeline.config import StorageConfig
from pipeline.storage import LocalStore, S3Store
from tests.integration.roads import data_files, rows_of
from tests.jobs.test_command_line import REPOSITORY, small, strata

ROWS = 300
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@pytest.fixture(scope="module", autouse=True)
def _needs_namespaces():
    probe = [*NAMESPACE, "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (util-linux) to mount a small disk")
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this system lets no user mount a small disk: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    conf = small(folder, rows_of(ROWS))
    strata("run", conf, check=0)
    files = data_files(LocalStore(str(folder / "root")))
    return conf, files, sum(map(len, files.values()))


def _in_small_disk(disk, script, **environment):
    """Run a script with a tmpfs at `disk`; gives (exit code, last line of stdout) of each step that it reports."""
    disk.mkdir()
    done = subprocess.run(
        [*NAMESPACE, "bash", "-c", script],
        capture_output=True, text=True, check=False, timeout=400,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "DISK": str(disk), "PYTHON": sys.executable, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = [int(line.removeprefix("exit ")) for line in done.stdout.splitlines() if line.startswith("exit ")]
    messages = [
        json.loads(line).get("message", "") for line in done.stdout.splitlines() if line.startswith("{")
    ]
    return codes, messages, done.stderr


FULL_THEN_FREED = """
mount -t tmpfs -o size=$SMALL none "$DISK" || exit 1
eval "$ENVIRONMENT" "$PYTHON" -m jobs run "$CONF" $OPTIONS | tail -n 1; echo "exit ${PIPESTATUS[0]}"
mount -o remount,size=256m "$DISK"
eval "$ENVIRONMENT" "$PYTHON" -m jobs run "$CONF" $OPTIONS | tail -n 1; echo "exit ${PIPESTATUS[0]}"
test -z "$KEEP" || cp -r "$DISK/root" "$KEEP"
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    "share", [0.5, pytest.param(0.1, marks=pytest.mark.slow), pytest.param(0.9, marks=pytest.mark.slow)]
)
def test_a_full_disk_ends_the_run_with_75_and_a_rerun_with_the_same_bytes(calm, tmp_path, share):
    conf, wanted, size = calm
    disk = tmp_path / "disk"
    codes, messages, err = _in_small_disk(
        disk, FULL_THEN_FREED, SMALL=str(int(share * size)), CONF=str(conf),
        OPTIONS=f"--set root={disk}/root", ENVIRONMENT="", KEEP=str(tmp_path / "kept"),
    )  # fmt: skip
    assert codes == [75, 0], err
    assert "No space left on device" in messages[0]
    assert "free space" in messages[0]
    assert "Traceback" not in err
    assert data_files(LocalStore(str(tmp_path / "kept"))) == wanted


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_a_full_staging_disk_ends_a_run_on_s3_with_75(calm, tmp_path, s3_root, s3_endpoint):
    conf, wanted, _ = calm
    disk = tmp_path / "disk"
    codes, messages, err = _in_small_disk(
        disk, FULL_THEN_FREED, SMALL="12k", CONF=str(conf), KEEP="",
        OPTIONS=f"--set root={s3_root} --set storage.endpoint_url={s3_endpoint}",
        ENVIRONMENT=f"TMPDIR={disk} RAY_TMPDIR=/tmp",
    )  # fmt: skip
    assert codes == [75, 0], err
    assert "No space left on device" in messages[0]
    assert str(disk) in messages[0]
    assert data_files(S3Store(s3_root, StorageConfig(endpoint_url=s3_endpoint))) == wanted
