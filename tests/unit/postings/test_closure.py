import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clustering import HeadTree, near_heads
from pipeline.postings.closure import replicas_of


def unit(n, d, seed):
    x = np.random.default_rng(seed).standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def near(x, heads, count):
    return near_heads(x, HeadTree.of(heads, heads[:1], np.array([0, len(heads)])), count)


def plainly(x, primary, heads, candidates, most, factor):
    """SPANN's rule for one vector at a time."""
    found = []
    for row, own in zip(x.astype(np.float64), primary.tolist(), strict=True):
        apart = np.square(row - heads).sum(axis=1)
        taken = [own]
        for list_no in np.argsort(apart, kind="stable")[:candidates].tolist():
            between = np.square(heads[list_no].astype(np.float64) - heads[taken]).sum(axis=1)
            if list_no != own and len(taken) < most and (factor * between >= apart[list_no]).all():
                taken.append(list_no)
        found.append(taken[1:] + [-1] * (most - len(taken)))
    return found


@given(
    n=st.integers(0, 40), lists=st.integers(1, 30), most=st.integers(1, 6), factor=st.sampled_from([0.5, 1, 2, 5]),
    candidates=st.integers(1, 12), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_replicas_follow_the_rule(n, lists, most, factor, candidates, seed):
    x, heads = unit(n, 12, seed), 0.8 * unit(lists, 12, seed + 1)
    primary = np.random.default_rng(seed).integers(0, lists, n).astype(np.int32)
    found = replicas_of(near(x, heads, candidates), primary, heads, max_replicas=most, rng_factor=factor)
    assert found.list_no.tolist() == plainly(x, primary, heads, candidates, most, factor)


@given(most=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_no_vector_is_twice_in_a_list(most, seed):
    x, heads = unit(60, 12, seed), 0.7 * unit(40, 12, seed + 1)
    candidates = near(x, heads, 16)
    primary = candidates.list_no[:, 1].copy()
    found = replicas_of(candidates, primary, heads, max_replicas=most, rng_factor=3.0)
    assert found.list_no.shape == found.distance.shape == (60, most - 1)
    for own, others, apart in zip(primary.tolist(), found.list_no.tolist(), found.distance, strict=True):
        lists = [own, *(list_no for list_no in others if list_no >= 0)]
        assert len(set(lists)) == len(lists)
        assert (np.diff(apart[np.isfinite(apart)]) >= 0).all()
        assert np.isfinite(apart).sum() == len(lists) - 1


@pytest.mark.parametrize(("factor", "copies"), [(0.0, 0), (np.inf, 3)])
def test_the_factor_goes_from_no_copy_to_as_many_as_are_allowed(factor, copies):
    x, heads = unit(30, 12, 1), 0.7 * unit(20, 12, 2)
    candidates = near(x, heads, 10)
    found = replicas_of(candidates, candidates.list_no[:, 0], heads, max_replicas=4, rng_factor=factor)
    assert ((found.list_no >= 0).sum(axis=1) == copies).all()


def test_what_a_vector_gets_does_not_depend_on_its_company():
    x, heads = unit(200, 24, 3), 0.8 * unit(50, 24, 4)
    candidates = near(x, heads, 16)
    together = replicas_of(candidates, candidates.list_no[:, 0], heads, max_replicas=4)
    for start, stop in ((0, 1), (7, 40), (199, 200)):
        mine = near(x[start:stop], heads, 16)
        alone = replicas_of(mine, mine.list_no[:, 0], heads, max_replicas=4)
        assert np.array_equal(alone.list_no, together.list_no[start:stop])
        assert np.array_equal(alone.distance, together.distance[start:stop])
