import json

import numpy as np
import polars as pl
import pytest

from pipeline.config import StorageConfig
from pipeline.errors import CorruptArtifactError, DataError, MissingFileError, SchemaMismatchError
from pipeline.evaluation.queries import read_qrels, read_queries

STORAGE = StorageConfig()


def _jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


def test_beir_queries_are_read(tmp_path):
    queries = read_queries(
        _jsonl(tmp_path / "q.jsonl", [{"_id": 1, "text": "a\u2028"}, {"_id": 2, "text": "b"}]), STORAGE
    )
    assert (queries.query_ids, queries.texts, queries.vectors) == (("1", "2"), ("a\u2028", "b"), None)
    assert queries.filters == (None, None)


@pytest.mark.parametrize("kind", [pl.List(pl.Float32), pl.Array(pl.Float32, 2), pl.List(pl.Float64)])
def test_vectors_of_any_list_type_are_read(tmp_path, kind):
    frame = pl.DataFrame(
        {"query_id": ["1"], "embedding": [[1.0, 2.0]]}, schema={"query_id": pl.String, "embedding": kind}
    )
    frame.write_parquet(tmp_path / "q.parquet")
    assert read_queries(str(tmp_path / "q.parquet"), STORAGE).vectors.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("rows", "error", "problem"),
    [
        ([{"text": "a"}], SchemaMismatchError, "expected columns query_id"),
        ([{"query_id": "1"}], SchemaMismatchError, "text or embedding"),
        ([{"query_id": "1", "text": "a"}, {"query_id": "1", "text": "b"}], DataError, "stands twice"),
        ([{"query_id": "1", "text": None}], SchemaMismatchError, "row 0.*expected a string"),
        (
            [{"query_id": "1", "embedding": [1.0]}, {"query_id": "2", "embedding": [1.0, 2.0]}],
            SchemaMismatchError,
            r"widths \[1, 2\]",
        ),
        ([], SchemaMismatchError, "found none"),
        ([{"query_id": "1", "text": "a"}, {"text": "b"}], SchemaMismatchError, "row 1: expected a value in"),
        ([{"query_id": "1", "text": "a"}, ["b"]], SchemaMismatchError, "line 2: expected a JSON object"),
        ([{"query_id": "1", "embedding": ["a"]}], SchemaMismatchError, "expected lists of numbers"),
        ([{"query_id": "1", "embedding": 1.0}], SchemaMismatchError, "expected lists of numbers"),
    ],
)
def test_bad_queries_are_refused(tmp_path, rows, error, problem):
    with pytest.raises(error, match=problem):
        read_queries(_jsonl(tmp_path / "q.jsonl", rows), STORAGE)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.parquet"):
        read_queries(str(tmp_path / "none.parquet"), STORAGE)
    (tmp_path / "q.parquet").write_bytes(b"not parquet")
    with pytest.raises(CorruptArtifactError, match=r"q\.parquet"):
        read_queries(str(tmp_path / "q.parquet"), STORAGE)


def test_qrels_leave_out_queries_without_a_relevant_document(tmp_path):
    (tmp_path / "t.tsv").write_text("query-id\tcorpus-id\tscore\n1\td1\t1\n1\td2\t0\n2\td1\t0\n")
    assert read_qrels(str(tmp_path / "t.tsv"), STORAGE) == {"1": {"d1": 1.0, "d2": 0.0}}


def test_qrels_without_a_header_are_refused(tmp_path):
    (tmp_path / "t.tsv").write_text("1\td1\t1\n2\td1\t1\n")
    with pytest.raises(SchemaMismatchError, match="must name the columns"):
        read_qrels(str(tmp_path / "t.tsv"), STORAGE)


def test_a_filter_that_first_stands_on_a_later_line_is_read(tmp_path):
    rows = [{"query_id": "1", "text": "a"}, {"query_id": "2", "text": "b", "filter": "year > 2000"}]
    assert read_queries(_jsonl(tmp_path / "q.jsonl", rows), STORAGE).filters == (None, "year > 2000")


def test_a_line_that_is_not_json_is_named_as_an_editor_counts(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"query_id": "1", "text": "a"}\n\n{"query_id": \n')
    with pytest.raises(SchemaMismatchError, match=r"q\.jsonl line 3: expected a JSON object"):
        read_queries(str(tmp_path / "q.jsonl"), STORAGE)


@pytest.mark.parametrize("kind", [pl.List(pl.Float64), pl.Array(pl.Float64, 2)])
@pytest.mark.parametrize(
    ("vector", "problem"),
    [
        ([1.0, np.nan], "NaN or infinite"),
        ([-np.inf, 1.0], "NaN or infinite"),
        ([1.0, None], "null"),
        ([1e300, 1.0], "infinite"),
        ([0.0, -0.0], "zeros only"),
    ],
)
def test_a_vector_without_a_direction_is_refused_with_its_row(tmp_path, kind, vector, problem):
    frame = pl.DataFrame(
        {"query_id": ["1", "2"], "embedding": [[1.0, 2.0], vector]},
        schema={"query_id": pl.String, "embedding": kind},
    )
    frame.write_parquet(tmp_path / "q.parquet")
    with pytest.raises(SchemaMismatchError, match=rf"q\.parquet row 1: .*{problem}") as caught:
        read_queries(str(tmp_path / "q.parquet"), STORAGE)
    assert caught.value.exit_code == 65


def test_vectors_of_another_width_than_asked_for_are_refused(tmp_path):
    uri = _jsonl(tmp_path / "q.jsonl", [{"query_id": "1", "embedding": [1, 2, 3]}])
    assert read_queries(uri, STORAGE, dims=3).vectors.shape == (1, 3)
    with pytest.raises(SchemaMismatchError, match="expected vectors of 384 dimensions, found 3"):
        read_queries(uri, STORAGE, dims=384)
