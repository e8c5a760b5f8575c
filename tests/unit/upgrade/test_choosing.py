from dataclasses import replace

import numpy as np
import pytest

from pipeline.binarization import binarize, fit_binarizer
from pipeline.config import BinarizerConfig
from pipeline.spaces.bridges import bridge_tensors
from pipeline.upgrade.choosing import choose, held_out_exam, simplest_of_the_best
from pipeline.upgrade.closed import fit_procrustes
from pipeline.upgrade.exam import Exam, Pairs
from pipeline.upgrade.heads import find_by_codes, stored_codes
from pipeline.upgrade.ladder import FULL, NAIVE, ORACLE, STATUS_QUO, climb, half_migrated
from pipeline.upgrade.tuning import regress_residual, tune_bridge, with_residual
from tests.unit.upgrade.cases import OLD_DIMS, pairs_of, two_encoders


@pytest.fixture(scope="module")
def exam():
    old, new = two_encoders(2000)
    return Exam(old[100:], new[100:], old[:100], new[:100], np.full(100, -1))


@pytest.fixture(scope="module")
def parts(exam):
    return pairs_of(exam.old, exam.new, slice(1000)), pairs_of(exam.old, exam.new, slice(1000, 1600))


@pytest.fixture(scope="module")
def choice(parts):
    return choose(*parts, corpus=1900, seed=3)


@pytest.fixture(scope="module")
def rungs(exam, choice):
    order = np.random.default_rng(1).permutation(len(exam.old))
    return {rung.name: rung for rung in climb(exam, choice, depths=(20, 100), order=order)}


def overlap(exam, queries):
    return exam.overlap(exam.find(queries, exam.old)).mean()


@pytest.mark.parametrize(("train", "gain"), [(tune_bridge, 0.004), (regress_residual, 0.05)])
def test_training_finds_more_than_what_it_starts_from(exam, parts, train, gain):
    fit, _ = parts
    start = with_residual(fit_procrustes(fit.new, fit.old), np.random.default_rng(0), 16)
    worse = replace(
        start,
        matrix=start.matrix + 0.15 * np.random.default_rng(1).standard_normal(start.matrix.shape, np.float32),
    )

    def recall(bridge):
        return overlap(exam, bridge.apply(exam.new_queries))

    best, curve = train(worse, fit.new, fit.old, recall=recall, seed=0)
    assert curve[0].recall == pytest.approx(recall(worse))
    assert recall(best) == pytest.approx(max(look.recall for look in curve))
    assert recall(best) > recall(worse) + gain


def test_the_same_sample_gives_the_same_bridges(parts, choice):
    again = choose(*parts, corpus=1900, seed=3)
    for name, bridge in choice.bridges.items():
        for key, tensor in bridge_tensors(bridge).items():
            assert (bridge_tensors(again.bridges[name])[key] == tensor).all(), (name, key)
    assert again.recall == choice.recall


def test_held_out_queries_search_seen_texts_as_often_as_the_index_holds_them(parts):
    fit, held_out = parts
    exam = held_out_exam(fit, held_out, 4000)
    assert len(exam.old) == 600 + 200
    assert (exam.old[600:] == fit.old[:200]).all()
    assert exam.own.tolist() == list(range(300))
    assert len(held_out_exam(fit, held_out, 1600).old) == 1600


def test_queries_that_are_given_choose_and_are_nobodys_own(parts):
    fit, held_out = parts
    queries = Pairs(held_out.new[:50], held_out.old[:50])
    exam = held_out_exam(fit, held_out, 4000, queries)
    assert exam.own.tolist() == [-1] * 50
    assert (exam.new_queries == queries.new).all()


def test_one_query_is_too_few_to_choose_by(parts):
    fit, held_out = parts
    with pytest.raises(ValueError, match="expected two queries"):
        held_out_exam(fit, held_out, 4000, Pairs(held_out.new[:1], held_out.old[:1]))


def test_a_head_reads_stored_codes_better_than_the_bridge_that_it_starts_from(exam, parts):
    fit, held_out = parts
    binarizer = fit_binarizer(fit.old, config=BinarizerConfig(levels=(32, 16)), rng=np.random.default_rng(0))
    stored = stored_codes(fit, held_out_exam(fit, held_out, 1900), exam.old, binarizer, seed=0)
    codes = binarize(binarizer, exam.old)
    by_head = exam.overlap(find_by_codes(exam, stored.reader, stored.codes, exam.new_queries)).mean()
    naive = exam.overlap(find_by_codes(exam, binarizer, codes, exam.new_queries[:, :OLD_DIMS])).mean()
    by_old = exam.overlap(find_by_codes(exam, binarizer, codes, exam.old_queries)).mean()
    assert by_head > naive + 0.1
    assert by_head > 0.8 * by_old
    names = [
        rung.name
        for rung in climb(
            exam, choose(*parts, corpus=1900, seed=3), depths=(), order=np.arange(1900), stored=stored
        )
    ]
    assert "compatible head by codes alone" in names


def test_codes_of_more_dimensions_than_new_vectors_have_no_reader(parts):
    binarizer = fit_binarizer(
        parts[0].old, config=BinarizerConfig(levels=(24,)), rng=np.random.default_rng(0)
    )
    narrow, unseen = (Pairs(one.new[:, :16], one.old) for one in parts)
    exam = held_out_exam(narrow, unseen, 1900)
    assert stored_codes(narrow, exam, unseen.old, binarizer, seed=0) is None


def test_the_ladder_rises_from_a_naive_swap_to_a_full_backfill(exam, rungs):
    found = {name: exam.figures(rung).overlap_at_10.mean() for name, rung in rungs.items()}
    assert found[NAIVE] < found[STATUS_QUO] < found[FULL] == 1
    assert found["backfill of 10 %"] < found["backfill of 25 %"] < found["backfill of 50 %"] < 1
    assert found["cascade of 20"] < found["cascade of 100"]
    assert found[ORACLE] > found["procrustes"]


def test_a_rung_says_what_it_embeds(rungs):
    assert rungs[FULL].embedded == 1900
    assert rungs["backfill of 25 %"].embedded == 475
    assert rungs["procrustes"].embedded == rungs[STATUS_QUO].embedded == 0
    assert 0 < rungs["cascade of 20"].embedded <= rungs["cascade of 100"].embedded <= 1900


def test_neither_side_of_a_migration_takes_the_places_of_the_other(exam, choice):
    bridged = choice.bridge.apply(exam.new_queries)
    for share in (0.1, 0.5, 0.75):
        migrated = np.random.default_rng(2).random(len(exam.old)) < share
        found = half_migrated(exam, bridged, migrated, choice.calibration)
        assert migrated[found[:, :10]].mean() == pytest.approx(migrated[exam.wanted[:, :10]].mean(), abs=0.06)


def test_the_simplest_of_those_that_find_as_much_is_chosen():
    base, noise = np.random.default_rng(0).random(100), np.random.default_rng(1).normal(0, 0.1, 100)
    noise -= noise.mean()
    even = {"simple": base, "complex": base + noise + 0.005, "worse": base - 0.1}
    assert simplest_of_the_best(even) == "simple"
    assert simplest_of_the_best(even | {"complex": base + noise + 0.05}) == "complex"
