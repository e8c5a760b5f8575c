"""Partitions cut by a workload, end to end: nothing lost, nothing read that cannot match, the same files on every run."""

import shutil

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.execution.drifting import layout_drift
from pipeline.filters import evaluate, parse_filter
from pipeline.index.batch import search_many
from pipeline.index.reader import open_release
from pipeline.release import read_manifest, read_release, verify
from pipeline.storage import open_store
from pipeline.tables import read_columns
from tests.integration.roads import configured, data_files, rows_of, run_inline, settings, write_parquet
from tests.unit.release.conftest import write_manifest

ROWS = 1500
FILTERS = [
    "section = 'a'",
    "section = 'b' AND year >= 2010",
    "list_contains(tags, 'x')",
    "year < 2000",
    "section IS NULL",
]
UNSEEN = [
    "section IN ('a', 'c') AND NOT list_contains(tags, 'y')",
    "year BETWEEN 1995 AND 1999 OR year IS NULL",
    "section = 'nowhere'",
    "NOT (section = 'a')",
    "year > 2100 AND section = 'a'",
]


def _configured(folder, root="root", filters=FILTERS, **more):
    asked = [text for i, text in enumerate(filters) for _ in range(len(filters) - i)] + [None]
    pq.write_table(pa.table({"filter": pa.array(asked, pa.string())}), folder / "workload.parquet")
    if not (folder / "corpus").exists():
        write_parquet(folder / "corpus/part.parquet", rows_of(ROWS))
    layout = {
        "rows_per_list": 25,
        "segment_rows": 80,
        "min_partition_rows": 60,
        "max_partitions": 8,
        "unfiltered_slowdown": 10,
        "workload": str(folder / "workload.parquet"),
    }
    return configured(folder, settings(folder / root, folder / "corpus/*.parquet", layout=layout | more))


@pytest.fixture(scope="module", autouse=True)
def _cheap_partitions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.partitioning.growing.OPEN_ROWS", {"ssd": 1, "object_store": 1})
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("partitions")
    config = _configured(folder)
    run_inline(config)
    return folder, config


def _vectors(config):
    """All rows of the release with their partition, in the order of storage."""
    store, tables = open_store(config.root), []
    for partition in open_release(config.root).reader.manifest.partitions:
        for segment in partition.segments:
            table = read_columns(store, segment.vectors.path)
            number = pa.array(np.full(table.num_rows, partition.partition_id))
            tables.append(table.append_column("partition", number))
    return pa.concat_tables(tables)


def test_every_document_is_in_the_one_partition_whose_path_it_passes(built):
    _, config = built
    release, rows = open_release(config.root), _vectors(config)
    assert sorted(rows["doc_id"].to_pylist()) == sorted(f"doc-{i:05d}" for i in range(ROWS))
    partitions = release.reader.manifest.partitions
    assert len(partitions) == 8
    assert all(one.rows >= 30 for one in partitions)
    assert sum(one.rows for one in partitions) == ROWS
    assert any(len(one.segments) > 1 for one in partitions)
    for one in partitions:
        passes = evaluate(parse_filter(one.path, release.reader.attributes), rows)
        assert np.array_equal(passes, rows["partition"].to_numpy() == one.partition_id)
    assert verify(open_store(config.root), None).problems == ()


def test_verify_tells_of_rows_that_are_in_the_wrong_partition(built, tmp_path):
    _, config = built
    shutil.copytree(config.root, tmp_path / "root")
    store = open_store(str(tmp_path / "root"))
    record = read_release(store, 1)
    manifest = read_manifest(store, record)
    first, second, *others = manifest.partitions
    swapped = [
        first.model_copy(update={"bits": second.bits}),
        second.model_copy(update={"bits": first.bits}),
        *others,
    ]
    ref = write_manifest(
        store, manifest.model_copy(update={"index": "swapped", "partitions": tuple(swapped)})
    )
    problems = verify(store, record.model_copy(update={"index": "swapped", "manifest": ref})).problems
    assert len(problems) == len(first.segments) + len(second.segments)
    assert all(f"rows are not of partition {i}" in " ".join(problems) for i in (0, 1))


@pytest.mark.parametrize("where", [*FILTERS, *UNSEEN])
def test_a_filtered_search_finds_what_passes_in_the_partitions_that_it_looks_into(built, where):
    _, config = built
    release, rows = open_release(config.root), _vectors(config)
    passing = rows.filter(pa.array(evaluate(parse_filter(where, release.reader.attributes), rows)))
    vectors = np.stack(rows["embedding"].to_pylist()[:7]).astype(np.float32)
    every = release.search(vectors, k=ROWS, filter=where)
    assert all({hit.doc_id for hit in hits} == set(passing["doc_id"].to_pylist()) for hits in every)
    near, exact = (release.search(vectors, k=10, filter=where, exact=exact) for exact in (False, True))
    assert [[h.doc_id for h in hits] for hits in near] == [[h.doc_id for h in hits] for hits in exact]
    assert all(len(hits) == min(10, passing.num_rows) for hits in near)
    reached = set(passing["partition"].to_pylist())
    assert len(reached) * 7 <= near.stats.partitions_opened


def test_a_filter_that_all_rows_of_its_partitions_pass_is_not_tested_and_finds_no_others(built, monkeypatch):
    _, config = built
    rows = _vectors(config)
    vectors = np.stack(rows["embedding"].to_pylist()[:40]).astype(np.float32)
    monkeypatch.setattr("pipeline.index.reader.FILTERED_ROWS", 10)
    reader = open_release(config.root).reader
    untested = 0
    for one in reader.manifest.partitions:
        where = parse_filter(one.path, reader.attributes)
        assert {part.number for part in reader.partitions(where)} >= {one.partition_id}
        untested += reader.without_need(where) is None
        passing = rows.filter(pa.array(evaluate(where, rows)))
        matching = set(passing["doc_id"].to_pylist())
        alone = reader.search(vectors, where=where)
        together = search_many(reader, vectors, [where] * len(vectors))
        exact = reader.search(vectors, where=where, exact=True)
        of_query = np.split(
            np.array(together.doc_id.to_pylist()), np.flatnonzero(np.diff(together.query)) + 1
        )
        scores = vectors @ np.stack(passing["embedding"].to_pylist()).astype(np.float32).T
        tenth = np.sort(scores, axis=1)[:, -10]
        for hits, names, best, least in zip(alone, of_query, exact, tenth, strict=True):
            assert len(hits) == len(names) == len(best) == 10
            assert {hit.doc_id for hit in hits} | set(names) <= matching
            assert min(hit.score for hit in best) >= least - 1e-3
        found = [hit.score >= least - 1e-3 for hits, least in zip(alone, tenth, strict=True) for hit in hits]
        assert np.mean(found) >= 0.9
    assert untested >= 3
    assert reader.without_need(parse_filter("section = 'a' AND year = 2003", reader.attributes)) is not None
    assert reader.without_need(parse_filter("year > 9999", reader.attributes)) is not None


def test_filters_of_the_workload_look_into_few_partitions_and_others_into_no_more_than_there_are(built):
    _, config = built
    release = open_release(config.root)
    vector = np.ones(64, np.float32)
    opened = [release.search(vector, filter=where).stats.partitions_opened for where in FILTERS]
    assert max(opened) < 8
    assert sum(opened) < 0.6 * 8 * len(FILTERS)
    assert release.search(vector, filter="section = 'nowhere'").stats.partitions_opened == 0
    assert release.search(vector).stats.partitions_opened == 8


def test_an_unfiltered_search_pools_the_lists_of_all_partitions_in_three_rounds(built):
    _, config = built
    release, rows = open_release(config.root), _vectors(config)
    vectors = np.stack(rows["embedding"].to_pylist()[::50]).astype(np.float32)
    found, exact = (release.search(vectors, k=10, exact=exact) for exact in (False, True))
    shares = [
        len({h.doc_id for h in one} & {h.doc_id for h in other}) / 10
        for one, other in zip(found, exact, strict=True)
    ]
    assert np.mean(shares) >= 0.95
    assert found.stats.rounds == 3
    assert found.stats.lists_probed < 0.9 * len(vectors) * release.reader.manifest.statistics["lists"]


def test_other_tools_can_prune_by_the_table_of_partitions(built):
    _, config = built
    manifest, rows = open_release(config.root).reader.manifest, _vectors(config)
    place = f"{config.root}/{manifest.partition_table.path}"
    asked = """SELECT partition_id FROM '{}' WHERE coalesce(list_contains("section.values", 'a'), true)
        AND coalesce("year.max" >= 2020, false)"""
    kept = {number for (number,) in duckdb.sql(asked.format(place)).fetchall()}
    passing = rows.filter(
        pa.array(evaluate(parse_filter("section = 'a' AND year >= 2020", rows.schema), rows))
    )
    assert set(passing["partition"].to_pylist()) <= kept
    assert len(kept) < len(manifest.partitions)
    database = duckdb.connect()
    database.register("attributes", rows.select(["year", "section", "tags"]))
    paths = dict(duckdb.sql(f"SELECT partition_id, path FROM '{place}'").fetchall())
    for number, path in paths.items():
        ((count,),) = database.sql(f"SELECT count(*) FROM attributes WHERE {path}").fetchall()
        assert count == (rows["partition"].to_numpy() == number).sum()


def test_the_same_files_come_of_every_run_and_nothing_is_done_twice(built):
    folder, config = built
    other = _configured(folder, "other")
    run_inline(other)
    assert data_files(open_store(config.root)) == data_files(open_store(other.root))
    assert run_inline(config)["release"] == 1


def test_another_workload_makes_other_partitions_and_finds_the_same(built):
    folder, _ = built
    config = _configured(folder, "changed")
    run_inline(config)
    before = open_release(config.root)
    run_inline(_configured(folder, "changed", ["section = 'c'", "year = 2003"]))
    after = open_release(config.root)
    assert after.number == before.number + 1
    assert after.reader.manifest.cuts != before.reader.manifest.cuts
    vector = np.ones((1, 64), np.float32)
    for where in (None, *FILTERS):
        one, other = (r.search(vector, k=20, filter=where, exact=True) for r in (before, after))
        assert [h.doc_id for h in one[0]] == [h.doc_id for h in other[0]]


def test_filters_that_do_not_fit_are_set_aside_and_the_rest_is_learned_from(tmp_path):
    config = _configured(tmp_path, filters=["gone = 1", "section = 'a'"])
    run_inline(config)
    release = open_release(config.root)
    assert release.reader.manifest.cuts == ("\"section\" = 'a'",)
    assert [one.path for one in release.reader.manifest.partitions] == [
        "\"section\" = 'a'",
        '"section" <> \'a\' OR "section" IS NULL',
    ]


def _drift(folder, config, asked):
    pq.write_table(pa.table({"filter": pa.array(asked, pa.string())}), folder / "asked.parquet")
    return layout_drift(config, str(folder / "asked.parquet"))


def test_status_says_when_another_layout_pays(built, tmp_path):
    _, config = built
    same = _drift(tmp_path, config, FILTERS)
    assert same["unseen_filters"] == 0
    assert not same["refitting_pays"]
    other = _drift(
        tmp_path, config, ["section = 'c' AND year > 2015", "list_contains(tags, 'z') AND year = 2003"] * 3
    )
    assert other["unseen_filters"] == 1
    assert other["rows_touched_refitted"] < 0.5 * other["rows_touched"]
    assert other["refitting_pays"]
    bare = _drift(tmp_path, config, [None, "gone = 1"])
    assert (bare["rows_touched"], bare["partitions_touched"], bare["unreadable"]) == (ROWS, 8, 0.5)
    assert bare["partitions_touched_refitted"] == 1
