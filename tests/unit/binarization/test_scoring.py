import numpy as np
import pytest

from pipeline.binarization import Binarizer, binarize, decode, fit_binarizer, rotate_queries, score
from pipeline.config import BinarizerConfig

DIMS = 64


def unit(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, DIMS)) * np.arange(1, DIMS + 1) ** -0.3 + 0.1
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def fitted(**size: object) -> Binarizer:
    return fit_binarizer(unit(4000, 0), config=BinarizerConfig(**size), rng=np.random.default_rng(1))


def estimate(binarizer: Binarizer, queries: np.ndarray, x: np.ndarray) -> np.ndarray:
    scores = score(binarizer, rotate_queries(binarizer, queries), *binarize(binarizer, x))
    return scores + (queries @ binarizer.mean)[:, None]


@pytest.mark.parametrize("num_codes", [1, 1023, 2500])
def test_a_score_is_factor_times_product_plus_offset(num_codes: int) -> None:
    binarizer, queries = fitted(bytes=14), unit(5, 2)
    code, factor, offset = binarize(binarizer, unit(num_codes, 3))
    rotated = (queries - binarizer.mean) @ binarizer.rotation
    plain = factor.astype(np.float32) * (rotated @ decode(binarizer, code).T) + offset.astype(np.float32)
    scores = score(binarizer, rotate_queries(binarizer, queries), code, factor, offset)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, plain, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_estimates_of_inner_products_are_nearly_unbiased(bits: int) -> None:
    queries, x = unit(100, 4), unit(2000, 5)
    error = estimate(fitted(bits_per_dim=bits), queries, x) - queries @ x.T
    # Seed 1: mean error at most 3e-4, most of it from 16-bit factors; a single estimate at 1 bit errs by .07.
    assert abs(error.mean()) < 1e-3
    assert abs(np.polyfit((queries @ x.T).ravel(), error.ravel(), 1)[0]) < 0.03


def test_more_bits_give_better_estimates() -> None:
    queries, x = unit(50, 6), unit(500, 7)
    errors = [
        np.abs(estimate(fitted(bits_per_dim=b), queries, x) - queries @ x.T).mean() for b in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_a_vector_finds_itself_first() -> None:
    x = unit(500, 8)
    assert np.array_equal(estimate(fitted(bytes=32), x, x).argmax(axis=1), np.arange(500))
