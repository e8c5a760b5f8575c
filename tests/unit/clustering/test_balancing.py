import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.clustering import HeadTree, near_heads
from pipeline.clustering.balancing import Membership, Prices, charged_lists, recentred, repriced


def lopsided(seed, n=4000, d=16):
    """Eight heaps that touch; two hold most of the rows."""
    rng = np.random.default_rng(seed)
    heaps = rng.standard_normal((8, d)) * 1.0
    rows = heaps[rng.choice(8, n, p=[0.4, 0.3, *[0.05] * 6])] + rng.standard_normal((n, d))
    return rows.astype(np.float32)


def one_branch(heads):
    return HeadTree.of(heads, heads.mean(axis=0, keepdims=True), np.array([0, len(heads)]))


def rounds(x, heads, count):
    prices, spread = Prices.none(len(heads)), []
    for _ in range(count):
        near = near_heads(x, one_branch(heads), 8)
        members = Membership.of(x, near, charged_lists(near, prices.now)).over(0, len(heads))
        spread.append(members.rows.std() / members.rows.mean())
        heads = recentred(heads, members)
        prices = repriced(prices, members, mean_rows=len(x) / len(heads))
    return heads, prices, spread


@pytest.mark.parametrize("seed", range(3))
def test_rounds_even_the_lists_out(seed):
    x = lopsided(seed)
    heads = x[np.random.default_rng(seed).choice(len(x), 40, replace=False)]
    _, _, spread = rounds(x, heads, 9)
    assert spread[0] > 0.5
    assert max(spread[3:]) <= 0.3


def test_without_prices_the_nearest_head_has_the_vector():
    x = lopsided(1, n=300)
    near = near_heads(x, one_branch(x[:9]), 4)
    assert np.array_equal(charged_lists(near, np.zeros(9, np.float32)), near.list_no[:, 0])


def test_a_dear_list_loses_members_to_the_next_and_never_to_nowhere():
    x = lopsided(2, n=300)
    near = near_heads(x, one_branch(x[:2]), 5)
    assert set(charged_lists(near, np.array([1e6, 0], np.float32)).tolist()) == {1}


@given(parts=st.lists(st.integers(0, 30), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_sums_over_parts_add_up(parts, seed):
    x = lopsided(seed, n=sum(parts))
    tree = one_branch(lopsided(7, n=5))
    near = near_heads(x, tree, 3)
    lists = charged_lists(near, np.zeros(5, np.float32))
    whole = Membership.of(x, near, lists).over(0, 5)
    cuts = np.split(np.arange(len(x)), np.cumsum(parts)[:-1])
    pieces = [
        Membership.of(x[c], type(near)(near.list_no[c], near.distance[c]), lists[c]).over(0, 5) for c in cuts
    ]
    added = functools.reduce(Membership.plus, pieces)
    for one, other in zip(added, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_a_list_without_members_keeps_its_head_and_gets_cheaper():
    heads = np.array([[0, 0], [9, 9]], np.float32)
    x = np.zeros((4, 2), np.float32)
    near = near_heads(x, one_branch(heads), 2)
    members = Membership.of(x, near, charged_lists(near, np.zeros(2, np.float32))).over(0, 2)
    assert recentred(heads, members).tolist() == heads.tolist()
    prices = repriced(Prices.none(2), members, mean_rows=2)
    assert prices.now[1] < prices.base[1] < 0 < prices.base[0] < prices.now[0]


def test_one_list_alone_has_no_rival_and_no_price():
    x = lopsided(3, n=20)
    near = near_heads(x, one_branch(x[:1]), 3)
    members = Membership.of(x, near, charged_lists(near, np.zeros(1, np.float32))).over(0, 1)
    assert repriced(Prices.none(1), members, mean_rows=20).now.tolist() == [0.0]
