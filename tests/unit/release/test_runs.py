from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import RunRecord
from pipeline.config import CorpusConfig
from pipeline.release import claim_root, collect, read_runs, write_run
from pipeline.release.runs import KEPT_RUNS, old_records
from pipeline.storage import LocalStore

START = datetime(2026, 3, 29, 0, 30, tzinfo=UTC)


def record(n, *, corpus="c", status="finished"):
    return RunRecord(
        run=f"{n:016x}",
        status=status,
        exit_code=0,
        started=START + timedelta(hours=n),
        finished=START + timedelta(hours=n, minutes=5),
        seconds=300.0,
        root="r",
        corpus=corpus,
        config="f",
        settings={},
        versions={},
        host={},
    )


def test_the_newest_records_come_back_in_order(any_store):
    for n in (5, 0, 30, 2):
        assert write_run(any_store, record(n))
    assert read_runs(any_store, last=3) == [record(n) for n in (2, 5, 30)]


def test_times_of_day_elsewhere_do_not_change_the_order(tmp_path):
    store = LocalStore(str(tmp_path))
    east = timedelta(hours=9)
    first = record(0)
    shifted = first.model_copy(update={"started": first.started.astimezone(None) - east})
    write_run(store, first)
    write_run(store, shifted)
    assert read_runs(store, last=9) == [shifted, first]


def test_a_root_takes_only_records_of_its_corpus(tmp_path):
    store = LocalStore(str(tmp_path))
    claim_root(store, CorpusConfig(uri="c", format="parquet", text=("t",)))
    assert write_run(store, record(1))
    assert not write_run(store, record(2, corpus="other"))
    assert read_runs(store, last=9) == [record(1)]


def test_a_record_that_cannot_be_read_hides_no_other(tmp_path):
    store = LocalStore(str(tmp_path))
    write_run(store, record(1))
    store.write("runs/20300101T000000Z-ab.json", b"{")
    store.write("runs/20300101T000001Z-ab.json", b'{"format":99}')
    assert read_runs(store, last=9) == [record(1)]


@given(st.sets(st.integers(0, 10_000), max_size=250))
def test_the_newest_hundred_records_are_never_old(numbers):
    times = sorted(START + timedelta(hours=n) for n in numbers)
    paths = [f"runs/{t:%Y%m%dT%H%M%SZ}-0a.json" for t in times]
    old = old_records([*paths, "runs/notes.txt"])
    assert old == set(paths[: max(len(paths) - KEPT_RUNS, 0)])


def test_collecting_deletes_old_records_only(tmp_path):
    store = LocalStore(str(tmp_path))
    for n in range(KEPT_RUNS + 3):
        write_run(store, record(n))
    store.write("runs/notes.txt", b"ours")
    later = datetime.now(UTC) + timedelta(days=2)
    report = collect(store, grace=timedelta(days=1), keep=3, now=later)
    assert len(report.deleted) == 3
    assert read_runs(store, last=999) == [record(n) for n in range(3, KEPT_RUNS + 3)]
    assert store.read("runs/notes.txt") == b"ours"
