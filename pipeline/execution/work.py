"""A unit of work: keyed by what determines its output, done once, remembered by a receipt.

Completion is keyed by the fingerprint of the inputs: content hashes of upstream files, the stage, its parameters, and the
versions of the libraries that shape bytes. The first worker to append its receipt wins; a receipt whose files are gone
is superseded by the next entry of its log.
"""

import functools
import hashlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Protocol

import threadpoolctl

from pipeline.artifacts import FORMAT_VERSION, FileRef, Receipt, ShardSpec, StageOutput
from pipeline.config import StorageConfig
from pipeline.corpus import count_reasons
from pipeline.execution.memory import PeakMemory, give_back
from pipeline.storage import Log, Store, canonical_json, is_whole, open_store

__all__ = ["Done", "Rescue", "StoreSpec", "Task", "digest", "perform", "versions"]

BYTE_SHAPING = (
    "strata",
    "numpy",
    "pyarrow",
    "faiss-cpu",
    "torch",
    "sentence-transformers",
    "safetensors",
    "pyroaring",
    "semantic-text-splitter",
)
"""Libraries whose version can change the bytes of an artifact."""


@dataclass(frozen=True)
class StoreSpec:
    """How a worker opens the root."""

    uri: str
    config: StorageConfig

    def open(self) -> Store:
        """The root."""
        return open_store(self.uri, self.config)


class Rescue(Protocol):
    """What becomes of a task whose worker dies of it again and again."""

    def pieces(self) -> "Sequence[Task]":
        """Smaller tasks that together do the same; none where it cannot be cut."""
        ...

    def give_up(self, deaths: int, said: str) -> "Task":
        """A task for another worker that records the failure in place of a result."""
        ...


@dataclass(frozen=True)
class Task:
    """One unit of work.

    Args:
        stage: Name of the stage.
        inputs: What determines the output besides the stage and the libraries: JSON values, models, file references.
        call: The stage function; takes the store, and the encoder too in an encoding task.
        shared: Keyword arguments that many tasks have in common: one mapping for all of them, sent to a worker once.
        rescue: For a task that may kill its worker; absent: the run stops after `ray.max_retries` further deaths.
        gpus: Share of a GPU that it takes where the cluster has any: None: a whole one. The tasks of most stages take none.
        ends_worker: Whether its process ends with it and gives back what it held: libraries that no other stage needs.
        remember: Whether to leave a receipt. Not where the output depends on more than the inputs, such as what is in a
            cache by now: nobody may reuse it. What such a task writes, `gc` must know to keep (release.collecting).
    """

    stage: str
    inputs: Any
    call: Callable[..., StageOutput]
    shared: Mapping[str, Any] = field(default_factory=dict)
    rescue: Rescue | None = None
    gpus: float | None = 0.0
    ends_worker: bool = False
    remember: bool = True

    @property
    def key(self) -> str:
        """Fingerprint of the inputs."""
        identity = {
            "format": FORMAT_VERSION,
            "stage": self.stage,
            "inputs": _plain(self.inputs),
            "versions": versions(),
        }
        return hashlib.sha256(canonical_json(identity)).hexdigest()[:40]

    @property
    def shard(self) -> str | None:
        """Which slice of the stage's work this is, for people: `shard 3`, `bucket 0`; None where the task is the stage."""
        if not isinstance(self.inputs, dict):
            return None
        for kind in ("shard", "bucket", "group", "segment", "unit"):
            if kind in self.inputs:
                return f"{kind} {_number(self.inputs[kind])}"
        return None

    def without_shared(self) -> "Task":
        """The task as it travels, its shared arguments apart; what is for the driver stays there."""
        return replace(self, shared={}, rescue=None)


@dataclass(frozen=True)
class Done:
    """A finished unit."""

    output: StageOutput
    reused: bool
    """Whether a receipt of an earlier run stood for it."""
    seconds: float
    peak_mb: float
    """Largest anonymous memory of the worker while it did this unit; 0 where nothing was done."""
    letters: Mapping[str, int] = field(default_factory=dict)
    """Rows set aside, by kind of reason."""
    attempt: int = 1
    """Which attempt succeeded."""
    failures: tuple[str, ...] = ()
    """Why the attempts before it failed, oldest first."""


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the libraries that shape bytes."""
    return {name: version(name) for name in BYTE_SHAPING}


def digest(value: Any) -> str:
    """Hash of inputs that many tasks have in common, made once instead of in every key."""
    return hashlib.sha256(canonical_json(_plain(value))).hexdigest()


def _number(value: Any) -> object:
    """What names a slice: its number, or the name of its file."""
    if isinstance(value, ShardSpec):
        return value.shard_no
    if isinstance(value, FileRef):
        return value.path.rpartition("/")[2].partition(".")[0]
    return value


def _plain(value: Any) -> Any:
    """JSON form of the inputs; a file counts by its content, not by its place."""
    if isinstance(value, FileRef):
        return value.sha256
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def perform(task: Task, shared: Mapping[str, Any], spec: StoreSpec, threads: int, *extra: Any) -> Done:
    """Do one unit of work, unless a receipt says that it is done.

    Args:
        task: The unit.
        shared: Its shared arguments.
        spec: The root.
        threads: Threads of numerical libraries. Part of what shapes bits, so never the number of cores.
        extra: Passed to the stage function after the store.
    """
    start = time.perf_counter()
    store = spec.open()
    log = Log(store, f"receipts/{task.key}")
    newest = log.newest() if task.remember else 0
    if newest:
        receipt = Receipt.model_validate(log.read(newest))
        if all(is_whole(store, ref) for ref in receipt.output.files.values()):
            return _done(store, receipt.output, start, reused=True, peak_mb=0.0)
    with PeakMemory() as memory, threadpoolctl.threadpool_limits(threads):
        output = task.call(store, *extra, **shared)
    give_back()
    if task.remember:
        output = _remembered(log, newest + 1, task, output)
    return _done(store, output, start, reused=False, peak_mb=memory.peak_mb)


def _remembered(log: Log, seq: int, task: Task, output: StageOutput) -> StageOutput:
    """The output that stands for the task: this one, or that of a worker that was first."""
    receipt = Receipt(key=task.key, stage=task.stage, output=output, worker=uuid.uuid4().hex)
    if log.append(seq, receipt.model_dump(mode="json")):
        return output
    return Receipt.model_validate(log.read(seq)).output


def _done(store: Store, output: StageOutput, start: float, *, reused: bool, peak_mb: float) -> Done:
    letters = [output.files["dead_letters"]] if "dead_letters" in output.files else []
    return Done(output, reused, time.perf_counter() - start, peak_mb, count_reasons(store, letters))
