import threading
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pytest

from pipeline.artifacts import FileRef, StageOutput
from pipeline.config import EmbeddingConfig, StorageConfig
from pipeline.errors import ConfigError
from pipeline.execution.cluster import NodeShape
from pipeline.execution.runner import InlineRunner, encoder_actor_count
from pipeline.execution.work import StoreSpec, Task, perform
from pipeline.storage import LocalStore
from pipeline.tables import write_table

SCHEMA = pa.schema([("n", pa.int64())])


def _write(store, n):
    return StageOutput(
        files={"out": write_table(store, "scratch", SCHEMA, [pa.table({"n": [n]})])}, numbers={"n": n}
    )


def _task(n, **inputs):
    return Task("stage", {"n": n, **inputs}, partial(_write, n=n))


@pytest.fixture
def spec(tmp_path):
    return StoreSpec(str(tmp_path), StorageConfig())


def test_a_unit_is_done_once(spec):
    first, second = perform(_task(1), {}, spec, 1), perform(_task(1), {}, spec, 1)
    assert (first.reused, second.reused) == (False, True)
    assert first.output == second.output


def test_a_receipt_whose_file_is_gone_is_superseded(spec):
    first = perform(_task(1), {}, spec, 1)
    store = LocalStore(spec.uri)
    store.delete(first.output.files["out"].path)
    again = perform(_task(1), {}, spec, 1)
    assert not again.reused
    assert again.output == first.output
    assert perform(_task(1), {}, spec, 1).reused


def test_a_receipt_whose_file_is_truncated_is_superseded(spec):
    first = perform(_task(1), {}, spec, 1)
    LocalStore(spec.uri).write(first.output.files["out"].path, b"half")
    assert not perform(_task(1), {}, spec, 1).reused


def test_a_unit_that_is_not_remembered_leaves_no_receipt_and_is_done_again(spec):
    task = replace(_task(1), remember=False)
    found = [perform(task, {}, spec, 1) for _ in range(2)]
    assert [done.reused for done in found] == [False, False]
    assert list(LocalStore(spec.uri).list("receipts")) == []
    assert not perform(_task(1), {}, spec, 1).reused
    assert not perform(task, {}, spec, 1).reused


def test_a_file_counts_by_its_content_not_by_its_place():
    ref = FileRef(path="a", rows=1, bytes=2, sha256="f" * 64)
    assert _task(1, file=ref).key == _task(1, file=ref.model_copy(update={"path": "b"})).key
    assert _task(1, file=ref).key != _task(1, file=ref.model_copy(update={"sha256": "e" * 64})).key


def test_stage_and_inputs_make_the_key():
    assert len({_task(1).key, _task(2).key, Task("other", {"n": 1}, partial(_write, n=1)).key}) == 3


def test_of_two_workers_on_one_unit_the_first_receipt_stands(spec):
    """A slow worker whose unit was given to another comes back with other bytes: everybody uses the first ones."""
    arrived, go_on = threading.Event(), threading.Event()

    def slow(store):
        arrived.set()
        go_on.wait(10)
        return _write(store, 99)

    results = []
    zombie = threading.Thread(
        target=lambda: results.append(perform(Task("stage", {"n": 1}, slow), {}, spec, 1))
    )
    zombie.start()
    arrived.wait(10)
    winner = perform(_task(1), {}, spec, 1)
    go_on.set()
    zombie.join(10)
    assert results[0].output == winner.output


def test_the_inline_runner_gives_results_with_their_place(spec):
    found = dict(InlineRunner(spec).run([_task(n) for n in (5, 6, 7)]))
    assert [found[i].output.numbers["n"] for i in range(3)] == [5, 6, 7]


@pytest.mark.parametrize(
    ("settings", "nodes", "tasks", "actors"),
    [
        ({}, [(8, 0)], 100, 8),
        ({"threads_per_actor": 4}, [(8, 0)], 100, 2),
        ({"threads_per_actor": 3}, [(4, 0)] * 3, 100, 3),
        ({}, [(8, 0)], 3, 3),
        ({}, [(8, 2), (64, 0)], 100, 2),
        ({"gpus_per_actor": 0.25}, [(8, 2)], 100, 8),
        ({"gpus_per_actor": 0.6}, [(8, 1), (8, 1)], 100, 2),
        ({"actors": 5}, [(8, 0)], 100, 5),
        ({"actors": 50}, [(2, 0)], 100, 2),
    ],
)
def test_actors_fill_the_nodes_and_never_more_than_fit(settings, nodes, tasks, actors):
    shapes = [NodeShape(cpus, gpus, 64_000) for cpus, gpus in nodes]
    assert (
        encoder_actor_count(EmbeddingConfig(**settings), nodes=shapes, memory_mb=1024, tasks=tasks) == actors
    )


def test_an_actor_that_fits_no_node_is_refused_with_the_setting():
    nodes = [NodeShape(8, 0, 64_000), NodeShape(4, 0, 64_000)]
    with pytest.raises(
        ConfigError,
        match=r"embedding\.threads_per_actor: an encoder actor reserves 16 cores, the largest node has 8",
    ):
        encoder_actor_count(EmbeddingConfig(threads_per_actor=16), nodes=nodes, memory_mb=1024, tasks=9)
