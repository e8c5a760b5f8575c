"""Read back everything that a release names, and say what is not as recorded."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import FileRef, IndexManifest, Partition, ReleaseRecord, Segment, arrow_schema
from pipeline.corpus.identity import hash_matrix
from pipeline.errors import DataError, MissingFileError
from pipeline.filters import Filter, evaluate, parse_filter
from pipeline.index.binarizers import load_binarizer
from pipeline.index.bridges import load_crossing
from pipeline.index.tombstones import live_rows, read_tombstones
from pipeline.partitioning import NOT_ASKED
from pipeline.release.history import find_gaps
from pipeline.release.records import (
    list_releases,
    named_files,
    read_alias,
    read_history,
    read_manifest,
    read_release,
)
from pipeline.schemas import made_by
from pipeline.spaces import EncoderIdentity
from pipeline.storage import READ_CHUNK_BYTES, Store
from pipeline.tables import RawFile, check_made_by, open_parquet, read_columns

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What was read, and what is wrong with it."""

    files: int
    bytes: int
    problems: tuple[str, ...]


def verify(store: Store, release: ReleaseRecord | None = None) -> VerifyReport:
    """Hash all files of a release and check that they fit together; the alias's log too.

    Args:
        store: The root.
        release: The release; None: the current one.

    Raises:
        MissingFileError: Nothing is published.
    """
    record = release if release is not None else _current(store)
    problems = list(_log_problems(store))
    try:
        manifest = read_manifest(store, record)
    except DataError as error:
        return VerifyReport(0, 0, (*problems, str(error)))
    refs = {ref.path: ref for ref in named_files(manifest)}
    made = dict(_made_by_path(manifest))
    damage = [p for ref in refs.values() for p in _file_problems(store, ref, made.get(ref.path, {}))]
    # What fits together is asked only of files that are whole.
    damage = damage or list(_layout_problems(store, manifest))
    size = record.manifest.bytes + sum(ref.bytes for ref in refs.values())
    return VerifyReport(1 + len(refs), size, (*problems, *damage))


def _current(store: Store) -> ReleaseRecord:
    entry = read_alias(store)
    if entry is None:
        raise MissingFileError(store.uri, "no release is published here", "run `strata run CONF` first")
    return read_release(store, entry.release)


def _log_problems(store: Store) -> list[str]:
    try:
        releases = [record.release for record in list_releases(store)]
        return find_gaps(read_history(store).entries, releases)
    except DataError as error:
        return [str(error)]


# ------------------------------------------------------------------------------------------------ files


def _made_by_path(manifest: IndexManifest) -> Iterator[tuple[str, dict[bytes, bytes]]]:
    """What must have made each file of vectors or codes."""
    for partition in manifest.partitions:
        of_space = made_by(partition.space)
        yield partition.heads.path, of_space
        for segment in partition.segments:
            yield segment.vectors.path, of_space
            yield segment.lists.path, made_by(partition.space, partition.codes.binarizer)


def _file_problems(store: Store, ref: FileRef, made: dict[bytes, bytes]) -> Iterator[str]:
    place = f"{store.uri}/{ref.path}"
    try:
        digest, size = _digest(store, ref.path)
    except MissingFileError:
        yield f"{place}: missing"
        return
    if size != ref.bytes:
        yield f"{place}: expected {ref.bytes} bytes, found {size}"
    elif digest != ref.sha256:
        yield f"{place}: expected sha256 {ref.sha256[:12]}…, found {digest[:12]}…"
    elif ref.path.endswith(".parquet"):
        yield from _footer_problems(store, ref, made)


def _digest(store: Store, path: str) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with store.open_input(path) as stream:
        while data := stream.read(READ_CHUNK_BYTES):
            digest.update(data)
            size += len(data)
    return digest.hexdigest(), size


def _footer_problems(store: Store, ref: FileRef, made: dict[bytes, bytes]) -> Iterator[str]:
    try:
        with open_parquet(store, ref.path) as file:
            rows = file.metadata.num_rows
            check_made_by(f"{store.uri}/{ref.path}", file.metadata.metadata, made)
    except DataError as error:
        yield str(error)
        return
    if rows != ref.rows:
        yield f"{store.uri}/{ref.path}: expected {ref.rows} rows, found {rows}"


# ------------------------------------------------------------------------------------------------ layout


def _layout_problems(store: Store, manifest: IndexManifest) -> Iterator[str]:
    yield from _bridge_problems(store, manifest)
    yield from _once_problems(store, manifest)
    cuts = [parse_filter(text, arrow_schema(manifest.attributes)) for text in manifest.cuts]
    for partition in manifest.partitions:
        yield from _binarizer_problems(store, partition, manifest.dims_of(partition))
        yield from _path_problems(store, partition, cuts)
        place = f"{store.uri}/{partition.directory.path}"
        directory = read_columns(store, partition.directory.path)
        rows = sum(segment.vectors.rows for segment in partition.segments)
        live = sum(segment.rows for segment in partition.segments)
        problems = [*_directory_problems(partition, directory), *_primary_problems(directory, rows)]
        yield from (f"{place}: {problem}" for problem in problems)
        for no, segment in enumerate(partition.segments):
            mine = directory.filter(pc.equal(directory["segment"], no)).sort_by("first_entry")
            yield from _segment_problems(store, segment, mine, rows)
            yield from _tombstone_problems(store, segment)
            if not problems:
                yield from _address_problems(store, segment, mine)
        if live != partition.rows:
            yield f"partition {partition.partition_id}: expected {partition.rows} rows, found {live}"


def _bridge_problems(store: Store, manifest: IndexManifest) -> Iterator[str]:
    """Whether a bridge leads to every partition that is not in the encoder's own space, and is what it should be."""
    own = str(manifest.encoder.get("fingerprint"))
    for partition in manifest.partitions:
        if partition.space != own and manifest.bridge_to(partition.space) is None:
            yield f"partition {partition.partition_id}: no bridge leads to its encoder {partition.space[:12]}"
    for bridge in manifest.bridges:
        try:
            load_crossing(store, bridge, EncoderIdentity.model_validate(manifest.encoder))
        except DataError as error:
            yield str(error)


@dataclass(frozen=True)
class _Ids:
    """A bag of ids: how many, and their sums. Bags of equal sums are the same, but by chance: ids are hashes."""

    count: int = 0
    sums: tuple[int, int] = (0, 0)

    def __add__(self, other: "_Ids") -> "_Ids":
        first, second = (sum(pair) % 2**64 for pair in zip(self.sums, other.sums, strict=True))
        return _Ids(self.count + other.count, (first, second))

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "_Ids":
        """Of a column of vector_ids."""
        words = hash_matrix(column).view("<u8").sum(axis=0, dtype=np.uint64).tolist()
        return cls(len(column), tuple(words))


def _once_problems(store: Store, manifest: IndexManifest) -> Iterator[str]:
    """Whether every row of the documents that is not condemned is live in one partition, and nothing else is."""
    segments = [one for partition in manifest.partitions for one in partition.segments]
    wanted, lost = (
        sum((_Ids.of(_ids(store, ref)) for ref in refs), _Ids())
        for refs in (manifest.documents, manifest.condemned)
    )
    live = sum((_Ids.of(_live_ids(store, one)) for one in segments), _Ids())
    if wanted != live + lost:
        yield (
            f"index {manifest.index}: expected each of the {wanted.count:,} rows of its documents live in one partition or "
            f"condemned, found {live.count:,} live and {lost.count:,} condemned, or others"
        )


def _ids(store: Store, ref: FileRef) -> pa.ChunkedArray:
    return read_columns(store, ref.path, ["vector_id"])["vector_id"]


def _live_ids(store: Store, segment: Segment) -> pa.ChunkedArray:
    return _ids(store, segment.vectors).filter(pa.array(live_rows(store, segment)))


def _tombstone_problems(store: Store, segment: Segment) -> Iterator[str]:
    """Whether tombstones are of rows of the segment, and as many as recorded."""
    if segment.tombstones is None:
        return
    rows, place = read_tombstones(store, segment.tombstones), f"{store.uri}/{segment.tombstones.path}"
    if len(rows) != segment.tombstones.rows:
        yield f"{place}: expected {segment.tombstones.rows} rows, found {len(rows)}"
    if len(rows) and rows[-1] >= segment.vectors.rows:
        yield f"{place}: names rows beyond the {segment.vectors.rows} of its segment"


def _binarizer_problems(store: Store, partition: Partition, dims: int) -> Iterator[str]:
    try:
        binarizer = load_binarizer(store, partition.codes.binarizer, dims=dims)
    except DataError as error:
        yield str(error)
        return
    if binarizer.levels != partition.codes.levels:
        place = f"{store.uri}/{partition.codes.binarizer}"
        yield f"{place}: expected codes of levels {partition.codes.levels}, found {binarizer.levels}"


def _path_problems(store: Store, partition: Partition, cuts: Sequence[Filter]) -> Iterator[str]:
    """Whether its rows are those that its path leads to: filters that do not lead there never see them."""
    if len(partition.bits) != len(cuts):
        yield f"partition {partition.partition_id}: expected bits of {len(cuts)} cuts, found {partition.bits!r}"
        return
    asked = [(cut, bit == "1") for cut, bit in zip(cuts, partition.bits, strict=True) if bit != NOT_ASKED]
    if not asked:
        return
    columns = sorted({name for cut, _ in asked for name in cut.columns})
    for segment in partition.segments:
        rows = read_columns(store, segment.vectors.path, columns)
        strays = np.logical_or.reduce([evaluate(cut, rows) != holds for cut, holds in asked])
        if strays.any():
            place = f"{store.uri}/{segment.vectors.path}"
            yield f"{place}: {int(strays.sum())} rows are not of partition {partition.partition_id}, {partition.path}"


def _directory_problems(partition: Partition, directory: pa.Table) -> Iterator[str]:
    """Whether the posting lists of each segment cover its lists file, one after the other."""
    names = ("segment", "list_no", "first_entry", "num_entries")
    segment_nos, list_nos, first, counts = (directory[name].to_numpy() for name in names)
    if len(list_nos) and not 0 <= list_nos.min() <= list_nos.max() < partition.heads.rows:
        yield f"names lists beyond the {partition.heads.rows} heads"
    if len(segment_nos) and not 0 <= segment_nos.min() <= segment_nos.max() < len(partition.segments):
        yield f"names segments beyond the {len(partition.segments)} of the partition"
    for no, segment in enumerate(partition.segments):
        rows = np.flatnonzero(segment_nos == no)
        rows = rows[np.argsort(first[rows], kind="stable")]
        stops = np.cumsum(counts[rows])
        covers = np.array_equal(first[rows], stops - counts[rows]) and len(set(list_nos[rows])) == len(rows)
        if not covers or stops[-1:].sum() != segment.lists.rows:
            yield f"its lists do not cover the {segment.lists.rows} entries of segment {no} once"


def _primary_problems(directory: pa.Table, rows: int) -> Iterator[str]:
    """Whether each of the rows of a partition is the primary of exactly one list."""
    order = np.argsort(directory["first_row"].to_numpy(), kind="stable")
    first, count = (directory[name].to_numpy()[order] for name in ("first_row", "num_primaries"))
    stops = np.cumsum(count)
    if not np.array_equal(first[count > 0], (stops - count)[count > 0]) or stops[-1:].sum() != rows:
        yield f"its lists do not have each of the {rows} vectors once as their own"


def _address_problems(store: Store, segment: Segment, directory: pa.Table) -> Iterator[str]:
    """Whether the fixed-width values of every list lie where the directory says, by the footers of the files."""
    own = directory["first_row"].to_numpy().astype(np.int64)
    own -= own[0] if len(own) else 0
    first = {"lists": directory["first_entry"].to_numpy().astype(np.int64), "vectors": own}
    for kind, columns in ADDRESSED.items():
        ref: FileRef = getattr(segment, kind)
        file = RawFile(store, ref, list(columns))
        for column, place in columns.items():
            found = directory[place].to_numpy()
            if file.is_raw(column) and not np.array_equal(file.places(column, first[kind]), found):
                yield f"{store.uri}/{ref.path}: its {column}s do not start where the directory says"


ADDRESSED = {
    "lists": {"code": "code_at", "factor": "factor_at", "offset": "offset_at", "row": "row_at"},
    "vectors": {"vector_id": "vector_ids_at", "embedding": "embeddings_at"},
}
"""Columns of a segment's files and those of the directory that say where their values start, list by list."""


def _segment_problems(store: Store, segment: Segment, directory: pa.Table, rows: int) -> Iterator[str]:
    """Whether every list of a segment has its own vectors, and none twice."""
    place = f"{store.uri}/{segment.lists.path}"
    targets = read_columns(store, segment.lists.path, ["row"])["row"].to_numpy()
    if len(targets) and not 0 <= targets.min() <= targets.max() < rows:
        yield f"{place}: entries point beyond the {rows} vectors"
        return
    counts, first, own = (
        directory[name].to_numpy() for name in ("num_entries", "first_row", "num_primaries")
    )
    if counts.sum() != len(targets):
        return  # said of the directory
    of_entry = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((targets, of_entry))
    of_entry, targets = of_entry[order], targets[order]
    is_new = (np.diff(of_entry, prepend=-1) != 0) | (np.diff(targets, prepend=-1) != 0)
    if not is_new.all():
        yield f"{place}: {int((~is_new).sum())} entries are in a list twice"
    is_own = is_new & (targets >= first[of_entry]) & (targets < (first + own)[of_entry])
    missing = own - np.bincount(of_entry, weights=is_own, minlength=len(own))
    if missing.any():
        yield f"{place}: {int(np.abs(missing).sum())} vectors are not in their own list"
