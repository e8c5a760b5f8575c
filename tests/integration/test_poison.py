"""A corpus with 1 % poison rows of every kind: the run ends, each is in the dead-letter table with its reason, none else.

For JSONL, Parquet and ready-made vectors, in this process without the kinds that kill a worker, and on a real Ray with
them; each prints a table of poison, planted, found, reason.
"""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import open_release
from pipeline.execution.flows import run
from pipeline.execution.runner import RayRunner
from pipeline.execution.work import StoreSpec
from pipeline.storage import open_store
from pipeline.tables import read_columns
from tests.integration.roads import SCHEMA, Inline, configured, rows_of, settings

RUNNERS = pytest.mark.parametrize(
    "on_ray", [False, pytest.param(True, marks=[pytest.mark.ray, pytest.mark.slow])], ids=["inline", "ray"]
)

ROWS = 3000
DIMS = 32
ATTRIBUTES = {
    "year": "int", "section": "string", "tags": "list<string>", "score": "float", "seen": "timestamp", "open": "bool",
}  # fmt: skip


def _line(row):
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _with(**changes):
    return lambda row: _line({**row, **changes})


def _without(*names):
    return lambda row: _line({key: value for key, value in row.items() if key not in names})


def _replaced(old, new):
    return lambda row: _line(row).replace(old, new)


def _faulty(kind):
    return lambda row: _line({**row, "text": f"{row['text']} faulty_{kind}"})


LINES = {
    "not JSON": (lambda row: _line(row)[:-10], "invalid JSON: "),
    "not UTF-8": (_replaced(b'"title": "', b'"title": "\xff\xfe'), "invalid UTF-8 at byte "),
    "UTF-16": (lambda row: _line(row).decode().encode("utf-16-le").replace(b"\n", b""), "invalid JSON: "),
    "an array": (lambda _: b'["a", 1]', "row is not a JSON object"),
    "a number": (lambda _: b"42", "row is not a JSON object"),
    "lists too deep": (_replaced(b'"year"', b'"deep": ' + b"[" * 200_000 + b', "year"'), "invalid JSON: "),
    "a number too long": (
        _replaced(b'"year": ', b'"year": ' + b"9" * 5000),
        "invalid JSON: a number is too long",
    ),
    "a line of 65 MiB": (_with(text="x" * (65 << 20)), "line is longer than 64 MiB"),
    "no id": (_without("_id"), "id is null"),
    "null id": (_with(_id=None), "id is null"),
    "empty id": (_with(_id=""), "id is empty"),
    "id of a wrong type": (_with(_id={"oid": 1}), "id is not a string or integer: found object"),
    "NUL in the id": (_with(_id="a\0b"), "NUL character in column _id"),
    "no text": (_without("title", "text"), "text is empty"),
    "blank text": (_with(title="", text=" \t "), "text is empty"),
    "text of a wrong type": (_with(text=["a"]), "text is not a string: found list"),
    "NUL in the text": (_with(text="a\0b"), "NUL character in column text"),
    "lone surrogate": (
        lambda row: json.dumps({**row, "text": "a \ud800 b"}).encode(),
        "invalid UTF-8 in column text",
    ),
    "text for an int": (_with(year="nineteen"), "attribute year: expected int, found string 'nineteen'"),
    "an int beyond 64 bits": (_with(year=10**30), "attribute year: expected int, found int 1000"),
    "half an int": (_with(year=1999.5), "attribute year: expected int, found float 1999.5"),
    "an object for a string": (_with(section={"a": 1}), "attribute section: expected string, found object"),
    "lists in a list": (_with(tags=[["a"]]), "attribute tags: expected list<string>, found list"),
    "text for a float": (_with(score="1.0"), "attribute score: expected float, found string '1.0'"),
    "no such day": (
        _with(seen="2024-02-30"),
        "attribute seen: expected timestamp, found string '2024-02-30'",
    ),
    "a number for a time": (_with(seen=12), "attribute seen: expected timestamp, found int 12"),
    "text for a bool": (_with(open="yes"), "attribute open: expected bool, found string 'yes'"),
    "a duplicate id": (_with(_id="doc-00001"), "duplicate of corpus.jsonl row 1"),
    "the encoder raises": (_faulty("raise"), "encoder_error"),
    "the encoder loses a row": (_faulty("short"), "encoder_error"),
    "the encoder runs out of memory": (_faulty("memory"), "out_of_memory"),
    "a vector with NaN": (_faulty("nan"), "not_finite"),
    "an infinite vector": (_faulty("inf"), "not_finite"),
    "a zero vector": (_faulty("zero"), "zero_vector"),
    "the encoder kills its worker": (_faulty("kill"), "killed_worker"),
    "the encoder ends its worker": (_faulty("exit"), "killed_worker"),
    "the encoder breaks for good": (_faulty("stick"), "killed_worker"),
}


def _sound_rows(n):
    return [
        {**row, "score": i / 7, "seen": f"2024-01-{i % 28 + 1:02d}T10:00:00Z", "open": bool(i % 2)}
        for i, row in enumerate(rows_of(n))
    ]


def _places(kinds):
    """A row for each kind, spread over the corpus; never the first, of which one is a duplicate."""
    return dict(zip(np.linspace(40, ROWS - 1, len(kinds)).astype(int).tolist(), kinds, strict=True))


def _kinds(table, on_ray):
    return {kind: how for kind, how in table.items() if on_ray or how[1] != "killed_worker"}


def _run(folder, name, *, on_ray=False, **corpus):
    content = settings(
        folder / "root",
        folder / name,
        encoders={"words": {"model": "hashing:64!faulty"}},
        embedding={"unit_texts": 64},
    )
    content["corpus"] |= {"error_budget": 0.05} | corpus
    config = configured(folder, content)
    spec = StoreSpec(config.root, config.storage)
    return config, run(config, spec, lambda: RayRunner(spec, config.ray) if on_ray else Inline(spec))


def _judged(config, summary, planted, capsys):
    """Hold the dead letters against what was planted, row by row; print the table."""
    store = open_store(config.root)
    tables = [read_columns(store, path) for path in summary["dead_letter_files"]]
    found = {row["row"]: row for row in pa.concat_tables(tables).to_pylist()}
    assert sorted(found) == sorted(planted), sorted(set(found) ^ set(planted))
    wrong = {
        kind: found[row]["reason"]
        for row, (kind, reason) in planted.items()
        if not found[row]["reason"].startswith(reason)
    }
    assert wrong == {}
    assert summary["dead_letters"] == len(planted) == sum(summary["dead_letters_by_reason"].values())
    assert summary["documents"] == summary["vectors"] == ROWS - len(planted)
    returned = open_release(config.root).search(
        np.eye(1, _width(config), dtype=np.float32), k=ROWS, exact=True
    )[0]
    sound = {f"doc-{i:05d}" for i in range(ROWS) if i not in planted}
    assert {hit.doc_id for hit in returned} == sound
    with capsys.disabled():
        _print(planted, found)


def _width(config):
    return DIMS if config.corpus.embedding else 64


def _print(planted, found):
    planted_counts = Counter(kind for kind, _ in planted.values())
    reasons = {kind: found[row]["reason"] for row, (kind, _) in planted.items()}
    seen = Counter(kind for row, (kind, _) in planted.items() if row in found)
    print(f"\n{'poison':<34}{'planted':>8}{'found':>7}  reason")
    for kind, count in planted_counts.items():
        print(f"{kind:<34}{count:>8}{seen[kind]:>7}  {reasons[kind][:70]}")
    print(f"{'in all':<34}{len(planted):>8}{len(found):>7}  of {ROWS} rows")


@RUNNERS
def test_jsonl_with_one_percent_poison_of_every_kind(tmp_path, capsys, on_ray):
    planted = {row: (kind, LINES[kind][1]) for row, kind in _places(_kinds(LINES, on_ray)).items()}
    lines = [
        LINES[planted[i][0]][0](row) if i in planted else _line(row)
        for i, row in enumerate(_sound_rows(ROWS))
    ]
    (tmp_path / "corpus.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    config, summary = _run(tmp_path, "corpus.jsonl", on_ray=on_ray, format="jsonl", attributes=ATTRIBUTES)
    _judged(config, summary, planted, capsys)


CELLS = {
    "null id": ({"_id": None}, "id is null"),
    "empty id": ({"_id": b""}, "id is empty"),
    "id not UTF-8": ({"_id": b"\xff\xfe"}, "invalid UTF-8 in column _id"),
    "NUL in the id": ({"_id": b"a\0"}, "NUL character in column _id"),
    "null text": ({"title": None, "text": None}, "text is empty"),
    "blank text": ({"title": b" ", "text": b"\n"}, "text is empty"),
    "text not UTF-8": ({"text": b"caf\xe9"}, "invalid UTF-8 in column text"),
    "NUL in the text": ({"text": b"a\0b"}, "NUL character in column text"),
    "attribute not UTF-8": ({"section": b"\xff"}, "invalid UTF-8 in column section"),
    "list not UTF-8": ({"tags": [b"\xff"]}, "invalid UTF-8 in column tags"),
    "no such day": ({"seen": b"2024-13-01"}, "attribute seen: expected timestamp, found string '2024-13-01'"),
    "an integer beyond 64 bits": (
        {"year": 2**64 - 1},
        "attribute year: expected int, found int 18446744073709551615",
    ),
    "a duplicate id": ({"_id": b"doc-00001"}, "duplicate of corpus.parquet row 1"),
    "the encoder raises": ({"text": b"faulty_raise"}, "encoder_error"),
    "the encoder runs out of memory": ({"text": b"faulty_memory"}, "out_of_memory"),
    "a vector with NaN": ({"text": b"faulty_nan"}, "not_finite"),
    "a zero vector": ({"text": b"faulty_zero"}, "zero_vector"),
    "the encoder crashes its worker": ({"text": b"faulty_segfault"}, "killed_worker"),
}
UNREADABLE = range(1000, 1020)
"""Rows of a row group whose page of texts is damaged."""


def _raw_table(rows):
    """Strings as they are in the file, which need not be UTF-8."""

    def raw(value):
        return value.encode() if isinstance(value, str) else value

    columns = {}
    for field in [*SCHEMA, pa.field("seen", pa.string())]:
        values = [row[field.name] for row in rows]
        if pa.types.is_list(field.type):
            array = pa.array([[raw(x) for x in value] for value in values], pa.list_(pa.binary()))
            offsets, items = array.offsets, array.flatten()
            items = pa.Array.from_buffers(pa.string(), len(items), items.buffers(), offset=items.offset)
            columns[field.name] = pa.ListArray.from_arrays(offsets, items)
        elif pa.types.is_string(field.type):
            array = pa.array([raw(value) for value in values], pa.binary())
            columns[field.name] = pa.Array.from_buffers(pa.string(), len(array), array.buffers())
        else:
            columns[field.name] = pa.array(values, pa.uint64())
    return pa.table(columns)


@RUNNERS
def test_parquet_with_one_percent_poison_of_every_kind_and_a_damaged_page(tmp_path, capsys, on_ray):
    places = _places(_kinds(CELLS, on_ray))
    assert not set(places) & set(UNREADABLE)
    planted = {row: (kind, CELLS[kind][1]) for row, kind in places.items()}
    rows = [
        {**row, **(CELLS[places[i]][0] if i in places else {})} for i, row in enumerate(_sound_rows(ROWS))
    ]
    table = _raw_table(rows)
    path = tmp_path / "corpus.parquet"
    with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False) as writer:
        for first, stop in (
            (0, UNREADABLE.start),
            (UNREADABLE.start, UNREADABLE.stop),
            (UNREADABLE.stop, ROWS),
        ):
            writer.write_table(table.slice(first, stop - first))
    chunk = pq.read_metadata(path).row_group(1).column(2)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = bytes(
        chunk.total_compressed_size
    )
    path.write_bytes(data)
    planted |= dict.fromkeys(UNREADABLE, ("a damaged page", "its page cannot be decoded"))
    config, summary = _run(
        tmp_path,
        "corpus.parquet",
        on_ray=on_ray,
        attributes={"year": "int", "section": "string", "tags": "list<string>", "seen": "timestamp"},
    )
    _judged(config, summary, planted, capsys)


VECTORS = {
    "no vector": (None, "embedding is null"),
    "a null in a vector": ([None] + [1.0] * (DIMS - 1), "embedding has null values"),
    "a vector too short": ([1.0] * (DIMS - 1), f"embedding has {DIMS - 1} dimensions, expected {DIMS}"),
    "a vector too long": ([1.0] * (DIMS + 1), f"embedding has {DIMS + 1} dimensions, expected {DIMS}"),
    "an empty vector": ([], f"embedding has 0 dimensions, expected {DIMS}"),
    "NaN in a vector": ([float("nan")] * DIMS, "embedding has NaN or infinite values"),
    "an infinite vector": ([float("inf")] + [0.0] * (DIMS - 1), "embedding has NaN or infinite values"),
    "a zero vector": ([0.0] * DIMS, "embedding has zero length"),
}
JSON_VECTORS = VECTORS | {
    "a text for a vector": ("0.1 0.2", "embedding is not a list of numbers: found string"),
    "lists in a vector": ([[1.0]] * DIMS, "embedding is not a list of numbers: found list"),
    "a number beyond float64": ([10**400] + [1] * (DIMS - 1), "embedding has NaN or infinite values"),
}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_ready_made_vectors_with_one_percent_poison_of_every_kind(tmp_path, capsys, form):
    kinds = JSON_VECTORS if form == "jsonl" else VECTORS
    places = dict(enumerate([k for k in kinds for _ in range(30 // len(kinds))], 100))
    planted = {row: (kind, kinds[kind][1]) for row, kind in places.items()}
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIMS)).tolist()
    rows = [
        {"_id": f"doc-{i:05d}", "vector": kinds[places[i]][0] if i in places else vectors[i]}
        for i in range(ROWS)
    ]
    path = tmp_path / f"corpus.{form}"
    if form == "jsonl":
        path.write_bytes(b"".join(_line(row) + b"\n" for row in rows))
    else:
        kind = pa.list_(pa.float64())
        pq.write_table(
            pa.table(
                {"_id": [r["_id"] for r in rows], "vector": pa.array([r["vector"] for r in rows], kind)}
            ),
            path,
        )
    config, summary = _run(tmp_path, path.name, format=form, text=[], attributes=[], embedding="vector")
    _judged(config, summary, planted, capsys)
