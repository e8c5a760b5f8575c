"""Bytes at rest, on a local disk or on S3, behind one interface whose only conditional primitive is put-if-absent.

`open_store` gives the store of a URI; paths inside it are relative and use `/`. `Log` is the append-only log that
aliases, receipts and cache buckets are made of. Nothing here knows what the bytes mean (`tables` knows Parquet),
and nothing lists a folder to learn what is done: `list` serves planning a corpus and collecting garbage.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import tenacity

from pipeline.artifacts import FileRef
from pipeline.config import StorageConfig
from pipeline.errors import (
    ConfigError,
    CorruptArtifactError,
    MissingFileError,
    PipelineError,
    StorageUnavailableError,
)

__all__ = [
    "LocalStore",
    "Log",
    "ObjectInfo",
    "RangeRead",
    "S3Store",
    "Store",
    "adopt_file",
    "canonical_json",
    "exists",
    "is_remote",
    "is_whole",
    "open_store",
    "read_recorded",
    "sha256_of_file",
    "side_by_side",
    "split_uri",
    "write_recorded",
]

T = TypeVar("T")
R = TypeVar("R")

COALESCE_GAP_BYTES = 64 * 1024
"""Two ranges nearer than this are one request on S3: reads below ~100 KB cost the same there."""

READ_CHUNK_BYTES = 4 * 1024 * 1024

REFRESH_AGE = timedelta(hours=1)
"""A file older than this is written again when a worker needs it, so that a collector does not take it for an orphan."""

ACCESS_SECONDS = 8.0
"""How long a refused request is tried again: new rights and rotated keys take seconds to reach every server of a store."""

CONNECTIONS = 32
"""To one S3 server at once, further requests wait; botocore's own bound of 10 makes a query's lists come in several waves."""
REQUESTS_AT_ONCE = 16
"""Small requests wait for the store, not for the processor."""

PART_BYTES = 50 * 1024 * 1024
MAX_PARTS = 10_000
PARTS_AT_ONCE = 4

STAGING = ".staging"
"""Folder of unfinished files of a local store; listed only by its own name, to clear what a crash left there."""


@dataclass(frozen=True)
class ObjectInfo:
    """What the store says of one object."""

    path: str
    size: int
    modified: datetime
    """The store's own clock, in UTC."""
    etag: str
    """The store's content tag; empty on a local disk."""


@dataclass(frozen=True)
class RangeRead:
    """Bytes of several ranges, and what fetching them cost."""

    chunks: list[bytes]
    bytes_read: int
    requests: int


class Store(Protocol):
    """One folder or bucket prefix."""

    @property
    def uri(self) -> str:
        """Where the store is."""
        ...

    def read(self, path: str) -> bytes:
        """Whole content; MissingFileError if it is not there."""
        ...

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> RangeRead:
        """Bytes [start, stop) of each range, in the order given."""
        ...

    def read_many(self, wanted: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> "list[RangeRead]":
        """Ranges of several objects, in one round: as (path, ranges) of each."""
        ...

    def open_input(self, path: str) -> BinaryIO:
        """A seekable stream."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Store the content whole or not at all, replacing what is there."""
        ...

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Create the object if it does not exist; True if it now holds exactly `data`."""
        ...

    def adopt(self, local: Path, path: str) -> None:
        """Move a finished local file into the store, whole or not at all."""
        ...

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        """A local file path to write to before `adopt`; removed at the end if still there."""
        ...

    def head(self, path: str) -> ObjectInfo:
        """Size and age; MissingFileError if it is not there."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects below a prefix, sorted by path."""
        ...

    def delete(self, path: str) -> None:
        """Remove an object; fine if it is gone."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Keep an object under another path too, without its bytes travelling; MissingFileError if it is not there."""
        ...

    def uploads(self) -> Iterator[ObjectInfo]:
        """Writes that were begun and not finished; the etag tells two of one path apart."""
        ...

    def abort_upload(self, upload: ObjectInfo) -> None:
        """Give up an unfinished write; fine if it has ended."""
        ...


def is_remote(uri: str) -> bool:
    """Whether a URI names an S3 object."""
    return uri.startswith(("s3://", "s3a://"))


def open_store(uri: str, config: StorageConfig | None = None) -> Store:
    """The store of a local folder or an s3://bucket/prefix.

    Raises:
        ConfigError: The URI's scheme is neither.
    """
    if is_remote(uri):
        return S3Store(uri, config or StorageConfig())
    if "://" in uri and not uri.startswith("file://"):
        raise ConfigError(uri, "unknown kind of storage", "use a local path or s3://bucket/prefix")
    return LocalStore(uri.removeprefix("file://"))


def split_uri(uri: str) -> tuple[str, str]:
    """Folder and last part of a URI: `s3://b/x/y.parquet` → (`s3://b/x`, `y.parquet`)."""
    folder, slash, name = uri.rpartition("/")
    return (folder or "/", name) if slash else (".", name)


def canonical_json(value: Any) -> bytes:
    """One byte string for one JSON value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_of_file(path: Path) -> str:
    """Hex digest of a local file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adopt_file(store: Store, local: Path, folder: str, suffix: str) -> tuple[str, int, str]:
    """Store a local file under the hash of its content.

    Returns:
        Path in the store (`<folder>/<first 32 hex digits><suffix>`), size in bytes, sha256.
    """
    digest = sha256_of_file(local)
    size = local.stat().st_size
    path = f"{folder}/{digest[:32]}{suffix}"
    if not _is_present(store, path, size):
        store.adopt(local, path)
        found = store.head(path).size
        if found != size:
            raise StorageUnavailableError(
                f"{store.uri}/{path}", f"expected {size} bytes after the upload, found {found}"
            )
    return path, size, digest


def write_recorded(store: Store, path: str, data: bytes) -> FileRef:
    """Write all of a file that is no table; what `read_recorded` holds it against."""
    store.write(path, data)
    return FileRef(path=path, rows=0, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_recorded(store: Store, ref: FileRef) -> bytes:
    """All of a file, held against its recorded hash.

    Raises:
        CorruptArtifactError: Its bytes are not the recorded ones.
    """
    data = store.read(ref.path)
    digest = hashlib.sha256(data).hexdigest()
    if digest != ref.sha256:
        problem = f"expected sha256 {ref.sha256[:12]}…, found {digest[:12]}…"
        raise CorruptArtifactError(
            f"{store.uri}/{ref.path}", problem, "restore the file, or roll back to another release"
        )
    return data


def _is_present(store: Store, path: str, size: int) -> bool:
    found = _find(store, path)
    return found is not None and found.size == size and datetime.now(UTC) - found.modified < REFRESH_AGE


def _find(store: Store, path: str) -> ObjectInfo | None:
    """What the store says of an object; None where there is none."""
    try:
        return store.head(path)
    except MissingFileError:
        return None


def exists(store: Store, path: str) -> bool:
    """Whether there is an object."""
    return _find(store, path) is not None


def is_whole(store: Store, ref: FileRef) -> bool:
    """Whether there is an object of the recorded size."""
    found = _find(store, ref.path)
    return found is not None and found.size == ref.bytes


def side_by_side(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Results of small requests made at once, in the order of the items."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(call, items))


# ------------------------------------------------------------------------------------------------ local disk


class LocalStore:
    """A folder on a local disk; made at the first write."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    @property
    def uri(self) -> str:
        return str(self._folder)

    def read(self, path: str) -> bytes:
        with self._named(path):
            return (self._folder / path).read_bytes()

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> RangeRead:
        with self._named(path), _descriptor(f"{self._folder}/{path}") as file:
            chunks = [_pread(file, start, stop) for start, stop in ranges]
        _check_lengths(f"{self.uri}/{path}", ranges, chunks)
        return RangeRead(chunks, sum(map(len, chunks)), len(chunks))

    def read_many(self, wanted: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> list[RangeRead]:
        return [self.read_ranges(path, ranges) for path, ranges in wanted]

    def open_input(self, path: str) -> BinaryIO:
        with self._named(path):
            return (self._folder / path).open("rb")

    def write(self, path: str, data: bytes) -> None:
        with self._named(path), self.staging() as local:
            _write_through(local, data)
            self.adopt(local, path)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        # Linking a finished file is atomic and fails where the name exists; O_EXCL would show a half-written one.
        with self._named(path), self.staging() as local:
            _write_through(local, data)
            target = self._made(self._folder / path)
            try:
                os.link(local, target)
            except FileExistsError:
                return target.read_bytes() == data
            _sync_folder(target.parent)
            return True

    def adopt(self, local: Path, path: str) -> None:
        with self._named(path):
            target = self._made(self._folder / path)
            with local.open("rb") as file:
                os.fsync(file.fileno())
            local.replace(target)
            _sync_folder(target.parent)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        with self._named(STAGING):
            local = self._made(self._folder / STAGING / uuid.uuid4().hex)
        try:
            with _disk_may_fail(local):
                yield local
        finally:
            local.unlink(missing_ok=True)

    def head(self, path: str) -> ObjectInfo:
        with self._named(path):
            return self._info(path)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        base = self._folder / prefix
        found = [base] if base.is_file() else [p for p in base.rglob("*") if p.is_file()]
        for path in sorted(p.relative_to(self._folder).as_posix() for p in found):
            if path.startswith(f"{STAGING}/") and prefix != STAGING:
                continue
            with contextlib.suppress(FileNotFoundError):
                yield self._info(path)

    def delete(self, path: str) -> None:
        with contextlib.suppress(MissingFileError), self._named(path):
            (self._folder / path).unlink()

    def copy(self, source: str, target: str) -> None:
        # A second name for the same bytes: no file is changed after it was written.
        with self._named(source), self.staging() as local:
            os.link(self._folder / source, local)
            self.adopt(local, target)

    def uploads(self) -> Iterator[ObjectInfo]:
        return self.list(STAGING)

    def abort_upload(self, upload: ObjectInfo) -> None:
        self.delete(upload.path)

    def _made(self, target: Path) -> Path:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError) as error:
            raise ConfigError(str(target.parent), "is below a file", "name a folder") from error
        return target

    def _info(self, path: str) -> ObjectInfo:
        found = (self._folder / path).stat()
        if not stat.S_ISREG(found.st_mode):
            raise IsADirectoryError(path)
        return ObjectInfo(path, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC), "")

    @contextlib.contextmanager
    def _named(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise MissingFileError(f"{self.uri}/{path}", "there is no such file") from error
        except PermissionError as error:
            raise ConfigError(
                f"{self.uri}/{path}", f"no access ({error.strerror})", "name a folder that this user may use"
            ) from error
        except OSError as error:
            raise _disk_failed(f"{self.uri}/{path}", error) from error


DISK_TROUBLES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})


@contextlib.contextmanager
def _disk_may_fail(local: Path) -> Iterator[None]:
    """Whoever writes a staged file meets a full disk as our error; other errors pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_TROUBLES:
            raise
        raise _disk_failed(str(local.parent), error) from error


def _disk_failed(place: str, error: OSError) -> StorageUnavailableError:
    problem = f"the disk failed ({os.strerror(error.errno) if error.errno else error})"
    return StorageUnavailableError(place, problem, "free space or mend it, then rerun")


@contextlib.contextmanager
def _descriptor(path: str) -> Iterator[int]:
    """A file opened for `pread`, without the objects that a stream brings."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _pread(descriptor: int, start: int, stop: int) -> bytes:
    data = os.pread(descriptor, stop - start, start)
    if not data or len(data) == stop - start:
        return data
    # One call returns at most 2 GiB, and less than asked for when a signal comes.
    return data + _pread(descriptor, start + len(data), stop)


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A rename or a link is durable only when its folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_lengths(place: str, ranges: Sequence[tuple[int, int]], chunks: Sequence[bytes]) -> None:
    for (start, stop), chunk in zip(ranges, chunks, strict=True):
        if len(chunk) != stop - start:
            problem = f"expected {stop - start} bytes at {start}, found {len(chunk)}: the file is truncated"
            raise CorruptArtifactError(place, problem, "run `strata verify`")


# ------------------------------------------------------------------------------------------------ S3


class S3Store:
    """A bucket prefix, through s3fs with its listing cache off."""

    def __init__(self, uri: str, config: StorageConfig) -> None:
        self._uri = uri.rstrip("/")
        self._bucket, _, self._key_prefix = self._uri.split("://", 1)[1].partition("/")
        self._config = config

    @property
    def uri(self) -> str:
        return self._uri

    @functools.cached_property
    def _fs(self) -> Any:
        import s3fs

        fs = s3fs.S3FileSystem(
            endpoint_url=self._config.endpoint_url,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": CONNECTIONS,
            },
        )
        # `_request` retries; three nested loops of retries would make a dead endpoint take minutes to report.
        fs.retries = 1
        return fs

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_fs"}

    def read(self, path: str) -> bytes:
        # One stream: several need a HEAD first, and what is read whole is small.
        data: bytes = self._request(path, lambda key: self._fs.cat_file(key, max_concurrency=1))
        return data

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> RangeRead:
        merged, places = _coalesce(ranges)
        found: dict[tuple[int, int], bytes] = {}
        self._request(
            path, lambda key: self._fetch(key, [span for span in merged if span not in found], found)
        )
        blocks = [found[span] for span in merged]
        _check_lengths(f"{self.uri}/{path}", merged, blocks)
        chunks = [
            blocks[i][start - merged[i][0] : stop - merged[i][0]] if start < stop else b""
            for i, (start, stop) in zip(places, ranges, strict=True)
        ]
        return RangeRead(chunks, sum(map(len, blocks)), len(blocks))

    def read_many(self, wanted: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> list[RangeRead]:
        if len(wanted) == 1:
            return [self.read_ranges(*wanted[0])]
        return side_by_side(lambda one: self.read_ranges(*one), wanted)

    def _fetch(self, key: str, spans: Sequence[tuple[int, int]], found: dict[tuple[int, int], bytes]) -> None:
        """Add what comes of the spans to those found; a failure of some must not ask for all of them again."""
        starts, stops = [a for a, _ in spans], [b for _, b in spans]
        answers = self._fs.cat_ranges([key] * len(spans), starts, stops, on_error="return")
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        found |= {
            span: data
            for span, data in zip(spans, answers, strict=True)
            if not isinstance(data, BaseException)
        }
        if failures:
            raise next((failure for failure in failures if not _may_pass(failure)), failures[0])

    def open_input(self, path: str) -> BinaryIO:
        return io.BufferedReader(_S3Stream(self, path, self.head(path).size), READ_CHUNK_BYTES)

    def write(self, path: str, data: bytes) -> None:
        self._request(path, lambda key: self._fs.pipe_file(key, data))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        try:
            self._request(path, lambda key: self._fs.pipe_file(key, data, mode="create"))
        except FileExistsError:
            # A request that was retried after a lost answer can lose to itself.
            return self.read(path) == data
        return True

    def adopt(self, local: Path, path: str) -> None:
        size = local.stat().st_size
        if size < 2 * PART_BYTES:
            self._request(path, lambda key: self._fs.put_file(str(local), key))
        else:
            self._upload_parts(local, path, size)

    def _upload_parts(self, local: Path, path: str, size: int) -> None:
        """Each part is tried again alone: of a hundred parts one nearly always fails where one request in twenty does."""
        target = {"Bucket": self._bucket, "Key": self._key(path)}
        begun = self._request(path, lambda _: self._fs.call_s3("create_multipart_upload", **target))
        target["UploadId"] = begun["UploadId"]
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))

        def send(number: int) -> dict[str, Any]:
            with local.open("rb") as file:
                file.seek((number - 1) * part_bytes)
                part = {"PartNumber": number, "Body": file.read(part_bytes)}
            answer = self._request(path, lambda _: self._fs.call_s3("upload_part", **target, **part))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, -(-size // part_bytes) + 1)))
            self._complete(path, size, {**target, "MultipartUpload": {"Parts": parts}})
        except BaseException:
            with contextlib.suppress(PipelineError):
                self._request(path, lambda _: self._fs.call_s3("abort_multipart_upload", **target))
            raise

    def _complete(self, path: str, size: int, upload: dict[str, Any]) -> None:
        try:
            self._request(path, lambda _: self._fs.call_s3("complete_multipart_upload", **upload))
        except MissingFileError as error:
            # There is no such upload any more: an earlier request completed it and its answer was lost, or it was aborted.
            with contextlib.suppress(MissingFileError):
                if self.head(path).size == size:
                    return
            problem = "the upload was aborted before it was complete"
            raise StorageUnavailableError(f"{self.uri}/{path}", problem, "rerun") from error

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        try:
            folder = Path(tempfile.mkdtemp(prefix="strata-"))
        except OSError as error:
            raise _disk_failed(tempfile.gettempdir(), error) from error
        try:
            with _disk_may_fail(folder):
                yield folder / "file"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def head(self, path: str) -> ObjectInfo:
        # Not fs.info, which lists where there is no object, and a log's reader asks for absent ones all the time.
        found = self._request(path, self._call("head_object", Key=self._key(path)))
        return _object_info(path, found["ContentLength"], found)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        key = self._key(prefix)
        start = len(self._key_prefix) + 1 if self._key_prefix else 0
        more: dict[str, str] | None = {}
        while more is not None:
            # Page by page, so that a page that fails is asked for again and not all of them.
            page = self._page(prefix, key, more)
            for entry in page.get("Contents", ()):
                name = str(entry["Key"])
                if (name == key or not key or name.startswith(f"{key}/")) and not name.endswith("/"):
                    yield _object_info(name[start:], entry["Size"], entry)
            token = page.get("NextContinuationToken")
            more = {"ContinuationToken": token} if token else None

    def _page(self, prefix: str, key: str, more: dict[str, str]) -> dict[str, Any]:
        asked = {"Bucket": self._bucket, "Prefix": key, **more}
        page: dict[str, Any] = self._request(prefix, lambda _: self._fs.call_s3("list_objects_v2", **asked))
        return page

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self._key_prefix, path.rstrip("/")) if part)

    def delete(self, path: str) -> None:
        with contextlib.suppress(MissingFileError):
            self._request(path, self._fs.rm_file)

    def copy(self, source: str, target: str) -> None:
        key = f"{self._uri}/{target}".split("://", 1)[1]
        self._request(source, lambda found: self._fs.cp_file(found, key))

    def uploads(self) -> Iterator[ObjectInfo]:
        folder = f"{self._key_prefix}/" if self._key_prefix else ""
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            follows = {
                f"{name}Marker": page[f"Next{name}Marker"]
                for name in ("Key", "UploadId")
                if page.get(f"Next{name}Marker")
            }
            page = self._request("", self._call("list_multipart_uploads", Prefix=folder, **follows))
            for entry in page.get("Uploads", ()):
                yield ObjectInfo(
                    entry["Key"].removeprefix(folder), 0, entry["Initiated"], str(entry["UploadId"])
                )

    def abort_upload(self, upload: ObjectInfo) -> None:
        call = self._call("abort_multipart_upload", Key=self._key(upload.path), UploadId=upload.etag)
        with contextlib.suppress(MissingFileError):
            self._request(upload.path, call)

    def _call(self, operation: str, **parameters: Any) -> Callable[[str], Any]:
        """A request that s3fs has no method for; it is named by its parameters, not by the place it is made for."""
        return lambda _: self._fs.call_s3(operation, Bucket=self._bucket, **parameters)

    def _request(self, path: str, call: Callable[[str], T]) -> T:
        """One request, tried again while the failure may pass; failures become our errors."""
        place = f"{self.uri}/{path}".rstrip("/")
        retrying = tenacity.Retrying(
            stop=functools.partial(_enough, self._config.attempts),
            wait=_pause,
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )
        try:
            return retrying(call, place.split("://", 1)[1])
        except Exception as error:
            known = _explained(error, place, self._config.attempts)
            if known is None:
                raise
            raise known from error


def _object_info(path: str, size: int, found: dict[str, Any]) -> ObjectInfo:
    # Some servers tell parts of a second in a listing only, and a listing must agree with a HEAD.
    modified = found["LastModified"].astimezone(UTC).replace(microsecond=0)
    return ObjectInfo(path, int(size), modified, str(found.get("ETag", "")).strip('"'))


class _S3Stream(io.RawIOBase):
    """An object as a seekable file whose failures are our errors, which s3fs' own file objects do not promise."""

    def __init__(self, store: S3Store, path: str, size: int) -> None:
        super().__init__()
        self._store = store
        self._path = path
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._size, self._position + len(buffer))
        if self._position >= stop:
            return 0
        data = self._store.read_ranges(self._path, [(self._position, stop)]).chunks[0]
        buffer[: len(data)] = data
        self._position = stop
        return len(data)


BEYOND_THE_END = frozenset({"InvalidRange", "416"})
CONFLICTS = frozenset({"PreconditionFailed", "412"})
ACCESS_PROBLEMS = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"})
BROKEN_ON_THE_WAY = frozenset({"400", "BadDigest", "IncompleteBody", "RequestTimeout"})
"""Answers to a request that arrived damaged or in part; to a HEAD, a store can only say 400."""
CLIENT_LIBRARIES = frozenset({"botocore", "aiobotocore", "aiohttp"})


def _code(error: BaseException) -> str:
    """The server's own word for a failure; empty where it gave none."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _is_conflict(error: BaseException) -> bool:
    """Whether a put-if-absent found the object present; servers differ in how they say so."""
    return isinstance(error, FileExistsError) or _code(error) in CONFLICTS


def _of_client_library(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in CLIENT_LIBRARIES


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed: not where an object is absent or present, nor one that is refused as wrong."""
    if isinstance(error, FileNotFoundError) or _is_conflict(error):
        return False
    if isinstance(error, OSError):
        return error.errno != errno.EINVAL or _code(error) in BROKEN_ON_THE_WAY
    return _of_client_library(error) and type(error).__name__ not in ACCESS_PROBLEMS


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds to wait: a random share of a growing bound, so that workers slowed down together do not return together."""
    denied = isinstance(_failure(state), PermissionError)
    wait = tenacity.wait_random(0.5, 1.5) if denied else tenacity.wait_random_exponential(0.4, max=10.0)
    return wait(state)


def _failure(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _enough(attempts: int, state: tenacity.RetryCallState) -> bool:
    """Whether to give up: after the configured attempts, or when an access that is denied had time to be granted."""
    if isinstance(_failure(state), PermissionError):
        return (state.seconds_since_start or 0.0) >= ACCESS_SECONDS
    return state.attempt_number >= attempts


def _explained(error: Exception, place: str, attempts: int) -> Exception | None:
    """The error of ours that says what a failed request means; None for a defect of our own."""
    if _is_conflict(error):
        return FileExistsError(place)
    refusal = _refusal(error)
    if refusal is not None:
        return ConfigError(place, *refusal)
    if isinstance(error, FileNotFoundError):
        return MissingFileError(place, "there is no such object")
    if _code(error) in BEYOND_THE_END:
        problem = "the object ends before the bytes that were asked for"
        return CorruptArtifactError(place, problem, "run `strata verify`")
    if isinstance(error, OSError) or _of_client_library(error):
        problem = f"no answer after {attempts} attempts ({error})"
        return StorageUnavailableError(place, problem, "check the endpoint and rerun")
    return None


def _refusal(error: Exception) -> tuple[str, str] | None:
    """Problem and remedy, where the store will not serve this request however often it is asked."""
    if _code(error) == "NoSuchBucket":
        return "the bucket does not exist", "create it or mend the uri"
    if isinstance(error, PermissionError) or type(error).__name__ in ACCESS_PROBLEMS:
        return f"access denied ({error})", "check the credentials and the bucket's policy"
    if isinstance(error, OSError) and error.errno == errno.EINVAL and _code(error) not in BEYOND_THE_END:
        return f"the store refused the request ({error})", "check the uri and the endpoint"
    return None


def _coalesce(ranges: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """Merge near ranges; returns the merged ones and, for each range that is not empty, the merged one that holds it."""
    merged: list[tuple[int, int]] = []
    places = [0] * len(ranges)
    for i in sorted(range(len(ranges)), key=lambda i: ranges[i]):
        start, stop = ranges[i]
        if start >= stop:
            continue
        if merged and start - merged[-1][1] <= COALESCE_GAP_BYTES:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
        places[i] = len(merged) - 1
    return merged, places


# ------------------------------------------------------------------------------------------------ logs


class Log:
    """An append-only log of JSON entries, `<prefix>/<seq>.json` from 1 on, without gaps and never collected.

    Args:
        store: Where the log lives.
        prefix: Folder of the log.
        digits: Least digits of a number in a name.
    """

    def __init__(self, store: Store, prefix: str, *, digits: int = 8) -> None:
        self._store = store
        self._prefix = prefix
        self._digits = digits

    def path(self, seq: int) -> str:
        """Path of one entry."""
        return f"{self._prefix}/{seq:0{self._digits}d}.json"

    def append(self, seq: int, entry: Any) -> bool:
        """Claim entry `seq`; True if this entry is now there, False if another one was first."""
        return self._store.put_if_absent(self.path(seq), canonical_json(entry))

    def read(self, seq: int) -> Any:
        """Content of one entry."""
        data = self._store.read(self.path(seq))
        try:
            return json.loads(data)
        except ValueError as error:
            place = f"{self._store.uri}/{self.path(seq)}"
            raise CorruptArtifactError(place, f"is not JSON ({error})", "run `strata verify`") from error

    def newest(self) -> int:
        """Number of the newest entry, 0 for an empty log: galloping, then bisection, with HEAD requests."""
        if not self.has(1):
            return 0
        low, high = 1, 2
        while self.has(high):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.has(middle) else (low, middle)
        return low

    def entries(self) -> list[Any]:
        """All entries, oldest first."""
        return [self.read(seq) for seq in range(1, self.newest() + 1)]

    def has(self, seq: int) -> bool:
        """Whether there is an entry of this number."""
        return exists(self._store, self.path(seq))
