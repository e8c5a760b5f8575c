"""A small real road: a corpus of WordNet-like texts, the hashing encoder, and the runner in this process."""

import json
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.config import Config, load_config
from pipeline.execution.flows import run
from pipeline.execution.runner import InlineRunner, RayRunner
from pipeline.execution.work import StoreSpec
from pipeline.release.leases import lease_log

WORDS = [
    "river",
    "stone",
    "cloud",
    "engine",
    "violin",
    "market",
    "garden",
    "winter",
    "copper",
    "signal",
    "harbor",
    "letter",
    "forest",
    "planet",
    "bridge",
    "candle",
]


class Inline:
    """A context manager of an InlineRunner, as `run` asks for."""

    def __init__(self, spec):
        self.spec = spec

    def __enter__(self):
        return InlineRunner(self.spec)

    def __exit__(self, *_):
        return None


def rows_of(n, *, seed=0):
    rng = np.random.default_rng(seed)
    words = [f"{w}{i}" for w in WORDS for i in range(20)]
    return [
        {
            "_id": f"doc-{i:05d}",
            "title": " ".join(rng.choice(words, 3)),
            "text": " ".join(rng.choice(words, rng.integers(4, 14))) + f" {i}",
            "year": int(rng.integers(1990, 2025)) if i % 7 else None,
            "section": str(rng.choice(["a", "b", "c"])) if i % 11 else None,
            "tags": [str(t) for t in rng.choice(["x", "y", "z"], rng.integers(0, 3), replace=False)],
        }
        for i in range(n)
    ]


SCHEMA = pa.schema(
    [
        ("_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("year", pa.int64()),
        ("section", pa.string()),
        ("tags", pa.list_(pa.string())),
    ]
)


def write_parquet(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)


def write_jsonl(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(root, corpus, **more):
    return {
        "root": str(root),
        "corpus": {
            "uri": str(corpus),
            "format": "parquet",
            "text": ["title", "text"],
            "attributes": ["year", "section", "tags"],
            "shard_rows": 300,
        },
        "encoders": {"words": {"model": "hashing:64"}},
        "encoder": "words",
        "binarizer": {"bytes": 16},
        "layout": {"rows_per_list": 25, "segment_rows": 400},
        "evaluation": {"sample_queries": 50},
        "embedding": {"unit_texts": 200},
    } | more


def write_config(path: Path, content) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def configured(tmp_path: Path, content) -> Config:
    return load_config(write_config(tmp_path / "conf.yaml", content))


def run_inline(config: Config):
    spec = StoreSpec(config.root, config.storage)
    return run(config, spec, lambda: Inline(spec))


def run_on(config: Config, ledger=None):
    """A run on the Ray of this process, started for it if there is none."""
    spec = StoreSpec(config.root, config.storage)
    return run(config, spec, lambda: RayRunner(spec, config.ray), ledger)


def take_over(store):
    """Take the root from its holder, as a job does that has found it silent for long enough."""
    log = lease_log(store)
    newest = log.newest()
    thief = log.read(newest) | {"token": uuid.uuid4().hex, "job": "thief"}
    assert log.append(newest + 1, thief)
    return newest + 1


def data_files(store):
    """Path and content of every data file: what must be the same whatever happened on the way.

    The cache's logs are none: their entries stand in the order in which units were finished.
    """
    folders = ("documents", "embeddings", "binarizers", "bridges", "partitions", "indexes", "dead_letters")
    found = {}
    for folder in folders:
        for info in store.list(folder):
            if "/log/" not in info.path:
                found[info.path] = store.read(info.path)
    return found
