"""Arrow columns of a corpus as columns of ours: plain types, null where a value breaks a rule, and where that is.

The rules are those of `rules`, value for value; `columns` puts them together to rows.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import ARROW_TYPES
from pipeline.corpus.rules import MAX_ID_BYTES, MAX_INT, MIN_INT, RowSpec, parse_timestamp

__all__ = [
    "LIST_OF_NUMBERS",
    "Converted",
    "converted",
    "family_of",
    "ids_of",
    "joined_text",
    "raw_bytes",
    "usable_vectors",
]

LIST_OF_NUMBERS = "list of numbers"
"""Family of columns that can hold ready-made vectors."""

Mask = NDArray[np.bool_]


class Converted(NamedTuple):
    """A column in a type of ours."""

    values: pa.Array
    """Null wherever `bad` is set."""
    bad: Mask


def family_of(kind: pa.DataType) -> str:
    """Our name for an Arrow type: one of the attribute types, `null`, `list of numbers`, or Arrow's own name."""
    if pa.types.is_dictionary(kind):
        return family_of(kind.value_type)
    if _is_list(kind):
        inner = family_of(kind.value_type)
        named = {
            "string": "list<string>",
            "null": "list<string>",
            "int": LIST_OF_NUMBERS,
            "float": LIST_OF_NUMBERS,
        }
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


# ------------------------------------------------------------------------------------------------ types


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def raw_bytes(array: pa.Array) -> pa.Array:
    """Strings as bytes, which need not be UTF-8; any other column as it is."""
    array = _decoded(array)
    if _is_string(array.type):
        return array.cast(pa.binary())
    if _is_list(array.type) and family_of(array.type) == "list<string>":
        return array.cast(pa.list_(pa.binary()))
    return array


def _mask(values: pa.Array) -> Mask:
    return values.fill_null(False).to_numpy(zero_copy_only=False)


def _none_bad(array: pa.Array) -> Mask:
    return np.zeros(len(array), dtype=np.bool_)


def _nulled(array: pa.Array, bad: Mask) -> pa.Array:
    return pc.if_else(pa.array(bad), pa.scalar(None, array.type), array) if bad.any() else array


# ------------------------------------------------------------------------------------------------ strings


def ids_of(array: pa.Array) -> Converted:
    """Document ids as strings; integers in decimal. Null, empty and overlong ids are bad."""
    array = _decoded(array)
    if family_of(array.type) == "int":
        values, bad = array.cast(pa.string()), _none_bad(array)
    else:
        values, bad = _strings(array)
    missing = _mask(pc.equal(values, "")) | _mask(values.is_null())
    return Converted(values, bad | missing | _mask(pc.greater(pc.binary_length(values), MAX_ID_BYTES)))


def joined_text(spec: RowSpec, columns: Mapping[str, pa.Array]) -> Converted:
    """Text of each row; without any it is null, and bad unless the vectors are ready-made."""
    found = [_strings(columns[name]) for name in spec.text]
    rows = len(columns[spec.id])
    if not found:
        return Converted(pa.nulls(rows, pa.string()), np.zeros(rows, dtype=np.bool_))
    blank = [_is_blank(c.values) for c in found]
    is_empty = np.logical_and.reduce(blank)
    # The join skips nulls and, in pyarrow 26, leaves out a row that has nothing else: the first part keeps it in.
    parts = [_nulled(c.values, is_blank) for c, is_blank in zip(found, blank, strict=True)]
    parts[0] = pc.if_else(pa.array(is_empty), "", parts[0])
    joined = pc.binary_join_element_wise(*parts, spec.separator, null_handling="skip")
    bad = np.logical_or.reduce([c.bad for c in found])
    return Converted(_nulled(joined, is_empty), bad | is_empty if spec.embedding is None else bad)


def _is_blank(values: pa.Array) -> Mask:
    return _mask(values.is_null()) | _mask(pc.equal(values, "")) | _mask(pc.utf8_is_space(values))


def _strings(array: pa.Array) -> Converted:
    """Any string column, or one of nulls, as plain strings; bad where not UTF-8 or with a NUL."""
    array = _decoded(array)
    if pa.types.is_null(array.type):
        return Converted(array.cast(pa.string()), _none_bad(array))
    raw = array.cast(pa.binary())
    values = raw.cast(pa.string(), safe=False)
    if _is_clean(values):
        return Converted(values, _none_bad(array))
    bad = np.array([_is_bad_string(x) for x in raw.to_pylist()])
    return Converted(_nulled(raw, bad).cast(pa.string()), bad)


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


def _string_lists(array: pa.Array) -> Converted:
    kind = ARROW_TYPES["list<string>"]
    raw = raw_bytes(array)
    strings = raw.flatten()
    if _is_clean(strings.cast(pa.string(), safe=False)):
        # The cast looks at all strings of the buffer, those of rows outside this slice too.
        own = raw if len(strings) == len(raw.values) else raw.take(pa.array(np.arange(len(raw))))
        return Converted(own.cast(kind), _none_bad(array))
    rows = raw.to_pylist()
    bad = np.array([any(_is_bad_string(x) for x in row or []) for row in rows])
    clean = [None if is_bad else row for row, is_bad in zip(rows, bad, strict=True)]
    return Converted(pa.array(clean, raw.type).cast(kind), bad)


# ------------------------------------------------------------------------------------------------ attributes


def converted(array: pa.Array, target: str) -> Converted:
    """A column as an attribute of a type; the plan has made sure that the pair of types is a permitted one."""
    array = _decoded(array)
    source = family_of(array.type)
    kind = ARROW_TYPES[target]
    if source in ("null", "bool"):
        return Converted(array.cast(kind), _none_bad(array))
    if target == "string":
        return _strings(array)
    if target == "list<string>":
        return _string_lists(array)
    if target == "timestamp":
        return _parsed_timestamps(array) if source == "string" else _timestamps(array)
    return _integers(array) if target == "int" else Converted(array.cast(kind, safe=False), _none_bad(array))


def _timestamps(array: pa.Array) -> Converted:
    # Naive times are UTC; finer ones lose what is below a microsecond.
    micros = array.cast(pa.timestamp("us", getattr(array.type, "tz", None)), safe=False)
    return Converted(micros.cast(ARROW_TYPES["timestamp"]), _none_bad(array))


def _integers(array: pa.Array) -> Converted:
    if pa.types.is_floating(array.type):
        # A column of integers with nulls that went through pandas is one of floats.
        values = array.cast(pa.float64())
        is_whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(values, float(MAX_INT)))
        fits = pc.and_(is_whole, pc.greater_equal(values, float(MIN_INT)))
        bad = ~_mask(fits) & _mask(values.is_valid())
        return Converted(_nulled(values, bad).cast(pa.int64()), bad)
    if pa.types.is_uint64(array.type):
        bad = _mask(pc.greater(array, pa.scalar(MAX_INT, pa.uint64())))
        return Converted(_nulled(array, bad).cast(pa.int64()), bad)
    return Converted(array.cast(pa.int64()), _none_bad(array))


def _parsed_timestamps(array: pa.Array) -> Converted:
    strings, bad = _strings(array)
    values = []
    for i, text in enumerate(strings.to_pylist()):
        try:
            values.append(None if text is None else parse_timestamp(text))
        except (ValueError, OverflowError):
            values.append(None)
            bad[i] = True
    return Converted(pa.array(values, ARROW_TYPES["timestamp"]), bad)


# ------------------------------------------------------------------------------------------------ vectors


def usable_vectors(array: pa.Array, dims: int) -> tuple[NDArray[np.floating], Mask]:
    """Vectors of the rows that are not bad, (m, d) in their own type, and which rows are bad, (n,)."""
    if pa.types.is_null(array.type):
        return np.zeros((0, dims)), np.ones(len(array), dtype=np.bool_)
    bad = ~_mask(pc.equal(pc.list_value_length(array), dims))
    shaped = array.filter(pa.array(~bad))
    matrix = shaped.flatten().to_numpy(zero_copy_only=False).reshape(len(shaped), dims)
    # A null inside a vector has become NaN here.
    usable = np.isfinite(matrix).all(axis=1) & matrix.any(axis=1)
    bad[np.flatnonzero(~bad)[~usable]] = True
    return matrix[usable], bad
