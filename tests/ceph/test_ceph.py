"""strata on Ceph: the contract of its store, the whole road, gateways and whole clusters that are killed; `make test-ceph`."""

import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import duckdb
import polars as pl
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from pipeline.config import StorageConfig
from pipeline.storage import LocalStore, S3Store
from tests.ceph.cluster import ACCESS_KEY, SECRET_KEY
from tests.conftest import BUCKET
from tests.integration.roads import data_files, rows_of
from tests.jobs.test_command_line import REPOSITORY, small, strata, summary_of

pytestmark = [pytest.mark.ceph, pytest.mark.timeout(1200)]

ROWS = 300
WRITERS, KEYS = 8, 20
DEADLINE_SECONDS = 180


@pytest.fixture
def root():
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run on a local folder: its configuration and its bytes."""
    folder = tmp_path_factory.mktemp("local")
    conf = small(folder, rows_of(ROWS))
    strata("run", conf, check=0)
    return conf, data_files(LocalStore(str(folder / "root")))


def _store(ceph, root):
    return S3Store(root, StorageConfig(endpoint_url=ceph.url))


def _where(ceph, root):
    return ("--set", f"root={root}", "--set", f"storage.endpoint_url={ceph.url}")


def _check(ceph, root, local):
    conf, wanted = local
    assert data_files(_store(ceph, root)) == wanted
    assert summary_of(strata("verify", conf, *_where(ceph, root), check=0))["problems"] == []


def test_the_contract_of_a_store_holds(ceph):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "s3", "tests/unit/test_storage.py"],
        capture_output=True, text=True, check=False, cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "STRATA_TEST_S3_ENDPOINT": ceph.url},
    )  # fmt: skip
    print("\n" + done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout


def test_put_if_absent_has_one_winner_however_many_race(ceph, root):
    stores = [_store(ceph, root) for _ in range(WRITERS)]

    def put(pair):
        writer, key = pair
        return key, stores[writer].put_if_absent(f"k/{key}", f"writer {writer}".encode())

    pairs = [(writer, key) for key in range(KEYS) for writer in range(WRITERS)]
    with ThreadPoolExecutor(WRITERS) as pool:
        winners = [key for key, won in pool.map(put, pairs) if won]
    assert sorted(winners) == list(range(KEYS))


@pytest.mark.ray
def test_the_whole_road_ends_in_the_bytes_of_a_local_run(ceph, root, local):
    start = time.monotonic()
    assert summary_of(strata("run", local[0], *_where(ceph, root), check=0))["documents"] == ROWS
    print(f"\n{time.monotonic() - start:.0f} s")
    _check(ceph, root, local)
    _read_by_others(ceph, root)


def _read_by_others(ceph, root):
    """pyarrow, Polars and, where its extension is installed, DuckDB read the documents from Ceph."""
    store = _store(ceph, root)
    paths = [info.path for info in store.list("documents")]
    bare = root.removeprefix("s3://")
    arrow = pyarrow.fs.S3FileSystem(endpoint_override=ceph.url, region="us-east-1")
    assert sum(pq.read_table(f"{bare}/{path}", filesystem=arrow).num_rows for path in paths) == ROWS
    options = {
        "endpoint_url": ceph.url, "region": "us-east-1", "allow_http": "true",
        "access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY,
    }  # fmt: skip
    assert sum(len(pl.read_parquet(f"{root}/{path}", storage_options=options)) for path in paths) == ROWS
    try:
        duckdb.sql("LOAD httpfs")
    except duckdb.Error as error:
        print(f"\nDuckDB has no httpfs here: {str(error).splitlines()[0]}")
        return
    host = ceph.url.removeprefix("http://")
    duckdb.sql(
        f"CREATE OR REPLACE SECRET (TYPE s3, KEY_ID '{ACCESS_KEY}', SECRET '{SECRET_KEY}', REGION 'us-east-1', "
        f"ENDPOINT '{host}', URL_STYLE 'path', USE_SSL false)"
    )
    assert len(duckdb.sql(f"SELECT * FROM read_parquet('{root}/documents/*.parquet')")) == ROWS


def _start_and_wait_for_receipts(ceph, root, conf, receipts):
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "run", str(conf), *_where(ceph, root)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    store, deadline = _store(ceph, root), time.monotonic() + DEADLINE_SECONDS
    while process.poll() is None and sum(1 for _ in store.list("receipts")) < receipts:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def _sizes(ceph, root):
    """Of every file but the sign of life, which a holder removes when it has ended."""
    return {i.path: i.size for i in _store(ceph, root).list("") if not i.path.endswith(".beat")}


@pytest.mark.ray
def test_a_run_whose_gateway_is_killed_ends_with_75_and_goes_on_to_the_same_bytes(ceph, root, local):
    process = _start_and_wait_for_receipts(ceph, root, local[0], 2)
    ceph.kill("rgw")
    start = time.monotonic()
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    print(f"\nended with {process.returncode} {time.monotonic() - start:.0f} s after the kill")
    ceph.start("rgw")
    assert process.returncode == 75, err
    assert "rerun" in summary_of(subprocess.CompletedProcess([], 75, out, err))["message"]
    strata("run", local[0], *_where(ceph, root), check=0)
    _check(ceph, root, local)


@pytest.mark.ray
def test_a_run_whose_whole_store_is_killed_and_restarted_ends_in_the_same_bytes(ceph, root, local):
    process = _start_and_wait_for_receipts(ceph, root, local[0], 2)
    acknowledged = _sizes(ceph, root)
    ceph.kill("mon", "osd", "rgw")
    start = time.monotonic()
    ceph.start("mon", "osd", "rgw")
    print(f"\nback after {time.monotonic() - start:.0f} s")
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    print(f"the run ended with {process.returncode}")
    assert process.returncode in {0, 75}, err
    assert acknowledged.items() <= _sizes(ceph, root).items()
    strata("run", local[0], *_where(ceph, root), check=0)
    _check(ceph, root, local)
