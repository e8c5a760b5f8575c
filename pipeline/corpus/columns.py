"""The rules of `rules` over whole Arrow columns: what is clean is never looked at row by row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import ARROW_TYPES, arrow_schema
from pipeline.corpus.rules import MAX_INT, MIN_INT, BadRow, BadRowError, RowSpec, check_row, parse_timestamp

__all__ = [
    "LIST_OF_NUMBERS",
    "CheckedBatch",
    "check_columns",
    "family_of",
    "plain_row",
    "unit_rows",
    "valid_schema",
]

LIST_OF_NUMBERS = "list of numbers"
"""Family of columns that can hold ready-made vectors."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class CheckedBatch:
    """Rows of one batch, the good apart from the bad."""

    num_rows: int
    """Rows read, good and bad."""
    rows: NDArray[np.int64]
    """(n,) place of each good row in its file, from 0."""
    table: pa.Table
    """(n) good rows: doc_id, text and the attributes."""
    vectors: NDArray[np.float32] | None
    """(n, d) unit vectors; None where texts are encoded."""
    bad: list[BadRow]


class _Converted(NamedTuple):
    values: pa.Array
    """Null wherever `bad` is set."""
    bad: Mask


def valid_schema(spec: RowSpec) -> pa.Schema:
    """Columns of `CheckedBatch.table`."""
    return pa.schema([("doc_id", pa.string()), ("text", pa.string()), *arrow_schema(spec.attributes)])


def family_of(kind: pa.DataType) -> str:
    """Our name for an Arrow type: one of the attribute types, `null`, `list of numbers`, or Arrow's own name."""
    if pa.types.is_dictionary(kind):
        return family_of(kind.value_type)
    if _is_list(kind):
        inner = family_of(kind.value_type)
        named = {"string": "list<string>", "int": LIST_OF_NUMBERS, "float": LIST_OF_NUMBERS}
        return named.get(inner, f"list<{inner}>")
    families: list[tuple[Callable[[pa.DataType], bool], str]] = [
        (_is_string, "string"),
        (pa.types.is_integer, "int"),
        (pa.types.is_floating, "float"),
        (pa.types.is_boolean, "bool"),
        (_is_time, "timestamp"),
        (pa.types.is_null, "null"),
    ]
    return next((name for matches, name in families if matches(kind)), str(kind))


def check_columns(spec: RowSpec, columns: Mapping[str, pa.Array], first_row: int) -> CheckedBatch:
    """Check whole columns and gather the rows that pass.

    Args:
        spec: Which column means what.
        columns: (n,) every column of the spec.
        first_row: Place of the first row in its file.
    """
    ids = _ids(columns[spec.id])
    text = _joined_text(spec, columns)
    attributes = [_convert(columns[a.name], a.type) for a in spec.attributes]
    bad = np.logical_or.reduce([ids.bad, text.bad, *(a.bad for a in attributes)])
    vectors = None
    if spec.embedding is not None:
        raw, bad_vector = _vectors(columns[spec.embedding], spec.dims or 0)
        bad |= bad_vector
        vectors = unit_rows(raw[~bad[~bad_vector]])
    good = np.flatnonzero(~bad)
    table = pa.Table.from_arrays(
        [ids.values, text.values, *(a.values for a in attributes)], schema=valid_schema(spec)
    )
    # Taking every row would copy the texts for nothing.
    table = table if len(good) == len(bad) else table.take(pa.array(good))
    found = [_explained(spec, columns, int(i), first_row) for i in np.flatnonzero(bad)]
    return CheckedBatch(len(bad), good + first_row, table, vectors, found)


def plain_row(columns: Mapping[str, pa.Array], index: int) -> dict[str, Any]:
    """One row as the plain path takes it: strings as raw bytes, since they may not be UTF-8.

    Times are left out: they break no rule, and years beyond 9999 have no Python value.
    """
    return {
        name: _raw_bytes(array.slice(index, 1))[0].as_py()
        for name, array in columns.items()
        if family_of(array.type) != "timestamp"
    }


def unit_rows(matrix: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows scaled to unit length.

    Args:
        matrix: (n, d) finite, no row all zero.

    Returns:
        (n, d), bit for bit the same for a row whatever the other rows are, and without negative zeros.
    """
    wide = matrix.astype(np.float64)
    # Squares of float64 can overflow or vanish: bring the largest component to 1 first.
    wide /= np.abs(wide).max(axis=1, keepdims=True, initial=np.finfo(np.float64).smallest_subnormal)
    wide /= np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    return wide.astype(np.float32) + np.float32(0)


def _explained(spec: RowSpec, columns: Mapping[str, pa.Array], index: int, first_row: int) -> BadRow:
    try:
        check_row(spec, plain_row(columns, index))
    except BadRowError as error:
        return BadRow(first_row + index, error.doc_id, error.reason)
    raise AssertionError(f"row {first_row + index} fails whole-column checks and passes the plain ones")


# ------------------------------------------------------------------------------------------------ types


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _raw_bytes(array: pa.Array) -> pa.Array:
    array = _decoded(array)
    if _is_string(array.type):
        return array.cast(pa.large_binary())
    if _is_list(array.type) and family_of(array.type) == "list<string>":
        return array.cast(pa.large_list(pa.large_binary()))
    return array


def _mask(values: pa.Array) -> Mask:
    return values.fill_null(False).to_numpy(zero_copy_only=False)


def _none_bad(array: pa.Array) -> Mask:
    return np.zeros(len(array), dtype=np.bool_)


def _nulled(array: pa.Array, bad: Mask) -> pa.Array:
    return pc.if_else(pa.array(bad), pa.scalar(None, array.type), array) if bad.any() else array


# ------------------------------------------------------------------------------------------------ strings


def _ids(array: pa.Array) -> _Converted:
    array = _decoded(array)
    if family_of(array.type) == "int":
        values, bad = array.cast(pa.string()), _none_bad(array)
    else:
        values, bad = _strings(array)
    missing = _mask(pc.equal(values, "")) | _mask(values.is_null())
    return _Converted(values, bad | missing)


def _joined_text(spec: RowSpec, columns: Mapping[str, pa.Array]) -> _Converted:
    found = [_strings(columns[name]) for name in spec.text]
    rows = len(columns[spec.id])
    if not found:
        return _Converted(pa.nulls(rows, pa.string()), np.zeros(rows, dtype=np.bool_))
    parts = [pc.if_else(pa.array(_is_blank(c.values)), pa.scalar(None, pa.string()), c.values) for c in found]
    joined = pc.binary_join_element_wise(*parts, spec.separator, null_handling="skip")
    is_empty = np.logical_and.reduce([_mask(part.is_null()) for part in parts])
    bad = np.logical_or.reduce([c.bad for c in found])
    return _Converted(_nulled(joined, is_empty), bad | is_empty if spec.embedding is None else bad)


def _is_blank(values: pa.Array) -> Mask:
    return _mask(pc.equal(values, "")) | _mask(pc.utf8_is_space(values))


def _strings(array: pa.Array) -> _Converted:
    """Any string column, or one of nulls, as plain strings; bad where not UTF-8 or with a NUL."""
    array = _decoded(array)
    if pa.types.is_null(array.type):
        return _Converted(array.cast(pa.string()), _none_bad(array))
    raw = array.cast(pa.binary())
    bad = _none_bad(array) if _is_clean(array) else np.array([_is_bad_string(x) for x in raw.to_pylist()])
    return _Converted(_nulled(raw, bad).cast(pa.string()) if bad.any() else array.cast(pa.string()), bad)


def _is_clean(array: pa.Array) -> bool:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return not pc.any(pc.match_substring(array, "\0")).as_py()


def _is_bad_string(value: bytes | None) -> bool:
    if value is None:
        return False
    try:
        return "\0" in value.decode()
    except UnicodeDecodeError:
        return True


def _string_lists(array: pa.Array) -> _Converted:
    kind = ARROW_TYPES["list<string>"]
    raw = _raw_bytes(array)
    if _is_clean(_strings_inside(array)):
        return _Converted(raw.cast(pa.large_list(pa.string())).cast(kind), _none_bad(array))
    rows = raw.to_pylist()
    bad = np.array([any(_is_bad_string(x) for x in row or []) for row in rows])
    kept = [
        None if row is None or wrong else [x and x.decode() for x in row]
        for row, wrong in zip(rows, bad, strict=True)
    ]
    return _Converted(pa.array(kept, kind), bad)


def _strings_inside(array: pa.Array) -> pa.Array:
    return _decoded(array.flatten())


# ------------------------------------------------------------------------------------------------ attributes


def _convert(array: pa.Array, target: str) -> _Converted:
    """A column as an attribute of a type; the plan has made sure that the pair of types is a permitted one."""
    array = _decoded(array)
    source = family_of(array.type)
    kind = ARROW_TYPES[target]
    if source == "null":
        return _Converted(array.cast(kind), _none_bad(array))
    match target, source:
        case "string", _:
            return _strings(array)
        case "list<string>", _:
            return _string_lists(array)
        case "timestamp", "string":
            return _parsed_timestamps(array)
        case "timestamp", _:
            # Naive times are UTC; finer ones lose what is below a microsecond.
            micros = array.cast(pa.timestamp("us", getattr(array.type, "tz", None)), safe=False)
            return _Converted(micros.cast(kind), _none_bad(array))
        case "int", _:
            return _integers(array)
        case _:
            return _Converted(array.cast(kind, safe=False), _none_bad(array))


def _integers(array: pa.Array) -> _Converted:
    if pa.types.is_floating(array.type):
        # A column of integers with nulls that went through pandas is one of floats.
        values = array.cast(pa.float64())
        is_whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(values, float(MAX_INT)))
        fits = pc.and_(is_whole, pc.greater_equal(values, float(MIN_INT)))
        bad = ~_mask(fits) & _mask(values.is_valid())
        return _Converted(_nulled(values, bad).cast(pa.int64()), bad)
    if pa.types.is_uint64(array.type):
        bad = _mask(pc.greater(array, pa.scalar(MAX_INT, pa.uint64())))
        return _Converted(_nulled(array, bad).cast(pa.int64()), bad)
    return _Converted(array.cast(pa.int64()), _none_bad(array))


def _parsed_timestamps(array: pa.Array) -> _Converted:
    strings, bad = _strings(array)
    values = []
    for i, text in enumerate(strings.to_pylist()):
        try:
            values.append(None if text is None else parse_timestamp(text))
        except (ValueError, OverflowError):
            values.append(None)
            bad[i] = True
    return _Converted(pa.array(values, ARROW_TYPES["timestamp"]), bad)


# ------------------------------------------------------------------------------------------------ vectors


def _vectors(array: pa.Array, dims: int) -> tuple[NDArray[np.floating], Mask]:
    """Usable vectors, (rows that are not bad, d), and which rows are bad."""
    if pa.types.is_null(array.type):
        return np.zeros((0, dims)), np.ones(len(array), dtype=np.bool_)
    bad = ~_mask(pc.equal(pc.list_value_length(array), dims))
    shaped = array.filter(pa.array(~bad))
    matrix = shaped.flatten().to_numpy(zero_copy_only=False).reshape(len(shaped), dims)
    # A null inside a vector has become NaN here.
    usable = np.isfinite(matrix).all(axis=1) & matrix.any(axis=1)
    bad[np.flatnonzero(~bad)[~usable]] = True
    return matrix[usable], bad
