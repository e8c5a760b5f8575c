from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import MOST_ROWS_PER_LIST
from pipeline.index.sizing import longest_lists, propose_sizing, server_bytes

rows_of, dims_of = st.integers(1, 10**9), st.sampled_from([8, 384, 1536])
storage_of = st.sampled_from(["ssd", "object_store"])


@given(rows=rows_of, dims=dims_of, storage=storage_of, memory=st.integers(1, 10**10))
def test_a_proposal_fits_in_memory_unless_the_longest_lists_do_not(rows, dims, storage, memory):
    found = propose_sizing(rows, dims, storage=storage, memory_bytes=memory)
    assert found.rows_per_list <= longest_lists(dims) <= MOST_ROWS_PER_LIST
    assert found.server_bytes >= server_bytes(found.lists, dims)
    assert found.server_bytes <= memory or found.rows_per_list == longest_lists(dims)


@given(rows=rows_of, dims=dims_of, storage=storage_of, memory=st.integers(1, 10**10))
def test_lists_are_no_longer_than_the_memory_asks(rows, dims, storage, memory):
    free = propose_sizing(rows, dims, storage=storage)
    found = propose_sizing(rows, dims, storage=storage, memory_bytes=memory)
    assert found == free or free.server_bytes > memory


@given(rows=rows_of, size=st.integers(1, MOST_ROWS_PER_LIST), copies=st.integers(1, 8))
def test_sizes_that_are_given_stay(rows, size, copies):
    found = propose_sizing(rows, 384, storage="ssd", memory_bytes=1, rows_per_list=size, max_replicas=copies)
    assert (found.rows_per_list, found.max_replicas) == (size, copies)
