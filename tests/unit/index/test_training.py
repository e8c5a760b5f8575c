import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.clustering import assign
from pipeline.config import LayoutConfig
from pipeline.index.training import (
    _shared_out,
    branch_count,
    grown_rows,
    sample_rows,
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
    layout = LayoutConfig(max_train_rows=10_000, train_rows_per_list=50, rows_per_list=100)
    assert sample_rows(10_000_000, layout) == 10_000
    assert grown_rows(10_000_000, layout) == 312 * 10_000
    assert sample_rows(3_000, layout) == 3_000
    assert branch_count(100_000, 10_000) == 312
    assert branch_count(100_000, 1_000) == 31
    assert branch_count(1, 10_000) == 1


def test_a_trunk_has_neighbouring_branches_in_groups_and_every_list_in_a_branch():
    layout = LayoutConfig(rows_per_list=20, train_rows_per_list=20)
    trunk = train_trunk(unit(2000), num_vectors=100_000, layout=layout, seed=3)
    assert len(trunk.branches) == len(trunk.lists) == len(trunk.groups) == 62
    assert trunk.lists.sum() == 5000
    assert (np.diff(trunk.groups) >= 0).all()
    assert trunk.groups[0] == 0
    assert trunk.groups[-1] > 1


@pytest.mark.parametrize("rows", [0, 1, 500])
def test_a_branch_grows_as_many_heads_as_its_sample_allows(rows):
    sample, centroid = unit(rows), unit(1, seed=5)[0]
    heads, sizes = train_branch(sample, centroid, num_lists=20, seed=1)
    assert len(heads) == len(sizes) == {0: 1, 1: 1, 500: 20}[rows]
    assert sizes.sum() == rows
    if rows:
        assert np.array_equal(np.bincount(assign(sample, heads)[0], minlength=len(heads)), sizes)
    else:
        assert np.array_equal(heads[0], centroid)
