import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import SearchDefaults, SearchPoint
from pipeline.config import GatesConfig
from pipeline.evaluation.judging import (
    check_gates,
    curve_points,
    judge_against_exact,
    judge_against_qrels,
)


def _fails(gates, measured=None, removed=0, before=0):
    results = check_gates(GatesConfig(**gates), measured or {}, removed=removed, documents_before=before)
    return [result.problem for result in results if not result.passed]


def test_recall_is_averaged_over_the_queries_with_exact_neighbours():
    found = {"a": {"1": 0.9, "2": 0.8}, "b": {"3": 0.6}, "c": {"9": 0.5}}
    assert judge_against_exact(found, {"a": {"1": 0.9, "2": 0.8}, "b": {"4": 0.7}}) == {"recall_at_10": 0.5}


def test_judgments_of_absent_queries_do_not_count():
    qrels = {"a": {"1": 1.0}, "absent": {"1": 1.0}}
    numbers = judge_against_qrels({"a": {"1": 0.9}}, {"a": {"1": 0.9}}, {"a": {"2": 0.9}}, qrels)
    assert numbers["judged_queries"] == 1
    assert (numbers["ndcg_at_10"], numbers["exact_ndcg_at_10"]) == (1, 0)


def test_without_gates_nothing_fails():
    assert _fails({}, {"recall_at_10": 0.0}) == []


@pytest.mark.parametrize(("value", "failures"), [(0.95, 0), (0.9499, 1)])
def test_recall_at_the_threshold_passes(value, failures):
    assert len(_fails({"min_recall_at_10": 0.95}, {"recall_at_10": value})) == failures


def test_a_failure_names_the_number_and_the_threshold():
    (failure,) = _fails({"min_ndcg_at_10": 0.5}, {"ndcg_at_10": 0.4321})
    assert failure == "ndcg_at_10 is 0.4321, must be at least 0.5000"


def test_the_loss_is_reckoned_from_exact_search():
    measured = {"ndcg_at_10": 0.49, "exact_ndcg_at_10": 0.51}
    assert len(_fails({"max_ndcg_loss": 0.01}, measured)) == 1
    assert _fails({"max_ndcg_loss": 0.03}, measured) == []


def test_a_gate_on_something_not_measured_fails_instead_of_passing():
    (failure,) = _fails({"min_ndcg_at_10": 0.5}, {"recall_at_10": 1.0})
    assert "was not measured" in failure


def test_removed_documents_are_a_share_of_those_before():
    assert len(_fails({"max_removed_fraction": 0.1}, removed=11, before=100)) == 1
    assert _fails({"max_removed_fraction": 0.1}, removed=10, before=100) == []
    assert _fails({"max_removed_fraction": 0.1}, removed=0, before=0) == []


def test_every_configured_gate_is_reported_passed_or_not():
    gates = GatesConfig(min_recall_at_10=0.9, max_ndcg_loss=0.01, max_removed_fraction=0.5)
    measured = {"recall_at_10": 0.95, "ndcg_at_10": 0.4, "exact_ndcg_at_10": 0.5}
    results = check_gates(gates, measured, removed=1, documents_before=4)
    assert [(r.gate, r.threshold, round(r.measured, 4), r.passed) for r in results] == [
        ("min_recall_at_10", 0.9, 0.95, True),
        ("max_ndcg_loss", 0.01, 0.1, False),
        ("max_removed_fraction", 0.5, 0.25, True),
    ]
    assert [bool(r.problem) for r in results] == [False, True, False]


def _point(recall, size):
    return SearchPoint(lists=1 + size, margin=0.1, rerank=10, tuning_recall=recall, bytes=size)


@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=30, unique=True), st.data())
def test_a_curve_has_the_default_between_settings_that_find_less_and_more(recalls, data):
    frontier = [_point(recall, size) for size, recall in enumerate(sorted(recalls))]
    default = data.draw(st.sampled_from(frontier))
    points = curve_points(SearchDefaults(**default.model_dump(), curve=tuple(frontier)))
    assert default in points
    assert len(points) <= 9
    sizes = [point.bytes for point in points]
    assert sizes == sorted(set(sizes))


def test_without_a_tuning_curve_the_default_alone_is_measured():
    default = SearchDefaults(lists=3, margin=0.2, rerank=100)
    assert [point.lists for point in curve_points(default)] == [3]
