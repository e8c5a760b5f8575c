import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clustering import order_depth_first


def step_lengths(heads: np.ndarray) -> np.ndarray:
    return np.square(np.diff(heads, axis=0)).sum(axis=1)


@given(k=st.integers(0, 70), d=st.integers(1, 6), distinct=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_the_order_is_a_permutation(k: int, d: int, distinct: int, seed: int) -> None:
    heads = np.random.default_rng(seed).standard_normal((distinct, d)).astype(np.float32)
    order = order_depth_first(heads[np.arange(k) % distinct])
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(k))


def test_points_on_a_line_come_in_their_order() -> None:
    place = np.random.default_rng(0).permutation(64)
    heads = place[:, None] * np.array([[1.0, 2.0, -1.0]], np.float32)
    order = place[order_depth_first(heads.astype(np.float32))]
    assert order.tolist() in (list(range(64)), list(range(63, -1, -1)))


def test_lists_of_one_cluster_lie_together() -> None:
    rng = np.random.default_rng(1)
    cluster = rng.permutation(np.repeat(np.arange(8), 16))
    heads = (20 * np.eye(8, 12)[cluster] + rng.standard_normal((128, 12))).astype(np.float32)
    # 112 runs in random order.
    runs = 1 + np.count_nonzero(np.diff(cluster[order_depth_first(heads)]))
    assert runs <= 20


def test_steps_are_shorter_than_in_random_order() -> None:
    heads = np.random.default_rng(2).standard_normal((500, 4)).astype(np.float32)
    assert step_lengths(heads[order_depth_first(heads)]).mean() < 0.4 * step_lengths(heads).mean()


def test_the_order_is_the_same_each_time() -> None:
    heads = np.random.default_rng(3).standard_normal((300, 32)).astype(np.float32)
    assert np.array_equal(order_depth_first(heads), order_depth_first(heads.copy()))
