import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.binarization import (
    Binarizer,
    Codes,
    CodeScanner,
    binarize,
    fit_binarizer,
    rotate_queries,
    score,
)
from pipeline.binarization.scanning import MIN_CANDIDATES
from pipeline.config import BinarizerConfig
from tests.unit.binarization.cases import BINARIZERS, binarizer_of, plain_scores, random_codes

K = 10


def clustered(n: int, seed: int) -> np.ndarray:
    """Unit vectors near 200 centres, away from the origin: near neighbours, and offsets that matter."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((200, 96)) * np.arange(1, 97) ** -0.3 + 0.1
    x = centres[rng.integers(0, len(centres), n)] + 0.5 * rng.standard_normal((n, 96))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def overlap(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([np.isin(e, f).mean() for f, e in zip(found, expected, strict=True)]))


@settings(max_examples=40)
@given(
    binarizer=BINARIZERS,
    num_codes=st.integers(1, 2 * MIN_CANDIDATES),
    num_queries=st.sampled_from([1, 2, 33]),
    mode=st.sampled_from(["asymmetric", "symmetric"]),
    seed=st.integers(0, 99),
)
def test_found_rows_have_the_scores_of_the_plain_computation_best_first(
    binarizer: Binarizer, num_codes: int, num_queries: int, mode: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rotated = rng.standard_normal((num_queries, binarizer.levels[0])).astype(np.float32)
    codes = random_codes(binarizer, num_codes, rng)
    rows, scores = CodeScanner(binarizer, codes).search(rotated, K, mode=mode)
    assert rows.shape == scores.shape == (num_queries, min(K, num_codes))
    assert all(len(set(row)) == len(row) for row in rows.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()
    plain = plain_scores(binarizer, rotated, codes, mode)
    # Float32 sums in another order.
    np.testing.assert_allclose(
        scores, np.take_along_axis(plain, rows, axis=1), atol=1e-4 * np.abs(plain).max()
    )


@settings(max_examples=40)
@given(
    binarizer=BINARIZERS,
    num_codes=st.integers(1, MIN_CANDIDATES),
    mode=st.sampled_from(["asymmetric", "symmetric"]),
    seed=st.integers(0, 99),
)
def test_where_all_codes_are_candidates_the_best_are_the_plain_computations(
    binarizer: Binarizer, num_codes: int, mode: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rotated = rng.standard_normal((3, binarizer.levels[0])).astype(np.float32)
    codes = random_codes(binarizer, num_codes, rng)
    _, scores = CodeScanner(binarizer, codes).search(rotated, K, mode=mode)
    plain = plain_scores(binarizer, rotated, codes, mode)
    best = -np.sort(-plain, axis=1)[:, :K]
    np.testing.assert_allclose(scores, best, atol=1e-4 * np.abs(plain).max())


@pytest.mark.parametrize("mode", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("size", [{"bytes": 12}, {"bytes": 24}, {"bits_per_dim": 1}, {"bits_per_dim": 2}])
def test_candidates_hold_the_best_of_many_codes(size: dict[str, int], mode: str) -> None:
    x, queries = clustered(8000, 1), clustered(100, 2)
    binarizer = fit_binarizer(x, config=BinarizerConfig(**size), rng=np.random.default_rng(0))
    codes, rotated = binarize(binarizer, x), rotate_queries(binarizer, queries)
    rows, _ = CodeScanner(binarizer, codes).search(rotated, K, mode=mode)
    best = np.argsort(-score(binarizer, rotated, *codes, mode=mode), axis=1, kind="stable")[:, :K]
    assert overlap(rows, best) >= 0.99


def test_equal_scores_go_by_rising_row() -> None:
    binarizer = binarizer_of((16, 8), seed=0)
    one = random_codes(binarizer, 1, np.random.default_rng(0))
    codes = Codes(*(np.repeat(column, 30, axis=0) for column in one))
    rows, _ = CodeScanner(binarizer, codes).search(np.ones((2, 16), np.float32), K)
    assert np.array_equal(rows, [np.arange(K)] * 2)


def test_codes_opposite_to_a_query_are_found_where_there_are_no_others() -> None:
    binarizer = binarizer_of((16, 8), seed=0)
    codes = Codes(np.zeros((200, 3), np.uint8), np.ones(200, np.float16), np.zeros(200, np.float16))
    rows, scores = CodeScanner(binarizer, codes).search(np.ones((2, 16), np.float32), K)
    assert np.array_equal(rows, [np.arange(K)] * 2)
    assert (scores < 0).all()


def test_a_query_at_the_mean_and_codes_without_offset_score_nothing() -> None:
    binarizer = binarizer_of((16, 8), seed=0)
    codes = random_codes(binarizer, 200, np.random.default_rng(0))
    scanner = CodeScanner(binarizer, codes._replace(offset=np.zeros(200, np.float16)))
    rows, scores = scanner.search(np.zeros((1, 16), np.float32), K)
    assert len(set(rows[0].tolist())) == K
    assert not scores.any()


def test_the_same_search_finds_the_same_rows() -> None:
    binarizer = binarizer_of((64, 24), seed=1)
    rng = np.random.default_rng(3)
    codes, queries = random_codes(binarizer, 5000, rng), rng.standard_normal((20, 64)).astype(np.float32)
    first, second = (CodeScanner(binarizer, codes).search(queries, K) for _ in range(2))
    assert np.array_equal(first.rows, second.rows)
    assert np.array_equal(first.scores, second.scores)


@pytest.mark.parametrize(("num_queries", "num_codes"), [(0, 5), (3, 0)])
def test_no_queries_or_no_codes_give_an_empty_answer(num_queries: int, num_codes: int) -> None:
    binarizer = binarizer_of((16,), seed=0)
    codes = random_codes(binarizer, num_codes, np.random.default_rng(0))
    rows, scores = CodeScanner(binarizer, codes).search(np.ones((num_queries, 16), np.float32), K)
    assert rows.shape == scores.shape == (num_queries, min(K, num_codes))


def test_codes_or_queries_of_another_binarizer_are_refused() -> None:
    binarizer = binarizer_of((16, 8), seed=0)
    codes = random_codes(binarizer, 9, np.random.default_rng(0))
    with pytest.raises(ValueError, match="codes, found shape"):
        CodeScanner(binarizer, codes._replace(code=codes.code[:, :-1]))
    with pytest.raises(ValueError, match="rotated queries, found shape"):
        CodeScanner(binarizer, codes).search(np.ones((1, 8), np.float32), K)
