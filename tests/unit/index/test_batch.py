"""Many queries together find what each finds alone."""

import numpy as np
import pyarrow as pa
import pytest

import pipeline.index.batch as batching
from pipeline.filters import evaluate, parse_filter
from pipeline.index.batch import search_many
from pipeline.index.reader import IndexReader
from pipeline.postings import Probing
from tests.unit.index.test_reader import EVERY, _plain, _queries, built, unchunked

__all__ = ["built", "unchunked"]

WHERES = [
    None,
    "year >= 2015",
    "year = 2003",
    "list_contains(tags, 'x')",
    "year IS NULL",
    "year > 9999",
    None,
]


def asked(manifest, n=40, seed=3):
    filters = [
        None if text is None else parse_filter(text, IndexReader(None, manifest).attributes)
        for text in WHERES
    ]
    order = np.random.default_rng(seed).integers(0, len(WHERES), n)
    return _queries(n, seed), [filters[i] for i in order]


def by_query(found, n):
    hits = [[] for _ in range(n)]
    names, ranks = found.doc_id.to_pylist(), found.rank.tolist()
    for query, name, rank, score in zip(
        found.query.tolist(), names, ranks, found.score.tolist(), strict=True
    ):
        hits[query].append((name, score))
        assert rank == len(hits[query])
    return hits


def same(hits, expected):
    """The same documents but for equals, and the same scores."""
    assert len(hits) == len(expected)
    for (_, score), (_, other) in zip(hits, expected, strict=True):
        assert score == pytest.approx(other, abs=1e-5)
    border = expected[-1][1] + 1e-5 if expected else 0
    assert {n for n, s in hits if s > border} == {n for n, s in expected if s > border}


@pytest.mark.parametrize("corpus", ["built", "unchunked"])
def test_compared_with_all_that_passes_every_query_finds_the_nearest(corpus, request):
    store, _, manifest, table, vectors = request.getfixturevalue(corpus)
    queries, filters = asked(manifest)
    found = by_query(search_many(IndexReader(store, manifest), queries, filters, k=7, exact=True), 40)
    for query, where, hits in zip(queries, filters, found, strict=True):
        keep = None if where is None else evaluate(where, table)
        names, scores = _plain(vectors, table, query, 7, keep)
        same(hits, [(name, scores[name]) for name in names])


def test_probing_every_list_equals_exact_search(unchunked, monkeypatch):
    store, _, manifest, _, _ = unchunked
    reader, (queries, filters) = IndexReader(store, manifest), asked(manifest)
    monkeypatch.setattr(batching, "_scans_all", lambda _, batch: batch.exact)
    exact, probed = (
        search_many(reader, queries, filters, k=7, probing=EVERY, exact=exact) for exact in (True, False)
    )
    assert probed.stats.lists_probed > 0
    assert exact.stats.lists_probed == 0
    for one, other in zip(by_query(probed, 40), by_query(exact, 40), strict=True):
        same(one, other)


def plainly_probed(reader, query, where, k, probing):
    """One query at a time, list by list, as the batch does it together."""
    found = []
    for one in reader.partitions():
        mask = np.ones(one.part.rows, np.bool_) if where is None else one.part.mask(where)
        passing = one.part.primaries_passing(mask)
        distances = one.part.distances(query[None])[0]
        order = [no for no in np.argsort(distances, kind="stable") if passing[no]]
        seen = 0
        least = max(batching.PASSING_ROWS, k) if where is not None else k
        for place, no in enumerate(order):
            near = distances[no] <= distances[order[0]] + batching.WIDER * probing.margin
            if not (near and place < round(batching.WIDER * probing.lists)) and seen >= least:
                break
            rows, _ = one.part.primaries_of(np.array([no]))
            rows = rows[mask[rows]]
            seen += len(rows)
            scores = one.part.embeddings(rows) @ query if len(rows) else []
            found += [(float(score), int(row)) for score, row in zip(scores, rows, strict=True)]
    return sorted(found, key=lambda pair: (-pair[0], pair[1]))[:k]


@pytest.mark.parametrize("block", [1 << 26, 64])
def test_lists_together_are_the_lists_of_each_query(unchunked, monkeypatch, block):
    store, _, manifest, _, _ = unchunked
    reader, (queries, filters) = IndexReader(store, manifest), asked(manifest)
    monkeypatch.setattr(batching, "_scans_all", lambda _, batch: batch.exact)
    monkeypatch.setattr(batching, "PASSING_ROWS", 50)
    monkeypatch.setattr(batching, "MASKS_AT_ONCE", block)
    monkeypatch.setattr(batching, "DISTANCES_AT_ONCE", 4 * block)
    monkeypatch.setattr(batching, "BITMAP_BYTES", block)
    rule = Probing(3, 0.1)
    found = by_query(search_many(reader, queries, filters, k=7, probing=rule), 40)
    for query, where, hits in zip(queries, filters, found, strict=True):
        expected = plainly_probed(reader, query, where, 7, rule)
        names = reader.doc_ids(np.sort([row for _, row in expected]).astype(np.int64)).to_pylist()
        rows = dict(zip(sorted(row for _, row in expected), names, strict=True))
        same(hits, [(rows[row], score) for score, row in expected])


@pytest.mark.parametrize("corpus", ["built", "unchunked"])
def test_no_query_finds_fewer_than_match_nor_a_document_twice_nor_one_that_fails(corpus, request):
    store, _, manifest, table, _ = request.getfixturevalue(corpus)
    queries, filters = asked(manifest, 60)
    for k in (1, 10, 400):
        found = by_query(search_many(IndexReader(store, manifest), queries, filters, k=k), 60)
        for where, hits in zip(filters, found, strict=True):
            passing = table if where is None else table.filter(pa.array(evaluate(where, table)))
            matching = set(passing["doc_id"].to_pylist())
            names = [name for name, _ in hits]
            assert len(names) == len(set(names)) == min(k, len(matching))
            assert set(names) <= matching


@pytest.mark.parametrize("corpus", ["built", "unchunked"])
@pytest.mark.parametrize("exact", [False, True])
def test_any_number_of_threads_finds_the_same_and_counts_the_same(corpus, exact, request, monkeypatch):
    store, _, manifest, _, _ = request.getfixturevalue(corpus)
    monkeypatch.setattr(batching, "PASSING_ROWS", 20)
    monkeypatch.setattr(batching, "MEMBERS", 4)
    queries, filters = asked(manifest, 90)
    one, *others = (
        search_many(IndexReader(store, manifest), queries, filters, k=7, exact=exact, threads=threads)
        for threads in (1, 2, 5)
    )
    for other in others:
        assert other.doc_id.equals(one.doc_id)
        assert other.stats == one.stats
        for name in ("query", "rank", "score"):
            assert np.array_equal(getattr(other, name), getattr(one, name))


def test_by_default_most_true_neighbours_are_found(unchunked):
    store, _, manifest, _, _ = unchunked
    reader, (queries, filters) = IndexReader(store, manifest), asked(manifest, 200)
    near, exact = (
        by_query(search_many(reader, queries, filters, exact=exact), 200) for exact in (False, True)
    )
    shares = [
        len({n for n, _ in one} & {n for n, _ in other}) / max(len(other), 1)
        for one, other in zip(near, exact, strict=True)
        if other
    ]
    assert np.mean(shares) > 0.97


def test_nothing_is_asked_and_nothing_found(unchunked):
    store, _, manifest, _, _ = unchunked
    reader = IndexReader(store, manifest)
    none = search_many(reader, np.zeros((0, 32), np.float32), [])
    assert len(none.doc_id) == none.stats.queries == 0
    where = parse_filter("year > 9999", reader.attributes)
    assert len(search_many(reader, _queries(3), [where] * 3).doc_id) == 0


def test_no_queries_of_documents_with_chunks_have_no_hits(built):
    store, _, manifest, _, _ = built
    assert len(search_many(IndexReader(store, manifest), np.zeros((0, 32), np.float32), []).doc_id) == 0


@pytest.mark.parametrize("text", ["TRUE", "year = 2003 OR TRUE", "NULL", "FALSE", "year = NULL"])
def test_a_filter_that_reads_no_column_lets_all_pass_or_none(unchunked, text):
    store, _, manifest, _, _ = unchunked
    reader = IndexReader(store, manifest)
    where, queries = parse_filter(text, reader.attributes), _queries(40)
    expected = 5 if "TRUE" in text else 0
    for exact in (False, True):
        together = by_query(search_many(reader, queries, [where] * 40, k=5, exact=exact), 40)
        alone = reader.search(queries[:3], k=5, where=where, exact=exact)
        assert {len(hits) for hits in (*together, *alone)} == {expected}


@pytest.mark.parametrize("rows", [30, 400])
def test_of_equals_the_lower_places_are_found_however_they_come(rows):
    rng = np.random.default_rng(2)
    vectors = np.repeat(rng.standard_normal((3, 8)), 1 + rows // 3, axis=0)[:rows].astype(np.float32)
    queries = rng.standard_normal((5, 8)).astype(np.float32)
    scores = (queries @ vectors.T).round(3)
    expected = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :10], axis=1)
    assert np.array_equal(np.sort(batching._largest(scores, 10), axis=1), expected)
    near, _ = batching._nearest_rows(np.sign(queries), np.sign(vectors), 10)
    whole = np.sign(queries) @ np.sign(vectors).T
    assert np.array_equal(
        np.sort(near, axis=1), np.sort(np.argsort(-whole, axis=1, kind="stable")[:, :10], axis=1)
    )
    for cuts in ([], [7], [3, 11, 12]):
        best = batching._Best(5, 10)
        parts = np.split(np.arange(rows), cuts)
        for part in (*parts[1:], parts[0]):
            best.add_best(np.arange(5), int(part[0]), scores[:, part])
        assert np.array_equal(np.sort(best.sorted()[0], axis=1), expected)
