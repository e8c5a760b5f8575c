"""The lease of a root: one job at a time changes it.

leases/root/<seq>.json     who took the root and who gave it back, one entry after the other; the newest one says how it stands
leases/root/<seq>.beat     a counter that the holder overwrites every few seconds for as long as it lives

Taking the lease is the put-if-absent of the next entry, so exactly one job wins. A job that finds the root held watches the
counter: only if it has not moved for `lease.stale_after_s` seconds of the watcher's own looking is the holder taken for
dead. No clocks are compared, and what a watcher did not see (it was stopped, the store did not answer) is no silence. On one
machine a lock on a file of the temporary folder tells more: the kernel lets it go when the holder ends, however it ends.

A holder that was merely stopped may come back after another job took over. It finds the newer entry when it asks (`check`)
and does nothing more. What is published does not rest on that: files are named by their content, receipts and alias entries
are put-if-absent. The lease saves double work, and keeps `gc` from deleting what a run is about to reuse.
"""

import contextlib
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict

from pipeline.artifacts import FORMAT_VERSION, parse_model
from pipeline.config import LeaseConfig
from pipeline.errors import LeaseLostError, MissingFileError, PipelineError, RootBusyError, TransientError
from pipeline.storage import Log, Store, canonical_json

__all__ = [
    "LEASES",
    "Lease",
    "LeaseEntry",
    "Silence",
    "beat_number",
    "describe_lease",
    "hold_root",
    "is_held",
    "lease_log",
]

LEASES = "leases/root"
BEAT_S = 5.0
"""Longest time between two beats."""
BEATS_MISSED = 6
"""A holder is dead after that many beats that did not come, whatever the watcher's setting."""
LOOKS = 12
"""Least number of looks at the counter within the silence that means death."""
LOOK_S = 1.0
"""Longest time between two looks."""
TELL_S = 30.0
"""Time between two lines about waiting."""
LAST_BEAT_S = 5.0
"""Longest wait for the thread to end: it may be in the middle of a request that is not answered."""


class LeaseEntry(BaseModel):
    """Somebody took the root, or gave it back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT_VERSION
    state: Literal["held", "released"]
    token: str
    """Names the holder, and its lock on its machine."""
    job: str
    host: str
    pid: int
    since: str
    """ISO 8601, UTC, by the holder's clock; like job, host and pid for people only."""
    beat_s: float
    """Time between two beats."""

    @property
    def holder(self) -> str:
        """For people."""
        return f"`strata {self.job}` (pid {self.pid} on {self.host}, since {self.since})"


def lease_log(store: Store) -> Log:
    """Entries of the lease."""
    return Log(store, LEASES)


def is_held(store: Store) -> bool:
    """Whether somebody has the root now, alive or not."""
    newest = lease_log(store).newest()
    return bool(newest) and _entry(store, newest).state == "held"


def describe_lease(store: Store) -> dict[str, Any] | None:
    """Who holds the root, for people; None if nobody does. Whether the holder lives, a single look cannot say."""
    newest = lease_log(store).newest()
    if not newest or (entry := _entry(store, newest)).state == "released":
        return None
    shown = entry.model_dump(include={"job", "host", "pid", "since"})
    return {"entry": newest, **shown, "last_beat": _beat(store, newest)}


def beat_number(path: str) -> int | None:
    """Entry that a counter belongs to; None for any other file."""
    folder, _, name = path.rpartition("/")
    seq, _, kind = name.partition(".")
    return int(seq) if folder == LEASES and kind == "beat" and seq.isdecimal() else None


def _entry(store: Store, seq: int) -> LeaseEntry:
    log = lease_log(store)
    return parse_model(LeaseEntry, log.read(seq), f"{store.uri}/{log.path(seq)}")


def _beat_path(store: Store, seq: int) -> str:
    return lease_log(store).path(seq).removesuffix(".json") + ".beat"


def _beat(store: Store, seq: int) -> int | None:
    try:
        return int(json.loads(store.read(_beat_path(store, seq)))["beat"])
    except MissingFileError:
        return None


# ------------------------------------------------------------------------------------------------ holding


@dataclass(frozen=True)
class Lease:
    """The root, held by this process."""

    store: Store
    seq: int
    entry: LeaseEntry
    waited: bool
    """Whether another job had it when this one asked."""

    def check(self) -> None:
        """See that nobody took over; one request.

        Raises:
            LeaseLostError: Somebody did.
        """
        log = lease_log(self.store)
        if log.has(self.seq + 1):
            successor = _entry(self.store, self.seq + 1)
            problem = (
                f"expected this job's lease ({self.seq}) to be the newest, found {successor.holder} after it"
            )
            remedy = "this job gave no sign of life for too long; rerun: finished work is kept"
            raise LeaseLostError(f"{self.store.uri}/{log.path(self.seq + 1)}", problem, remedy)


@contextlib.contextmanager
def hold_root(store: Store, job: str, config: LeaseConfig) -> Iterator[Lease]:
    """Take the root, keep it alive with a thread, and give it back at the end, however the end comes.

    A job takes it once: inside, a second call waits for the first like any other.

    Args:
        store: The root.
        job: Name of the job, for people.
        config: Whether to wait for another job, and how long.

    Raises:
        RootBusyError: Another job holds the root and is alive.
    """
    beat_s = min(BEAT_S, config.stale_after_s / BEATS_MISSED)
    mine = LeaseEntry(
        state="held",
        token=uuid.uuid4().hex,
        job=job,
        host=socket.gethostname(),
        pid=os.getpid(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        beat_s=beat_s,
    )
    with _sign_of_life(mine):
        try:
            lease = _acquire(store, mine, config)
            with _beating(lease):
                yield lease
        finally:
            if _give_back(store, mine):
                _remove_sign(mine)


def _give_back(store: Store, mine: LeaseEntry) -> bool:
    """Whether this holder holds nothing any more; failing is no reason to fail the job whose work is done."""
    try:
        log = lease_log(store)
        newest = log.newest()
        if newest and _entry(store, newest) == mine:
            released = mine.model_copy(update={"state": "released"})
            log.append(newest + 1, released.model_dump(mode="json"))
    except PipelineError as error:
        structlog.get_logger().warning("lease_not_released", message=str(error))
        return False
    return True


@contextlib.contextmanager
def _beating(lease: Lease) -> Iterator[None]:
    ended = threading.Event()
    # A daemon: a request that hangs must not keep the process from ending.
    thread = threading.Thread(target=_keep_beating, args=(lease, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LAST_BEAT_S)


def _keep_beating(lease: Lease, ended: threading.Event) -> None:
    path, beat = _beat_path(lease.store, lease.seq), 0
    while True:
        beat += 1
        try:
            lease.check()
            lease.store.write(path, canonical_json({"beat": beat}))
        except LeaseLostError as error:
            if not ended.is_set():
                structlog.get_logger().error("lease_lost", message=str(error))
            return
        except Exception as error:  # noqa: BLE001  (whatever it is, the next beat may come through)
            structlog.get_logger().warning("lease_beat_failed", beat=beat, message=str(error))
        if ended.wait(lease.entry.beat_s):
            return


# ------------------------------------------------------------------------------------------------ waiting


def _acquire(store: Store, mine: LeaseEntry, config: LeaseConfig) -> Lease:
    log, asked, waited = lease_log(store), time.monotonic(), False
    while True:
        newest = log.newest()
        standing = _entry(store, newest) if newest else None
        if standing is not None and standing.state == "held":
            _outwait(store, newest, standing, config, asked)
            waited = True
        # Where a newer entry ended the wait, this append loses to it, and the newer one is looked at.
        if log.append(newest + 1, mine.model_dump(mode="json")):
            if waited and standing is not None:
                _remove_sign(standing)
            return Lease(store, newest + 1, mine, waited)


def _outwait(store: Store, seq: int, holder: LeaseEntry, config: LeaseConfig, asked: float) -> None:
    """Return once an entry of the lease is over: given back, taken over, or its holder dead."""
    patience = config.wait_minutes * 60 if config.on_busy == "wait" else 0.0
    stale_after = max(config.stale_after_s, BEATS_MISSED * holder.beat_s)
    pause, log = min(LOOK_S, stale_after / LOOKS), structlog.get_logger()
    silence, told = Silence(longest_gap_s=2 * pause), -TELL_S
    while not _is_over(store, seq, silence):
        waited = time.monotonic() - asked
        if silence.seconds >= stale_after or _died_here(holder):
            log.warning("lease_taken_over", holder=holder.holder, silent_s=round(silence.seconds, 1))
            return
        # Who leaves before a sign of life was seen would never take over from the dead.
        if waited >= patience and (silence.was_broken or waited >= 2 * stale_after):
            raise _busy(store, holder, silence, config, waited)
        if waited - told >= TELL_S:
            log.info("waiting_for_root", holder=holder.holder, beat=silence.beat, waited_s=round(waited))
            told = waited
        time.sleep(pause)


def _is_over(store: Store, seq: int, silence: "Silence") -> bool:
    try:
        if lease_log(store).has(seq + 1):
            return True
        silence.look(_beat(store, seq), time.monotonic())
    except TransientError:
        silence.look_away()
    return False


def _busy(
    store: Store, holder: LeaseEntry, silence: "Silence", config: LeaseConfig, waited: float
) -> RootBusyError:
    problem = f"{holder.holder} holds the root; its last beat is {silence.beat}, waited {waited:.0f} s"
    remedy = (
        "run again when it has ended, or set lease.on_busy: wait"
        if config.on_busy == "leave"
        else "run again when it has ended, or raise lease.wait_minutes"
    )
    return RootBusyError(store.uri, problem, f"{remedy}; a holder that was killed is found out by itself")


@dataclass
class Silence:
    """How long a counter has stood still, as far as it was looked at. Pure: the caller says when it looked.

    Args:
        longest_gap_s: Most that the time between two looks counts for. A watcher that was stopped saw nothing.
    """

    longest_gap_s: float
    beat: int | None = None
    seconds: float = 0.0
    was_broken: bool = False
    """Whether the counter was seen to move."""
    _looks: int = field(default=0, repr=False)
    _looked_at: float | None = field(default=None, repr=False)

    def look(self, beat: int | None, now: float) -> None:
        """Count one look at the counter."""
        if self._looks and beat != self.beat:
            self.was_broken, self.seconds = True, 0.0
        elif self._looked_at is not None:
            self.seconds += min(now - self._looked_at, self.longest_gap_s)
        self._looks += 1
        self.beat, self._looked_at = beat, now

    def look_away(self) -> None:
        """A look failed; the holder may have met the same failure, so the silence begins anew."""
        self.seconds, self._looked_at = 0.0, None


# ------------------------------------------------------------------------------------------------ one machine


def _sign_path(holder: LeaseEntry) -> Path:
    return Path(tempfile.gettempdir()) / f"strata-lease-{holder.token}"


@contextlib.contextmanager
def _sign_of_life(mine: LeaseEntry) -> Iterator[None]:
    """Lock a file for as long as this process holds the lease. The kernel unlocks it when the process ends."""
    path = _sign_path(mine)
    with contextlib.ExitStack() as stack:
        try:
            # Kept by nobody else: Python's descriptors are not inherited by the programs that it starts.
            file = stack.enter_context(path.open("wb", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(_boot())
        except OSError:
            # Without a sign a death is found out by the silence of the counter.
            _remove_sign(mine)
        yield


def _died_here(holder: LeaseEntry) -> bool:
    """Whether the holder ran on this machine and ended without giving the lease back.

    A process number would not do: containers share them, and machines that are copies of one image share boot ids too. The
    name of the file is random, so whoever finds it unlocked sees the very file that the holder had locked; the boot id
    keeps apart machines that share their temporary folder, whose locks may not reach each other.
    """
    try:
        with _sign_path(holder).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file.read() == _boot() != b""
    except OSError:
        # Absent (another machine, or cleaned away), locked (alive), or not ours to open: no proof.
        return False


def _remove_sign(holder: LeaseEntry) -> None:
    with contextlib.suppress(OSError):
        _sign_path(holder).unlink()


def _boot() -> bytes:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return b""
