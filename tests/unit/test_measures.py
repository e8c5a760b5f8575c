import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.measures import (
    mean,
    ndcg_at_k,
    overlap_at_k,
    paired_interval,
    percentile,
    recall_at_k,
    share_interval,
)

RANKINGS = st.lists(st.sampled_from([f"d{i}" for i in range(12)]), unique=True, max_size=12)


def test_ndcg_of_the_ideal_order_is_one():
    assert ndcg_at_k(["a", "b", "c"], {"a": 3, "b": 2, "c": 1}, 10) == pytest.approx(1.0)


def test_ndcg_discounts_by_the_logarithm_of_the_rank():
    assert ndcg_at_k(["x", "a"], {"a": 1.0}, 10) == pytest.approx(1 / math.log2(3))


def test_ndcg_ignores_ranks_below_k():
    assert ndcg_at_k(["x", "a"], {"a": 1.0}, 1) == 0


def test_ndcg_without_a_relevant_document_is_refused():
    with pytest.raises(ValueError, match="at least one relevant"):
        ndcg_at_k(["a"], {"a": 0.0}, 10)


@given(
    RANKINGS, st.dictionaries(st.sampled_from([f"d{i}" for i in range(12)]), st.integers(1, 3), min_size=1)
)
def test_ndcg_lies_between_zero_and_one(ranking, grades):
    assert 0 <= ndcg_at_k(ranking, grades, 10) <= 1 + 1e-12


def _least(ranking):
    return dict.fromkeys(ranking, 0.0)


def _scored(ranking):
    return {doc: 1 - 0.01 * place for place, doc in enumerate(ranking)}


def test_recall_counts_relevant_documents_only():
    assert recall_at_k(["a", "b", "x"], {"a": 1, "c": 2, "x": 0}, 3) == 0.5


@given(RANKINGS)
def test_overlap_of_a_ranking_with_itself_is_one(ranking):
    assert overlap_at_k(_scored(ranking), _scored(ranking), 10) == 1


def test_overlap_with_a_short_exact_list_can_still_be_one():
    assert overlap_at_k(_scored("abc"), {"b": 0.99}, 10) == 1


def test_any_of_the_documents_that_tie_for_the_last_place_will_do():
    exact = {"a": 0.9, "b": 0.5, "c": 0.5 + 1e-7, "d": 0.5 - 1e-7, "e": 0.4}
    assert overlap_at_k({"a": 0.9, "d": 0.5}, exact, 2) == 1
    assert overlap_at_k({"d": 0.5, "c": 0.5}, exact, 2) == 1
    assert overlap_at_k({"a": 0.9, "e": 0.4}, exact, 2) == 0.5


def test_a_score_decides_only_where_the_ties_go_on_beyond_the_exact_ranking():
    unknown = {"x": 0.4999, "y": 0.49}
    assert overlap_at_k(unknown, {"a": 0.5, "b": 0.5}, 2) == 0.5
    assert overlap_at_k(unknown, {"a": 0.5, "b": 0.5, "c": 0.4}, 2) == 0
    assert overlap_at_k(dict.fromkeys("xy", -math.inf), {"a": 0.5, "b": 0.5}, 2) == 0


@given(RANKINGS, RANKINGS)
def test_without_ties_overlap_is_the_share_of_common_documents(found, exact):
    common = len({*found[:5]} & {*exact[:5]})
    assert overlap_at_k(_least(found), {**_scored(exact), "end": 0.1}, 5) == (common / min(5, len(exact) + 1))


def test_percentile_is_the_nearest_rank():
    assert [percentile([4.0, 1.0, 3.0, 2.0], f) for f in (0.0, 0.5, 0.75, 1.0)] == [1, 2, 3, 4]


@pytest.mark.parametrize("call", [lambda: mean([]), lambda: percentile([], 0.5)])
def test_statistics_of_nothing_are_refused(call):
    with pytest.raises(ValueError, match="no values"):
        call()


def test_a_paired_interval_holds_the_difference_and_is_narrow_where_all_queries_agree():
    base = np.random.default_rng(0).random(400)
    found = paired_interval(base + 0.1, base, np.random.default_rng(1))
    assert found == pytest.approx((0.1, 0.1, 0.1))
    noisy = paired_interval(np.random.default_rng(2).random(400), base, np.random.default_rng(1))
    assert noisy.low < 0 < noisy.high
    assert noisy.low < noisy.value < noisy.high


def test_intervals_of_noise_hold_zero_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = [
        found.low <= 0 <= found.high
        for found in (paired_interval(rng.random(60), rng.random(60), rng) for _ in range(300))
    ]
    assert 0.90 <= np.mean(held) <= 0.99


def test_the_share_of_a_gain_is_that_of_the_means():
    base, whole = np.zeros(50), np.linspace(0.5, 1.5, 50)
    found = share_interval(0.25 * whole, base, whole, np.random.default_rng(0))
    assert found == pytest.approx((0.25, 0.25, 0.25))


def test_the_share_of_a_gain_that_may_be_none_is_unbounded():
    rng = np.random.default_rng(0)
    base = rng.random(50)
    whole = base + rng.normal(0.001, 0.2, 50)
    whole += 0.005 - (whole - base).mean()
    assert share_interval(rng.random(50), base, whole, rng)[1:] == (-math.inf, math.inf)


def test_without_a_gain_there_is_no_share_and_without_queries_no_interval():
    one = np.ones(5)
    assert math.isnan(share_interval(one, 0 * one, 0 * one, np.random.default_rng(0)).value)
    with pytest.raises(ValueError, match="no queries"):
        paired_interval(np.zeros(0), np.zeros(0), np.random.default_rng(0))
