"""Must-show: a thousand tenants of Zipf sizes in one index, beside an index for each. Warm page cache, one thread."""

import time
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from threadpoolctl import threadpool_limits

from pipeline.config import load_config
from pipeline.execution.flows import run
from pipeline.execution.runner import RayRunner
from pipeline.execution.work import StoreSpec
from pipeline.index.reader import open_release
from tests.benchmarks.hybrid_vectors import hybrid_set
from tests.integration.roads import Inline

TENANTS = 1000
ASKED = 24
"""Tenants that get an index of their own to compare with, evenly by rank."""
QUERIES = 60
"""Of each."""


def _corpus(path, base, tenants):
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(base.reshape(-1)), base.shape[1])
    ids = pa.array([str(i) for i in range(len(base))])
    pq.write_table(
        pa.table({"_id": ids, "embedding": embedding, "tenant": tenants}), path, row_group_size=20_000
    )


def _release(folder, corpus, runner_of, **layout):
    folder.mkdir(parents=True)
    content = {
        "root": str(folder / "root"),
        "corpus": {
            "uri": str(corpus),
            "format": "parquet",
            "embedding": "embedding",
            "attributes": ["tenant"],
        },
        "layout": layout,
        "evaluation": {"sample_queries": 200, "target_recall": 0.97},
    }
    (folder / "conf.yaml").write_text(yaml.safe_dump(content))
    config = load_config(folder / "conf.yaml")
    spec = StoreSpec(config.root, config.storage)
    run(config, spec, lambda: runner_of(spec, config))
    return open_release(config.root)


def _navigation(release):
    """Bytes that a server holds: heads and directories of all partitions."""
    return sum(ref.bytes for one in release.reader.manifest.partitions for ref in one.navigation)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.ray
@pytest.mark.timeout(7200)
def test_a_tenant_of_a_shared_index_is_served_like_one_with_an_index_of_its_own(shared_data, tmp_path):
    hybrid, rng = hybrid_set(shared_data), np.random.default_rng(4)
    weights = 1 / np.arange(1, TENANTS + 1)
    of_row = rng.choice(TENANTS, len(hybrid.base), p=weights / weights.sum())
    names = np.array([f"tenant {i:04d}" for i in range(TENANTS)])
    _corpus(tmp_path / "corpus.parquet", hybrid.base, pa.array(names[of_row]))
    sizes = np.bincount(of_row, minlength=TENANTS)
    past = pa.table({"filter": [f"tenant = '{name}'" for name in names], "weight": sizes.astype(float)})
    pq.write_table(past, tmp_path / "workload.parquet")

    def on_ray(spec, config):
        return RayRunner(spec, config.ray)

    plain = _release(tmp_path / "plain", tmp_path / "corpus.parquet", on_ray)
    shared = _release(
        tmp_path / "shared",
        tmp_path / "corpus.parquet",
        on_ray,
        workload=str(tmp_path / "workload.parquet"),
        min_partition_rows=1000,
        max_partitions=256,
    )
    memory = [_navigation(release) for release in (plain, shared)]
    parts = shared.reader.manifest.partitions
    print(
        f"\n{TENANTS} tenants of {sizes.max():,} to {sizes.min()} rows in {len(parts)} partitions;", end=" "
    )
    print(
        f"heads and directories {memory[0] / 1e6:.1f} MB in one partition, {memory[1] / 1e6:.1f} MB: {memory[1] / memory[0]:.2f} x"
    )
    ranks = (np.unique(np.geomspace(1, TENANTS, ASKED).astype(int)) - 1).tolist()
    tenants = []
    for rank in ranks:
        rows = np.flatnonzero(of_row == rank)
        _corpus(tmp_path / f"{rank}.parquet", hybrid.base[rows], pa.array(names[of_row[rows]]))
        own = _release(tmp_path / f"own-{rank}", tmp_path / f"{rank}.parquet", lambda spec, _: Inline(spec))
        queries = hybrid.queries[rng.choice(len(hybrid.queries), QUERIES, replace=False)]
        nearest = np.sort(queries @ hybrid.base[rows].T, axis=1)[:, -10:]
        tenants.append(Tenant(rank, rows, own, queries, nearest[:, 0]))
    times, shares = _asked_in_turn(tenants, names, shared, of_row)
    print(
        "| tenant's rows | own index, p50 ms | shared, p50 ms | ratio | recall own | recall shared |\n|---|---|---|---|---|---|"
    )
    ratios = []
    for one in tenants:
        own_ms, shared_ms = (1000 * float(np.median(times[name, one.rank])) for name in ("own", "shared"))
        found = " | ".join(f"{np.mean(shares[name, one.rank]):.3f}" for name in ("own", "shared"))
        ratios.append(shared_ms / own_ms)
        print(f"| {len(one.rows):,} | {own_ms:.2f} | {shared_ms:.2f} | {ratios[-1]:.2f} | {found} |")
    print(f"median ratio {np.median(ratios):.2f}, worst {max(ratios):.2f}")
    assert np.median(ratios) <= 1.2
    assert memory[1] <= 1.1 * memory[0]


class Tenant(NamedTuple):
    """Who asks."""

    rank: int
    rows: np.ndarray
    own: object
    """A release of its rows alone."""
    queries: np.ndarray
    least: np.ndarray
    """Score of the last of the true nearest ten, of each query."""


def _asked_in_turn(tenants, names, shared, of_row):
    """Seconds and recall of every query, by index and tenant; tenants take turns, as they do at a server."""
    times, shares = {}, {}
    with threadpool_limits(1):
        for number in (*range(QUERIES), *range(QUERIES), *range(QUERIES)):
            for one in tenants:
                for name, release, text in (
                    ("own", one.own, None),
                    ("shared", shared, f"tenant = '{names[one.rank]}'"),
                ):
                    start = time.perf_counter()
                    hits = release.search(one.queries[number], k=10, filter=text)[0]
                    times.setdefault((name, one.rank), []).append(time.perf_counter() - start)
                    good = np.mean([hit.score >= one.least[number] - 1e-3 for hit in hits])
                    shares.setdefault((name, one.rank), []).append(good)
                    assert len(hits) == min(10, len(one.rows))
                    if name == "shared":
                        assert all(of_row[int(hit.doc_id)] == one.rank for hit in hits)
    return times, shares
