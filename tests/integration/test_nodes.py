"""A cluster of two nodes that loses one without grace in the middle of a road: the same bytes as on one node."""

import threading
import time
from contextlib import suppress

import pytest

from pipeline.config import ClusterConfig
from pipeline.execution.flows import run
from pipeline.execution.runner import RayRunner
from pipeline.execution.work import StoreSpec
from pipeline.release import verify
from pipeline.storage import LocalStore
from tests.integration.roads import configured, data_files, rows_of, run_inline, settings, write_parquet

ROWS = 2000
DEADLINE_SECONDS = 240


@pytest.fixture
def cluster(monkeypatch):
    """A head that schedules nothing big, and two nodes that work."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _lose(cluster, node, root, lost):
    """Remove the node as soon as there are vectors."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline and not any(root.glob("embeddings/*/*/*.parquet")):
        time.sleep(0.01)
    with suppress(Exception):
        cluster.remove_node(node, allow_graceful=False)
        lost.append(node.node_id)


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_lost_in_the_middle_of_a_road_changes_nothing(tmp_path, cluster):
    write_parquet(tmp_path / "corpus.parquet", rows_of(ROWS))
    content = settings(tmp_path / "calm", tmp_path / "corpus.parquet")
    content["layout"]["segment_rows"] = 100
    content["embedding"]["unit_texts"] = 20
    run_inline(configured(tmp_path, content))
    wanted = data_files(LocalStore(str(tmp_path / "calm")))
    config = configured(tmp_path, content | {"root": str(tmp_path / "root")})
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    lost: list[str] = []
    killer = threading.Thread(target=_lose, args=(cluster, node, tmp_path / "root", lost))
    spec = StoreSpec(config.root, config.storage)
    killer.start()
    summary = run(config, spec, lambda: RayRunner(spec, ClusterConfig()))
    killer.join(DEADLINE_SECONDS)
    assert len(lost) == 1
    assert summary["documents"] == ROWS
    assert data_files(LocalStore(config.root)) == wanted
    assert verify(LocalStore(config.root), None).problems == ()
