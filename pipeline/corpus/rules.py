"""What a row must be, value by value: the plain path, and the words of every reason in the dead letters.

`columns` holds the same rules for whole Arrow columns; a test holds the two equal.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Attribute

__all__ = [
    "EMBEDDING_NOT_FINITE",
    "EMBEDDING_NULL",
    "EMBEDDING_WITH_NULLS",
    "EMBEDDING_ZERO",
    "ID_EMPTY",
    "ID_NULL",
    "LINE_TOO_LONG",
    "MAX_ID_BYTES",
    "NOT_AN_OBJECT",
    "TEXT_EMPTY",
    "UNREADABLE",
    "BadRow",
    "BadRowError",
    "CheckedRow",
    "RowSpec",
    "check_row",
    "kind_of",
    "kind_of_reason",
    "parse_timestamp",
]

ID_NULL = "id is null"
ID_EMPTY = "id is empty"
MAX_ID_BYTES = 1024
"""A row group of ids is one page, which readers hold whole."""
TEXT_EMPTY = "text is empty"
NOT_AN_OBJECT = "row is not a JSON object"
LINE_TOO_LONG = "line is longer than 64 MiB"
UNREADABLE = "its page cannot be decoded"
EMBEDDING_NULL = "embedding is null"
EMBEDDING_WITH_NULLS = "embedding has null values"
EMBEDDING_NOT_FINITE = "embedding has NaN or infinite values"
EMBEDDING_ZERO = "embedding has zero length"

MAX_INT, MIN_INT = 2**63 - 1, -(2**63)
KINDS = {type(None): "null", bool: "bool", int: "int", float: "float", dict: "object", list: "list"}
SHOWN_CHARS = 40
"""Characters of a bad value that its reason repeats."""


@dataclass(frozen=True)
class RowSpec:
    """Which column means what."""

    id: str
    text: tuple[str, ...]
    separator: str
    attributes: tuple[Attribute, ...]
    embedding: str | None
    dims: int | None
    """Width of the ready-made vectors; None where texts are encoded."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read, each once."""
        named = (self.id, *self.text, *(a.name for a in self.attributes))
        return tuple(dict.fromkeys((*named, self.embedding) if self.embedding is not None else named))


class BadRow(NamedTuple):
    """A row set aside."""

    row: int
    doc_id: str | None
    """Null where the id itself is the fault."""
    reason: str


class CheckedRow(NamedTuple):
    """A row that can be used."""

    doc_id: str
    text: str | None
    vector: NDArray[np.float64] | None
    """(d,) as it was given, not yet of unit length."""
    attributes: list[Any]


class BadRowError(ValueError):
    """Why a row cannot be used; the readers catch it and set the row aside."""

    def __init__(self, reason: str, doc_id: str | None = None) -> None:
        super().__init__(reason, doc_id)
        self.reason = reason
        self.doc_id = doc_id


def check_row(spec: RowSpec, row: Mapping[str, Any]) -> CheckedRow:
    """Check the values of one row; strings may come as bytes that are yet to be decoded.

    Raises:
        BadRowError: The first rule that the row breaks, in the order id, text, embedding, attributes.
    """
    doc_id = _check_id(row.get(spec.id), spec.id)
    try:
        text = _check_text(spec, row)
        vector = _check_embedding(row.get(spec.embedding), spec.dims) if spec.embedding is not None else None
        attributes = [_check_attribute(a, row.get(a.name)) for a in spec.attributes]
    except BadRowError as error:
        raise BadRowError(error.reason, doc_id) from error
    return CheckedRow(doc_id, text, vector, attributes)


def kind_of(value: Any) -> str:
    """Our word for the type of a value."""
    return KINDS.get(type(value), "string")


def kind_of_reason(reason: str) -> str:
    """A reason without the numbers and quoted values in it, for counting."""
    return re.sub(r"'.*'|-?\d[\d.]*", "…", reason)


def parse_timestamp(text: str) -> datetime:
    """ISO 8601 in UTC, at a resolution of microseconds; without an offset it is taken as UTC.

    Raises:
        ValueError: Not ISO 8601.
        OverflowError: The offset moves it out of the years 1 to 9999.
    """
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _check_id(value: Any, column: str) -> str:
    if value is None:
        raise BadRowError(ID_NULL)
    if kind_of(value) == "int":
        return str(value)
    if not isinstance(value, str | bytes):
        raise BadRowError(f"id is not a string or integer: found {kind_of(value)}")
    doc_id = _check_string(value, column)
    if not doc_id:
        raise BadRowError(ID_EMPTY)
    if len(doc_id.encode()) > MAX_ID_BYTES:
        raise BadRowError(f"id has more than {MAX_ID_BYTES} bytes")
    return doc_id


def _check_text(spec: RowSpec, row: Mapping[str, Any]) -> str | None:
    values = [_check_string(row[c], c) for c in spec.text if row.get(c) is not None]
    parts = [value for value in values if value and not value.isspace()]
    if not parts and spec.embedding is None:
        raise BadRowError(TEXT_EMPTY)
    return spec.separator.join(parts) if parts else None


def _check_string(value: Any, column: str) -> str:
    if not isinstance(value, str | bytes):
        raise BadRowError(f"{column} is not a string: found {kind_of(value)}")
    try:
        text = value if isinstance(value, str) else value.decode()
        # A lone surrogate from JSON is text that UTF-8 cannot hold.
        text.encode()
    except UnicodeError as error:
        raise BadRowError(f"invalid UTF-8 in column {column}") from error
    if "\0" in text:
        raise BadRowError(f"NUL character in column {column}")
    return text


def _check_embedding(value: Any, dims: int | None) -> NDArray[np.float64]:
    if value is None:
        raise BadRowError(EMBEDDING_NULL)
    if not isinstance(value, list) or not {type(x) for x in value} <= {int, float, type(None)}:
        raise BadRowError(f"embedding is not a list of numbers: found {kind_of(value)}")
    if len(value) != dims:
        raise BadRowError(f"embedding has {len(value)} dimensions, expected {dims}")
    if None in value:
        raise BadRowError(EMBEDDING_WITH_NULLS)
    vector = _finite(value)
    if not vector.any():
        raise BadRowError(EMBEDDING_ZERO)
    return vector


def _finite(value: Sequence[float]) -> NDArray[np.float64]:
    try:
        vector = np.array(value, dtype=np.float64)
    except OverflowError as error:
        raise BadRowError(EMBEDDING_NOT_FINITE) from error
    if not np.isfinite(vector).all():
        raise BadRowError(EMBEDDING_NOT_FINITE)
    return vector


def _check_attribute(attribute: Attribute, value: Any) -> Any:
    if value is None:
        return None
    place = attribute.name
    found: Any = None
    match attribute.type:
        case "string" if isinstance(value, str | bytes):
            found = _check_string(value, place)
        case "list<string>" if isinstance(value, list) and all(_is_string_or_null(x) for x in value):
            found = [None if x is None else _check_string(x, place) for x in value]
        case "timestamp" if isinstance(value, str | bytes):
            found = _timestamp(_check_string(value, place))
        case "bool" if isinstance(value, bool):
            found = value
        case "int" | "float" if kind_of(value) in {"int", "float"}:
            found = _integer(value) if attribute.type == "int" else _double(value)
    if found is None:
        raise BadRowError(f"attribute {place}: expected {attribute.type}, found {_shown(value)}")
    return found


def _is_string_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str | bytes)


def _timestamp(text: str) -> datetime | None:
    try:
        return parse_timestamp(text)
    except (ValueError, OverflowError):
        return None


def _integer(value: float) -> int | None:
    is_whole = math.isfinite(value) and value == math.floor(value)
    return int(value) if is_whole and MIN_INT <= value <= MAX_INT else None


def _double(value: float) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return kind_of(value)
    text = repr(value.decode() if isinstance(value, bytes) else value)
    return f"{kind_of(value)} {text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + '…'}"
