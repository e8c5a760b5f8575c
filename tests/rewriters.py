"""Other tools that write a Parquet file of ours anew: the same table in other bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow.parquet as pq


def _by_pyarrow(**options: Any) -> Callable[[Path, Path], None]:
    return lambda source, target: pq.write_table(pq.read_table(source), target, **options)


def _by_duckdb(source: Path, target: Path) -> None:
    duckdb.sql(f"COPY (SELECT * FROM read_parquet('{source}')) TO '{target}' (FORMAT parquet)")


def _by_polars(source: Path, target: Path) -> None:
    pl.read_parquet(source).write_parquet(target)


REWRITERS: dict[str, Callable[[Path, Path], None]] = {
    "pyarrow": _by_pyarrow(),
    "pyarrow plain": _by_pyarrow(compression="none", use_dictionary=False),
    "pyarrow small pages": _by_pyarrow(compression="none", use_dictionary=False, data_page_size=64),
    "pyarrow pages v2": _by_pyarrow(compression="none", use_dictionary=False, data_page_version="2.0"),
    "pyarrow byte stream split": _by_pyarrow(
        compression="none",
        use_dictionary=["doc_id"],
        use_byte_stream_split=["vector_id", "head", "code", "row"],
    ),
    "pyarrow one row group": _by_pyarrow(compression="none", use_dictionary=False, row_group_size=10_000),
    "duckdb": _by_duckdb,
    "polars": _by_polars,
}
