"""The Kubernetes manifests: every field exists with its type, and what they promise holds."""

import copy
import math

import pytest
import yaml

from pipeline.config import load_config
from pipeline.execution.cluster import NodeShape, Request, check_request
from tests.infra.manifests import KUBERAY, TYPES, built, core_object_problems, pod_specs, problems, quantity

FOLDERS = ("default", "once", "raycronjob", "overlays/example")
JOBS = {"run", "redrive", "gc", "verify", "plan", "status", "search"}
MB = 2**20


def _all():
    return [(folder, document) for folder in FOLDERS for document in built(folder)]


def _of(folder, kind):
    return [document for document in built(folder) if document["kind"] == kind]


def _ray_clusters():
    for folder, document in _all():
        if document["kind"] == "RayJob":
            yield folder, document["spec"]["rayClusterSpec"]
        if document["kind"] == "RayCronJob":
            yield folder, document["spec"]["jobTemplate"]["rayClusterSpec"]


def _groups():
    for folder, cluster in _ray_clusters():
        yield folder, "head", cluster["headGroupSpec"]
        for group in cluster["workerGroupSpecs"]:
            yield folder, group["groupName"], group


def _mentioned(folder):
    """Settings of the configuration that a folder ships."""
    for document in _of(folder, "ConfigMap"):
        if "strata.yaml" in document["data"]:
            return document["data"]["strata.yaml"]
    raise AssertionError(f"{folder} has no strata.yaml")


def test_every_field_exists_with_its_type():
    found = []
    for folder, document in _all():
        check = (
            problems(document, document["kind"])
            if document["kind"] in TYPES
            else core_object_problems(document)
        )
        found += [
            f"{folder}: {document['kind']}/{document['metadata']['name']}{problem}" for problem in check
        ]
    assert not found


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ((), "entrypont", "x", ".spec.entrypont: there is no such field"),
        ((), "backoffLimit", "2", ".spec.backoffLimit: '2' is not of type integer"),
        ((), "suspend", 1, ".spec.suspend: 1 is not of type boolean"),
        ((), "submissionMode", "Job", "is none of K8sJobMode"),
        (("rayClusterSpec", "headGroupSpec", "rayStartParams"), "num-cpus", 0, "0 is not of type string"),
        (("rayClusterSpec", "headGroupSpec", "template", "spec"), "nodeSelektor", {}, "nodeSelektor"),
        (("rayClusterSpec", "workerGroupSpecs", 0), "maxReplica", 3, "maxReplica: there is no such field"),
        (("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0), "resources", {"memory": 1}, "memory"),
    ],
)  # fmt: skip
def test_a_misspelt_field_or_a_wrong_type_is_found(where, name, value, message):
    document = copy.deepcopy(_of("default", "RayJob")[0])
    node = document["spec"]
    for step in where:
        node = node[step]
    node[name] = value
    assert any(message in problem for problem in problems(document, "RayJob"))


def test_a_missing_field_is_found():
    document = copy.deepcopy(_of("default", "RayJob")[0])
    del document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    assert any("groupName: is missing" in problem for problem in problems(document, "RayJob"))


def test_a_misspelt_field_of_a_cron_job_is_found():
    document = copy.deepcopy(_of("default", "CronJob")[0])
    document["spec"]["concurencyPolicy"] = "Forbid"
    assert any("concurencyPolicy" in problem for problem in core_object_problems(document))


def test_there_is_a_cron_job_for_every_job_and_each_is_a_real_one():
    for document in _of("default", "CronJob"):
        env = _env(document)
        job = document["metadata"]["labels"]["app.kubernetes.io/component"]
        assert document["metadata"]["name"] == f"strata-{job}"
        assert env["ENTRYPOINT"].startswith(f"python -m jobs.{job} /etc/strata/strata.yaml")
        assert (KUBERAY.parents[1] / "jobs" / f"{job}.py").exists()
    assert {
        document["metadata"]["name"].removeprefix("strata-") for document in _of("default", "CronJob")
    } == JOBS


def _env(document):
    container = document["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    return {entry["name"]: entry.get("value") for entry in container["env"]}


def test_no_cron_job_starts_a_second_run_or_runs_for_ever():
    for folder in ("default", "overlays/example"):
        for document in _of(folder, "CronJob"):
            spec = document["spec"]
            job = spec["jobTemplate"]["spec"]
            assert spec["concurrencyPolicy"] == "Forbid"
            assert spec["startingDeadlineSeconds"] < 24 * 3600
            assert spec["successfulJobsHistoryLimit"] + spec["failedJobsHistoryLimit"] <= 10
            assert int(_env(document)["DEADLINE_SECONDS"]) < job["activeDeadlineSeconds"] < 24 * 3600


def test_exit_codes_that_a_retry_cannot_mend_are_not_retried():
    from pipeline import errors

    final = {errors.ConfigError, errors.DataError, errors.QualityGateError}
    again = {errors.TransientError, errors.PublishConflictError}
    for document in _of("default", "CronJob"):
        job = document["spec"]["jobTemplate"]["spec"]
        fail = next(rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")[
            "onExitCodes"
        ]
        container = job["template"]["spec"]["containers"][0]
        assert fail["containerName"] == container["name"]
        assert {error.exit_code for error in final} <= set(fail["values"])
        assert not {error.exit_code for error in again} & set(fail["values"])
        assert job["backoffLimit"] >= 1
        assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it


def test_the_template_starts_nothing_and_every_cron_job_names_it():
    template = _of("default", "RayJob")[0]
    assert template["spec"]["suspend"] is True
    assert template["spec"]["backoffLimit"] == 0  # the launcher knows the exit code, KubeRay does not
    assert template["spec"]["shutdownAfterJobFinishes"] is True
    for document in _of("default", "CronJob"):
        assert _env(document)["TEMPLATE"] == template["metadata"]["name"]
    assert _of("once", "RayJob")[0]["spec"]["suspend"] is False
    assert "suspend" not in _of("raycronjob", "RayCronJob")[0]["spec"]["jobTemplate"]


def test_the_launcher_may_only_look_at_rayjobs_and_create_them():
    (role,) = _of("default", "Role")
    assert [(r["apiGroups"], r["resources"]) for r in role["rules"]] == [(["ray.io"], ["rayjobs"])]
    assert set(role["rules"][0]["verbs"]) <= {"create", "get", "list", "watch"}
    (binding,) = _of("default", "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    accounts = {document["metadata"]["name"] for document in _of("default", "ServiceAccount")}
    assert {subject["name"] for subject in binding["subjects"]} <= accounts
    for folder, document in _all():
        for path, spec in pod_specs(document):
            if document["kind"] in {"CronJob", "RayJob"} and folder == "default":
                assert spec["serviceAccountName"] in accounts, path


def test_memory_requests_are_limits_and_images_are_pinned():
    for _, document in _all():
        for path, spec in pod_specs(document):
            for container in spec["containers"]:
                resources = container["resources"]
                assert resources["requests"]["memory"] == resources["limits"]["memory"], path
                assert "cpu" in resources["requests"], path
                _, colon, tag = container["image"].rpartition(":")
                assert colon, path
                assert tag != "latest", path


def test_nothing_runs_as_root_or_may_become_it():
    for _, document in _all():
        for path, spec in pod_specs(document):
            assert spec["securityContext"]["runAsNonRoot"] is True, path
            for container in spec["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False, path
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, path


def test_what_ray_gives_away_is_inside_the_limit_of_its_pod():
    for folder, name, group in _groups():
        container = group["template"]["spec"]["containers"][0]
        limit = quantity(container["resources"]["limits"]["memory"])
        params = group["rayStartParams"]
        store = int(params["object-store-memory"])
        shm = next(v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm")["emptyDir"]
        assert quantity(shm["sizeLimit"]) >= store, (folder, name)
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        if name == "head":
            assert params["num-cpus"] == "0"
            continue
        assert int(params["memory"]) + store < 0.95 * limit, (folder, name)
        assert int(params["num-cpus"]) == quantity(container["resources"]["requests"]["cpu"])
        assert params.get("num-gpus", "0") == container["resources"]["limits"].get("nvidia.com/gpu", "0")


def _node(group):
    params = group["rayStartParams"]
    return NodeShape(
        float(params["num-cpus"]), float(params.get("num-gpus", 0)), int(params.get("memory", 0)) / MB, labels=group.get("labels", {})
    )  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_configuration_loads_and_its_tasks_and_actors_fill_the_nodes(folder, tmp_path):
    path = tmp_path / "strata.yaml"
    path.write_text(_mentioned(folder))
    config = load_config(path)
    assert config.ray.address == "auto"
    nodes = {name: _node(group) for where, name, group in _groups() if where == folder and name != "head"}
    cpu = nodes["cpu"]
    task = Request("a task", cpus=1, memory_mb=config.ray.task_memory_mb, labels=config.ray.task_labels)
    check_request(task, list(nodes.values()))
    assert task.fits(cpu)
    assert not any(task.fits(node) for name, node in nodes.items() if name != "cpu")
    assert math.floor(cpu.memory_mb / config.ray.task_memory_mb) >= cpu.cpus
    assert math.floor(cpu.memory_mb / config.embedding.memory_mb_per_actor) >= cpu.cpus
    groups = {
        name: group["maxReplicas"] for where, name, group in _groups() if where == folder and name != "head"
    }
    assert {group.labels["pool"]: group.nodes for group in config.ray.autoscaling} == groups
    for group in config.ray.autoscaling:
        there = nodes[group.labels["pool"]]
        assert (group.cpus, group.gpus, group.memory_mb) == (there.cpus, there.gpus, int(there.memory_mb))
        assert group.labels == there.labels
    if "gpu" in nodes:
        per_gpu = math.floor(1 / (config.embedding.gpus_per_actor or 1))
        assert math.floor(nodes["gpu"].memory_mb / config.embedding.memory_mb_per_actor) >= per_gpu


def test_no_secret_stands_in_a_manifest():
    for folder, document in _all():
        assert document["kind"] != "Secret", folder
        text = yaml.safe_dump(document)
        assert "AWS_SECRET_ACCESS_KEY" not in text.replace("# AWS", "")
        assert "AWS_ACCESS_KEY_ID" not in text


def test_clusters_ask_for_a_token():
    for _, cluster in _ray_clusters():
        assert cluster["authOptions"]["mode"] == "token"


def test_the_example_overlay_changes_what_it_says():
    (rayjob,) = _of("overlays/example", "RayJob")
    groups = {group["groupName"]: group for group in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    assert groups["cpu"]["maxReplicas"] == 32
    assert groups["cpu"]["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    images = {c["image"] for _, spec in pod_specs(rayjob) for c in spec["containers"]}
    assert images == {"registry.example.com/search/strata:0.7.0"}
    schedules = {d["metadata"]["name"]: d["spec"]["schedule"] for d in _of("overlays/example", "CronJob")}
    assert schedules["strata-run"] == "30 2 * * *"
    assert schedules["strata-gc"] != "30 2 * * *"
