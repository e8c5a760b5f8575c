"""The file for `ray up`, against the schema that Ray itself checks it with."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

from pipeline.config import load_config
from pipeline.execution.cluster import NodeShape, Request

LAUNCHER = Path(__file__).resolve().parents[2] / "infra" / "launcher"
CLUSTER = yaml.safe_load((LAUNCHER / "aws.yaml").read_text())
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def test_ray_accepts_the_cluster_file():
    jsonschema.validate(CLUSTER, SCHEMA)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_worker", 3), ("max_workers", "16"), ("idle_timeout_minutes", -1), ("provider", {})],
)
def test_ray_refuses_a_wrong_one(key, value):
    wrong = copy.deepcopy(CLUSTER)
    wrong[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def test_what_the_start_commands_say_is_what_the_autoscaler_reckons_with():
    worker = CLUSTER["available_node_types"]["worker"]
    (start,) = [line for line in CLUSTER["worker_start_ray_commands"] if "ray start" in line]
    assert f"--num-cpus={worker['resources']['CPU']} " in start
    assert f"--memory={worker['resources']['memory']} " in start
    (start,) = [line for line in CLUSTER["head_start_ray_commands"] if "ray start" in line]
    assert "--num-cpus=0" in start
    assert "--dashboard-host=127.0.0.1" in start


def test_the_configuration_loads_and_its_tasks_fill_the_workers():
    config = load_config(LAUNCHER / "strata.yaml")
    node = CLUSTER["available_node_types"]["worker"]
    shape = NodeShape(
        node["resources"]["CPU"], memory_mb=node["resources"]["memory"] / 2**20, labels=node["labels"]
    )
    task = Request("a task", cpus=1, memory_mb=config.ray.task_memory_mb, labels=config.ray.task_labels)
    assert task.fits(shape)
    assert shape.memory_mb >= config.ray.task_memory_mb * shape.cpus
    (group,) = config.ray.autoscaling
    assert (group.nodes, group.cpus, group.memory_mb) == (
        node["max_workers"],
        shape.cpus,
        int(shape.memory_mb),
    )
    assert group.labels == node["labels"]


def test_the_cluster_asks_for_a_token_and_gets_it_by_file():
    options = CLUSTER["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (path,) = [o.partition("=")[2] for o in options if o.startswith("--env RAY_AUTH_TOKEN_PATH=")]
    assert path in CLUSTER["file_mounts"]
    assert CLUSTER["docker"]["image"].rpartition(":")[2] != "latest"
