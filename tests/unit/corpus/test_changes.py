import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.changes import Changes, count_changes
from pipeline.corpus.identity import bucket_of, hash_array, hash_matrix, sort_keys, text_hashes, vector_ids

chunk = st.tuples(
    st.sampled_from(["x", "y"]),
    st.one_of(st.none(), st.integers(0, 1)),
    st.sampled_from([None, 0.5, math.nan]),
    st.sampled_from([None, [], ["u"], ["u", None]]),
    st.sampled_from([None, "s"]),
)
documents = st.dictionaries(st.integers(0, 30), st.lists(chunk, min_size=1, max_size=3), max_size=25)


def table_of(content, attributes=("n", "f", "tags", "s")):
    rows = [(str(key), no, *values) for key, chunks in content.items() for no, values in enumerate(chunks)]
    ids, numbers, texts, n, f, tags, s = zip(*rows, strict=True) if rows else ((),) * 7
    table = pa.table(
        {
            "vector_id": hash_array(vector_ids(list(ids), np.array(numbers, np.int32))),
            "doc_id": pa.array(ids, pa.string()),
            "text_hash": hash_array(text_hashes(list(texts))),
            "n": pa.array(n, pa.int64()),
            "f": pa.array(f, pa.float64()),
            "tags": pa.array(tags, pa.list_(pa.string())),
            "s": pa.array(s, pa.string()),
        }
    ).select(["vector_id", "doc_id", "text_hash", *attributes])
    return table.take(pa.array(np.argsort(sort_keys(hash_matrix(table["vector_id"])))))


def cut(table, num_buckets):
    buckets = bucket_of(hash_matrix(table["vector_id"]), num_buckets)
    return (table.filter(pa.array(buckets == bucket)) for bucket in range(num_buckets))


def oracle(old, new):
    common = old.keys() & new.keys()
    changed = sum(repr(old[key]) != repr(new[key]) for key in common)
    return Changes(len(new.keys() - common), changed, len(old.keys() - common), len(common) - changed)


@settings(max_examples=200, deadline=None)
@given(
    old=documents,
    new=documents,
    kept=st.sets(st.integers(0, 30)),
    buckets=st.tuples(*[st.sampled_from([1, 2, 8, 64])] * 2),
)
def test_changes_are_those_of_two_dictionaries(old, new, kept, buckets):
    new = new | {key: old[key] for key in kept & old.keys()}
    found = count_changes(cut(table_of(old), buckets[0]), cut(table_of(new), buckets[1]))
    assert found == oracle(old, new)


@settings(max_examples=50, deadline=None)
@given(old=documents, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=30))
def test_tables_may_end_inside_a_document(old, sizes):
    table = table_of(old)
    starts = np.cumsum([0, *sizes]).tolist()
    pieces = [table.slice(a, b - a) for a, b in zip(starts, [*starts[1:], len(table)], strict=True) if b > a]
    assert count_changes(pieces, [table]) == Changes(unchanged=len(old))
    assert count_changes([table], pieces) == Changes(unchanged=len(old))


def test_a_first_release_adds_every_document():
    table = table_of({1: [("x", 1, None, None, None)], 2: [("x", 1, None, None, None)]})
    assert count_changes([], [table]) == Changes(added=2)
    assert count_changes([table], []) == Changes(removed=2)
    assert count_changes([], []) == Changes()


@pytest.mark.parametrize("attributes", [("n", "f", "tags"), ("f", "n", "tags", "s")])
def test_other_attributes_change_every_document(attributes):
    content = {key: [("x", 1, None, None, None)] for key in range(5)}
    found = count_changes([table_of(content)], [table_of(content, attributes)])
    assert found == Changes(changed=5)


def test_no_more_than_a_few_tables_of_a_side_are_held():
    table = table_of({key: [("x", 1, None, None, None)] for key in range(64)})
    drawn = []

    def watched(name, num_buckets):
        for piece in cut(table, num_buckets):
            drawn.append(name)
            yield piece

    assert count_changes(watched("old", 16), watched("new", 16)) == Changes(unchanged=64)
    lead = np.cumsum([1 if name == "old" else -1 for name in drawn])
    assert np.abs(lead).max() <= 3
