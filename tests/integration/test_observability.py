"""What a run on a real local Ray says of itself: log lines of driver and workers, attempts, figures."""

import json
import os
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import structlog
from ray.experimental import internal_kv

from pipeline.artifacts import StageOutput
from pipeline.config import ClusterConfig, EmbeddingConfig, EncoderConfig, StorageConfig
from pipeline.errors import DataError, StorageUnavailableError, TransientError
from pipeline.execution.attempts import NOTES, WORKER_LOST
from pipeline.execution.encoders import EncoderSpec
from pipeline.execution.ledger import Ledger
from pipeline.execution.logs import ON_EVERY_LINE, configure_logging
from pipeline.execution.recording import recorded
from pipeline.execution.runner import RayRunner
from pipeline.execution.work import StoreSpec, Task
from pipeline.storage import open_store
from pipeline.tables import write_table
from tests.integration.roads import configured, rows_of, run_on, settings, write_parquet
from tests.integration.test_ray import _first_time

pytestmark = pytest.mark.ray

SCHEMA = pa.schema([("n", pa.int64())])
WORDS = EncoderSpec("words", EncoderConfig(model="hashing:32"), "float32", EmbeddingConfig(), StorageConfig())


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    spec = StoreSpec(str(tmp_path_factory.mktemp("root")), StorageConfig())
    with RayRunner(spec, ClusterConfig(num_cpus=2)) as started:
        yield started


@pytest.fixture
def log(tmp_path, monkeypatch):
    """JSON lines that the driver wrote to stderr so far."""
    path = tmp_path / "stderr"
    with path.open("w", buffering=1) as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        configure_logging()
        yield lambda: [json.loads(line) for line in path.read_text().splitlines()]
        structlog.reset_defaults()


def worker_lines(run):
    """JSON lines of a run in the log files of Ray's workers."""
    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir()) / context.get_session_name() / "logs"
    lines = [line for path in folder.glob("worker-*.err") for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if line["run"] == run]


def _write(store, *_encoder, n, fail, times):
    for attempt in range(times):
        if not _first_time(store, f"{fail}-{n}-{attempt}"):
            continue
        match fail:
            case "die":
                os._exit(1)
            case "transient":
                raise StorageUnavailableError("the store", "was away", "try again")
            case "bad":
                raise DataError(f"row {n}", "is bad", "mend it")
            case "defect":
                raise ZeroDivisionError(f"row {n}")
    ref = write_table(store, "scratch", SCHEMA, [pa.table({"n": [n]})])
    return StageOutput(files={"out": ref}, numbers={"n": n})


def _tasks(stage, fail, *, times=1):
    return [
        Task(
            stage, {"bucket": n, "fail": fail}, partial(_write, n=n, fail=fail, times=times if n == 1 else 0)
        )
        for n in range(3)
    ]


def _with_run(run):
    return structlog.contextvars.bound_contextvars(run=run)


def _forget(runner):
    store = open_store(runner._store.uri)
    for info in list(store.list("marks")):
        store.delete(info.path)


@pytest.mark.parametrize("encoding", [False, True])
@pytest.mark.parametrize(("fail", "reason"), [("transient", "StorageUnavailableError"), ("die", WORKER_LOST)])
def test_a_retried_task_tells_driver_and_log_which_attempt_and_why(runner, log, fail, reason, encoding):
    _forget(runner)
    run, tasks = f"run-{fail}-{encoding}", _tasks(f"stage-{fail}-{encoding}", fail, times=2)
    with _with_run(run):
        results = runner.encode(tasks, WORDS) if encoding else runner.run(tasks)
        done = dict(results)
    assert (done[1].attempt, done[1].failures) == (3, (reason, reason))
    assert {(done[n].attempt, done[n].failures) for n in (0, 2)} == {(1, ())}
    retried = [line for line in log() if line["event"] == "task_retried"]
    assert [(line["attempt"], line["reason"]) for line in retried] == [(1, reason), (2, reason)]
    assert {(line["run"], line["stage"], line["shard"]) for line in retried} == {
        (run, tasks[1].stage, "bucket 1")
    }
    finished = [line for line in worker_lines(run) if line["event"] == "task_done"]
    assert {line["shard"]: line["attempt"] for line in finished} == {
        "bucket 0": 1,
        "bucket 1": 3,
        "bucket 2": 1,
    }


def test_a_task_that_fails_for_good_is_an_error_line(runner, log):
    _forget(runner)
    with _with_run("for-good"), pytest.raises(DataError, match="row 1"):
        list(runner.run(_tasks("for-good", "bad")))
    (failed,) = [line for line in log() if line["event"] == "task_failed"]
    assert failed["level"] == "error"
    assert (failed["stage"], failed["shard"], failed["attempt"]) == ("for-good", "bucket 1", 1)
    assert (failed["reason"], failed["message"]) == ("DataError", "row 1: is bad; mend it")


def _notes():
    return internal_kv._internal_kv_list("", namespace=NOTES)


def test_a_defect_is_an_error_line_too_and_its_note_is_gone(runner, log):
    _forget(runner)
    with _with_run("defect"), pytest.raises(ray.exceptions.RayTaskError, match="row 1"):
        list(runner.run(_tasks("defect", "defect")))
    (failed,) = [line for line in log() if line["event"] == "task_failed"]
    assert (failed["stage"], failed["shard"], failed["attempt"]) == ("defect", "bucket 1", 1)
    assert (failed["reason"], failed["message"]) == ("ZeroDivisionError", "row 1")
    assert _notes() == []


@pytest.fixture
def key_value_store_is_away(monkeypatch):
    def away(*_, **__):
        raise ray.exceptions.RpcError("the key-value store is away")

    monkeypatch.setattr(internal_kv, "_internal_kv_list", away)


@pytest.mark.usefixtures("key_value_store_is_away")
def test_notes_that_cannot_be_read_cost_no_result_and_hide_no_error(runner, log):
    _forget(runner)
    done = dict(runner.run(_tasks("no-notes", "transient")))
    assert done[1].attempt == 2
    with pytest.raises(DataError, match="row 1"):
        list(runner.run(_tasks("no-notes-bad", "bad")))
    events = [line["event"] for line in log()]
    assert events.count("notes_not_read") == 2
    assert events[-1] == "task_failed"


def test_a_task_that_is_tried_in_vain_says_how_often(runner, log):
    _forget(runner)
    with _with_run("in-vain"), pytest.raises(TransientError):
        list(runner.run(_tasks("in-vain", "transient", times=9)))
    (failed,) = [line for line in log() if line["event"] == "task_failed"]
    assert (failed["attempt"], failed["reason"]) == (4, "StorageUnavailableError")


@pytest.mark.usefixtures("runner")
def test_every_line_of_a_run_names_run_stage_shard_and_attempt(log, tmp_path):
    write_parquet(tmp_path / "corpus.parquet", [*rows_of(500), *rows_of(3)])
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    ledger = Ledger()
    with recorded(config, lambda _: 1) as under_way:
        under_way.ledger = ledger
        under_way.summary = run_on(config, ledger)
    lines = log()
    assert all(set(ON_EVERY_LINE) <= set(line) for line in lines)
    assert {line["run"] for line in lines} == {under_way.run}
    events = [line["event"] for line in lines]
    assert events[:2] == ["run_started", "planned"]
    assert events[-1] == "run_finished"
    started, finished = (
        [line["stage"] for line in lines if line["event"] == f"stage_{what}"]
        for what in ("started", "finished")
    )
    kinds = [
        "read",
        "merge",
        "units",
        "encode",
        "learn",
        "train",
        "cut",
        "grow",
        "place",
        "settle",
        "build",
        "exact",
    ]
    assert started == finished == kinds

    workers = worker_lines(under_way.run)
    assert len(workers) == sum(figures.done for figures in ledger.stages.values())
    assert {line["stage"] for line in workers} == set(started)
    assert {line["attempt"] for line in workers} == {1}
    shards = {line["shard"] for line in workers if line["stage"] == "read"}
    assert shards == {"shard 0", "shard 1"}
    assert all(line["shard"] for line in workers if line["stage"] not in {"learn", "train"})

    read = ledger.stages["read"]
    assert (read.tasks, read.done, read.reused, read.retried, read.rows) == (2, 2, 0, 0, 503)
    assert ledger.stages["encode"].peak_memory_mb > 50
    assert dict(ledger.dead_letters) == {"duplicate": 3}


@pytest.mark.usefixtures("runner")
def test_figures_of_any_corpus_and_reason_are_taken(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "one"}\n{"_id": "b", "text"\n')
    content = settings(tmp_path / "root", tmp_path / "corpus.jsonl")
    content["corpus"] |= {
        "name": "Bücher №1",
        "format": "jsonl",
        "text": ["text"],
        "attributes": [],
        "error_budget": 1,
    }
    ledger = Ledger()
    assert run_on(configured(tmp_path, content), ledger)["documents"] == 1
    assert [reason.isascii() for reason in ledger.dead_letters] == [False]
