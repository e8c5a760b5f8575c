"""Posting lists by byte range: a list is one run of bytes of its segment's file, and the directory says where its columns lie."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import FileRef, Partition
from pipeline.schemas import DIRECTORY, made_by
from pipeline.storage import RangeRead, Store
from pipeline.tables import RawFile, is_as_written

__all__ = ["Directory", "Entries", "ListsFile"]

COLUMNS = ("code", "factor", "offset", "row")
ROW_BYTES = 4


class Directory:
    """Where the posting lists of a partition lie, by list, then segment.

    Args:
        table: Rows of DIRECTORY, in any order.
    """

    def __init__(self, table: pa.Table) -> None:
        columns = {name: table[name].to_numpy() for name in DIRECTORY.names}
        order = np.lexsort((columns["segment"], columns["list_no"]))
        self._columns = {name: column[order].astype(np.int64) for name, column in columns.items()}

    def __getitem__(self, column: str) -> NDArray[np.int64]:
        return self._columns[column]

    def rows_of(self, lists: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the directory that belong to lists, list by list."""
        numbers = self._columns["list_no"]
        starts, stops = np.searchsorted(numbers, lists), np.searchsorted(numbers, lists, side="right")
        if (stops - starts == 1).all():
            return starts
        return np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])


class Entries(NamedTuple):
    """Entries of posting lists."""

    code: NDArray[np.uint8]
    """(n, code_bytes)."""
    factor: NDArray[np.float16]
    offset: NDArray[np.float16]
    row: NDArray[np.int32]
    """Of the partition."""

    def only(self, kept: NDArray[np.bool_]) -> "Entries":
        """Some of them."""
        return Entries(self.code[kept], self.factor[kept], self.offset[kept], self.row[kept])

    @classmethod
    def joined(cls, pieces: list["Entries"]) -> "Entries":
        """All of them, in order."""
        return pieces[0] if len(pieces) == 1 else cls(*map(np.concatenate, zip(*pieces, strict=True)))


class ListsFile:
    """Posting lists of one segment.

    Args:
        store: The root.
        ref: The file, as the manifest records it.
        partition: That it belongs to.
    """

    def __init__(self, store: Store, ref: FileRef, partition: Partition) -> None:
        self._store = store
        self._ref = ref
        self._made = made_by(partition.space, partition.codes.binarizer)
        self._code_bytes = partition.codes.code_bytes
        self._decoded: RawFile | None = None
        self._opened = False
        self._bytes = self._requests = 0

    @property
    def bytes_read(self) -> int:
        """So far, by lists."""
        return self._bytes + (self._decoded.bytes_read if self._decoded is not None else 0)

    @property
    def requests(self) -> int:
        """So far, by lists."""
        return self._requests + (self._decoded.requests if self._decoded is not None else 0)

    def open(self) -> None:
        """See whether the file is as it was written, and what made it.

        Raises:
            IncompatibleModelsError: Its codes are of another binarizer, or its vectors of another encoder.
            MissingFileError: It is not there.
        """
        if not self._opened and not is_as_written(self._store, self._ref, self._made):
            self._decoded = RawFile(self._store, self._ref, COLUMNS, self._made)
        self._opened = True

    @property
    def path(self) -> str:
        """Of the file."""
        return self._ref.path

    def ranges(self, directory: Directory, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Bytes [start, stop) of lists of this segment; none where the file must be decoded.

        Args:
            directory: Of the partition.
            rows: Rows of the directory, all of this segment.
        """
        self.open()
        if self._decoded is not None:
            return []
        ends = directory["row_at"][rows] + ROW_BYTES * directory["num_entries"][rows]
        return list(zip(directory["list_at"][rows].tolist(), ends.tolist(), strict=True))

    def entries(self, directory: Directory, rows: NDArray[np.int64], fetched: RangeRead) -> list[Entries]:
        """Entries of each of these lists, from the bytes of their `ranges`."""
        self._bytes += fetched.bytes_read
        self._requests += fetched.requests
        if self._decoded is not None:
            return self._by_decoding(self._decoded, directory, rows)
        return self._parsed(directory, rows, fetched)

    @cached_property
    def rows(self) -> NDArray[np.int32]:
        """`row` of every entry of the file, by entry; kept."""
        self.open()
        file = self._decoded or RawFile(self._store, self._ref, ["row"], self._made)
        before = file.bytes_read, file.requests
        found = file.read_all("row").view(np.int32).reshape(-1)
        if self._decoded is None:
            self._bytes += file.bytes_read - before[0]
            self._requests += file.requests - before[1]
        return found

    def _parsed(self, directory: Directory, rows: NDArray[np.int64], fetched: RangeRead) -> list[Entries]:
        starts, count = directory["list_at"][rows], directory["num_entries"][rows]
        at = np.stack([directory[f"{name}_at"][rows] - starts for name in COLUMNS], axis=1)
        return [
            Entries(
                np.frombuffer(data, np.uint8, n * self._code_bytes, code).reshape(n, -1),
                np.frombuffer(data, np.float16, n, factor),
                np.frombuffer(data, np.float16, n, offset),
                np.frombuffer(data, np.int32, n, row),
            )
            for data, (code, factor, offset, row), n in zip(
                fetched.chunks, at.tolist(), count.tolist(), strict=True
            )
        ]

    def _by_decoding(self, file: RawFile, directory: Directory, rows: NDArray[np.int64]) -> list[Entries]:
        first, count = directory["first_entry"][rows], directory["num_entries"][rows]
        spans = list(zip(first.tolist(), (first + count).tolist(), strict=True))
        columns = [file.read(name, spans) for name in COLUMNS]
        return [
            Entries(
                code,
                factor.view(np.float16).reshape(-1),
                offset.view(np.float16).reshape(-1),
                row.view(np.int32).reshape(-1),
            )
            for code, factor, offset, row in zip(*columns, strict=True)
        ]
