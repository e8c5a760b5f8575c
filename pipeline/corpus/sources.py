"""The corpus's files: which ones a URI means, and their bytes, through the store so that its retries apply."""

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pipeline.config import CorpusConfig, StorageConfig
from pipeline.errors import DataError, MissingFileError
from pipeline.storage import ObjectInfo, Store, is_remote, open_store, split_uri

__all__ = ["SourceFiles", "content_of", "find_source_files", "read_pieces"]

ENDINGS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".json", ".ndjson")}
BUCKET_SLASHES = 2
"""Slashes of a URI that is a whole bucket: s3://bucket."""
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
    listed = _listed(uri, storage)
    if [f.path for f in listed] == [""]:
        folder, name = split_uri(uri)
        return SourceFiles(folder, [replace(listed[0], path=name)])
    endings = ENDINGS[config.format]
    found = [f for f in listed if f.path.endswith(endings) and not _is_hidden(f.path)]
    return SourceFiles(uri, _some(found, len(listed), config.uri, f"ends in {' or '.join(endings)}"))


def read_pieces(store: Store, path: str, start: int, stop: int) -> Iterator[bytes]:
    """Bytes [start, stop) of a file, in pieces of 8 MiB."""
    for first in range(start, stop, PIECE_BYTES):
        yield store.read_ranges(path, [(first, min(stop, first + PIECE_BYTES))]).chunks[0]


def content_of(store: Store, file: ObjectInfo) -> str:
    """The store's etag, or the sha256 of the bytes where the store, a local disk, has none."""
    if file.etag:
        return file.etag
    found = (Path(store.uri) / file.path).stat()
    return _sha256(store.uri, file.path, file.size, found.st_ino, found.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256(uri: str, path: str, size: int, inode: int, changed_ns: int) -> str:
    """Hash of a local file in one state: a worker that reads many shards of it reads it through once.

    The time of the last change of the inode cannot be set back, unlike that of the content.
    """
    del inode, changed_ns
    digest = hashlib.sha256()
    for piece in read_pieces(open_store(uri), path, 0, size):
        digest.update(piece)
    return digest.hexdigest()


def _absolute(uri: str) -> str:
    path = uri.removeprefix("file://")
    return uri.rstrip("/") if "://" in path else str(Path(path).absolute())


def _listed(uri: str, storage: StorageConfig) -> list[ObjectInfo]:
    """All objects below a URI, with paths relative to it; one of an empty path where it is a file itself."""
    if is_remote(uri) and uri.count("/") == BUCKET_SLASHES:
        return list(open_store(uri, storage).list(""))
    folder, name = split_uri(uri)
    found = open_store(folder, storage).list(name)
    return [replace(f, path=f.path.removeprefix(name).removeprefix("/")) for f in found]


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
