import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from pipeline.binarization import Binarizer, binarize, decode, fit_binarizer, rotate_queries, score
from pipeline.config import BinarizerConfig

DIMS = 48


def unit(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, DIMS)) * np.arange(1, DIMS + 1) ** -0.3 + 0.1
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def fitted(levels: tuple[int, ...]) -> Binarizer:
    return fit_binarizer(unit(3000, 0), config=BinarizerConfig(levels=levels), rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def binarizer() -> Binarizer:
    return fitted((40, 24, 24, 8))


def plain_value(binarizer: Binarizer, code: np.ndarray) -> np.ndarray:
    """The code's value as the design states it: a sum of weighted signs, one bit after another."""
    value, bit = np.zeros(binarizer.levels[0]), 0
    for t, m in enumerate(binarizer.levels):
        for i in range(m):
            block = next(b for b, block in enumerate(binarizer.blocks) if block.start <= i < block.stop)
            sign = 1 if code[bit // 8] >> (7 - bit % 8) & 1 else -1
            value[i] += sign * binarizer.weights[block, t]
            bit += 1
    return value


def test_codes_have_the_stored_shapes_and_types(binarizer: Binarizer) -> None:
    code, factor, offset = binarize(binarizer, unit(5, 2))
    assert (code.shape, code.dtype) == ((5, 12), np.uint8)
    assert (factor.shape, factor.dtype) == ((5,), np.float16)
    assert (offset.shape, offset.dtype) == ((5,), np.float16)


@given(
    levels=st.lists(st.integers(1, 6), min_size=1, max_size=8).map(
        lambda m: tuple(8 * v for v in sorted(m, reverse=True))
    ),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=25)
def test_a_decoded_value_is_the_sum_of_weighted_signs(levels: tuple[int, ...], seed: int) -> None:
    binarizer = fitted(levels)
    code = np.random.default_rng(seed).integers(0, 256, (3, sum(levels) // 8), dtype=np.uint8)
    expected = [plain_value(binarizer, row) for row in code]
    np.testing.assert_allclose(decode(binarizer, code), expected, atol=1e-6)


def test_a_plane_holds_the_signs_of_what_the_planes_before_leave(binarizer: Binarizer) -> None:
    x = unit(50, 3)
    code = binarize(binarizer, x).code
    residual = (x - binarizer.mean) @ binarizer.rotation
    start = 0
    for m, weight in zip(binarizer.levels, binarizer.level_weights, strict=True):
        signs = np.unpackbits(code[:, start : start + m // 8], axis=1) * 2.0 - 1
        clear = np.abs(residual[:, :m]) > 1e-5
        assert np.array_equal(signs[clear], np.sign(residual[:, :m])[clear])
        residual[:, :m] -= weight * signs
        start += m // 8


def test_a_value_is_coded_as_itself(binarizer: Binarizer) -> None:
    """Packing undoes unpacking: what a code stands for gets that code again."""
    code = binarize(binarizer, unit(200, 4)).code
    x = decode(binarizer, code) @ binarizer.rotation.T + binarizer.mean
    assert np.array_equal(binarize(binarizer, x).code, code)


def test_each_level_lowers_the_error() -> None:
    x = unit(500, 5)
    errors = []
    for bits in (1, 2, 4, 8):
        binarizer = fitted((DIMS,) * bits)
        z = (x - binarizer.mean) @ binarizer.rotation
        errors.append(np.square(z - decode(binarizer, binarize(binarizer, x).code)).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


def test_a_code_depends_on_its_vector_alone(binarizer: Binarizer) -> None:
    x = unit(2100, 6)
    together = binarize(binarizer, x)
    for threads, start, stop in ((1, 0, 1), (2, 5, 8), (1, 1000, 1100), (2, 2099, 2100)):
        with threadpool_limits(threads):
            alone = binarize(binarizer, x[start:stop])
        for one, other in zip(alone, together, strict=True):
            assert one.tobytes() == other[start:stop].tobytes()


def test_factor_and_offset_are_those_of_the_estimator(binarizer: Binarizer) -> None:
    x = unit(100, 7)
    code, factor, offset = binarize(binarizer, x)
    z = (x - binarizer.mean) @ binarizer.rotation
    product = (z * decode(binarizer, code)).sum(axis=1)
    np.testing.assert_allclose(factor, (z * z).sum(axis=1) / product, rtol=1e-3)
    np.testing.assert_allclose(offset, (x - binarizer.mean) @ binarizer.mean, atol=1e-3)


@pytest.mark.parametrize("scale", [0, 1e-30, 1e-6, 1e6, 1e18])
@pytest.mark.filterwarnings("error")
def test_factors_and_offsets_stay_finite(binarizer: Binarizer, scale: float) -> None:
    x = (binarizer.mean + scale * unit(20, 8)).astype(np.float32)
    code, factor, offset = binarize(binarizer, x)
    assert np.isfinite(factor).all()
    assert np.isfinite(offset).all()
    assert np.isfinite(score(binarizer, rotate_queries(binarizer, unit(2, 9)), code, factor, offset)).all()


def test_the_mean_itself_has_factor_zero(binarizer: Binarizer) -> None:
    assert binarize(binarizer, binarizer.mean[None]).factor.tolist() == [0]


def test_no_vectors_give_no_codes(binarizer: Binarizer) -> None:
    code, factor, offset = binarize(binarizer, unit(0, 0))
    assert code.shape == (0, 12)
    assert score(binarizer, rotate_queries(binarizer, unit(3, 0)), code, factor, offset).shape == (3, 0)


@pytest.mark.parametrize("x", [np.zeros((2, 47), np.float32), np.full((2, DIMS), np.nan, np.float32)])
def test_vectors_of_another_width_or_not_finite_are_refused(binarizer: Binarizer, x: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected finite \(n, 48\) vectors"):
        binarize(binarizer, x)


def test_codes_of_another_size_are_refused(binarizer: Binarizer) -> None:
    with pytest.raises(ValueError, match=r"expected \(n, 12\) codes, found shape \(2, 11\)"):
        decode(binarizer, np.zeros((2, 11), np.uint8))
