"""Texts that the encoder fails on: set aside, remembered, left out of every search, and redriven."""

import pyarrow as pa
import pytest

from pipeline import open_release
from pipeline.storage import open_store
from pipeline.tables import read_columns
from tests.integration.roads import configured, data_files, rows_of, run_inline, settings, write_parquet

FAULTY = {"words": {"model": "hashing:64!faulty"}}
MENDED = {"words": {"model": "hashing:64"}}
POISON = {13: "raise", 77: "nan", 78: "inf", 140: "zero", 141: "memory", 299: "short"}
REASONS = {
    "raise": "encoder_error",
    "short": "encoder_error",
    "nan": "not_finite",
    "inf": "not_finite",
    "zero": "zero_vector",
    "memory": "out_of_memory",
}


def poisoned(rows, poison):
    return [
        {**row, "text": f"{row['text']} faulty_{poison[i]}"} if i in poison else row
        for i, row in enumerate(rows)
    ]


def corpus(folder, rows):
    write_parquet(folder / "corpus.parquet", rows)


def conf(folder, *, root="root", encoders=FAULTY, budget=50, **more):
    content = settings(folder / root, folder / "corpus.parquet", encoders=encoders, **more)
    content["corpus"]["error_budget"] = budget
    return configured(folder, content)


def letters(config, summary):
    store = open_store(config.root)
    tables = [read_columns(store, path) for path in summary["dead_letter_files"]]
    return pa.concat_tables(tables).to_pylist() if tables else []


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("condemned")
    corpus(folder, poisoned(rows_of(400), POISON))
    config = conf(folder)
    return config, run_inline(config)


def test_exactly_the_texts_that_fail_are_dead_letters_with_place_reason_and_error(built):
    config, summary = built
    found = {row["doc_id"]: row for row in letters(config, summary)}
    assert {doc: row["reason"] for doc, row in found.items()} == {
        f"doc-{i:05d}": REASONS[kind] for i, kind in POISON.items()
    }
    assert summary["dead_letters"] == len(POISON)
    assert summary["documents"] == summary["encoded"] == summary["vectors"] == 400 - len(POISON)
    assert summary["dead_letters_by_reason"] == {
        "encoder_error": 2, "not_finite": 2, "out_of_memory": 1, "zero_vector": 1,
    }  # fmt: skip
    row = found["doc-00013"]
    assert (row["file"], row["row"], row["stage"], row["chunk_no"]) == ("corpus.parquet", 13, "encode", 0)
    assert (row["attempts"], row["error"]) == (3, "RuntimeError: this text was marked to fail")
    assert len(bytes.fromhex(row["text_hash_hex"])) == 16


def test_the_index_is_that_of_a_corpus_without_the_poison(built, tmp_path):
    config, _ = built
    corpus(tmp_path, [row for i, row in enumerate(rows_of(400)) if i not in POISON])
    clean = conf(tmp_path, encoders=MENDED)
    run_inline(clean)
    parts = [
        {
            path: data
            for path, data in data_files(open_store(c.root)).items()
            if path.startswith("partitions/")
        }
        for c in (config, clean)
    ]
    assert parts[0] == parts[1]


def test_a_rerun_neither_tries_them_nor_changes_anything(built):
    config, first = built
    again = run_inline(config)
    assert again["skipped"]
    assert again["dead_letters"] == first["dead_letters"]


@pytest.mark.parametrize("more", [{}, {"exact": True}, {"filter": "year IS NULL OR year > 0"}, {"rerank": 0}])
def test_no_search_returns_them(built, more):
    config, _ = built
    texts = [f"{row['title']} {row['text']}" for row in rows_of(400)]
    found = open_release(config.root).search([texts[i] for i in POISON], k=400, **more)
    dead = {f"doc-{i:05d}" for i in POISON}
    assert not dead & {hit.doc_id for hits in found for hit in hits}
    assert all(hits for hits in found)
