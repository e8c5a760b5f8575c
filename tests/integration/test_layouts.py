"""Layouts of awkward corpora, end to end: every vector in exactly one list of its own, no list too long, searches whole."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.filters import parse_filter
from pipeline.index.reader import open_release
from pipeline.postings import MOST_ENTRIES, HeadGraph, Probing
from pipeline.release import verify
from pipeline.storage import open_store
from pipeline.tables import read_columns, vector_array
from tests.integration.roads import configured, data_files, run_inline

DIMS = 16
NARROW = Probing(3, 0.1)


def _corpus(folder, *, rows, same, seed):
    """Vectors in heaps, some of them many times."""
    rng = np.random.default_rng(seed)
    heaps = rng.standard_normal((8, DIMS))
    vectors = heaps[rng.integers(0, 8, rows)] + 0.4 * rng.standard_normal((rows, DIMS))
    vectors[: same * rows // 10] = vectors[rng.integers(0, min(3, rows), same * rows // 10)]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    table = {"_id": [f"d{i}" for i in range(rows)], "v": vector_array(vectors), "n": pa.array(range(rows))}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "corpus.parquet")
    return vectors


def _configured(folder, root="root", code_bytes=4, **layout):
    content = {
        "root": str(folder / root),
        "corpus": {
            "uri": str(folder / "corpus.parquet"),
            "format": "parquet",
            "embedding": "v",
            "attributes": ["n"],
        },
        "binarizer": {"bytes": code_bytes, "method": "rotation"},
        "layout": {"segment_rows": 300, "max_train_rows": 256, "train_rows_per_list": 20} | layout,
        "evaluation": {"sample_queries": 20},
    }
    return configured(folder, content)


def _run(folder, root="root", **settings):
    config = _configured(folder, root, **settings)
    run_inline(config)
    return config


def _sizes(store, release):
    (partition,) = release.reader.manifest.partitions
    return read_columns(store, partition.directory.path, ["segment", "num_primaries", "num_entries"])


layouts = st.fixed_dictionaries(
    {
        "rows_per_list": st.sampled_from([1, 5, 30, 400]),
        "max_replicas": st.sampled_from([1, 2, 4]),
        "heads": st.sampled_from(["means", "vectors"]),
    }
)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([1, 2, 40, 700]), same=st.integers(0, 10), seed=st.integers(0, 99), layout=layouts
)
def test_every_layout_holds_every_vector_once_and_finds_all(tmp_path_factory, rows, same, seed, layout):
    folder = tmp_path_factory.mktemp("layout")
    vectors = _corpus(folder, rows=rows, same=same, seed=seed)
    config = _run(folder, **layout)
    store = open_store(config.root)
    assert verify(store, None).problems == ()
    release = open_release(config.root)
    sizes = _sizes(store, release)
    assert sum(sizes["num_primaries"].to_pylist()) == rows
    assert max(sizes["num_primaries"].to_pylist()) <= 2 * layout["rows_per_list"]
    own, entries = (sizes[name].to_numpy() for name in ("num_primaries", "num_entries"))
    segment = sizes["segment"].to_numpy()
    means = np.bincount(segment, entries) / np.maximum(np.bincount(segment), 1)
    longest = MOST_ENTRIES * np.maximum(means, layout["rows_per_list"])[segment]
    assert (entries <= np.maximum(own, longest)).all()
    every = [{hit.doc_id for hit in hits} for hits in release.search(vectors[:3], k=rows)]
    assert all(found == {f"d{i}" for i in range(rows)} for found in every)
    few = release.search(vectors[:3], k=min(rows, 60), probing=NARROW)
    assert all(len(hits) == min(rows, 60) for hits in few)
    exact, near = (release.search(vectors[:5], k=5, exact=exact) for exact in (True, False))
    for own, others in zip(exact, near, strict=True):
        assert own[0].score == pytest.approx(others[0].score, abs=2e-3)


@pytest.mark.parametrize("layout", [{"heads": "vectors", "max_replicas": 4}, {"max_replicas": 2}])
def test_a_layout_of_several_groups_and_segments_is_the_same_on_every_run(tmp_path, layout):
    _corpus(tmp_path, rows=2500, same=2, seed=1)
    one, other = (_run(tmp_path, root, rows_per_list=20, **layout) for root in ("one", "other"))
    files = data_files(open_store(one.root))
    assert files == data_files(open_store(other.root))
    (partition,) = open_release(one.root).reader.manifest.partitions
    assert len(partition.segments) > 4
    assert len(list(open_store(one.root).list("scratch/members"))) > 8


def test_many_heads_are_found_through_a_graph(tmp_path, monkeypatch):
    vectors = _corpus(tmp_path, rows=1500, same=0, seed=2)
    plain = _run(tmp_path, "plain", rows_per_list=10)
    monkeypatch.setattr("pipeline.execution.building.EXACT_HEADS", 100)
    linked = _run(tmp_path, "linked", rows_per_list=10)
    assert verify(open_store(linked.root), None).problems == ()
    releases = [open_release(config.root) for config in (plain, linked)]
    assert [r.reader.manifest.partitions[0].head_graph is not None for r in releases] == [False, True]
    queries = vectors[::50]
    expected, found = (r.search(queries, k=10).hits for r in releases)
    same = [
        len({h.doc_id for h in a} & {h.doc_id for h in b}) / 10 for a, b in zip(expected, found, strict=True)
    ]
    assert np.mean(same) > 0.99
    where = "n < 200"
    assert releases[0].search(queries, filter=where).hits == releases[1].search(queries, filter=where).hits


def test_with_a_graph_a_narrow_rule_does_not_read_all_heads(tmp_path, monkeypatch):
    vectors = _corpus(tmp_path, rows=1500, same=0, seed=2)
    monkeypatch.setattr("pipeline.execution.building.EXACT_HEADS", 100)
    release = open_release(_run(tmp_path, rows_per_list=10).root)
    reader = release.reader._reader(0)
    assert all(len(hits) == 40 for hits in release.search(vectors[:5], k=40, probing=Probing(1, 0.0)))
    assert isinstance(reader.graph, HeadGraph)
    assert "heads" not in vars(reader)


def test_what_a_filter_reads_is_counted_and_read_once(tmp_path):
    vectors = _corpus(tmp_path, rows=1500, same=0, seed=2)
    release = open_release(_run(tmp_path, rows_per_list=10).root)
    parse_filter("n < 1400", release.reader.attributes)
    first, second, other = (
        release.search(vectors[:1], filter=text).stats for text in ("n < 1400", "n < 1400", "n < 1300")
    )
    entries = sum(s.lists.rows for s in release.reader.manifest.partitions[0].segments)
    assert first.bytes_read > second.bytes_read + 4 * entries
    assert other.bytes_read == pytest.approx(second.bytes_read, rel=0.2)


def _share_found(release, queries, **more):
    """Of the ten nearest that pass."""
    found, exact = (release.search(queries, exact=exact, **more).hits for exact in (False, True))
    shares = [
        len({hit.doc_id for hit in a} & {hit.doc_id for hit in b}) / 10
        for a, b in zip(found, exact, strict=True)
    ]
    return np.mean(shares)


def test_a_filter_costs_no_recall_though_the_depth_was_tuned_without_one(tmp_path):
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((200, 64))[rng.integers(0, 200, 8000)] + 0.7 * rng.standard_normal(
        (8000, 64)
    )
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    names = [f"d{i}" for i in range(len(vectors))]
    part = pa.array((np.arange(len(vectors)) % 10).tolist())
    pq.write_table(
        pa.table({"_id": names, "v": vector_array(vectors), "n": part}), tmp_path / "corpus.parquet"
    )
    config = _run(tmp_path, code_bytes=16, rows_per_list=50, segment_rows=131_072, max_train_rows=65_536)
    release = open_release(config.root)
    queries = vectors[::80]
    assert release.reader.manifest.search.rerank < 100
    plain, filtered = _share_found(release, queries), _share_found(release, queries, filter="n IN (3, 4)")
    assert filtered >= plain - 0.02


def test_copies_of_a_few_texts_are_tuned_and_judged_as_they_are_found(tmp_path):
    rng = np.random.default_rng(6)
    texts = rng.standard_normal((40, DIMS))
    vectors = np.repeat(texts / np.linalg.norm(texts, axis=1, keepdims=True), 120, axis=0).astype(np.float32)
    names = [f"d{i}" for i in range(len(vectors))]
    pq.write_table(
        pa.table({"_id": names, "v": vector_array(vectors), "n": pa.array(range(len(vectors)))}),
        tmp_path / "corpus.parquet",
    )
    config = _configured(tmp_path, rows_per_list=50)
    summary = run_inline(config)
    own = np.arange(len(vectors)) // 120
    found = open_release(config.root).search(vectors[::120])
    assert [{own[int(hit.doc_id[1:])] for hit in hits} for hits in found] == [{i} for i in range(40)]
    assert summary["recall_at_10"] == summary["tuning_recall"] == 1
