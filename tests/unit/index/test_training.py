import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.clustering import HeadTree, Prices
from pipeline.config import SizedLayout
from pipeline.index.training import (
    GrownTree,
    _shared_out,
    after_round,
    branch_count,
    grown_rows,
    real_heads,
    sample_rows,
    sort_into_lists,
    train_branch,
    train_trunk,
)

DIMS = 32


def unit(n, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, DIMS)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@given(total=st.integers(1, 500), sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any))
def test_lists_are_shared_out_in_proportion_and_every_branch_has_one(total, sizes):
    parts = _shared_out(total, np.array(sizes))
    assert parts.min() >= 1
    assert abs(int(parts.sum()) - max(total, len(sizes))) <= len(sizes)
    exact = total * np.array(sizes) / max(sum(sizes), 1)
    assert (parts > exact - 1).all()
    assert (parts < exact + 2).all()


def test_the_capped_sample_bounds_the_first_level_and_not_the_second():
    layout = SizedLayout(max_train_rows=10_000, train_rows_per_list=50, rows_per_list=100, max_replicas=2)
    assert sample_rows(10_000_000, layout) == 10_000
    assert grown_rows(10_000_000, layout) == 312 * 10_000
    assert sample_rows(3_000, layout) == 3_000
    assert branch_count(100_000, 10_000) == 312
    assert branch_count(100_000, 1_000) == 31
    assert branch_count(1, 10_000) == 1


def test_a_trunk_has_neighbouring_branches_in_groups_and_every_list_in_a_branch():
    layout = SizedLayout(rows_per_list=20, train_rows_per_list=20, max_replicas=2)
    trunk = train_trunk(
        unit(2000), np.zeros(2000, int), num_partitions=1, num_vectors=100_000, layout=layout, seed=3
    )
    assert len(trunk.branches) == len(trunk.lists) == len(trunk.groups) == 62
    assert trunk.lists.sum() == 5000
    assert (np.diff(trunk.groups) >= 0).all()
    assert trunk.groups[0] == 0
    assert trunk.groups[-1] > 1


@pytest.mark.parametrize("rows", [0, 1, 500])
def test_a_branch_grows_as_many_heads_as_its_sample_allows(rows):
    sample, centroid = unit(rows), unit(1, seed=5)[0]
    heads = train_branch(sample, centroid, num_lists=20, seed=1)
    assert len(heads) == {0: 1, 1: 1, 500: 20}[rows]
    if not rows:
        assert np.array_equal(heads[0], centroid)


def grown(sample, branches=4, lists=10):
    parts = np.array_split(sample, branches)
    heads = np.concatenate([train_branch(part, part[0], num_lists=lists, seed=1) for part in parts])
    starts = np.arange(branches + 1) * lists
    centroids = np.stack([part.mean(axis=0) for part in parts]).astype(np.float32)
    return GrownTree(
        HeadTree.of(heads, centroids, starts), Prices.none(len(heads)), np.zeros(branches, np.int32)
    )


def test_rounds_bring_the_heads_nearer_to_the_sample_and_the_lists_to_one_size():
    rng = np.random.default_rng(1)
    heaps = 0.7 * rng.standard_normal((8, DIMS))
    sample = heaps[rng.choice(8, 4000, p=[0.4, 0.3, *[0.05] * 6])] + rng.standard_normal((4000, DIMS))
    sample = sample.astype(np.float32)
    tree, spread, apart = grown(sample), [], []
    for _ in range(8):
        members = sort_into_lists(sample, np.zeros(len(sample), int), tree).over(0, 40)
        assert members.rows.sum() == len(sample)
        spread.append(members.rows.std() / members.rows.mean())
        means = members.total / np.maximum(members.rows, 1)[:, None]
        apart.append((np.square(sample).sum()) - (members.rows * np.square(means).sum(axis=1)).sum())
        tree = after_round(tree, members, mean_rows=len(sample) / len(members.rows))
    assert spread[-1] < 0.8 * spread[0]
    assert apart[-1] < apart[0]


def test_a_real_head_is_the_vector_of_the_sample_nearest_to_it():
    sample, heads = unit(300), unit(12, seed=3) * np.float32(0.7)
    nearest = np.square(sample[None] - heads[:, None]).sum(axis=2).argmin(axis=1)
    assert np.array_equal(real_heads(sample, heads), sample[nearest])
    assert np.array_equal(real_heads(sample[:0], heads), heads)
