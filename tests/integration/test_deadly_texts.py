"""Texts that kill the worker that encodes them, on a real local Ray."""

import json
import time

import numpy as np
import pyarrow as pa
import pytest
import ray
import structlog

from pipeline.artifacts import StageOutput
from pipeline.config import ClusterConfig, EmbeddingConfig, EncoderConfig, StorageConfig
from pipeline.corpus import bucket_of, text_hashes
from pipeline.embedding.cache import CachedBucket, open_cache
from pipeline.embedding.hashing import HashingEncoder
from pipeline.embedding.stage import plan_units
from pipeline.errors import ConfigError, TransientError
from pipeline.execution.attempts import WORKER_LOST
from pipeline.execution.encoders import EncoderSpec
from pipeline.execution.pool import ActorPool
from pipeline.execution.redriving import redrive
from pipeline.execution.runner import RayRunner
from pipeline.execution.units import Unit
from pipeline.execution.work import Done, StoreSpec, Task
from pipeline.storage import open_store
from pipeline.tables import hash_keys, write_bucketed
from tests.integration.roads import rows_of
from tests.integration.test_condemned import MENDED, conf, corpus, counts, letters, partitions, poisoned

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    spec = StoreSpec(str(tmp_path_factory.mktemp("root")), StorageConfig())
    with RayRunner(spec, ClusterConfig(num_cpus=2)) as runner:
        yield runner


def _units(store, cache, texts, unit_texts):
    hashes = text_hashes(texts)
    columns = {"text_hash": pa.array([bytes(h) for h in hashes], pa.binary(16)), "text": texts}
    table = pa.table(columns)
    table = table.cast(pa.schema([field.with_nullable(False) for field in table.schema]))
    ref = write_bucketed(store, "scratch/texts", table, bucket_of(hashes, cache.buckets))
    files = plan_units(store, cache, 0, [ref], unit_texts=unit_texts).files.values()
    return [Unit(cache, "enc", 0, file, 0, file.rows) for file in files]


def _encode(runner, tmp_path, texts, *, unit_texts, model="hashing:32!faulty", actors=None):
    """Encode texts into a fresh root; returns what the cache knows then, and deaths by task."""
    store = open_store(str(tmp_path))
    cache = open_cache(store, "enc", dims=32, rows=len(texts))
    units = _units(store, cache, texts, unit_texts)
    spec = EncoderSpec(
        "words", EncoderConfig(model=model), "float32", EmbeddingConfig(actors=actors), StorageConfig()
    )
    here = RayRunner(StoreSpec(str(tmp_path), StorageConfig()), runner._config)
    with structlog.testing.capture_logs() as logs:
        found = dict(here.encode([unit.task() for unit in units], spec))
    assert sorted(found) == list(range(len(units)))
    died = [entry for entry in logs if entry.get("reason") == WORKER_LOST]
    return CachedBucket(store, cache, 0), list(found.values()), died


def _check(cached, texts, deadly):
    hashes = hash_keys(pa.chunked_array([pa.array([bytes(h) for h in text_hashes(texts)], pa.binary(16))]))
    condemned = cached.condemned
    assert set(hash_keys(condemned["text_hash"]).tolist()) == {hashes[i] for i in deadly}
    assert set(condemned["reason"].to_pylist()) <= {"killed_worker"}
    assert set(condemned["attempts"].to_pylist()) <= {3}
    good = np.array([i for i in range(len(texts)) if i not in deadly], dtype=np.int64)
    good = good[np.argsort(hashes[good])]
    wanted = HashingEncoder(EncoderConfig(model="hashing:32")).encode_documents([texts[i] for i in good])
    assert np.array_equal(cached.read(hashes[good]), wanted)


def _texts(n, deadly):
    return [f"word{i} other{i}" + (f" faulty_{deadly[i]}" if i in deadly else "") for i in range(n)]


@pytest.mark.parametrize(
    "how",
    ["kill", pytest.param("exit", marks=pytest.mark.slow), pytest.param("segfault", marks=pytest.mark.slow)],
)
def test_one_deadly_text_is_found_for_a_few_deaths_and_no_other_unit_pays(cluster, tmp_path, how):
    texts = _texts(64 * 4, {100: how})
    cached, done, died = _encode(cluster, tmp_path, texts, unit_texts=64)
    _check(cached, texts, {100})
    assert sum(one.output.numbers["encoded"] for one in done) == 255
    assert sum(one.output.numbers["condemned"] for one in done) == 1
    # The unit twice, an eighth of it once, the row three times.
    assert len(died) == 6
    assert {entry["message"] for entry in died} == {"its process ended"}
    assert sum((one.failures for one in done), ()) == (WORKER_LOST,) * 6


def test_a_text_that_breaks_the_encoder_for_good_is_the_only_one_condemned(cluster, tmp_path):
    texts = _texts(64 * 4, {100: "stick"})
    cached, done, died = _encode(cluster, tmp_path, texts, unit_texts=64)
    _check(cached, texts, {100})
    assert len(died) == 6
    said = "its encoder fails on 'a plain text' too after: RuntimeError: device-side assert triggered"
    assert cached.condemned["error"].to_pylist() == [said]
    assert {entry["message"] for entry in died} == {said}
    assert sum((one.failures for one in done), ()) == (WORKER_LOST,) * 6


@pytest.mark.slow
def test_deadly_texts_in_one_unit_and_beside_each_other_are_all_found(cluster, tmp_path):
    deadly = {0: "kill", 1: "exit", 30: "kill"}
    texts = _texts(40, deadly)
    cached, _, died = _encode(cluster, tmp_path, texts, unit_texts=40)
    _check(cached, texts, set(deadly))
    assert len(died) <= 2 + 3 * (1 + 3)


@pytest.mark.slow
def test_a_single_actor_with_nothing_but_deadly_texts_condemns_them_all(cluster, tmp_path):
    texts = _texts(3, dict.fromkeys(range(3), "kill"))
    cached, _, died = _encode(cluster, tmp_path, texts, unit_texts=1, actors=1)
    _check(cached, texts, {0, 1, 2})
    assert len(died) == 9


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_a_text_that_kills_once_or_twice_is_not_condemned(cluster, tmp_path, times):
    (tmp_path / "counts").mkdir()
    texts = _texts(20, {7: f"kill_first_{times}"})
    cached, _, died = _encode(
        cluster,
        tmp_path / "root",
        texts,
        unit_texts=10,
        model=f"hashing:32!faulty:{tmp_path}/counts",
    )
    _check(cached, texts, set())
    assert len(died) == times


def test_an_encoder_that_cannot_encode_anything_condemns_nothing(cluster, tmp_path):
    broken = EncoderConfig(model="hashing:32!faulty", document_prompt="faulty_raise ")
    deadly = EncoderConfig(model="hashing:32!faulty", document_prompt="faulty_exit ")
    store = open_store(str(tmp_path))
    cache = open_cache(store, "enc", dims=32, rows=10)
    tasks = [unit.task() for unit in _units(store, cache, _texts(10, {}), 5)]
    here = RayRunner(StoreSpec(str(tmp_path), StorageConfig()), cluster._config)
    for config, error in ((broken, ConfigError), (deadly, TransientError)):
        spec = EncoderSpec("words", config, "float32", EmbeddingConfig(), StorageConfig())
        with pytest.raises(error, match=r"cannot encode 'a plain text'|died while they loaded the encoder"):
            list(here.encode(tasks, spec))
    assert CachedBucket(store, cache, 0).condemned.num_rows == 0


class Slow:
    """An actor that takes the whole cluster, and works until a second one has had to wait."""

    def load(self):
        return None

    def perform(self, seconds):
        time.sleep(seconds)
        return Done(StageOutput(files={}, numbers={}), False, seconds, 0.0)


@pytest.mark.usefixtures("cluster")
def test_that_actors_wait_for_room_is_said(monkeypatch):
    monkeypatch.setattr("pipeline.execution.pool.SILENCE_S", 0.1)
    remote = ray.remote(Slow).options(num_cpus=2, max_restarts=0)
    pool = ActorPool(
        start=remote.remote,
        submit=lambda actor, _task, _attempt: actor.perform.remote(1.0),
        record=lambda _task: pytest.fail("nothing died"),
        size=2,
        max_retries=0,
    )
    with structlog.testing.capture_logs() as logs:
        assert len(list(pool.run([Task("encode", {}, print)] * 2))) == 2
    said = {(e["loading"], e["ready"]) for e in logs if e["event"] == "waiting_for_actors"}
    assert (1, 1) in said


@pytest.mark.usefixtures("cluster")
def test_a_corpus_with_deadly_texts_is_published_without_them_and_redriven(tmp_path):
    rows = poisoned(rows_of(300), {5: "kill", 6: "exit", 250: "raise"})
    corpus(tmp_path, rows)
    config = conf(tmp_path, embedding={"unit_texts": 64})
    summary = _run(config)
    found = {row["doc_id"]: (row["reason"], row["row"], row["error"]) for row in letters(config, summary)}
    assert found == {
        "doc-00005": ("killed_worker", 5, "its process ended"),
        "doc-00006": ("killed_worker", 6, "its process ended"),
        "doc-00250": ("encoder_error", 250, "RuntimeError: this text was marked to fail"),
    }
    mended = conf(tmp_path, encoders=MENDED, embedding={"unit_texts": 64})
    spec = StoreSpec(mended.root, mended.storage)
    after = redrive(mended, spec, lambda: RayRunner(spec, mended.ray), reasons=["killed_worker"])
    assert after["redriven"] == {"killed_worker": counts(2, recovered=2)}
    assert (after["documents"], after["dead_letters"]) == (299, 1)
    assert partitions(config)
    json.dumps(after)


def _run(config):
    from pipeline.execution.flows import run

    spec = StoreSpec(config.root, config.storage)
    return run(config, spec, lambda: RayRunner(spec, config.ray))
