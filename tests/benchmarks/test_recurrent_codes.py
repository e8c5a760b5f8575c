"""Must-show: what the recurrent network adds to the learned binarizer, and what a compatible head finds in old codes.

Queries are held out from all fitting and training; recall is 10@10 of float32 neighbours.
"""

import time
from collections.abc import Iterator

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.binarization import (
    Codes,
    binarize,
    choose_binarizer,
    decode,
    fit_binarizer,
    rotate_queries,
    score,
)
from pipeline.binarization.compatible import CompatibleHead, fit_compatible, train_compatible
from pipeline.binarization.learning import mine_neighbours
from pipeline.config import BinarizerConfig
from tests.benchmarks.vector_sets import DATA, NUM_QUERIES, PACKAGE_SUMMARIES, package_summaries, recall, top

NEW_VECTORS = DATA / "vectors" / "package_summaries.mpnet.first30000.f16.npy"
SAMPLE_ROWS = 65_536
STOPPING_QUERIES = 500
K = 10

pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the corpora in {DATA}"),
]


@pytest.fixture(scope="module")
def report() -> Iterator[list[str]]:
    """Lines to print when all is measured."""
    lines: list[str] = []
    yield lines
    print("\n".join(["", *lines]))


def test_the_network_is_held_against_what_it_stands_on(report: list[str]) -> None:
    vectors = package_summaries()
    rows = np.random.default_rng(0).choice(len(vectors.base), SAMPLE_ROWS, replace=False)
    sample = vectors.base[np.sort(rows)]
    report += ["| 52 bytes, packages | train s | float query | binary query |", "|---|---|---|---|"]
    found = {}
    for name, config in {
        "rotation": BinarizerConfig(bytes=48, method="rotation"),
        "learned": BinarizerConfig(bytes=48, method="learned"),
        "recurrent, linear": BinarizerConfig(bytes=48, method="recurrent"),
        "recurrent, 256 hidden units": BinarizerConfig(bytes=48, method="recurrent", hidden_units=256),
    }.items():
        start = time.perf_counter()
        binarizer = choose_binarizer(sample, config=config, seed=0).binarizer
        seconds = time.perf_counter() - start
        codes, rotated = binarize(binarizer, vectors.base), rotate_queries(binarizer, vectors.queries)
        asymmetric, symmetric = (
            recall(top(score(binarizer, rotated, *codes, mode=mode), K), vectors.exact)
            for mode in ("asymmetric", "symmetric")
        )
        report.append(f"| {name} | {seconds:.0f} | {asymmetric:.3f} | {symmetric:.3f} |")
        found[name] = asymmetric
        assert seconds <= 600, name
    assert found["learned"] > found["rotation"]
    assert found["recurrent, linear"] > found["rotation"]


def _neighbours(queries: NDArray[np.float32], base: NDArray[np.float32]) -> NDArray[np.int64]:
    return faiss.knn(queries, base, K, metric=faiss.METRIC_INNER_PRODUCT)[1]


def _by_old_codes(
    head: CompatibleHead, codes: Codes, queries: NDArray[np.float32], mode: str
) -> NDArray[np.intp]:
    return top(score(head.reader, rotate_queries(head.reader, queries), *codes, mode=mode), K)


def test_a_compatible_head_is_held_against_the_bridge_that_needs_old_vectors(report: list[str]) -> None:
    old_vectors, new_vectors = (np.load(path).astype(np.float32) for path in (PACKAGE_SUMMARIES, NEW_VECTORS))
    old_vectors = old_vectors[: len(new_vectors)]
    old_queries, old_base = old_vectors[:NUM_QUERIES], old_vectors[NUM_QUERIES:]
    queries, base = new_vectors[:NUM_QUERIES], new_vectors[NUM_QUERIES:]
    exact = _neighbours(queries, base)
    old = choose_binarizer(old_base, config=BinarizerConfig(bytes=48, method="learned"), seed=0).binarizer
    codes = binarize(old, old_base)

    def share(found: NDArray[np.intp]) -> float:
        return recall(found, exact)

    report += [
        "",
        "| MiniLM codes of 52 bytes, neighbours by mpnet | float query | binary query |",
        "|---|---|---|",
    ]
    for name, asked in {
        "old queries, old codes": old_queries,
        "new queries by Procrustes on old vectors": _procrustes(base, old_base, queries),
    }.items():
        rotated = rotate_queries(old, asked)
        numbers = [share(top(score(old, rotated, *codes, mode=m), K)) for m in ("asymmetric", "symmetric")]
        report.append(f"| {name} | {numbers[0]:.3f} | {numbers[1]:.3f} |")
    status_quo = share(top(score(old, rotate_queries(old, old_queries), *codes), K))

    start = fit_compatible(base, old, codes, levels=(384, *old.levels), rng=np.random.default_rng(0))
    stopping = np.random.default_rng(1).choice(len(base), STOPPING_QUERIES, replace=False)
    wanted = _neighbours(base[stopping], base)
    trained, _ = train_compatible(
        start,
        base,
        codes,
        mine_neighbours(base, np.random.default_rng(2)),
        hidden=0,
        recall=lambda head: recall(_by_old_codes(head, codes, base[stopping], "asymmetric"), wanted),
        seed=0,
    )
    for name, head in {"compatible head, closed form": start, "compatible head, trained": trained}.items():
        numbers = [share(_by_old_codes(head, codes, queries, mode)) for mode in ("asymmetric", "symmetric")]
        report.append(f"| new queries, {name} | {numbers[0]:.3f} | {numbers[1]:.3f} |")
    prefix = decode(trained.binarizer, binarize(trained.binarizer, queries).code)[:, : old.levels[0]]
    cosines = _unit(prefix) @ _unit(decode(old, codes.code)).T
    report.append(
        f"| first {old.levels[0]} dimensions of new codes, trained | | {share(top(cosines, K)):.3f} |"
    )
    own = fit_binarizer(
        base, config=BinarizerConfig(bytes=trained.binarizer.code_bytes), rng=np.random.default_rng(0)
    )
    for name, binarizer in {"the head's": trained.binarizer, "a rotation's of their own": own}.items():
        new_codes, rotated = binarize(binarizer, base), rotate_queries(binarizer, queries)
        found = share(top(score(binarizer, rotated, *new_codes), K))
        report.append(
            f"| new queries, {name} new codes of {binarizer.code_bytes + 4} bytes | {found:.3f} | |"
        )
    assert share(_by_old_codes(trained, codes, queries, "asymmetric")) > status_quo


def _procrustes(
    new: NDArray[np.float32], old: NDArray[np.float32], queries: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Queries by the centred orthogonal map that brings new vectors nearest to old ones."""
    new_mean, old_mean = new.mean(axis=0), old.mean(axis=0)
    u, _, v = np.linalg.svd((new - new_mean).T @ (old - old_mean), full_matrices=False)
    moved: NDArray[np.float32] = (queries - new_mean) @ (u @ v) + old_mean
    return moved


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return scaled
