import io
import json

import pytest
import structlog

from pipeline.artifacts import FileRef, StageOutput
from pipeline.execution.attempts import WORKER_LOST
from pipeline.execution.ledger import MOST_REASONS, Ledger, StageWatch
from pipeline.execution.logs import ON_EVERY_LINE, StrayOutput, configure_logging
from pipeline.execution.metrics import METRICS
from pipeline.execution.work import Done, Task


class Recorded:
    """Figures as they would be exported, with the checks that Ray makes."""

    def __init__(self):
        self.values = {}

    def record(self, name, value=1.0, **labels):
        assert set(labels) == set(METRICS[name].labels)
        key = (name, *labels.values())
        self.values[key] = value + (self.values.get(key, 0) if METRICS[name].kind == "counter" else 0)


@pytest.fixture
def log(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    configure_logging()
    yield lambda: [json.loads(line) for line in stderr.getvalue().splitlines()]
    structlog.reset_defaults()


def _task(n):
    return Task("read", {"bucket": n}, lambda _: StageOutput(files={}))


def _done(*, reused=False, failures=(), letters=None, peak_mb=100.0):
    ref = FileRef(path="p", rows=10, bytes=1000, sha256="s")
    attempt = len(failures) + 1
    return Done(
        StageOutput(files={"out": ref}, numbers={"encoded": 5}),
        reused,
        0.5,
        peak_mb,
        letters or {},
        attempt,
        failures,
    )


def test_a_stage_is_counted_and_exported(log):
    ledger = Ledger(metrics=Recorded())
    with StageWatch(ledger, [_task(n) for n in range(3)], 512) as watch:
        watch.saw(_done(failures=(WORKER_LOST, "StorageUnavailableError"), letters={"id is null": 2}))
        watch.saw(_done(reused=True, peak_mb=90.0))
        watch.saw(_done(letters={"id is null": 1}))
    read = ledger.as_dict()["stages"]["read"]
    assert read["seconds"] >= 0
    expected = {"tasks": 3, "done": 3, "reused": 1, "retried": 2, "workers_lost": 1, "rows": 30}
    assert expected.items() <= read.items()
    values = ledger.metrics.values
    assert values["strata_tasks_total", "read", "done"] == 2
    assert values["strata_tasks_total", "read", "reused"] == 1
    assert values["strata_retries_total", "read", WORKER_LOST] == 1
    assert values["strata_worker_deaths_total", "read"] == 1
    assert values["strata_dead_letters_total", "id is null"] == 3
    assert values["strata_worker_peak_memory_bytes", "read"] == 100 * 1024 * 1024
    # A unit that was reused encoded nothing now.
    assert values["strata_texts_encoded_total",] == 10
    assert [line["event"] for line in log()] == ["stage_started", "stage_finished"]


def test_a_stage_that_breaks_off_says_so(log):
    ledger = Ledger(metrics=Recorded())
    with pytest.raises(ValueError, match="x"), StageWatch(ledger, [_task(0)], 512):
        raise ValueError("x")
    assert ledger.metrics.values["strata_tasks_total", "read", "failed"] == 1
    (stopped,) = [line for line in log() if line["event"] == "stage_stopped"]
    assert (stopped["level"], stopped["reason"], stopped["done"]) == ("warning", "ValueError", 0)


def test_a_stage_without_tasks_is_none(log):
    ledger = Ledger()
    with StageWatch(ledger, [], 512):
        pass
    assert (ledger.stages, log()) == ({}, [])


@pytest.mark.usefixtures("log")
def test_reasons_beyond_the_bound_are_one_series():
    ledger = Ledger(metrics=Recorded())
    with StageWatch(ledger, [_task(0)], 512) as watch:
        for n in range(MOST_REASONS + 10):
            watch.saw(_done(letters={f"reason {chr(65 + n)}": 1}))
    assert len(ledger.dead_letters) == MOST_REASONS + 1
    assert ledger.dead_letters["other"] == 10


def test_lines_carry_the_same_fields_bound_or_not(log):
    with structlog.contextvars.bound_contextvars(run="r", stage="read"):
        structlog.get_logger().info("bound", rows=3)
    structlog.get_logger().info("unbound")
    bound, unbound = log()
    assert list(bound)[: len(ON_EVERY_LINE)] == list(ON_EVERY_LINE)
    assert (bound["run"], bound["stage"], bound["shard"], bound["rows"]) == ("r", "read", None, 3)
    assert {unbound[name] for name in ("run", "stage", "shard", "attempt")} == {None}


def test_what_a_library_prints_becomes_log_lines(log):
    print("first\n\nsecond", file=StrayOutput())
    assert [(line["event"], line["text"]) for line in log()] == [
        ("library_output", "first"),
        ("library_output", "second"),
    ]
