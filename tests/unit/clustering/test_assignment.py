import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from pipeline.clustering import HeadTree, assign, near_heads, nearest
from pipeline.clustering.assignment import SEARCHED_BRANCHES


def unit(n: int, d: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@given(n=st.integers(0, 40), k=st.integers(1, 20), d=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_the_nearest_head_is_found(n: int, k: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, heads = rng.standard_normal((n, d)).astype(np.float32), rng.standard_normal((k, d)).astype(np.float32)
    list_no, distance = assign(x, heads)
    exact = ((x[:, None].astype(np.float64) - heads) ** 2).sum(axis=2)
    assert (list_no.dtype, distance.dtype) == (np.int32, np.float32)
    assert list_no.shape == distance.shape == (n,)
    np.testing.assert_allclose(distance, exact.min(axis=1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(exact[np.arange(n), list_no], exact.min(axis=1), rtol=1e-5, atol=1e-7)


def test_ties_go_to_the_lowest_number() -> None:
    heads = unit(7, 24, 0)[[3, 1, 2, 1, 3, 3]]
    assert assign(unit(7, 24, 0)[[1, 3]], heads)[0].tolist() == [1, 0]


def test_a_result_depends_on_its_row_alone() -> None:
    x, heads = unit(700, 96, 1), unit(300, 96, 2)
    list_no, distance = assign(x, heads)
    for start, stop in ((0, 1), (5, 8), (13, 30), (100, 333), (699, 700)):
        alone = assign(x[start:stop], heads)
        assert np.array_equal(alone[0], list_no[start:stop])
        assert np.array_equal(alone[1], distance[start:stop])


@pytest.mark.parametrize("block_rows", [1, 7, 512])
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_and_threads_change_nothing(block_rows: int, threads: int) -> None:
    x, heads = unit(600, 96, 3), unit(200, 96, 4)
    with threadpool_limits(threads):
        found = assign(x, heads, block_rows=block_rows)
    for one, other in zip(found, assign(x, heads), strict=True):
        assert np.array_equal(one, other)


def test_near_ties_are_decided_alike_however_rows_are_grouped() -> None:
    """Heads a few float32 steps apart, where a matrix product's bits pick by chance."""
    head = unit(1, 64, 5)
    heads = head + np.random.default_rng(6).uniform(-1, 1, (200, 64)).astype(np.float32) * np.float32(1e-7)
    x = unit(50, 64, 7)
    together = assign(x, heads)[0]
    assert [int(assign(row[None], heads)[0][0]) for row in x] == together.tolist()


def test_large_distant_values_stay_right() -> None:
    heads = np.arange(5, dtype=np.float32)[:, None] + np.full((5, 16), 10_000, np.float32)
    assert assign(heads[::-1] + np.float32(0.25), heads)[0].tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("vectors", "heads", "message"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), "expected"),
        (np.zeros((2, 3), np.float32), np.zeros((0, 3), np.float32), "expected"),
        (np.full((2, 3), np.nan, np.float32), np.zeros((2, 3), np.float32), "finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(vectors: np.ndarray, heads: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign(vectors, heads)


def tree_of(num_branches: int, d: int, seed: int) -> HeadTree:
    rng = np.random.default_rng(seed)
    branches = unit(num_branches, d, seed)
    sizes = rng.integers(1, 12, num_branches)
    heads = np.repeat(branches, sizes, axis=0)
    heads = heads + np.float32(0.3) * rng.standard_normal(heads.shape).astype(np.float32)
    return HeadTree.of(heads.astype(np.float32), branches, np.concatenate([[0], np.cumsum(sizes)]))


def plainly(x: np.ndarray, tree: HeadTree, count: int) -> list[list[int]]:
    """The same in a few lines of float64."""
    found = []
    for row in x.astype(np.float64):
        near = np.argsort(np.square(row - tree.branches).sum(axis=1), kind="stable")[:SEARCHED_BRANCHES]
        heads = np.concatenate([np.arange(tree.starts[b], tree.starts[b + 1]) for b in sorted(near)])
        order = np.argsort(np.square(row - tree.heads[heads]).sum(axis=1), kind="stable")[:count]
        found.append([*heads[order].tolist(), *[-1] * (count - len(order))])
    return found


@given(n=st.integers(0, 60), k=st.integers(1, 30), count=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_in_two_levels_the_nearest_heads_of_the_nearest_branches_are_found(
    n: int, k: int, count: int, seed: int
) -> None:
    tree, x = tree_of(k, 24, seed), unit(n, 24, seed + 1)
    found = near_heads(x, tree, count, block_rows=16)
    wanted = np.array(plainly(x, tree, count), np.int64).reshape(n, count)
    assert np.array_equal(found.list_no < 0, wanted < 0)
    assert all(len({*own} - {-1}) == sum(no >= 0 for no in own) for own in found.list_no.tolist())
    # Of two heads that are as near but for rounding either may be found.
    for heads in (found.list_no, wanted):
        exact = np.square(x[:, None].astype(np.float64) - tree.heads[heads]).sum(axis=2)
        np.testing.assert_allclose(found.distance, np.where(heads < 0, np.inf, exact), rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_in_two_levels_a_result_depends_on_its_row_alone(threads: int) -> None:
    tree, x = tree_of(40, 96, 8), unit(700, 96, 9)
    together = near_heads(x, tree, 12)
    with threadpool_limits(threads):
        for start, stop in ((0, 1), (5, 8), (13, 30), (100, 333), (699, 700)):
            alone = near_heads(x[start:stop], tree, 12, block_rows=50)
            assert np.array_equal(alone.list_no, together.list_no[start:stop])
            assert np.array_equal(alone.distance, together.distance[start:stop])


@given(count=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), steps=st.sampled_from([0.0, 1e-7, 0.5]))
def test_the_nearest_few_are_the_same_however_rows_are_grouped(count: int, seed: int, steps: float) -> None:
    """Centroids that are equal, a few float32 steps apart, or far from each other."""
    rng = np.random.default_rng(seed)
    centroids = unit(1, 32, seed) + np.float32(steps) * rng.uniform(-1, 1, (12, 32)).astype(np.float32)
    x = unit(20, 32, seed + 1)
    together = nearest(x, centroids, count)
    assert together.shape == (20, count)
    assert (np.diff(together, axis=1) > 0).all()
    assert np.array_equal(np.concatenate([nearest(row[None], centroids, count) for row in x]), together)
    exact = np.sort(np.square(x[:, None].astype(np.float64) - centroids).sum(axis=2), axis=1)[:, :count]
    found = np.square(x[:, None].astype(np.float64) - centroids[together]).sum(axis=2)
    np.testing.assert_allclose(np.sort(found, axis=1), exact, rtol=1e-5, atol=1e-6)
