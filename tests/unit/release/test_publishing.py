import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.artifacts import ReleaseRecord
from pipeline.errors import ConfigError, CorruptArtifactError, PublishConflictError
from pipeline.release import (
    list_releases,
    publish,
    read_alias,
    read_history,
    read_release,
    retire,
    rollback,
)
from pipeline.release.publishing import _record
from pipeline.storage import canonical_json
from tests.unit.release.conftest import NOW, Root

# ------------------------------------------------------------------------------------------------ publishing


def test_releases_are_numbered_and_the_alias_follows(root: Root) -> None:
    assert [root.publish(seed).release for seed in (1, 2, 3)] == [1, 2, 3]
    assert [(e.seq, e.release, e.follows) for e in read_history(root.store).entries] == [
        (1, 1, 0),
        (2, 2, 1),
        (3, 3, 2),
    ]
    assert [record.index for record in list_releases(root.store)] == ["index1", "index2", "index3"]
    assert read_release(root.store, 2).summary == {"documents": 12}


def test_two_publishers_at_once_have_one_winner(root: Root) -> None:
    root.publish(1)
    start = read_alias(root.store)
    contents = [root.index(2), root.index(3)]
    barrier = threading.Barrier(2)

    def run(no: int) -> ReleaseRecord | PublishConflictError:
        barrier.wait()
        try:
            return publish(root.store, *contents[no], {}, started_at=start, now=NOW, token=f"publisher {no}")
        except PublishConflictError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(run, range(2)))
    assert sorted(type(end).__name__ for end in ends) == ["PublishConflictError", "ReleaseRecord"]
    winner = next(end for end in ends if isinstance(end, ReleaseRecord))
    current = read_alias(root.store)
    assert current is not None
    assert current.release == winner.release
    assert current.seq == 2


def test_an_alias_that_another_run_created_is_a_conflict(root: Root) -> None:
    root.publish(1, started_at=None)
    with pytest.raises(PublishConflictError, match="another run created the alias") as caught:
        root.publish(2, started_at=None)
    assert caught.value.exit_code == 3
    assert len(list_releases(root.store)) == 1


def test_an_alias_that_moved_is_a_conflict_that_says_how(root: Root) -> None:
    root.publish(1)
    root.publish(2)
    start = read_alias(root.store)
    rollback(root.store)
    with pytest.raises(
        PublishConflictError,
        match=r"expected entry 2 \(release 2\), found entry 3 \(release 1\) by rollback",
    ):
        root.publish(3, started_at=start)


@pytest.mark.parametrize("damage", ["deleted", "replaced"])
def test_an_alias_that_lost_entries_is_a_conflict_of_its_own(root: Root, damage: str) -> None:
    root.publish(1)
    root.publish(2)
    start = read_alias(root.store)
    assert start is not None
    path = "aliases/current/00000002.json"
    other = start.model_copy(update={"token": "someone else"})
    root.store.write(path, canonical_json(other.model_dump(mode="json")))
    {"deleted": root.store.delete, "replaced": lambda _: None}[damage](path)
    with pytest.raises(PublishConflictError, match="restored from an older copy"):
        root.publish(3, started_at=start)


def test_a_repeated_publication_of_one_run_succeeds(root: Root) -> None:
    manifest, ref = root.index(1)
    token = uuid.uuid4().hex
    records = [
        publish(root.store, manifest, ref, {"try": n}, started_at=None, now=NOW, token=token)
        for n in range(2)
    ]
    assert records[0] == records[1]
    assert len(read_history(root.store).entries) == 1


def test_a_record_that_a_crash_left_is_used_again(root: Root) -> None:
    root.publish(1)
    manifest, ref = root.index(2)
    left = _record(root.store, manifest, ref, {"first": "try"}, NOW)
    assert root.publish(2) == left
    assert [record.release for record in list_releases(root.store)] == [1, 2]
    assert root.publish(3).release == 3


def test_a_record_of_another_index_is_left_alone(root: Root) -> None:
    manifest, ref = root.index(1)
    _record(root.store, manifest, ref, {}, NOW)
    assert root.publish(2).release == 2
    current = read_alias(root.store)
    assert current is not None
    assert current.release == 2


def test_an_index_may_be_published_twice(root: Root) -> None:
    assert [root.publish(seed).release for seed in (1, 2, 1)] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
@pytest.mark.parametrize("part", ["lists", "documents", "weights", "manifest"])
def test_an_index_with_a_damaged_file_is_not_published(local_root: Root, part: str, damage: str) -> None:
    manifest, ref = local_root.index(1)
    partition = manifest.partitions[0]
    path = {
        "lists": partition.segments[0].lists.path,
        "documents": manifest.documents[0].path,
        "weights": partition.codes.files[0].path,
        "manifest": ref.path,
    }[part]
    local_root.store.write(path, local_root.store.read(path)[:-1])
    {"deleted": local_root.store.delete, "truncated": lambda _: None}[damage](path)
    with pytest.raises(CorruptArtifactError, match=path):
        local_root.publish(1)
    assert read_alias(local_root.store) is None
    assert list_releases(local_root.store) == []


# ------------------------------------------------------------------------------------------------ rolling back


def test_rolling_back_again_walks_further_back(root: Root) -> None:
    for seed in (1, 2, 3):
        root.publish(seed)
    assert [rollback(root.store).release for _ in range(2)] == [2, 1]
    with pytest.raises(ConfigError, match="release 1 is current, and there is no earlier release"):
        rollback(root.store)


def test_rolling_back_skips_what_was_withdrawn(root: Root) -> None:
    for seed in (1, 2):
        root.publish(seed)
    rollback(root.store)
    root.publish(3)
    assert rollback(root.store).release == 1


def test_rolling_back_goes_to_the_release_asked_for(root: Root) -> None:
    for seed in (1, 2, 3):
        root.publish(seed)
    entry = rollback(root.store, 1)
    assert (entry.release, entry.reason, entry.seq) == (1, "rollback", 4)
    assert rollback(root.store, 3).release == 3


def test_rolling_back_to_the_current_release_moves_nothing(root: Root) -> None:
    root.publish(1)
    assert rollback(root.store, 1) == read_alias(root.store)
    assert len(read_history(root.store).entries) == 1


def test_what_cannot_be_rolled_back_to_is_refused_with_its_reason(root: Root) -> None:
    with pytest.raises(ConfigError, match="nothing is published"):
        rollback(root.store)
    for seed in (1, 2, 3):
        root.publish(seed)
    retire(root.store, keep=2)
    manifest, ref = root.index(4)
    _record(root.store, manifest, ref, {}, NOW)
    for number, reason in [
        (9, "there is no release 9"),
        (0, "no release 0"),
        (1, "is retired"),
        (4, "was never"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            rollback(root.store, number)
    assert len(read_history(root.store).entries) == 3


def test_rolling_back_to_a_damaged_release_is_refused(root: Root) -> None:
    root.publish(1)
    root.publish(2)
    path = root.index(1)[0].partitions[0].heads.path
    root.store.delete(path)
    with pytest.raises(CorruptArtifactError, match=path):
        rollback(root.store)


# ------------------------------------------------------------------------------------------------ retirement


def test_old_releases_are_retired_but_never_the_current_one(root: Root) -> None:
    for seed in (1, 2, 3, 4):
        root.publish(seed)
    rollback(root.store, 1)
    assert retire(root.store, keep=2) == [2]
    assert retire(root.store, keep=2) == []
    assert root.store.head("releases/2.retired.json").size > 0


def test_a_release_in_the_midst_of_publication_is_not_retired(root: Root) -> None:
    root.publish(1)
    manifest, ref = root.index(2)
    _record(root.store, manifest, ref, {}, NOW)
    assert retire(root.store, keep=1) == []
