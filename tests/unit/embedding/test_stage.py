import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import EncoderConfig
from pipeline.corpus import bucket_of, text_hashes
from pipeline.embedding.cache import (
    CachedBucket,
    forget_condemned,
    open_cache,
    read_redrives,
    text_bucket_count,
)
from pipeline.embedding.faulty import FaultyEncoder
from pipeline.embedding.hashing import HashingEncoder
from pipeline.embedding.stage import condemn, encode_unit, plan_units, store_given
from pipeline.errors import CorruptArtifactError
from pipeline.tables import hash_keys, vector_array, write_bucketed

ENCODER = HashingEncoder(EncoderConfig(model="hashing:32"))


@pytest.fixture
def cache(any_store):
    return open_cache(any_store, "enc", dims=32, rows=3 * 65_536)


def _shuffled(store, cache, texts, vectors=None):
    hashes = text_hashes(texts)
    columns = {"text_hash": pa.array([bytes(h) for h in hashes], pa.binary(16)), "text": texts}
    if vectors is not None:
        columns["embedding"] = vector_array(vectors)
    table = pa.table(columns)
    table = table.cast(pa.schema([field.with_nullable(False) for field in table.schema]))
    return write_bucketed(store, "scratch/texts", table, bucket_of(hashes, cache.buckets))


def _encode_missing(store, cache, files, unit_texts=10):
    encoded = 0
    for bucket in range(cache.buckets):
        for unit in plan_units(store, cache, bucket, files, unit_texts=unit_texts).files.values():
            encoded += encode_unit(store, ENCODER, cache=cache, bucket=bucket, unit=unit).numbers["encoded"]
    return encoded


def _vectors_of(store, cache, texts):
    hashes = text_hashes(texts)
    found = {}
    for bucket in range(cache.buckets):
        mine = [i for i, b in enumerate(bucket_of(hashes, cache.buckets)) if b == bucket]
        keys = np.sort(np.array([bytes(hashes[i]) for i in mine], dtype="S16"))
        vectors = CachedBucket(store, cache, bucket).read(keys)
        found |= dict(zip(keys.tolist(), vectors, strict=True))
    return np.array([found[bytes(h).rstrip(b"\0")] for h in hashes])


def test_every_distinct_text_is_encoded_once_over_files_and_runs(any_store, cache):
    first = _shuffled(any_store, cache, [f"text {i}" for i in range(60)] + ["text 3"] * 4)
    second = _shuffled(any_store, cache, [f"text {i}" for i in range(40, 80)])
    assert _encode_missing(any_store, cache, [first, second]) == 80
    assert _encode_missing(any_store, cache, [first, second]) == 0
    third = _shuffled(any_store, cache, ["text 5", "new"])
    assert _encode_missing(any_store, cache, [first, third]) == 1


def test_cached_vectors_are_the_encoders_own(any_store, cache):
    texts = [f"word{i} and word{i + 1}" for i in range(50)]
    _encode_missing(any_store, cache, [_shuffled(any_store, cache, texts)], unit_texts=7)
    assert np.array_equal(_vectors_of(any_store, cache, texts), ENCODER.encode_documents(texts))


def test_units_of_any_size_fill_the_cache_with_the_same_vectors(any_store):
    texts = [f"word{i}" for i in range(30)]
    for size in (1, 8, 100):
        cache = open_cache(any_store, f"enc{size}", dims=32, rows=10)
        _encode_missing(any_store, cache, [_shuffled(any_store, cache, texts)], unit_texts=size)
        assert np.array_equal(_vectors_of(any_store, cache, texts), ENCODER.encode_documents(texts))


def test_a_text_without_a_vector_is_an_error_that_says_what_to_do(any_store, cache):
    with pytest.raises(CorruptArtifactError, match=r"1 texts have no vector; rerun"):
        CachedBucket(any_store, cache, 0).read(np.array([b"0123456789abcdef"], dtype="S16"))


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_texts_of_a_lost_file_are_encoded_again(any_store, cache, damage):
    texts = [f"word{i}" for i in range(40)]
    files = [_shuffled(any_store, cache, texts)]
    _encode_missing(any_store, cache, files)
    lost = next(info.path for info in any_store.list(cache.folder) if info.path.endswith(".parquet"))
    any_store.delete(lost)
    if damage == "truncate":
        any_store.write(lost, b"PAR1")
    assert 0 < _encode_missing(any_store, cache, files) <= 10
    assert np.array_equal(_vectors_of(any_store, cache, texts), ENCODER.encode_documents(texts))


def test_ready_made_vectors_are_stored_once(any_store, cache):
    texts = [f"v{i}" for i in range(20)]
    vectors = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    files = [_shuffled(any_store, cache, texts, vectors)]
    assert sum(store_given(any_store, cache, b, files).numbers["missing"] for b in range(cache.buckets)) == 20
    assert sum(store_given(any_store, cache, b, files).numbers["missing"] for b in range(cache.buckets)) == 0
    assert np.array_equal(_vectors_of(any_store, cache, texts), vectors)


def test_the_first_run_fixes_the_buckets(any_store):
    assert open_cache(any_store, "enc", dims=8, rows=10).buckets == 1
    assert open_cache(any_store, "enc", dims=8, rows=10**7).buckets == 1


def test_a_cache_of_another_width_is_refused(any_store):
    open_cache(any_store, "enc", dims=8, rows=10)
    with pytest.raises(CorruptArtifactError, match="expected vectors of 16 dimensions, found 8"):
        open_cache(any_store, "enc", dims=16, rows=10)


@pytest.mark.parametrize(
    ("rows", "buckets"), [(0, 1), (1, 1), (65_536, 1), (65_537, 2), (10**6, 16), (10**12, 4096)]
)
def test_buckets_hold_a_bounded_number_of_rows(rows, buckets):
    assert text_bucket_count(rows) == buckets


def test_hash_keys_keep_trailing_zero_bytes_apart():
    keys = hash_keys(pa.chunked_array([pa.array([b"a" * 15 + b"\0", b"a" * 16], pa.binary(16))]))
    assert keys[0] != keys[1]


# ------------------------------------------------------------------------------------------------ condemned texts

FAULTY = FaultyEncoder(EncoderConfig(model="hashing:32!faulty"))
POISONED = [f"word{i}" + (" faulty_raise" if i == 3 else " faulty_nan" if i == 7 else "") for i in range(10)]


def _reopened(store):
    return open_cache(store, "enc", dims=32, rows=10, redrives=read_redrives(store, "enc"))


def _encode_all(store, cache, files, encoder):
    units = plan_units(store, cache, 0, files, unit_texts=4)
    done = [
        encode_unit(store, encoder, cache=cache, bucket=0, unit=unit).numbers for unit in units.files.values()
    ]
    return (
        sum(n["encoded"] for n in done),
        sum(n["condemned"] for n in done),
        units.numbers["condemned"],
    )


def _reasons(store, cache):
    return sorted(CachedBucket(store, cache, 0).condemned["reason"].to_pylist())


def test_condemned_texts_are_remembered_until_a_redrive_forgets_them(any_store):
    cache = _reopened(any_store)
    files = [_shuffled(any_store, cache, POISONED)]
    assert _encode_all(any_store, cache, files, FAULTY) == (8, 2, 0)
    assert _encode_all(any_store, _reopened(any_store), files, FAULTY) == (0, 0, 2)
    forget_condemned(any_store, "enc", after=(), reasons=["not_finite"])
    assert _reasons(any_store, _reopened(any_store)) == ["encoder_error"]
    assert _encode_all(any_store, _reopened(any_store), files, FAULTY) == (0, 1, 1)
    assert forget_condemned(any_store, "enc", after=(("not_finite",),), reasons=[]) == (("not_finite",), ())
    assert _reasons(any_store, _reopened(any_store)) == []
    assert _encode_all(any_store, _reopened(any_store), files, ENCODER) == (2, 0, 0)
    assert len(CachedBucket(any_store, _reopened(any_store), 0).keys) == 10


def test_a_slow_worker_of_an_older_run_condemns_nothing_that_was_redriven(any_store):
    older = _reopened(any_store)
    files = [_shuffled(any_store, older, POISONED)]
    forget_condemned(any_store, "enc", after=(), reasons=[])
    _encode_all(any_store, older, files, FAULTY)
    assert _reasons(any_store, _reopened(any_store)) == []


def test_two_redrives_at_once_are_two_entries(any_store):
    forget_condemned(any_store, "enc", after=(), reasons=["zero_vector"])
    assert forget_condemned(any_store, "enc", after=(), reasons=[]) == (("zero_vector",), ())


def test_a_lost_list_of_condemned_texts_condemns_nothing(any_store):
    cache = _reopened(any_store)
    files = [_shuffled(any_store, cache, POISONED)]
    _encode_all(any_store, cache, files, FAULTY)
    for info in list(any_store.list("embeddings")):
        if info.path.endswith(".condemned.parquet"):
            any_store.delete(info.path)
    assert _encode_all(any_store, cache, files, ENCODER) == (2, 0, 0)


def test_a_text_with_a_vector_is_not_condemned_whatever_a_list_says(any_store):
    cache = _reopened(any_store)
    files = [_shuffled(any_store, cache, ["a word"])]
    unit = plan_units(any_store, cache, 0, files, unit_texts=4).files["unit-000000"]
    condemn(
        any_store,
        cache=cache,
        bucket=0,
        unit=unit,
        rows=(0, 1),
        reason="killed_worker",
        attempts=3,
        error="x",
    )
    assert _reasons(any_store, cache) == ["killed_worker"]
    encode_unit(any_store, ENCODER, cache=cache, bucket=0, unit=unit)
    assert _reasons(any_store, cache) == []
