"""Search over a small index built by the stages themselves, without corpus, encoder or Ray."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts import Attribute, IndexManifest, SearchDefaults
from pipeline.config import BinarizerConfig, SearchConfig, SizedLayout
from pipeline.corpus.identity import bucket_of, vector_ids
from pipeline.embedding.cache import open_cache
from pipeline.embedding.stage import store_given
from pipeline.errors import CorruptArtifactError, IncompatibleModelsError
from pipeline.evaluation.tuning import tune
from pipeline.filters import evaluate, parse_filter
from pipeline.index.binarizers import learn_binarizer, load_binarizer
from pipeline.index.growing import cut_sample, grow_branches, read_tree, segments_of, train_index
from pipeline.index.reader import IndexReader
from pipeline.index.scanning import Tracker, scan
from pipeline.index.stage import (
    Built,
    SegmentPlaces,
    build_segment,
    codes_info,
    finish_partition,
    graph_heads,
    place_bucket,
    settle_segment,
)
from pipeline.index.training import Layout
from pipeline.index.vectors import VectorSource, sample_queries, sample_vectors
from pipeline.partitioning import PartitionTree
from pipeline.postings import Probing, settings_of
from pipeline.storage import LocalStore
from pipeline.tables import read_columns, to_matrix, vector_array, write_bucketed
from tests.rewriters import REWRITERS

DIMS, DOCUMENTS, CHUNKS = 32, 700, 3
EVERY = Probing(10_000, 4.0)
ATTRIBUTES = (Attribute(name="year", type="int"), Attribute(name="tags", type="list<string>"))


def _corpus(rng, chunks=CHUNKS):
    centres = rng.standard_normal((20, DIMS))
    n = DOCUMENTS * CHUNKS
    vectors = (centres[rng.integers(0, 20, n)] + 0.6 * rng.standard_normal((n, DIMS))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    document = np.arange(n) // chunks
    names = [f"d{i}" for i in document]
    years = [None if i % 9 == 0 else 2000 + i % 25 for i in document.tolist()]
    tags = [["x"] if i % 3 == 0 else None for i in document]
    return vectors, names, years, tags


def _hashes(vectors):
    return np.array([list(hashlib.blake2b(v.tobytes(), digest_size=16).digest()) for v in vectors], np.uint8)


def _table(vectors, names, years, tags):
    ids = vector_ids(names, np.arange(len(names)) % (len(names) // len(set(names))))
    table = pa.table(
        {
            "vector_id": pa.array([bytes(i) for i in ids], pa.binary(16)),
            "doc_id": names,
            "text_hash": pa.array([bytes(h) for h in _hashes(vectors)], pa.binary(16)),
            "year": pa.array(years, pa.int64()),
            "tags": pa.array(tags, pa.list_(pa.string())),
            "embedding": vector_array(vectors),
        }
    )
    required = {"vector_id", "doc_id", "text_hash", "embedding"}
    return table.cast(pa.schema([f.with_nullable(f.name not in required) for f in table.schema]))


def _source(store, table, vectors, space):
    cache = open_cache(store, space, dims=vectors.shape[1], rows=3 * 65_536)
    texts = write_bucketed(store, "scratch/texts", table, bucket_of(_hashes(vectors), cache.buckets))
    for bucket in range(cache.buckets):
        store_given(store, cache, bucket, [texts])
    return VectorSource((texts,), cache, ATTRIBUTES)


LISTS = {"rows_per_list": 30, "max_replicas": 3, "real_heads": False, "seed": 1}


def _learned(store, source, n, *, method="auto", seed=1):
    config = BinarizerConfig(bytes=16, method=method)
    return learn_binarizer(store, source, sample_rows=n, config=config, seed=seed).files


def _layout(store, source, n, **more):
    config = SizedLayout(rows_per_list=30, max_replicas=3, segment_rows=800)
    whole = {"partition_tree": PartitionTree(), "num_vectors": n}
    trunk = train_index(store, source, **whole, sample_rows=n, layout=config, seed=1)
    branches, groups = trunk.files["branches"], int(trunk.numbers["groups"])
    samples = [
        cut_sample(store, source, b, branches, PartitionTree(), share=1.0).files["sample"]
        for b in range(source.cache.buckets)
    ]
    grow = {"max_rows": 10_000, "rounds": 3 if groups == 1 else 0, "seed": 1}
    heads = [grow_branches(store, samples, g, branches, **grow).files["heads"] for g in range(groups)]
    tree = read_tree(store, branches, heads)
    segments = segments_of(store, heads, tree.of_list, num_vectors=n, segment_rows=config.segment_rows)
    return Layout(tree, segments, PartitionTree(), **(LISTS | more))


def _placed(store, source, layout, binarizer):
    return [
        place_bucket(store, source, b, layout, binarizer["binarizer"]).files["placed"]
        for b in range(source.cache.buckets)
    ]


def _built(store, source, layout, binarizer):
    placed = _placed(store, source, layout, binarizer)
    numbers = range(int(layout.segments.max()) + 1)
    settled = [settle_segment(store, placed, no, ATTRIBUTES, layout) for no in numbers]
    entries = [output.files["entries"] for output in settled]
    sizes = np.array([output.files["vectors"].rows for output in settled])
    places = SegmentPlaces.of(sizes, layout.first_segments)
    return [
        Built(
            one,
            build_segment(
                store,
                entries,
                one.files["lists"],
                no,
                places,
                binarizer["binarizer"],
                rows_per_list=layout.rows_per_list,
            ),
        )
        for no, one in zip(numbers, settled, strict=True)
    ]


def _manifest(store, source, layout, binarizer, documents=DOCUMENTS):
    built = _built(store, source, layout, binarizer)
    partition = finish_partition(store, built, codes_info(store, binarizer), space=source.cache.encoder)
    return IndexManifest(
        index="i", corpus="c", plan="p", encoder={"fingerprint": source.cache.encoder}, dims=source.cache.dims, attributes=ATTRIBUTES, documents=(), document_buckets=1,
        num_documents=documents, partitions=(partition,), search=SearchDefaults(lists=20, margin=4.0, rerank=100),
        statistics={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return _build(LocalStore(str(tmp_path_factory.mktemp("root"))), CHUNKS)


@pytest.fixture(scope="module")
def unchunked(tmp_path_factory):
    return _build(LocalStore(str(tmp_path_factory.mktemp("root"))), 1)


def _build(store, chunks):
    vectors, *columns = _corpus(np.random.default_rng(5), chunks)
    table = _table(vectors, *columns)
    source = _source(store, table, vectors, "given")
    layout, binarizer = _layout(store, source, len(vectors)), _learned(store, source, len(vectors))
    manifest = _manifest(store, source, layout, binarizer, len(vectors) // chunks)
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


@pytest.mark.parametrize("corpus", ["built", "unchunked"])
def test_exact_search_equals_a_plain_scan(corpus, request):
    store, _, manifest, table, vectors = request.getfixturevalue(corpus)
    queries = _queries(12)
    for query, hits in zip(
        queries, IndexReader(store, manifest).search(queries, k=10, exact=True), strict=True
    ):
        names, scores = _plain(vectors, table, query, 10)
        assert [hit.doc_id for hit in hits] == names
        assert [hit.score for hit in hits] == pytest.approx([scores[name] for name in names], abs=1e-6)


@pytest.mark.parametrize("corpus", ["built", "unchunked"])
def test_probing_every_list_and_reranking_every_row_equals_exact_search(corpus, request):
    store, _, manifest, table, _ = request.getfixturevalue(corpus)
    reader = IndexReader(store, manifest)
    queries = _queries(12)
    full = reader.search(queries, k=10, probing=EVERY, rerank=table.num_rows)
    assert [[h.doc_id for h in hits] for hits in full] == [
        [h.doc_id for h in hits] for hits in reader.search(queries, k=10, exact=True)
    ]


def test_default_search_finds_most_true_neighbours(built):
    store, _, manifest, _, _ = built
    reader, queries = IndexReader(store, manifest), _queries(50)
    pairs = zip(reader.search(queries), reader.search(queries, exact=True), strict=True)
    assert np.mean([len({h.doc_id for h in a} & {h.doc_id for h in b}) / 10 for a, b in pairs]) > 0.85


def test_a_graph_over_the_heads_finds_what_all_heads_find(built):
    store, _, manifest, _, _ = built
    (partition,) = manifest.partitions
    graph = graph_heads(store, partition.heads).files["graph"]
    linked = manifest.model_copy(update={"partitions": (partition.model_copy(update={"head_graph": graph}),)})
    where = parse_filter("year > 2010", IndexReader(store, manifest).attributes)
    for more in ({}, {"where": where}, {"probing": Probing(3, 0.2)}):
        expected, found = (
            IndexReader(store, m).search(_queries(40), k=10, **more) for m in (manifest, linked)
        )
        assert [[hit.doc_id for hit in one] for one in found] == [
            [hit.doc_id for hit in one] for one in expected
        ]


def test_one_query_gets_the_same_hits_alone_and_in_a_block(built):
    store, _, manifest, _, _ = built
    reader, queries = IndexReader(store, manifest), _queries(20)
    together = [[h.doc_id for h in hits] for hits in reader.search(queries)]
    assert [[h.doc_id for h in reader.search(query)[0]] for query in queries] == together


def test_more_documents_are_chosen_from_more_candidates(unchunked):
    store, _, manifest, _, _ = unchunked
    tuned = manifest.model_copy(update={"search": SearchDefaults(lists=100, margin=4.0, rerank=20)})
    reader, queries = IndexReader(store, tuned), _queries(30)
    shares = []
    for k in (10, 100):
        pairs = zip(reader.search(queries, k=k), reader.search(queries, k=k, exact=True), strict=True)
        shares.append(np.mean([len({h.doc_id for h in a} & {h.doc_id for h in b}) / k for a, b in pairs]))
    assert shares[1] > shares[0] - 0.05
    assert reader.search(queries, k=25).stats.rows_reranked == 50 * len(queries)


def _true_ten(store, manifest, queries):
    """vector_ids of the ten nearest of each query, and all places by vector_id."""
    (partition,) = manifest.partitions
    table = _vectors(store, partition)
    ids = [bytes(one) for one in table["vector_id"].to_pylist()]
    scores = queries @ to_matrix(table["embedding"]).astype(np.float32).T
    return [[ids[row] for row in np.argsort(-one)[:10]] for one in scores], {
        one: i for i, one in enumerate(ids)
    }


def test_true_neighbours_are_found_where_they_are_whichever_share_is_asked_for_first(unchunked):
    store, _, manifest, _, _ = unchunked
    queries, (partition,) = _queries(25), manifest.partitions
    wanted, place = _true_ten(store, manifest, queries)
    owner = {
        entry["first_row"] + i: entry["list_no"]
        for entry in _entries(store, partition)[0]
        for i in range(entry["num_primaries"])
    }
    parts = IndexReader(store, manifest).partitions()
    turns = np.argsort(np.argsort(parts[0].part.distances(queries), axis=1), axis=1)
    ranks = sorted(turns[q, owner[place[one]]] for q, ids in enumerate(wanted) for one in ids)
    for first in (0.3, 1.0):
        tracker = Tracker(parts, queries, wanted, enough=10)
        for share in (first, 0.5, 0.9, 1.0):
            located = tracker.locate(share, parts[0].part.num_lists)
            assert located.lists == ranks[int(np.ceil(share * len(ranks))) - 1] + 1
        assert [one.tolist() for one in located.places] == [
            sorted(place[one] for one in ids) for ids in wanted
        ]
    assert Tracker(parts, queries, wanted, enough=10).locate(1.0, 2).lists == 2


def test_what_scanning_says_that_a_rule_finds_is_what_a_search_by_it_finds(unchunked):
    store, _, manifest, table, _ = unchunked
    reader, queries = IndexReader(store, manifest), _queries(25)
    wanted, place = _true_ten(store, manifest, queries)
    names = dict(
        zip((bytes(one) for one in table["vector_id"].to_pylist()), table["doc_id"].to_pylist(), strict=True)
    )
    places = [np.array(sorted(place[one] for one in ids)) for ids in wanted]
    met = scan(reader.partitions(), queries, places, [10] * len(queries), lists=20)
    rules = [Probing(lists, margin) for lists in (1, 3, 20) for margin in (0.05, 0.3, 4.0)]
    settings = settings_of(met, rules, [10, 25, 60], entry_bytes=1, vector_bytes=1)
    assert len({round(one.recall, 3) for one in settings}) > 9
    for one in settings:
        found = reader.search(queries, probing=one.probing, rerank=one.rerank)
        shares = [
            len({h.doc_id for h in hits} & {names[i] for i in ids}) / 10
            for hits, ids in zip(found, wanted, strict=True)
        ]
        assert one.recall == pytest.approx(np.mean(shares), abs=1e-9)
        assert one.lists == pytest.approx(found.stats.lists_probed / len(queries))


def _tuned(corpus, target, **settings):
    """What tuning chooses, and what a search by it finds of the true ten."""
    store, _, manifest, table, _ = corpus
    described = manifest.model_copy(update={"statistics": {"list_rows_mean": 60.0}})
    reader, queries = IndexReader(store, described), _queries(80, seed=4)
    wanted, _ = _true_ten(store, manifest, queries)
    chosen, curve = tune(reader, reader.sides()[0], queries, wanted, SearchConfig(**settings), target)
    found = reader.search(queries, probing=chosen.probing, rerank=chosen.rerank)
    ids = [bytes(one) for one in table["vector_id"].to_pylist()]
    names = dict(zip(ids, table["doc_id"].to_pylist(), strict=True))
    pairs = zip(found, wanted, strict=True)
    return (
        chosen,
        curve,
        np.mean([len({h.doc_id for h in hits} & {names[i] for i in w}) / 10 for hits, w in pairs]),
    )


@pytest.mark.parametrize("target", [0.5, 0.9, 0.97, 1.0])
def test_a_search_by_what_was_tuned_finds_what_tuning_says_or_more(unchunked, target):
    chosen, curve, found = _tuned(unchunked, target)
    assert chosen.sure_recall >= target
    assert chosen.recall - 1e-6 <= found <= chosen.recall + 0.5 * (1 - target) + 1e-6
    assert chosen in curve
    assert chosen.bytes < 1.01 * max(one.bytes for one in curve)


def test_set_lists_are_scanned_whole_and_what_they_hold_counts(unchunked):
    chosen, _, found = _tuned(unchunked, 0.5, lists=40)
    assert chosen.probing.lists == 40
    assert chosen.recall == pytest.approx(found)
    chosen, curve, found = _tuned(unchunked, 1.0, lists=2)
    assert chosen.recall == pytest.approx(found) == max(one.recall for one in curve)
    assert found < 0.9
    chosen, _, found = _tuned(unchunked, 0.9, margin=0.1, rerank=15)
    assert (chosen.probing.margin, chosen.rerank) == (0.1, 15)


def test_a_filtered_search_for_more_documents_scores_more_again(unchunked):
    store, _, manifest, _, _ = unchunked
    tuned = manifest.model_copy(update={"search": SearchDefaults(lists=100, margin=4.0, rerank=10)})
    reader = IndexReader(store, tuned)
    where = parse_filter("year > 2002", reader.attributes)
    found = reader.search(_queries(10), k=15, where=where)
    assert found.stats.rows_reranked == 150 * 10


def test_a_query_that_must_look_deeper_does_not_change_what_others_get(built):
    """With one list and a shallow re-rank, chunks of one document crowd out others and some queries go deeper."""
    store, _, manifest, _, _ = built
    reader, queries = IndexReader(store, manifest), _queries(40)
    shallow = {"k": 10, "probing": Probing(1, 4.0), "rerank": 10}
    together = [[h.doc_id for h in hits] for hits in reader.search(queries, **shallow)]
    alone = [[h.doc_id for h in reader.search(query, **shallow)[0]] for query in queries]
    assert alone == together
    assert all(len(hits) == 10 for hits in together)


@pytest.mark.parametrize(
    ("corpus", "rerank", "rounds"),
    [("built", 100, 3), ("unchunked", 100, 3), ("built", 0, 3), ("unchunked", 0, 2)],
)
def test_a_query_takes_three_rounds_of_reading_and_two_without_vectors(corpus, rerank, rounds, request):
    """Lists, what is scored again, doc_ids; a document of several vectors is told by its vector_ids."""
    store, _, manifest, _, _ = request.getfixturevalue(corpus)
    assert len(manifest.partitions[0].segments) > 1
    reads = []

    class Watched(LocalStore):
        def read_many(self, wanted):
            reads.append(sum(len(ranges) for _, ranges in wanted))
            return super().read_many(wanted)

    reader = IndexReader(Watched(store.uri), manifest)
    reader.open()
    found = reader.search(_queries(1), k=5, rerank=rerank)
    assert len(reads) == found.stats.rounds == rounds
    assert found.stats.requests == sum(reads)


@pytest.mark.parametrize("tool", ["pyarrow plain", "pyarrow one row group", "duckdb"])
@pytest.mark.parametrize("kind", ["lists", "vectors", "directory", "heads"])
def test_files_that_another_tool_wrote_anew_are_read_through_parquet(built, tmp_path, tool, kind):
    store, _, manifest, _, _ = built
    (partition,) = manifest.partitions
    copy = LocalStore(str(shutil.copytree(store.uri, tmp_path / "root")))
    refs = {
        "lists": [segment.lists for segment in partition.segments],
        "vectors": [segment.vectors for segment in partition.segments],
        "directory": [partition.directory],
        "heads": [partition.heads],
    }
    for ref in refs[kind]:
        REWRITERS[tool](Path(store.uri) / ref.path, Path(copy.uri) / ref.path)
    where = parse_filter("year > 2010", IndexReader(store, manifest).attributes)
    for more in ({}, {"where": where}, {"exact": True}):
        expected, found = (IndexReader(s, manifest).search(_queries(5), **more) for s in (store, copy))
        assert found.hits == expected.hits


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


def test_filters_in_turn_find_what_each_finds_alone(built, monkeypatch):
    store, _, manifest, _, _ = built
    monkeypatch.setattr("pipeline.index.partition.FILTERS_KEPT", 2)
    reader, (query,) = IndexReader(store, manifest), _queries(1)
    wheres = [parse_filter(f"year >= {year}", reader.attributes) for year in (2001, 2010, 2020, 2024)]
    alone = [IndexReader(store, manifest).search(query, where=where)[0] for where in wheres]
    for turn in (0, 1, 2, 3, 2, 3, 0, 1, 1, 0):
        assert reader.search(query, where=wheres[turn])[0] == alone[turn]


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


def _entries(store, partition):
    """Rows of every list as (row, distance) by list, from ordinary Parquet."""
    directory = read_columns(store, partition.directory.path).to_pylist()
    rows = [read_columns(store, segment.lists.path)["row"].to_pylist() for segment in partition.segments]
    found = {}
    for place in directory:
        first = place["first_entry"]
        found[place["list_no"]] = rows[place["segment"]][first : first + place["num_entries"]]
    return directory, found


def _vectors(store, partition):
    tables = [read_columns(store, s.vectors.path, ["vector_id", "embedding"]) for s in partition.segments]
    return pa.concat_tables(tables)


def test_every_vector_is_the_primary_of_exactly_one_list_and_in_it_once(built):
    store, _, manifest, table, _ = built
    (partition,) = manifest.partitions
    directory, lists = _entries(store, partition)
    owner = {}
    for place in directory:
        own = range(place["first_row"], place["first_row"] + place["num_primaries"])
        assert set(own) <= set(lists[place["list_no"]])
        for row in own:
            assert owner.setdefault(row, place["list_no"]) == place["list_no"]
    assert sorted(owner) == list(range(table.num_rows))
    assert all(len(set(rows)) == len(rows) for rows in lists.values())
    stored = sorted(_vectors(store, partition)["vector_id"].to_pylist())
    assert stored == sorted(table["vector_id"].to_pylist())


def test_vectors_have_copies_in_near_lists(built):
    store, _, manifest, table, _ = built
    _, lists = _entries(store, manifest.partitions[0])
    copies = np.bincount(np.concatenate(list(lists.values())), minlength=table.num_rows)
    assert copies.min() >= 1
    assert copies.max() <= 3
    assert 1.05 < copies.mean() < 3


def test_no_list_is_longer_than_twice_the_rows_asked_for(built):
    directory, lists = _entries(built[0], built[2].partitions[0])
    assert max(place["num_primaries"] for place in directory) <= 2 * LISTS["rows_per_list"]
    assert max(map(len, lists.values())) <= 200


def test_directory_covers_every_entry_once(built):
    store, _, manifest, _, _ = built
    (partition,) = manifest.partitions
    directory = read_columns(store, partition.directory.path).to_pylist()
    assert [place["list_no"] for place in directory] == list(range(partition.heads.rows))
    for no, segment in enumerate(partition.segments):
        mine = sorted((r["first_entry"], r["num_entries"]) for r in directory if r["segment"] == no)
        stops = [first + count for first, count in mine]
        assert [first for first, _ in mine] == [0, *stops[:-1]]
        assert stops[-1] == segment.lists.rows


def test_entries_of_a_list_are_sorted_by_distance_to_its_head(built):
    store, _, manifest, _, _ = built
    (partition,) = manifest.partitions
    heads = read_columns(store, partition.heads.path)
    vectors = np.array(_vectors(store, partition)["embedding"].to_pylist(), np.float32)
    _, lists = _entries(store, partition)
    for number, rows in lists.items():
        head = np.array(heads["head"][number].as_py(), np.float32)
        distances = ((vectors[rows] - head) ** 2).sum(axis=1)
        assert (np.diff(distances) > -4e-3).all()
        assert distances.max() == pytest.approx(heads["radius"][number].as_py(), abs=4e-3)


def test_a_list_is_one_run_of_bytes_and_the_directory_says_where_its_columns_lie(built):
    store, _, manifest, _, _ = built
    (partition,) = manifest.partitions
    for place in read_columns(store, partition.directory.path).to_pylist():
        segment = partition.segments[place["segment"]]
        data = store.read(segment.lists.path)
        table = read_columns(store, segment.lists.path).slice(place["first_entry"], place["num_entries"])
        count = place["num_entries"]
        for name, width in {"code": 16, "factor": 2, "offset": 2, "row": 4}.items():
            start = place[f"{name}_at"]
            assert place["list_at"] < start < place["row_at"] + 4 * count
            column = table[name]
            values = b"".join(column.to_pylist()) if name == "code" else column.to_numpy().tobytes()
            assert data[start : start + count * width] == values
        names = read_columns(store, segment.vectors.path, ["doc_id"])["doc_id"].to_pylist()
        first = place["first_row"] - sum(s.vectors.rows for s in partition.segments[: place["segment"]])
        expected = b"".join(
            len(n.encode()).to_bytes(4, "little") + n.encode()
            for n in names[first : first + place["num_primaries"]]
        )
        stored = store.read(segment.vectors.path)
        assert stored[place["doc_ids_at"] :][: place["doc_ids_bytes"]] == expected


def test_the_two_ends_of_the_hash_order_are_disjoint_samples(built):
    store, source, _, table, _ = built
    first, (last, _) = sample_vectors(store, source, 100), sample_queries(store, source, 100)
    assert len(first) == len(last) == 100
    assert not {v.tobytes() for v in first} & {v.tobytes() for v in last}
    assert len(sample_vectors(store, source, 10**6)) == table.num_rows
    everything, names = sample_queries(store, source, 10**6)
    assert len(everything) == len(names) == len({v.tobytes() for v in everything})
    assert {v.tobytes() for v in everything} == {v.tobytes() for v in sample_vectors(store, source, 10**6)}


# ------------------------------------------------------------------------------------------------ what made the files


@pytest.fixture(scope="module")
def others(built):
    """The same rows by another binarizer, and in another space."""
    store, source, _, table, vectors = built
    layout, binarizer = (
        _layout(store, source, len(vectors)),
        _learned(store, source, len(vectors), method="rotation"),
    )
    elsewhere = _source(store, table, vectors, "elsewhere")
    return {
        "binarizer": _manifest(store, source, layout, binarizer).partitions[0],
        "space": _manifest(store, elsewhere, layout, binarizer).partitions[0],
    }


def _with_segment(manifest, **files):
    (partition,) = manifest.partitions
    segments = (partition.segments[0].model_copy(update=files), *partition.segments[1:])
    partition = partition.model_copy(update={"segments": segments})
    return manifest.model_copy(update={"partitions": (partition,)})


def _scan(store, manifest):
    return IndexReader(store, manifest).search(_queries(3), probing=EVERY)


def test_every_file_says_what_made_it(built):
    store, _, manifest, _, _ = built
    (partition,) = manifest.partitions
    in_space = {b"strata.space": b"given"}
    of_codes = in_space | {b"strata.binarizer": partition.codes.binarizer.encode()}
    for segment in partition.segments:
        assert read_columns(store, segment.lists.path).schema.metadata == of_codes
        assert read_columns(store, segment.vectors.path).schema.metadata == in_space
    assert read_columns(store, partition.heads.path).schema.metadata == in_space


def test_codes_of_another_binarizer_are_refused_naming_both(built, others):
    store, _, manifest, _, _ = built
    theirs = others["binarizer"]
    mixed = _with_segment(manifest, lists=theirs.segments[0].lists)
    with pytest.raises(IncompatibleModelsError) as caught:
        _scan(store, mixed)
    mine = manifest.partitions[0].codes.binarizer
    assert theirs.segments[0].lists.path in caught.value.place
    assert caught.value.problem == f"expected codes of {mine}, found codes of {theirs.codes.binarizer}"


@pytest.mark.parametrize("role", ["lists", "vectors"])
def test_a_segment_in_another_space_is_refused_naming_both(built, others, role):
    store, _, manifest, _, _ = built
    mixed = _with_segment(manifest, **{role: getattr(others["space"].segments[0], role)})
    with pytest.raises(IncompatibleModelsError, match="space given, found vectors of space elsewhere"):
        _scan(store, mixed)


def test_heads_in_another_space_are_refused_when_the_index_is_opened(built, others):
    store, _, manifest, _, _ = built
    partition = manifest.partitions[0].model_copy(update={"heads": others["space"].heads})
    with pytest.raises(IncompatibleModelsError, match="space given, found vectors of space elsewhere"):
        IndexReader(store, manifest.model_copy(update={"partitions": (partition,)})).open()


def test_placed_rows_of_two_binarizers_make_no_segment(built):
    store, source, _, _, vectors = built
    layout = _layout(store, source, len(vectors))
    mine, theirs = (
        _placed(store, source, layout, _learned(store, source, len(vectors), method="rotation", seed=seed))
        for seed in (1, 2)
    )
    with pytest.raises(
        IncompatibleModelsError, match=r"expected codes of binarizers/\w+, found codes of binarizers/"
    ):
        settle_segment(store, [mine[0], *theirs[1:]], 0, ATTRIBUTES, layout)


@pytest.mark.parametrize("name", ["weights.safetensors", "binarizer.json"])
def test_a_folder_with_a_file_of_another_binarizer_is_refused_naming_both(built, others, tmp_path, name):
    store, _, manifest, _, _ = built
    mine, theirs = (p.codes for p in (manifest.partitions[0], others["binarizer"]))
    copy = LocalStore(str(tmp_path))
    for part, codes in {"weights.safetensors": mine, "binarizer.json": mine, name: theirs}.items():
        copy.write(f"{mine.binarizer}/{part}", store.read(f"{codes.binarizer}/{part}"))
    expected, found = (
        next(
            hashlib.sha256(store.read(ref.path)).hexdigest() for ref in codes.files if ref.path.endswith(name)
        )
        for codes in (mine, theirs)
    )
    with pytest.raises(CorruptArtifactError, match=name) as caught:
        load_binarizer(copy, mine.binarizer, dims=DIMS)
    assert expected[:32] in caught.value.problem
    assert found[:32] in caught.value.problem


def test_a_binarizer_of_wider_vectors_is_refused(built):
    store, _, manifest, _, _ = built
    with pytest.raises(IncompatibleModelsError, match="of 33 dimensions, found one of 32"):
        load_binarizer(store, manifest.partitions[0].codes.binarizer, dims=33)
