import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.postings import list_count, segments_of_lists


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
