"""A store whose writes fail on schedule: the fake that stands for crashes, lost answers, late and repeated requests.

`Faults` counts the writes (write, put-if-absent, adopt) of all stores of one root and says what happens to each;
`FaultySpec` gives such stores to `flows.run`. Put-if-absent is whole or not at all on every store that strata names, so it is never
cut short; files are, as a server that is no object store may leave them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.errors import StorageUnavailableError
from pipeline.execution.work import StoreSpec
from pipeline.storage import Store


class Died(BaseException):
    """The process is gone: nothing that handles errors sees this."""


class Fault(StrEnum):
    FAILS_BEFORE = "fails_before"
    """The request never arrives."""
    FAILS_AFTER = "fails_after"
    """It arrives, its answer is lost."""
    CUT_SHORT = "cut_short"
    """Half of the file stays behind; no fault for a put-if-absent."""
    LANDS_LATE = "lands_late"
    """The answer is a failure, and the request arrives after later writes."""
    LANDS_AT_THE_END = "lands_at_the_end"
    """As before, but after everything else."""
    ARRIVES_TWICE = "arrives_twice"
    """It arrives, and once more after later writes."""
    DIES_BEFORE = "dies_before"
    DIES_AFTER = "dies_after"


LATER_WRITES = 4
"""Writes that overtake a late one."""

Send = Callable[[], Any]


@dataclass
class Faults:
    """What happens to the writes of one root, by their number from 0 on."""

    schedule: Mapping[int, Fault]
    paths: list[str] = field(default_factory=list)
    """Path of every write that was tried."""
    fired: int = 0
    _late: list[tuple[float, Send]] = field(default_factory=list)

    def pass_on(self, path: str, send: Send, cut: Send | None) -> Any:
        if path.endswith(".beat"):
            # The lease's sign of life comes from a thread, whenever it will, and a failed one is only logged.
            return send()
        number = len(self.paths)
        self.paths.append(path)
        self._land(number)
        fault = self.schedule.get(number)
        if fault is None or (fault is Fault.CUT_SHORT and cut is None):
            return send()
        self.fired += 1
        return self._apply(fault, number, send, cut)

    def land_all(self) -> None:
        """Let every late request arrive."""
        self._land(float("inf"))

    def _apply(self, fault: Fault, number: int, send: Send, cut: Send | None) -> Any:
        failure = StorageUnavailableError(self.paths[number], f"the test's store: {fault}")
        match fault:
            case Fault.ARRIVES_TWICE:
                self._late.append((number + LATER_WRITES, send))
                return send()
            case Fault.LANDS_LATE:
                self._late.append((number + LATER_WRITES, send))
            case Fault.LANDS_AT_THE_END:
                self._late.append((float("inf"), send))
            case Fault.CUT_SHORT if cut is not None:
                cut()
            case Fault.FAILS_AFTER | Fault.DIES_AFTER:
                send()
        raise Died if fault in {Fault.DIES_BEFORE, Fault.DIES_AFTER} else failure

    def _land(self, number: float) -> None:
        due = [send for when, send in self._late if when <= number]
        self._late = [(when, send) for when, send in self._late if when > number]
        for send in due:
            send()


class FaultyStore:
    """Passes everything to a store, the writes through a schedule of faults."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self._store, self._faults = store, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, path: str, data: bytes) -> None:
        half = data[: len(data) // 2]
        self._faults.pass_on(
            path, lambda: self._store.write(path, data), lambda: self._store.write(path, half)
        )

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return bool(self._faults.pass_on(path, lambda: self._store.put_if_absent(path, data), None))

    def adopt(self, local: Path, path: str) -> None:
        data = local.read_bytes()
        half = data[: len(data) // 2]
        self._faults.pass_on(
            path, lambda: self._store.write(path, data), lambda: self._store.write(path, half)
        )
        local.unlink(missing_ok=True)


@dataclass(frozen=True)
class FaultySpec(StoreSpec):
    """Opens the root with faults; for runners in this process."""

    faults: Faults

    def open(self) -> Store:
        store: Any = FaultyStore(super().open(), self.faults)
        return store
