"""What fits which node, without a cluster."""

import pytest

from pipeline.config import ClusterConfig, EmbeddingConfig, NodeGroupConfig
from pipeline.errors import ConfigError
from pipeline.execution.cluster import (
    NodeShape,
    Request,
    check_request,
    cores,
    nodes_to_come,
    worker_environment,
)
from pipeline.execution.runner import encoder_actor_count, task_request

SETTINGS = {"cpus": "ray.num_cpus", "gpus": "embedding.gpus_per_actor", "memory_mb": "ray.task_memory_mb"}


def _task(**more):
    return Request("a task", settings=SETTINGS, **({"cpus": 1, "memory_mb": 1536} | more))


def test_a_task_that_fits_the_largest_node_is_let_through():
    check_request(_task(), [NodeShape(0, 0, 4000), NodeShape(1, 0, 1536)])


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [NodeShape(8, 0, 1000), NodeShape(4, 0, 1200)],
            r"ray\.task_memory_mb: .* 1536 MB, the largest node has 1200",
        ),
        ([NodeShape(0, 0, 9000)], r"ray\.num_cpus: .* 1 cores, the largest node has 0"),
        ([NodeShape(0, 0, 9000), NodeShape(8, 0, 1000)], r"ray\.task_memory_mb: .* no node has all of them"),
    ],
)
def test_a_task_that_fits_no_node_is_refused_with_the_largest(nodes, message):
    with pytest.raises(ConfigError, match=message):
        check_request(_task(), nodes)


@pytest.mark.parametrize(
    ("selector", "value", "matches"),
    [
        ("cpu", "cpu", True),
        ("cpu", "gpu", False),
        ("cpu", None, False),
        ("!gpu", "cpu", True),
        ("!gpu", "gpu", False),
        ("!gpu", None, True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "c", False),
        ("!in(a,b)", "c", True),
        ("!in(a,b)", "a", False),
    ],
)
def test_labels_are_matched_as_ray_matches_them(selector, value, matches):
    node = NodeShape(1, 0, 2000, labels={} if value is None else {"pool": value})
    assert _task(labels={"pool": selector}).fits(node) is matches


def test_a_label_that_no_node_has_is_refused_with_the_known_ones():
    nodes = [NodeShape(8, 0, 9000, labels={"pool": "gpu"})]
    with pytest.raises(ConfigError, match=r"ray\.task_labels: .* pool: cpu, .*pool=gpu"):
        check_request(_task(labels={"pool": "cpu"}), nodes)


def test_groups_count_for_what_is_not_there_yet():
    groups = (
        NodeGroupConfig(nodes=3, cpus=8, memory_mb=9000, labels={"pool": "cpu"}),
        NodeGroupConfig(nodes=1, cpus=4, gpus=1, memory_mb=9000),
    )
    head, worker = NodeShape(0, 0, 900), NodeShape(8, 0, 8000, labels={"pool": "cpu", "zone": "a"})
    to_come = nodes_to_come([head, worker], groups)
    assert [(node.cpus, node.gpus, node.count) for node in to_come] == [(8, 0, 2), (4, 1, 1)]
    assert nodes_to_come([worker] * 5, groups[:1]) == []
    check_request(_task(labels={"pool": "cpu"}), [head, *to_come])


def test_encoder_actors_go_to_gpus_that_are_still_to_come():
    groups = (NodeGroupConfig(nodes=2, cpus=4, gpus=1, memory_mb=9000),)
    nodes = [NodeShape(8, 0, 9000), *nodes_to_come([], groups)]
    settings = EmbeddingConfig(gpus_per_actor=0.5)
    assert encoder_actor_count(settings, nodes=nodes, memory_mb=1024, tasks=100) == 4


def test_memory_bounds_the_actors_of_a_node():
    nodes = [NodeShape(8, 0, 3000), NodeShape(8, 0, 3000, count=2)]
    assert encoder_actor_count(EmbeddingConfig(), nodes=nodes, memory_mb=1024, tasks=100) == 6


def test_an_actor_larger_than_any_node_is_refused():
    with pytest.raises(
        ConfigError, match=r"embedding\.memory_mb_per_actor: .* 4096 MB, the largest node has 3000"
    ):
        encoder_actor_count(EmbeddingConfig(), nodes=[NodeShape(8, 0, 3000)], memory_mb=4096, tasks=1)


def test_cores_count_every_node_and_are_never_none():
    assert cores([NodeShape(0), NodeShape(4, count=3)]) == 12
    assert cores([NodeShape(0)]) == 1


def test_variables_are_passed_by_name_and_by_pattern():
    here = {"AWS_REGION": "eu-1", "AWS_PROFILE": "p", "HOME": "/", "OTHER": "x"}
    assert worker_environment(["AWS_*", "OTHER"], here) == {
        "AWS_REGION": "eu-1",
        "AWS_PROFILE": "p",
        "OTHER": "x",
    }
    assert worker_environment(["GOOGLE_*"], here) == {}


def test_a_variable_that_is_not_set_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"ray\.pass_env: AWS_PROFILE is not set"):
        worker_environment(["AWS_PROFILE"], {})


CPU_NODE, GPU_NODE = NodeShape(8, 0, 9000, labels={"pool": "cpu"}), NodeShape(4, 1, 9000)
FOR_TASKS = {"pool": "cpu"}


@pytest.mark.parametrize(
    ("gpus", "nodes", "cpus", "share", "labels"),
    [
        (0.0, [CPU_NODE, GPU_NODE], 1, 0.0, FOR_TASKS),
        (None, [CPU_NODE, GPU_NODE], 0, 1.0, {}),
        (0.25, [CPU_NODE, GPU_NODE], 0, 0.25, {}),
        (None, [CPU_NODE], 1, 0.0, FOR_TASKS),
        (0.5, [CPU_NODE], 1, 0.0, FOR_TASKS),
        (None, [CPU_NODE, NodeShape(4, 1, 1000)], 1, 0.0, FOR_TASKS),
    ],
)
def test_a_task_that_can_use_a_gpu_goes_where_one_is_and_else_where_tasks_go(
    gpus, nodes, cpus, share, labels
):
    request = task_request(ClusterConfig(task_labels=FOR_TASKS), gpus, nodes=nodes, memory_mb=1536)
    assert (request.cpus, request.gpus, request.memory_mb) == (cpus, share, 1536)
    assert request.labels == labels
    check_request(request, nodes)
