"""Deletion that can be taken back until it is known that nobody else was at work.

No store deletes on condition, so a collector that is stopped between its last look and its delete request would, when it
goes on after another job has taken the root over, delete what that job reuses. Therefore a file is first copied (on the
store's side; on a local disk it gets a second name) to aside/<lease>/<path>, then deleted, and only when a look after that
still finds everything as before, the copy goes. Otherwise the files are put back: named by their content, they are the
same whoever writes them. The folder belongs to one lease alone, so no late request of it hits what another job wrote.
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial

from pipeline.errors import MissingFileError, PipelineError
from pipeline.release.leases import lease_log
from pipeline.storage import ObjectInfo, Store, exists, side_by_side

__all__ = ["ASIDE", "put_back_left_overs", "remove"]

ASIDE = "aside"


def remove(
    store: Store, groups: Sequence[Sequence[ObjectInfo]], *, seq: int, check: Callable[[], None]
) -> list[ObjectInfo]:
    """Delete files, or none of them.

    Args:
        store: The root.
        groups: Files; those of a group go one after the other.
        seq: Entry of the lease that the caller holds.
        check: Raises an error of ours where the files may not be deleted; asked before and after.

    Returns:
        What was deleted: not what changed since it was listed.
    """
    check()
    taken = [found for group in side_by_side(partial(_take, store, seq), groups) for found in group]
    try:
        check()
    except PipelineError:
        side_by_side(lambda found: _put_back(store, seq, found.path), taken)
        raise
    side_by_side(lambda found: store.delete(_aside(seq, found.path)), taken)
    return taken


def _aside(seq: int, path: str) -> str:
    return f"{ASIDE}/{seq}/{path}"


def _take(store: Store, seq: int, group: Sequence[ObjectInfo]) -> list[ObjectInfo]:
    return [found for found in group if _took(store, seq, found)]


def _took(store: Store, seq: int, found: ObjectInfo) -> bool:
    # A worker that needs an old file writes it again: since it was listed it may have become someone's.
    try:
        if store.head(found.path).modified != found.modified:
            return False
        store.copy(found.path, _aside(seq, found.path))
    except MissingFileError:
        return False
    store.delete(found.path)
    return True


def _put_back(store: Store, seq: int, path: str) -> None:
    if not exists(store, path):
        store.copy(_aside(seq, path), path)
    store.delete(_aside(seq, path))


def put_back_left_overs(store: Store, *, seq: int, grace: timedelta, now: datetime) -> None:
    """Put back what an earlier collection took and did not finish with.

    A copy whose file is there stays for the grace period: its collector may only be stopped, and about to delete the file.

    Args:
        store: The root.
        seq: Entry of the lease that the caller holds.
        grace: Time after which a collector is not expected back.
        now: What age is reckoned from.
    """
    begun: dict[int, datetime] = {}
    for found in list(store.list(ASIDE)):
        _, number, path = found.path.split("/", 2)
        earlier = int(number)
        if earlier >= seq:
            continue
        if earlier not in begun:
            begun[earlier] = store.head(lease_log(store).path(earlier)).modified
        if not exists(store, path):
            store.copy(found.path, path)
        if now - begun[earlier] >= grace:
            store.delete(found.path)
