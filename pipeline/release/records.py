"""Small JSON artifacts of a root: whose it is, its releases, its alias, its plans.

root.json                           the corpus that the root belongs to
releases/<n>.json                   a release; releases/<n>.retired.json beside it once it is retired
aliases/current/<seq>.json          moves of the alias
indexes/<index>/rejected/<seq>.json what was measured of an index below the gates; collected with the index
plans/<fingerprint>.json            a shard plan
plans/<fingerprint>/<seq>.json      when work on it began and ended, in turn; live if the newest says so
"""

from collections.abc import Iterator
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.artifacts import (
    FORMAT_VERSION,
    AliasEntry,
    FileRef,
    IndexManifest,
    Plan,
    ReleaseRecord,
    parse_model,
)
from pipeline.config import CorpusConfig
from pipeline.errors import ConfigError, CorruptArtifactError, DataError, MissingFileError
from pipeline.index.reader import load_manifest
from pipeline.release.history import History
from pipeline.release.leases import describe_lease
from pipeline.storage import Log, Store, canonical_json, exists, is_whole, side_by_side

__all__ = [
    "PlanMark",
    "alias_log",
    "claim_root",
    "corpus_of_root",
    "describe",
    "files_are_there",
    "first_release_with",
    "is_retired",
    "list_releases",
    "live_plans",
    "mark_plan_done",
    "named_files",
    "plan_marks",
    "plan_path",
    "read_alias",
    "read_history",
    "read_manifest",
    "read_plan",
    "read_rejection",
    "read_release",
    "record_plan",
    "record_rejection",
    "release_log",
    "retired_path",
    "unfinished_work",
    "was_withdrawn",
    "write_plan",
]

M = TypeVar("M", bound=BaseModel)

HISTORY_SHOWN = 5


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
    found = corpus_of_root(store)
    if found != corpus.identity:
        raise ConfigError(
            store.uri,
            f"this root belongs to the corpus {found!r}, found {corpus.identity!r} in the configuration",
            f"use another root, or set corpus.name to {found!r} if this is a new snapshot of the same corpus",
        )


def corpus_of_root(store: Store) -> str | None:
    """The corpus that the root belongs to; None where it is nobody's yet."""
    try:
        data = store.read("root.json")
    except MissingFileError:
        return None
    return parse_model(_Root, data, f"{store.uri}/root.json").corpus


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


def was_withdrawn(store: Store, index: str, *, inputs: str) -> bool:
    """Whether the alias was rolled back from this index, or one made of the same, and has named neither since.

    Args:
        store: The root.
        index: What is to be published.
        inputs: What it was made from. The same can give another index: what is kept of an earlier release depends on which
            one was current.
    """
    history = read_history(store)
    if not history.withdrawn:
        return False
    records = list_releases(store)
    of_index = {record.release: record.index for record in records}
    of_inputs = {record.release: _made_of(record) for record in records}
    return _withdrawn(history, of_index, index) or _withdrawn(history, of_inputs, inputs)


def _made_of(record: ReleaseRecord) -> str:
    """`inputs`, where these determine the index; of a step between two encoders more does, which is `made_of`."""
    summary = record.summary
    return str(summary.get("made_of", summary.get("inputs", record.index)))


def _withdrawn(history: History, names: dict[int, str], name: str) -> bool:
    """Whether what a name stands for is withdrawn, where releases of one name count as one, under the number of the first."""
    first: dict[str, int] = {}
    same = {release: first.setdefault(names[release], release) for release in names}
    entries = [e.model_copy(update={"release": same[e.release]}) for e in history.entries]
    return first.get(name) in History(tuple(entries)).withdrawn


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


def first_release_with(store: Store, binarizer: str, *, until: int) -> int:
    """The first release, up to a given one that has it, whose summary names a binarizer.

    Args:
        store: The root.
        binarizer: Its folder.
        until: A release that has it.
    """
    for record in list_releases(store):
        said = record.summary.get("binarizer")
        if record.release < until and isinstance(said, dict) and said.get("folder") == binarizer:
            return record.release
    return until


def read_manifest(store: Store, record: ReleaseRecord) -> IndexManifest:
    """The index of a release.

    Raises:
        CorruptArtifactError: Its bytes are not the recorded ones.
        DataError: Another version of strata wrote it.
    """
    return load_manifest(store, record.manifest)


def _rejections(store: Store, index: str) -> Log:
    return Log(store, f"indexes/{index}/rejected")


def record_rejection(store: Store, index: str, summary: dict[str, Any]) -> None:
    """Keep what was measured of an index that is below the gates, beside its manifest."""
    log = _rejections(store, index)
    seq = log.newest() + 1
    while not log.append(seq, summary):
        seq += 1


def read_rejection(store: Store, index: str) -> tuple[IndexManifest, dict[str, Any]]:
    """An index that was not published, and what its newest run measured.

    Raises:
        MissingFileError: No run was stopped by its gates with this index, or it was collected since.
        CorruptArtifactError: The manifest is damaged.
    """
    log = _rejections(store, index)
    newest = log.newest()
    if not newest:
        problem = f"no run was stopped by its gates with index {index}, or gc has removed it"
        raise MissingFileError(store.uri, problem, "the message of such a run names its index")
    path = f"indexes/{index}/manifest.json"
    return parse_model(IndexManifest, store.read(path), f"{store.uri}/{path}"), dict(log.read(newest))


def named_files(manifest: IndexManifest) -> Iterator[FileRef]:
    """Every file that a manifest records."""
    yield from manifest.documents
    yield from manifest.condemned
    yield from (
        ref
        for ref in (manifest.partition_tree, manifest.partition_table, manifest.workload)
        if ref is not None
    )
    for bridge in manifest.bridges:
        yield from bridge.files
    for partition in manifest.partitions:
        yield from (*partition.navigation, *partition.codes.files)
        for segment in partition.segments:
            yield from (segment.lists, segment.vectors)
            if segment.tombstones is not None:
                yield segment.tombstones


def files_are_there(store: Store, record: ReleaseRecord) -> bool:
    """Whether every file that a release names exists with its recorded size."""
    try:
        manifest = read_manifest(store, record)
    except DataError:
        return False
    return all(side_by_side(partial(is_whole, store), named_files(manifest)))


# ------------------------------------------------------------------------------------------------ plans


RUN = "run"
"""The kind of job whose work on a plan has the plan's own name."""


class PlanMark(NamedTuple):
    """Work on a plan began or ended."""

    fingerprint: str
    is_live: bool
    at: datetime
    """The store's own clock."""


def plan_path(fingerprint: str) -> str:
    """Place of a plan."""
    return f"plans/{fingerprint}.json"


def record_plan(store: Store, plan: Plan) -> None:
    """Store a plan without opening work on it."""
    store.write(plan_path(plan.fingerprint), canonical_json(plan.model_dump(mode="json")))


def read_plan(store: Store, fingerprint: str) -> Plan:
    """A plan that was recorded.

    Raises:
        MissingFileError: There is none of that fingerprint.
        CorruptArtifactError: It is damaged.
    """
    path = plan_path(fingerprint)
    try:
        return Plan.model_validate_json(store.read(path))
    except ValidationError as error:
        problem = f"is not a readable Plan ({' '.join(str(error).split())})"
        raise CorruptArtifactError(f"{store.uri}/{path}", problem, "run `strata run`") from error


def write_plan(store: Store, plan: Plan, job: str = RUN) -> int:
    """Store a plan and make the work of one kind of job on it live, again if an earlier job had finished that.

    Returns:
        The number of this work, by which `unfinished_work` knows it.
    """
    # Written again even if it is there: its age is that of the work on it.
    content, log = canonical_json(plan.model_dump(mode="json")), _work_log(store, plan, job)
    for name in {plan.fingerprint, _work_name(plan, job)}:
        store.write(plan_path(name), content)
    newest = log.newest()
    if not _says_live(newest):
        # Whoever takes this number first writes the same: the states take turns.
        newest += 1
        log.append(newest, {"state": "live"})
    return newest


def unfinished_work(store: Store, plan: Plan, job: str = RUN) -> int | None:
    """The number that `write_plan` gave to work whose end nobody has marked; None where there is none."""
    newest = _work_log(store, plan, job).newest()
    return newest if _says_live(newest) else None


def mark_plan_done(store: Store, plan: Plan, job: str = RUN) -> None:
    """End the work of one kind of job on a plan: receipts no longer keep files from being collected on its behalf."""
    log = _work_log(store, plan, job)
    newest = log.newest()
    if _says_live(newest):
        log.append(newest + 1, {"state": "done"})


def _work_name(plan: Plan, job: str) -> str:
    return plan.fingerprint if job == RUN else f"{plan.fingerprint}-{job}"


def _work_log(store: Store, plan: Plan, job: str) -> Log:
    return Log(store, f"plans/{_work_name(plan, job)}")


def _says_live(seq: int) -> bool:
    # The first mark says live and the states take turns, so that a listing tells them without a read.
    return seq % 2 == 1


def plan_marks(store: Store) -> list[PlanMark]:
    """Beginnings and ends of work on plans, those of one plan in order."""
    found = []
    for info in store.list("plans"):
        match info.path.removesuffix(".json").split("/"):
            case [_, fingerprint, seq] if seq.isdecimal():
                found.append(PlanMark(fingerprint, _says_live(int(seq)), info.modified))
    return found


def live_plans(store: Store) -> list[str]:
    """Fingerprints of plans that are not done: unfinished work."""
    newest = {mark.fingerprint: mark.is_live for mark in plan_marks(store)}
    return sorted(fingerprint for fingerprint, is_live in newest.items() if is_live)


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
        "lease": describe_lease(store),
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
