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
from pipeline.errors import CorruptArtifactError, IncompatibleModelsError
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
    load_binarizer,
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


def _hashes(vectors):
    return np.array([list(hashlib.blake2b(v.tobytes(), digest_size=16).digest()) for v in vectors], np.uint8)


def _table(vectors, names, years, tags):
    ids = vector_ids(names, np.arange(len(names)) % CHUNKS)
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
    cache = open_cache(store, space, dims=DIMS, rows=3 * 65_536)
    texts = write_bucketed(store, "scratch/texts", table, bucket_of(_hashes(vectors), cache.buckets))
    for bucket in range(cache.buckets):
        store_given(store, cache, bucket, [texts])
    return VectorSource((texts,), cache, ATTRIBUTES)


def _trained(store, source, n, *, method="auto", seed=1):
    layout = LayoutConfig(rows_per_list=30, segment_rows=800)
    trunk = train_index(store, source, num_vectors=n, sample_rows=n, layout=layout, seed=1)
    config = BinarizerConfig(bytes=16, method=method)
    learned = learn_binarizer(store, source, sample_rows=n, config=config, seed=seed)
    branches = trunk.files["branches"]
    samples = [
        cut_sample(store, source, b, branches, share=1.0).files["sample"] for b in range(source.cache.buckets)
    ]
    grown = [
        grow_branches(store, samples, g, branches, max_rows=10_000, seed=1).files["heads"]
        for g in range(int(trunk.numbers["groups"]))
    ]
    files = trunk.files | learned.files
    return finish_layout(store, files, grown, num_vectors=n, segment_rows=layout.segment_rows)


def _placed(store, source, trained):
    return [
        place_bucket(store, source, b, trained.files).files["placed"] for b in range(source.cache.buckets)
    ]


def _manifest(store, source, trained):
    placed, segments = _placed(store, source, trained), range(int(trained.numbers["segments"]))
    built = [build_segment(store, placed, no, ATTRIBUTES) for no in segments]
    partition = finish_partition(store, built, trained.files, space=source.cache.encoder)
    return IndexManifest(
        index="i", corpus="c", plan="p", encoder={}, dims=DIMS, attributes=ATTRIBUTES, documents=(), document_buckets=1,
        num_documents=DOCUMENTS, partitions=(partition,), search=SearchDefaults(probes=20, rerank=100), statistics={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    store = LocalStore(str(tmp_path_factory.mktemp("root")))
    vectors, *columns = _corpus(np.random.default_rng(5))
    table = _table(vectors, *columns)
    source = _source(store, table, vectors, "given")
    return store, source, _manifest(store, source, _trained(store, source, len(vectors))), table, vectors


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


# ------------------------------------------------------------------------------------------------ what made the files


@pytest.fixture(scope="module")
def others(built):
    """The same rows by another binarizer, and in another space."""
    store, source, _, table, vectors = built
    trained = _trained(store, source, len(vectors), method="rotation")
    elsewhere = _source(store, table, vectors, "elsewhere")
    return {
        "binarizer": _manifest(store, source, trained).partitions[0],
        "space": _manifest(store, elsewhere, trained).partitions[0],
    }


def _with_segment(manifest, **files):
    (partition,) = manifest.partitions
    segments = (partition.segments[0].model_copy(update=files), *partition.segments[1:])
    partition = partition.model_copy(update={"segments": segments})
    return manifest.model_copy(update={"partitions": (partition,)})


def _scan(store, manifest):
    return IndexReader(store, manifest).search(_queries(3), probes=10_000)


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
    mine, theirs = (
        _placed(store, source, _trained(store, source, len(vectors), method="rotation", seed=seed))
        for seed in (1, 2)
    )
    with pytest.raises(
        IncompatibleModelsError, match=r"expected codes of binarizers/\w+, found codes of binarizers/"
    ):
        build_segment(store, [mine[0], *theirs[1:]], 0, ATTRIBUTES)


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
