"""Delete what nothing names any more. The only code that lists folders of the root to act on what it finds.

A file goes if it lies where strata keeps data, no unretired release names it, no bucket log of the embedding cache names
it, no receipt of unfinished work names it, and it is older than the grace period by the store's own clock. Some tasks
leave no receipt: while work is unfinished, what lies in the folders that they write to stays. Receipts go with the files
that they name. Of the records of runs the newest stay. Files that are not of a known kind are left alone, and so are
root.json, aliases, releases and plans.

Collecting holds the lease of the root, so no run reuses receipts whose files are about to go. Files go in batches. Before
a batch and after it the collector looks whether it still has the lease, and whether anything began meanwhile that
needs none or had lost its own: a plan, a release, a move of the alias. If so, the batch is put back (`removal`) and no more goes.
"""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from pipeline.artifacts import IndexManifest, Receipt, ReleaseRecord, parse_model
from pipeline.config import LeaseConfig
from pipeline.errors import CorruptArtifactError, PublishConflictError
from pipeline.release.leases import LEASES, Lease, beat_number, hold_root
from pipeline.release.publishing import retirable, retire
from pipeline.release.records import (
    alias_log,
    is_retired,
    list_releases,
    named_files,
    plan_marks,
    plan_path,
    read_alias,
    read_manifest,
    release_log,
)
from pipeline.release.removal import put_back_left_overs, remove
from pipeline.release.runs import RUNS, old_records
from pipeline.storage import ObjectInfo, Store, side_by_side

__all__ = ["CollectReport", "collect", "store_time"]

DATA_FOLDERS = (
    "documents",
    "condemned",
    "scratch",
    "partitions",
    "indexes",
    "binarizers",
    "bridges",
    "dead_letters",
    "embeddings",
)
WITHOUT_RECEIPT = frozenset(
    {"scratch/units", "scratch/leaves", "scratch/stuck", "scratch/weighed", "condemned", "dead_letters"}
)
"""Folders of files that tasks without a receipt write. The lease keeps a collector out while a run is at work; a run that
lost it, and does not know yet, still finds them, and ends as one that lost its lease."""
RECEIPTS = "receipts"
ABANDONED_AFTER = timedelta(days=7)
"""Age of a plan after which it counts as given up, if a later plan was finished since."""
BATCH_FILES = 100
"""Files, or logs of receipts, deleted between two looks at what began meanwhile."""


@dataclass(frozen=True)
class CollectReport:
    """What was done; with `dry_run`, what would be."""

    retired: tuple[int, ...]
    deleted: tuple[str, ...]
    bytes: int
    kept: int
    """Files of data and receipts that stay."""
    aborted: int
    """Uploads that were begun, never finished, and given up now."""


def collect(
    store: Store,
    *,
    grace: timedelta,
    keep: int,
    now: datetime | None = None,
    dry_run: bool = False,
    lease: LeaseConfig | None = None,
) -> CollectReport:
    """Retire old releases and delete what nothing names, holding the lease of the root.

    Args:
        store: The root.
        grace: Age that a file must have to be deleted.
        keep: Newest published releases that stay.
        now: What age is reckoned from; None: the store's own clock.
        dry_run: Change nothing; needs no lease.
        lease: What to do while another job holds the root; None: the defaults.

    Raises:
        RootBusyError: Another job holds the root.
        LeaseLostError: Another job took over meanwhile; the batch in hand was put back.
    """
    if dry_run:
        found = _find(store, now or store_time(store), grace, retired=retirable(store, keep))
        return _report(found, [path for group in found.orphans for path in group], len(found.uploads))
    with hold_root(store, "gc", lease or LeaseConfig()) as held:
        now = now or store_time(store)
        put_back_left_overs(store, seq=held.seq, grace=grace, now=now)
        begun = _Work.read(store, now)
        found = _find(store, now, grace, retired=retire(store, keep))
        deleted = _delete_in_batches(store, found.orphans, begun, held, now)
        return _report(found, deleted, _clear(store, found, held))


@dataclass(frozen=True)
class _Found:
    retired: list[int]
    listed: int
    orphans: list[list[ObjectInfo]]
    """What may go; a log of receipts in one piece."""
    uploads: list[ObjectInfo]
    """Writes that were begun and not finished before the grace period."""


def _report(found: _Found, deleted: list[ObjectInfo], aborted: int) -> CollectReport:
    return CollectReport(
        retired=tuple(found.retired),
        deleted=tuple(orphan.path for orphan in deleted),
        bytes=sum(orphan.size for orphan in deleted),
        kept=found.listed - len(deleted),
        aborted=aborted,
    )


def _find(store: Store, now: datetime, grace: timedelta, *, retired: list[int]) -> _Found:
    # Listed before the names are read: whatever a run names meanwhile is then among the names.
    listed = [found for folder in (*DATA_FOLDERS, RECEIPTS, RUNS) for found in store.list(folder)]
    names = _Names.read(store, listed, retired=frozenset(retired), now=now)
    groups = _in_groups([found for found in listed if names.may_go(found)])
    orphans = [group for group in groups if all(now - found.modified >= grace for found in group)]
    uploads = [upload for upload in store.uploads() if now - upload.modified >= grace]
    return _Found(retired, len(listed), orphans, uploads)


def _in_groups(orphans: list[ObjectInfo]) -> list[list[ObjectInfo]]:
    """Receipts before the files they name; those of a log together and the newest first, so that it never has a gap."""
    logs: dict[str, list[ObjectInfo]] = {}
    for found in orphans:
        if found.path.startswith(f"{RECEIPTS}/"):
            logs.setdefault(found.path.rpartition("/")[0], []).insert(0, found)
    others = [[found] for found in orphans if not found.path.startswith(f"{RECEIPTS}/")]
    return [*logs.values(), *others]


def _clear(store: Store, found: _Found, held: Lease) -> int:
    """Abort what was never finished, and delete the counters of earlier leases, which nobody watches any more."""
    held.check()
    side_by_side(store.abort_upload, found.uploads)
    beats = [info.path for info in store.list(LEASES) if (beat_number(info.path) or held.seq) < held.seq]
    side_by_side(store.delete, beats)
    return len(found.uploads)


def store_time(store: Store) -> datetime:
    """The store's own clock, from an object written now."""
    path = f"scratch/clock-{uuid.uuid4().hex}"
    store.write(path, b"")
    found = store.head(path).modified
    store.delete(path)
    return found


class _OtherWorkError(PublishConflictError):
    """Something began that the collector did not know of when it read the names."""


def _delete_in_batches(
    store: Store, orphans: list[list[ObjectInfo]], begun: "_Work", held: Lease, now: datetime
) -> list[ObjectInfo]:
    gone: list[ObjectInfo] = []
    check = _check_of(store, begun, held, now)
    for first in range(0, len(orphans), BATCH_FILES):
        try:
            gone += remove(store, orphans[first : first + BATCH_FILES], seq=held.seq, check=check)
        except _OtherWorkError:
            log = structlog.get_logger()
            log.warning("collecting_stopped_for_other_work", deleted=len(gone), left=len(orphans) - first)
            break
    return gone


def _check_of(store: Store, begun: "_Work", held: Lease, now: datetime) -> Callable[[], None]:
    def check() -> None:
        held.check()
        if _Work.read(store, now).has_news_since(begun):
            raise _OtherWorkError(store.uri, "a plan, a release or a move of the alias began meanwhile")

    return check


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
    old_runs: frozenset[str]

    @classmethod
    def read(
        cls, store: Store, listed: list[ObjectInfo], *, retired: frozenset[int], now: datetime
    ) -> "_Names":
        """Everything that releases, cache logs and receipts name."""
        paths: set[str] = set()
        folders: set[str] = set()
        alias = read_alias(store)
        for record in list_releases(store):
            # What serves is kept even if a rollback came in between a retirement's look and its mark.
            is_current = alias is not None and record.release == alias.release
            if is_current or (record.release not in retired and not is_retired(store, record.release)):
                manifest = read_manifest(store, record)
                paths |= _release_paths(record, manifest)
                folders |= {partition.codes.binarizer for partition in manifest.partitions}
        paths |= _cached_paths(store, listed)
        receipts = _receipts(store, listed)
        old_runs = old_records([found.path for found in listed])
        if _unfinished(store, now):
            paths |= {path for receipt in receipts.values() for path in _receipt_paths(receipt)}
            return cls(frozenset(paths), frozenset(folders | WITHOUT_RECEIPT), frozenset(), old_runs)
        return cls(frozenset(paths), frozenset(folders), _dead(receipts, paths), old_runs)

    def may_go(self, found: ObjectInfo) -> bool:
        """Whether a file is of a kind that is collected, and nothing names it."""
        if found.path.startswith(f"{RECEIPTS}/"):
            return found.path in self.dead_receipts
        if found.path.startswith(f"{RUNS}/"):
            return found.path in self.old_runs
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
    """Receipts that name no file, or one that goes. A log goes whole or stays whole: it must not get a gap."""
    named = {place: _receipt_paths(receipt) for place, receipt in receipts.items()}
    alive = {place.rpartition("/")[0] for place, files in named.items() if files and files <= paths}
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
