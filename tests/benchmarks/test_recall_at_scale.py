"""Must-show: 99,000 real vectors, 1,000 held-out queries: recall 10@10, share of rows scanned, bytes, times."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.config import load_config
from pipeline.execution.flows import run
from pipeline.execution.runner import RayRunner
from pipeline.execution.work import StoreSpec
from pipeline.tables import vector_array

NUM_QUERIES = 1000


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.ray
def test_99_000_vectors_reach_recall_95_scanning_15_percent(shared_data, tmp_path):
    vectors = np.load(shared_data / "vectors/package_summaries.minilm.f16.npy").astype(np.float32)
    names = [f"p{i}" for i in range(len(vectors))]
    table = pa.table({"_id": names[NUM_QUERIES:], "embedding": vector_array(vectors[NUM_QUERIES:])})
    pq.write_table(table, tmp_path / "corpus.parquet", row_group_size=10_000)
    asked = pa.table({"query_id": names[:NUM_QUERIES], "embedding": vector_array(vectors[:NUM_QUERIES])})
    pq.write_table(asked, tmp_path / "queries.parquet")
    content = {
        "root": str(tmp_path / "root"),
        "corpus": {"uri": str(tmp_path / "corpus.parquet"), "format": "parquet", "embedding": "embedding"},
        "binarizer": {"bytes": 96},
        "evaluation": {
            "queries": str(tmp_path / "queries.parquet"),
            "sample_queries": NUM_QUERIES,
            "target_recall": 0.95,
        },
    }
    (tmp_path / "conf.yaml").write_text(yaml.safe_dump(content))
    config = load_config(tmp_path / "conf.yaml")
    spec = StoreSpec(config.root, config.storage)
    summary = run(config, spec, lambda: RayRunner(spec, config.ray))
    shown = ("recall_at_10", "scanned_fraction", "lists_per_query", "margin", "rerank", "lists", "list_rows_cv", "levels", "bytes_per_query", "p50_ms", "p95_ms",
             "index_bytes_per_document", "vectors_bytes_per_document", "memory_by_stage", "estimate", "bytes", "dead_letters", "seconds")  # fmt: skip
    print("\n" + "\n".join(f"{name:28} {summary[name]}" for name in shown))
    assert summary["recall_at_10"] >= 0.95
    assert summary["scanned_fraction"] <= 0.15
    assert summary["rerank"] <= 100
