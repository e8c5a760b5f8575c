"""WHERE texts with places for values of the row that asks: `year >= {q.year}`."""

import math
import re
from collections.abc import Sequence
from datetime import date
from typing import Any, Final

import pyarrow as pa

from pipeline.errors import SchemaMismatchError

__all__ = ["with_constants"]

PLACE: Final = re.compile(r"\{q\.([^{}]+)\}")
QUOTED: Final = re.compile(r"'\{q\.[^{}]+\}'")


def with_constants(texts: Sequence[str | None], rows: pa.Table, *, place: str) -> list[str | None]:
    """Put the values of rows into the texts of their filters; NULL for a null or NaN: comparisons with it hold for nothing.

    Args:
        texts: Of each row, or None.
        rows: As many rows, with the columns that the texts name.
        place: Where they come from, for errors.

    Raises:
        SchemaMismatchError: A column is missing, or a value is none that filters compare with.
    """
    quoted = next((text for text in texts if text is not None and QUOTED.search(text)), None)
    if quoted is not None:
        problem = f"{QUOTED.search(quoted)[0]} stands in quotes in {quoted}"  # type: ignore[index]
        raise SchemaMismatchError(place, problem, "leave them out: a string brings its own")
    names = sorted({name for text in set(texts) if text is not None for name in PLACE.findall(text)})
    absent = next((name for name in names if name not in rows.column_names), None)
    if absent is not None:
        known = ", ".join(rows.column_names)
        problem = f"a filter asks for {{q.{absent}}}, found columns {known}"
        raise SchemaMismatchError(place, problem, f"give the queries a column {absent}")
    if not names:
        return list(texts)
    columns = [[_literal(value, name, place) for value in rows[name].to_pylist()] for name in names]
    values = zip(*columns, strict=True)
    return [
        None if text is None else _filled(text, dict(zip(names, own, strict=True)))
        for text, own in zip(texts, values, strict=True)
    ]


def _filled(text: str, literals: dict[str, str]) -> str:
    return PLACE.sub(lambda found: literals[found[1]], text)


def _literal(value: Any, name: str, place: str) -> str:
    match value:
        case None:
            return "NULL"
        case bool():
            return str(value).upper()
        case str():
            return "'" + value.replace("'", "''") + "'"
        case date():  # which instants are, too
            return f"'{value.isoformat()}'"
        case float():
            # SQL has no literal for infinity; a number beyond the range of doubles reads as one.
            return "NULL" if math.isnan(value) else repr(value).replace("inf", "1e999")
        case int():
            return str(value)
    problem = f"expected a string, number, truth value or instant in `{name}`, found {value!r}"
    raise SchemaMismatchError(place, problem, "filters compare with nothing else")
