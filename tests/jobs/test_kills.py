"""The driver and everything it started, killed without warning: the next run goes on to the same bytes.

A trial is a root on which a run is started, killed at a random write, and started again until one is left alone. A kill comes
when the root has a random number of objects more than at the start, so that all stages are met, short ones too.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.config import StorageConfig
from pipeline.release import verify
from pipeline.storage import LocalStore, S3Store, Store, open_store
from tests.integration.roads import data_files, rows_of
from tests.jobs.test_command_line import REPOSITORY, small, summary_of

ROWS = 600
UNIT_TEXTS = 40
ACTORS = 2
IN_FLIGHT = 2 * ACTORS * UNIT_TEXTS
"""Texts that actors have or wait with at one moment."""
KILLS_PER_TRIAL = 4
"""At most: each kill costs a start of Ray, and so does the run that is left alone at the end."""
POLL_SECONDS = {True: 0.005, False: 0.1}
"""By whether the root is local: asking a server all the time would slow the run down."""
DEADLINE_SECONDS = 120


@dataclass
class Table:
    """What came of the kills."""

    kills: int = 0
    at_work: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    encoded_twice: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {n}" for name, n in self.stages.most_common())
        return (
            f"\n{self.kills} kills, {self.at_work} of them at work; last receipt before the kill: {stages}"
            f"\ntrials that lost, doubled or changed something: {len(self.wrong)} {self.wrong}"
            f"\ntexts encoded twice in a trial: {max(self.encoded_twice)} at most, "
            f"{sum(self.encoded_twice)} in all {len(self.encoded_twice)}; allowed per kill: {IN_FLIGHT}"
            f"\n{self.seconds:.0f} s, {self.seconds / max(self.kills, 1):.1f} s per kill with its rerun"
        )


def _start(conf, root, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *(words or ["run"]), str(conf), "--set", f"root={root}"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def _kill_everything(process):
    """The driver first, then all that it started, Ray's own processes too."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    psutil.wait_procs(family, timeout=20)
    process.communicate()


def _objects(store: Store) -> int:
    return sum(1 for _ in store.list(""))


def _kill_at_write(process, store, objects, jitter) -> bool:
    """Kill when the root holds that many objects; returns whether the run was still at work."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    pause = POLL_SECONDS[isinstance(store, LocalStore)]
    while process.poll() is None and _objects(store) < objects and time.monotonic() < deadline:
        time.sleep(pause)
    time.sleep(jitter)
    if process.poll() is not None:
        process.communicate()
        return False
    _kill_everything(process)
    return True


def _vectors(store) -> dict[str, tuple[object, int]]:
    """When each file of the cache was written, and its rows."""
    found = {}
    for info in store.list("embeddings"):
        if info.path.endswith(".parquet"):
            with store.open_input(info.path) as file:
                found[info.path] = (info.modified, pq.read_metadata(file).num_rows)
    return found


def _last_stage(store) -> str:
    receipts = sorted((info.modified, info.path) for info in store.list("receipts"))
    return str(json.loads(store.read(receipts[-1][1]))["stage"]) if receipts else "before the first"


def _written(before, after) -> int:
    return sum(rows for path, (when, rows) in after.items() if before.get(path, (None, 0))[0] != when)


def _trial(conf, store, whole, rng, table, kills) -> tuple[dict[str, object], int]:
    """Kill, and kill the rerun too, then let one finish; returns its summary and how many texts were encoded in all."""
    encoded, before = 0, {}
    for _ in range(kills):
        there = _objects(store)
        # Plan marks and units of an attempt come on top of what a calm run leaves.
        target = there + int(rng.integers(1, max(2, whole - there)))
        process = _start(conf, store.uri)
        at_work = _kill_at_write(process, store, target, rng.uniform(0, 0.02))
        table.kills += 1
        table.at_work += at_work
        after = _vectors(store)
        encoded, before = encoded + _written(before, after), after
        if not at_work:
            break
        table.stages[_last_stage(store)] += 1
    process = _start(conf, store.uri)
    out, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, out
    summary = summary_of(subprocess.CompletedProcess([], 0, out, ""))
    return summary, encoded + int(summary["encoded"])


def _problems(store, wanted, summary, encoded) -> list[str]:
    problems = list(map(str, verify(store, None).problems))
    found = data_files(store)
    problems += [f"lost {path}" for path in sorted(wanted.keys() - found.keys())]
    problems += [f"extra {path}" for path in sorted(found.keys() - wanted.keys())]
    problems += [f"other bytes in {path}" for path in sorted(wanted) if found.get(path, b"") != wanted[path]]
    if summary["documents"] != ROWS:
        problems.append(f"{summary['documents']} documents")
    if sum(rows for _, rows in _vectors(store).values()) != ROWS:
        problems.append("a text has two vectors")
    if len(list(store.list("aliases"))) != 1:
        problems.append("published twice")
    if not ROWS <= encoded <= ROWS + KILLS_PER_TRIAL * IN_FLIGHT:
        problems.append(f"{encoded} texts encoded")
    return problems


def _kill_and_rerun(tmp_path, kills, seed, root_of, storage=None) -> Table:
    rows = {"storage": storage.model_dump(exclude_none=True)} if storage is not None else {}
    more = {"embedding": {"unit_texts": UNIT_TEXTS, "actors": ACTORS}, "ray": {"num_cpus": 2}}
    conf = small(tmp_path, rows_of(ROWS), **more, **rows)
    calm = open_store(root_of("calm"), storage)
    out, _ = _start(conf, calm.uri).communicate(timeout=DEADLINE_SECONDS)
    wanted, whole = data_files(calm), _objects(calm)
    assert json.loads(out.splitlines()[-1])["documents"] == ROWS
    rng, table, start = np.random.default_rng(seed), Table(), time.monotonic()
    while table.kills < kills:
        store = open_store(root_of(f"root-{table.kills}"), storage)
        summary, encoded = _trial(conf, store, whole, rng, table, min(KILLS_PER_TRIAL, kills))
        table.encoded_twice.append(encoded - ROWS)
        table.wrong += [f"{store.uri}: {problem}" for problem in _problems(store, wanted, summary, encoded)]
    table.seconds = time.monotonic() - start
    print(table)
    assert table.wrong == []
    assert table.at_work >= 0.6 * table.kills
    return table


def _calm_and_killed(conf, before, folder, rng, *words):
    """A job on a root as it was before, left alone, and on another one killed, then started again; roots and the summary."""
    calm, killed = (shutil.copytree(before, folder / name) for name in ("calm", "killed"))
    store = LocalStore(str(killed))
    there = _objects(store)
    out, _ = _start(conf, calm, *words).communicate(timeout=DEADLINE_SECONDS)
    whole = _objects(LocalStore(str(calm)))
    target = there + int(rng.integers(1, max(2, whole - there)))
    at_work = _kill_at_write(_start(conf, killed, *words), store, target, rng.uniform(0, 0.02))
    print(f"\n{words[0]}: killed at {_objects(store) - there} of {whole - there} objects, at work: {at_work}")
    again = _start(conf, killed, *words)
    out, _ = again.communicate(timeout=DEADLINE_SECONDS)
    assert again.returncode == 0, out
    return calm, killed


def _local(tmp_path):
    def root(name):
        return str(tmp_path / name)

    assert isinstance(open_store(root("x")), LocalStore)
    return root


def _remote(s3_root, config: StorageConfig):
    def root(name):
        return f"{s3_root}/{name}"

    assert isinstance(open_store(root("x"), config), S3Store)
    return root


@pytest.mark.ray
def test_killed_runs_go_on_to_the_same_bytes(tmp_path):
    _kill_and_rerun(tmp_path, 2, 1, _local(tmp_path))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_upgrades_and_backfills_go_on_to_the_same_bytes(tmp_path, seed):
    encoders = {"words": {"model": "hashing:64"}, "wide": {"model": "hashing:128"}}
    upgrade = {"sample_documents": 150, "tolerance": 1.0}
    conf = small(tmp_path, rows_of(ROWS), encoders=encoders, upgrade=upgrade, layout={"rows_per_list": 20})
    rng, before = np.random.default_rng(seed), tmp_path / "before"
    _start(conf, before).communicate(timeout=DEADLINE_SECONDS)
    for words in (("upgrade", "--encoder", "wide"), ("backfill", "--set", "encoder=wide", "--to", "50%")):
        calm, killed = _calm_and_killed(conf, before, tmp_path / words[0], rng, *words)
        done, again = (LocalStore(str(root)) for root in (calm, killed))
        assert data_files(done) == data_files(again)
        assert verify(again, None).problems == ()
        assert len(list(done.list("aliases"))) == len(list(again.list("aliases")))
        assert sum(n for _, n in _vectors(done).values()) == sum(n for _, n in _vectors(again).values())
        before = calm


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_killed_runs_on_s3_go_on_to_the_same_bytes(tmp_path, s3_process, s3_process_root):
    config = StorageConfig(endpoint_url=s3_process)
    _kill_and_rerun(tmp_path, 1, 2, _remote(s3_process_root, config), config)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_runs_killed_at_random_writes_go_on_to_the_same_bytes(tmp_path):
    table = _kill_and_rerun(tmp_path, int(os.environ.get("STRATA_TEST_KILLS", "100")), 3, _local(tmp_path))
    assert len(table.stages) >= 5


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.timeout(1800)
def test_twenty_runs_on_s3_killed_at_random_writes_go_on_to_the_same_bytes(
    tmp_path, s3_process, s3_process_root
):
    config = StorageConfig(endpoint_url=s3_process)
    _kill_and_rerun(tmp_path, 20, 4, _remote(s3_process_root, config), config)
