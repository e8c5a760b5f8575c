import datetime as dt
import hashlib
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.artifacts import arrow_schema
from pipeline.config import ChunkConfig
from pipeline.corpus import check_error_budget, documents_by_id, read_dead_letters
from pipeline.corpus.identity import bucket_of, hash_array, hash_matrix, sort_keys, vector_ids
from pipeline.corpus.merging import first_wins
from pipeline.corpus.planning import BUCKET_ROWS
from pipeline.errors import ConfigError, CorruptArtifactError, DataError, ErrorBudgetError
from pipeline.schemas import DEAD_LETTERS, FILE_NO, documents_schema
from pipeline.tables import read_bucket, read_columns, to_matrix

LISTED = [HealthCheck.function_scoped_fixture]

records = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "d", "naïve", "日本"]),
        st.sampled_from(["x", "y", None, ""]),
        st.one_of(st.none(), st.integers(-5, 5)),
        st.one_of(st.none(), st.lists(st.sampled_from(["u", "v"]), max_size=2)),
    ),
    min_size=1,
    max_size=25,
).filter(lambda rows: any(row[1] for row in rows))


def columns_of(rows):
    ids, texts, years, tags = zip(*rows, strict=True)
    return {
        "_id": pa.array(ids, pa.string()),
        "text": pa.array(texts, pa.string()),
        "year": pa.array(years, pa.int64()),
        "tags": pa.array(tags, pa.list_(pa.string())),
    }


SETTINGS = {"attributes": {"year": "int", "tags": "list<string>"}}


# ------------------------------------------------------------------------------------------------ first wins


@settings(max_examples=40, deadline=None, suppress_health_check=LISTED)
@given(rows=records, cut=st.integers(0, 25), shard_rows=st.integers(1, 30))
def test_the_first_document_of_an_id_wins_whatever_the_shards(new_corpus, rows, cut, shard_rows):
    corpus = new_corpus()
    corpus.parquet("a.parquet", columns_of([*rows[:cut], ("z", "z", None, None)]))
    corpus.parquet("b.parquet", columns_of([*rows[cut:], ("z", "z", None, None)]))
    read = corpus.read(shard_rows=shard_rows, **SETTINGS)
    places = [("a.parquet", i, row) for i, row in enumerate(rows[:cut])]
    places += [("a.parquet", len(rows[:cut]), ("z", "z", None, None))]
    places += [("b.parquet", i, row) for i, row in enumerate(rows[cut:])]
    places += [("b.parquet", len(rows[cut:]), ("z", "z", None, None))]
    winners, letters = {}, []
    for file, row, record in places:
        if not record[1]:
            letters.append((file, row, record[0], "text is empty"))
        elif record[0] in winners:
            won = winners[record[0]]
            letters.append((file, row, record[0], f"duplicate of {won[0]} row {won[1]}"))
        else:
            winners[record[0]] = (file, row, record)
    assert read.dead_letters == sorted(letters)
    found = {key: (row["text"], row["year"], row["tags"]) for key, row in read.rows.items()}
    assert found == {key: record[1:] for key, (_, _, record) in winners.items()}


@settings(max_examples=25, deadline=None, suppress_health_check=LISTED)
@given(rows=records, shard_rows=st.integers(1, 30))
def test_the_bytes_of_documents_and_texts_do_not_depend_on_the_shards(new_corpus, rows, shard_rows):
    corpus = new_corpus()
    corpus.parquet("a.parquet", columns_of(rows))
    one, many = corpus.read(**SETTINGS), corpus.read(shard_rows=shard_rows, **SETTINGS)
    assert one.documents == many.documents
    assert one.merged[0].files["texts"] == many.merged[0].files["texts"]


@settings(max_examples=25, deadline=None, suppress_health_check=LISTED)
@given(rows=records)
def test_parquet_and_jsonl_of_the_same_rows_give_the_same_documents(new_corpus, rows):
    corpus = new_corpus()
    table = pa.table(columns_of(rows))
    corpus.parquet("a.parquet", table)
    corpus.jsonl("a.jsonl", table.to_pylist())
    parquet, jsonl = corpus.read(**SETTINGS), corpus.read(format="jsonl", **SETTINGS)
    assert parquet.documents == jsonl.documents
    stems = [
        [(row[1], row[2], row[3].replace("jsonl", "parquet")) for row in r.dead_letters]
        for r in (parquet, jsonl)
    ]
    assert stems[0] == stems[1]


def test_ready_made_vectors_of_both_formats_give_the_same_documents(corpus):
    vectors = np.random.default_rng(0).standard_normal((50, 7))
    columns = {"_id": [str(i) for i in range(50)], "e": vectors.tolist(), "year": list(range(50))}
    corpus.parquet("a.parquet", columns)
    corpus.jsonl("a.jsonl", pa.table(columns).to_pylist())
    config = {"text": (), "embedding": "e", "attributes": ("year",)}
    reads = [
        corpus.read(**config),
        corpus.read(format="jsonl", **config),
        corpus.read(shard_rows=3, **config),
    ]
    assert reads[0].documents == reads[1].documents == reads[2].documents
    assert len({read.merged[0].files["texts"].sha256 for read in reads}) == 1


def test_two_ids_of_one_hash_are_an_error_that_names_both():
    ids = vector_ids(["a", "a"], np.array([0, 0]))
    table = pa.table({"vector_id": hash_array(ids), "doc_id": ["a", "b"], FILE_NO: [0, 0], "row": [0, 1]})
    with pytest.raises(DataError, match="'a' and 'b' have the same hash of 12 bytes") as caught:
        first_wins(table)
    assert caught.value.exit_code == 65


def test_duplicates_are_found_when_every_document_has_its_own_bucket(corpus, monkeypatch):
    monkeypatch.setattr("pipeline.corpus.planning.BUCKET_ROWS", 4)
    corpus.parquet("a.parquet", {"_id": pa.array([*range(40), *range(40)]), "text": ["x"] * 80})
    read = corpus.read(shard_rows=7)
    assert BUCKET_ROWS == 65_536
    assert read.plan.document_buckets == 32
    assert sum(output.numbers["documents"] for output in read.merged) == 40
    assert sum(output.numbers["duplicates"] for output in read.merged) == 40
    ids = sort_keys(hash_matrix(read.table["vector_id"]))
    assert (ids[:-1] < ids[1:]).all()


# ------------------------------------------------------------------------------------------------ what is written


def test_the_documents_table_has_its_schema_and_its_order(corpus):
    corpus.parquet("a.parquet", columns_of([("a", "x", 1, ["u"]), ("b", "y", None, None)]))
    read = corpus.read(**SETTINGS)
    table = read_columns(corpus.store, read.documents[0].path)
    assert table.schema.equals(documents_schema(arrow_schema(read.plan.attributes)))
    assert read.documents[0].path.startswith("documents/")
    expected = {
        "vector_id": hashlib.blake2b(b"a", digest_size=12).digest() + bytes(4),
        "doc_id": "a",
        "chunk_no": 0,
        "text": "x",
        "text_hash": hashlib.blake2b(b"x", digest_size=16).digest(),
        "year": 1,
        "tags": ["u"],
    }
    assert read.rows["a"] == expected


def test_the_numbers_of_a_shard_and_of_a_bucket_are_counted(corpus):
    corpus.parquet(
        "a.parquet", columns_of([("a", "xy", 1, None), ("b", "", None, None), ("a", "ü", 2, None)])
    )
    read = corpus.read(**SETTINGS)
    assert read.shards[0].numbers == {"rows": 3, "bad_rows": 1, "chunks": 2, "text_bytes": 4}
    assert read.merged[0].numbers == {"documents": 1, "vectors": 1, "duplicates": 1}


def test_a_clean_shard_has_no_dead_letters(corpus):
    corpus.parquet("a.parquet", columns_of([("a", "x", 1, None)]))
    read = corpus.read(**SETTINGS)
    assert [set(output.files) for output in (*read.shards, *read.merged)] == [
        {"rows"},
        {"documents", "places", "texts"},
    ]


def test_a_shard_of_bad_rows_alone_is_written_too(corpus):
    corpus.parquet("a.parquet", columns_of([("a", None, 1, None), ("b", "x", 1, None)]))
    read = corpus.read(shard_rows=1, **SETTINGS)
    assert [output.files["rows"].rows for output in read.shards] == [0, 1]
    assert list(read.rows) == ["b"]


def test_texts_are_cut_by_text_hash_and_sorted(corpus):
    corpus.parquet(
        "a.parquet", {"_id": [str(i) for i in range(60)], "text": [f"text {i % 20}" for i in range(60)]}
    )
    read = corpus.read()
    ref = read.merged[0].files["texts"]
    keys = []
    for bucket in range(4):
        table = read_bucket(corpus.store, ref.path, bucket)
        hashes = hash_matrix(table["text_hash"])
        assert (bucket_of(hashes, 4) == bucket).all()
        keys += [
            h.tobytes() + v.tobytes() for h, v in zip(hashes, hash_matrix(table["vector_id"]), strict=True)
        ]
    assert keys == sorted(keys)
    assert len(keys) == 60


def test_ready_made_vectors_go_along_with_unit_length_and_stand_in_for_texts(corpus):
    corpus.parquet("a.parquet", {"_id": ["a", "b"], "e": [[3.0, 4.0], [0.0, -0.5]], "title": ["t", None]})
    read = corpus.read(text=("title",), embedding="e")
    texts = read_columns(corpus.store, read.merged[0].files["texts"].path)
    order = texts["doc_id"].to_pylist()
    expected = np.array([{"a": [0.6, 0.8], "b": [0, -1]}[key] for key in order], dtype=np.float32)
    assert to_matrix(texts["embedding"]).tobytes() == expected.tobytes()
    hashes = [hashlib.blake2b(row.astype("<f4").tobytes(), digest_size=16).digest() for row in expected]
    assert texts["text_hash"].to_pylist() == hashes
    assert {key: row["text"] for key, row in read.rows.items()} == {"a": "t", "b": None}


def test_a_dead_letter_has_file_row_id_stage_and_reason(corpus):
    corpus.parquet(
        "deep/a.parquet", columns_of([("a", "x", 1, None), ("a", "y", 1, None), ("c", "", 1, None)])
    )
    read = corpus.read(**SETTINGS)
    refs = [output.files["dead_letters"] for output in (*read.shards, *read.merged)]
    table = read_dead_letters(corpus.store, refs)
    assert table.schema.equals(DEAD_LETTERS)
    assert [tuple(row.values())[:5] for row in table.to_pylist()] == [
        ("deep/a.parquet", 2, "c", "read", "text is empty"),
        ("deep/a.parquet", 1, "a", "merge", "duplicate of deep/a.parquet row 0"),
    ]
    assert read_dead_letters(corpus.store, []).schema.equals(DEAD_LETTERS)


# ------------------------------------------------------------------------------------------------ chunks


def test_long_documents_are_cut_and_keep_their_attributes(corpus, tokenizer_json):
    long = "One sentence about wings. " * 40
    corpus.parquet("a.parquet", {"_id": ["a", "b"], "text": [long, "short"], "year": [1, 2]})
    read = corpus.read(tokenizer_json, chunk=ChunkConfig(max_tokens=32), attributes=("year",))
    rows = read.table.to_pylist()
    chunks = [row for row in rows if row["doc_id"] == "a"]
    assert len(chunks) > 5
    assert [row["chunk_no"] for row in chunks] == list(range(len(chunks)))
    assert {row["year"] for row in chunks} == {1}
    assert "".join("".join(row["text"] for row in chunks).split()) == "".join(long.split())
    assert read.merged[0].numbers == {"documents": 2, "vectors": len(rows), "duplicates": 0}
    assert read.shards[0].numbers["chunks"] == len(rows)


def test_all_chunks_of_a_duplicate_are_one_dead_letter(corpus, tokenizer_json):
    long = "One sentence about wings. " * 40
    corpus.parquet("a.parquet", {"_id": ["a", "a"], "text": ["first", long]})
    read = corpus.read(tokenizer_json, chunk=ChunkConfig(max_tokens=32), shard_rows=1)
    assert read.dead_letters == [("a.parquet", 1, "a", "duplicate of a.parquet row 0")]
    assert [row["text"] for row in read.table.to_pylist()] == ["first"]


def test_chunks_without_a_tokenizer_are_a_wrong_configuration(corpus):
    corpus.parquet("a.parquet", {"_id": ["a"], "text": ["x"]})
    with pytest.raises(ConfigError, match=r"corpus\.chunk: chunks are cut by the encoder's tokens") as caught:
        corpus.read(None, chunk=ChunkConfig())
    assert caught.value.exit_code == 78


def test_a_broken_tokenizer_is_named(corpus):
    corpus.parquet("a.parquet", {"_id": ["a"], "text": ["x"]})
    with pytest.raises(
        CorruptArtifactError, match=r"tokenizer\.json: is not a Hugging Face tokenizer"
    ) as caught:
        corpus.read(b'{"model": 5}', chunk=ChunkConfig())
    assert caught.value.exit_code == 65


# ------------------------------------------------------------------------------------------------ error budget


def judged(corpus, budget, rows=100):
    lines = [{"_id": str(i), "text": "x"} for i in range(rows - 5)]
    lines += [{"_id": f"bad {i}", "text": i} for i in range(3)] + [{"_id": None}, {"_id": "last"}]
    corpus.jsonl("a.jsonl", lines)
    config = corpus.config(format="jsonl", error_budget=budget)
    read = corpus.read(format="jsonl", error_budget=budget)
    letters = [output.files["dead_letters"] for output in read.shards]
    check_error_budget(corpus.store, config, rows=rows, bad_rows=5, dead_letters=letters)
    return letters


@pytest.mark.parametrize("budget", [5, 0.05, 1000])
def test_bad_rows_within_the_budget_pass(corpus, budget):
    assert len(judged(corpus, budget)) == 1


@pytest.mark.parametrize(("budget", "allowed"), [(0, 0), (0.049, 4), (4, 4), (1, 1)])
def test_beyond_the_budget_the_run_stops_and_says_what_to_do(corpus, budget, allowed):
    with pytest.raises(ErrorBudgetError) as caught:
        judged(corpus, budget)
    message = str(caught.value)
    assert caught.value.exit_code == 65
    assert f"{corpus.folder}: 5 of 100 rows are bad, error_budget {budget:g} allows {allowed}: " in message
    assert "3 x text is not a string: found int (a.jsonl row 95)" in message
    assert "1 x id is null (a.jsonl row 98)" in message
    assert "1 x text is empty (a.jsonl row 99)" in message
    assert f"all of them are in {corpus.store.uri}/dead_letters/" in message
    assert message.endswith("mend the rows or raise corpus.error_budget")


def test_reasons_that_differ_in_their_values_alone_are_counted_together(corpus):
    rows = [{"_id": f"{i}", "text": "x", "n": i} for i in range(5)]
    corpus.jsonl("a.jsonl", rows + [{"_id": f"b{i}", "text": "x", "n": f"v{i}"} for i in range(3)])
    config = corpus.config(format="jsonl", attributes=("n",), error_budget=0)
    letters = corpus.read(format="jsonl", attributes=("n",)).shards[0].files["dead_letters"]
    reason = r"3 x attribute n: expected int, found string 'v0' \(a.jsonl row 5\)"
    with pytest.raises(ErrorBudgetError, match=reason):
        check_error_budget(corpus.store, config, rows=8, bad_rows=3, dead_letters=[letters])


# ------------------------------------------------------------------------------------------------ lookup


def test_documents_are_found_by_id(corpus, monkeypatch):
    monkeypatch.setattr("pipeline.corpus.planning.BUCKET_ROWS", 20)
    monkeypatch.setattr("pipeline.tables.GROUP_ROWS", 4)
    noon = dt.datetime(2024, 5, 1, tzinfo=dt.UTC)
    columns = {
        "_id": [f"d{i}" for i in range(200)],
        "text": [f"text {i}" for i in range(200)],
        "when": [noon] * 200,
    }
    corpus.parquet("a.parquet", columns)
    read = corpus.read(attributes=("when",))
    wanted = ["d3", "d199", "d0", "d3", "absent", *(f"d{i}" for i in range(50, 80))]
    found = documents_by_id(corpus.store, read.documents, wanted)
    assert {row["doc_id"]: (row["text"], row["when"]) for row in found.to_pylist()} == {
        key: (f"text {key[1:]}", noon) for key in set(wanted) - {"absent"}
    }
    keys = sort_keys(hash_matrix(found["vector_id"]))
    assert (keys[:-1] < keys[1:]).all()
    assert documents_by_id(corpus.store, read.documents, ["absent"]).num_rows == 0
    assert documents_by_id(corpus.store, read.documents, []).num_rows == 0
    assert documents_by_id(corpus.store, read.documents, ["d7"], ["text"]).to_pylist() == [{"text": "text 7"}]


def test_a_document_is_found_with_all_its_chunks(corpus, tokenizer_json):
    corpus.parquet("a.parquet", {"_id": ["a", "b"], "text": ["One sentence about wings. " * 40, "short"]})
    read = corpus.read(tokenizer_json, chunk=ChunkConfig(max_tokens=32))
    found = documents_by_id(corpus.store, read.documents, ["a"])
    assert found["chunk_no"].to_pylist() == list(range(read.table.num_rows - 1))


def test_not_a_number_stays_one_in_an_attribute(corpus):
    corpus.parquet("a.parquet", {"_id": ["a"], "text": ["x"], "score": [math.nan]})
    assert math.isnan(corpus.read(attributes=("score",)).rows["a"]["score"])
