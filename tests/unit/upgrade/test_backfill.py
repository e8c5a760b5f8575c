"""Stages of a backfill on tables of a few rows: which leaves move, and which documents move with them."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.corpus.identity import hash_array, text_hashes, vector_ids
from pipeline.schemas import documents_schema
from pipeline.storage import LocalStore
from pipeline.tables import hash_keys, read_bucket, read_columns, write_bucketed, write_table
from pipeline.upgrade.backfill import (
    HASHES,
    HITS,
    LEAVES,
    MEMBERS,
    WEIGHED,
    Allowance,
    DocumentBucket,
    Moving,
    choose_leaves,
    name_members,
    read_chosen,
    rebucket_documents,
    settle_documents,
    texts_to_embed,
    weigh_leaves,
)

TEXT_BUCKETS = 4


@pytest.fixture
def store(tmp_path):
    return LocalStore(str(tmp_path))


def _documents(store, chunks):
    """One bucket: texts of each document's chunks."""
    names = [name for name, texts in chunks.items() for _ in texts]
    numbers = np.concatenate([np.arange(len(texts)) for texts in chunks.values()]).astype(np.int32)
    texts = pa.array([text for own in chunks.values() for text in own])
    table = pa.table(
        {
            "vector_id": hash_array(vector_ids(names, numbers)),
            "doc_id": names,
            "chunk_no": pa.array(numbers),
            "text": texts,
            "text_hash": hash_array(text_hashes(texts)),
        }
    ).cast(documents_schema(pa.schema([])))
    table = table.take(pa.array(np.argsort(hash_keys(table["vector_id"]), kind="stable")))
    return write_table(store, "documents", table.schema, [table])


def _members(store, documents, leaves):
    """Chunks in leaves of segment 0: by (document, chunk) the leaf."""
    rows = read_columns(store, documents.path)
    keys = list(zip(rows["doc_id"].to_pylist(), rows["chunk_no"].to_pylist(), strict=True))
    kept = [at for at, key in enumerate(keys) if key in leaves]
    table = pa.table(
        [
            rows["vector_id"].take(pa.array(kept)),
            pa.array(np.zeros(len(kept), np.int32)),
            pa.array([leaves[keys[at]] for at in kept], pa.int32()),
            pa.array(np.arange(len(kept), dtype=np.int32)),
        ],
        schema=MEMBERS,
    )
    return write_bucketed(store, "scratch/members", table, np.zeros(len(kept), np.int32)), [
        keys[at] for at in kept
    ]


def _settled(store, documents, members, *, before=(), moving=None, condemned=()):
    return settle_documents(
        store,
        DocumentBucket(0, documents, before),
        [members],
        moving=moving,
        condemned=condemned,
        text_buckets=TEXT_BUCKETS,
    )


def _moved(store, output):
    tables = [read_bucket(store, output.files["texts"].path, b, ["doc_id"]) for b in range(TEXT_BUCKETS)]
    return sorted(pa.concat_tables(tables)["doc_id"].to_pylist())


def _gone(store, output, keys):
    return sorted(keys[row] for row in read_bucket(store, output.files["gone"].path, 0)["row"].to_pylist())


CHUNKS = {"a": ["a0", "a1"], "b": ["b0"], "c": ["c0", "c1", "c2"]}
LEAF_OF = {("a", 0): 0, ("a", 1): 1, ("b", 0): 0, ("c", 0): 2, ("c", 1): 2, ("c", 2): 3}


def _hashes(store, texts):
    table = pa.table({"text_hash": hash_array(text_hashes(pa.array(texts)))}, schema=HASHES)
    return write_table(store, "scratch/stuck", HASHES, [table])


def test_documents_move_whole_with_any_of_their_leaves(store):
    documents = _documents(store, CHUNKS)
    members, keys = _members(store, documents, LEAF_OF)
    output = _settled(store, documents, members, moving=Moving({0: np.array([1])}, ()))
    assert _moved(store, output) == ["a", "a"]
    assert _gone(store, output, keys) == [("a", 0), ("a", 1)]
    assert output.numbers == {"stay": 4, "move": 2}


def test_a_document_with_a_text_that_cannot_be_embedded_stays_whole(store):
    documents = _documents(store, CHUNKS)
    members, keys = _members(store, documents, LEAF_OF)
    moving = Moving({0: np.array([0, 2])}, (_hashes(store, ["c2"]),))
    output = _settled(store, documents, members, moving=moving)
    assert _moved(store, output) == ["a", "a", "b"]
    assert ("c", 0) not in _gone(store, output, keys)


def test_where_nothing_moves_only_what_is_not_in_an_earlier_space_is_in_the_new_one(store):
    documents = _documents(store, CHUNKS | {"new": ["n0"]})
    members, _ = _members(store, documents, LEAF_OF)
    output = _settled(store, documents, members)
    assert _moved(store, output) == ["new"]
    assert output.numbers == {"stay": 6, "move": 1}


@pytest.mark.parametrize(
    ("now", "moved"),
    [
        (CHUNKS | {"a": ["a0", "other"]}, ["a", "a"]),
        (CHUNKS | {"a": ["a0"]}, ["a"]),
        (CHUNKS | {"a": ["a0", "a1", "a2"]}, ["a", "a", "a"]),
        ({"a": ["a0", "a1"], "c": ["c0", "c1", "c2"]}, []),
    ],
    ids=["a chunk changed", "a chunk went", "a chunk came", "a document went"],
)
def test_a_document_that_changed_leaves_the_old_side_whole(store, now, moved):
    then = _documents(store, CHUNKS)
    members, keys = _members(store, then, LEAF_OF)
    before = (rebucket_documents(store, then, buckets=1).files["documents"],)
    output = _settled(store, _documents(store, now), members, before=before)
    assert _moved(store, output) == moved
    changed = {doc for doc in CHUNKS if now.get(doc) != CHUNKS[doc]}
    assert {doc for doc, _ in _gone(store, output, keys)} == changed
    assert output.numbers["stay"] == sum(len(texts) for doc, texts in CHUNKS.items() if doc not in changed)


def test_the_texts_to_embed_are_those_of_all_documents_that_move(store):
    documents = _documents(store, CHUNKS)
    members, _ = _members(store, documents, LEAF_OF)
    output = texts_to_embed(
        store, DocumentBucket(0, documents), [members], {0: np.array([3])}, text_buckets=2
    )
    tables = [read_bucket(store, output.files["texts"].path, b) for b in range(2)]
    assert sorted(pa.concat_tables(tables)["text"].to_pylist()) == ["c0", "c1", "c2"]


def _weighed(store, documents, *, missing=(), stuck=(), judged=()):
    """What caches tell of chunks, by their texts."""
    rows = read_columns(store, documents.path)
    told = [
        {
            "vector_id": vector_id,
            "is_missing": text in missing,
            "is_stuck": text in stuck,
            "is_judged": text in judged,
            "missed": 0.25 if text in judged else 0.0,
        }
        for vector_id, text in zip(rows["vector_id"].to_pylist(), rows["text"].to_pylist(), strict=True)
    ]
    table = pa.Table.from_pylist(told, schema=WEIGHED)
    return write_bucketed(store, "scratch/weighed", table, np.zeros(len(told), np.int32))


def _told_of_leaves(store, members, weighed):
    output = weigh_leaves(store, 0, [members], [weighed])
    rows = read_bucket(store, output.files["leaves"].path, 0).to_pylist()
    return {row["leaf"]: tuple(row[name] for name in LEAVES.names[1:]) for row in rows}


def test_a_leaf_is_reckoned_with_all_chunks_of_its_documents_once(store):
    documents = _documents(store, CHUNKS)
    members, _ = _members(store, documents, LEAF_OF)
    weighed = _weighed(store, documents, missing=["a0", "b0", "c0", "c1", "c2"], judged=["a1"])
    found = _told_of_leaves(store, members, weighed)
    assert found == {
        0: (2, 2, 0, 0, 0.0),
        1: (1, 1, 0, 1, 0.25),
        2: (2, 3, 0, 0, 0.0),
        3: (1, 3, 0, 0, 0.0),
    }


def test_all_rows_of_a_document_with_a_text_that_cannot_be_embedded_stay(store):
    documents = _documents(store, CHUNKS)
    members, _ = _members(store, documents, LEAF_OF)
    weighed = _weighed(store, documents, missing=["a0", "a1", "b0", "c0"], stuck=["c2"])
    found = _told_of_leaves(store, members, weighed)
    assert {leaf: (own[1], own[2]) for leaf, own in found.items()} == {
        0: (3, 0),
        1: (2, 0),
        2: (0, 2),
        3: (0, 1),
    }


def test_texts_are_named_with_their_rows(store):
    documents = _documents(store, CHUNKS)
    members, _ = _members(store, documents, LEAF_OF)
    output = name_members(store, DocumentBucket(0, documents), [members], text_buckets=2)
    table = pa.concat_tables([read_bucket(store, output.files["named"].path, b) for b in range(2)])
    rows = read_columns(store, documents.path, ["text_hash", "vector_id"]).to_pylist()
    assert sorted(map(str, table.to_pylist())) == sorted(map(str, rows))


def _leaves(store, rows):
    table = pa.Table.from_pylist([dict(zip(LEAVES.names, row, strict=True)) for row in rows], schema=LEAVES)
    return write_table(store, "scratch/leaves", LEAVES, [table])


def test_leaves_are_chosen_by_looks_and_losses_within_the_budget(store):
    first = _leaves(store, [(0, 10, 10, 0, 5, 0.5), (3, 10, 4, 0, 0, 0.0)])
    second = _leaves(store, [(1, 10, 0, 0, 5, 4.0), (2, 10, 10, 10, 0, 0.0)])
    hits = pa.table([[0, 1], [3, 2], [7.0, 99.0]], schema=HITS)
    looks = write_table(store, "scratch/hits", HITS, [hits])
    output = choose_leaves(store, [first, second], [looks], allowed=Allowance(10))
    chosen = {
        number: leaves.tolist() for number, leaves in read_chosen(store, output.files["chosen"]).items()
    }
    # The most looked at is stuck; of the others the one with looks, then the one that the bridge is known to miss.
    assert chosen == {0: [3], 1: [1]}
    assert output.numbers == {"rows": 20, "to_embed": 4, "leaves": 4, "smallest": 4}


def test_a_budget_below_the_first_leaf_chooses_none(store):
    output = choose_leaves(store, [_leaves(store, [(0, 10, 10, 0, 0, 0.0)])], [], allowed=Allowance(9))
    assert read_chosen(store, output.files["chosen"]) == {}
    assert (output.numbers["rows"], output.numbers["smallest"]) == (0, 10)
