"""The lease: who gets the root, how a holder shows that it lives, and what a returning one may still do."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import LeaseConfig
from pipeline.errors import LeaseLostError, MissingFileError, RootBusyError, StorageUnavailableError
from pipeline.release import describe
from pipeline.release.leases import Lease, LeaseEntry, Silence, hold_root, is_held, lease_log
from pipeline.storage import LocalStore, ObjectInfo, Store

QUICK = LeaseConfig(stale_after_s=0.9)
"""Beats six times in that."""
LEAVE = LeaseConfig(stale_after_s=0.9, on_busy="leave")
UNHURRIED = LeaseConfig(stale_after_s=4.0, on_busy="leave")
"""For who must find a silence unbroken within twice that, however busy the machine is."""


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def states(store: Store) -> list[tuple[str, str]]:
    return [(entry["state"], entry["job"]) for entry in lease_log(store).entries()]


def beat_path(seq: int) -> str:
    return f"leases/root/{seq:08d}.beat"


def held_by_nobody_alive(store: Store, *, beat: int | None = 3) -> None:
    """What a job leaves behind that died on another machine."""
    log = lease_log(store)
    seq = log.newest() + 1
    entry = LeaseEntry(
        state="held", token="dead", job="run", host="far", pid=1, since="2001-01-01T00:00:00", beat_s=0.1
    )
    assert log.append(seq, entry.model_dump(mode="json"))
    if beat is not None:
        store.write(beat_path(seq), b'{"beat":%d}' % beat)


# ------------------------------------------------------------------------------------------------ one after the other


def test_a_lease_is_given_back_at_the_end(any_store: Store) -> None:
    for job in ("run", "gc"):
        with hold_root(any_store, job, QUICK) as lease:
            lease.check()
            assert is_held(any_store)
            assert not lease.waited
        assert not is_held(any_store)
    assert states(any_store) == [("held", "run"), ("released", "run"), ("held", "gc"), ("released", "gc")]


@pytest.mark.parametrize("end", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_lease_is_given_back_however_the_work_ends(tmp_path: Path, end: type[BaseException]) -> None:
    store = LocalStore(str(tmp_path))
    with pytest.raises(end), hold_root(store, "run", QUICK):
        raise end
    assert not is_held(store)
    assert [thread.name for thread in threading.enumerate() if thread.name == "lease"] == []


def test_a_job_waits_until_the_other_has_ended(any_store: Store) -> None:
    order = []
    with ThreadPoolExecutor(1) as pool:

        def second() -> bool:
            with hold_root(any_store, "second", QUICK) as lease:
                order.append("second begins")
                return lease.waited

        with hold_root(any_store, "first", QUICK):
            waiting = pool.submit(second)
            # Longer than the silence that means death: the first one is alive and keeps the root.
            time.sleep(3 * QUICK.stale_after_s)
            order.append("first ends")
        assert waiting.result(timeout=20)
    assert order == ["first ends", "second begins"]
    assert [job for _, job in states(any_store)] == ["first", "first", "second", "second"]


def test_a_job_may_leave_a_busy_root_and_says_who_has_it(any_store: Store) -> None:
    with hold_root(any_store, "first", QUICK):
        with pytest.raises(RootBusyError) as caught, hold_root(any_store, "second", LEAVE):
            pass
        assert is_held(any_store)
    assert caught.value.exit_code == 75
    for part in (any_store.uri, "strata first", str(os.getpid()), "since 20", "lease.on_busy: wait"):
        assert part in str(caught.value)
    assert len(states(any_store)) == 2


def test_a_wait_is_bounded(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    short = LeaseConfig(stale_after_s=0.6, wait_minutes=1 / 60)
    with hold_root(store, "first", QUICK):
        start = time.monotonic()
        with pytest.raises(RootBusyError, match=r"lease\.wait_minutes"), hold_root(store, "second", short):
            pass
        assert 1.0 <= time.monotonic() - start < 10


@pytest.mark.parametrize("config", [QUICK, UNHURRIED], ids=["wait", "leave"])
@pytest.mark.parametrize("beat", [3, None], ids=["it had beaten", "before its first beat"])
def test_the_root_of_a_dead_holder_is_taken_over(
    any_store: Store, config: LeaseConfig, beat: int | None
) -> None:
    held_by_nobody_alive(any_store, beat=beat)
    start = time.monotonic()
    with hold_root(any_store, "heir", config) as lease:
        lease.check()
        assert time.monotonic() - start >= 0.9 * QUICK.stale_after_s
    assert states(any_store) == [("held", "run"), ("held", "heir"), ("released", "heir")]


def test_a_holder_that_beats_seldom_is_given_its_own_time(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    hasty = LeaseConfig(stale_after_s=0.05, wait_minutes=1 / 60)
    with hold_root(store, "slow", LeaseConfig(stale_after_s=3.0)) as lease:
        with pytest.raises(RootBusyError), hold_root(store, "hasty", hasty):
            pass
        lease.check()


def test_no_clock_is_compared(any_store: Store) -> None:
    """A holder whose wall clock is years behind beats as loudly as any."""
    with hold_root(any_store, "first", QUICK) as lease:
        log = lease_log(any_store)
        any_store.write(log.path(1), b"%s" % _dated(log.read(1), "1999-01-01T00:00:00+00:00"))
        with pytest.raises(RootBusyError, match="1999"), hold_root(any_store, "second", LEAVE):
            pass
        lease.check()


def _dated(entry: dict[str, Any], since: str) -> bytes:
    return LeaseEntry.model_validate(entry | {"since": since}).model_dump_json().encode()


# ------------------------------------------------------------------------------------------------ silence


def test_standing_still_is_silence_and_moving_is_not() -> None:
    silence = Silence(longest_gap_s=5.0)
    for now, beat in enumerate([1, 1, 1, 2, 2]):
        silence.look(beat, float(now))
    assert (silence.seconds, silence.was_broken, silence.beat) == (1.0, True, 2)


def test_what_the_watcher_did_not_see_is_no_silence() -> None:
    silence = Silence(longest_gap_s=1.0)
    silence.look(1, 0.0)
    silence.look(1, 3600.0)
    assert silence.seconds == 1.0
    silence.look_away()
    silence.look(1, 7200.0)
    assert silence.seconds == 0.0
    silence.look(2, 7200.5)
    assert silence.was_broken


@given(
    st.lists(st.tuples(st.floats(0, 20), st.booleans()), min_size=2, max_size=60),
    st.floats(0.1, 5.0),
    st.floats(1.0, 30.0),
)
def test_a_holder_that_moves_between_looks_is_never_silent_for_longer_than_it_was(
    steps: list[tuple[float, bool]], gap: float, stale: float
) -> None:
    """Whatever the pauses of watcher and holder: the silence counted is at most the time since the last move seen."""
    silence, now, beat, moved_at = Silence(gap), 0.0, 0, 0.0
    for pause, moves in steps:
        now += pause
        if moves:
            beat, moved_at = beat + 1, now
        silence.look(beat, now)
        assert silence.seconds <= now - moved_at + 1e-6
        assert silence.seconds < stale or now - moved_at >= stale - 1e-6


class Unreachable(LocalStore):
    """A store that does not answer while it is told so; `which` says to what requests."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.which: Callable[[str], bool] = lambda _: False

    def _ask(self, path: str) -> None:
        if self.which(path):
            raise StorageUnavailableError(path, "no answer")

    def read(self, path: str) -> bytes:
        self._ask(path)
        return super().read(path)

    def write(self, path: str, data: bytes) -> None:
        self._ask(path)
        super().write(path, data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        self._ask(path)
        return super().put_if_absent(path, data)


def test_a_store_that_does_not_answer_the_watcher_is_no_death(tmp_path: Path) -> None:
    mine, theirs = LocalStore(str(tmp_path)), Unreachable(str(tmp_path))
    theirs.which = lambda path: path.endswith(".beat")
    with hold_root(mine, "first", QUICK) as lease:
        with pytest.raises(RootBusyError), hold_root(theirs, "second", LEAVE):
            pass
        lease.check()


def test_a_beat_that_fails_is_told_and_the_next_one_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Unreachable(str(tmp_path))
    with hold_root(store, "first", QUICK) as lease:
        until(lambda: _beats(store))
        store.which = lambda path: path.endswith(".beat")
        until(lambda: "lease_beat_failed" in capsys.readouterr().out)
        store.which = lambda _: False
        before = _beats(store)
        until(lambda: _beats(store) > before)
        lease.check()
    assert not is_held(store)


def _beats(store: Store) -> int:
    shown = describe(store)["lease"]
    return shown["last_beat"] or 0


def test_an_end_that_cannot_be_told_does_not_hide_how_the_work_ended(tmp_path: Path) -> None:
    store = Unreachable(str(tmp_path))

    def fail() -> None:
        store.which = lambda _: True
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hold_root(store, "first", QUICK):
        fail()
    store.which = lambda _: False
    assert is_held(store)
    # Its lock is open, so the next one on this machine knows without waiting.
    start = time.monotonic()
    with hold_root(store, "second", LeaseConfig()):
        assert time.monotonic() - start < 5


# ------------------------------------------------------------------------------------------------ taking over


def _take_over(store: Store) -> None:
    log = lease_log(store)
    newest = log.newest()
    assert log.append(newest + 1, log.read(newest) | {"token": "thief", "job": "thief"})


def test_a_holder_that_comes_back_is_refused_and_gives_nothing_back(any_store: Store) -> None:
    with hold_root(any_store, "paused", QUICK) as lease:
        _take_over(any_store)
        with pytest.raises(LeaseLostError, match="strata thief") as caught:
            lease.check()
    assert caught.value.exit_code == 75
    assert states(any_store) == [("held", "paused"), ("held", "thief")]


def test_a_holder_that_lost_its_lease_beats_no_more(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    with hold_root(store, "paused", QUICK):
        until(lambda: _beats(store))
        _take_over(store)
        until(lambda: not any(thread.name == "lease" for thread in threading.enumerate()))
        with pytest.raises(MissingFileError):
            store.head(beat_path(2))


def test_many_jobs_at_once_have_the_root_one_after_the_other(any_store: Store) -> None:
    # Nobody is so slow as to be taken for dead, however busy the machine is.
    patient = LeaseConfig(stale_after_s=6.0)
    inside, most, leases = [0], [0], []
    lock = threading.Lock()

    def job(number: int) -> None:
        with hold_root(any_store, f"job {number}", patient) as lease:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                leases.append(lease)
            lease.check()
            time.sleep(0.02)
            with lock:
                inside[0] -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(job, range(6)))
    assert most == [1]
    assert len({lease.seq for lease in leases}) == 6


@given(st.integers(2, 5), st.lists(st.integers(0, 4), max_size=12))
def test_there_are_never_two_holders_of_one_entry_nor_two_that_pass_their_check(
    takers: int, orders: list[int]
) -> None:
    """However often the root is taken over, one lease at a time is good; those of the past are refused."""
    store: Any = _Dictionary()
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        # No beats, and everybody counts as dead: every taker takes over from the one before, rightly or not.
        patch.setattr("pipeline.release.leases._keep_beating", lambda *_: None)
        patch.setattr("pipeline.release.leases._died_here", lambda _: True)
        leases: list[Lease] = []
        for order in [*range(takers), *orders]:
            if order % 5 == 4 and leases:
                stack.pop_all().close()
                leases = []
                continue
            leases.append(stack.enter_context(hold_root(store, f"job {order}", QUICK)))
            assert [_passes(lease) for lease in leases] == [False] * (len(leases) - 1) + [True]
            assert len({lease.seq for lease in leases}) == len(leases)


def _passes(lease: Lease) -> bool:
    try:
        lease.check()
    except LeaseLostError:
        return False
    return True


class _Dictionary:
    """As much of a store as a lease needs, without a disk."""

    uri = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def head(self, path: str) -> ObjectInfo:
        return ObjectInfo(path, len(self.read(path)), datetime.now(UTC), "")

    def read(self, path: str) -> bytes:
        if path not in self.objects:
            raise MissingFileError(path, "absent")
        return self.objects[path]

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return self.objects.setdefault(path, data) == data


def test_takers_over_racing_for_a_dead_holders_root_have_one_winner_each_time(any_store: Store) -> None:
    held_by_nobody_alive(any_store)
    good = []

    def take(number: int) -> None:
        with contextlib.suppress(RootBusyError), hold_root(any_store, f"heir {number}", UNHURRIED) as lease:
            lease.check()
            good.append(lease.seq)

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(take, range(5)))
    assert good
    assert len(set(good)) == len(good)
    held = [seq for seq, (state, _) in enumerate(states(any_store), 1) if state == "held"]
    assert sorted(good) == held[1:]


# ------------------------------------------------------------------------------------------------ one machine

HOLDER = """
import sys, time
from pipeline.config import LeaseConfig
from pipeline.errors import LeaseLostError
from pipeline.release import hold_root
from pipeline.storage import LocalStore

with hold_root(LocalStore(sys.argv[1]), "victim", LeaseConfig(stale_after_s=float(sys.argv[2]))) as lease:
    print("held", flush=True)
    try:
        while True:
            time.sleep(0.05)
            lease.check()
    except LeaseLostError:
        code = 75
sys.exit(code)
"""


@contextlib.contextmanager
def _holder(folder: Path, stale_after_s: float) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the root in a folder until its check refuses it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(stale_after_s)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_holder_killed_on_this_machine_costs_no_wait(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    with _holder(tmp_path, 30.0) as process:
        os.kill(process.pid, signal.SIGKILL)
        # Not waited for yet: a process that nobody has buried is dead all the same.
        start = time.monotonic()
        with hold_root(store, "heir", LeaseConfig()) as lease:
            assert time.monotonic() - start < 10
            lease.check()
    assert states(store) == [("held", "victim"), ("held", "heir"), ("released", "heir")]


def test_a_stopped_holder_is_taken_over_after_its_silence_and_refused_when_it_returns(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    with _holder(tmp_path, 1.2) as process:
        until(lambda: _beats(store))
        os.kill(process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with hold_root(store, "heir", LeaseConfig(stale_after_s=1.2)) as lease:
            assert time.monotonic() - start >= 1.0
            os.kill(process.pid, signal.SIGCONT)
            assert process.wait(timeout=60) == 75
            lease.check()
    assert states(store) == [("held", "victim"), ("held", "heir"), ("released", "heir")]


def test_a_process_of_another_machine_with_the_same_numbers_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Same host name, a process number that nobody has here, and alive: nothing but its silence may speak against it."""
    store = LocalStore(str(tmp_path))
    held_by_nobody_alive(store)
    ended = threading.Event()

    def beat() -> None:
        number = 3
        while not ended.wait(0.1):
            number += 1
            store.write(beat_path(1), b'{"beat":%d}' % number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RootBusyError), hold_root(store, "second", LEAVE):
            pass
    finally:
        ended.set()
        thread.join()
    assert states(store) == [("held", "run")]


# ------------------------------------------------------------------------------------------------ status


def test_status_shows_the_holder_and_its_last_beat(any_store: Store) -> None:
    assert describe(any_store)["lease"] is None
    held_by_nobody_alive(any_store, beat=None)
    shown = describe(any_store)["lease"]
    assert shown == {
        "entry": 1,
        "job": "run",
        "host": "far",
        "pid": 1,
        "since": "2001-01-01T00:00:00",
        "last_beat": None,
    }
    any_store.write(beat_path(1), b'{"beat":8}')
    assert describe(any_store)["lease"]["last_beat"] == 8
