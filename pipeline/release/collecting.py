"""Delete what nothing names any more. The only code that lists folders of the root.

A file goes if it lies where strata keeps data, no unretired release names it, no bucket log of the embedding cache names
it, no receipt of unfinished work names it, and it is older than the grace period by the store's own clock. Files
that are not of a known kind are left alone, and so are root.json, aliases, releases and plans.

A run may begin while files are being deleted, and reuse receipts whose files are about to go. It makes its plan live
before it reuses anything, so files go in batches, and none goes once a plan, a release or a move of the alias is seen
that was not there at the beginning. What a run reuses while one batch is being deleted may still go with that batch:
until there is a lease of the root, that window stays.
"""

import json
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from pipeline.artifacts import IndexManifest, Receipt, ReleaseRecord, parse_model
from pipeline.errors import CorruptArtifactError, MissingFileError
from pipeline.release.publishing import retirable, retire
from pipeline.release.records import (
    alias_log,
    is_retired,
    list_releases,
    named_files,
    plan_marks,
    plan_path,
    read_manifest,
    release_log,
    side_by_side,
)
from pipeline.storage import STAGING, ObjectInfo, Store

__all__ = ["CollectReport", "collect", "store_time"]

DATA_FOLDERS = (
    "documents",
    "condemned",
    "scratch",
    "partitions",
    "indexes",
    "binarizers",
    "dead_letters",
    "embeddings",
)
RECEIPTS = "receipts"
ABANDONED_AFTER = timedelta(days=7)
"""Age of a plan after which it counts as given up, if a later plan was finished since."""
BATCH_FILES = 100
"""Files deleted between two looks at what began meanwhile."""


@dataclass(frozen=True)
class CollectReport:
    """What was done; with `dry_run`, what would be."""

    retired: tuple[int, ...]
    deleted: tuple[str, ...]
    bytes: int
    kept: int
    """Files of data and receipts that stay."""


def collect(
    store: Store, *, grace: timedelta, keep: int, now: datetime | None = None, dry_run: bool = False
) -> CollectReport:
    """Retire old releases and delete what nothing names, until a run begins or ends.

    Args:
        store: The root.
        grace: Age that a file must have to be deleted.
        keep: Newest published releases that stay.
        now: What age is reckoned from; None: the store's own clock.
        dry_run: Change nothing.
    """
    now = now if now is not None else store_time(store)
    begun = _Work.read(store, now)
    retired = retirable(store, keep) if dry_run else retire(store, keep)
    # Listed before the names are read: whatever a run names meanwhile is then among the names.
    listed = [found for folder in (*DATA_FOLDERS, RECEIPTS, STAGING) for found in store.list(folder)]
    names = _Names.read(store, listed, retired=frozenset(retired), now=now)
    orphans = [found for found in listed if names.may_go(found) and now - found.modified >= grace]
    orphans = _receipts_first(orphans)
    deleted = orphans if dry_run else _delete_in_batches(store, orphans, begun, now)
    return CollectReport(
        retired=tuple(retired),
        deleted=tuple(found.path for found in deleted),
        bytes=sum(found.size for found in deleted),
        kept=len(listed) - len(deleted),
    )


def store_time(store: Store) -> datetime:
    """The store's own clock, from an object written now."""
    path = f"scratch/clock-{uuid.uuid4().hex}"
    store.write(path, b"")
    found = store.head(path).modified
    store.delete(path)
    return found


def _receipts_first(orphans: list[ObjectInfo]) -> list[ObjectInfo]:
    """Receipts before the files they name, and the newest of a log first: it may end after any batch."""
    receipts = [found for found in orphans if found.path.startswith(f"{RECEIPTS}/")]
    return receipts[::-1] + [found for found in orphans if not found.path.startswith(f"{RECEIPTS}/")]


def _delete_in_batches(
    store: Store, orphans: list[ObjectInfo], begun: "_Work", now: datetime
) -> list[ObjectInfo]:
    gone: list[ObjectInfo] = []
    for first in range(0, len(orphans), BATCH_FILES):
        if _Work.read(store, now).has_news_since(begun):
            log = structlog.get_logger()
            log.warning("collecting_stopped_for_other_work", deleted=len(gone), left=len(orphans) - first)
            break
        gone += _delete(store, orphans[first : first + BATCH_FILES])
    return gone


def _delete(store: Store, orphans: list[ObjectInfo]) -> list[ObjectInfo]:
    def delete(found: ObjectInfo) -> bool:
        # A worker that needs an old file writes it again: since it was listed it may have become someone's.
        try:
            if store.head(found.path).modified != found.modified:
                return False
        except MissingFileError:
            return False
        store.delete(found.path)
        return True

    gone = side_by_side(delete, orphans)
    return [found for found, is_gone in zip(orphans, gone, strict=True) if is_gone]


# ------------------------------------------------------------------------------------------------ other work


@dataclass(frozen=True)
class _Work:
    """What other runs are doing and have done."""

    unfinished: frozenset[str]
    moves: int
    """Entries of the alias."""
    releases: int

    @classmethod
    def read(cls, store: Store, now: datetime) -> "_Work":
        plans = frozenset(_unfinished(store, now))
        return cls(plans, alias_log(store).newest(), release_log(store).newest())

    def has_news_since(self, earlier: "_Work") -> bool:
        """Whether a plan became live, a release was made or the alias moved. That a plan ended alone is no news."""
        made = (self.moves, self.releases) != (earlier.moves, earlier.releases)
        return made or not self.unfinished <= earlier.unfinished


# ------------------------------------------------------------------------------------------------ what is named


@dataclass(frozen=True)
class _Names:
    paths: frozenset[str]
    folders: frozenset[str]
    """Folders all of whose files are named."""
    dead_receipts: frozenset[str]

    @classmethod
    def read(
        cls, store: Store, listed: list[ObjectInfo], *, retired: frozenset[int], now: datetime
    ) -> "_Names":
        """Everything that releases, cache logs and receipts name."""
        paths: set[str] = set()
        folders: set[str] = set()
        for record in list_releases(store):
            if record.release not in retired and not is_retired(store, record.release):
                manifest = read_manifest(store, record)
                paths |= _release_paths(record, manifest)
                folders |= {partition.codes.binarizer for partition in manifest.partitions}
        paths |= _cached_paths(store, listed)
        receipts = _receipts(store, listed)
        if _unfinished(store, now):
            paths |= {path for receipt in receipts.values() for path in _receipt_paths(receipt)}
            return cls(frozenset(paths), frozenset(folders), frozenset())
        return cls(frozenset(paths), frozenset(folders), _dead(receipts, paths))

    def may_go(self, found: ObjectInfo) -> bool:
        """Whether a file is of a kind that is collected, and nothing names it."""
        if found.path.startswith(f"{RECEIPTS}/"):
            return found.path in self.dead_receipts
        if found.path in self.paths or found.path.rpartition("/")[0] in self.folders:
            return False
        return not found.path.startswith("embeddings/") or _is_cache_file(found.path)


def _release_paths(record: ReleaseRecord, manifest: IndexManifest) -> set[str]:
    found = record.summary.get("dead_letter_files")
    letters = found if isinstance(found, list) else []
    return {ref.path for ref in (record.manifest, *named_files(manifest))} | {str(path) for path in letters}


def _receipt_paths(receipt: Receipt) -> set[str]:
    return {ref.path for ref in receipt.output.files.values()}


def _dead(receipts: dict[str, Receipt], paths: set[str]) -> frozenset[str]:
    """Receipts that name a file that goes. A log goes whole or stays whole: it must not get a gap."""
    alive = {
        place.rpartition("/")[0] for place, receipt in receipts.items() if _receipt_paths(receipt) <= paths
    }
    return frozenset(place for place in receipts if place.rpartition("/")[0] not in alive)


def _receipts(store: Store, listed: list[ObjectInfo]) -> dict[str, Receipt]:
    places = [found.path for found in listed if found.path.startswith(f"{RECEIPTS}/")]
    read = side_by_side(lambda p: parse_model(Receipt, store.read(p), f"{store.uri}/{p}"), places)
    return dict(zip(places, read, strict=True))


def _cached_paths(store: Store, listed: list[ObjectInfo]) -> set[str]:
    """Files that the logs of the embedding cache name."""
    entries = [found.path for found in listed if _is_cache_log(found.path)]
    return set(side_by_side(lambda path: _cached_path(store, path), entries))


def _cached_path(store: Store, path: str) -> str:
    try:
        entry = json.loads(store.read(path))
        return str((entry.get("file") or entry["condemned"])["path"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        place = f"{store.uri}/{path}"
        raise CorruptArtifactError(place, "is not an entry of the cache", "nothing was deleted") from error


def _is_cache_log(path: str) -> bool:
    match path.split("/"):
        case ["embeddings", _, _, "log", name]:
            return name.endswith(".json")
    return False


def _is_cache_file(path: str) -> bool:
    match path.split("/"):
        case ["embeddings", _, _, name]:
            return name.endswith(".parquet")
    return False


def _unfinished(store: Store, now: datetime) -> list[str]:
    """Live plans, without those that were given up."""
    marks = plan_marks(store)
    newest = {mark.fingerprint: mark for mark in marks}
    written = {name: store.head(plan_path(name)).modified for name, mark in newest.items() if mark.is_live}
    newest_done = max((mark.at for mark in marks if not mark.is_live), default=None)
    return [
        name
        for name, at in written.items()
        if newest_done is None or newest_done < at or now - at < ABANDONED_AFTER
    ]
