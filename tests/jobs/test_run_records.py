"""Every run leaves a record, however it ends; `strata status` shows them and writes them for alerts. Real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.artifacts import RunRecord
from pipeline.config import load_config
from pipeline.release import claim_root
from pipeline.storage import LocalStore
from tests.integration.roads import rows_of
from tests.jobs.test_command_line import REPOSITORY, small, strata, summary_of


def records(folder):
    return [
        RunRecord.model_validate_json(path.read_bytes())
        for path in sorted((folder / "root/runs").glob("*.json"))
    ]


def log_lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def samples(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.mark.ray
def test_runs_are_recorded_shown_and_written_for_alerts(tmp_path):
    conf, textfile = small(tmp_path), tmp_path / "strata.prom"
    gate = ("--set", "gates.min_recall_at_10=1.0", "--set", "search.lists=1", "--set", "search.rerank=0")
    refused = strata("run", conf, *gate)
    assert refused.returncode == 4, refused.stderr
    published = strata("run", conf, check=0)

    failed, finished = records(tmp_path)
    assert (failed.status, failed.exit_code, failed.error) == ("failed", 4, "QualityGateError")
    assert "recall_at_10" in failed.message
    assert failed.judged["recall_at_10"] < 1.0
    assert failed.stages["build"]["tasks"] == failed.stages["build"]["done"] == 1
    assert failed.summary == {}
    assert failed.settings["gates"]["min_recall_at_10"] == 1.0

    assert (finished.status, finished.exit_code, finished.error) == ("finished", 0, None)
    assert finished.summary == summary_of(published)
    assert finished.stages["read"]["reused"] == finished.stages["read"]["tasks"] == 1
    assert finished.seconds >= sum(finished.seconds_by_part[part] for part in ("read", "merge", "build"))
    assert finished.estimate["rows"] == 200
    assert {"numpy", "faiss-cpu", "strata"} <= set(finished.versions)
    assert failed.config != finished.config

    assert {line["run"] for line in log_lines(refused.stderr)[:-1]} == {failed.run}
    assert {line["run"] for line in log_lines(published.stderr)} == {finished.run}

    shown = strata("status", conf, "--metrics", textfile, check=0)
    runs = summary_of(shown)["runs"]
    assert [(run["status"], run["exit_code"], run["release"]) for run in runs] == [
        ("failed", 4, None),
        ("finished", 0, 1),
    ]
    assert "QualityGateError" not in shown.stdout.splitlines()[:-1]
    found = samples(textfile)
    assert found["strata_last_run_exit_code"] == 0
    assert found["strata_consecutive_failures"] == 0
    assert found["strata_current_release"] == 1
    assert found["strata_current_documents"] == 200
    assert found["strata_current_recall_at_10"] == summary_of(published)["recall_at_10"]
    assert found["strata_last_success_timestamp_seconds"] == pytest.approx(
        finished.finished.timestamp(), abs=1
    )


@pytest.mark.parametrize(
    ("override", "code", "error"),
    [
        ("ray.task_memory_mb=64", 78, "ConfigError"),
        ("corpus.attributes=[yeer]", 65, "SchemaMismatchError"),
    ],
)
def test_a_run_that_is_refused_is_recorded_with_its_exit_code(tmp_path, override, code, error):
    conf, textfile = small(tmp_path), tmp_path / "strata.prom"
    done = strata("run", conf, "--set", override)
    assert done.returncode == code, done.stderr
    (record,) = records(tmp_path)
    assert (record.status, record.exit_code) == ("failed", code)
    assert record.error in {error, "DataError"}
    assert record.message == summary_of(done)["message"]
    strata("status", conf, "--metrics", textfile, check=0)
    found = samples(textfile)
    assert (found["strata_last_run_exit_code"], found["strata_consecutive_failures"]) == (code, 1)
    assert "strata_last_success_timestamp_seconds" not in found


def test_a_run_on_another_corpus_s_root_leaves_no_record_there(tmp_path):
    conf = small(tmp_path)
    claim_root(LocalStore(str(tmp_path / "root")), load_config(conf).corpus)
    done = strata("run", conf, "--set", "corpus.name=other")
    assert done.returncode == 78
    assert records(tmp_path) == []
    assert "run_not_recorded" in [line["event"] for line in log_lines(done.stderr)]


@pytest.mark.ray
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_is_recorded_as_stopped(tmp_path, number, code):
    conf = small(tmp_path, rows_of(2000))
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "run", str(conf)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "root/receipts").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    (record,) = records(tmp_path)
    assert (record.status, record.exit_code) == ("stopped", code)
    assert record.stages["read"]["tasks"] == 7
    assert "run_stopped" in [line["event"] for line in log_lines(err)]
    assert json.loads(out)["exit_code"] == code


def test_a_textfile_that_cannot_be_written_is_named(tmp_path):
    done = strata("status", small(tmp_path), "--metrics", tmp_path / "no/such/strata.prom")
    assert done.returncode == 78
    assert "no/such/strata.prom" in summary_of(done)["message"]
