import json
from collections.abc import Callable

import pytest

from pipeline.artifacts import Plan
from pipeline.config import CorpusConfig
from pipeline.errors import ConfigError, CorruptArtifactError, DataError, MissingFileError
from pipeline.release import (
    claim_root,
    describe,
    files_are_there,
    list_releases,
    live_plans,
    mark_plan_done,
    read_alias,
    read_manifest,
    read_release,
    record_plan,
    retire,
    rollback,
    unfinished_work,
    was_withdrawn,
    write_plan,
)
from pipeline.storage import Log
from tests.unit.release.conftest import Root


def _corpus(uri: str, name: str | None = None) -> CorpusConfig:
    return CorpusConfig(uri=uri, format="parquet", text=("text",), name=name)


def test_a_root_belongs_to_the_first_corpus(root: Root) -> None:
    claim_root(root.store, _corpus("a/*.parquet"))
    claim_root(root.store, _corpus("a/*.parquet"))
    claim_root(root.store, _corpus("b/*.parquet", name="a/*.parquet"))
    with pytest.raises(ConfigError) as caught:
        claim_root(root.store, _corpus("b/*.parquet"))
    for part in ("'a/*.parquet'", "'b/*.parquet'", "another root", "corpus.name"):
        assert part in str(caught.value)
    assert json.loads(root.store.read("root.json")) == {"format": 1, "corpus": "a/*.parquet"}


def test_a_root_that_holds_something_else_is_corrupt(root: Root) -> None:
    root.store.write("root.json", b"not json")
    with pytest.raises(CorruptArtifactError, match=r"root\.json"):
        claim_root(root.store, _corpus("a"))


def test_nothing_published_is_an_answer(root: Root) -> None:
    assert read_alias(root.store) is None
    assert list_releases(root.store) == []
    assert not was_withdrawn(root.store, "index1", inputs="index1")
    assert describe(root.store)["release"] is None


def test_an_unknown_release_is_missing(root: Root) -> None:
    root.publish(1)
    with pytest.raises(MissingFileError, match="there is no release 2"):
        read_release(root.store, 2)


def test_a_manifest_is_held_against_its_hash(root: Root) -> None:
    record = root.publish(1)
    assert read_manifest(root.store, record) == root.index(1)[0]
    root.store.write(
        record.manifest.path, root.store.read(record.manifest.path).replace(b"corpus", b"Corpus")
    )
    with pytest.raises(CorruptArtifactError, match="expected sha256"):
        read_manifest(root.store, record)


def test_a_later_format_is_named_as_such(root: Root) -> None:
    record = root.publish(1)
    content = {**record.model_dump(mode="json"), "format": 2, "unheard": "of"}
    root.store.write("releases/1.json", json.dumps(content).encode())
    with pytest.raises(DataError, match="expected format 1, found 2"):
        read_release(root.store, 1)


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_files_are_there_sees_absent_and_short_files(root: Root, damage: str) -> None:
    record = root.publish(1)
    assert files_are_there(root.store, record)
    path = root.index(1)[0].partitions[0].segments[0].vectors.path
    root.store.write(path, root.store.read(path)[:-1])
    {"delete": root.store.delete, "truncate": lambda _: None}[damage](path)
    assert not files_are_there(root.store, record)


def test_an_index_is_withdrawn_until_it_is_named_again(root: Root) -> None:
    for seed in (1, 2):
        root.publish(seed)
    assert not was_withdrawn(root.store, "index2", inputs="index2")
    rollback(root.store)
    assert was_withdrawn(root.store, "index2", inputs="index2")
    assert not was_withdrawn(root.store, "index1", inputs="index1")
    root.publish(2)
    assert not was_withdrawn(root.store, "index2", inputs="index2")
    root.publish(3)
    assert not was_withdrawn(root.store, "index2", inputs="index2")


def test_a_plan_lives_until_it_is_done_and_again_when_it_is_written_again(
    root: Root, make_plan: Callable[[str], Plan]
) -> None:
    for name in ("aa", "bb"):
        write_plan(root.store, make_plan(name))
    assert live_plans(root.store) == ["aa", "bb"]
    mark_plan_done(root.store, make_plan("aa"))
    assert live_plans(root.store) == ["bb"]
    write_plan(root.store, make_plan("aa"))
    assert live_plans(root.store) == ["aa", "bb"]


def test_the_state_of_a_plan_is_only_added_to(
    root: Root, make_plan: Callable[[str], Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(root.store), "delete", lambda *_: pytest.fail("only the collector deletes"))
    plan = make_plan("aa")
    mark_plan_done(root.store, plan)
    for change in (write_plan, write_plan, mark_plan_done, mark_plan_done, write_plan):
        change(root.store, plan)
    states = [entry["state"] for entry in Log(root.store, "plans/aa").entries()]
    assert states == ["live", "done", "live"]


def test_jobs_of_several_kinds_end_their_own_work_on_a_plan(
    root: Root, make_plan: Callable[[str], Plan]
) -> None:
    plan = make_plan("aa")
    number = write_plan(root.store, plan, "backfill")
    assert write_plan(root.store, plan, "backfill") == number == unfinished_work(root.store, plan, "backfill")
    assert unfinished_work(root.store, plan) is None
    write_plan(root.store, plan)
    mark_plan_done(root.store, plan)
    assert live_plans(root.store) == ["aa-backfill"]
    mark_plan_done(root.store, plan, "backfill")
    assert live_plans(root.store) == []
    assert write_plan(root.store, plan, "backfill") > number


def test_a_recorded_plan_opens_no_work_and_ends_none(root: Root, make_plan: Callable[[str], Plan]) -> None:
    record_plan(root.store, make_plan("aa"))
    assert live_plans(root.store) == []
    assert root.store.head("plans/aa.json").size
    write_plan(root.store, make_plan("aa"))
    record_plan(root.store, make_plan("aa"))
    assert live_plans(root.store) == ["aa"]


def test_describe_shows_what_is_published(root: Root, make_plan: Callable[[str], Plan]) -> None:
    for seed in (1, 2, 3):
        root.publish(seed)
    rollback(root.store)
    retire(root.store, keep=2)
    write_plan(root.store, make_plan("aa"))
    found = describe(root.store)
    assert (found["release"], found["index"], found["documents"]) == (2, "index2", 12)
    assert [entry["release"] for entry in found["history"]] == [1, 2, 3, 2]
    assert [line["retired"] for line in found["releases"]] == [True, False, False]
    assert [line["withdrawn"] for line in found["releases"]] == [False, False, True]
    assert found["unfinished_plans"] == ["aa"]
    json.dumps(found)
