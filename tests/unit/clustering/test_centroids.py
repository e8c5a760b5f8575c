import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clustering import assign, train_centroids


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def test_the_same_seed_gives_the_same_bytes() -> None:
    sample = normal(2000, 16)
    once, again = (train_centroids(sample, num_lists=20, seed=3) for _ in range(2))
    assert once.tobytes() == again.tobytes()
    assert once.shape == (20, 16)
    assert once.dtype == np.float32


def test_another_seed_gives_other_centroids() -> None:
    sample = normal(2000, 16)
    assert not np.array_equal(*(train_centroids(sample, num_lists=20, seed=seed) for seed in (3, 4)))


def test_separated_clusters_are_found() -> None:
    centres = 100 * np.eye(4, 8, dtype=np.float32)
    sample = np.repeat(centres, 50, axis=0) + normal(200, 8)
    found = train_centroids(sample, num_lists=4, iterations=20, seed=2)
    assert assign(centres, found)[1].max() < 2


def test_more_iterations_lower_the_distortion() -> None:
    sample = normal(3000, 8)
    few, many = (
        assign(sample, train_centroids(sample, num_lists=30, iterations=i, seed=0))[1].mean() for i in (1, 15)
    )
    assert many < few


def test_faiss_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train_centroids(normal(50, 8), num_lists=40, seed=0)
    assert capfd.readouterr() == ("", "")


@given(
    distinct=st.integers(1, 12),
    copies=st.integers(1, 4),
    num_lists=st.integers(1, 60),
    seed=st.integers(0, 2**31 - 1),
)
@settings(deadline=None, max_examples=60)
def test_centroids_are_finite_and_never_more_than_the_distinct_rows(
    distinct: int, copies: int, num_lists: int, seed: int
) -> None:
    sample = np.tile(normal(distinct, 5), (copies, 1))
    found = train_centroids(sample, num_lists=num_lists, seed=seed)
    assert found.shape == (min(distinct, num_lists), 5)
    assert np.isfinite(found).all()


def test_few_distinct_rows_are_returned_as_they_are() -> None:
    rows = normal(3, 4)
    found = train_centroids(rows[[2, 0, 2, 1, 0]], num_lists=10, seed=0)
    assert np.array_equal(found, rows[[2, 0, 1]])


def test_signed_zeros_are_one_row() -> None:
    sample = np.array([[0.0, 1.0], [-0.0, 1.0]], np.float32)
    assert len(train_centroids(sample, num_lists=2, seed=0)) == 1


@pytest.mark.parametrize(
    "sample",
    [np.zeros((0, 4), np.float32), np.full((3, 4), np.nan, np.float32), np.full((3, 4), np.inf, np.float32)],
)
def test_an_empty_or_infinite_sample_is_refused(sample: np.ndarray) -> None:
    with pytest.raises(ValueError, match="sample must be finite, with a row at least"):
        train_centroids(sample, num_lists=2, seed=0)


def test_no_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="num_lists must be at least 1, found 0"):
        train_centroids(normal(3, 4), num_lists=0, seed=0)
