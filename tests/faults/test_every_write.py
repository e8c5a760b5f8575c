"""Every write of a run fails in every way, one at a time and in storms: the rerun ends in the bytes of a calm run."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config import Config
from pipeline.errors import PublishConflictError, TransientError
from pipeline.execution.backfilling import Count, Reach, backfill
from pipeline.execution.flows import run
from pipeline.execution.runner import InlineRunner
from pipeline.execution.upgrading import upgrade
from pipeline.release import verify
from pipeline.storage import LocalStore
from tests.faults.stores import Died, Fault, Faults, FaultySpec
from tests.integration.roads import configured, data_files, rows_of, settings, write_parquet

ROWS = 32
FIRST = {Fault.FAILS_AFTER}
"""Faults that every test run tries at every write of a first run; the others take minutes and are slow."""


def _slow_but(kinds, quick):
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


class PatientRunner(InlineRunner):
    """Does a task again after a transient error, as Ray does."""

    def run(self, tasks):
        yield from self._one_by_one(tasks, super().run)

    def encode(self, tasks, spec):
        yield from self._one_by_one(tasks, lambda some: super(PatientRunner, self).encode(some, spec))

    def _one_by_one(self, tasks, perform) -> Iterator[Any]:
        for place, task in enumerate(tasks):
            try:
                done = next(perform([task]))[1]
            except TransientError:
                done = next(perform([task]))[1]
            yield place, done


@dataclass
class Calm:
    """A run without faults, as the yardstick; `before` is the root that it started from."""

    folder: Any
    before: Any
    content: dict[str, Any]
    writes: int
    documents: int
    data: dict[str, bytes]
    logs: list[str]
    job: Callable[..., dict[str, Any]]


def _content(folder):
    content = settings(
        folder / "root",
        folder / "corpus.parquet",
        evaluation={"sample_queries": 5},
        layout={"rows_per_list": 8, "segment_rows": 16},
        embedding={"unit_texts": 12},
    )
    content["corpus"] |= {"shard_rows": 16, "name": "notes"}
    content["encoders"] |= {"wide": {"model": "hashing:128"}}
    return content


def _run(config: Config, faults: Faults, kind=InlineRunner) -> dict[str, Any]:
    spec = FaultySpec(config.root, config.storage, faults)
    return run(config, spec, lambda: nullcontext(kind(spec)))


def _upgrade(config: Config, faults: Faults, kind=InlineRunner) -> dict[str, Any]:
    spec = FaultySpec(config.root, config.storage, faults)
    return upgrade(config, spec, lambda: nullcontext(kind(spec)), encoder="wide")


def _backfill(config: Config, faults: Faults, kind=InlineRunner) -> dict[str, Any]:
    spec = FaultySpec(config.root, config.storage, faults)
    return backfill(config, spec, lambda: nullcontext(kind(spec)), reach=Reach(to=Count(ROWS // 2)))


def _log_names(store):
    """Names of the logs that must have the same length whatever happened: one release, one move, one claim."""
    return sorted(info.path for folder in ("releases", "aliases", "root.json") for info in store.list(folder))


def _calm(folder, before, job=_run):
    config = configured(folder, _content(folder))
    if before is not None:
        shutil.copytree(before, config.root)
    faults = Faults({})
    summary = job(config, faults)
    store = LocalStore(config.root)
    return Calm(
        folder,
        before,
        _content(folder),
        len(faults.paths),
        summary["documents"],
        data_files(store),
        _log_names(store),
        job,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The first run on an empty root."""
    folder = tmp_path_factory.mktemp("first")
    write_parquet(folder / "corpus.parquet", rows_of(ROWS))
    return _calm(folder, None)


@pytest.fixture(scope="module")
def next_run(tmp_path_factory, first):
    """A run on a root with a release, after the corpus changed."""
    folder = tmp_path_factory.mktemp("next")
    rows = rows_of(ROWS + 6)
    write_parquet(folder / "corpus.parquet", [{**rows[0], "text": "edited river1"}, *rows[3:]])
    return _calm(folder, first.folder / "root")


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory, first):
    """An upgrade of a root with a release."""
    folder = tmp_path_factory.mktemp("upgraded")
    shutil.copy(first.folder / "corpus.parquet", folder)
    return _calm(folder, first.folder / "root", _upgrade)


@pytest.fixture(scope="module")
def backfilled(tmp_path_factory, upgraded):
    """A backfill of a part of it."""
    folder = tmp_path_factory.mktemp("backfilled")
    shutil.copy(upgraded.folder / "corpus.parquet", folder)
    return _calm(folder, upgraded.folder / "root", _backfill)


@pytest.fixture
def trial(tmp_path):
    """Fresh copies of a calm run's starting root."""
    numbers = iter(range(10_000))

    def fresh(calm: Calm) -> Config:
        root = tmp_path / f"root-{next(numbers)}"
        if calm.before is not None:
            shutil.copytree(calm.before, root)
        return configured(tmp_path, {**calm.content, "root": str(root)})

    return fresh


def _encoded(root):
    """(vectors, distinct texts by encoder) in the caches' files."""
    hashes = [
        (path.parts[-3], value)
        for path in root.glob("embeddings/*/*/*.parquet")
        for value in pq.read_table(path, columns=["text_hash"])["text_hash"].to_pylist()
    ]
    return len(hashes), len(set(hashes))


def _check(config, calm, summary):
    store = LocalStore(config.root)
    assert data_files(store) == calm.data
    assert _log_names(store) == calm.logs
    assert summary["documents"] == calm.documents
    assert verify(store, None).problems == ()
    vectors, texts = _encoded(store._folder)
    assert vectors == texts


def _until_done(job, config, faults, kind, attempts):
    """Rerun after every failure, as a scheduler does; returns the last summary and the number of reruns."""
    for attempt in range(attempts):
        try:
            return job(config, faults, kind), attempt
        except (Died, TransientError, PublishConflictError):
            continue
    pytest.fail(f"not done after {attempts} runs")


def _sweep(calm, trial, fault, kind):
    fired = reruns = 0
    for at in range(calm.writes):
        config, faults = trial(calm), Faults({at: fault})
        _, again = _until_done(calm.job, config, faults, kind, 3)
        faults.land_all()
        _check(config, calm, calm.job(config, faults, kind))
        fired += faults.fired
        reruns += again
    print(f"\n{fault}: {fired} faults at {calm.writes} writes, {reruns} reruns")
    return fired, reruns


@pytest.mark.parametrize("fault", _slow_but([f for f in Fault if not f.startswith("dies")], FIRST))
def test_a_fault_at_any_write_of_a_first_run_ends_in_the_same_bytes(first, trial, fault):
    fired, reruns = _sweep(first, trial, fault, InlineRunner)
    assert fired == first.writes or fault is Fault.CUT_SHORT
    assert fired >= first.writes // 2
    # Giving back the lease is the one write whose failure fails nothing.
    assert reruns == 0 if fault is Fault.ARRIVES_TWICE else reruns >= fired - 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.FAILS_AFTER, Fault.LANDS_LATE])
def test_a_fault_at_any_write_that_the_runner_tries_again_ends_in_the_same_bytes(first, trial, fault):
    fired, reruns = _sweep(first, trial, fault, PatientRunner)
    assert reruns < fired == first.writes


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.LANDS_LATE, Fault.DIES_BEFORE, Fault.DIES_AFTER])
def test_a_fault_at_any_write_of_the_next_run_ends_in_the_same_bytes(next_run, trial, fault):
    fired, _ = _sweep(next_run, trial, fault, InlineRunner)
    assert fired == next_run.writes


@pytest.mark.parametrize(
    "fault", _slow_but([Fault.DIES_AFTER, Fault.FAILS_AFTER, Fault.LANDS_LATE], {Fault.DIES_AFTER})
)
def test_a_fault_at_any_write_of_an_upgrade_ends_in_the_same_bytes(upgraded, trial, fault):
    fired, _ = _sweep(upgraded, trial, fault, InlineRunner)
    assert fired == upgraded.writes


@pytest.mark.parametrize(
    "fault", _slow_but([Fault.DIES_AFTER, Fault.FAILS_AFTER, Fault.LANDS_LATE], {Fault.DIES_AFTER})
)
def test_a_fault_at_any_write_of_a_backfill_ends_in_the_same_bytes(backfilled, trial, fault):
    fired, _ = _sweep(backfilled, trial, fault, InlineRunner)
    assert fired >= backfilled.writes - 2


@pytest.mark.parametrize("seed", _slow_but(range(16), range(3)))
def test_a_storm_of_faults_ends_in_the_same_bytes(next_run, trial, seed):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(list(Fault), 2000)
    schedule = {n: Fault(kinds[n]) for n in range(2000) if rng.random() < 0.12}
    config, faults = trial(next_run), Faults(schedule)
    summary, _ = _until_done(_run, config, faults, (InlineRunner, PatientRunner)[seed % 2], 40)
    faults.land_all()
    assert faults.fired >= 1
    _check(config, next_run, summary)
