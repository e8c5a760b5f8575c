import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.spaces.calibration import Calibration
from pipeline.upgrade.closed import fit_procrustes
from pipeline.upgrade.exam import DEPTH, Exam, Rung
from pipeline.upgrade.ladder import cascade, half_migrated
from pipeline.upgrade.ordering import by_priority, hits_of, smoothed_losses
from pipeline.upgrade.ranking import best_of, ranked
from tests.unit.upgrade.cases import two_encoders

NOBODY = np.full(40, -1)
SAME = Calibration(np.array([0, 1], np.float32), np.array([0, 1], np.float32))


@pytest.fixture(scope="module")
def exam():
    old, new = two_encoders(1540)
    return Exam(old[40:], new[40:], old[:40], new[:40], NOBODY)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 320))
def test_the_best_are_those_of_a_plain_sort_equal_ones_in_their_order(seed, values, k):
    scores = np.random.default_rng(seed).integers(0, values, (3, 300)).astype(np.float32)
    assert (best_of(scores, k) == np.argsort(-scores, axis=1, kind="stable")[:, :k]).all()


def test_no_document_is_the_best_of_none():
    assert best_of(np.zeros((2, 0), np.float32), 5).shape == (2, 0)
    assert ranked(np.zeros((0, 4), np.float32), np.ones((3, 4), np.float32), 2).shape == (0, 2)


def test_of_few_documents_all_but_ones_own_are_found():
    old, new = two_encoders(8)
    found = ranked(new, new, 10, own=np.arange(8))
    assert found.shape == (8, 7)
    assert not (found == np.arange(8)[:, None]).any()
    few = Exam(old, new, old, new, np.arange(8))
    assert (few.overlap(few.wanted) == 1).all()
    assert half_migrated(few, old, np.arange(8) < 3, SAME).shape == (8, 7)


def test_a_document_that_is_the_query_is_not_found(exam):
    own = np.arange(300)
    found = ranked(exam.new[:300], exam.new, 20, own=own)
    assert not (found == own[:, None]).any()
    assert (ranked(exam.new[:300], exam.new, 1)[:, 0] == own).mean() > 0.99


def test_blocks_of_queries_find_what_all_find_together(exam):
    plain = np.argsort(-(exam.new[:600] @ exam.new.T), axis=1, kind="stable")[:, :5]
    assert (ranked(exam.new[:600], exam.new, 5) == plain).mean() > 0.999


def test_what_the_new_model_finds_is_what_it_wants(exam):
    assert (exam.overlap(exam.wanted) == 1).all()
    assert exam.overlap(exam.wanted[:, ::-1]).mean() < 0.2


def test_copies_of_a_wanted_document_are_as_good():
    old, new = two_encoders(540)
    twice = Exam(np.vstack([old[40:]] * 2), np.vstack([new[40:]] * 2), old[:40], new[:40], NOBODY)
    others = (twice.wanted + 500) % 1000
    assert (twice.overlap(others) == 1).all()


def test_judged_queries_are_those_with_a_document_to_find(exam):
    grades = ({3: 2.0}, {}, {4: 0.0}, *({5: 1.0} for _ in range(37)))
    graded = Exam(exam.old, exam.new, exam.old_queries, exam.new_queries, NOBODY, grades)
    assert graded.judged == [0, *range(3, 40)]
    found = np.tile(np.arange(DEPTH), (40, 1))
    figures = graded.figures(Rung("rows in their order", found))
    assert figures.recall_at_100.tolist() == [1.0] * 38
    assert figures.ndcg_at_10[0] == pytest.approx(1 / np.log2(5))


def test_a_cascade_ranks_its_candidates_by_the_new_model(exam):
    bridged = fit_procrustes(exam.new, exam.old).apply(exam.new_queries)
    narrow, wide = cascade(exam, bridged, 10), cascade(exam, bridged, len(exam.old))
    assert (wide.found[:, :10] == exam.wanted[:, :10]).mean() > 0.999
    assert wide.embedded == len(exam.old)
    assert 10 <= narrow.embedded <= 400
    scores = np.einsum("qd,qkd->qk", exam.new_queries, exam.new[narrow.found[:, :10]])
    assert (np.diff(scores, axis=1) <= 1e-6).all()


def test_nothing_migrated_is_the_bridge_and_all_migrated_is_the_new_model(exam):
    bridged = fit_procrustes(exam.new, exam.old).apply(exam.new_queries)
    none, every = np.zeros(len(exam.old), bool), np.ones(len(exam.old), bool)
    assert (half_migrated(exam, bridged, none, SAME) == exam.find(bridged, exam.old)).mean() > 0.999
    assert (half_migrated(exam, bridged, every, SAME) == exam.wanted).mean() > 0.999


def test_leaves_come_in_the_order_of_hits_and_losses_for_each_document():
    hits, sizes = np.array([2.0, 4.0, 6.0]), np.array([2, 4, 2])
    even, one_is_worse = np.ones(3), np.array([1.0, 5.0, 1.0])
    assert by_priority(hits, even, sizes).tolist() == [2, 0, 1]
    assert by_priority(hits, one_is_worse, sizes).tolist() == [1, 2, 0]


def test_the_weight_of_a_query_falls_on_the_documents_that_it_looks_at(exam):
    hits = hits_of(exam.old_queries[:2], np.array([1.0, 10.0]), exam.old)
    looks = [set(exam.find(exam.old_queries[i : i + 1], exam.old, 50)[0].tolist()) for i in range(2)]
    expected = [1.0 * (row in looks[0]) + 10.0 * (row in looks[1]) for row in range(len(exam.old))]
    assert hits.tolist() == expected


def test_where_nobody_looked_losses_decide():
    sizes, losses = np.array([1, 2, 3]), np.array([0.1, 0.3, 0.2])
    assert by_priority(np.zeros(3), losses, sizes).tolist() == [1, 2, 0]
    assert by_priority(np.array([1.0, 0, 0]), losses, sizes).tolist() == [0, 1, 2]


def test_a_leaf_of_few_judged_texts_is_reckoned_to_lose_about_the_mean():
    losses = smoothed_losses(np.array([10.0, 90.0, 0.0, 0.9]), np.array([100, 100, 0, 1]))
    assert losses[1] > losses[3] > losses[2] > losses[0]
    assert losses[2] == pytest.approx(100.9 / 201)
