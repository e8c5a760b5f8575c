"""The `ray:` settings on real local Rays: what is reserved, what is refused at once, what reaches the workers."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from pipeline.artifacts import StageOutput
from pipeline.config import ClusterConfig, EmbeddingConfig, EncoderConfig, StorageConfig
from pipeline.errors import ConfigError
from pipeline.execution.encoders import EncoderSpec
from pipeline.execution.runner import RayRunner
from pipeline.execution.work import StoreSpec, Task
from pipeline.tables import write_table

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMA = pa.schema([("n", pa.int64())])


def _write(store, *_encoder, n):
    ref = write_table(store, "scratch", SCHEMA, [pa.table({"n": [n]})])
    return StageOutput(files={"out": ref}, numbers={"n": n, "env": int(os.environ.get("STRATA_TEST", "0"))})


def _tasks(kind, count=4):
    return [Task(kind, {"n": n}, partial(_write, n=n)) for n in range(count)]


def _spec(**embedding):
    config = EncoderConfig(model="hashing:32")
    return EncoderSpec("words", config, "float32", EmbeddingConfig(**embedding), StorageConfig())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return StoreSpec(str(tmp_path_factory.mktemp("root")), StorageConfig())


@pytest.fixture(scope="module")
def small(root):
    """A Ray of one machine with 2,000 MB, in a folder of its own; sockets need a short path."""
    folder = tempfile.mkdtemp(prefix="st-", dir="/tmp")
    settings = ClusterConfig(
        num_cpus=4, memory_mb=2000, object_store_mb=100, temp_dir=folder, namespace="strata-test"
    )
    with RayRunner(root, settings):
        yield settings
    shutil.rmtree(folder, ignore_errors=True)


def _joined(root, settings, **more):
    """A second runner on the same Ray, which it neither starts nor stops."""
    return RayRunner(root, settings.model_copy(update=more))


def test_a_local_ray_has_what_the_settings_say(small):
    found = ray.cluster_resources()
    assert found["CPU"] == 4
    assert found["memory"] == 2000 * 1024 * 1024
    assert found["object_store_memory"] == 100 * 1024 * 1024
    context = ray.get_runtime_context()
    assert context.namespace == "strata-test"
    assert list(Path(small.temp_dir).glob("session_*"))


def test_tasks_and_actors_run_within_the_memory(root, small):
    with _joined(root, small, task_memory_mb=900) as runner:
        assert len(list(runner.run(_tasks("fits")))) == 4
        spec = _spec(memory_mb_per_actor=900)
        assert len(list(runner.encode(_tasks("fits-encode"), spec))) == 4


def test_a_task_larger_than_the_machine_is_refused_at_once(root, small):
    with (
        _joined(root, small, task_memory_mb=2500) as runner,
        pytest.raises(
            ConfigError, match=r"ray\.task_memory_mb: a task reserves 2500 MB, the largest node has 2000"
        ),
    ):
        list(runner.run(_tasks("too-large")))


def test_an_actor_larger_than_the_machine_is_refused_at_once(root, small):
    with (
        _joined(root, small) as runner,
        pytest.raises(
            ConfigError,
            match=r"embedding\.memory_mb_per_actor: .* reserves 4096 MB, the largest node has 2000",
        ),
    ):
        list(runner.encode(_tasks("too-large-actor"), _spec(memory_mb_per_actor=4096)))


def test_tasks_stay_on_nodes_with_their_labels(root, small):
    with _joined(root, small, task_memory_mb=900, task_labels={"pool": "!gpu"}) as runner:
        assert len(list(runner.run(_tasks("not-gpu")))) == 4
    with (
        _joined(root, small, task_memory_mb=900, task_labels={"pool": "cpu"}) as runner,
        pytest.raises(ConfigError, match=r"ray\.task_labels"),
    ):
        list(runner.run(_tasks("no-such-pool")))


def test_a_machine_of_our_own_with_too_little_memory_runs_one_task_at_a_time(root, small):
    with _joined(root, small, memory_mb=None, task_memory_mb=50_000) as runner:
        assert len(list(runner.run(_tasks("laptop")))) == 4
        spec = _spec(memory_mb_per_actor=50_000)
        assert len(list(runner.encode(_tasks("laptop-encode"), spec))) == 4


JOINS = """
import json, sys
from tests.integration import test_ray_settings as here
settings = here.ClusterConfig(address=sys.argv[1], pass_env=("STRATA_TEST",), task_memory_mb=900)
root = here.StoreSpec(sys.argv[2], here.StorageConfig())
with here.RayRunner(root, settings) as runner:
    print(json.dumps([done.output.numbers["env"] for _, done in runner.run(here._tasks("environment"))]))
"""


@pytest.mark.usefixtures("small")
def test_variables_of_the_driver_reach_the_workers_of_a_cluster(tmp_path):
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", JOINS, address, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "STRATA_TEST": "7"},
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [7] * 4


def see_gpu(_store):
    return StageOutput(
        files={}, numbers={"gpus": len(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0])}
    )


HAS_A_GPU = """
import json, os, ray, sys
from tests.integration import test_ray_settings as here
settings = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": False, "log_to_driver": False}
ray.init(address="local", _temp_dir=sys.argv[2], object_store_memory=100 * 1024**2, _memory=1000 * 1024**2, **settings)
root = here.StoreSpec(sys.argv[1], here.StorageConfig())
tasks = [here.Task("see", {"gpus": gpus}, here.see_gpu, gpus=gpus) for gpus in (None, 0.5, 0.0)]
with here.RayRunner(root, here.ClusterConfig(task_memory_mb=900)) as runner:
    print(json.dumps(sorted((place, done.output.numbers["gpus"]) for place, done in runner.run(tasks))))
"""


def test_tasks_that_ask_for_a_gpu_see_one(tmp_path):
    """On a Ray that believes in a GPU."""
    folder = tempfile.mkdtemp(prefix="st-", dir="/tmp")
    environment = {k: v for k, v in os.environ.items() if k not in {"CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"}}
    done = subprocess.run(
        [sys.executable, "-c", HAS_A_GPU, str(tmp_path), folder],
        env={**environment, "PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled",
             "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [[0, 1], [1, 1], [2, 0]]
