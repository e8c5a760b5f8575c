"""Must-show: one, two and four logical nodes write the same files; a node that is killed costs time only."""

import json
import os
import subprocess
import sys
import time

import pytest

from pipeline.storage import LocalStore
from tests.benchmarks.test_million import configure
from tests.integration.roads import data_files

ROWS = int(os.environ.get("STRATA_NODE_ROWS", "1000000"))
CPUS = 4
DEADLINE_S = 1800


class Nodes:
    """A Ray cluster of logical nodes on this machine: a head that does no tasks, and workers with `CPUS` among them."""

    def __init__(self, count):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 2**28}
        )  # fmt: skip
        self.nodes = [
            self.cluster.add_node(num_cpus=CPUS // count, object_store_memory=2**28) for _ in range(count)
        ]
        self.cluster.wait_for_nodes()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cluster.shutdown()


def _start(conf, root, address):
    command = [
        sys.executable,
        "-m",
        "jobs",
        "run",
        str(conf),
        "--set",
        f"root={root}",
        "--set",
        f"ray.address={address}",
    ]
    with (conf.parent / f"{root.name}.log").open("w") as log:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )


def _kill_a_node(nodes, root, process):
    """When half of the buckets are placed: the middle of a run."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(root.glob("scratch/placed/*"))) >= 2:
            nodes.cluster.remove_node(nodes.nodes[0], allow_graceful=False)
            return
        time.sleep(0.05)
    raise AssertionError("the run ended before a node could be killed")


def _build(conf, count, *, kill=False):
    root = conf.parent / f"root-{count}{'-killed' if kill else ''}"
    with Nodes(count) as nodes:
        start = time.monotonic()
        process = _start(conf, root, nodes.cluster.address)
        if kill:
            _kill_a_node(nodes, root, process)
        out, _ = process.communicate(timeout=DEADLINE_S)
        seconds = time.monotonic() - start
    assert process.returncode == 0, out
    return json.loads(out.splitlines()[-1]), seconds, root


def _names(root):
    """Data files are named by the hash of their content, so equal names are equal bytes; small ones are compared as well."""
    store = LocalStore(str(root))
    return {path: len(data) for path, data in data_files(store).items()}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(4 * DEADLINE_S)
def test_one_two_and_four_nodes_write_the_same_files_and_a_killed_node_costs_time_only(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    conf = configure(tmp_path, ROWS, ray={"max_in_flight": 2 * CPUS})
    wanted = None
    print(f"\n{ROWS:,} vectors, {CPUS} CPUs among the nodes")
    for count, kill in ((1, False), (2, False), (4, False), (2, True)):
        summary, seconds, root = _build(conf, count, kill=kill)
        names = _names(root)
        wanted = wanted or names
        print(
            f"  {count} nodes{', one killed' if kill else ''}: {seconds:.0f} s, {len(names)} files, recall@10 {summary['recall_at_10']}"
        )
        assert names == wanted
        assert summary["documents"] == ROWS
