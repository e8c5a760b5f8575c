"""The Ray cluster as a run sees it: how it is joined or started, which nodes it has, what a task may reserve on them.

Ray keeps a request that no node can ever hold waiting without a word. So every request is held against the nodes
first, those that an autoscaler may still start among them, and one that fits none is a ConfigError at once.
"""

import fnmatch
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import ClusterConfig, NodeGroupConfig
from pipeline.errors import ConfigError

__all__ = [
    "NodeShape",
    "Request",
    "check_request",
    "cores",
    "node_shapes",
    "nodes_to_come",
    "start",
    "worker_environment",
]

MB = 1024 * 1024


@dataclass(frozen=True)
class NodeShape:
    """Nodes with the same resources."""

    cpus: float
    gpus: float = 0.0
    memory_mb: float = 0.0
    """What tasks and actors may reserve."""
    count: int = 1
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Request:
    """What one task or actor reserves.

    Args:
        what: For the message: "a task", "an encoder actor".
        cpus, gpus, memory_mb: Amounts.
        settings: Setting that each amount comes from, by the name of the amount.
        labels: What the node's labels must be, in Ray's selector syntax: a value, `!value`, `in(a,b)`, `!in(a,b)`.
    """

    what: str
    cpus: float = 0.0
    gpus: float = 0.0
    memory_mb: float = 0.0
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def fits(self, node: NodeShape) -> bool:
        """Whether an empty node of this shape could hold it."""
        amounts = (node.cpus >= self.cpus, node.gpus >= self.gpus, node.memory_mb >= self.memory_mb)
        return all(amounts) and _labels_match(self.labels, node.labels)


def check_request(request: Request, nodes: Sequence[NodeShape]) -> None:
    """Refuse what Ray would keep waiting for ever.

    Raises:
        ConfigError: Names the setting and what the largest node has.
    """
    if any(request.fits(node) for node in nodes):
        return
    labelled = [node for node in nodes if _labels_match(request.labels, node.labels)]
    if not labelled:
        known = sorted({f"{key}={value}" for node in nodes for key, value in node.labels.items()})
        wanted = ", ".join(f"{key}: {value}" for key, value in request.labels.items())
        problem = f"{request.what} needs a node with {wanted}, and there is none (labels: {', '.join(known) or 'none'})"
        raise ConfigError("ray.task_labels", problem, "label the nodes (`ray start --labels`), or change it")
    for name, unit in (("memory_mb", "MB"), ("cpus", "cores"), ("gpus", "GPUs")):
        most, need = max(getattr(node, name) for node in labelled), getattr(request, name)
        if most < need:
            problem = f"{request.what} reserves {need:g} {unit}, the largest node has {most:.0f}"
            raise ConfigError(request.settings[name], problem, "lower it, or use larger nodes")
    amounts = f"{request.cpus:g} cores, {request.gpus:g} GPUs and {request.memory_mb:g} MB"
    problem = f"{request.what} reserves {amounts}, no node has all of them"
    raise ConfigError(request.settings["memory_mb"], problem, "lower it, or use larger nodes")


def _labels_match(wanted: Mapping[str, str], found: Mapping[str, str]) -> bool:
    return all(_selected(selector, found.get(key)) for key, selector in wanted.items())


def _selected(selector: str, value: str | None) -> bool:
    negated, body = selector.startswith("!"), selector.removeprefix("!")
    is_list = body.startswith("in(") and body.endswith(")")
    values = [one.strip() for one in body[3:-1].split(",")] if is_list else [body]
    return (value in values) != negated


def cores(nodes: Sequence[NodeShape]) -> int:
    """Cores of all nodes together, at least one."""
    return max(1, int(sum(node.cpus * node.count for node in nodes)))


def node_shapes(config: ClusterConfig) -> tuple[NodeShape, ...]:
    """The nodes that live now, and those that the autoscaler may still start."""
    import ray

    alive = [_shape(node) for node in ray.nodes() if node["Alive"]]
    return (*alive, *nodes_to_come(alive, config.autoscaling))


def nodes_to_come(alive: Sequence[NodeShape], groups: Sequence[NodeGroupConfig]) -> list[NodeShape]:
    """What of each group is not there yet; a node that is there belongs to a group by its cores, GPUs and labels."""
    shapes = []
    for group in groups:
        there = sum(_belongs(node, group) for node in alive)
        if group.nodes > there:
            amounts = (group.cpus, group.gpus, float(group.memory_mb))
            shapes.append(NodeShape(*amounts, count=group.nodes - there, labels=group.labels))
    return shapes


def _belongs(node: NodeShape, group: NodeGroupConfig) -> bool:
    same = (node.cpus, node.gpus) == (group.cpus, group.gpus)
    return same and group.labels.items() <= node.labels.items()


def _shape(node: Mapping[str, Any]) -> NodeShape:
    has = node["Resources"]
    amounts = (has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0) / MB)
    return NodeShape(*amounts, labels=node.get("Labels") or {})


def worker_environment(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to hand to the workers of a cluster.

    Args:
        names: Names, or patterns with `*`.
        environment: Of this process.

    Raises:
        ConfigError: A name without `*` is not set here.
    """
    missing = [name for name in names if "*" not in name and name not in environment]
    if missing:
        raise ConfigError(
            "ray.pass_env", f"{missing[0]} is not set in this process", "set it, or remove the name"
        )
    return {
        key: value
        for key, value in environment.items()
        if any(fnmatch.fnmatchcase(key, name) for name in names)
    }


def start(config: ClusterConfig) -> None:
    """Join the cluster that the configuration names, or start one on this machine.

    Raises:
        ConfigError: No cluster answers there, or it does not know this process: to a wrong token Ray does not answer at all.
    """
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    settings = _local_settings(config) if config.address is None else _cluster_settings(config)
    stops = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**settings, namespace=config.namespace, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        problem = f"no Ray cluster answers at {config.address} ({' '.join(str(error).split())})"
        remedy = "start one, or give this process its token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN)"
        raise ConfigError("ray.address", problem, remedy) from error
    finally:
        # Ray takes SIGTERM for itself and ends the job with 15, which no scheduler understands.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stops)


def _cluster_settings(config: ClusterConfig) -> dict[str, Any]:
    variables = worker_environment(config.pass_env, os.environ)
    # An empty environment would still start workers apart from those that the node keeps ready.
    return {"address": config.address} | ({"runtime_env": {"env_vars": variables}} if variables else {})


def _local_settings(config: ClusterConfig) -> dict[str, Any]:
    # Ray 2.60 asks for a token even on this machine alone; a cluster of its own keeps its own setting.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    return {
        "address": "local",
        "num_cpus": config.num_cpus,
        "include_dashboard": False,
        "_memory": config.memory_mb and config.memory_mb * MB,
        "object_store_memory": config.object_store_mb and config.object_store_mb * MB,
        "_temp_dir": config.temp_dir,
        "_metrics_export_port": config.metrics_port,
    }
