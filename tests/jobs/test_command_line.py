"""The command line as its users meet it: real processes, real Ray, exit codes, messages, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.config import load_config
from pipeline.release import claim_root
from pipeline.storage import LocalStore
from tests.integration.roads import rows_of, settings, write_config, write_parquet

JOBS = (
    "run", "redrive", "upgrade", "backfill", "plan", "status", "report", "search", "verify", "rollback", "gc",
)  # fmt: skip
REPOSITORY = Path(__file__).resolve().parents[2]


def strata(*words, check=None, cwd=None):
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, words)],
        capture_output=True, text=True, check=False, cwd=cwd, timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    if check is not None:
        assert done.returncode == check, done.stderr + done.stdout
    return done


def summary_of(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


def small(folder, rows=None, **more):
    write_parquet(folder / "corpus.parquet", rows if rows is not None else rows_of(200))
    content = settings(folder / "root", folder / "corpus.parquet", evaluation={"sample_queries": 20}, **more)
    return write_config(folder / "conf.yaml", content)


@pytest.mark.ray
def test_the_whole_life_of_an_index(tmp_path):
    conf = small(tmp_path)
    planned = summary_of(strata("plan", conf, check=0))
    assert planned["rows"] == 200
    assert not (tmp_path / "root/documents").exists()

    first = strata("run", conf, check=0)
    assert summary_of(first)["release"] == 1
    assert "Published release 1" in first.stderr

    again = strata("run", conf, check=0)
    assert summary_of(again)["skipped"] is True
    assert "Nothing changed" in again.stderr

    pl.DataFrame(
        {"query_id": ["q"], "text": ["river1 stone2"], "filter": ["year IS NOT NULL"]}
    ).write_parquet(tmp_path / "q.parquet")
    found = summary_of(
        strata(
            "search",
            conf,
            "--queries",
            tmp_path / "q.parquet",
            "--out",
            tmp_path / "r.parquet",
            "-k",
            5,
            check=0,
        )
    )
    assert found["queries"] == 1
    assert pq.read_table(tmp_path / "r.parquet").num_rows == 5

    write_parquet(tmp_path / "corpus.parquet", rows_of(200)[:-1])
    assert summary_of(strata("run", conf, check=0))["removed"] == 1
    assert summary_of(strata("status", conf, check=0))["release"] == 2
    assert summary_of(strata("rollback", conf, check=0))["release"] == 1
    assert summary_of(strata("verify", conf, check=0))["problems"] == []
    assert summary_of(strata("gc", conf, "--dry-run", check=0))["deleted"] == 0

    lists = next((tmp_path / "root/partitions").glob("*.lists.parquet"))
    data = bytearray(lists.read_bytes())
    data[40] ^= 1
    lists.write_bytes(bytes(data))
    damaged = [strata("verify", conf, "--release", n) for n in (1, 2)]
    assert 65 in [done.returncode for done in damaged]
    assert any("sha256" in done.stdout for done in damaged)


@pytest.mark.ray
def test_a_new_encoder_from_the_upgrade_to_the_last_document(tmp_path):
    encoders = {"words": {"model": "hashing:64"}, "wide": {"model": "hashing:128"}}
    conf = small(tmp_path, rows_of(400), encoders=encoders, upgrade={"sample_documents": 100})
    strata("run", conf, check=0)
    refused = strata("upgrade", conf, "--encoder", "wide", check=4)
    assert "what would pass: cascade of" in summary_of(refused)["message"]
    upgraded = strata("upgrade", conf, "--encoder", "wide", "--set", "upgrade.tolerance=0.5", check=0)
    assert summary_of(upgraded)["release"] == 2
    assert "status quo" in upgraded.stderr
    refused = strata("run", conf, check=78)
    assert "set `encoder: wide`" in summary_of(refused)["message"]
    now = ("--set", "encoder=wide")
    pl.DataFrame({"query_id": ["q"], "text": ["river1 stone2"]}).write_parquet(tmp_path / "q.parquet")
    asked = ("--queries", tmp_path / "q.parquet", "--out", tmp_path / "r.parquet", "--cascade", 20)
    found = summary_of(strata("search", conf, *now, *asked, "--admit", 2, check=0))
    assert found["documents_embedded"] == 0 < found["documents_across"]
    watched = summary_of(strata("backfill", conf, *now, "--budget", "25%", "--watch", check=0))
    part = summary_of(strata("backfill", conf, *now, "--budget", "25%", check=0))
    assert part["documents_embedded"] == watched["documents_to_embed"] <= 100
    page = summary_of(strata("report", conf, *now, check=0))
    assert "Where documents are" in Path(page["out"].removeprefix("file://")).read_text()
    whole = summary_of(strata("backfill", conf, *now, check=0))
    assert whole["fraction_new"] == 1
    assert summary_of(strata("verify", conf, *now, check=0))["problems"] == []
    assert summary_of(strata("rollback", conf, *now, "--to", "1", check=0))["release"] == 1


@pytest.mark.ray
def test_one_and_two_workers_write_the_same_bytes(tmp_path):
    from tests.integration.roads import data_files

    rows = rows_of(400)
    conf = small(tmp_path, rows)
    for cpus in (1, 2):
        strata("run", conf, "--set", f"root={tmp_path}/root-{cpus}", "--set", f"ray.num_cpus={cpus}", check=0)
    one, two = (data_files(LocalStore(str(tmp_path / f"root-{cpus}"))) for cpus in (1, 2))
    assert one == two
    assert len(one) > 5


@pytest.mark.ray
def test_ctrl_c_ends_cleanly_and_a_rerun_goes_on(tmp_path):
    conf = small(tmp_path, rows_of(2000))
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "run", str(conf)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "root/receipts").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    # As a terminal does: the whole process group hears of it.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "run the same command again" in json.loads(out.strip().splitlines()[-1])["message"]
    assert "Traceback" not in err
    assert summary_of(strata("run", conf, check=0))["documents"] == 2000


@pytest.mark.parametrize("job", JOBS)
def test_every_job_explains_itself(job):
    done = strata(job, "--help", check=0)
    assert "CONF" in done.stdout
    assert (
        subprocess.run(
            [sys.executable, "-m", f"jobs.{job}", "--help"],
            capture_output=True,
            check=False,
            cwd=REPOSITORY,
            timeout=120,
        ).returncode
        == 0
    )


def test_an_unknown_option_is_a_usage_error(tmp_path):
    assert strata("run", small(tmp_path), "--nonsense").returncode == 2


def _refused(done, code, *words):
    assert done.returncode == code, done.stderr
    message = summary_of(done)["message"]
    assert all(word in message for word in words), message
    assert "Traceback" not in done.stderr


def test_a_missing_configuration_is_named(tmp_path):
    _refused(strata("run", tmp_path / "none.yaml"), 78, "none.yaml", "cannot be read")


def test_an_unknown_setting_is_named_with_the_nearest(tmp_path):
    _refused(
        strata("run", small(tmp_path), "--set", "corpus.shard_row=5"),
        78,
        "corpus.shard_row",
        "did you mean `shard_rows`",
    )


def test_a_root_of_another_corpus_is_refused_unless_it_has_the_same_name(tmp_path):
    conf = small(tmp_path)
    claim_root(LocalStore(str(tmp_path / "root")), load_config(conf).corpus)
    write_parquet(tmp_path / "other.parquet", rows_of(5))
    other = ("--set", f"corpus.uri={tmp_path}/other.parquet")
    for job in ("plan", "run"):
        _refused(strata(job, conf, *other), 78, "other.parquet", "corpus.name")
    strata("plan", conf, *other, "--set", f"corpus.name={tmp_path}/corpus.parquet", check=0)


def test_a_run_that_failed_on_a_wrong_uri_does_not_claim_the_root(tmp_path):
    conf = small(tmp_path)
    _refused(strata("run", conf, "--set", f"corpus.uri={tmp_path}/typo.parquet"), 65, "typo.parquet")
    strata("plan", conf, check=0)


def test_a_plan_that_does_not_fit_is_refused_with_the_setting(tmp_path):
    _refused(
        strata("plan", small(tmp_path), "--set", "ray.task_memory_mb=64"),
        78,
        "ray.task_memory_mb",
        "does not fit",
    )


def _bad_corpus(tmp_path, case):
    corpus = tmp_path / "corpus.parquet"
    match case:
        case "truncated":
            corpus.write_bytes(corpus.read_bytes()[:-100])
        case "missing":
            corpus.unlink()
        case "empty":
            write_parquet(corpus, [])
        case "schema":
            folder = tmp_path / "corpus.parquet.d"
            folder.mkdir()
            corpus.rename(folder / "a.parquet")
            pl.DataFrame(
                {
                    "_id": ["x"],
                    "title": ["t"],
                    "text": ["t"],
                    "year": ["1999"],
                    "section": ["a"],
                    "tags": [["x"]],
                }
            ).write_parquet(folder / "b.parquet")
            folder.rename(corpus)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("truncated", ("corpus.parquet",)),
        ("missing", ("corpus.parquet",)),
        ("empty", ("no documents",)),
        ("schema", ("b.parquet", "year", "int", "string")),
    ],
)
def test_a_bad_corpus_is_refused_with_its_place(tmp_path, case, words):
    conf = small(tmp_path)
    _bad_corpus(tmp_path, case)
    _refused(strata("run", conf), 65, *words)


def test_an_unknown_column_is_named_with_the_known_ones(tmp_path):
    _refused(
        strata("run", small(tmp_path), "--set", "corpus.attributes=[yeer]"), 65, "yeer", "year", "section"
    )


@pytest.mark.ray
def test_too_many_bad_rows_stop_the_run_with_what_to_do(tmp_path):
    rows = [{**row, "_id": None} if i % 5 == 0 else row for i, row in enumerate(rows_of(200))]
    _refused(strata("run", small(tmp_path, rows)), 65, "id is null", "error_budget")


def test_searching_an_unpublished_root_says_so(tmp_path):
    pl.DataFrame({"query_id": ["q"], "text": ["x"]}).write_parquet(tmp_path / "q.parquet")
    _refused(
        strata(
            "search", small(tmp_path), "--queries", tmp_path / "q.parquet", "--out", tmp_path / "r.parquet"
        ),
        65,
        "no release",
        "strata run",
    )


@pytest.mark.ray
def test_a_redrive_after_a_fix_says_what_recovered_and_what_the_source_owes(tmp_path):
    rows = rows_of(200)
    rows[7]["text"] += " faulty_raise"
    rows[9]["text"] += " faulty_zero"
    rows[11]["_id"] = ""
    conf = small(tmp_path, rows, encoders={"words": {"model": "hashing:64!faulty"}})
    budget = ("--set", "corpus.error_budget=5")
    assert summary_of(strata("run", conf, *budget, check=0))["dead_letters"] == 3
    mended = ("--set", "encoders.words.model=hashing:64", *budget)
    done = strata("redrive", conf, *mended, "--reason", "encoder_error", "--reason", "zero_vector", check=0)
    found = summary_of(done)
    assert {reason: n["recovered"] for reason, n in found["redriven"].items()} == {
        "encoder_error": 1,
        "zero_vector": 1,
    }
    assert found["bad_in_source"] == {"id is empty": 1}
    assert "to be mended there" in done.stderr
    assert (found["documents"], found["release"]) == (199, 2)
    nothing = strata("redrive", conf, *mended, check=0)
    assert "there is nothing to redrive" in nothing.stderr
    assert summary_of(nothing)["skipped"] is True
    _refused(strata("redrive", conf, "--reason", "bad"), 78, "--reason bad", "encoder_error")
