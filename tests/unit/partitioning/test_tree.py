"""A tree tells every row its partition, and what it says of partitions holds of their rows."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import LayoutConfig
from pipeline.filters import Region, evaluate, parse_filter
from pipeline.partitioning import (
    PartitionTree,
    TreeLimits,
    grow_tree,
    growing,
    limits_for,
    read_partition_tree,
    summarize,
    write_partition_tree,
)
from pipeline.storage import LocalStore
from tests.unit.filters.test_parity import ATTRIBUTES, TABLE, conditions

SCHEMA = pa.schema([("kind", pa.string()), ("n", pa.int64())])


def limits(rows, **more):
    return TreeLimits(**{"rows": rows, "min_rows": 1, "max_partitions": 12, "open_rows": 0} | more)


def grown(filters, table=TABLE, **more):
    workload = summarize([(text, 1.0) for text in filters], table.schema)
    return grow_tree(table, workload, limits(table.num_rows, **more))


some = settings(max_examples=60, deadline=None, derandomize=True)


@some
@given(filters=st.lists(conditions, min_size=1, max_size=6), others=st.lists(conditions, max_size=3))
def test_no_match_is_lost_by_looking_only_into_the_partitions_that_can_have_one(filters, others):
    tree = grown(filters)
    of_row = tree.assign(TABLE)
    for text in (*filters, *others):
        one = parse_filter(text, ATTRIBUTES)
        reached = {no for no, region in enumerate(tree.regions) if region.may_hold(one.predicate)}
        assert set(of_row[evaluate(one, TABLE)].tolist()) <= reached


@some
@given(filters=st.lists(conditions, min_size=1, max_size=6))
def test_the_readable_path_holds_for_the_rows_of_a_partition_and_no_others(filters):
    tree = grown(filters)
    of_row = tree.assign(TABLE)
    assert len(tree.regions) == tree.num_partitions
    for number in range(tree.num_partitions):
        path = tree.readable_path(number)
        passes = evaluate(parse_filter(path, ATTRIBUTES), TABLE)
        assert np.array_equal(passes, of_row == number), path
        assert len(tree.bits(number)) == len(tree.cuts)
    assert len({tree.bits(number) for number in range(tree.num_partitions)}) == tree.num_partitions


@some
@given(filters=st.lists(conditions, min_size=1, max_size=6))
def test_a_tree_reads_back_as_it_was_written(filters, tmp_path_factory):
    store, tree = LocalStore(str(tmp_path_factory.mktemp("tree"))), grown(filters)
    found = read_partition_tree(store, write_partition_tree(store, tree), ATTRIBUTES)
    assert found.nodes == tree.nodes
    assert np.array_equal(found.assign(TABLE), tree.assign(TABLE))


@some
@given(filters=st.lists(conditions, min_size=1, max_size=4))
def test_what_each_filter_needs_of_each_cut_is_what_the_region_of_the_cut_says(filters):
    workload = summarize([(text, 1.0) for text in filters], ATTRIBUTES)
    cuts = growing._candidates(workload)
    for holds in (True, False):
        found = growing._can_meet(workload.filters, cuts, holds=holds)
        plain = [
            [Region().where(cut, holds=holds).may_hold(one.predicate) for cut in cuts]
            for one in workload.filters
        ]
        assert found.tolist() == plain


def test_filters_on_values_too_rare_for_partitions_of_their_own_share_some():
    rows, least = 3000, 250
    tenants = [f"t{i % 100:02d}" for i in range(rows)]
    asked = [f"kind = '{name}'" for name in sorted(set(tenants))[::2]]
    content = pa.table({"kind": tenants, "n": list(range(rows))}, schema=SCHEMA)
    tree = grown(asked, content, min_rows=least, max_partitions=100)
    sizes = np.bincount(tree.assign(content))
    assert len(sizes) >= 6
    assert sizes.min() >= least
    for name in sorted(set(tenants)):  # others than the past ones, too
        one = parse_filter(f"kind = '{name}'", SCHEMA)
        assert sum(region.may_hold(one.predicate) for region in tree.regions) == 1


def table(n=1000):
    return pa.table({"kind": ["abcd"[i % 4] for i in range(n)], "n": list(range(n))}, schema=SCHEMA)


def test_rows_that_different_filters_want_are_cut_apart():
    tree = grown(["kind = 'a'", "kind = 'b'"], table())
    sizes = np.bincount(tree.assign(table()))
    assert sorted(sizes.tolist()) == [250, 250, 500]


@pytest.mark.parametrize(
    ("more", "partitions"),
    [
        ({}, 3),
        ({"max_partitions": 2}, 2),
        ({"min_rows": 300}, 2),
        ({"min_rows": 600}, 1),
        ({"open_rows": 10**6}, 2),
    ],
)
def test_no_more_partitions_are_made_than_are_allowed_or_pay(more, partitions):
    filters = ["kind = 'a'", "kind = 'b'", "kind IN ('a', 'b')"]
    assert grown(filters, table(), **more).num_partitions == partitions


def test_a_partition_more_must_pay_for_the_queries_without_a_filter():
    def partitions(unfiltered):
        asked = [("kind = 'a'", 1.0), (None, unfiltered)]
        return grow_tree(table(), summarize(asked, SCHEMA), limits(1000, open_rows=100)).num_partitions

    assert [partitions(weight) for weight in (0.0, 5.0, 9.0)] == [2, 2, 1]


def test_a_filter_that_most_rows_pass_cuts_less_than_one_that_few_pass():
    many = pa.table({"kind": ["a"] * 100_000, "n": list(range(100_000))}, schema=SCHEMA)
    tree = grown(["n < 2000", "n < 60000"], many, max_partitions=2)
    assert tree.readable_path(0) == '"n" < 2000'


def test_without_filters_there_is_one_partition_whose_path_is_true():
    tree = grow_tree(table(), summarize([(None, 1.0)], SCHEMA), limits(1000))
    assert tree == PartitionTree()
    assert tree.readable_path(0) == "TRUE"
    assert not tree.assign(table()).any()


@pytest.mark.parametrize(
    ("asked", "slowdown", "most"),
    [([None], 1.3, 2), ([None], 1.34, 3), ([None], 1.0, 1), ([], 1.0, 64), ([None], 20.0, 64)],
)
def test_partitions_are_bounded_by_what_queries_without_a_filter_pay(asked, slowdown, most):
    workload = summarize([(text, 1.0) for text in ["n = 1", *asked]], SCHEMA)
    layout = LayoutConfig(unfiltered_slowdown=slowdown)
    assert limits_for(workload, layout, rows=10**6, storage="ssd").max_partitions == most
