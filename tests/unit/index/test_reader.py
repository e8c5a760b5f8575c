"""Search over a small index built by the stages themselves, without corpus, encoder or Ray."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts import Attribute, IndexManifest, SearchDefaults
from pipeline.config import BinarizerConfig, LayoutConfig
from pipeline.corpus.identity import bucket_of, vector_ids
from pipeline.embedding.cache import open_cache
from pipeline.embedding.stage import store_given
from pipeline.filters import evaluate, parse_filter
from pipeline.index.reader import IndexReader
from pipeline.index.stage import (
    VectorSource,
    build_segment,
    cut_sample,
    finish_layout,
    finish_partition,
    grow_branches,
    learn_binarizer,
    place_bucket,
    sample_vectors,
    train_index,
)
from pipeline.storage import LocalStore
from pipeline.tables import hash_keys, read_columns, vector_array, write_bucketed

DIMS, DOCUMENTS, CHUNKS = 32, 700, 3
ATTRIBUTES = (Attribute(name="year", type="int"), Attribute(name="tags", type="list<string>"))


def _corpus(rng):
    centres = rng.standard_normal((20, DIMS))
    n = DOCUMENTS * CHUNKS
    vectors = (centres[rng.integers(0, 20, n)] + 0.6 * rng.standard_normal((n, DIMS))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"d{i // CHUNKS}" for i in range(n)]
    years = [None if (i // CHUNKS) % 9 == 0 else 2000 + (i // CHUNKS) % 25 for i in range(n)]
    tags = [["x"] if (i // CHUNKS) % 3 == 0 else None for i in range(n)]
    return vectors, names, years, tags


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    store = LocalStore(str(tmp_path_factory.mktemp("root")))
    vectors, names, years, tags = _corpus(np.random.default_rng(5))
    ids = vector_ids(names, np.arange(len(names)) % CHUNKS)
    hashes = np.array(
        [list(hashlib.blake2b(v.tobytes(), digest_size=16).digest()) for v in vectors], np.uint8
    )
    table = pa.table(
        {
            "vector_id": pa.array([bytes(i) for i in ids], pa.binary(16)),
            "doc_id": names,
            "text_hash": pa.array([bytes(h) for h in hashes], pa.binary(16)),
            "year": pa.array(years, pa.int64()),
            "tags": pa.array(tags, pa.list_(pa.string())),
            "embedding": vector_array(vectors),
        }
    )
    required = {"vector_id", "doc_id", "text_hash", "embedding"}
    table = table.cast(pa.schema([f.with_nullable(f.name not in required) for f in table.schema]))
    cache = open_cache(store, "given", dims=DIMS, rows=3 * 65_536)
    texts = write_bucketed(store, "scratch/texts", table, bucket_of(hashes, cache.buckets))
    for bucket in range(cache.buckets):
        store_given(store, cache, bucket, [texts])
    source = VectorSource((texts,), cache, ATTRIBUTES)
    layout = LayoutConfig(rows_per_list=30, segment_rows=800)
    trunk = train_index(
        store,
        source,
        num_vectors=len(names),
        sample_rows=len(names),
        layout=layout,
        seed=1,
    )
    learned = learn_binarizer(store, source, sample_rows=len(names), config=BinarizerConfig(bytes=16), seed=1)
    branches, seed = trunk.files["branches"], 1
    samples = [
        cut_sample(store, source, b, branches, share=1.0).files["sample"] for b in range(cache.buckets)
    ]
    groups = range(int(trunk.numbers["groups"]))
    grown = [
        grow_branches(store, samples, g, branches, max_rows=10_000, seed=seed).files["heads"] for g in groups
    ]
    trained = finish_layout(
        store, trunk.files | learned.files, grown, num_vectors=len(names), segment_rows=layout.segment_rows
    )
    placed = [place_bucket(store, source, b, trained.files).files["placed"] for b in range(cache.buckets)]
    segments = [
        build_segment(store, placed, no, ATTRIBUTES) for no in range(int(trained.numbers["segments"]))
    ]
    partition = finish_partition(store, segments, trained.files, space="given")
    manifest = IndexManifest(
        index="i", corpus="c", plan="p", encoder={}, dims=DIMS, attributes=ATTRIBUTES, documents=(), document_buckets=1,
        num_documents=DOCUMENTS, partitions=(partition,), search=SearchDefaults(probes=20, rerank=100), statistics={},
    )  # fmt: skip
    return store, source, manifest, table, vectors


def _plain(vectors, table, query, k, keep=None):
    """Documents by best chunk, scored in float16 as stored: the whole truth in a few lines."""
    scores = vectors.astype(np.float16).astype(np.float32) @ query
    best = {}
    for i, name in enumerate(table["doc_id"].to_pylist()):
        if keep is None or keep[i]:
            best[name] = max(best.get(name, -2.0), float(scores[i]))
    return sorted(best, key=lambda name: -best[name])[:k], best


def _queries(n, seed=9):
    queries = np.random.default_rng(seed).standard_normal((n, DIMS)).astype(np.float32)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def test_exact_search_equals_a_plain_scan(built):
    store, _, manifest, table, vectors = built
    queries = _queries(12)
    for query, hits in zip(
        queries, IndexReader(store, manifest).search(queries, k=10, exact=True), strict=True
    ):
        names, scores = _plain(vectors, table, query, 10)
        assert [hit.doc_id for hit in hits] == names
        assert [hit.score for hit in hits] == pytest.approx([scores[name] for name in names], abs=1e-6)


def test_probing_every_list_and_reranking_every_row_equals_exact_search(built):
    store, _, manifest, table, _ = built
    reader = IndexReader(store, manifest)
    queries = _queries(12)
    full = reader.search(queries, k=10, probes=10_000, rerank=table.num_rows)
    assert [[h.doc_id for h in hits] for hits in full] == [
        [h.doc_id for h in hits] for hits in reader.search(queries, k=10, exact=True)
    ]


def test_default_search_finds_most_true_neighbours(built):
    store, _, manifest, _, _ = built
    reader, queries = IndexReader(store, manifest), _queries(50)
    pairs = zip(reader.search(queries), reader.search(queries, exact=True), strict=True)
    assert np.mean([len({h.doc_id for h in a} & {h.doc_id for h in b}) / 10 for a, b in pairs]) > 0.85


def test_one_query_gets_the_same_hits_alone_and_in_a_block(built):
    store, _, manifest, _, _ = built
    reader, queries = IndexReader(store, manifest), _queries(20)
    together = [[h.doc_id for h in hits] for hits in reader.search(queries)]
    assert [[h.doc_id for h in reader.search(query)[0]] for query in queries] == together


def test_a_query_that_must_look_deeper_does_not_change_what_others_get(built):
    """With one list and a shallow re-rank, chunks of one document crowd out others and some queries go deeper."""
    store, _, manifest, _, _ = built
    reader, queries = IndexReader(store, manifest), _queries(40)
    shallow = {"k": 10, "probes": 1, "rerank": 10}
    together = [[h.doc_id for h in hits] for hits in reader.search(queries, **shallow)]
    alone = [[h.doc_id for h in reader.search(query, **shallow)[0]] for query in queries]
    assert alone == together
    assert all(len(hits) == 10 for hits in together)


@pytest.mark.parametrize("rerank", [0, 10, 100])
def test_no_document_comes_twice(built, rerank):
    store, _, manifest, _, _ = built
    for hits in IndexReader(store, manifest).search(_queries(20), k=30, rerank=rerank):
        assert len({hit.doc_id for hit in hits}) == len(hits) == 30


@pytest.mark.parametrize(
    "text", ["year = 2004", "year IS NULL", "NOT year < 2020", "list_contains(tags, 'x')", "year > 2001"]
)
def test_filtered_hits_pass_the_filter_and_none_is_missing(built, text):
    store, _, manifest, table, vectors = built
    reader = IndexReader(store, manifest)
    where = parse_filter(text, reader.attributes)
    keep = evaluate(where, table)
    passing = {name for name, kept in zip(table["doc_id"].to_pylist(), keep, strict=True) if kept}
    query = _queries(1)[0]
    found = [hit.doc_id for hit in reader.search(query, k=1000, where=where)[0]]
    assert set(found) == passing
    assert found == _plain(vectors, table, query, 1000, keep)[0]


def test_a_filter_that_nothing_passes_gives_no_hits(built):
    store, _, manifest, _, _ = built
    reader = IndexReader(store, manifest)
    where = parse_filter("year = 1", reader.attributes)
    assert list(reader.search(_queries(3), where=where)) == [[], [], []]
    assert list(reader.search(_queries(3), where=where, exact=True)) == [[], [], []]


@pytest.mark.parametrize(
    ("vectors", "problem"),
    [
        (np.ones((1, DIMS + 1)), "expected vectors of 32"),
        (np.zeros((1, DIMS)), "zero"),
        (np.full((1, DIMS), np.nan), "finite"),
    ],
)
def test_a_bad_query_vector_is_refused(built, vectors, problem):
    store, _, manifest, _, _ = built
    with pytest.raises(ValueError, match=problem):
        IndexReader(store, manifest).search(vectors)


def test_every_vector_is_in_exactly_one_list(built):
    store, _, manifest, table, _ = built
    (partition,) = manifest.partitions
    ids = np.concatenate(
        [hash_keys(read_columns(store, s.vectors.path)["vector_id"]) for s in partition.segments]
    )
    assert sorted(ids.tolist()) == sorted(hash_keys(table["vector_id"]).tolist())
    for segment in partition.segments:
        assert read_columns(store, segment.lists.path)["row"].to_pylist() == list(range(segment.vectors.rows))


def test_directory_covers_every_entry_once(built):
    store, _, manifest, _, _ = built
    (partition,) = manifest.partitions
    directory = read_columns(store, partition.directory.path).to_pylist()
    for no, segment in enumerate(partition.segments):
        mine = sorted((r["first_entry"], r["num_entries"]) for r in directory if r["segment"] == no)
        stops = [first + count for first, count in mine]
        assert [first for first, _ in mine] == [0, *stops[:-1]]
        assert stops[-1] == segment.lists.rows


def test_entries_of_a_list_are_sorted_by_distance_to_its_head(built):
    store, _, manifest, _, _ = built
    (partition,) = manifest.partitions
    heads = np.array(read_columns(store, partition.heads.path)["head"].to_pylist(), np.float32)
    for row in read_columns(store, partition.directory.path).to_pylist():
        stored = read_columns(store, partition.segments[row["segment"]].vectors.path, ["embedding"])[
            "embedding"
        ]
        block = np.array(stored.slice(row["first_entry"], row["num_entries"]).to_pylist(), np.float32)
        distances = ((block - heads[row["list_no"]]) ** 2).sum(axis=1)
        assert (np.diff(distances) > -2e-3).all()


def test_the_two_ends_of_the_hash_order_are_disjoint_samples(built):
    store, source, _, table, _ = built
    first, _ = sample_vectors(store, source, 100)
    last, _ = sample_vectors(store, source, 100, from_end=True)
    assert len(first) == len(last) == 100
    assert not {v.tobytes() for v in first} & {v.tobytes() for v in last}
    everything, names = sample_vectors(store, source, 10**6)
    assert len(everything) == len(names) == table.num_rows
