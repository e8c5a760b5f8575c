"""Must-show: a thousand tenants of Zipf sizes in one index, beside an index for each. Warm page cache, one thread."""

import time

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
    ranks = np.unique(np.geomspace(1, TENANTS, ASKED).astype(int)) - 1
    print(
        "| tenant's rows | own index, p50 ms | shared, p50 ms | ratio | recall own | recall shared |\n|---|---|---|---|---|---|"
    )
    ratios = []
    for rank in ranks.tolist():
        rows = np.flatnonzero(of_row == rank)
        corpus = tmp_path / f"{rank}.parquet"
        _corpus(corpus, hybrid.base[rows], pa.array(names[of_row[rows]]))
        own = _release(tmp_path / f"own-{rank}", corpus, lambda spec, _: Inline(spec))
        where = f"tenant = '{names[rank]}'"
        queries = hybrid.queries[rng.choice(len(hybrid.queries), QUERIES, replace=False)]
        exact = np.sort(queries @ hybrid.base[rows].T, axis=1)[:, -10:]
        times, shares = {"own": [], "shared": []}, {"own": [], "shared": []}
        with threadpool_limits(1):
            for repeat in range(4):
                for name, release, text in (("own", own, None), ("shared", shared, where)):
                    for query, best in zip(queries, exact, strict=True):
                        start = time.perf_counter()
                        hits = release.search(query, k=10, filter=text)[0]
                        times[name].append(time.perf_counter() - start)
                        shares[name].append(np.mean([hit.score >= best[0] - 1e-3 for hit in hits]))
                        assert len(hits) == min(10, len(rows))
                        if name == "shared":
                            assert all(of_row[int(hit.doc_id)] == rank for hit in hits)
                if not repeat:
                    times = {"own": [], "shared": []}
        own_ms, shared_ms = (1000 * float(np.median(times[name])) for name in ("own", "shared"))
        ratios.append(shared_ms / own_ms)
        print(
            f"| {len(rows):,} | {own_ms:.2f} | {shared_ms:.2f} | {ratios[-1]:.2f} | {np.mean(shares['own']):.3f} | {np.mean(shares['shared']):.3f} |"
        )
    print(f"median ratio {np.median(ratios):.2f}, worst {max(ratios):.2f}")
    assert np.median(ratios) <= 1.2
    assert memory[1] <= 1.1 * memory[0]
