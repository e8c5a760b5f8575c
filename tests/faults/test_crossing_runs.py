"""Runs and workers that cross: zombies that write after the commit, two drivers at once, receipts without their files."""

import multiprocessing
import os
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.execution.flows import run
from pipeline.execution.runner import THREADS_PER_TASK, InlineRunner, _load
from pipeline.execution.work import StoreSpec, perform
from pipeline.release import read_alias, verify
from pipeline.storage import LocalStore, Store
from tests.faults.stores import Died, Fault, Faults, FaultySpec
from tests.integration.roads import configured, data_files, rows_of, run_inline, settings, write_parquet

ROWS = 40
DEADLINE_SECONDS = 60
PUBLISH_CONFLICT, RETRY = 3, 75


def _content(folder, root, code_bytes=16):
    content = settings(
        folder / root,
        folder / "corpus.parquet",
        evaluation={"sample_queries": 5},
        layout={"rows_per_list": 8, "segment_rows": 16},
        embedding={"unit_texts": 16},
        binarizer={"bytes": code_bytes},
    )
    content["corpus"]["shard_rows"] = 16
    return content


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    write_parquet(folder / "corpus.parquet", rows_of(ROWS))
    config = configured(folder, _content(folder, "root"))
    run_inline(config)
    return folder, data_files(LocalStore(config.root))


# ------------------------------------------------------------------------------------------------ zombies


@dataclass
class Gate:
    """Where zombies wait: they have read and computed, and now they write."""

    opened: threading.Event
    arrived: threading.Semaphore


class GatedStore:
    """A store that holds every write back until the gate opens."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self._store, self._gate = store, gate

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return partial(self._late, found) if name in {"write", "put_if_absent", "adopt"} else found

    def _late(self, write, *arguments):
        self._gate.arrived.release()
        assert self._gate.opened.wait(DEADLINE_SECONDS)
        return write(*arguments)


@dataclass(frozen=True)
class GatedSpec(StoreSpec):
    gate: Gate

    def open(self) -> Store:
        store: Any = GatedStore(super().open(), self.gate)
        return store


class HauntedRunner(InlineRunner):
    """Starts every task twice; the first stalls before it writes, the twin does the work."""

    def __init__(self, spec, zombies, gate):
        super().__init__(spec)
        self._gated = GatedSpec(spec.uri, spec.config, gate)
        self._zombies = zombies

    def _haunt(self, task, *encoder):
        arguments = (task, task.shared, self._gated, THREADS_PER_TASK, *encoder)
        zombie = threading.Thread(target=perform, args=arguments)
        zombie.start()
        self._zombies.append(zombie)
        assert self._gated.gate.arrived.acquire(timeout=DEADLINE_SECONDS)

    def run(self, tasks):
        for place, task in enumerate(tasks):
            self._haunt(task)
            yield place, next(super().run([task]))[1]

    def encode(self, tasks, spec):
        encoder = _load(spec, None)
        for place, task in enumerate(tasks):
            self._haunt(task, encoder)
            yield place, next(super().encode([task], spec))[1]


class Haunted:
    def __init__(self, spec, zombies, gate):
        self.arguments = (spec, zombies, gate)

    def __enter__(self):
        return HauntedRunner(*self.arguments)

    def __exit__(self, *_):
        return None


def test_zombie_workers_that_write_after_the_commit_change_nothing(calm, tmp_path):
    folder, wanted = calm
    config = configured(tmp_path, {**_content(folder, "x"), "root": str(tmp_path / "root")})
    spec, store = StoreSpec(config.root, config.storage), LocalStore(config.root)
    zombies, gate = [], Gate(threading.Event(), threading.Semaphore(0))
    summary = run(config, spec, lambda: Haunted(spec, zombies, gate))
    assert len(zombies) == summary["tasks"] >= 10
    before = {path: store.read(path) for path in _names(store, "receipts", "releases", "aliases")}
    gate.opened.set()
    for zombie in zombies:
        zombie.join(DEADLINE_SECONDS)
    assert {path: store.read(path) for path in _names(store, "receipts", "releases", "aliases")} == before
    assert data_files(store) == wanted
    assert verify(store, None).problems == ()
    assert run_inline(config)["skipped"] is True


def _names(store, *folders):
    return [info.path for folder in folders for info in store.list(folder)]


# ------------------------------------------------------------------------------------------------ receipts


def test_a_receipt_whose_file_is_gone_is_superseded_whichever_file_it_is(calm, tmp_path):
    folder, wanted = calm
    content = _content(folder, "x")
    faults = Faults({})
    config = configured(tmp_path, {**content, "root": str(tmp_path / "probe")})
    spec = FaultySpec(config.root, config.storage, faults)
    run(config, spec, lambda: nullcontext(InlineRunner(spec)))
    last = faults.paths.index("releases/1.json")
    files = [path for path in faults.paths if Path(path).suffix == ".parquet"]
    for n, path in enumerate(files):
        config = configured(tmp_path, {**content, "root": str(tmp_path / f"root-{n}")})
        dying = FaultySpec(config.root, config.storage, Faults({last: Fault.DIES_BEFORE}))
        with pytest.raises(Died):
            run(config, dying, lambda dying=dying: nullcontext(InlineRunner(dying)))
        LocalStore(config.root).delete(path)
        assert run_inline(config)["documents"] == ROWS
        assert data_files(LocalStore(config.root)) == wanted, path
        assert verify(LocalStore(config.root), None).problems == ()
    assert len(files) >= 15


# ------------------------------------------------------------------------------------------------ two drivers


def _drive(folder, code_bytes, rounds, barrier, outcomes):
    """Run one configuration per round, each time together with the other process."""
    home = Path(folder) / f"driver-{os.getpid()}"
    home.mkdir()
    for n in range(rounds):
        config = configured(home, _content(Path(folder), f"root-{n}", code_bytes))
        barrier.wait(DEADLINE_SECONDS)
        try:
            run_inline(config)
            outcomes.put((n, 0))
        except PipelineError as error:
            outcomes.put((n, error.exit_code))


def _race(folder, sizes, rounds):
    """Exit codes of two drivers by round."""
    context = multiprocessing.get_context("spawn")
    barrier, outcomes = context.Barrier(2), context.Queue()
    drivers = [
        context.Process(target=_drive, args=(str(folder), size, rounds, barrier, outcomes)) for size in sizes
    ]
    for driver in drivers:
        driver.start()
    found = [outcomes.get(timeout=DEADLINE_SECONDS) for _ in range(2 * rounds)]
    for driver in drivers:
        driver.join(DEADLINE_SECONDS)
        assert driver.exitcode == 0
    return [sorted(code for m, code in found if m == n) for n in range(rounds)]


@pytest.mark.parametrize("sizes", [(16, 16), (16, 8)], ids=["same-config", "different-configs"])
def test_two_drivers_at_once_leave_a_root_as_if_they_had_come_in_turn(tmp_path, sizes):
    rounds = 8
    write_parquet(tmp_path / "corpus.parquet", rows_of(ROWS))
    codes = _race(tmp_path, sizes, rounds)
    print(f"\nexit codes by round: {codes}")
    wanted: dict[str, bytes] = {}
    for size in sorted(set(sizes)):
        config = configured(tmp_path, _content(tmp_path, f"calm-{size}", size))
        run_inline(config)
        wanted |= data_files(LocalStore(config.root))
    for n, pair in enumerate(codes):
        assert 0 in pair
        assert set(pair) <= {0, PUBLISH_CONFLICT, RETRY}
        store = LocalStore(str(tmp_path / f"root-{n}"))
        assert verify(store, None).problems == ()
        assert read_alias(store).seq == pair.count(0) or len(set(sizes)) == 1
        for size in sizes:
            assert (
                run_inline(configured(tmp_path, _content(tmp_path, f"root-{n}", size)))["documents"] == ROWS
            )
        found = data_files(store)
        assert {path: found.get(path) for path in wanted} == wanted
        assert set(found) == set(wanted)
