"""Queries by the folder: sharded, resumed where they were left, each answered once; the neighbours of every document."""

import json
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, FilterError, RootBusyError, SchemaMismatchError, TransientError
from pipeline.execution import answering
from pipeline.execution.runner import InlineRunner
from pipeline.execution.searching import How, search_file, search_items
from pipeline.index.reader import open_release
from pipeline.release import hold_root
from pipeline.storage import open_store
from tests.integration.roads import Inline, configured, rows_of, run_inline, settings, write_parquet

ROWS = 600


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answering")
    write_parquet(folder / "corpus.parquet", rows_of(ROWS))
    pq.write_table(pa.table({"filter": ["section = 'a'", "year >= 2010", None]}), folder / "past.parquet")
    layout = {
        "rows_per_list": 25,
        "segment_rows": 150,
        "min_partition_rows": 50,
        "unfiltered_slowdown": 10,
        "workload": str(folder / "past.parquet"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.partitioning.growing.OPEN_ROWS", {"ssd": 1, "object_store": 1})
        found = configured(folder, settings(folder / "root", folder / "corpus.parquet", layout=layout))
        run_inline(found)
    assert len(open_release(found.root).reader.manifest.partitions) > 1
    return found


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(answering, "SHARD_QUERIES", 20)


@pytest.fixture
def queries(tmp_path):
    rows = rows_of(90, seed=4)
    asked = pa.table(
        {
            "query_id": [f"q{i}" for i in range(90)],
            "text": [row["text"] for row in rows],
            "year": [row["year"] for row in rows],
            "filter": [[None, "section = 'b'", "year >= {q.year}"][i % 3] for i in range(90)],
        }
    )
    pq.write_table(asked, tmp_path / "queries.parquet")
    return str(tmp_path / "queries.parquet")


def search(config, queries, out, runner_of=Inline, how=None):
    return search_file(config, queries=queries, out=str(out), how=how or How(5), runner_of=runner_of)


def rows_in(folder):
    table = pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("*.parquet")))
    return sorted(map(tuple, table.to_pylist()), key=str), table


def by_query(table):
    found = {}
    for row in table.to_pylist():
        found.setdefault(row["query_id"], []).append((row["rank"], row["doc_id"], round(row["score"], 4)))
    return found


def test_a_folder_holds_what_a_file_would_in_parts(config, queries, tmp_path):
    one = search(config, queries, tmp_path / "r.parquet")
    many = search(config, queries, f"{tmp_path}/parts/")
    _, table = rows_in(tmp_path / "parts")
    assert by_query(table) == by_query(pq.read_table(tmp_path / "r.parquet"))
    assert many["queries"] == one["queries"] == 90
    assert many["hits"] == one["hits"] == table.num_rows
    assert many["shards"] == 5
    assert {p.name for p in (tmp_path / "parts").iterdir() if p.is_file()} == {
        "_SUCCESS",
        *(f"part-{i:05d}.parquet" for i in range(5)),
    }
    assert all(
        found.path.startswith("_work/leases/") for found in open_store(f"{tmp_path}/parts").list("_work")
    )


def test_asked_again_nothing_is_done_and_something_else_replaces_it(config, queries, tmp_path):
    out = f"{tmp_path}/parts/"
    first = search(config, queries, out)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("part*")}
    again = search(config, queries, out)
    assert (first["skipped"], again["skipped"]) == (False, True)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("part*")} == before
    search(config, queries, out, how=How(3))
    assert max(row["rank"] for row in rows_in(tmp_path / "parts")[1].to_pylist()) == 3


def dying_after(tasks):
    """A runner that breaks off after so many tasks."""

    class Dying(InlineRunner):
        def run(self, all_tasks):
            for place, done in super().run(all_tasks):
                if place == tasks:
                    raise TransientError("here", "the worker is gone", "try again")
                yield place, done

    @contextmanager
    def runner_of(spec):
        yield Dying(spec)

    return runner_of


@pytest.mark.parametrize("tasks", [0, 1, 3])
def test_a_job_that_died_goes_on_where_it_stopped_and_answers_each_query_once(
    config, queries, tmp_path, tasks
):
    search(config, queries, f"{tmp_path}/whole/")
    with pytest.raises(TransientError):
        search(config, queries, f"{tmp_path}/parts/", dying_after(tasks))
    assert not (tmp_path / "parts/_SUCCESS").exists()
    assert not list((tmp_path / "parts").glob("part*"))
    summary = search(config, queries, f"{tmp_path}/parts/")
    assert summary["shards_reused"] == tasks + 1
    for part in (tmp_path / "whole").glob("part*"):
        assert (tmp_path / "parts" / part.name).read_bytes() == part.read_bytes()


def test_a_job_that_died_while_its_parts_were_put_in_place_is_finished(
    config, queries, tmp_path, monkeypatch
):
    out = f"{tmp_path}/parts/"
    search(config, queries, out, how=How(9))
    publish = answering._publish

    def half(target, work, parts):
        publish(target, work, parts[:2])
        raise TransientError("here", "gone", "try again")

    with monkeypatch.context() as patch:
        patch.setattr(answering, "_publish", half)
        with pytest.raises(TransientError):
            search(config, queries, out)
    assert not (tmp_path / "parts/_SUCCESS").exists()
    assert search(config, queries, out)["shards_reused"] == 5
    search(config, queries, f"{tmp_path}/whole/")
    assert rows_in(tmp_path / "parts")[0] == rows_in(tmp_path / "whole")[0]


def test_a_depth_makes_no_sense_for_a_folder(config, queries, tmp_path):
    with pytest.raises(ConfigError, match="rerank"):
        search(config, queries, f"{tmp_path}/parts/", how=How(5, rerank=100))


@pytest.mark.parametrize(
    "where", [None, "section = {q.section}", "year > {q.year} AND section <> {q.section}"]
)
def test_every_document_has_its_nearest_others(config, tmp_path, where):
    out = f"{tmp_path}/items/"
    summary = search_items(config, out=out, where=where, how=How(4, exact=True), runner_of=Inline)
    release, rows = open_release(config.root), rows_of(ROWS)
    assert summary["queries"] == ROWS
    found = by_query(rows_in(tmp_path / "items")[1])
    corpus = {row["_id"]: row for row in rows}
    passes = {
        None: lambda *_: True,
        "section = {q.section}": lambda a, b: a["section"] is not None and a["section"] == b["section"],
        "year > {q.year} AND section <> {q.section}": lambda a, b: (
            None not in (a["year"], b["year"], a["section"], b["section"])
            and b["year"] > a["year"]
            and b["section"] != a["section"]
        ),
    }[where]
    texts = [f"{row['title']} {row['text']}" for row in rows]
    vectors = release.vectors_of(texts)
    scores = vectors @ vectors.T
    for at in range(0, ROWS, 37):
        others = [i for i in range(ROWS) if i != at and passes(rows[at], rows[i])]
        best = sorted((float(scores[at, i]) for i in others), reverse=True)[:4]
        hits = found.get(rows[at]["_id"], [])
        assert [rank for rank, _, _ in hits] == list(range(1, len(best) + 1))
        assert [score for _, _, score in hits] == pytest.approx(best, abs=2e-3)
        assert all(name != rows[at]["_id"] and passes(rows[at], corpus[name]) for _, name, _ in hits)


@pytest.mark.s3
def test_a_folder_on_s3_is_filled_like_a_local_one(config, queries, s3_root, s3_config):
    remote = config.model_copy(update={"storage": s3_config})
    summary = search(remote, queries, f"{s3_root}/answers/")
    store = open_store(f"{s3_root}/answers", s3_config)
    names = [found.path for found in store.list("") if not found.path.startswith("_work/leases/")]
    assert names == ["_SUCCESS", *(f"part-{i:05d}.parquet" for i in range(summary["shards"]))]
    assert json.loads(store.read("_SUCCESS"))["figures"]["hits"] == summary["hits"]
    assert search(remote, queries, f"{s3_root}/answers/")["skipped"]
    assert np.isfinite(summary["seconds"])


def test_what_others_left_in_the_folder_stays_and_says_nothing(config, queries, tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("_SUCCESS", "part-00000-4711-c000.snappy.parquet", "notes.txt"):
        (tmp_path / "parts" / name).write_bytes(b"")
    assert not search(config, queries, f"{tmp_path}/parts/")["skipped"]
    assert (tmp_path / "parts/part-00000-4711-c000.snappy.parquet").read_bytes() == b""
    assert (tmp_path / "parts/notes.txt").exists()


def test_other_questions_in_between_do_not_disturb_what_was_begun(config, queries, tmp_path):
    with pytest.raises(TransientError):
        search(config, queries, f"{tmp_path}/parts/", dying_after(2))
    assert search(config, queries, f"{tmp_path}/parts/", how=How(2))["shards_reused"] == 0
    assert search(config, queries, f"{tmp_path}/parts/")["shards_reused"] == 3


def test_one_job_at_a_time_fills_a_folder(config, queries, tmp_path):
    busy = config.model_copy(update={"lease": config.lease.model_copy(update={"on_busy": "leave"})})
    with (
        hold_root(open_store(f"{tmp_path}/parts/_work"), "search", config.lease),
        pytest.raises(RootBusyError),
    ):
        search(busy, queries, f"{tmp_path}/parts/")
    assert not (tmp_path / "parts/_SUCCESS").exists()


def test_a_filter_of_items_is_refused_before_anything_is_started(config, tmp_path):
    for where, error in (("sectoin = 'a'", FilterError), ("year = {q.yaer}", SchemaMismatchError)):
        with pytest.raises(error):
            search_items(config, out=f"{tmp_path}/items/", where=where, how=How(4), runner_of=Inline)
    assert not (tmp_path / "items").exists()


def test_the_first_chunk_that_there_is_asks_for_its_document():
    ids = [b"a" * 12 + number.to_bytes(4, "big") for number in range(3)]
    ids += [b"b" * 12 + number.to_bytes(4, "big") for number in (2, 3)]
    column = pa.chunked_array([pa.array(ids, pa.binary(16))])
    found = answering._is_first_chunk(column, {b"b" * 12: {0, 1}, b"c" * 12: {0}})
    assert found.tolist() == [True, False, False, True, False]
