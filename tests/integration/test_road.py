"""The whole road in this process: corpus → release → search, changed corpora, gates, crashes; local and on S3."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import structlog
from safetensors.numpy import load_file

from pipeline import open_release
from pipeline.artifacts import AliasEntry
from pipeline.embedding.hashing import HashingEncoder
from pipeline.errors import (
    DataError,
    ErrorBudgetError,
    FilterError,
    IncompatibleModelsError,
    LeaseLostError,
    PublishConflictError,
    QualityGateError,
)
from pipeline.execution.flows import run
from pipeline.execution.runner import InlineRunner
from pipeline.execution.searching import How, search_file
from pipeline.execution.work import StoreSpec
from pipeline.index.reader import load_manifest
from pipeline.release import collect, hold_root, rollback, verify
from pipeline.storage import LocalStore, Log, open_store
from tests.integration.roads import (
    Inline,
    configured,
    data_files,
    rows_of,
    run_inline,
    settings,
    take_over,
    write_jsonl,
    write_parquet,
)

ROWS = 900


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("road")
    write_parquet(folder / "corpus.parquet", rows_of(ROWS))
    config = configured(folder, settings(folder / "root", folder / "corpus.parquet"))
    return config, run_inline(config)


def _texts(rows):
    return [f"{row['title']} {row['text']}" for row in rows]


def _results(root, texts, **more):
    return [
        [(hit.doc_id, hit.score) for hit in hits] for hits in open_release(str(root)).search(texts, **more)
    ]


def _vectors(config, texts):
    return HashingEncoder(config.encoders["words"]).encode_documents(texts)


def _overlap(found, exact, own):
    wanted = [hit.doc_id for hit in exact if hit.doc_id != own][:10]
    return len(set(wanted) & {hit.doc_id for hit in found if hit.doc_id != own}) / 10


def _partitions(root):
    return {
        path: data
        for path, data in data_files(open_store(str(root))).items()
        if path.startswith("partitions/")
    }


def test_a_first_run_publishes_release_one_and_counts_everything(built):
    _, summary = built
    assert summary["release"] == 1
    assert summary["documents"] == summary["added"] == summary["encoded"] == ROWS
    assert summary["changed"] == summary["removed"] == summary["dead_letters"] == 0
    assert summary["code_bytes"] == 16
    assert set(summary) >= {"index_bytes_per_document", "recall_at_10", "seconds"}


def test_a_documents_own_text_finds_it_first(built):
    config, _ = built
    rows = rows_of(ROWS)[:40]
    found = _results(config.root, _texts(rows))
    assert [hits[0][0] for hits in found] == [row["_id"] for row in rows]


def test_a_second_run_skips_everything_and_says_so(built):
    config, first = built
    before = data_files(open_store(config.root))
    second = run_inline(config)
    assert second["skipped"] is True
    assert (second["release"], second["encoded"], second["added"]) == (first["release"], 0, 0)
    assert data_files(open_store(config.root)) == before


def test_everything_a_release_names_verifies(built):
    config, _ = built
    assert verify(open_store(config.root), None).problems == ()


def _changed(rows):
    """1 % inserted at the top, 1 % edited, 1 % deleted."""
    inserted = [{**row, "_id": f"new-{i}"} for i, row in enumerate(rows_of(9, seed=77))]
    edited = [
        {**row, "text": row["text"] + " edited"} if i % 100 == 50 else row for i, row in enumerate(rows)
    ]
    return inserted + [row for i, row in enumerate(edited) if i % 100 != 20]


def test_a_changed_corpus_encodes_only_what_is_new_and_answers_like_a_fresh_build(tmp_path):
    rows = rows_of(ROWS)
    write_parquet(tmp_path / "corpus.parquet", rows)
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    run_inline(config)
    write_parquet(tmp_path / "corpus.parquet", _changed(rows))
    summary = run_inline(config)
    assert (summary["added"], summary["changed"], summary["removed"]) == (9, 9, 9)
    assert summary["encoded"] == 18
    fresh = configured(tmp_path, settings(tmp_path / "fresh", tmp_path / "corpus.parquet"))
    run_inline(fresh)
    queries = _texts(rows[:60])
    for more in ({}, {"filter": "year > 2010"}, {"exact": True}, {"rerank": 0}):
        assert _results(config.root, queries, **more) == _results(fresh.root, queries, **more)
    assert set(_partitions(fresh.root)) <= set(_partitions(config.root))


def test_a_changed_attribute_counts_as_a_change_and_encodes_nothing(tmp_path):
    rows = rows_of(200)
    write_parquet(tmp_path / "corpus.parquet", rows)
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    run_inline(config)
    rows[3]["year"] = 1900
    write_parquet(tmp_path / "corpus.parquet", rows)
    summary = run_inline(config)
    assert (summary["changed"], summary["encoded"]) == (1, 0)
    assert [hit.doc_id for hit in open_release(config.root).search("stone1", filter="year = 1900")[0]] == [
        rows[3]["_id"]
    ]


OWN_NAMES = ("list_no", "distance", "file_no", "segment", "branch", "reason", "score", "query", "embeddings")
"""Of columns of ours that never stand beside attributes, or under another name."""


def test_an_attribute_may_be_called_as_columns_of_ours_are(tmp_path):
    rows = [{"_id": f"d{i}", "text": f"stone{i}", **dict.fromkeys(OWN_NAMES, 7 * i)} for i in range(200)]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    content = settings(tmp_path / "root", tmp_path / "corpus.jsonl")
    content["corpus"] |= {"format": "jsonl", "text": ["text"], "attributes": list(OWN_NAMES)}
    config = configured(tmp_path, content)
    run_inline(config)
    release = open_release(config.root)
    for name in OWN_NAMES:
        assert [hit.doc_id for hit in release.search("stone9", filter=f"{name} = 91")[0]] == ["d13"]


def test_equal_texts_are_encoded_once(tmp_path):
    rows = rows_of(60)
    copies = [{**row, "_id": f"copy-{i}"} for i, row in enumerate(rows)]
    write_parquet(tmp_path / "corpus.parquet", rows + copies)
    summary = run_inline(configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet")))
    assert (summary["documents"], summary["encoded"]) == (120, 60)


def test_the_index_does_not_depend_on_the_buckets(built, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.corpus.planning.BUCKET_ROWS", 64)
    monkeypatch.setattr("pipeline.embedding.cache.ROWS_PER_BUCKET", 64)
    config, _ = built
    write_parquet(tmp_path / "corpus.parquet", rows_of(ROWS))
    other = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    summary = run_inline(other)
    assert (summary["documents"], summary["encoded"]) == (ROWS, ROWS)
    assert len(list((tmp_path / "root/documents").iterdir())) == 16
    assert _partitions(other.root) == _partitions(config.root)
    write_parquet(tmp_path / "corpus.parquet", _changed(rows_of(ROWS)))
    changed = run_inline(other)
    assert (changed["added"], changed["changed"], changed["removed"], changed["encoded"]) == (9, 9, 9, 18)


@pytest.mark.parametrize("shard_rows", [1000, 97])
def test_the_index_does_not_depend_on_the_shards(built, tmp_path, shard_rows):
    config, _ = built
    write_parquet(tmp_path / "corpus.parquet", rows_of(ROWS))
    content = settings(tmp_path / "root", tmp_path / "corpus.parquet")
    content["corpus"]["shard_rows"] = shard_rows
    other = configured(tmp_path, content)
    run_inline(other)
    assert _partitions(other.root) == _partitions(config.root)


def test_jsonl_and_parquet_of_the_same_rows_give_the_same_index(built, tmp_path):
    config, _ = built
    rows = rows_of(ROWS)
    write_jsonl(tmp_path / "in" / "a.jsonl", rows[:400])
    write_jsonl(tmp_path / "in" / "b.jsonl", rows[400:])
    content = settings(tmp_path / "root", tmp_path / "in")
    content["corpus"]["format"] = "jsonl"
    other = configured(tmp_path, content)
    run_inline(other)
    assert _partitions(other.root) == _partitions(config.root)


@pytest.mark.s3
def test_the_road_on_s3_writes_the_same_index_as_on_a_local_folder(built, tmp_path, s3_root, s3_endpoint):
    config, first = built
    corpus = tmp_path / "corpus.parquet"
    write_parquet(corpus, rows_of(ROWS))
    store = open_store(s3_root, config.storage.model_copy(update={"endpoint_url": s3_endpoint}))
    store.write("in/corpus.parquet", corpus.read_bytes())
    content = settings(f"{s3_root}/root", f"{s3_root}/in/*.parquet", storage={"endpoint_url": s3_endpoint})
    remote = configured(tmp_path, content)
    summary = run_inline(remote)
    assert summary["recall_at_10"] == first["recall_at_10"]
    root = open_store(remote.root, remote.storage)
    assert {info.path for info in root.list("partitions")} == set(_partitions(config.root))
    assert run_inline(remote)["skipped"] is True
    assert verify(root, None).problems == ()
    found = open_release(remote.root, storage=remote.storage).search(_texts(rows_of(5)))
    assert [[(h.doc_id, h.score) for h in hits] for hits in found] == _results(
        config.root, _texts(rows_of(5))
    )


def test_an_index_below_the_gate_is_not_published(tmp_path):
    write_parquet(tmp_path / "corpus.parquet", rows_of(300))
    content = settings(
        tmp_path / "root",
        tmp_path / "corpus.parquet",
        gates={"min_recall_at_10": 1.0},
        search={"lists": 1, "rerank": 0},
    )
    config = configured(tmp_path, content)
    with pytest.raises(QualityGateError, match=r"recall_at_10 is 0\.\d+, must be at least 1\.0000") as caught:
        run_inline(config)
    assert caught.value.exit_code == 4
    assert Log(open_store(config.root), "aliases/current").newest() == 0


def test_losing_most_of_the_corpus_can_be_gated(tmp_path):
    rows = rows_of(200)
    write_parquet(tmp_path / "corpus.parquet", rows)
    content = settings(tmp_path / "root", tmp_path / "corpus.parquet", gates={"max_removed_fraction": 0.2})
    config = configured(tmp_path, content)
    run_inline(config)
    write_parquet(tmp_path / "corpus.parquet", rows[:100])
    with pytest.raises(QualityGateError, match="100 of 200 documents were removed"):
        run_inline(config)


def test_bad_rows_are_set_aside_with_their_place_and_the_rest_is_published(tmp_path):
    rows = rows_of(300)
    rows[7]["_id"] = None
    rows[11]["title"] = rows[11]["text"] = ""
    rows[250]["_id"] = rows[2]["_id"]
    write_parquet(tmp_path / "corpus.parquet", rows)
    content = settings(tmp_path / "root", tmp_path / "corpus.parquet")
    content["corpus"]["shard_rows"] = 100
    config = configured(tmp_path, content)
    summary = run_inline(config)
    assert (summary["documents"], summary["dead_letters"]) == (297, 3)
    letters = [
        row
        for path in summary["dead_letter_files"]
        for row in pq.read_table(f"{config.root}/{path}").to_pylist()
    ]
    assert sorted(row["row"] for row in letters) == [7, 11, 250]
    assert {row["row"]: row["reason"] for row in letters}[7] == "id is null"
    assert "duplicate of" in {row["row"]: row["reason"] for row in letters}[250]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_tiny_corpus_is_published_and_found(tmp_path, rows):
    write_parquet(tmp_path / "corpus.parquet", rows_of(rows))
    config = configured(
        tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet", binarizer={"bytes": 4})
    )
    assert run_inline(config)["documents"] == rows
    hits = open_release(config.root).search(_texts(rows_of(rows))[0], k=10)[0]
    assert len(hits) == rows
    assert hits[0].doc_id == "doc-00000"


def test_documents_that_all_have_the_same_text_are_all_found(tmp_path):
    write_parquet(tmp_path / "corpus.parquet", [{**rows_of(1)[0], "_id": f"same-{i}"} for i in range(130)])
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    assert run_inline(config)["encoded"] == 1
    assert len(open_release(config.root).search("stone1", k=200)[0]) == 130


def test_a_corpus_of_bad_rows_alone_is_an_error_though_the_budget_allows_them(tmp_path):
    write_parquet(tmp_path / "corpus.parquet", [{**row, "_id": None} for row in rows_of(20)])
    content = settings(tmp_path / "root", tmp_path / "corpus.parquet")
    content["corpus"]["error_budget"] = 1000
    with pytest.raises(DataError, match="no document is left of 20 rows"):
        run_inline(configured(tmp_path, content))


def test_an_example_that_cannot_be_shown_is_refused_before_the_work(tmp_path):
    write_parquet(tmp_path / "corpus.parquet", rows_of(20))
    content = settings(
        tmp_path / "root",
        tmp_path / "corpus.parquet",
        evaluation={"examples": [{"text": "x", "filter": "yaer = 1"}]},
    )
    with pytest.raises(FilterError, match="yaer"):
        run_inline(configured(tmp_path, content))
    assert not (tmp_path / "root/documents").exists()


def test_filtered_queries_are_not_judged_as_if_they_had_no_filter(tmp_path):
    rows = rows_of(200)
    write_parquet(tmp_path / "corpus.parquet", rows)
    asked = [
        {"query_id": f"q{i}", "text": text, "filter": "year = 1" if i % 2 else None}
        for i, text in enumerate(_texts(rows)[:20])
    ]
    pl.DataFrame(asked).write_parquet(tmp_path / "q.parquet")
    (tmp_path / "t.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\t{rows[i]['_id']}\t1\n" for i in range(20))
    )
    evaluation = {"queries": str(tmp_path / "q.parquet"), "qrels": str(tmp_path / "t.tsv")}
    config = configured(
        tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet", evaluation=evaluation)
    )
    summary = run_inline(config)
    assert summary["judged_queries"] == 10
    assert summary["ndcg_at_10"] == summary["exact_ndcg_at_10"] == 1
    pl.DataFrame(asked).filter(pl.col("filter").is_not_null()).write_parquet(tmp_path / "q.parquet")
    with pytest.raises(DataError, match="filtered queries only"):
        run_inline(config)


def test_a_query_that_cannot_be_encoded_ends_the_run_before_anything_is_built(tmp_path):
    rows = rows_of(200)
    write_parquet(tmp_path / "corpus.parquet", rows)
    asked = [{"query_id": f"q{i}", "text": f"river{i}"} for i in range(20)]
    asked[7]["text"] += " faulty_query_zero"
    pl.DataFrame(asked).write_parquet(tmp_path / "q.parquet")
    more = {
        "evaluation": {"queries": str(tmp_path / "q.parquet")},
        "encoders": {"words": {"model": "hashing:64!faulty"}},
    }
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet", **more))
    with pytest.raises(DataError, match=r"q\.parquet: query q7 cannot be encoded: its vector has no length"):
        run_inline(config)
    assert not (tmp_path / "root/documents").exists()


def test_a_shallow_rerank_is_judged_as_it_is_served(tmp_path):
    """The gate must see the search that users get, not a deeper one."""
    write_parquet(tmp_path / "corpus.parquet", rows_of(600))
    content = settings(
        tmp_path / "root", tmp_path / "corpus.parquet", search={"rerank": 10}, binarizer={"bytes": 4}
    )
    config = configured(tmp_path, content | {"evaluation": {"sample_queries": 100}})
    summary = run_inline(config)
    reader = open_release(config.root).reader
    assert reader.manifest.search.rerank == 10
    rows = rows_of(600)
    vectors = _vectors(config, _texts(rows)[:100])
    served = reader.search(vectors, k=11)
    exact = reader.search(vectors, k=11, exact=True)
    own = [row["_id"] for row in rows[:100]]
    recalls = [_overlap(a, b, name) for a, b, name in zip(served, exact, own, strict=True)]
    assert summary["recall_at_10"] == pytest.approx(np.mean(recalls), abs=0.12)


def test_more_bad_rows_than_the_budget_stop_the_run(tmp_path):
    rows = [{**row, "_id": None} if i % 10 == 0 else row for i, row in enumerate(rows_of(300))]
    write_parquet(tmp_path / "corpus.parquet", rows)
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    with pytest.raises(ErrorBudgetError, match="id is null") as caught:
        run_inline(config)
    assert caught.value.exit_code == 65
    assert "error_budget" in str(caught.value)


def test_ready_made_vectors_skip_encoding(tmp_path):
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((400, 24)).astype(np.float32)
    rows = [{"_id": str(i), "embedding": v.tolist(), "year": i} for i, v in enumerate(vectors)]
    pl.DataFrame(rows).write_parquet(tmp_path / "corpus.parquet")
    content = settings(tmp_path / "root", tmp_path / "corpus.parquet", binarizer={"bytes": 9})
    del content["encoders"], content["encoder"]
    content["corpus"] |= {"text": [], "attributes": ["year"], "embedding": "embedding"}
    config = configured(tmp_path, content)
    summary = run_inline(config)
    assert (summary["documents"], summary["encoded"]) == (400, 0)
    release = open_release(config.root)
    assert [hits[0].doc_id for hits in release.search(vectors[:20])] == [str(i) for i in range(20)]


class Dies(Exception):
    """The driver is gone."""


class DyingRunner(InlineRunner):
    """Dies before the n-th task, over all stages."""

    def __init__(self, spec, left):
        super().__init__(spec)
        self._left = left

    def run(self, tasks):
        return self._until_death(super().run(tasks))

    def encode(self, tasks, spec):
        return self._until_death(super().encode(tasks, spec))

    def _until_death(self, results):
        for result in results:
            self._left -= 1
            if self._left < 0:
                raise Dies
            yield result


class Dying(Inline):
    def __init__(self, spec, left):
        super().__init__(spec)
        self._left = left

    def __enter__(self):
        return DyingRunner(self.spec, self._left)


def _encoded_so_far(root):
    return sum(pq.read_metadata(path).num_rows for path in Path(root).glob("embeddings/*/*/*.parquet"))


def test_a_run_that_dies_after_any_task_goes_on_to_the_same_bytes(tmp_path):
    write_parquet(tmp_path / "corpus.parquet", rows_of(250))
    content = settings(tmp_path / "calm", tmp_path / "corpus.parquet", evaluation={"sample_queries": 10})
    content["corpus"]["shard_rows"] = 100
    calm = configured(tmp_path, content)
    tasks = run_inline(calm)["tasks"]
    wanted = data_files(open_store(calm.root))
    assert tasks >= 9
    for left in range(tasks):
        config = configured(tmp_path, content | {"root": str(tmp_path / f"root-{left}")})
        spec = StoreSpec(config.root, config.storage)
        with pytest.raises(Dies):
            run(config, spec, lambda left=left, spec=spec: Dying(spec, left))
        before = _encoded_so_far(config.root)
        assert run_inline(config)["encoded"] == 250 - before
        assert data_files(open_store(config.root)) == wanted


class Meanwhile(Inline):
    """Lets something happen between the start of a run and its work."""

    def __init__(self, spec, event):
        super().__init__(spec)
        self._event = event

    def __enter__(self):
        self._event()
        return super().__enter__()


def _with_two_releases(tmp_path):
    rows = rows_of(120)
    for cut in range(2):
        write_parquet(tmp_path / "corpus.parquet", rows[: len(rows) - cut])
        config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
        run_inline(config)
    write_parquet(tmp_path / "corpus.parquet", rows[:-2])
    return config, StoreSpec(config.root, config.storage)


def test_a_run_does_not_undo_a_move_of_the_alias_after_it_started(tmp_path):
    config, spec = _with_two_releases(tmp_path)
    store = spec.open()
    with pytest.raises(PublishConflictError, match="release 1") as caught:
        run(config, spec, lambda: Meanwhile(spec, lambda: rollback(store)))
    assert caught.value.exit_code == 3
    assert open_release(config.root).number == 1
    assert Log(store, "aliases/current").newest() == 3


def test_a_run_whose_lease_was_taken_over_publishes_nothing(tmp_path):
    config, spec = _with_two_releases(tmp_path)
    store = spec.open()
    with pytest.raises(LeaseLostError, match="strata thief") as caught:
        run(config, spec, lambda: Meanwhile(spec, lambda: take_over(store)))
    assert caught.value.exit_code == 75
    assert open_release(config.root).number == 2
    assert not list(store.list("releases/3.json"))


def test_a_run_that_waited_plans_the_corpus_as_it_is_then(tmp_path):
    rows = rows_of(80)
    corpus = tmp_path / "corpus.parquet"
    write_parquet(corpus, rows)
    config = configured(tmp_path, settings(tmp_path / "root", corpus))
    store = open_store(config.root)
    with ThreadPoolExecutor(1) as pool, structlog.testing.capture_logs() as logs:
        with hold_root(store, "first", config.lease):
            waiting = pool.submit(run_inline, config)
            # The corpus changes once the waiting run has planned it.
            deadline = time.monotonic() + 60
            while not any(line["event"] == "waiting_for_root" for line in logs):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            write_parquet(corpus, rows[:50])
        assert waiting.result()["documents"] == 50


def test_a_run_with_nothing_to_do_does_not_wait_for_the_root(tmp_path):
    write_parquet(tmp_path / "corpus.parquet", rows_of(80))
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    run_inline(config)
    store = open_store(config.root)
    with hold_root(store, "first", config.lease) as lease:
        before = {info.path for info in store.list("")}
        assert run_inline(config)["skipped"] is True
        after = {info.path for info in store.list("")}
        lease.check()
    assert {path for path in after - before if not path.endswith(".beat")} == set()


def test_a_rolled_back_index_is_not_published_again_by_a_rerun(tmp_path):
    rows = rows_of(150)
    write_parquet(tmp_path / "corpus.parquet", rows)
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    run_inline(config)
    write_parquet(tmp_path / "corpus.parquet", rows[:-1])
    run_inline(config)
    store = open_store(config.root)
    rollback(store, now=datetime.now(UTC), token="test")
    assert open_release(config.root).number == 1
    summary = run_inline(config)
    assert summary["published"] is False
    assert open_release(config.root).number == 1
    write_parquet(tmp_path / "corpus.parquet", rows[:-2])
    assert run_inline(config)["published"] is True


# ------------------------------------------------------------------------------------------------ the files alone


def test_duckdb_and_polars_read_every_kind_of_table(built):
    config, summary = built
    for glob, rows in {
        "documents/*.parquet": ROWS,
        "embeddings/*/*/*.parquet": ROWS,
        "partitions/*.vectors.parquet": ROWS,
        "partitions/*.lists.parquet": round(summary["replicas_per_vector"] * ROWS),
        "partitions/*.heads.parquet": summary["lists"],
        "partitions/*.directory.parquet": None,
    }.items():
        by_duckdb = duckdb.sql(f"SELECT * FROM read_parquet('{config.root}/{glob}')")
        by_polars = pl.read_parquet(f"{config.root}/{glob}")
        assert by_duckdb.columns == by_polars.columns
        assert len(by_duckdb) == len(by_polars) == (rows or len(by_polars)) > 0
    joined = duckdb.sql(
        f"""SELECT count(*), max(abs(list_sum(list_transform(v.embedding, lambda x: x * x)) - 1))
            FROM read_parquet('{config.root}/documents/*.parquet') d
            JOIN read_parquet('{config.root}/partitions/*.vectors.parquet') v USING (vector_id)
            JOIN read_parquet('{config.root}/embeddings/*/*/*.parquet') e USING (text_hash)
            WHERE d.section = v.section AND d.year IS NOT DISTINCT FROM v.year"""
    ).fetchall()[0]
    assert joined[0] > 0.8 * ROWS
    assert joined[1] < 1e-2


def test_duckdb_reads_what_made_a_file(built):
    config, _ = built
    (partition,) = open_release(config.root).reader.manifest.partitions

    def said(kind):
        found = duckdb.sql(
            f"""SELECT DISTINCT key::VARCHAR, value::VARCHAR
                FROM parquet_kv_metadata('{config.root}/partitions/*.{kind}.parquet')
                WHERE key::VARCHAR LIKE 'strata.%'"""
        )
        return dict(found.fetchall())

    space = {"strata.space": partition.space}
    assert said("heads") == said("vectors") == space
    assert said("lists") == space | {"strata.binarizer": partition.codes.binarizer}


class _Foreign:
    """A release read by numpy, safetensors, pread and Parquet's footers: DESIGN §4 with no code of ours."""

    def __init__(self, root):
        self.root = root
        alias = self._json(sorted((root / "aliases/current").iterdir())[-1])
        self.manifest = self._json(self._json(f"releases/{alias['release']}.json")["manifest"]["path"])
        (self.partition,) = self.manifest["partitions"]
        self.dims = self.manifest["dims"]
        binarizer = root / self.partition["codes"]["binarizer"]
        self.levels = self._json(binarizer / "binarizer.json")["levels"]
        self.weights = load_file(binarizer / "weights.safetensors")

    def _json(self, path):
        return json.loads((self.root / path).read_bytes())

    def column(self, ref, name, dtype, width):
        path = self.root / ref["path"]
        metadata = pq.read_metadata(path)
        names = [metadata.schema.column(i).path.split(".")[0] for i in range(metadata.num_columns)]
        blocks = []
        with path.open("rb") as file:
            for g in range(metadata.num_row_groups):
                chunk, rows = metadata.row_group(g).column(names.index(name)), metadata.row_group(g).num_rows
                start = chunk.data_page_offset + chunk.total_compressed_size - rows * width
                blocks.append(os.pread(file.fileno(), rows * width, start))
        return np.frombuffer(b"".join(blocks), dtype).reshape(-1, width // np.dtype(dtype).itemsize)

    def vectors(self, segment):
        ref = self.partition["segments"][segment]["vectors"]
        return self.column(ref, "embedding", np.float16, 2 * self.dims).astype(np.float32)

    def values(self, code):
        """What codes stand for: weighted signs, level after level."""
        edges = [0, *sorted(set(self.levels))]
        blocks = [(a, b, sum(m >= b for m in self.levels)) for a, b in zip(edges, edges[1:], strict=False)]
        value, start = np.zeros((len(code), self.levels[0]), np.float32), 0
        for t, m in enumerate(self.levels):
            signs = np.unpackbits(code[:, start : start + m // 8], axis=1).astype(np.float32) * 2 - 1
            start += m // 8
            for i, (a, b, levels) in enumerate(blocks):
                if t < levels:
                    value[:, a:b] += self.weights["weights"][i, t] * signs[:, a:b]
        return value

    def nearest_lists(self, query):
        heads = self.column(self.partition["heads"], "head", np.float32, 4 * self.dims)
        apart, rule = ((query - heads) ** 2).sum(axis=1), self.manifest["search"]
        nearest = [i for i in np.argsort(apart) if apart[i] <= apart.min() + rule["margin"]][: rule["lists"]]
        directory = pq.read_table(self.root / self.partition["directory"]["path"]).to_pylist()
        return [row for row in directory if row["list_no"] in set(nearest)]

    def pread(self, ref, start, count, dtype):
        with (self.root / ref["path"]).open("rb") as file:
            data = os.pread(file.fileno(), count * np.dtype(dtype).itemsize, start)
        return np.frombuffer(data, dtype)

    def candidates(self, query):
        """Rows of the best codes."""
        query_map = self.weights.get("query_map", self.weights["rotation"])
        rotated = (query - self.weights["mean"]) @ query_map
        found = {}
        for place in self.nearest_lists(query):
            ref, n = self.partition["segments"][place["segment"]]["lists"], place["num_entries"]
            width = self.partition["codes"]["code_bytes"]
            code = self.pread(ref, place["code_at"], n * width, np.uint8).reshape(n, width)
            factor, offset = (
                self.pread(ref, place[f"{name}_at"], n, np.float16).astype(np.float32)
                for name in ("factor", "offset")
            )
            rows = self.pread(ref, place["row_at"], n, np.int32)
            found |= zip(rows.tolist(), (self.values(code) @ rotated * factor + offset).tolist(), strict=True)
        return sorted(found, key=found.get, reverse=True)[: self.manifest["search"]["rerank"]]

    def search(self, query, k):
        hits, segments = [], self.partition["segments"]
        firsts = np.cumsum([0, *(segment["vectors"]["rows"] for segment in segments)])
        for row in self.candidates(query):
            segment = int(np.searchsorted(firsts, row, side="right")) - 1
            own = row - int(firsts[segment])
            name = pq.read_table(self.root / segments[segment]["vectors"]["path"], columns=["doc_id"])
            hits.append((float(self.vectors(segment)[own] @ query), name["doc_id"][own].as_py()))
        return [name for _, name in sorted(hits, reverse=True)[:k]]


def test_numpy_and_pread_alone_find_what_search_finds(built, tmp_path):
    config, _ = built
    shutil.copytree(config.root, tmp_path / "copy")
    foreign = _Foreign(tmp_path / "copy")
    query = foreign.vectors(0)[17]
    query = query / np.linalg.norm(query)
    assert [hit.doc_id for hit in open_release(str(foreign.root)).search(query)[0]] == foreign.search(
        query, 10
    )


def test_a_root_can_be_copied_and_searched_elsewhere(built, tmp_path):
    config, _ = built
    shutil.copytree(config.root, tmp_path / "copy")
    texts = _texts(rows_of(10))
    assert _results(tmp_path / "copy", texts) == _results(config.root, texts)


SEARCHING = """
import json, sys
import numpy as np
from pipeline import open_release
release = open_release(sys.argv[1])
hits = release.search(np.array(json.loads(sys.stdin.read())), k=3, filter="year >= 0 OR year < 0")
print(len(hits[0]), sum(name in sys.modules for name in ("torch", "ray", "sentence_transformers")))
"""


def test_searching_ready_made_vectors_loads_neither_torch_nor_ray(built):
    config, _ = built
    query = _vectors(config, _texts(rows_of(1)))
    command = [sys.executable, "-c", SEARCHING, config.root]
    done = subprocess.run(
        command, input=json.dumps(query.tolist()), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["3", "0"]


def test_search_file_writes_ranked_results_for_queries_with_and_without_filters(built, tmp_path):
    config, _ = built
    rows = rows_of(ROWS)
    asked = [
        {"query_id": "plain", "text": _texts(rows)[5], "filter": None},
        {"query_id": "filtered", "text": _texts(rows)[6], "filter": "section = 'a' AND year >= 2000"},
        {"query_id": "none", "text": "stone1", "filter": "year = 1"},
    ]
    pl.DataFrame(asked).write_parquet(tmp_path / "q.parquet")
    summary = search_file(
        config,
        queries=str(tmp_path / "q.parquet"),
        out=str(tmp_path / "r.parquet"),
        how=How(7),
        runner_of=Inline,
    )
    assert set(summary) >= {"queries", "seconds", "bytes_read", "lists_probed", "partitions_opened", "rounds"}
    found = pl.read_parquet(tmp_path / "r.parquet")
    assert found.columns == ["query_id", "rank", "doc_id", "score", "release"]
    assert found.filter(pl.col("query_id") == "plain")["rank"].to_list() == list(range(1, 8))
    assert found.filter(pl.col("query_id") == "plain")["doc_id"][0] == rows[5]["_id"]
    by_id = {row["_id"]: row for row in rows}
    hits = [by_id[name] for name in found.filter(pl.col("query_id") == "filtered")["doc_id"]]
    assert len(hits) == 7
    assert all(hit["section"] == "a" and hit["year"] >= 2000 for hit in hits)
    assert found.filter(pl.col("query_id") == "none").is_empty()
    assert set(found["release"]) == {1}


def _with_another_encoder(config):
    other = config.encoders["words"].model_copy(update={"query_prompt": "find: "})
    return config.model_copy(update={"encoders": {**config.encoders, "prompted": other}})


def test_an_encoder_of_another_space_is_refused_where_a_release_is_opened(built):
    config, _ = built
    other = HashingEncoder(_with_another_encoder(config).encoders["prompted"], name="prompted")
    with pytest.raises(IncompatibleModelsError, match=r"expected vectors of words .* found .* prompted "):
        open_release(config.root, encoder=other)


@pytest.mark.parametrize("content", ["text", "embedding"])
def test_queries_of_an_encoder_of_another_space_are_refused_naming_both(built, tmp_path, content):
    config, _ = built
    asked = {"text": "river", "embedding": _vectors(config, ["river"])[0].tolist()}
    pl.DataFrame([{"query_id": "q", content: asked[content]}]).write_parquet(tmp_path / "q.parquet")

    def search(encoder):
        return search_file(
            _with_another_encoder(config),
            queries=str(tmp_path / "q.parquet"),
            out=str(tmp_path / "r.parquet"),
            how=How(3),
            encoder=encoder,
            runner_of=Inline,
        )

    assert search("words")["hits"] == 3
    with pytest.raises(IncompatibleModelsError, match=r"expected vectors of words .* found .* prompted "):
        search("prompted")


def test_query_vectors_of_another_width_are_refused_naming_the_encoder(built):
    config, _ = built
    with pytest.raises(ValueError, match="64 dimensions, as words makes them, found 32"):
        open_release(config.root).search(np.ones((1, 32), np.float32))


def test_gc_after_many_changes_keeps_what_serves_and_frees_the_rest(tmp_path):
    rows = rows_of(150)
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    for cut in range(4):
        write_parquet(tmp_path / "corpus.parquet", rows[: len(rows) - cut])
        run_inline(config)
    store = LocalStore(config.root)
    before = sum(info.size for info in store.list(""))
    collect(store, grace=timedelta(0), now=datetime.now(UTC) + timedelta(seconds=5), keep=1, dry_run=False)
    assert sum(info.size for info in store.list("")) < before
    assert verify(store, None).problems == ()
    newest = Log(store, "aliases/current")
    manifest = load_manifest(store, open_release(config.root).record.manifest)
    assert manifest.num_documents == 147
    assert AliasEntry.model_validate(newest.read(newest.newest())).release == 4
    write_parquet(tmp_path / "corpus.parquet", rows)
    assert run_inline(config)["encoded"] == 0
