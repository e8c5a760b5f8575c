import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.postings.capping import MOST, MOST_ENTRIES, kept_entries, longest_list, split_rows


@given(
    n=st.integers(1, 300), distinct=st.integers(1, 300), mean_rows=st.integers(1, 40), seed=st.integers(0, 2**31 - 1)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_part_is_too_long_and_every_row_is_in_one(n, distinct, mean_rows, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((distinct, 6)).astype(np.float32)[rng.integers(0, distinct, n)]
    part, heads = split_rows(vectors, mean_rows=mean_rows, seed=1)
    sizes = np.bincount(part, minlength=len(heads))
    assert len(sizes) == len(heads)
    assert sizes.min() >= 1
    assert sizes.max() <= MOST * mean_rows
    assert sizes.max() - sizes.min() <= 2
    for number, head in enumerate(heads):
        np.testing.assert_allclose(head, vectors[part == number].mean(axis=0), atol=1e-5)


def test_what_is_short_enough_stays_whole():
    vectors = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    assert split_rows(vectors, mean_rows=10, seed=0).part.tolist() == [0] * 20


def test_copies_of_one_row_are_cut_evenly():
    part, heads = split_rows(np.ones((100, 3), np.float32), mean_rows=20, seed=0)
    assert np.bincount(part).tolist() == [20] * 5
    assert (heads == 1).all()


@given(st.data())
def test_over_the_cap_the_farthest_replicas_go_first_and_no_primary(data):
    n = data.draw(st.integers(0, 60))
    list_no = np.array(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), np.int32)
    replica_no = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.int8)
    distance = np.array(data.draw(st.lists(st.floats(0, 2, width=32), min_size=n, max_size=n)), np.float32)
    most = data.draw(st.integers(0, 20))
    kept = kept_entries(list_no, replica_no, distance, most=most)
    assert kept[replica_no == 0].all()
    for number in set(list_no.tolist()):
        here = list_no == number
        primaries = int((here & (replica_no == 0)).sum())
        assert (kept & here).sum() == min(here.sum(), max(most, primaries))
        gone, stay = distance[here & ~kept], distance[here & kept & (replica_no > 0)]
        assert not len(gone) or not len(stay) or gone.min() >= stay.max()


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 400)), min_size=1, max_size=60), st.integers(1, 40)
)
def test_no_list_is_longer_than_the_lists_that_are_left_allow(sizes, least):
    primaries = np.array([own for own, _ in sizes])
    entries = primaries + np.array([copies for _, copies in sizes])
    most = longest_list(entries, primaries, least=least)
    left = np.minimum(entries, np.maximum(most, primaries))
    assert most == int(MOST_ENTRIES * max(left.mean(), least))


def test_a_few_lists_with_most_copies_do_not_allow_each_other_more():
    primaries = np.full(100, 100)
    entries = primaries + np.where(np.arange(100) < 3, 5000, 3)
    assert longest_list(entries, primaries, least=100) < 150
