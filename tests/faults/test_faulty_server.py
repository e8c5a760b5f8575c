"""strata behind a faulty S3 server: errors, refusals that pass, cut and repeated requests; no storm of retries."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.config import StorageConfig
from pipeline.errors import StorageUnavailableError
from pipeline.storage import LocalStore, Log, S3Store
from tests.faults.proxy import FaultyProxy, bursts, mixed
from tests.integration.roads import data_files, rows_of
from tests.jobs.test_command_line import small, strata, summary_of

pytestmark = pytest.mark.s3

MIB = 1024 * 1024


def _store(root, proxy, **more):
    return S3Store(root, StorageConfig(endpoint_url=proxy.url, **more))


def _use(store, n):
    """Every kind of request, with what must come of it."""
    data = os.urandom(50_000)
    store.write(f"a/{n}", data)
    assert store.read(f"a/{n}") == data
    assert store.head(f"a/{n}").size == len(data)
    assert store.read_ranges(f"a/{n}", [(5, 10), (40_000, 50_000)]).chunks == [data[5:10], data[40_000:]]
    assert Log(store, f"log/{n}").append(1, {"n": n})
    assert not Log(store, f"log/{n}").append(1, {"n": -1})
    assert Log(store, f"log/{n}").entries() == [{"n": n}]


def test_every_request_comes_through_a_fifth_of_faults(s3_root, s3_endpoint):
    with FaultyProxy(s3_endpoint, mixed(0, 1)) as proxy:
        store = _store(s3_root, proxy)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: _use(store, n), range(30)))
            calm = proxy.counts["requests"]
            proxy.choose = mixed(0.2, 1)
            list(pool.map(lambda n: _use(store, n), range(30, 60)))
        proxy.choose = mixed(0, 1)
        assert [info.path for info in store.list("a")] == sorted(f"a/{n}" for n in range(60))
    print(f"\n{calm} requests without, {proxy.counts['requests'] - calm} with faults: {dict(proxy.counts)}")
    assert proxy.faults > 0.1 * calm
    assert proxy.counts["requests"] - calm < 1.5 * calm


def test_an_upload_in_parts_sends_only_failed_parts_again(s3_root, s3_endpoint, tmp_path):
    local = tmp_path / "large"
    local.write_bytes(os.urandom(MIB) * 101)
    with FaultyProxy(s3_endpoint, mixed(0.4, 3)) as proxy:
        store = _store(s3_root, proxy)
        for n in range(2):
            store.adopt(local, f"large-{n}")
        proxy.choose = mixed(0, 1)
        assert [store.head(f"large-{n}").size for n in range(2)] == [101 * MIB] * 2
        data = local.read_bytes()
        assert all(store.read(f"large-{n}") == data for n in range(2))
    print(f"\n{dict(proxy.counts)}")
    assert proxy.faults > 3
    assert proxy.counts["requests"] < 30


def test_slow_down_is_met_with_patience_and_no_storm(s3_root, s3_endpoint):
    with FaultyProxy(s3_endpoint, mixed(0, 1)) as proxy:
        store = _store(s3_root, proxy)
        store.write("k", b"x")
        before, start = proxy.counts["requests"], time.monotonic()
        proxy.choose = bursts("SlowDown", 4, 1000)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda _: store.head("k").size, range(8))) == [1] * 8
        seconds, sent = time.monotonic() - start, proxy.counts["requests"] - before
    print(f"\n{sent} requests for 8 while the store said SlowDown for 4 s; {seconds:.1f} s")
    assert 4 <= seconds < 25
    assert sent <= 8 * 8


def test_a_store_that_stays_busy_is_asked_no_more_often_than_configured(s3_root, s3_endpoint):
    proxy = FaultyProxy(s3_endpoint, mixed(1, 1, {"SlowDown": 1}))
    with proxy, pytest.raises(StorageUnavailableError, match="after 3 attempts"):
        _store(s3_root, proxy, attempts=3).read("k")
    assert proxy.counts["requests"] == 3


# ------------------------------------------------------------------------------------------------ real processes


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Bytes of a run on a local folder."""
    folder = tmp_path_factory.mktemp("local")
    strata("run", small(folder, rows_of(300)), check=0)
    return folder, data_files(LocalStore(str(folder / "root")))


@pytest.mark.ray
@pytest.mark.parametrize(
    "choose",
    [
        pytest.param(lambda: mixed(0.05, 5), id="errors"),
        pytest.param(lambda: bursts("SlowDown", 2, 7), id="slow-down", marks=pytest.mark.slow),
        pytest.param(lambda: bursts("AccessDenied", 2, 7), id="denied-for-a-while", marks=pytest.mark.slow),
    ],
)
def test_a_run_behind_a_faulty_server_ends_in_the_same_bytes(local, s3_root, s3_endpoint, choose):
    folder, wanted = local
    conf = folder / "conf.yaml"
    with FaultyProxy(s3_endpoint, choose()) as proxy:
        where = ("--set", f"root={s3_root}", "--set", f"storage.endpoint_url={proxy.url}")
        start = time.monotonic()
        summary = summary_of(strata("run", conf, *where, check=0))
        seconds, counts = time.monotonic() - start, dict(proxy.counts)
    assert summary["documents"] == 300
    assert data_files(S3Store(s3_root, StorageConfig(endpoint_url=s3_endpoint))) == wanted
    assert (
        summary_of(
            strata(
                "verify",
                conf,
                "--set",
                f"root={s3_root}",
                "--set",
                f"storage.endpoint_url={s3_endpoint}",
                check=0,
            )
        )["problems"]
        == []
    )
    print(f"\n{seconds:.1f} s, {counts}")
    assert proxy.faults > 0


@pytest.mark.parametrize("code", ["AccessDenied", pytest.param("InvalidAccessKeyId", marks=pytest.mark.slow)])
def test_wrong_credentials_end_with_78_in_reasonable_time(tmp_path, s3_root, s3_endpoint, code):
    conf = small(tmp_path)
    with FaultyProxy(s3_endpoint, mixed(1, 1, {code: 1})) as proxy:
        start = time.monotonic()
        done = strata("run", conf, "--set", f"root={s3_root}", "--set", f"storage.endpoint_url={proxy.url}")
        seconds = time.monotonic() - start
    assert done.returncode == 78, done.stderr
    assert "check the credentials" in summary_of(done)["message"]
    assert seconds < 15
    print(f"\n{seconds:.1f} s, {proxy.counts['requests']} requests")


@pytest.mark.slow
def test_a_store_that_stays_down_ends_with_75_and_few_requests(tmp_path, s3_root, s3_endpoint):
    conf = small(tmp_path)
    with FaultyProxy(s3_endpoint, mixed(1, 1, {"SlowDown": 1, "InternalError": 1})) as proxy:
        start = time.monotonic()
        where = ("--set", f"root={s3_root}", "--set", f"storage.endpoint_url={proxy.url}")
        done = strata("run", conf, *where, "--set", "storage.attempts=4")
        seconds = time.monotonic() - start
    assert done.returncode == 75, done.stderr
    assert "after 4 attempts" in summary_of(done)["message"]
    assert proxy.counts["requests"] == 4
    print(f"\n{seconds:.1f} s")
