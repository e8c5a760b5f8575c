"""Small JSON artifacts of a root: whose it is, its releases, its alias, its plans.

root.json                           the corpus that the root belongs to
releases/<n>.json                   a release; releases/<n>.retired.json beside it once it is retired
aliases/current/<seq>.json          moves of the alias
plans/<fingerprint>.json            a shard plan; live until plans/<fingerprint>.done.json stands beside it
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.artifacts import FORMAT_VERSION, AliasEntry, FileRef, IndexManifest, Plan, ReleaseRecord
from pipeline.config import CorpusConfig
from pipeline.errors import ConfigError, CorruptArtifactError, DataError, MissingFileError
from pipeline.release.history import History
from pipeline.storage import Log, Store, canonical_json

__all__ = [
    "alias_log",
    "claim_root",
    "describe",
    "exists",
    "files_are_there",
    "is_retired",
    "list_releases",
    "live_plans",
    "mark_plan_done",
    "named_files",
    "parse_model",
    "plan_path",
    "read_alias",
    "read_history",
    "read_manifest",
    "read_release",
    "release_log",
    "retired_path",
    "side_by_side",
    "was_withdrawn",
    "write_plan",
]

T = TypeVar("T")
R = TypeVar("R")
M = TypeVar("M", bound=BaseModel)

REQUESTS_AT_ONCE = 16
"""Small requests wait for the store, not for the processor."""

HISTORY_SHOWN = 5


def side_by_side(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Results of small requests made at once, in the order of the items."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(call, items))


def exists(store: Store, path: str) -> bool:
    """Whether there is an object."""
    try:
        store.head(path)
    except MissingFileError:
        return False
    return True


def parse_model(kind: type[M], data: bytes | Any, place: str) -> M:
    """A frozen model from its JSON.

    Raises:
        DataError: A later version of strata wrote it.
        CorruptArtifactError: It is not JSON, or not of this kind.
    """
    try:
        value = json.loads(data) if isinstance(data, bytes) else data
        version = value.get("format", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            problem = f"expected format {FORMAT_VERSION}, found {version!r}"
            raise DataError(place, problem, "it was written by another version of strata; install that one")
        return kind.model_validate(value)
    except (ValueError, AttributeError, ValidationError) as error:
        problem = f"is not a readable {kind.__name__} ({' '.join(str(error).split())})"
        raise CorruptArtifactError(place, problem, "run `strata verify`") from error


# ------------------------------------------------------------------------------------------------ root


class _Root(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT_VERSION
    corpus: str


def claim_root(store: Store, corpus: CorpusConfig) -> None:
    """Make the root this corpus's, or see that it already is.

    Raises:
        ConfigError: It belongs to another corpus.
    """
    claim = _Root(corpus=corpus.identity)
    if store.put_if_absent("root.json", canonical_json(claim.model_dump(mode="json"))):
        return
    found = parse_model(_Root, store.read("root.json"), f"{store.uri}/root.json").corpus
    if found != corpus.identity:
        raise ConfigError(
            store.uri,
            f"this root belongs to the corpus {found!r}, found {corpus.identity!r} in the configuration",
            f"use another root, or set corpus.name to {found!r} if this is a new snapshot of the same corpus",
        )


# ------------------------------------------------------------------------------------------------ alias


def alias_log(store: Store) -> Log:
    """Moves of the alias `current`."""
    return Log(store, "aliases/current")


def read_alias(store: Store) -> AliasEntry | None:
    """The newest move of the alias; None where nothing is published yet."""
    newest = alias_log(store).newest()
    return _entry(store, newest) if newest else None


def read_history(store: Store) -> History:
    """All moves of the alias."""
    numbers = range(1, alias_log(store).newest() + 1)
    return History(tuple(side_by_side(lambda seq: _entry(store, seq), numbers)))


def _entry(store: Store, seq: int) -> AliasEntry:
    log = alias_log(store)
    return parse_model(AliasEntry, log.read(seq), f"{store.uri}/{log.path(seq)}")


def was_withdrawn(store: Store, index: str) -> bool:
    """Whether the alias was rolled back from a release with this index, and has not named the index since."""
    history = read_history(store)
    if not history.withdrawn:
        return False
    first: dict[str, int] = {}
    # Releases of one index count as one, under the number of the first.
    same = {record.release: first.setdefault(record.index, record.release) for record in list_releases(store)}
    entries = [e.model_copy(update={"release": same[e.release]}) for e in history.entries]
    return first.get(index) in History(tuple(entries)).withdrawn


# ------------------------------------------------------------------------------------------------ releases


def release_log(store: Store) -> Log:
    """Release records, by number."""
    return Log(store, "releases", digits=1)


def retired_path(number: int) -> str:
    """Place of the marker of a retired release."""
    return f"releases/{number}.retired.json"


def is_retired(store: Store, number: int) -> bool:
    """Whether a release is retired: its files may be gone."""
    return exists(store, retired_path(number))


def read_release(store: Store, number: int) -> ReleaseRecord:
    """One release.

    Raises:
        MissingFileError: There is no release of this number.
    """
    log = release_log(store)
    try:
        content = log.read(number)
    except MissingFileError as error:
        raise MissingFileError(
            store.uri, f"there is no release {number}", "`strata status` shows those there are"
        ) from error
    return parse_model(ReleaseRecord, content, f"{store.uri}/{log.path(number)}")


def list_releases(store: Store) -> list[ReleaseRecord]:
    """All releases, oldest first, retired ones too."""
    return side_by_side(lambda number: read_release(store, number), range(1, release_log(store).newest() + 1))


def read_manifest(store: Store, record: ReleaseRecord) -> IndexManifest:
    """The index of a release.

    Raises:
        CorruptArtifactError: Its bytes are not the recorded ones.
        DataError: Another version of strata wrote it.
    """
    data = store.read(record.manifest.path)
    place = f"{store.uri}/{record.manifest.path}"
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.manifest.sha256:
        problem = f"expected sha256 {record.manifest.sha256[:12]}…, found {digest[:12]}…"
        raise CorruptArtifactError(place, problem, "restore the file, or roll back to another release")
    return parse_model(IndexManifest, data, place)


def named_files(manifest: IndexManifest) -> Iterator[FileRef]:
    """Every file that a manifest records."""
    yield from manifest.documents
    for partition in manifest.partitions:
        yield from (partition.heads, partition.directory, *partition.codes.files)
        for segment in partition.segments:
            yield from (segment.lists, segment.vectors)


def files_are_there(store: Store, record: ReleaseRecord) -> bool:
    """Whether every file that a release names exists with its recorded size."""
    try:
        manifest = read_manifest(store, record)
        return all(side_by_side(lambda ref: store.head(ref.path).size == ref.bytes, named_files(manifest)))
    except DataError:
        return False


# ------------------------------------------------------------------------------------------------ plans


def plan_path(fingerprint: str) -> str:
    """Place of a plan."""
    return f"plans/{fingerprint}.json"


def _done_path(fingerprint: str) -> str:
    return f"plans/{fingerprint}.done.json"


def write_plan(store: Store, plan: Plan) -> None:
    """Store a plan and make it live, again if an earlier run had finished it."""
    store.write(plan_path(plan.fingerprint), canonical_json(plan.model_dump(mode="json")))
    store.delete(_done_path(plan.fingerprint))


def mark_plan_done(store: Store, plan: Plan) -> None:
    """End a plan: its receipts no longer keep files from being collected."""
    store.write(_done_path(plan.fingerprint), canonical_json({"plan": plan.fingerprint}))


def live_plans(store: Store) -> list[str]:
    """Fingerprints of plans that are not done: unfinished work."""
    names = {found.path.removeprefix("plans/").removesuffix(".json") for found in store.list("plans")}
    return sorted(name for name in names if not name.endswith(".done") and f"{name}.done" not in names)


# ------------------------------------------------------------------------------------------------ status


def describe(store: Store) -> dict[str, Any]:
    """What `strata status` shows."""
    history = read_history(store)
    releases = list_releases(store)
    by_number = {record.release: record for record in releases}
    current = by_number.get(history.current) if history.current is not None else None
    return {
        "root": store.uri,
        "release": current.release if current is not None else None,
        "index": current.index if current is not None else None,
        "documents": current.summary.get("documents") if current is not None else None,
        "created": current.created if current is not None else None,
        "history": [entry.model_dump(mode="json") for entry in history.entries[-HISTORY_SHOWN:]],
        "releases": [_line(store, record, history) for record in releases],
        "unfinished_plans": live_plans(store),
    }


def _line(store: Store, record: ReleaseRecord, history: History) -> dict[str, Any]:
    return {
        "release": record.release,
        "index": record.index,
        "created": record.created,
        "documents": record.summary.get("documents"),
        "published": record.release in history.published,
        "withdrawn": record.release in history.withdrawn,
        "retired": is_retired(store, record.release),
    }
