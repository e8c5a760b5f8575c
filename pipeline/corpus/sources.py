"""The corpus's files: which ones a URI means, and their bytes, through the store so that its retries apply."""

import hashlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from pipeline.config import CorpusConfig, StorageConfig
from pipeline.errors import DataError, MissingFileError
from pipeline.storage import ObjectInfo, Store, is_remote, open_store, split_uri

__all__ = ["RangeInput", "SourceFiles", "content_of", "find_source_files", "read_pieces"]

ENDINGS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".json", ".ndjson")}
PIECE_BYTES = 8 * 1024 * 1024
GLOB_TOKENS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


class SourceFiles(NamedTuple):
    """Files of the corpus, sorted by path."""

    folder: str
    """URI of the corpus folder; a local one is absolute, since workers have folders of their own."""
    files: list[ObjectInfo]
    """Paths relative to the folder."""


def find_source_files(config: CorpusConfig, storage: StorageConfig) -> SourceFiles:
    """Resolve a file, folder or glob.

    A folder gives all files below it with an ending of the format; a glob (`*`, `?`, `**`) gives what it matches. Both
    leave alone what starts with `.` or `_`, files or folders.

    Raises:
        MissingFileError: There is nothing at the URI.
        DataError: There are files, but none that fits.
    """
    uri = _absolute(config.uri)
    folder, pattern = _split_glob(uri)
    if pattern is not None:
        listed = list(open_store(folder, storage).list(""))
        fits = re.compile(_regex(pattern))
        found = [f for f in listed if fits.fullmatch(f.path) and not _is_hidden(f.path)]
        return SourceFiles(folder, _some(found, len(listed), config.uri, f"matches {pattern!r}"))
    parent, name = split_uri(uri)
    listed = list(open_store(parent, storage).list(name))
    if [f.path for f in listed] == [name]:
        return SourceFiles(parent, listed)
    inside = [replace(f, path=f.path.removeprefix(f"{name}/")) for f in listed]
    endings = ENDINGS[config.format]
    found = [f for f in inside if f.path.endswith(endings) and not _is_hidden(f.path)]
    return SourceFiles(uri, _some(found, len(listed), config.uri, f"ends in {' or '.join(endings)}"))


def read_pieces(store: Store, path: str, start: int, stop: int) -> Iterator[bytes]:
    """Bytes [start, stop) of a file, in pieces of 8 MiB."""
    for first in range(start, stop, PIECE_BYTES):
        yield store.read_ranges(path, [(first, min(stop, first + PIECE_BYTES))]).chunks[0]


def content_of(store: Store, file: ObjectInfo) -> str:
    """The store's etag, or the sha256 of the bytes where the store has none."""
    if file.etag:
        return file.etag
    digest = hashlib.sha256()
    for piece in read_pieces(store, file.path, 0, file.size):
        digest.update(piece)
    return digest.hexdigest()


class RangeInput(io.RawIOBase):
    """A seekable stream over range reads.

    Args:
        store: Where the file is.
        path: The file.
        size: Its size in bytes.
    """

    def __init__(self, store: Store, path: str, size: int) -> None:
        super().__init__()
        self._store = store
        self._path = path
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Where the next read starts."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, to the end if negative."""
        stop = self._size if size < 0 else min(self._size, self._position + size)
        if stop <= self._position:
            return b""
        data = self._store.read_ranges(self._path, [(self._position, stop)]).chunks[0]
        self._position = stop
        return data


def _absolute(uri: str) -> str:
    return uri.rstrip("/") if is_remote(uri) else os.path.abspath(uri.removeprefix("file://"))


def _split_glob(uri: str) -> tuple[str, str | None]:
    parts = uri.split("/")
    first = next((i for i, part in enumerate(parts) if "*" in part or "?" in part), None)
    return (uri, None) if first is None else ("/".join(parts[:first]) or "/", "/".join(parts[first:]))


def _regex(pattern: str) -> str:
    tokens = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return "".join(GLOB_TOKENS.get(token, re.escape(token)) for token in tokens)


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _some(found: list[ObjectInfo], num_listed: int, uri: str, condition: str) -> list[ObjectInfo]:
    if found:
        return found
    if not num_listed:
        raise MissingFileError(uri, "there is no such file or folder, or it is empty", "check corpus.uri")
    problem = f"none of its {num_listed} files {condition}"
    raise DataError(uri, problem, "check corpus.uri and corpus.format")
