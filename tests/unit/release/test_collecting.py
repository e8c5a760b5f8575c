import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Plan
from pipeline.config import LeaseConfig, StorageConfig
from pipeline.errors import (
    ConfigError,
    CorruptArtifactError,
    LeaseLostError,
    MissingFileError,
    RootBusyError,
)
from pipeline.release import collect, collecting, mark_plan_done, read_release, rollback, verify, write_plan
from pipeline.release.collecting import ABANDONED_AFTER, CollectReport, store_time
from pipeline.release.leases import hold_root, lease_log
from pipeline.release.removal import ASIDE, put_back_left_overs, remove
from pipeline.storage import LocalStore, S3Store
from tests.unit.release.conftest import Root

GRACE = timedelta(hours=24)


def _collect(
    root: Root, *, later: timedelta = 2 * GRACE, keep: int = 3, dry_run: bool = False
) -> CollectReport:
    now = store_time(root.store) + later
    return collect(root.store, grace=GRACE, keep=keep, now=now, dry_run=dry_run)


def test_orphans_go_after_the_grace_period_only(root: Root) -> None:
    root.publish(1)
    orphan = root.scratch(7)
    kept = root.paths() - {orphan.path}
    assert _collect(root, later=timedelta(hours=23)).deleted == ()
    report = _collect(root)
    assert report.deleted == (orphan.path,)
    assert report.bytes == orphan.bytes
    assert root.paths() == kept


def test_a_dry_run_changes_nothing(root: Root) -> None:
    for seed in (1, 2):
        root.publish(seed)
    root.scratch(7)
    before = root.paths()
    would = _collect(root, keep=1, dry_run=True)
    assert root.paths() == before
    done = _collect(root, keep=1)
    assert (would.retired, would.deleted, would.bytes) == (done.retired, done.deleted, done.bytes)
    assert done.retired == (1,)


def test_the_files_of_retired_releases_go_and_kept_ones_stay_whole(root: Root) -> None:
    for seed in (1, 2, 3):
        root.publish(seed)
    report = _collect(root, keep=2)
    assert report.retired == (1,)
    first = root.index(1)[0].partitions[0]
    gone = {*report.deleted}
    assert {first.heads.path, first.segments[0].lists.path, "indexes/index1/manifest.json"} <= gone
    assert {f"{first.codes.binarizer}/{name}" for name in ("binarizer.json", "weights.safetensors")} <= gone
    assert verify(root.store).problems == ()
    assert verify(root.store, read_release(root.store, 2)).problems == ()
    assert read_release(root.store, 1).index == "index1"


def test_files_that_two_releases_share_stay(root: Root) -> None:
    root.publish(1)
    root.publish(2)
    root.publish(1)
    assert _collect(root, keep=1).retired == (1, 2)
    assert verify(root.store).problems == ()


def test_a_rolled_back_root_keeps_what_is_current(root: Root) -> None:
    for seed in (1, 2, 3):
        root.publish(seed)
    rollback(root.store, 1)
    assert _collect(root, keep=1).retired == (2,)
    assert verify(root.store).problems == ()


def test_unfinished_work_keeps_the_files_of_its_receipts(
    root: Root, make_plan: Callable[[str], Plan]
) -> None:
    root.publish(1)
    named, orphan = root.scratch(7), root.scratch(8)
    receipt = root.receipt("key", named)
    write_plan(root.store, make_plan("aa"))
    assert _collect(root).deleted == (orphan.path,)
    mark_plan_done(root.store, make_plan("aa"))
    assert set(_collect(root).deleted) == {named.path, receipt}


def test_a_plan_is_given_up_when_a_later_one_was_finished_long_ago(
    root: Root, make_plan: Callable[[str], Plan]
) -> None:
    write_plan(root.store, make_plan("aa"))
    named = root.scratch(7)
    receipt = root.receipt("key", named)
    write_plan(root.store, make_plan("bb"))
    mark_plan_done(root.store, make_plan("bb"))
    assert _collect(root, later=ABANDONED_AFTER / 2).deleted == ()
    assert set(_collect(root, later=2 * ABANDONED_AFTER).deleted) == {named.path, receipt}


def test_unfinished_work_without_a_later_end_is_never_given_up(
    root: Root, make_plan: Callable[[str], Plan]
) -> None:
    write_plan(root.store, make_plan("aa"))
    root.receipt("key", root.scratch(7))
    assert _collect(root, later=10 * ABANDONED_AFTER).deleted == ()


def _at_the_second_deletion(root: Root, monkeypatch: pytest.MonkeyPatch, event: Callable[[], Any]) -> None:
    """Let something happen at the second deletion of a placed file; a batch is one file."""
    monkeypatch.setattr(collecting, "BATCH_FILES", 1)
    events, delete = [event, lambda: None], root.store.delete

    def deleting(path: str) -> None:
        delete(path)
        if path.startswith("scratch/placed") and events:
            events.pop()()

    monkeypatch.setattr(root.store, "delete", deleting)


@pytest.mark.parametrize("event", ["a plan", "a plan again", "a release", "the alias"])
def test_no_more_is_deleted_once_other_work_is_seen_and_the_batch_in_hand_is_put_back(
    root: Root, make_plan: Callable[[str], Plan], monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    for seed in (1, 2):
        root.publish(seed)
    again = make_plan("aa")
    write_plan(root.store, again)
    mark_plan_done(root.store, again)
    orphans = {root.scratch(seed).path for seed in (7, 8, 9)}
    events = {
        "a plan": lambda: write_plan(root.store, make_plan("bb")),
        "a plan again": lambda: write_plan(root.store, again),
        "a release": lambda: root.publish(1),
        "the alias": lambda: rollback(root.store, 1),
    }
    _at_the_second_deletion(root, monkeypatch, events[event])
    report = _collect(root)
    gone = orphans - root.paths()
    assert len(gone) == 1
    assert gone == {*report.deleted}
    assert list(root.store.list(ASIDE)) == []


def test_the_end_of_other_work_does_not_stop_a_collection(
    root: Root, make_plan: Callable[[str], Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(root.store, make_plan("aa"))
    orphans = {root.scratch(seed).path for seed in (7, 8, 9)}
    _at_the_second_deletion(root, monkeypatch, lambda: mark_plan_done(root.store, make_plan("aa")))
    assert {*_collect(root).deleted} == orphans


def test_receipts_go_before_the_files_they_name_and_logs_from_their_end(root: Root) -> None:
    named = root.scratch(7)
    first, second = (root.receipt("key", named, seq=seq) for seq in (1, 2))
    assert _collect(root).deleted == (second, first, named.path)


def test_receipts_of_files_that_stay_stay(root: Root) -> None:
    root.publish(1)
    root.receipt("key", root.index(1)[0].partitions[0].heads)
    assert _collect(root).deleted == ()


def test_receipts_that_name_no_file_go(root: Root) -> None:
    root.publish(1)
    old, young = (root.receipt("of nothing", seq=seq) for seq in (1, 2))
    root.receipt("key")
    kept = root.receipt("key", root.index(1)[0].partitions[0].heads, seq=2)
    assert _collect(root, later=GRACE / 2).deleted == ()
    assert _collect(root).deleted == (young, old)
    assert kept in root.paths()


@pytest.mark.parametrize("folder", ["scratch/units", "condemned", "dead_letters"])
def test_what_tasks_without_a_receipt_wrote_stays_while_work_is_unfinished(
    root: Root, make_plan: Callable[[str], Plan], folder: str
) -> None:
    root.publish(1)
    written, orphan = root.scratch(7, folder), root.scratch(8)
    write_plan(root.store, make_plan("aa"))
    assert _collect(root).deleted == (orphan.path,)
    mark_plan_done(root.store, make_plan("aa"))
    assert _collect(root).deleted == (written.path,)


def test_a_log_of_receipts_goes_whole_or_not_at_all(root: Root) -> None:
    root.publish(1)
    gone = root.scratch(7)
    root.receipt("key", gone)
    root.receipt("key", root.index(1)[0].partitions[0].heads, seq=2)
    assert _collect(root).deleted == (gone.path,)


def test_a_dead_log_of_receipts_stays_whole_while_one_of_its_entries_is_young(local_root: Root) -> None:
    named = local_root.scratch(7)
    old, young = (local_root.receipt("key", named, seq=seq) for seq in (1, 2))
    folder = Path(local_root.store.uri)
    for path in (old, named.path):
        _age(folder / path, 3 * GRACE)
    assert _collect(local_root, later=timedelta(0)).deleted == (named.path,)
    assert {old, young} <= local_root.paths()
    _age(folder / young, 3 * GRACE)
    assert _collect(local_root, later=timedelta(0)).deleted == (young, old)


def _age(path: Path, age: timedelta) -> None:
    then = time.time() - age.total_seconds()
    os.utime(path, (then, then))


def test_cached_vectors_stay_if_their_log_names_them(root: Root) -> None:
    kept, orphan = root.cached(1, logged=True), root.cached(2, logged=False)
    root.store.write("embeddings/enc/cache.json", b"{}")
    root.store.write("embeddings/choices/model.json", b"{}")
    assert _collect(root).deleted == (orphan.path,)
    assert root.store.head(kept.path).size == kept.bytes


def test_dead_letters_stay_as_long_as_their_release(root: Root) -> None:
    letters = root.dead_letters()
    root.publish(1, dead_letter_files=[letters.path])
    root.publish(2)
    assert _collect(root, keep=2).deleted == ()
    assert letters.path in _collect(root, keep=1).deleted


def test_what_is_not_ours_is_left_alone(root: Root, make_plan: Callable[[str], Plan]) -> None:
    strange = {"notes.txt", "mine/data.parquet", "root.json", "plans/x.done.json"}
    for path in strange:
        root.store.write(path, b"{}")
    write_plan(root.store, make_plan("aa"))
    assert _collect(root).deleted == ()
    assert strange <= root.paths()


def test_nothing_is_deleted_where_names_cannot_be_read(root: Root) -> None:
    record = root.publish(1)
    root.scratch(7)
    root.store.write(record.manifest.path, b"{}")
    before = root.paths()
    with pytest.raises(CorruptArtifactError):
        _collect(root)
    assert root.paths() == before


def test_the_store_tells_the_time(root: Root) -> None:
    root.publish(1)
    orphan = root.scratch(7)
    assert collect(root.store, grace=GRACE, keep=1).deleted == ()
    assert collect(root.store, grace=timedelta(0), keep=1).deleted == (orphan.path,)
    with pytest.raises(MissingFileError):
        root.store.head(orphan.path)


# ------------------------------------------------------------------------------------------------ the lease


def test_a_collection_needs_the_root_and_a_dry_run_does_not(root: Root) -> None:
    root.publish(1)
    orphan = root.scratch(7)
    leave = LeaseConfig(stale_after_s=0.6, on_busy="leave")
    with hold_root(root.store, "run", leave) as lease:
        with pytest.raises(RootBusyError, match="strata run"):
            collect(root.store, grace=timedelta(0), keep=1, lease=leave)
        assert collect(root.store, grace=timedelta(0), keep=1, dry_run=True).deleted == (orphan.path,)
        lease.check()
    assert orphan.path in root.paths()


def test_counters_of_earlier_leases_go_and_entries_stay(root: Root) -> None:
    root.publish(1)
    for _ in range(3):
        _collect(root)
    found = {info.path for info in root.store.list("leases")}
    assert {path for path in found if path.endswith(".beat")} <= {"leases/root/00000005.beat"}
    assert {path for path in found if path.endswith(".json")} == {
        lease_log(root.store).path(n) for n in range(1, 7)
    }


def _take_over(root: Root) -> None:
    log = lease_log(root.store)
    newest = log.newest()
    assert log.append(newest + 1, log.read(newest) | {"token": "thief", "job": "thief"})


def test_a_collector_that_lost_its_lease_in_the_middle_of_a_batch_puts_it_back(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.publish(1)
    orphans = {root.scratch(seed).path for seed in (7, 8, 9)}
    contents = {path: root.store.read(path) for path in orphans}
    _at_the_second_deletion(root, monkeypatch, lambda: _take_over(root))
    monkeypatch.setattr(collecting, "BATCH_FILES", 3)
    with pytest.raises(LeaseLostError, match="strata thief"):
        _collect(root)
    assert {path: root.store.read(path) for path in orphans} == contents
    assert list(root.store.list(ASIDE)) == []


def test_a_collector_that_lost_its_lease_deletes_nothing_more(root: Root) -> None:
    orphan = root.scratch(7)
    info = root.store.head(orphan.path)

    def lost() -> None:
        raise LeaseLostError("root", "taken over")

    with pytest.raises(LeaseLostError):
        remove(root.store, [[info]], seq=1, check=lost)
    assert orphan.path in root.paths()


def test_what_a_killed_collector_had_set_aside_is_put_back_by_the_next(root: Root) -> None:
    root.publish(1)
    part = root.index(1)[0].partitions[0]
    with contextlib.suppress(ZeroDivisionError), hold_root(root.store, "gc", LeaseConfig()) as lease:
        _set_aside_and_die(root, lease.seq, part.heads.path)
    assert len(verify(root.store).problems) == 1
    assert _collect(root, later=timedelta(0)).deleted == ()
    assert verify(root.store).problems == ()
    # The copy outlives its collector for the grace period: it may be stopped, with a delete request before it.
    aside = f"{ASIDE}/1/{part.heads.path}"
    assert aside in root.paths()
    root.store.delete(part.heads.path)
    _collect(root, later=timedelta(0))
    assert verify(root.store).problems == ()
    _collect(root)
    assert aside not in root.paths()
    assert verify(root.store).problems == ()


def _set_aside_and_die(root: Root, seq: int, path: str) -> None:
    looks: list[int] = []

    def check() -> None:
        looks.append(1)
        if len(looks) == 2:
            raise ZeroDivisionError

    remove(root.store, [[root.store.head(path)]], seq=seq, check=check)


def test_what_a_collector_of_this_lease_has_in_hand_is_left_to_it(root: Root) -> None:
    root.store.write(f"{ASIDE}/5/scratch/a", b"x")
    put_back_left_overs(root.store, seq=5, grace=timedelta(0), now=datetime.now(UTC))
    assert root.paths() == {f"{ASIDE}/5/scratch/a"}


class Stoppable(LocalStore):
    """A store whose process can be stopped just before a delete request: nothing of it goes on, its beats neither."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.stops_before: Callable[[str], bool] = lambda _: False

    def write(self, path: str, data: bytes) -> None:
        self.goes_on.wait()
        super().write(path, data)

    def delete(self, path: str) -> None:
        if self.stops_before(path):
            self.goes_on.clear()
        self.goes_on.wait()
        super().delete(path)


@contextlib.contextmanager
def _stopped_collector(root: Root, path: str, lease: LeaseConfig) -> Iterator[Any]:
    """A collection that is stopped in front of deleting a file; yields its future, and lets it go on at the end."""
    store = Stoppable(root.store.uri)
    store.stops_before = lambda candidate: candidate == path
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(collect, store, grace=timedelta(0), keep=1, lease=lease)
        deadline = time.monotonic() + 20
        while store.goes_on.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield running
        finally:
            store.stops_before = lambda _: False
            store.goes_on.set()


def test_a_release_that_reuses_what_a_stopped_collector_is_about_to_delete_stays_whole(
    local_root: Root, make_plan: Callable[[str], Plan]
) -> None:
    """The files are there, old and named by nobody; the collector is stopped before its request; a run takes over."""
    local_root.index(3)
    quick = LeaseConfig(stale_after_s=0.6)
    reused = local_root.index(3)[0].partitions[0].segments[0].vectors.path
    with _stopped_collector(local_root, reused, quick) as running:
        with hold_root(local_root.store, "run", quick) as lease:
            write_plan(local_root.store, make_plan("aa"))
            _wait_for_the_others_of_the_batch(local_root, reused)
            local_root.indexes.clear()
            local_root.publish(3)
            lease.check()
            mark_plan_done(local_root.store, make_plan("aa"))
        assert verify(local_root.store).problems == ()
    with pytest.raises(LeaseLostError):
        running.result(timeout=20)
    assert verify(local_root.store).problems == ()
    assert not list(local_root.store.list(ASIDE))


def _wait_for_the_others_of_the_batch(root: Root, stopped: str) -> None:
    """Until every other thread of the stopped collector has come to its own delete request."""
    deadline, before = time.monotonic() + 20, -1
    while time.monotonic() < deadline:
        aside = len(list(root.store.list(ASIDE)))
        if aside == before and any(stopped in info.path for info in root.store.list(ASIDE)):
            return
        before = aside
        time.sleep(0.2)


def test_a_rollback_to_a_release_that_is_retired_meanwhile_goes_back_and_says_so(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        root.publish(seed)
    put = root.store.put_if_absent
    events: Sequence[str] = ["aliases/current/00000003.json"]

    def retiring(path: str, data: bytes) -> bool:
        if path in events:
            put("releases/1.retired.json", b"{}")
        return put(path, data)

    monkeypatch.setattr(root.store, "put_if_absent", retiring)
    with pytest.raises(ConfigError, match="retired just now"):
        rollback(root.store, 1)
    assert verify(root.store).problems == ()
    _collect(root, keep=1)
    assert verify(root.store).problems == ()


def test_what_serves_is_kept_though_it_is_marked_as_retired(root: Root) -> None:
    for seed in (1, 2):
        root.publish(seed)
    rollback(root.store, 1)
    root.store.write("releases/1.retired.json", b"{}")
    _collect(root, keep=1)
    assert verify(root.store).problems == ()


# ------------------------------------------------------------------------------------------------ unfinished uploads


def test_an_unfinished_file_of_a_local_disk_is_cleared_after_the_grace_period(local_root: Root) -> None:
    with local_root.store.staging() as local:
        local.write_bytes(b"half")
        _age(local, GRACE - timedelta(hours=1))
        assert _collect(local_root, later=timedelta(0)).aborted == 0
        _age(local, GRACE + timedelta(hours=1))
        assert _collect(local_root, later=timedelta(0), dry_run=True).aborted == 1
        assert local.exists()
        assert _collect(local_root, later=timedelta(0)).aborted == 1
        assert not local.exists()


@pytest.mark.s3
def test_stale_uploads_to_s3_are_aborted_and_those_of_other_roots_left_alone(
    s3_root: str, s3_config: StorageConfig
) -> None:
    store, other = S3Store(s3_root, s3_config), S3Store(f"{s3_root}-other", s3_config)
    for root, paths in ((store, ("partitions/a", "partitions/b")), (other, ("partitions/a",))):
        for path in paths:
            root._fs.call_s3("create_multipart_upload", Bucket=root._bucket, Key=root._key(path))
    assert sorted(upload.path for upload in store.uploads()) == ["partitions/a", "partitions/b"]
    # The test server dates every upload 2010; what is younger than the grace period is reckoned from there.
    began = max(upload.modified for upload in store.uploads())
    for later, aborted in ((GRACE / 2, 0), (2 * GRACE, 2)):
        report = collect(store, grace=GRACE, keep=1, now=began + later, dry_run=True)
        assert report.aborted == aborted
    assert len(list(store.uploads())) == 2
    assert _collect(Root(store)).aborted == 2
    assert list(store.uploads()) == []
    assert [upload.path for upload in other.uploads()] == ["partitions/a"]
