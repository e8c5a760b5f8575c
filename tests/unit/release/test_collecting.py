from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from pipeline.artifacts import Plan
from pipeline.errors import CorruptArtifactError, MissingFileError
from pipeline.release import collect, collecting, mark_plan_done, read_release, rollback, verify, write_plan
from pipeline.release.collecting import ABANDONED_AFTER, CollectReport, store_time
from pipeline.release.removal import ASIDE
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
    assert {"binarizers/1/binarizer.json", "binarizers/1/weights.safetensors"} <= gone
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


def test_a_log_of_receipts_goes_whole_or_not_at_all(root: Root) -> None:
    root.publish(1)
    gone = root.scratch(7)
    root.receipt("key", gone)
    root.receipt("key", root.index(1)[0].partitions[0].heads, seq=2)
    assert _collect(root).deleted == (gone.path,)


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
