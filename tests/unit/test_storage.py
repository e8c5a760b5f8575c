"""Both stores keep one contract; the failures of S3 come out as our errors."""

import errno
import io
import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import StorageConfig
from pipeline.errors import ConfigError, CorruptArtifactError, MissingFileError, StorageUnavailableError
from pipeline.storage import (
    ACCESS_SECONDS,
    COALESCE_GAP_BYTES,
    LocalStore,
    Log,
    ObjectInfo,
    S3Store,
    Store,
    adopt_file,
    canonical_json,
    is_remote,
    open_store,
    sha256_of_file,
    split_uri,
)

MIB = 1024 * 1024

# ------------------------------------------------------------------------------------------------ both stores


def test_what_was_written_is_read(any_store: Store) -> None:
    any_store.write("a/b.bin", b"first")
    assert any_store.read("a/b.bin") == b"first"


def test_a_write_replaces(any_store: Store) -> None:
    any_store.write("a", b"a longer first version")
    any_store.write("a", b"second")
    assert any_store.read("a") == b"second"
    assert any_store.head("a").size == 6


def test_an_empty_object_is_an_object(any_store: Store) -> None:
    any_store.write("empty", b"")
    assert any_store.read("empty") == b""
    assert any_store.head("empty").size == 0
    with any_store.open_input("empty") as stream:
        assert stream.read() == b""


def test_readers_see_the_old_or_the_new_version_only(any_store: Store) -> None:
    versions = {bytes([v]) * 100_000 for v in range(2)}
    any_store.write("x", bytes(100_000))
    stop = threading.Event()

    def replace() -> None:
        for data in itertools.cycle(sorted(versions)):
            any_store.write("x", data)
            if stop.is_set():
                return

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(replace)
        seen = {any_store.read("x") for _ in range(30)}
        stop.set()
        writing.result()
    assert seen <= versions


def test_put_if_absent_has_one_winner(any_store: Store) -> None:
    writers, keys = 8, 12
    barrier = threading.Barrier(writers)

    def race(writer: int) -> list[bool]:
        barrier.wait()
        return [any_store.put_if_absent(f"race/{key}", f"writer {writer}".encode()) for key in range(keys)]

    with ThreadPoolExecutor(writers) as pool:
        wins = list(pool.map(race, range(writers)))
    for key in range(keys):
        winners = [writer for writer in range(writers) if wins[writer][key]]
        assert [any_store.read(f"race/{key}")] == [f"writer {writer}".encode() for writer in winners]


def test_put_if_absent_of_equal_content_counts_as_ours(any_store: Store) -> None:
    assert any_store.put_if_absent("k", b"token 1")
    assert any_store.put_if_absent("k", b"token 1")
    assert not any_store.put_if_absent("k", b"token 2")
    assert any_store.read("k") == b"token 1"


def test_put_if_absent_does_not_replace_what_write_put_there(any_store: Store) -> None:
    any_store.write("k", b"written")
    assert not any_store.put_if_absent("k", b"other")
    assert any_store.read("k") == b"written"


def test_absent_files_are_missing(any_store: Store) -> None:
    any_store.write("folder/file", b"x")
    for path in ("nothing", "folder", "folder/file/below"):
        for call in (any_store.read, any_store.head, any_store.open_input):
            with pytest.raises(MissingFileError, match=path):
                call(path)
        with pytest.raises(MissingFileError, match=path):
            any_store.read_ranges(path, [(0, 1)])


def test_head_tells_size_and_age(any_store: Store) -> None:
    any_store.write("k", b"12345")
    found = any_store.head("k")
    assert (found.path, found.size) == ("k", 5)
    assert abs(datetime.now(UTC) - found.modified) < timedelta(minutes=1)


def test_list_gives_what_is_below_a_folder_sorted(any_store: Store) -> None:
    paths = ["a/1", "a/b/2", "a/c", "ab/3", "z"]
    for path in reversed(paths):
        any_store.write(path, path.encode())
    assert [found.path for found in any_store.list("a")] == paths[:3]
    assert [found.path for found in any_store.list("")] == paths
    assert [(found.path, found.size) for found in any_store.list("z")] == [("z", 1)]
    assert list(any_store.list("nothing")) == []
    assert all(isinstance(found, ObjectInfo) and found.modified.tzinfo for found in any_store.list(""))


def test_list_agrees_with_head(any_store: Store) -> None:
    any_store.write("a/b", b"123")
    assert list(any_store.list("a")) == [any_store.head("a/b")]


def test_delete_removes_and_may_be_repeated(any_store: Store) -> None:
    any_store.write("a/b", b"x")
    any_store.delete("a/b")
    any_store.delete("a/b")
    any_store.delete("never/was")
    assert list(any_store.list("")) == []


def test_copy_keeps_an_object_under_another_path_too(any_store: Store) -> None:
    any_store.write("a/b", b"x")
    any_store.copy("a/b", "c/d")
    any_store.copy("a/b", "c/d")
    any_store.delete("a/b")
    assert any_store.read("c/d") == b"x"
    assert [found.path for found in any_store.list("")] == ["c/d"]
    with pytest.raises(MissingFileError, match="a/b"):
        any_store.copy("a/b", "c/e")


def test_an_upload_that_has_ended_may_be_aborted_again(any_store: Store) -> None:
    assert list(any_store.uploads()) == []
    any_store.abort_upload(ObjectInfo("a/b", 0, datetime.now(UTC), "gone"))


@pytest.mark.s3
@pytest.mark.skipif(
    "STRATA_TEST_S3_ENDPOINT" in os.environ,
    reason="cuts the pages of a server that gives all uploads in one answer",
)
def test_uploads_are_listed_page_by_page(s3: S3Store) -> None:
    """The test server gives all in one answer, so its pages are cut here as the protocol says."""
    send = s3._fs.call_s3
    asked: list[dict[str, Any]] = []

    def paging(operation: str, **parameters: Any) -> Any:
        answer = send(operation, **parameters)
        if operation != "list_multipart_uploads":
            return answer
        asked.append(parameters)
        names = [upload["Key"] for upload in answer["Uploads"]]
        first = names.index(parameters["KeyMarker"]) + 1 if "KeyMarker" in parameters else 0
        found = answer["Uploads"][first]
        return {
            "Uploads": [found],
            "IsTruncated": first + 1 < len(names),
            "NextKeyMarker": found["Key"],
            "NextUploadIdMarker": found["UploadId"],
        }

    for name in ("a", "b", "c"):
        send("create_multipart_upload", Bucket=s3._bucket, Key=s3._key(name))
    s3._fs.call_s3 = paging
    assert sorted(upload.path for upload in s3.uploads()) == ["a", "b", "c"]
    assert len(asked) == 3
    assert all("UploadIdMarker" in parameters for parameters in asked[1:])


def test_read_ranges_keeps_the_order_given(any_store: Store) -> None:
    data = os.urandom(400_000)
    any_store.write("k", data)
    ranges = [(300_000, 300_010), (0, 5), (5, 5), (4, 20), (399_999, 400_000), (0, 400_000)]
    found = any_store.read_ranges("k", ranges)
    assert found.chunks == [data[start:stop] for start, stop in ranges]


def test_read_ranges_of_nothing_is_empty(any_store: Store) -> None:
    any_store.write("k", b"data")
    assert any_store.read_ranges("k", []).chunks == []
    assert any_store.read_ranges("k", [(2, 2)]).chunks == [b""]


@pytest.mark.parametrize("beyond", [(2, 5), (4, 9), (100, 200)])
def test_a_range_beyond_the_end_is_corruption(any_store: Store, beyond: tuple[int, int]) -> None:
    any_store.write("k", b"data")
    with pytest.raises(CorruptArtifactError, match="run `strata verify`"):
        any_store.read_ranges("k", [(0, 2), beyond])


def test_open_input_seeks_as_a_file_does(any_store: Store) -> None:
    data = os.urandom(300_000)
    any_store.write("k", data)
    with any_store.open_input("k") as stream:
        assert stream.read(10) == data[:10]
        stream.seek(-7, io.SEEK_END)
        assert stream.read() == data[-7:]
        stream.seek(100_000)
        assert stream.read(50_000) == data[100_000:150_000]
        assert stream.tell() == 150_000
        stream.seek(5, io.SEEK_CUR)
        assert stream.read(1) == data[150_005:150_006]
        stream.seek(400_000)
        assert stream.read(1) == b""


def test_staging_leaves_nothing_behind_when_the_work_fails(any_store: Store) -> None:
    places: list[Path] = []

    def fail() -> None:
        with any_store.staging() as local:
            places.append(local)
            local.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not places[0].exists()
    assert list(any_store.list("")) == []


def test_adopt_file_names_by_content_and_may_be_repeated(any_store: Store, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        local = tmp_path / "out"
        local.write_bytes(b"content")
        found.append(adopt_file(any_store, local, "data", ".bin"))
    path, size, digest = found[0]
    assert found[0] == found[1]
    assert path == f"data/{digest[:32]}.bin"
    assert any_store.read(path) == b"content"
    assert size == 7


def test_adopt_file_mends_a_file_of_another_size(any_store: Store, tmp_path: Path) -> None:
    local = tmp_path / "out"
    local.write_bytes(b"content")
    path = f"data/{sha256_of_file(local)[:32]}.bin"
    any_store.write(path, b"cont")
    adopt_file(any_store, local, "data", ".bin")
    assert any_store.read(path) == b"content"


def test_adopt_file_makes_an_old_file_young_again(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "root"))
    local = tmp_path / "out"
    local.write_bytes(b"content")
    path, _, _ = adopt_file(store, local, "data", ".bin")
    os.utime(tmp_path / "root" / path, (0, 0))
    local.write_bytes(b"content")
    adopt_file(store, local, "data", ".bin")
    assert datetime.now(UTC) - store.head(path).modified < timedelta(minutes=1)


def test_a_store_travels_to_another_process(any_store: Store) -> None:
    any_store.write("k", b"x")
    data = pickle.dumps(any_store)
    assert len(data) < 1000
    assert pickle.loads(data).read("k") == b"x"


# ------------------------------------------------------------------------------------------------ logs


class _MemoryStore:
    """HEAD and put-if-absent over a dictionary; counts requests."""

    uri = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests = 0

    def head(self, path: str) -> ObjectInfo:
        self.requests += 1
        if path not in self.objects:
            raise MissingFileError(path, "absent")
        return ObjectInfo(path, len(self.objects[path]), datetime.now(UTC), "")

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return self.objects.setdefault(path, data) == data


@given(st.integers(0, 3000))
def test_newest_finds_the_end_of_a_log_in_logarithmic_requests(entries: int) -> None:
    store: Any = _MemoryStore()
    log = Log(store, "log")
    store.objects = {log.path(seq): b"{}" for seq in range(1, entries + 1)}
    assert log.newest() == entries
    assert store.requests <= 2 * max(entries, 1).bit_length() + 2


def test_a_log_keeps_entries_in_order(any_store: Store) -> None:
    log = Log(any_store, "aliases/x")
    assert log.newest() == 0
    assert log.entries() == []
    assert all(log.append(seq, {"n": seq}) for seq in range(1, 6))
    assert log.entries() == [{"n": seq} for seq in range(1, 6)]
    assert any_store.head("aliases/x/00000005.json").size == 7


def test_concurrent_appends_have_one_winner(any_store: Store) -> None:
    log = Log(any_store, "log")
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda writer: log.append(1, {"writer": writer}), range(8)))
    assert sum(wins) == 1
    assert log.read(1) == {"writer": wins.index(True)}


def test_an_entry_that_is_not_json_is_corrupt(tmp_path: Path) -> None:
    log = Log(LocalStore(str(tmp_path)), "log")
    (tmp_path / "log").mkdir()
    (tmp_path / log.path(1)).write_bytes(b"\xff{")
    with pytest.raises(CorruptArtifactError, match="00000001"):
        log.read(1)


# ------------------------------------------------------------------------------------------------ local disk


def test_a_root_that_is_a_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for write in (LocalStore(str(tmp_path / "file")).write, LocalStore(str(tmp_path / "file")).put_if_absent):
        with pytest.raises(ConfigError, match="file"):
            write("a/b", b"x")


def test_unfinished_files_are_not_listed(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    with store.staging() as local:
        local.write_bytes(b"half")
        assert list(store.list("")) == []


def test_a_full_disk_is_a_passing_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageUnavailableError, match="No space left"):
        LocalStore(str(tmp_path)).write("a", b"x")


# ------------------------------------------------------------------------------------------------ S3


@pytest.fixture
def s3(s3_root: str, s3_config: StorageConfig) -> S3Store:
    return S3Store(s3_root, s3_config)


@pytest.mark.s3
def test_a_large_file_is_uploaded_in_parts(s3: S3Store, tmp_path: Path) -> None:
    local = tmp_path / "large"
    local.write_bytes(os.urandom(MIB) * 101)
    path, size, _ = adopt_file(s3, local, "data", ".bin")
    assert s3.head(path).size == size == 101 * MIB
    assert s3.head(path).etag.endswith("-3")
    with s3.open_input(path) as stream:
        stream.seek(100 * MIB)
        assert stream.read(MIB) == local.read_bytes()[-MIB:]


@pytest.mark.s3
def test_near_ranges_are_one_request(s3: S3Store) -> None:
    s3.write("k", bytes(MIB))
    near = [(0, 10), (10 + COALESCE_GAP_BYTES, 20 + COALESCE_GAP_BYTES)]
    assert s3.read_ranges("k", near).requests == 1
    far = [(0, 10), (11 + COALESCE_GAP_BYTES, 20 + COALESCE_GAP_BYTES)]
    assert s3.read_ranges("k", far).requests == 2
    assert s3.read_ranges("k", far).bytes_read == 19


@pytest.mark.s3
def test_a_bucket_without_prefix_is_a_store(s3_config: StorageConfig, s3_root: str) -> None:
    bucket = S3Store(s3_root.rpartition("/")[0] + "/", s3_config)
    name = s3_root.rpartition("/")[2]
    bucket.write(f"{name}/k", b"x")
    assert bucket.head(f"{name}/k").size == 1
    assert [found.path for found in bucket.list(name)] == [f"{name}/k"]


@pytest.mark.s3
def test_a_put_that_lost_its_answer_does_not_lose_to_itself(s3: S3Store) -> None:
    send: Callable[..., Any] = s3._fs.pipe_file
    calls: list[str] = []

    def lose_the_first_answer(key: str, data: bytes, **options: Any) -> Any:
        calls.append(key)
        answer = send(key, data, **options)
        if len(calls) == 1:
            raise ConnectionResetError("the answer is lost")
        return answer

    s3._fs.pipe_file = lose_the_first_answer
    assert s3.put_if_absent("k", b"token 1")
    assert len(calls) == 2


@pytest.mark.s3
def test_a_failure_that_passes_is_tried_again(s3: S3Store) -> None:
    s3.write("k", b"x")
    send: Callable[..., Any] = s3._fs.cat_file
    failures = [OSError(16, "Please reduce your request rate"), TimeoutError("slow")]

    def fail_twice(*args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return send(*args, **options)

    s3._fs.cat_file = fail_twice
    assert s3.read("k") == b"x"


@pytest.mark.s3
def test_a_missing_bucket_is_a_config_error(s3_config: StorageConfig) -> None:
    store = S3Store("s3://no-such-bucket/prefix", s3_config)
    with pytest.raises(ConfigError, match="the bucket does not exist"):
        store.write("k", b"x")


def test_an_endpoint_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    store = S3Store("s3://bucket/prefix", StorageConfig(endpoint_url="http://127.0.0.1:1", attempts=2))
    start = time.perf_counter()
    with pytest.raises(StorageUnavailableError, match="after 2 attempts") as caught:
        store.head("k")
    assert caught.value.exit_code == 75
    assert time.perf_counter() - start < 10


def _denying(s3: S3Store, seconds: float) -> S3Store:
    """A store that denies reads until that many seconds have passed."""
    s3.write("k", b"x")
    send: Callable[..., Any] = s3._fs.cat_file
    start = time.monotonic()

    def deny_for_a_while(*args: Any, **options: Any) -> Any:
        if time.monotonic() - start < seconds:
            raise PermissionError("Access Denied")
        return send(*args, **options)

    s3._fs.cat_file = deny_for_a_while
    return s3


@pytest.mark.s3
def test_access_that_is_granted_after_seconds_is_waited_for(s3: S3Store) -> None:
    assert _denying(s3, 3).read("k") == b"x"


@pytest.mark.s3
def test_access_that_stays_denied_is_a_config_error_after_seconds(s3: S3Store) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"access denied.*check the credentials") as caught:
        _denying(s3, 1000).read("k")
    assert caught.value.exit_code == 78
    assert ACCESS_SECONDS <= time.monotonic() - start < ACCESS_SECONDS + 7


@pytest.mark.s3
def test_a_failed_range_does_not_ask_for_the_others_again(s3: S3Store) -> None:
    data = os.urandom(60 * COALESCE_GAP_BYTES)
    s3.write("k", data)
    ranges = [(2 * i * COALESCE_GAP_BYTES, (2 * i) * COALESCE_GAP_BYTES + 10) for i in range(30)]
    send: Callable[..., Any] = s3._fs.cat_ranges
    asked: list[int] = []

    def fail_every_third(keys: Any, *args: Any, **options: Any) -> Any:
        asked.append(len(keys))
        answers = send(keys, *args, **options)
        return [OSError(16, "slow down") if i % 3 == 0 else answer for i, answer in enumerate(answers)]

    s3._fs.cat_ranges = fail_every_third
    s3._config = StorageConfig(endpoint_url=s3._config.endpoint_url, attempts=3)
    with pytest.raises(StorageUnavailableError):
        s3.read_ranges("k", ranges)
    assert asked == [30, 10, 4]
    s3._fs.cat_ranges = send
    assert s3.read_ranges("k", ranges).chunks == [data[a:b] for a, b in ranges]


@pytest.mark.s3
def test_a_listing_goes_on_from_page_to_page(s3: S3Store) -> None:
    for n in range(7):
        s3.write(f"a/{n}", b"x")
    s3.write("a2/x", b"x")
    send: Callable[..., Any] = s3._fs.call_s3
    failures = [OSError(16, "slow down")]

    def two_at_a_time(method: str, **options: Any) -> Any:
        if failures and "ContinuationToken" in options:
            raise failures.pop()
        return send(method, **options, MaxKeys=2)

    s3._fs.call_s3 = two_at_a_time
    assert [found.path for found in s3.list("a")] == [f"a/{n}" for n in range(7)]
    assert not failures


def test_absent_credentials_are_a_config_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = S3Store("s3://bucket/prefix", StorageConfig(endpoint_url="http://127.0.0.1:1"))
    with pytest.raises(ConfigError, match="credentials"):
        store.read("k")


# ------------------------------------------------------------------------------------------------ names


def test_uris_open_the_right_store(tmp_path: Path) -> None:
    assert isinstance(open_store("s3://bucket/prefix"), S3Store)
    assert isinstance(open_store("s3a://bucket/prefix"), S3Store)
    assert isinstance(open_store(str(tmp_path)), LocalStore)
    assert open_store(f"file://{tmp_path}").uri == str(tmp_path)
    with pytest.raises(ConfigError, match="gs://bucket"):
        open_store("gs://bucket")


def test_is_remote_and_split_uri() -> None:
    assert is_remote("s3://b/x")
    assert not is_remote("/data/x")
    assert split_uri("s3://b/x/y.parquet") == ("s3://b/x", "y.parquet")
    assert split_uri("y.parquet") == (".", "y.parquet")
    assert split_uri("/y.parquet") == ("/", "y.parquet")


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()))
def test_one_value_has_one_json(value: dict[str, Any]) -> None:
    shuffled = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(shuffled)
