import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.identity import (
    bucket_of,
    embedding_hashes,
    hash_array,
    hash_matrix,
    sort_keys,
    text_hashes,
    vector_ids,
)

hashes = st.lists(st.binary(min_size=16, max_size=16), max_size=50)


def matrix(values):
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, 16)


def test_a_vector_id_is_the_hash_of_the_document_and_the_chunk_number():
    found = vector_ids(pa.array(["a", "naïve"]), np.array([0, 258], np.int32))
    expected = [
        hashlib.blake2b(b"a", digest_size=12).digest() + b"\0\0\0\0",
        hashlib.blake2b("naïve".encode(), digest_size=12).digest() + b"\0\0\1\2",
    ]
    assert [row.tobytes() for row in found] == expected


def test_hashes_of_texts_and_vectors_are_blake2b():
    assert text_hashes(["ü"]).tobytes() == hashlib.blake2b("ü".encode(), digest_size=16).digest()
    vectors = np.array([[0.6, 0.8], [1, 0]], np.float32)
    assert [row.tobytes() for row in embedding_hashes(vectors)] == [
        hashlib.blake2b(row.astype("<f4").tobytes(), digest_size=16).digest() for row in vectors
    ]


def test_nothing_has_no_hashes():
    assert vector_ids([], np.zeros(0, np.int32)).shape == (0, 16)
    assert text_hashes([]).shape == (0, 16)
    assert embedding_hashes(np.zeros((0, 3), np.float32)).shape == (0, 16)


@given(values=hashes, num_buckets=st.integers(1, 2**31 - 1))
def test_buckets_one_after_the_other_are_sorted_as_a_whole(values, num_buckets):
    ordered = matrix(sorted(values))
    buckets = bucket_of(ordered, num_buckets)
    assert buckets.dtype == np.int32
    assert (np.diff(buckets) >= 0).all()
    assert ((buckets >= 0) & (buckets < num_buckets)).all()
    assert buckets.tolist() == [int.from_bytes(v[:4], "big") * num_buckets >> 32 for v in sorted(values)]


@given(values=hashes)
def test_sort_keys_sort_as_bytes_do(values):
    keys = sort_keys(matrix(values))
    assert np.argsort(keys, kind="stable").tolist() == sorted(range(len(values)), key=values.__getitem__)


@given(values=hashes, cut=st.integers(0, 50))
def test_a_column_and_its_matrix_are_the_same_bytes(values, cut):
    array = hash_array(matrix(values))
    assert array.to_pylist() == values
    assert hash_matrix(array.slice(cut)).tobytes() == b"".join(values[cut:])
    assert hash_matrix(pa.chunked_array([array, array.slice(cut)])).tobytes() == b"".join(
        values + values[cut:]
    )


@pytest.mark.parametrize("num_buckets", [1, 2, 64])
def test_buckets_of_document_hashes_are_even(num_buckets):
    ids = vector_ids([str(i) for i in range(20_000)], np.zeros(20_000, np.int32))
    sizes = np.bincount(bucket_of(ids, num_buckets), minlength=num_buckets)
    assert sizes.max() < 1.3 * 20_000 / num_buckets
