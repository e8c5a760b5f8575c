import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.binarization import Binarizer, binarize, decode, fit_binarizer, rotate_queries, score
from pipeline.binarization.scoring import MAX_TABLE_QUERIES, ROWS_PER_PRODUCT, query_values
from pipeline.config import BinarizerConfig
from tests.unit.binarization.cases import BINARIZERS, plain_scores, random_codes

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


# Float32 sums in another order; values are of size 1 and at most 200 are summed.
TOLERANCE = 1e-4


@settings(max_examples=40)
@given(
    binarizer=BINARIZERS,
    num_queries=st.sampled_from([1, 2, MAX_TABLE_QUERIES, MAX_TABLE_QUERIES + 1, 40]),
    num_codes=st.sampled_from([1, 7, ROWS_PER_PRODUCT, ROWS_PER_PRODUCT + 1, 700]),
    mode=st.sampled_from(["asymmetric", "symmetric"]),
    seed=st.integers(0, 99),
)
def test_scores_by_tables_and_by_decoding_equal_the_plain_computation(
    binarizer: Binarizer, num_queries: int, num_codes: int, mode: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rotated = rng.standard_normal((num_queries, binarizer.levels[0])).astype(np.float32)
    codes = random_codes(binarizer, num_codes, rng)
    scores = score(binarizer, rotated, *codes, mode=mode)
    assert scores.dtype == np.float32
    plain = plain_scores(binarizer, rotated, codes, mode)
    np.testing.assert_allclose(scores, plain, atol=TOLERANCE * np.abs(plain).max())


@settings(max_examples=40)
@given(binarizer=BINARIZERS, seed=st.integers(0, 99))
def test_the_code_of_a_query_keeps_its_product_with_the_query(binarizer: Binarizer, seed: int) -> None:
    z = np.random.default_rng(seed).standard_normal((5, binarizer.levels[0])).astype(np.float32)
    values = query_values(binarizer, z, "symmetric")
    np.testing.assert_allclose((z * values).sum(axis=1), np.square(z).sum(axis=1), rtol=1e-4)


def test_a_query_at_the_mean_scores_by_offsets_alone() -> None:
    binarizer = fitted(bytes=14)
    code, factor, offset = binarize(binarizer, unit(9, 3))
    scores = score(
        binarizer, np.zeros((1, binarizer.levels[0]), np.float32), code, factor, offset, mode="symmetric"
    )
    assert np.array_equal(scores[0], offset.astype(np.float32))


def test_symmetric_estimates_are_nearly_unbiased_and_a_little_worse() -> None:
    binarizer, queries, x = fitted(bits_per_dim=2), unit(100, 4), unit(2000, 5)
    codes, rotated = binarize(binarizer, x), rotate_queries(binarizer, queries)
    exact = queries @ x.T - (queries @ binarizer.mean)[:, None]
    asymmetric, symmetric = (
        score(binarizer, rotated, *codes, mode=m) - exact for m in ("asymmetric", "symmetric")
    )
    assert abs(symmetric.mean()) < 1e-3
    assert asymmetric.std() < symmetric.std() < 2 * asymmetric.std()


@pytest.mark.parametrize("num_queries", [1, MAX_TABLE_QUERIES + 1])
def test_what_does_not_fit_the_binarizer_is_refused(num_queries: int) -> None:
    binarizer = fitted(bytes=14)
    codes, rotated = binarize(binarizer, unit(9, 3)), rotate_queries(binarizer, unit(num_queries, 2))
    with pytest.raises(ValueError, match="codes, found shape"):
        score(binarizer, rotated, codes.code[:, :-1], codes.factor, codes.offset)
    with pytest.raises(ValueError, match="rotated queries, found shape"):
        score(binarizer, rotated[:, :-1], *codes)
    rotated[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        score(binarizer, rotated, *codes)


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
