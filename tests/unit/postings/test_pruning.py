import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.postings.pruning import (
    MOST_MARGIN,
    WANTED,
    Probing,
    Scanned,
    Setting,
    choose_setting,
    frontier,
    head_distances,
    nearest_heads,
    rules_for,
    select_lists,
    settings_of,
)

ALL = Probing(10**6, MOST_MARGIN)


def test_head_distances_are_squared():
    heads = np.array([[4.0, 0.0]], np.float32)
    assert (
        head_distances(np.array([[0.0, 3.0]], np.float32), heads, np.array([16.0], np.float32)).item() == 25
    )


def test_lists_within_the_margin_of_the_nearest_are_probed_up_to_the_maximum():
    distances = np.array([0.9, 0.5, 0.7, 0.61, 2.0], np.float32)
    assert select_lists(distances, Probing(9, 0.25)).tolist() == [1, 3, 2]
    assert select_lists(distances, Probing(2, 0.25)).tolist() == [1, 3]
    assert select_lists(distances, Probing(9, 0.0)).tolist() == [1]
    assert select_lists(distances, ALL).tolist() == [1, 3, 2, 0, 4]


@given(
    distances=st.lists(st.floats(0, 4, width=32), min_size=1, max_size=40),
    lists=st.integers(1, 50), margin=st.floats(0, 4),
)  # fmt: skip
def test_the_rule_is_what_it_says(distances, lists, margin):
    distances = np.array(distances, np.float32)
    border = distances.min() + np.float32(margin)
    expected = [i for i in np.argsort(distances, kind="stable").tolist() if distances[i] <= border][:lists]
    assert select_lists(distances, Probing(lists, float(np.float32(margin)))).tolist() == expected
    passing = np.ones(len(distances), np.int64)
    assert select_lists(distances, Probing(lists, float(np.float32(margin))), passing).tolist() == expected


def test_a_list_without_passing_rows_takes_no_probe():
    found = select_lists(np.array([1, 2, 3], np.float32), Probing(1, 9), np.array([0, 5, 5]), min_rows=1)
    assert found.tolist() == [1]


def test_probes_go_on_until_enough_rows_pass():
    found = select_lists(np.array([3, 1, 2], np.float32), Probing(1, 0), np.array([9, 1, 1]), min_rows=3)
    assert found.tolist() == [1, 2, 0]


@given(st.data())
def test_probed_lists_hold_enough_rows_if_they_exist(data):
    n = data.draw(st.integers(1, 30))
    passing = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    distances = np.array(data.draw(st.lists(st.floats(0, 4, width=32), min_size=n, max_size=n)), np.float32)
    min_rows = data.draw(st.integers(1, 60))
    rule = Probing(data.draw(st.integers(1, 10)), data.draw(st.floats(0, 4)))
    found = select_lists(distances, rule, passing, min_rows=min_rows)
    assert len(set(found.tolist())) == len(found)
    assert passing[found].sum() >= min(min_rows, passing.sum())


def scanned(seed, lists=12, met=60, wanted=10):
    rng = np.random.default_rng(seed)
    margin = np.concatenate([[0], np.sort(rng.random(lists - 1))]).astype(np.float32)
    places = rng.choice(met, wanted, replace=False)
    places = places[rng.random(wanted) < 0.9]
    seen = rng.integers(0, lists, met).astype(np.int32)
    return Scanned(margin, rng.integers(1, 20, lists), seen, places, wanted)


def plainly(one, rule, depth):
    """Candidates of a search with this rule, best codes first, cut at the depth."""
    probed = [i for i, margin in enumerate(one.margin.tolist()) if margin <= rule.margin][: rule.lists]
    candidates = [place for place, first in enumerate(one.first_seen.tolist()) if first in probed]
    candidates = candidates[: max(depth, WANTED)]
    return sum(place in candidates for place in one.wanted.tolist()) / one.enough, len(probed)


@given(seed=st.integers(0, 999), lists=st.integers(1, 12), margin=st.floats(0, 1), depth=st.integers(1, 80))
def test_a_setting_finds_what_a_search_with_it_would(seed, lists, margin, depth):
    queries, rule = [scanned(seed), scanned(seed + 1), scanned(seed + 2)], Probing(lists, margin)
    *_, setting = settings_of(queries, [ALL, rule, ALL, rule], [depth], entry_bytes=10, vector_bytes=100)
    found = [plainly(one, rule, depth) for one in queries]
    assert setting.recall == pytest.approx(np.mean([share for share, _ in found]))
    assert setting.lists == pytest.approx(np.mean([count for _, count in found]))
    entries = [one.entries[:count].sum() for one, (_, count) in zip(queries, found, strict=True)]
    assert setting.bytes == pytest.approx(10 * np.mean(entries) + 100 * depth)


def test_of_copies_that_are_as_near_any_will_do():
    seen = np.zeros(60, np.int32)
    copies = Scanned(np.zeros(1, np.float32), np.array([60]), seen, np.arange(30, 60), 10)
    settings = settings_of([copies], [ALL], [20, 40, 60], entry_bytes=1, vector_bytes=1)
    assert [one.recall for one in settings] == [0, 1, 1]


def setting(recall, size, error=0.0):
    return Setting(ALL, 10, recall, error, 1.0, size)


def test_the_cheapest_setting_that_reaches_the_target_surely_is_chosen():
    tried = [setting(0.96, 500), setting(0.952, 300, 0.005), setting(0.94, 100), setting(0.99, 900)]
    assert choose_setting(tried, 0.95).bytes == 500
    assert choose_setting(tried, 0.999).recall == 0.99


def test_the_frontier_rises():
    tried = [setting(0.9, 300), setting(0.8, 100), setting(0.85, 400), setting(0.95, 500), setting(0.8, 90)]
    assert [(one.bytes, one.recall) for one in frontier(tried)] == [(90, 0.8), (300, 0.9), (500, 0.95)]


def test_rules_go_from_one_list_to_all_that_were_scanned():
    rules = rules_for([scanned(1), scanned(2)])
    assert min(rule.lists for rule in rules) == 1
    assert Probing(12, MOST_MARGIN) in rules
    assert len(set(rules)) == len(rules)


def test_without_a_true_neighbour_among_those_met_everything_is_probed():
    one = scanned(3)
    lost = Scanned(one.margin, one.entries, one.first_seen, np.zeros(0, np.int64), 5)
    assert rules_for([lost]) == [Probing(12, MOST_MARGIN)]


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5]), min_size=6, max_size=6), min_size=1, max_size=9),
    st.integers(1, 6),
)
def test_of_heads_as_near_the_lower_numbers_are_taken(rows, count):
    distances = np.array(rows, np.float32)
    numbers, apart = nearest_heads(distances, count)
    wanted = np.argsort(distances, axis=1, kind="stable")[:, :count]
    assert np.array_equal(numbers, wanted)
    assert np.array_equal(apart, np.take_along_axis(distances, wanted, axis=1))
