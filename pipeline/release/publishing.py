"""Moves of the alias: publish a new release, roll back to an earlier one; and the retirement of old ones.

A move is the put-if-absent of the entry after the one that the run had read when it started. Whoever comes second finds
the entry taken, learns by whom, and leaves the alias alone.
"""

import uuid
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline.artifacts import AliasEntry, FileRef, IndexManifest, ReleaseRecord, parse_model
from pipeline.errors import ConfigError, CorruptArtifactError, MissingFileError, PublishConflictError
from pipeline.release.history import History, explain_conflict
from pipeline.release.records import (
    alias_log,
    is_retired,
    list_releases,
    named_files,
    read_alias,
    read_history,
    read_manifest,
    read_release,
    release_log,
    retired_path,
)
from pipeline.storage import Store, canonical_json, side_by_side

__all__ = ["publish", "retirable", "retire", "rollback"]


def publish(
    store: Store,
    manifest: IndexManifest,
    manifest_ref: FileRef,
    summary: dict[str, Any],
    *,
    started_at: AliasEntry | None,
    now: datetime,
    token: str,
) -> ReleaseRecord:
    """Make an index the current release.

    Args:
        store: The root.
        manifest: The index.
        manifest_ref: Its file.
        summary: What the run reports.
        started_at: Newest alias entry when the run started; None if there was none.
        now: For the record; information only.
        token: Names this run; a repeated call with the same token finds its own entry and succeeds.

    Raises:
        CorruptArtifactError: A file that the manifest names is absent or of another size.
        PublishConflictError: The alias is not where the run had found it.
    """
    check_files(store, [manifest_ref, *named_files(manifest)])
    found = read_alias(store)
    if found is not None and found.token == token:
        return read_release(store, found.release)
    _check_unmoved(store, started_at, found)
    record = _record(store, manifest, manifest_ref, summary, now)
    _move(store, record.release, started_at=started_at, reason="publish", now=now, token=token)
    return record


def rollback(
    store: Store, to: int | None = None, *, now: datetime | None = None, token: str | None = None
) -> AliasEntry:
    """Point the alias to an earlier release.

    Args:
        store: The root.
        to: Number of the release; None: the one before the current, by the history of the alias.
        now: For the entry, information only; None: the time of this machine.
        token: Names this move; None: a random one.

    Returns:
        The new entry, or the newest one if that release is current already.

    Raises:
        ConfigError: The release is unknown, retired or was never published, or there is none to go back to.
        CorruptArtifactError: A file that the release names is absent or of another size.
        PublishConflictError: Another run moved the alias meanwhile.
    """
    history = read_history(store)
    number = _before(store, history) if to is None else to
    _check_may_return(store, history, number)
    newest = history.entries[-1]
    if number == newest.release:
        return newest
    record = read_release(store, number)
    check_files(store, [record.manifest, *named_files(read_manifest(store, record))])
    now = now or datetime.now(UTC)
    entry = _move(
        store, number, started_at=newest, reason="rollback", now=now, token=token or uuid.uuid4().hex
    )
    if is_retired(store, number):
        # The collector marks, then looks at the alias; here the alias moves, then the mark is looked for: one sees the other.
        _move(
            store,
            newest.release,
            started_at=entry,
            reason="rollback",
            now=now,
            token=f"undo {entry.token}",
        )
        raise ConfigError(
            store.uri, f"release {number} was retired just now", "`strata status` shows the releases"
        )
    return entry


def check_files(store: Store, refs: list[FileRef]) -> None:
    """HEAD every file.

    Raises:
        CorruptArtifactError: One is absent or of another size.
    """
    for problem in side_by_side(lambda ref: _size_problem(store, ref), refs):
        if problem is not None:
            raise problem


def _size_problem(store: Store, ref: FileRef) -> CorruptArtifactError | None:
    place, remedy = f"{store.uri}/{ref.path}", "rerun: the stage that wrote it does so again"
    try:
        size = store.head(ref.path).size
    except MissingFileError:
        return CorruptArtifactError(place, f"expected {ref.bytes} bytes, found no file", remedy)
    if size != ref.bytes:
        return CorruptArtifactError(place, f"expected {ref.bytes} bytes, found {size}", remedy)
    return None


# ------------------------------------------------------------------------------------------------ the alias


def _check_unmoved(store: Store, started_at: AliasEntry | None, found: AliasEntry | None) -> None:
    if found == started_at:
        return
    if started_at is not None and not _is_still_there(store, started_at, found):
        found = None
    raise PublishConflictError(f"{store.uri}/aliases/current", *explain_conflict(started_at, found))


def _is_still_there(store: Store, entry: AliasEntry, newest: AliasEntry | None) -> bool:
    if newest is None or newest.seq < entry.seq:
        return False
    log = alias_log(store)
    return parse_model(AliasEntry, log.read(entry.seq), f"{store.uri}/{log.path(entry.seq)}") == entry


def _move(
    store: Store,
    release: int,
    *,
    started_at: AliasEntry | None,
    reason: Literal["publish", "rollback"],
    now: datetime,
    token: str,
) -> AliasEntry:
    follows = started_at.seq if started_at is not None else 0
    entry = AliasEntry(
        seq=follows + 1,
        release=release,
        follows=follows,
        token=token,
        reason=reason,
        created=now.isoformat(timespec="seconds"),
    )
    if not alias_log(store).append(entry.seq, entry.model_dump(mode="json")):
        _check_unmoved(store, started_at, read_alias(store))
    return entry


# ------------------------------------------------------------------------------------------------ records


def _record(
    store: Store, manifest: IndexManifest, manifest_ref: FileRef, summary: dict[str, Any], now: datetime
) -> ReleaseRecord:
    log = release_log(store)
    newest = log.newest()
    if newest:
        left = _left_by_a_crash(store, newest, manifest.index)
        if left is not None:
            return left
    while True:
        newest += 1
        record = ReleaseRecord(
            release=newest,
            index=manifest.index,
            manifest=manifest_ref,
            created=now.isoformat(timespec="seconds"),
            summary=summary,
        )
        if log.append(newest, record.model_dump(mode="json")):
            return record


def _left_by_a_crash(store: Store, number: int, index: str) -> ReleaseRecord | None:
    """The newest record, if it is of this index and a run crashed before the alias could name it."""
    record = read_release(store, number)
    unnamed = record.index == index and number not in read_history(store).published
    return record if unnamed and not is_retired(store, number) else None


# ------------------------------------------------------------------------------------------------ going back


def _before(store: Store, history: History) -> int:
    for number in reversed(history.standing[:-1]):
        if not is_retired(store, number):
            return number
    current = f"release {history.current} is current" if history.entries else "nothing is published"
    raise ConfigError(store.uri, f"{current}, and there is no earlier release to go back to", "publish one")


def _check_may_return(store: Store, history: History, number: int) -> None:
    remedy = "`strata status` shows the releases"
    if not 1 <= number <= release_log(store).newest():
        raise ConfigError(store.uri, f"there is no release {number}", remedy)
    if number not in history.published:
        raise ConfigError(store.uri, f"release {number} was never published", remedy)
    if is_retired(store, number):
        raise ConfigError(
            store.uri, f"release {number} is retired, its files may be gone", f"{remedy} that are not"
        )


# ------------------------------------------------------------------------------------------------ retirement


def retirable(store: Store, keep: int) -> list[int]:
    """Releases to retire: not current, not among the newest `keep` published, nor in the midst of being published."""
    history = read_history(store)
    published = sorted(history.published)
    kept = {history.current, *published[-keep:]}
    newest = published[-1] if published else 0
    numbers = [record.release for record in list_releases(store)]
    return [n for n in numbers if n < newest and n not in kept and not is_retired(store, n)]


def retire(store: Store, keep: int) -> list[int]:
    """Mark old releases: they can no longer be rolled back to, and `collect` may delete their files.

    Args:
        store: The root.
        keep: Newest published releases that stay; at least 1.

    Returns:
        Numbers of the releases retired now.
    """
    numbers = retirable(store, keep)
    for number in numbers:
        store.put_if_absent(retired_path(number), canonical_json({"release": number}))
    return numbers
