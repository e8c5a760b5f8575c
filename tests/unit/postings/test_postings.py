import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.postings import (
    head_distances,
    list_count,
    probes_for_coverage,
    segments_of_lists,
    select_probes,
)


@given(st.integers(0, 10_000), st.integers(1, 500))
def test_there_is_always_a_list(rows, rows_per_list):
    assert list_count(rows, rows_per_list) >= 1


@given(hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 500)), st.integers(1, 1000))
def test_segments_cut_the_lists_in_order_without_gaps(expected, segment_rows):
    segments = segments_of_lists(expected, segment_rows)
    assert len(segments) == len(expected)
    assert segments[0] == 0
    assert set(np.diff(segments)) <= {0, 1}


def test_segments_hold_about_the_rows_asked_for():
    segments = segments_of_lists(np.full(100, 10.0), 250)
    assert np.bincount(segments).tolist() == [25, 25, 25, 25]


def test_head_distances_are_squared():
    assert head_distances(np.array([[0.0, 3.0]], np.float32), np.array([[4.0, 0.0]], np.float32)).item() == 25


def test_a_list_without_passing_rows_takes_no_probe():
    found = select_probes(np.array([1, 2, 3], np.float32), np.array([0, 5, 5]), probes=1, min_rows=1)
    assert found.tolist() == [1]


def test_probes_go_on_until_enough_rows_pass():
    found = select_probes(np.array([3, 1, 2], np.float32), np.array([9, 1, 1]), probes=1, min_rows=3)
    assert found.tolist() == [1, 2, 0]


@given(st.data())
def test_probed_lists_hold_enough_rows_if_they_exist(data):
    n = data.draw(st.integers(1, 30))
    passing = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    distances = np.array(data.draw(st.lists(st.floats(0, 4, width=32), min_size=n, max_size=n)), np.float32)
    min_rows = data.draw(st.integers(1, 60))
    found = select_probes(distances, passing, probes=data.draw(st.integers(1, 10)), min_rows=min_rows)
    assert len(set(found.tolist())) == len(found)
    assert passing[found].sum() >= min(min_rows, passing.sum())


def test_probes_cover_the_asked_share_of_neighbours():
    ranks = np.array([0, 0, 1, 2, 9])
    assert [probes_for_coverage(ranks, share) for share in (0.4, 0.6, 0.8, 1.0)] == [1, 2, 3, 10]
