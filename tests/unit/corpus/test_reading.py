import datetime as dt
import itertools
import json
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.artifacts import Attribute
from pipeline.corpus import reading
from pipeline.corpus.columns import check_columns, plain_row, unit_rows
from pipeline.corpus.jsonl import TOO_LONG, line_blocks, numbered_lines
from pipeline.corpus.reading import BATCH_ROWS, check_lines, read_batches
from pipeline.corpus.rules import BadRow, BadRowError, RowSpec, check_row
from pipeline.errors import DataError, MissingFileError
from pipeline.storage import LocalStore

NOT_UTF8 = b"caf\xe9"


def binary_as(kind, values):
    """Strings that are not UTF-8, as a careless writer leaves them in Parquet."""
    return pa.array(values, pa.binary()).cast(pa.string(), safe=False).cast(kind)


def letters(corpus, **config):
    return corpus.read(**config).dead_letters


# ------------------------------------------------------------------------------------------------ bad rows

BAD_IN_BOTH = [
    ({"_id": None}, None, "id is null"),
    ({"_id": ""}, None, "id is empty"),
    ({"_id": "ü" * 513}, None, "id has more than 1024 bytes"),
    ({"title": None, "text": None}, "bad", "text is empty"),
    ({"title": "", "text": " \t\n"}, "bad", "text is empty"),
    ({"text": "a\0b"}, "bad", "NUL character in column text"),
    ({"_id": "a\0b"}, None, "NUL character in column _id"),
    ({"section": "a\0b"}, "bad", "NUL character in column section"),
    ({"tags": ["a\0b"]}, "bad", "NUL character in column tags"),
    ({"when": "yesterday"}, "bad", "attribute when: expected timestamp, found string 'yesterday'"),
    (
        {"when": "0001-01-01T00:00:00+05:00"},
        "bad",
        "attribute when: expected timestamp, found string '0001-01-01T00:00:00+05:00'",
    ),
    ({"year": 1999.5}, "bad", "attribute year: expected int, found float 1999.5"),
    ({"year": math.nan}, "bad", "attribute year: expected int, found float nan"),
    ({"year": 1e300}, "bad", "attribute year: expected int, found float 1e+300"),
]
GOOD = {
    "_id": "good",
    "title": "t",
    "text": "x",
    "year": 1.0,
    "section": "s",
    "tags": ["u"],
    "when": "2024-01-01",
}
TYPES = {"year": "int", "section": "string", "tags": "list<string>", "when": "timestamp"}


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
@pytest.mark.parametrize(("change", "doc_id", "reason"), BAD_IN_BOTH)
def test_a_bad_row_is_set_aside_with_its_place_and_reason(corpus, file_format, change, doc_id, reason):
    rows = [GOOD, GOOD | {"_id": "bad"} | change]
    corpus.jsonl("a.jsonl", rows)
    corpus.parquet("a.parquet", pa.Table.from_pylist(rows))
    read = corpus.read(format=file_format, text=("title", "text"), attributes=TYPES)
    assert read.dead_letters == [(f"a.{file_format}", 1, doc_id, reason)]
    assert list(read.rows) == ["good"]
    assert (read.shards[0].numbers["rows"], read.shards[0].numbers["bad_rows"]) == (2, 1)


BAD_LINES = [
    ({"text": 5}, "text is not a string: found int"),
    ({"text": ["x"]}, "text is not a string: found list"),
    ({"text": {"en": "x"}}, "text is not a string: found object"),
    ({"text": False}, "text is not a string: found bool"),
    ({"year": "abc"}, "attribute year: expected int, found string 'abc'"),
    ({"year": True}, "attribute year: expected int, found bool True"),
    ({"year": 2**63}, f"attribute year: expected int, found int {2**63}"),
    ({"year": [1]}, "attribute year: expected int, found list"),
    ({"section": 5}, "attribute section: expected string, found int 5"),
    ({"section": "y" * 60, "tags": ["x", 5]}, "attribute tags: expected list<string>, found list"),
    ({"when": 20240101}, "attribute when: expected timestamp, found int 20240101"),
    ({"year": "y" * 60}, f"attribute year: expected int, found string '{'y' * 39}…"),
    ({"text": "\ud800"}, "invalid UTF-8 in column text"),
    ({"section": "\udfff"}, "invalid UTF-8 in column section"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_LINES)
def test_a_json_value_of_the_wrong_type_is_set_aside(corpus, change, reason):
    corpus.jsonl("a.jsonl", [GOOD, GOOD | {"_id": "bad"} | change])
    assert letters(corpus, format="jsonl", attributes=TYPES) == [("a.jsonl", 1, "bad", reason)]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1.5, "id is not a string or integer: found float"),
        (True, "id is not a string or integer: found bool"),
        ("\ud800", "invalid UTF-8 in column _id"),
    ],
)
def test_a_json_id_of_the_wrong_type_is_set_aside(corpus, value, reason):
    corpus.jsonl("a.jsonl", [GOOD, GOOD | {"_id": value}])
    assert letters(corpus, format="jsonl") == [("a.jsonl", 1, None, reason)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"_id": "b", "text"}', "invalid JSON: Expecting ':' delimiter at character 19"),
        (b"{'_id': 'b'}", "invalid JSON: Expecting property name enclosed in double quotes at character 1"),
        (b'{"_id": "b", "text": "caf\xe9"}', "invalid UTF-8 at byte 25 of the line"),
        (b"[1, 2]", "row is not a JSON object"),
        (b"null", "row is not a JSON object"),
        (b"[" * 100_000, "invalid JSON: a number is too long or lists are too deep"),
        (b"1" * 5000, "invalid JSON: a number is too long or lists are too deep"),
    ],
)
def test_a_line_that_is_no_json_object_is_set_aside_by_its_line_number(corpus, line, reason):
    good = json.dumps(GOOD).encode()
    corpus.raw("a.jsonl", b"\n" + good + b"\n \r\n" + line + b"\n")
    assert letters(corpus, format="jsonl") == [("a.jsonl", 3, None, reason)]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_invalid_utf8_in_parquet_costs_that_row_alone(corpus, kind):
    dictionary = pa.types.is_dictionary(kind)
    values = [b"one", NOT_UTF8, None, "naïve".encode()]
    column = binary_as(pa.string(), values).dictionary_encode() if dictionary else binary_as(kind, values)
    corpus.parquet("a.parquet", {"_id": list("abcd"), "text": ["x"] * 4, "title": column, "section": column})
    read = corpus.read(text=("text", "title"), attributes=("section",))
    assert read.dead_letters == [("a.parquet", 1, "b", "invalid UTF-8 in column title")]
    assert {key: (row["text"], row["section"]) for key, row in read.rows.items()} == {
        "a": ("x one", "one"),
        "c": ("x", None),
        "d": ("x naïve", "naïve"),
    }


def test_invalid_utf8_in_an_id_or_an_attribute_costs_that_row_alone(corpus):
    ids = binary_as(pa.string(), [b"a", NOT_UTF8, b"c"])
    tags = pa.ListArray.from_arrays([0, 1, 2, 4], binary_as(pa.string(), [b"u", b"v", b"w", NOT_UTF8]))
    corpus.parquet("a.parquet", {"_id": ids, "text": ["x"] * 3, "tags": tags})
    assert letters(corpus, attributes=("tags",)) == [
        ("a.parquet", 1, None, "invalid UTF-8 in column _id"),
        ("a.parquet", 2, "c", "invalid UTF-8 in column tags"),
    ]


VECTORS = [
    ([1.0, 2.0], None),
    (None, "embedding is null"),
    ([1.0, 2.0, 3.0], "embedding has 3 dimensions, expected 2"),
    ([], "embedding has 0 dimensions, expected 2"),
    ([1.0, None], "embedding has null values"),
    ([math.nan, 1.0], "embedding has NaN or infinite values"),
    ([1.0, -math.inf], "embedding has NaN or infinite values"),
    ([0.0, -0.0], "embedding has zero length"),
    ([3.0, 4.0], None),
]


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_a_bad_vector_is_set_aside(corpus, file_format):
    ids = [str(i) for i in range(len(VECTORS))]
    columns = {"_id": ids, "e": [vector for vector, _ in VECTORS]}
    corpus.parquet("a.parquet", columns)
    corpus.raw(
        "a.jsonl",
        "".join(
            json.dumps({"_id": i, "e": v}) + "\n" for i, v in zip(*columns.values(), strict=True)
        ).encode(),
    )
    expected = [(f"a.{file_format}", i, str(i), reason) for i, (_, reason) in enumerate(VECTORS) if reason]
    assert letters(corpus, format=file_format, text=(), embedding="e") == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("x", "embedding is not a list of numbers: found string"),
        (["1", "2"], "embedding is not a list of numbers: found list"),
        ([True, False], "embedding is not a list of numbers: found list"),
        ([10**400, 1], "embedding has NaN or infinite values"),
    ],
)
def test_a_json_vector_of_the_wrong_type_is_set_aside(corpus, value, reason):
    corpus.jsonl("a.jsonl", [{"_id": "a", "e": [1, 2]}, {"_id": "b", "e": value}])
    assert letters(corpus, format="jsonl", text=(), embedding="e") == [("a.jsonl", 1, "b", reason)]


def test_a_null_in_a_fixed_width_vector_column_is_set_aside(corpus):
    column = pa.array([[1.0, 0.0], None, [0.0, 2.0]], pa.list_(pa.float32(), 2))
    corpus.parquet("a.parquet", {"_id": list("abc"), "e": column})
    assert letters(corpus, text=(), embedding="e") == [("a.parquet", 1, "b", "embedding is null")]


def test_a_file_whose_vector_column_has_no_type_is_all_bad(corpus):
    corpus.parquet("a.parquet", {"_id": ["a"], "e": [[1.0]]})
    corpus.parquet("b.parquet", {"_id": ["b"], "e": pa.nulls(1)})
    assert letters(corpus, text=(), embedding="e") == [("b.parquet", 0, "b", "embedding is null")]


# ------------------------------------------------------------------------------------------------ corrupt and changed files


def only_batches(corpus, plan, **settings):
    source = LocalStore(str(corpus.folder))
    return [
        batch
        for shard in plan.shards
        for batch in read_batches(source, plan, shard, corpus.config(format=plan.format, **settings))
    ]


def _damage(path, column, group, *, byte=None):
    """Overwrite the data page of a column in a row group with zeros, or one byte of it."""
    chunk = pq.read_metadata(path).row_group(group).column(column)
    data = bytearray(path.read_bytes())
    first = chunk.data_page_offset
    stop = first + chunk.total_compressed_size
    data[first:stop] = bytes(stop - first) if byte is None else data[first:stop].replace(*byte, 1)
    path.write_bytes(data)


@pytest.mark.parametrize("shard_rows", [100_000, 1500])
def test_rows_of_a_page_that_cannot_be_decoded_are_bad_rows_and_all_others_are_read(corpus, shard_rows):
    path = corpus.parquet(
        "a.parquet",
        {"_id": [f"doc {i}" for i in range(9000)], "text": ["x"] * 9000},
        compression="zstd",
        use_dictionary=False,
        row_group_size=3000,
    )
    _damage(path, 1, 1)
    batches = only_batches(corpus, corpus.plan(shard_rows=shard_rows), shard_rows=shard_rows)
    bad = [row for batch in batches for row in batch.bad]
    assert bad == [BadRow(i, f"doc {i}", "its page cannot be decoded") for i in range(3000, 6000)]
    rows = np.concatenate([batch.rows for batch in batches])
    assert rows.tolist() == [*range(3000), *range(6000, 9000)]


def test_where_the_ids_cannot_be_decoded_either_they_are_null(corpus):
    path = corpus.parquet("a.parquet", {"_id": [f"doc {i}" for i in range(50)], "text": ["x"] * 50})
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    found = [row for batch in only_batches(corpus, corpus.plan()) for row in batch.bad]
    assert found == [BadRow(i, None, "its page cannot be decoded") for i in range(50)]


def test_a_flipped_bit_is_found_where_pages_have_checksums(corpus):
    path = corpus.parquet(
        "a.parquet",
        {"_id": ["a"], "text": ["some text without redundancy"]},
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=False,
    )
    _damage(path, 1, 0, byte=(b"without", b"withoot"))
    found = [row for batch in only_batches(corpus, corpus.plan()) for row in batch.bad]
    assert found == [BadRow(0, "a", "its page cannot be decoded")]


def test_a_bad_string_in_a_list_of_another_shard_is_not_this_shards_business(corpus):
    tags = [["a"], [NOT_UTF8], ["b"], None]
    column = binary_lists(tags)
    corpus.parquet("a.parquet", pa.table({"_id": list("abcd"), "text": ["x"] * 4, "tags": column}))
    found = only_batches(
        corpus, corpus.plan(shard_rows=1, attributes=("tags",)), shard_rows=1, attributes=("tags",)
    )
    assert [row for batch in found for row in batch.bad] == [BadRow(1, "b", "invalid UTF-8 in column tags")]


def binary_lists(rows):
    raw = pa.array(rows, pa.list_(pa.binary()))
    strings = pa.array([value for row in rows for value in row or []], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(strings), strings.buffers())
    return pa.ListArray.from_arrays(raw.offsets, strings)


LINES = st.lists(st.binary(max_size=25).map(lambda line: line.replace(b"\n", b" ")), max_size=8)


@given(LINES, st.booleans(), st.lists(st.integers(1, 12), min_size=1))
def test_a_line_that_is_too_long_is_one_bad_row_wherever_pieces_end(lines, ends, sizes):
    data = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    cuts = np.minimum(np.cumsum(sizes * (len(data) + 1)), len(data))
    pieces = [data[a:b] for a, b in itertools.pairwise([0, *cuts]) if a < b]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.corpus.jsonl.MAX_LINE_BYTES", 12)
        blocks = list(line_blocks(pieces))
    assert sum(block.size for block in blocks) == len(data)
    found = dict(numbered_lines(blocks, 0))
    assert {i: line for i, line in found.items() if line != TOO_LONG} == {
        i: line for i, line in enumerate(lines) if line.strip() and len(line) <= 12
    }
    assert {i for i, line in found.items() if line == TOO_LONG} == {
        i for i, line in enumerate(lines) if len(line) > 12
    }


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_a_file_that_changed_since_the_plan_is_named(corpus, file_format):
    corpus.jsonl("a.jsonl", [{"_id": "a", "text": "x"}])
    corpus.parquet("a.parquet", {"_id": ["a"], "text": ["x"]})
    plan = corpus.plan(format=file_format)
    path = corpus.folder / f"a.{file_format}"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(
        DataError, match=f"a.{file_format}: changed since it was planned; let the corpus rest and rerun"
    ) as caught:
        only_batches(corpus, plan)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_an_edit_in_place_that_keeps_the_size_and_the_time_is_seen(corpus, file_format):
    corpus.jsonl("a.jsonl", [{"_id": "a", "text": "first words"}])
    corpus.parquet("a.parquet", {"_id": ["a"], "text": ["first words"]}, compression="none")
    plan = corpus.plan(format=file_format)
    path = corpus.folder / f"a.{file_format}"
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"first words", b"other words"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=f"a.{file_format}: changed since it was planned.*rerun"):
        only_batches(corpus, plan)


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_an_edit_while_the_shard_is_read_is_seen(corpus, file_format):
    rows = 3 * BATCH_ROWS
    columns = {"_id": [str(i) for i in range(rows)], "text": ["first words"] * rows}
    corpus.jsonl("a.jsonl", [{"_id": i, "text": t} for i, t in zip(*columns.values(), strict=True)])
    corpus.parquet("a.parquet", columns)
    plan = corpus.plan(format=file_format)
    path = corpus.folder / f"a.{file_format}"
    source = LocalStore(str(corpus.folder))
    batches = read_batches(source, plan, plan.shards[0], corpus.config(format=file_format))
    next(batches)
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match=f"a.{file_format}: changed since it was planned"):
        list(batches)


def test_a_file_that_is_gone_since_the_plan_is_named(corpus):
    path = corpus.parquet("a.parquet", {"_id": ["a"], "text": ["x"]})
    plan = corpus.plan()
    path.unlink()
    with pytest.raises(MissingFileError, match=r"a\.parquet"):
        only_batches(corpus, plan)


# ------------------------------------------------------------------------------------------------ good rows


def test_text_is_joined_from_the_columns_that_have_some(corpus):
    columns = {"_id": list("abcd"), "title": ["T", None, "", " "], "text": ["x", "y", " z ", "w"]}
    corpus.parquet("a.parquet", columns)
    read = corpus.read(text=("title", "text"), separator=" | ")
    assert {key: row["text"] for key, row in read.rows.items()} == {
        "a": "T | x",
        "b": "y",
        "c": " z ",
        "d": "w",
    }


def test_integer_ids_become_decimal_strings(corpus):
    corpus.parquet("a.parquet", {"_id": pa.array([2**64 - 1, 7], pa.uint64()), "text": ["x", "y"]})
    corpus.jsonl("a.jsonl", [{"_id": 2**64 - 1, "text": "x"}, {"_id": 7, "text": "y"}])
    assert set(corpus.read().rows) == set(corpus.read(format="jsonl").rows) == {str(2**64 - 1), "7"}


def test_values_of_every_type_are_kept_and_so_are_nulls(corpus):
    noon = dt.datetime(2024, 5, 1, 12, 30, 0, 123456, tzinfo=dt.UTC)
    columns = {
        "s": ["u", None, ""],
        "i": [2**53 + 1, None, -1],
        "f": [0.5, None, math.inf],
        "b": [True, None, False],
        "t": [noon, None, noon],
        "tags": [["x", None, ""], None, []],
        "no tags": [[], None, []],
    }
    corpus.parquet("a.parquet", {"_id": list("abc"), "text": ["x"] * 3} | columns)
    rows = corpus.read(attributes=tuple(columns)).rows
    assert [[rows[key][name] for name in columns] for key in "abc"] == [
        list(row) for row in zip(*columns.values(), strict=True)
    ]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, None], pa.int32()), ("float", [1.0, None])),
        (pa.array([2001.0, None], pa.float32()), ("int", [2001, None])),
        (
            pa.array(["2024-05-01T12:00:00+02:00", None]),
            ("timestamp", [dt.datetime(2024, 5, 1, 10, tzinfo=dt.UTC), None]),
        ),
        (
            pa.array(["2024-05-01", None]).dictionary_encode(),
            ("timestamp", [dt.datetime(2024, 5, 1, tzinfo=dt.UTC), None]),
        ),
        (
            pa.array([dt.date(2024, 5, 1), None]),
            ("timestamp", [dt.datetime(2024, 5, 1, tzinfo=dt.UTC), None]),
        ),
        (
            pa.array([1_714_557_600_000_000_999, None], pa.timestamp("ns")),
            ("timestamp", [dt.datetime(2024, 5, 1, 10, tzinfo=dt.UTC), None]),
        ),
    ],
)
def test_a_stated_type_converts_the_column(corpus, column, expected):
    kind, values = expected
    corpus.parquet("a.parquet", {"_id": ["a", "b"], "text": ["x", "y"], "v": column})
    rows = corpus.read(attributes={"v": kind}).rows
    assert [rows[key]["v"] for key in "ab"] == values


def test_an_unsigned_integer_beyond_64_bits_signed_is_set_aside(corpus):
    corpus.parquet(
        "a.parquet", {"_id": ["a", "b"], "text": ["x", "y"], "n": pa.array([2**63, 2**63 - 1], pa.uint64())}
    )
    read = corpus.read(attributes=("n",))
    assert read.dead_letters == [("a.parquet", 0, "a", f"attribute n: expected int, found int {2**63}")]
    assert read.rows["b"]["n"] == 2**63 - 1


def test_a_text_column_can_be_an_attribute_too(corpus):
    corpus.parquet("a.parquet", {"_id": ["a"], "title": ["t"]})
    row = corpus.read(text=("title",), attributes=("title", "_id")).rows["a"]
    assert (row["text"], row["title"], row["_id"]) == ("t", "t", "a")


def test_a_column_of_nulls_is_read_as_its_type(corpus):
    corpus.parquet(
        "a.parquet", {"_id": ["a"], "text": ["x"], "title": pa.nulls(1), "year": [5], "tags": [["u"]]}
    )
    corpus.parquet(
        "b.parquet",
        {"_id": ["b"], "text": ["x"], "title": pa.nulls(1), "year": pa.nulls(1), "tags": pa.nulls(1)},
    )
    rows = corpus.read(text=("title", "text"), attributes=("year", "tags")).rows
    assert (rows["b"]["year"], rows["b"]["tags"], rows["b"]["text"]) == (None, None, "x")


# ------------------------------------------------------------------------------------------------ the fast path is the plain one

ATTRIBUTES = (
    Attribute(name="s", type="string"),
    Attribute(name="n", type="int"),
    Attribute(name="f", type="float"),
    Attribute(name="tags", type="list<string>"),
    Attribute(name="when", type="timestamp"),
)
SPEC = RowSpec(
    id="id", text=("title", "text"), separator=" / ", attributes=ATTRIBUTES, embedding=None, dims=None
)
VECTOR_SPEC = RowSpec(id="id", text=("text",), separator=" ", attributes=(), embedding="e", dims=3)

raw = st.one_of(
    st.none(),
    st.sampled_from(
        [
            b"",
            b" ",
            b"x",
            NOT_UTF8,
            b"a\0b",
            "\u2028".encode(),
            "\x1c\u00a0".encode(),
            b"2024-02-30",
            b"2024-02-28T10:00",
        ]
    ),
    st.text(max_size=4).map(lambda text: text.encode("utf-8", "replace")),
)
floats = st.one_of(
    st.none(), st.floats(), st.integers(-5, 5).map(float), st.sampled_from([2.0**63, -(2.0**63)])
)
rows_of_columns = st.lists(
    st.fixed_dictionaries(
        {
            "id": raw,
            "title": raw,
            "text": raw,
            "s": raw,
            "n": floats,
            "f": floats,
            "tags": st.one_of(st.none(), st.lists(raw, max_size=3)),
            "when": raw,
        }
    ),
    min_size=1,
    max_size=12,
)
number = st.one_of(st.none(), st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0]))
rows_of_vectors = st.lists(
    st.fixed_dictionaries(
        {
            "id": raw,
            "text": raw,
            "e": st.one_of(st.none(), st.lists(number, min_size=2, max_size=4), st.just([0.0, 1.0, 2.0])),
        }
    ),
    min_size=1,
    max_size=12,
)


def plain(spec, rows):
    good, bad = [], []
    for i, row in enumerate(rows):
        try:
            good.append((i, check_row(spec, row)))
        except BadRowError as error:
            bad.append(BadRow(i + 10, error.doc_id, error.reason))
    return good, bad


def columns_of(rows, kinds):
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
    as_text = {pa.binary(): pa.string(), pa.list_(pa.binary()): pa.list_(pa.string())}
    return {
        name: array.cast(as_text.get(array.type, array.type), safe=False) for name, array in columns.items()
    }


KINDS = {
    "id": pa.binary(),
    "title": pa.binary(),
    "text": pa.binary(),
    "s": pa.binary(),
    "n": pa.float64(),
    "f": pa.float64(),
    "tags": pa.list_(pa.binary()),
    "when": pa.binary(),
}


@settings(max_examples=300, deadline=None)
@given(rows_of_columns)
def test_whole_columns_are_judged_as_single_rows_are(rows):
    columns = columns_of(rows, KINDS)
    batch = check_columns(SPEC, columns, first_row=10)
    good, bad = plain(SPEC, rows)
    assert batch.bad == bad
    assert batch.num_rows == len(rows)
    assert batch.rows.tolist() == [i + 10 for i, _ in good]
    expected = [(row.doc_id, row.text, *row.attributes) for _, row in good]
    assert repr([tuple(row.values()) for row in batch.table.to_pylist()]) == repr(expected).replace(
        "datetime.timezone.utc", UTC_SHOWN
    )


UTC_SHOWN = repr(pa.scalar(0, pa.timestamp("us", "UTC")).as_py().tzinfo)


@settings(max_examples=200, deadline=None)
@given(rows_of_vectors)
@example(
    [{"id": b"a", "text": None, "e": [3e38, 3e38, 0.0]}, {"id": b"b", "text": b"x", "e": [1e-45, 0.0, 0.0]}]
)
def test_whole_vector_columns_are_judged_as_single_rows_are(rows):
    kinds = {"id": pa.binary(), "text": pa.binary(), "e": pa.list_(pa.float32())}
    batch = check_columns(VECTOR_SPEC, columns_of(rows, kinds), first_row=10)
    good, bad = plain(VECTOR_SPEC, rows)
    assert batch.bad == bad
    assert batch.table["text"].to_pylist() == [row.text for _, row in good]
    expected = [unit_rows(row.vector[None])[0] for _, row in good]
    assert batch.vectors.tobytes() == b"".join(vector.tobytes() for vector in expected)
    np.testing.assert_allclose(np.linalg.norm(batch.vectors.astype(np.float64), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("space", [chr(i) for i in range(1, 0x3001) if chr(i).isspace()])
def test_both_paths_agree_on_what_is_white_space(space):
    columns = {"id": pa.array(["a"]), "text": pa.array([space]), "title": pa.array([None], pa.string())}
    spec = RowSpec(id="id", text=("text",), separator=" ", attributes=(), embedding=None, dims=None)
    assert [row.reason for row in check_columns(spec, columns, 0).bad] == ["text is empty"]


def test_a_plain_row_has_strings_as_bytes_and_no_times():
    columns = {
        "s": pa.array(["x"]),
        "tags": pa.array([["y", None]]),
        "when": pa.array([dt.datetime(2024, 1, 1, tzinfo=dt.UTC)]),
    }
    assert plain_row(columns, 0) == {"s": b"x", "tags": [b"y", None]}


def test_json_lines_are_checked_in_order():
    lines = [(4, b'{"id": "a", "title": "t"}'), (6, b"{"), (7, b'{"id": "b", "text": "x", "n": 1}')]
    batch = check_lines(SPEC, lines)
    assert batch.rows.tolist() == [4, 7]
    assert batch.table["doc_id"].to_pylist() == ["a", "b"]
    assert [row.row for row in batch.bad] == [6]


def test_unit_rows_do_not_depend_on_their_neighbours():
    matrix = np.random.default_rng(0).standard_normal((257, 101)).astype(np.float32)
    whole = unit_rows(matrix)
    for i in (0, 1, 100, 256):
        assert unit_rows(matrix[i : i + 1]).tobytes() == whole[i].tobytes()
    assert not np.signbit(unit_rows(np.array([[-0.0, 1.0]]))).any()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group_rows=st.integers(1, 40), shard_rows=st.integers(1, 20), batch_rows=st.integers(1, 10), rows=st.integers(1, 40)
)  # fmt: skip
def test_a_shard_is_read_whatever_the_row_groups(new_corpus, group_rows, shard_rows, batch_rows, rows):
    corpus = new_corpus()
    corpus.parquet(
        "a.parquet", {"_id": pa.array(range(rows)), "text": ["x"] * rows}, row_group_size=group_rows
    )
    config = corpus.config(shard_rows=shard_rows)
    plan = corpus.plan(shard_rows=shard_rows)
    source = LocalStore(str(corpus.folder))
    for shard in plan.shards:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "BATCH_ROWS", batch_rows)
            batches = list(read_batches(source, plan, shard, config))
        ids = [doc_id for batch in batches for doc_id in batch.table["doc_id"].to_pylist()]
        places = [int(row) for batch in batches for row in batch.rows]
        assert [str(place) for place in places] == ids
        assert places == list(range(shard.first_row, shard.first_row + shard.rows))
