import datetime as dt
import itertools
import json
import shutil

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.corpus.planning import _document_buckets
from pipeline.corpus.reading import read_batches
from pipeline.errors import (
    ConfigError,
    CorruptArtifactError,
    DataError,
    MissingFileError,
    SchemaMismatchError,
)
from pipeline.storage import LocalStore

TWO = {"_id": ["a", "b"], "text": ["x", "y"]}


def paths(plan):
    return [file.path for file in plan.files]


def types(plan):
    return {attribute.name: attribute.type for attribute in plan.attributes}


def refused(corpus, error_class, words, **config):
    with pytest.raises(error_class) as caught:
        corpus.plan(**config)
    assert caught.value.exit_code == (78 if error_class is ConfigError else 65)
    for word in words if isinstance(words, tuple) else (words,):
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------------------ files


def test_a_folder_gives_its_files_of_the_format_below_it_sorted_by_path(corpus):
    for name in ("b.parquet", "a.parquet", "deep/er/c.parquet"):
        corpus.parquet(name, TWO)
    for name in (
        "_SUCCESS",
        "notes.txt",
        ".hidden.parquet",
        "_tmp.parquet",
        ".git/x.parquet",
        "_delta/y.parquet",
    ):
        corpus.raw(name, b"")
    assert paths(corpus.plan()) == ["a.parquet", "b.parquet", "deep/er/c.parquet"]


@pytest.mark.parametrize("ending", ["jsonl", "json", "ndjson"])
def test_jsonl_has_three_endings_in_a_folder(corpus, ending):
    corpus.jsonl(f"a.{ending}", [{"_id": "a", "text": "x"}])
    assert paths(corpus.plan(format="jsonl")) == [f"a.{ending}"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["part-1.parquet", "part-22.parquet"]),
        ("part-?.parquet", ["part-1.parquet"]),
        ("**/*.parquet", ["deep/part-3.parquet", "part-1.parquet", "part-22.parquet"]),
        ("**/part-3.*", ["deep/part-3.parquet"]),
        ("de*/*", ["part-3.parquet"]),
        ("deep/**", ["part-3.parquet"]),
    ],
)
def test_a_glob_gives_what_it_matches(corpus, pattern, expected):
    for name in ("part-1.parquet", "part-22.parquet", "deep/part-3.parquet", "_skipped.parquet"):
        corpus.parquet(name, TWO)
    found = [
        path.removeprefix("deep/") if pattern.startswith("de") else path
        for path in paths(corpus.plan(uri=f"{corpus.folder}/{pattern}"))
    ]
    assert found == expected


def test_one_file_is_a_corpus_whatever_its_name(corpus):
    path = corpus.parquet("_odd.bin", TWO)
    plan = corpus.plan(uri=str(path))
    assert (paths(plan), plan.rows, plan.corpus_folder) == (["_odd.bin"], 2, str(corpus.folder))


def test_a_relative_uri_and_a_file_uri_mean_the_absolute_folder(corpus, monkeypatch):
    corpus.parquet("a.parquet", TWO)
    monkeypatch.chdir(corpus.folder.parent)
    plans = [
        corpus.plan(uri=uri) for uri in ("corpus", "./corpus/", f"file://{corpus.folder}", "corpus/a.parquet")
    ]
    assert {plan.corpus_folder for plan in plans} == {str(corpus.folder)}
    monkeypatch.chdir(corpus.folder)
    assert paths(corpus.plan(uri=".")) == ["a.parquet"]


def test_a_folder_that_is_not_there_is_named(corpus):
    refused(
        corpus,
        MissingFileError,
        ("/nowhere/at-all", "no such file or folder", "check corpus.uri"),
        uri="/nowhere/at-all",
    )
    refused(corpus, MissingFileError, "no such file or folder", uri="/nowhere/*.parquet")


def test_a_folder_without_a_file_of_the_format_is_named_with_the_endings(corpus):
    corpus.raw("notes.txt", b"x")
    refused(corpus, DataError, (str(corpus.folder), "none of its 1 files ends in .parquet"))
    refused(corpus, DataError, ".jsonl or .json or .ndjson", format="jsonl")


def test_a_glob_that_matches_nothing_is_named(corpus):
    corpus.parquet("a.parquet", TWO)
    refused(corpus, DataError, "none of its 1 files matches 'b*.parquet'", uri=f"{corpus.folder}/b*.parquet")


def test_an_unknown_kind_of_storage_is_a_wrong_configuration(corpus):
    refused(corpus, ConfigError, ("gs://bucket", "unknown kind of storage"), uri="gs://bucket/x")


def test_a_corpus_of_empty_files_has_no_documents(corpus):
    corpus.parquet("a.parquet", {"_id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    refused(corpus, DataError, (str(corpus.folder), "no documents"))
    corpus.raw("a.jsonl", b"\n \n")
    refused(corpus, DataError, "no documents", format="jsonl")


@pytest.mark.parametrize("empty", [pa.string(), pa.null()])
def test_an_empty_file_among_others_is_fine(corpus, empty):
    corpus.parquet("a.parquet", {"_id": pa.array([], empty), "text": pa.array([], empty)})
    corpus.parquet("b.parquet", TWO)
    plan = corpus.plan()
    assert [file.rows for file in plan.files] == [0, 2]
    assert [(shard.shard_no, shard.file_no) for shard in plan.shards] == [(0, 1)]


# ------------------------------------------------------------------------------------------------ corrupt files


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all, but long enough to be read"])
def test_a_file_that_is_not_parquet_is_named(corpus, data):
    corpus.parquet("a.parquet", TWO)
    corpus.raw("b.parquet", data)
    refused(corpus, CorruptArtifactError, (f"{corpus.folder}/b.parquet", "is not readable Parquet"))


def test_a_truncated_parquet_file_is_named(corpus):
    path = corpus.parquet("a.parquet", TWO)
    path.write_bytes(path.read_bytes()[:-20])
    refused(
        corpus,
        CorruptArtifactError,
        (f"{corpus.folder}/a.parquet", "is not readable Parquet", "copy the file again"),
    )


def test_a_truncated_jsonl_file_is_named_with_the_row(corpus):
    corpus.raw("a.jsonl", b'{"_id": "a", "text": "x"}\n\n{"_id": "b", "te')
    refused(
        corpus,
        CorruptArtifactError,
        (f"{corpus.folder}/a.jsonl", "is truncated: its last line (row 2) has no newline and is not JSON"),
        format="jsonl",
    )


def test_a_last_line_without_newline_is_a_row_if_it_is_json(corpus):
    corpus.raw("a.jsonl", b'{"_id": "a", "text": "x"}\n{"_id": "b", "text": "y"}')
    assert corpus.plan(format="jsonl").rows == 2


def test_a_json_array_is_not_jsonl(corpus):
    corpus.raw("a.json", b'[\n{"_id": "a"},\n{"_id": "b"},\n]\n')
    refused(
        corpus,
        DataError,
        ("none of the first 1000 rows is a JSON object", "check corpus.format"),
        format="jsonl",
    )


def test_a_corpus_in_one_line_is_refused_before_it_fills_the_memory(corpus):
    corpus.raw("a.jsonl", b'{"a": "' + b"x" * (70 << 20))
    refused(corpus, DataError, ("none of the first 1000 rows is a JSON object", "each line"), format="jsonl")


# ------------------------------------------------------------------------------------------------ columns


def write(corpus, file_format, name, columns):
    if file_format == "parquet":
        corpus.parquet(f"{name}.parquet", columns)
    else:
        keys = list(columns)
        corpus.jsonl(
            f"{name}.jsonl",
            [dict(zip(keys, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        )


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    "config", [{"text": ("titel",)}, {"id": "titel"}, {"attributes": ("titel",)}, {"embedding": "titel"}]
)
def test_an_unknown_column_is_named_with_the_nearest_and_all_known(corpus, file_format, config):
    write(corpus, file_format, "a", TWO | {"title": ["t", "t"]})
    refused(
        corpus,
        SchemaMismatchError,
        ("no column 'titel'", "did you mean 'title'?", "columns: _id, text, title", str(corpus.folder)),
        format=file_format,
        **config,
    )


def test_the_types_of_parquet_are_those_of_the_files(corpus):
    noon = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)
    columns = {
        "s": pa.array(["u", None]),
        "large": pa.array(["u", None], pa.large_string()),
        "dictionary": pa.array(["u", None]).dictionary_encode(),
        "i": pa.array([1, None], pa.uint8()),
        "f": pa.array([1.5, None], pa.float32()),
        "b": [True, None],
        "t": pa.array([noon, None], pa.timestamp("ns", "Europe/Berlin")),
        "date": pa.array([noon.date(), None]),
        "tags": [["x", None], None],
        "nothing": pa.nulls(2),
        "no tags": pa.array([[], None], pa.list_(pa.null())),
    }
    corpus.parquet("a.parquet", TWO | columns)
    assert types(corpus.plan(attributes=tuple(columns))) == {
        "s": "string",
        "large": "string",
        "dictionary": "string",
        "i": "int",
        "f": "float",
        "b": "bool",
        "t": "timestamp",
        "date": "timestamp",
        "tags": "list<string>",
        "nothing": "string",
        "no tags": "list<string>",
    }


def test_the_types_of_jsonl_are_the_commonest_of_the_sampled_rows(corpus):
    rows = [
        {"s": "u", "i": 1, "f": 1, "b": True, "tags": [], "mixed": 5, "nothing": None},
        {"s": None, "i": 2, "f": 0.5, "b": False, "tags": ["x", None], "mixed": 6},
        {"s": "v", "i": None, "f": 2, "b": None, "tags": None, "mixed": "six"},
    ]
    corpus.jsonl("a.jsonl", [{"_id": i, "text": "x"} | row for i, row in enumerate(rows)])
    plan = corpus.plan(format="jsonl", attributes=("s", "i", "f", "b", "tags", "mixed", "nothing"))
    assert types(plan) == {
        "s": "string",
        "i": "int",
        "f": "float",
        "b": "bool",
        "tags": "list<string>",
        "mixed": "int",
        "nothing": "string",
    }


def test_stated_types_are_taken(corpus):
    corpus.jsonl("a.jsonl", [{"_id": "a", "text": "x", "when": "2024-01-01", "year": 5}])
    assert types(corpus.plan(format="jsonl", attributes={"when": "timestamp", "year": "float"})) == {
        "when": "timestamp",
        "year": "float",
    }


@pytest.mark.parametrize(
    ("file_format", "value", "found"),
    [
        ("parquet", pa.array([b"x", b"y"]), "binary"),
        ("parquet", pa.array([[1], [2]]), "list of numbers"),
        ("parquet", pa.array([{"x": 1}, None]), "struct<x: int64>"),
        ("parquet", pa.array([[True], None]), "list<bool>"),
        ("jsonl", [{"x": 1}, None], "object"),
        ("jsonl", [["x", 1], None], "list"),
    ],
)
def test_an_attribute_of_an_unsupported_type_is_named_with_the_supported_ones(
    corpus, file_format, value, found
):
    write(corpus, file_format, "a", TWO | {"year": value})
    refused(
        corpus,
        SchemaMismatchError,
        (
            f"attribute 'year': found {found}",
            "supported are string, int, float, bool, timestamp, list<string>",
        ),
        format=file_format,
        attributes=("year",),
    )


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
@pytest.mark.parametrize(("stated", "found"), [("int", "string"), ("string", "int"), ("timestamp", "int")])
def test_a_stated_type_that_the_column_cannot_have_is_refused(corpus, file_format, stated, found):
    write(corpus, file_format, "a", TWO | {"year": {"string": ["1", "2"], "int": [1, 2]}[found]})
    refused(
        corpus,
        SchemaMismatchError,
        (f"attribute 'year': stated as {stated}, found {found}", "state the type that the column has"),
        format=file_format,
        attributes={"year": stated},
    )


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("first", "second", "expected", "found"),
    [
        ([1, 2], ["x", "y"], "int", "string"),
        (["x", "y"], [1, 2], "string", "int"),
        ([1, 2], [0.5, 1.5], "int", "float"),
    ],
)
def test_a_type_that_changes_between_files_is_named(corpus, file_format, first, second, expected, found):
    write(corpus, file_format, "a", TWO | {"year": first})
    write(corpus, file_format, "b", TWO | {"year": second})
    words = (f"b.{file_format}: column 'year': expected {expected} as in", f"a.{file_format}, found {found}")
    refused(corpus, SchemaMismatchError, words, format=file_format, attributes=("year",))


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
@pytest.mark.parametrize("years", [([None, None], [1, 2]), ([1, 2], [None, None])])
def test_a_column_of_nulls_agrees_with_every_type(corpus, file_format, years):
    write(corpus, file_format, "a", TWO | {"year": years[0]})
    write(corpus, file_format, "b", TWO | {"year": years[1]})
    assert types(corpus.plan(format=file_format, attributes=("year",))) == {"year": "int"}


def test_widths_of_one_family_agree_between_files(corpus):
    corpus.parquet(
        "a.parquet", TWO | {"year": pa.array([1, 2], pa.int8()), "score": pa.array([1, 2], pa.float16())}
    )
    corpus.parquet(
        "b.parquet", TWO | {"year": pa.array([1, 2], pa.uint64()), "score": pa.array([1, 2], pa.float64())}
    )
    assert types(corpus.plan(attributes=("year", "score"))) == {"year": "int", "score": "float"}


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_a_column_that_a_later_file_lacks_is_named(corpus, file_format):
    write(corpus, file_format, "a", TWO | {"year": [1, 2]})
    write(corpus, file_format, "b", TWO)
    refused(
        corpus, SchemaMismatchError, (f"b.{file_format}", "'year'"), format=file_format, attributes=("year",)
    )


@pytest.mark.parametrize("ids", [[0.5, 1.5], [True, False], [["x"], ["y"]]])
@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_ids_are_strings_or_integers(corpus, file_format, ids):
    write(corpus, file_format, "a", {"_id": ids, "text": ["x", "y"]})
    refused(
        corpus, SchemaMismatchError, "id column '_id': expected string or int, found ", format=file_format
    )


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_ids_keep_their_type_between_files(corpus, file_format):
    write(corpus, file_format, "a", TWO)
    write(corpus, file_format, "b", {"_id": [1, 2], "text": ["x", "y"]})
    refused(corpus, SchemaMismatchError, "column '_id': expected string as in", format=file_format)


def test_a_text_column_of_numbers_is_a_wrong_choice(corpus):
    corpus.parquet("a.parquet", {"_id": ["a"], "text": [5]})
    refused(corpus, SchemaMismatchError, ("text column 'text': expected string, found int", "corpus.text"))


def test_a_column_that_is_there_twice_is_named(corpus):
    corpus.parquet("a.parquet", pa.table([["a"], ["x"], ["y"]], names=["_id", "text", "text"]))
    refused(corpus, SchemaMismatchError, "column 'text' is there 2 times")


@pytest.mark.parametrize("name", ["text", "doc_id", "vector_id", "code", "row", "strata.list_no", "strata.x"])
def test_a_reserved_attribute_name_is_a_wrong_configuration(corpus, name):
    corpus.parquet("a.parquet", TWO)
    refused(corpus, ConfigError, (f"corpus.attributes: {name}", "reserved", "rename"), attributes=(name,))


def test_an_attribute_that_is_named_twice_is_a_wrong_configuration(corpus):
    refused(corpus, ConfigError, "corpus.attributes: year: is named 2 times", attributes=("year", "year"))


# ------------------------------------------------------------------------------------------------ vectors


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None, [1.0, 2.0]]),
        pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8())),
        pa.array([[1, 2], None], pa.large_list(pa.float16())),
        pa.array([None, None], pa.list_(pa.float64(), 2)),
        pa.array([[1.0], [1.0, 2.0], [1.0, 2.0]], pa.list_(pa.float32())),
    ],
)
def test_dims_come_from_the_type_or_the_vectors(corpus, column):
    corpus.parquet("a.parquet", {"_id": [str(i) for i in range(len(column))], "e": column})
    assert corpus.plan(text=(), embedding="e").embedding_dims == 2


def test_dims_of_jsonl_are_the_commonest_length(corpus):
    corpus.jsonl(
        "a.jsonl",
        [{"_id": "a", "e": None}, {"_id": "b", "e": [1]}, *({"_id": i, "e": [1, 2.5]} for i in "cd")],
    )
    assert corpus.plan(format="jsonl", text=(), embedding="e").embedding_dims == 2


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_a_vector_column_without_a_vector_is_named(corpus, file_format):
    write(corpus, file_format, "a", {"_id": ["a"], "e": [None]})
    refused(corpus, DataError, "column 'e' has no vector", format=file_format, text=(), embedding="e")


def test_a_vector_column_of_another_type_is_named(corpus):
    corpus.parquet("a.parquet", TWO)
    refused(
        corpus,
        SchemaMismatchError,
        "embedding column 'text': expected list of numbers, found string",
        embedding="text",
    )


def test_a_width_that_changes_between_files_is_named(corpus):
    for name, dims in (("a", 2), ("b", 3)):
        corpus.parquet(
            f"{name}.parquet", {"_id": ["a"], "e": pa.array([[1.0] * dims], pa.list_(pa.float32(), dims))}
        )
    words = ("b.parquet: column 'e': expected 2 dimensions as in a.parquet, found 3",)
    refused(corpus, SchemaMismatchError, words, text=(), embedding="e")


# ------------------------------------------------------------------------------------------------ shards


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 23), min_size=1, max_size=4).filter(any),
    shard_rows=st.integers(1, 30),
    file_format=st.sampled_from(["parquet", "jsonl"]),
)
def test_shards_partition_the_corpus(new_corpus, sizes, shard_rows, file_format):
    corpus = new_corpus()
    for i, size in enumerate(sizes):
        columns = {"_id": pa.array([f"{i}-{j}" for j in range(size)], pa.string())}
        columns["text"] = pa.array(["x"] * size, pa.string())
        if file_format == "parquet":
            corpus.parquet(f"{i}.parquet", columns)
        else:
            corpus.jsonl(f"{i}.jsonl", pa.table(columns).to_pylist())
    plan = corpus.plan(format=file_format, shard_rows=shard_rows)
    places = [(s.file_no, row) for s in plan.shards for row in range(s.first_row, s.first_row + s.rows)]
    assert places == [(i, row) for i, size in enumerate(sizes) for row in range(size)]
    assert [s.shard_no for s in plan.shards] == list(range(len(plan.shards)))
    assert all(1 <= s.rows <= shard_rows for s in plan.shards)
    assert plan.rows == sum(sizes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.sampled_from(["row", "\n", " \t\n", "\r\n", "padded"]), min_size=1, max_size=30),
    shard_rows=st.integers(1, 7),
    bom=st.booleans(),
    ends=st.booleans(),
)
def test_jsonl_shards_cover_the_bytes_and_count_lines_from_zero(new_corpus, lines, shard_rows, bom, ends):
    corpus = new_corpus()
    row = json.dumps({"_id": "a", "text": "x"})
    words = {"row": f"{row}\n", "padded": f"  {row}\r\n"}
    data = "".join(words.get(line, line) for line in [*lines, "row"]).removesuffix("\n" * (not ends))
    path = corpus.raw("a.jsonl", b"\xef\xbb\xbf" * bom + data.encode())
    plan = corpus.plan(format="jsonl", shard_rows=shard_rows)
    bounds = [(s.first_byte, s.stop_byte) for s in plan.shards]
    assert (bounds[0][0], bounds[-1][1]) == (0, path.stat().st_size)
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(bounds))
    expected = [i for i, line in enumerate([*lines, "row"]) if line in words]
    config = corpus.config(format="jsonl", shard_rows=shard_rows)
    batches = [list(read_batches(LocalStore(str(corpus.folder)), plan, s, config)) for s in plan.shards]
    assert [int(i) for shard in batches for batch in shard for i in batch.rows] == expected
    assert [sum(b.num_rows for b in shard) for shard in batches] == [s.rows for s in plan.shards]


def test_a_copied_corpus_has_the_same_plan(corpus, tmp_path):
    corpus.parquet("a.parquet", TWO)
    shutil.copytree(corpus.folder, tmp_path / "copy")
    here, there = corpus.plan(), corpus.plan(uri=str(tmp_path / "copy"))
    assert here.fingerprint == there.fingerprint
    assert here.corpus_folder != there.corpus_folder


def test_a_change_of_content_of_the_same_size_is_another_plan(corpus):
    path = corpus.jsonl("a.jsonl", [{"_id": "a", "text": "x"}])
    before = corpus.plan(format="jsonl").fingerprint
    path.write_bytes(path.read_bytes().replace(b'"x"', b'"y"'))
    assert corpus.plan(format="jsonl").fingerprint != before


def test_shards_are_stable_when_a_file_is_added(corpus):
    corpus.parquet("a.parquet", TWO)
    before = corpus.plan(shard_rows=1).shards
    corpus.parquet("b.parquet", TWO)
    assert corpus.plan(shard_rows=1).shards[: len(before)] == before


@pytest.mark.parametrize(
    ("rows", "num_bytes", "buckets"),
    [(1, 0, 1), (65_536, 0, 1), (65_537, 0, 2), (10**12, 0, 4096), (10, 600 << 20, 4)],
)
def test_a_document_bucket_holds_what_one_task_can(rows, num_bytes, buckets):
    assert _document_buckets(rows, num_bytes) == buckets


def test_the_estimate_of_text_counts_the_text_columns_alone(corpus):
    corpus.parquet(
        "a.parquet", {"_id": ["a"], "text": ["x" * 1000], "other": ["y" * 100_000]}, compression="none"
    )
    assert 1000 <= corpus.plan().text_bytes < 5000
