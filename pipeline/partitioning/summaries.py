"""What the attributes of some rows are: least and greatest value, nulls, few distinct values or a Bloom filter. Pure.

One row a partition, two to five columns an attribute: `NAME.nulls`, of scalars `NAME.min` and `NAME.max`, then
`NAME.values`, null where they are more than `FEW`, and `NAME.bloom`, null where even that would say yes to most.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.filters import Region, Value, Values

__all__ = ["merged", "region_of", "summary_of", "summary_schema"]

FEW = 64
"""Distinct values that are written out."""
MOST_HASHED = 4096
"""Distinct values that a Bloom filter is made of: at that it is wrong of every fifth value that does not occur."""
BLOOM_BITS = 1 << 14
HASHES = 4
MOST_CHARS = 256
"""Of a string that is written out."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def summary_schema(attributes: pa.Schema) -> pa.Schema:
    """Columns that describe rows with these attributes."""
    fields: list[pa.Field] = []
    for attribute in attributes:
        kind = _scalar(attribute.type)
        ends = [] if pa.types.is_list(attribute.type) else [("min", kind), ("max", kind)]
        columns = [("nulls", pa.int64()), *ends, ("values", pa.list_(kind)), ("bloom", pa.binary())]
        fields += [pa.field(f"{attribute.name}.{name}", of) for name, of in columns]
    return pa.schema(fields)


def _scalar(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) else kind


def summary_of(rows: pa.Table, attributes: pa.Schema) -> pa.Table:
    """One row of `summary_schema`.

    Args:
        rows: n rows with the attributes.
        attributes: Which these are.
    """
    found: dict[str, Any] = {}
    for attribute in attributes:
        found |= {f"{attribute.name}.{name}": of for name, of in _described(rows[attribute.name]).items()}
    return pa.Table.from_pylist([found], schema=summary_schema(attributes))


def _described(column: pa.ChunkedArray) -> dict[str, Any]:
    is_list = pa.types.is_list(column.type)
    nulls = column.null_count
    scalars = (pc.list_flatten(column) if is_list else column).drop_null()
    is_instant = pa.types.is_timestamp(scalars.type)
    if is_instant:  # as numbers: an instant may lie beyond the years that Python has
        scalars = scalars.cast(pa.int64())
    distinct = pc.unique(scalars)
    found = {"nulls": nulls, **({} if is_list else _ends(scalars, is_instant=is_instant))}
    values = distinct.to_pylist() if len(distinct) <= MOST_HASHED else None
    if values is not None and len(values) <= FEW:
        written = [_instant(value) for value in values] if is_instant else values
        if all(_is_written_out(value) for value in written):
            return found | {"values": sorted(written)}
    return found | {"bloom": None if values is None else _bloom(values).tobytes()}


def _ends(scalars: pa.ChunkedArray, *, is_instant: bool) -> dict[str, Any]:
    has_nan = pa.types.is_floating(scalars.type) and bool(pc.any(pc.is_nan(scalars)).as_py())
    if has_nan:
        scalars = scalars.filter(pc.invert(pc.is_nan(scalars)))
    ends = pc.min_max(scalars)
    low, high = ends["min"].as_py(), ends["max"].as_py()
    if is_instant:
        low, high = (None if end is None else _instant(end) for end in (low, high))
    # NaN is greater than all numbers, and no end is written that would not compare with others.
    found = {"min": low, "max": None if has_nan else high}
    return {name: end for name, end in found.items() if end is not None and _is_written_out(end)}


def _instant(microseconds: int) -> datetime | None:
    """None beyond the years that Python has."""
    try:
        return EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        return None


def _is_written_out(value: Any) -> bool:
    """Whether it is no long string, no NaN and not unknown."""
    if isinstance(value, str):
        return len(value) <= MOST_CHARS
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _bloom(values: Iterable[Value]) -> NDArray[np.uint8]:
    bits = np.zeros(BLOOM_BITS, np.bool_)
    for value in values:
        bits[_places(value)] = True
    return np.packbits(bits)


def _places(value: Value) -> NDArray[np.int64]:
    digest = hashlib.blake2b(_key(value), digest_size=2 * HASHES).digest()
    return np.frombuffer(digest, "<u2").astype(np.int64) % BLOOM_BITS


def _key(value: Value) -> bytes:
    if isinstance(value, datetime):
        return str((value - EPOCH) // timedelta(microseconds=1)).encode()
    # + 0.0 because -0.0 and 0.0 are one value.
    return (repr(value + 0.0) if isinstance(value, float) else str(value)).encode()


def merged(summaries: Sequence[pa.Table], attributes: pa.Schema) -> pa.Table:
    """One summary of the rows of all.

    Args:
        summaries: Of `summary_of`, at least one, none of no rows.
        attributes: Which they describe.
    """
    if len(summaries) == 1:
        return summaries[0]
    rows = [one.to_pylist()[0] for one in summaries]
    found: dict[str, Any] = {}
    for attribute in attributes:
        own = [{name: row.get(f"{attribute.name}.{name}") for name in COLUMNS} for row in rows]
        is_list = pa.types.is_list(attribute.type)
        found |= {f"{attribute.name}.{name}": of for name, of in _joined(own, is_list=is_list).items()}
    return pa.Table.from_pylist([found], schema=summary_schema(attributes))


COLUMNS = ("nulls", "min", "max", "values", "bloom")


def _joined(own: list[dict[str, Any]], *, is_list: bool) -> dict[str, Any]:
    # An end that is absent is unknown, but where there is no value at all.
    valued = [one for one in own if one["values"] != []]
    found: dict[str, Any] = {"nulls": sum(one["nulls"] for one in own)}
    if not is_list:
        for name, pick in (("min", min), ("max", max)):
            ends = [one[name] for one in valued]
            found[name] = pick(ends) if ends and None not in ends else None
    if all(one["values"] is not None for one in own):
        values = sorted({value for one in own for value in one["values"]})
        return found | ({"values": values} if len(values) <= FEW else {"bloom": _bloom(values).tobytes()})
    blooms = [_bloom(one["values"]).tobytes() if one["values"] is not None else one["bloom"] for one in own]
    return found | {"bloom": None if None in blooms else _union(blooms)}


def _union(blooms: Sequence[bytes]) -> bytes | None:
    bits = np.bitwise_or.reduce([np.frombuffer(one, np.uint8) for one in blooms])
    return bits.tobytes() if np.unpackbits(bits).mean() <= WORTH else None


WORTH = 0.7
"""Share of the bits that may be set: a Bloom filter of more says yes to every fourth value."""


def region_of(summary: dict[str, Any], attributes: pa.Schema) -> Region:
    """What the rows can have that a row of `summary_schema` describes."""
    return Region({one.name: _values(summary, one.name, one.type) for one in attributes})


def _values(summary: dict[str, Any], name: str, kind: pa.DataType) -> Values:
    null = summary[f"{name}.nulls"] > 0
    values, bloom = summary[f"{name}.values"], summary[f"{name}.bloom"]
    occurs = _tester(values, bloom)
    if pa.types.is_list(kind):
        return Values(null=null, occurs=occurs)
    if values is not None:
        points = tuple(edge for value in sorted(values) for edge in ((value, False), (value, True)))
        return Values(null=null, from_start=False, edges=points)
    low, high = summary[f"{name}.min"], summary[f"{name}.max"]
    edges = (*(() if low is None else ((low, False),)), *(() if high is None else ((high, True),)))
    return Values(null=null, from_start=low is None, edges=edges, occurs=occurs)


def _tester(values: list[Any] | None, bloom: bytes | None) -> Callable[[Value], bool] | None:
    if values is not None:
        return frozenset(values).__contains__
    if bloom is None:
        return None
    bits = np.unpackbits(np.frombuffer(bloom, np.uint8)).astype(np.bool_)
    return lambda value: bool(bits[_places(value)].all())
