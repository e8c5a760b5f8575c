import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.binarization import Binarizer, Block, binarize, fit_binarizer, from_tensors, to_tensors
from pipeline.binarization.binarizer import blocks_of
from pipeline.binarization.fitting import fit_weights
from pipeline.config import BinarizerConfig
from pipeline.errors import ConfigError, CorruptArtifactError


def sample_of(n: int, d: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d)) * np.arange(1, d + 1) ** -0.5 + 0.2
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def fitted(n: int = 600, d: int = 32, seed: int = 0, **size: object) -> Binarizer:
    return fit_binarizer(sample_of(n, d), config=BinarizerConfig(**size), rng=np.random.default_rng(seed))


def test_the_same_generator_state_gives_the_same_bytes() -> None:
    once, again = (to_tensors(fitted(bytes=12)) for _ in range(2))
    assert {k: v.tobytes() for k, v in once.items()} == {k: v.tobytes() for k, v in again.items()}


def test_another_generator_state_gives_another_rotation() -> None:
    assert not np.array_equal(fitted(seed=0, bytes=12).rotation, fitted(seed=1, bytes=12).rotation)


@given(n=st.integers(1, 60), d=st.integers(8, 40), bits=st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_any_sample_gives_an_orthonormal_rotation_and_falling_weights(n: int, d: int, bits: int) -> None:
    binarizer = fitted(n, d, bits_per_dim=bits)
    m = d // 8 * 8
    assert binarizer.levels == (m,) * bits
    assert {array.dtype for array in to_tensors(binarizer).values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(binarizer.rotation.T @ binarizer.rotation, np.eye(m), atol=1e-5)
    assert (binarizer.weights > 0).all()
    assert (np.diff(binarizer.weights[0]) < 0).all()


def test_weights_are_zero_where_a_block_has_fewer_levels() -> None:
    binarizer = fitted(levels=(32, 16, 8))
    assert binarizer.blocks == (Block(0, 8, 3), Block(8, 16, 2), Block(16, 32, 1))
    assert ((binarizer.weights > 0) == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]).all()


def test_blocks_cover_the_dimensions_once() -> None:
    assert blocks_of((256, 256, 128, 128)) == (Block(0, 128, 4), Block(128, 256, 2))


def test_the_first_dimensions_vary_most() -> None:
    binarizer = fitted(2000, 32, levels=(32, 8))
    variance = np.var((sample_of(2000, 32) - binarizer.mean) @ binarizer.rotation, axis=0)
    assert variance[:8].mean() > 2 * variance[8:].mean()


@pytest.mark.parametrize(
    ("num_levels", "distortion"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154), (8, 0.0001)]
)
def test_weights_of_normal_values_reach_maxs_distortion(num_levels: int, distortion: float) -> None:
    values = np.random.default_rng(0).standard_normal(100_000)
    residual = values.copy()
    for weight in fit_weights(values, num_levels):
        residual -= np.where(residual >= 0, weight, -weight)
    assert np.mean(residual**2) < 1.02 * distortion


def test_weights_of_two_valued_data_still_fall() -> None:
    weights = fit_weights(np.tile([-1.0, 1.0], 5000), 3)
    assert (weights > 0).all()
    assert (np.diff(weights) < 0).all()


@pytest.mark.parametrize("n", [1, 1000])
def test_identical_rows_give_a_binarizer_that_codes_other_vectors(n: int) -> None:
    sample = np.repeat(sample_of(1, 16), n, axis=0)
    binarizer = fit_binarizer(sample, config=BinarizerConfig(bytes=4), rng=np.random.default_rng(0))
    codes = binarize(binarizer, sample_of(20, 16, seed=1))
    assert (codes.factor > 0).all()


def test_the_largest_component_entry_decides_the_sign_of_all() -> None:
    """LAPACK may return either sign; the fit of mirrored data mirrors the mean and keeps the components."""
    x = sample_of(500, 16)
    one, other = (
        fit_binarizer(s, config=BinarizerConfig(bytes=4), rng=np.random.default_rng(0)) for s in (x, -x)
    )
    np.testing.assert_allclose(one.rotation, other.rotation, atol=1e-4)


@pytest.mark.parametrize("sample", [np.zeros((0, 16), np.float32), np.full((2, 16), np.nan, np.float32)])
def test_an_empty_or_infinite_sample_is_refused(sample: np.ndarray) -> None:
    with pytest.raises(ValueError, match="sample must be finite"):
        fit_binarizer(sample, config=BinarizerConfig(bytes=4), rng=np.random.default_rng(0))


def test_a_size_out_of_reach_is_refused() -> None:
    with pytest.raises(ConfigError, match="give 1 to 32"):
        fitted(bytes=96)


def test_tensors_round_trip() -> None:
    binarizer = fitted(bytes=12)
    again = from_tensors(to_tensors(binarizer), binarizer.levels)
    x = sample_of(50, 32, seed=3)
    assert again.levels == binarizer.levels
    for one, other in zip(binarize(again, x), binarize(binarizer, x), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", ["mean", "rotation", "weights"])
def test_missing_or_misshapen_tensors_are_refused(name: str) -> None:
    tensors = to_tensors(fitted(levels=(32, 16)))
    for broken in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {name: tensors[name][:-1]},
        tensors | {name: tensors[name].astype(np.float64)},
    ):
        with pytest.raises(CorruptArtifactError, match="binarizer: expected tensors"):
            from_tensors(broken, (32, 16))
