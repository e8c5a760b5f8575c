"""Tasks and encoder actors on a real local Ray: lost workers, transient errors, errors that come out as themselves."""

import os
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pytest
import ray

from pipeline.artifacts import StageOutput
from pipeline.config import ClusterConfig, EmbeddingConfig, EncoderConfig, StorageConfig
from pipeline.errors import ConfigError, DataError, TransientError
from pipeline.execution.encoders import EncoderSpec
from pipeline.execution.runner import RayRunner, _Shared
from pipeline.execution.work import StoreSpec, Task
from pipeline.storage import Store, open_store
from pipeline.tables import write_table

pytestmark = pytest.mark.ray

SCHEMA = pa.schema([("n", pa.int64())])
HASHING = EncoderConfig(model="hashing:32")


def _spec(config=HASHING):
    return EncoderSpec("words", config, "float32", EmbeddingConfig(), StorageConfig())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    spec = StoreSpec(str(tmp_path_factory.mktemp("root")), StorageConfig())
    with RayRunner(spec, ClusterConfig(num_cpus=2)) as runner:
        yield runner, open_store(spec.uri)


def _first_time(store: Store, name: str) -> bool:
    """Whether nobody asked before: an attempt leaves its mark."""
    return store.put_if_absent(f"marks/{name}", os.urandom(16))


def _write(store, *_encoder, n, fail, factor=1):
    match fail:
        case "die" if _first_time(store, f"die-{n}"):
            os._exit(1)
        case "transient" if _first_time(store, f"transient-{n}"):
            raise TransientError("the store", "was away", "try again")
        case "always":
            raise DataError(f"row {n}", "is bad", "mend it")
        case _:
            pass
    ref = write_table(store, "scratch", SCHEMA, [pa.table({"n": [n * factor]})])
    return StageOutput(files={"out": ref}, numbers={"n": n * factor})


def _tasks(kind, *, fail=None, at=3, count=8, shared=None):
    return [
        Task(
            kind,
            {"n": n, "fail": fail if n == at else None},
            partial(_write, n=n, fail=fail if n == at else None),
            shared or {},
        )
        for n in range(count)
    ]


def _numbers(results):
    return {place: done.output.numbers["n"] for place, done in results}


@pytest.mark.parametrize("fail", [None, "die", "transient"])
def test_tasks_survive_a_dead_worker_and_a_transient_error(cluster, fail):
    runner, _ = cluster
    assert _numbers(runner.run(_tasks(f"run-{fail}", fail=fail))) == {n: n for n in range(8)}


@pytest.mark.parametrize("fail", [None, "die", "transient"])
def test_encoding_survives_a_dead_actor_and_a_transient_error(cluster, fail):
    runner, store = cluster
    for info in list(store.list("marks")):
        store.delete(info.path)
    assert _numbers(runner.encode(_tasks(f"encode-{fail}", fail=fail), _spec())) == {n: n for n in range(8)}


def test_shared_arguments_reach_every_task(cluster):
    runner, _ = cluster
    assert _numbers(runner.run(_tasks("shared", shared={"factor": 10}))) == {n: 10 * n for n in range(8)}


@pytest.mark.usefixtures("cluster")
def test_shared_arguments_are_in_the_object_store_once_and_none_take_no_room():
    shared = _Shared()
    assert [shared.of(task) for task in _tasks("none")] == [{}] * 8
    tasks = _tasks("one", shared={"factor": 10})
    assert len({shared.of(task) for task in tasks}) == 1


@pytest.mark.usefixtures("cluster")
def test_shared_arguments_that_come_and_go_are_never_taken_for_others():
    shared = _Shared()
    found = [ray.get(shared.of(replace(_tasks("x", count=1)[0], shared={"n": n}))) for n in range(50)]
    assert found == [{"n": n} for n in range(50)]


def test_an_error_of_ours_comes_out_as_itself(cluster):
    runner, _ = cluster
    with pytest.raises(DataError, match="row 3: is bad; mend it"):
        list(runner.run(_tasks("always", fail="always")))
    with pytest.raises(DataError, match="row 3"):
        list(runner.encode(_tasks("encode-always", fail="always"), _spec()))


def test_an_encoder_that_cannot_be_loaded_is_a_configuration_error_at_once(cluster):
    runner, _ = cluster
    with pytest.raises(ConfigError, match="no_such_model"):
        list(runner.encode(_tasks("load"), _spec(EncoderConfig(model="package:no_such_model"))))


def test_work_that_was_done_is_not_done_again(cluster):
    runner, _ = cluster
    tasks = _tasks("again")
    assert [done.reused for _, done in runner.run(tasks)] == [False] * 8
    assert [done.reused for _, done in runner.run(tasks)] == [True] * 8


def _worker_of(_store):
    return StageOutput(files={}, numbers={"n": os.getpid()})


def _pids(runner, kind, *, ends_worker):
    tasks = [Task(kind, {"n": n}, _worker_of, ends_worker=ends_worker) for n in range(4)]
    return list(_numbers(runner.run(tasks)).values())


def test_a_task_that_ends_its_worker_has_one_of_its_own(cluster):
    runner, _ = cluster
    alone = _pids(runner, "alone", ends_worker=True)
    assert len(set(alone)) == 4
    assert not set(alone) & set(_pids(runner, "after", ends_worker=False))
