"""Must-show: what keeping a binarizer costs on a corpus that grows by other texts, and whether the drift says so.

The drift is what a run measures in seconds: closed forms, on held-out queries of its own sample. The gain is what it stands
for: what learning anew finds more, by queries from outside of the sample. One run prints one table.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.binarization import Binarizer, choose_binarizer, may_stay, measure_drift
from pipeline.binarization.choosing import HeldOut, hold_out
from pipeline.config import BinarizerConfig
from tests.benchmarks.vector_sets import DATA, VectorSet, glosses, package_summaries

FIRST_ROWS = 8192
"""Package summaries of the first release."""
SHARES = (0.01, 0.05, 0.2, 0.5, 1.0)
"""By how much of that the corpus grows."""
CODE_BYTES = (48, 96)
NUM_QUERIES = 2000
SEED = 0
"""Of all runs on a root, as a rule."""
MOST_HIDDEN = 0.015
"""What learning anew may gain beyond the drift: both are measured on hundreds of queries."""
MOST_FEARED = 0.03
"""How far the drift may be beyond the gain: then a run replaces sooner than it would need to."""

pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the corpora in {DATA}"),
]

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One line of the table: recall@10 by codes alone."""

    code_bytes: int
    grown_by: str
    share: float
    drift: float
    gain: float
    kept: bool
    measure_s: float
    learn_s: float

    def __str__(self) -> str:
        outcome = "kept" if self.kept else "replaced"
        figures = (
            f"{self.drift:+.4f} | {self.gain:+.4f} | {outcome} | {self.measure_s:.1f} | {self.learn_s:.0f}"
        )
        return f"| {self.code_bytes} | {self.grown_by} | {self.share:.0%} | {figures} |"


HEADER = """
| bytes | grown by | of the first rows | drift | gain of learning anew | decision | s to measure | s to learn |
|---|---|---|---|---|---|---|---|"""


def mixed(parts: tuple[VectorSet, VectorSet], share: float) -> tuple[Vectors, HeldOut]:
    """A corpus of the first rows and more, and queries in the same proportion that are not in it."""
    first, more = parts
    added = more.base[-round(FIRST_ROWS * share) :]
    corpus = np.vstack([first.base[:FIRST_ROWS], added])
    corpus = corpus[np.random.default_rng(1).permutation(len(corpus))]
    of_first = round(NUM_QUERIES / (1 + share))
    outside = len(more.base) // 2
    queries = np.vstack(
        [
            first.base[FIRST_ROWS : FIRST_ROWS + of_first],
            more.base[outside - (NUM_QUERIES - of_first) : outside],
        ]
    )
    return corpus, hold_out(queries, corpus)


def measured(
    stored: Binarizer, parts: tuple[VectorSet, VectorSet], share: float, config: BinarizerConfig
) -> Row:
    corpus, judges = mixed(parts, share)
    start = time.perf_counter()
    drift = measure_drift(stored, corpus, config=config, seed=SEED)
    measure_s = time.perf_counter() - start
    anew = choose_binarizer(corpus, config=config, seed=SEED).binarizer
    learn_s = time.perf_counter() - start - measure_s
    assert drift is not None
    row = Row(
        code_bytes=stored.code_bytes,
        grown_by=parts[1].name,
        share=share,
        drift=drift.lost,
        gain=judges.recall(anew) - judges.recall(stored),
        kept=may_stay(drift, config),
        measure_s=measure_s,
        learn_s=learn_s,
    )
    logging.getLogger(__name__).info("%s", row)
    return row


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """All lines, printed in the end."""
    packages, definitions = package_summaries(), glosses()
    found = []
    for code_bytes in CODE_BYTES:
        config = BinarizerConfig(bytes=code_bytes)
        stored = choose_binarizer(packages.base[:FIRST_ROWS], config=config, seed=SEED).binarizer
        cases = [(packages, 1.0), *((definitions, share) for share in SHARES)]
        found += [measured(stored, (packages, more), share, config) for more, share in cases]
    yield found
    print("\n".join([HEADER, *map(str, found)]))


def test_the_drift_is_about_what_learning_anew_gains(rows: list[Row]) -> None:
    for row in rows:
        assert -MOST_HIDDEN <= row.drift - row.gain <= MOST_FEARED, row


def test_more_of_the_same_keeps_the_binarizer_and_a_corpus_of_two_kinds_replaces_it(rows: list[Row]) -> None:
    for row in rows:
        if row.grown_by == "packages" or row.share <= 0.05:
            assert row.kept, row
        if row.grown_by == "glosses" and row.share >= 0.5:
            assert not row.kept, row


def test_a_binarizer_that_is_kept_loses_little(rows: list[Row]) -> None:
    for row in rows:
        assert row.gain <= 0.015 or not row.kept, row


def test_measuring_takes_a_tenth_of_learning_at_most(rows: list[Row]) -> None:
    assert sum(row.measure_s for row in rows) <= 0.1 * sum(row.learn_s for row in rows)
