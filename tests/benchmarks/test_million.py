"""Must-show: a million ready-made vectors from Parquet to a published release, in bounded memory, at an even cost per row."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.tables import vector_array
from tests.benchmarks.memory import wait_and_measure

DIMS, CLUSTERS, BLOCK = 384, 2000, 50_000


def write_vectors(path, rows, *, seed=0):
    """Generated vectors with the falling spectrum and the clusters of real ones, a block at a time."""
    rng = np.random.default_rng(seed)
    spectrum = (1.0 / np.sqrt(1 + np.arange(DIMS) / 8)).astype(np.float32)
    centers = rng.standard_normal((CLUSTERS, DIMS), dtype=np.float32) * spectrum
    schema = pa.schema(
        [("_id", pa.string()), ("embedding", pa.list_(pa.float32(), DIMS)), ("year", pa.int64())]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, BLOCK):
            n = min(BLOCK, rows - first)
            x = centers[rng.integers(CLUSTERS, size=n)]
            x = x + 0.7 * rng.standard_normal((n, DIMS), dtype=np.float32) * spectrum
            names = [f"v{first + i:08d}" for i in range(n)]
            year = rng.integers(1990, 2026, n)
            table = pa.table([names, vector_array(x).cast(schema.field(1).type), year], schema=schema)
            writer.write_table(table, row_group_size=10_000)


def configure(tmp_path, rows, **more):
    folder = tmp_path / str(rows)
    folder.mkdir()
    write_vectors(folder / "corpus.parquet", rows)
    content = {
        "root": str(folder / "root"),
        "corpus": {"uri": str(folder / "corpus.parquet"), "format": "parquet", "embedding": "embedding", "attributes": ["year"], "name": "generated"},
        "binarizer": {"bytes": 48},
        "ray": {"num_cpus": 2},
    } | more  # fmt: skip
    (folder / "conf.yaml").write_text(yaml.safe_dump(content))
    return folder / "conf.yaml"


def build(conf):
    """Run the job as a user does; returns its summary, the seconds and the peaks."""
    with (conf.parent / "stderr.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", "run", str(conf)], stdout=subprocess.PIPE, stderr=log, text=True
        )
        seconds, peaks = wait_and_measure(process)
    out, _ = process.communicate()
    lines = out.splitlines()
    assert process.returncode == 0, lines
    return json.loads(lines[-1]), seconds, peaks


def show(rows, summary, seconds, peaks):
    print(
        f"\n{rows:,} rows in {seconds:.0f} s, {1e6 * seconds / rows:.0f} µs per row; recall@10 {summary['recall_at_10']}"
    )
    for stage, took in summary["seconds"].items():
        print(
            f"  {stage:10} {took:8.1f} s {rows / max(took, 1e-9):12,.0f} rows/s {1e6 * took / rows:8.1f} µs/row"
        )
    for megabytes, command in peaks[:6]:
        print(f"  {megabytes:7.0f} MB RssAnon  {command}")
    for stage, found in summary["memory_by_stage"].items():
        print(f"  {stage:10} estimate {found['estimate_mb']:5.0f} MB, peak {found['peak_mb']:5.0f} MB")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_a_million_vectors_in_bounded_memory_at_an_even_cost(tmp_path):
    found = {}
    for rows in (250_000, 1_000_000):
        found[rows] = build(configure(tmp_path, rows))
        show(rows, *found[rows])
    peak = {rows: peaks[0][0] for rows, (_, _, peaks) in found.items()}
    cost = {rows: (s["seconds"]["total"] - s["seconds"]["start"]) / rows for rows, (s, _, _) in found.items()}
    print(
        f"memory {peak[1_000_000] / peak[250_000]:.3f} x, cost per row {cost[1_000_000] / cost[250_000]:.3f} x"
    )
    assert peak[1_000_000] <= 1536
    assert peak[1_000_000] <= 1.1 * peak[250_000]
    assert cost[1_000_000] <= 1.15 * cost[250_000]
