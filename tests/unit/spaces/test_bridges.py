from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorruptArtifactError
from pipeline.spaces.bridges import Bridge, Residual, bridge_of, bridge_tensors, normalized, slerp
from pipeline.spaces.calibration import Calibration, Cohort, calibrate


def unit(rng, n, d):
    return normalized(rng.standard_normal((n, d)))


@pytest.fixture
def bridge():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in (5, 3, (5, 3), (5, 7), 7, (7, 3))]
    return Bridge("tuned", *arrays[:3], Residual(*arrays[3:]))


def test_a_bridge_is_the_map_that_it_says(bridge):
    queries = unit(np.random.default_rng(1), 4, 5)
    centred = queries - bridge.mean_from
    hidden = np.maximum(centred @ bridge.residual.inner + bridge.residual.inner_bias, 0)
    mapped = centred @ bridge.matrix + bridge.mean_to + hidden @ bridge.residual.outer
    assert bridge.apply(queries) == pytest.approx(mapped / np.linalg.norm(mapped, axis=1, keepdims=True))


def test_the_length_of_a_query_does_not_matter(bridge):
    queries = unit(np.random.default_rng(1), 4, 5)
    assert bridge.apply(7 * queries) == pytest.approx(bridge.apply(queries), abs=1e-5)


def test_a_query_of_another_width_is_refused(bridge):
    with pytest.raises(ValueError, match=r"expected queries \(q, 5\), found \(2, 3\)"):
        bridge.apply(np.ones((2, 3)))


@pytest.mark.parametrize("has_layer", [True, False])
def test_a_bridge_comes_back_from_its_tensors(bridge, has_layer):
    bridge = bridge if has_layer else replace(bridge, residual=None)
    queries = unit(np.random.default_rng(1), 4, 5)
    again = bridge_of(bridge_tensors(bridge), bridge.kind)
    assert again.kind == bridge.kind
    assert (again.apply(queries) == bridge.apply(queries)).all()


@pytest.mark.parametrize("name", ["matrix", "mean_from", "inner", "outer"])
def test_tensors_that_do_not_fit_are_refused(bridge, name):
    tensors = bridge_tensors(bridge)
    without = {key: value for key, value in tensors.items() if key != name}
    for wrong in (without, tensors | {name: tensors[name][1:]}, tensors | {name: tensors[name].astype("f8")}):
        with pytest.raises(CorruptArtifactError, match="expected tensors"):
            bridge_of(wrong, "tuned")


@given(st.integers(0, 1000), st.floats(0, 1))
def test_slerp_stays_on_the_arc(seed, share):
    rng = np.random.default_rng(seed)
    start, stop = unit(rng, 3, 6), unit(rng, 3, 6)
    mixed = slerp(start, stop, share)
    whole = np.arccos(np.clip(np.einsum("qd,qd->q", start, stop), -1, 1))
    part = np.arccos(np.clip(np.einsum("qd,qd->q", start, mixed), -1, 1))
    assert np.linalg.norm(mixed, axis=1) == pytest.approx(1, abs=1e-5)
    assert part == pytest.approx(share * whole, abs=2e-3)


def test_slerp_ends_at_its_ends_and_bears_equal_directions():
    rng = np.random.default_rng(0)
    start, stop = unit(rng, 3, 6), unit(rng, 3, 6)
    assert slerp(start, stop, 0.0) == pytest.approx(start, abs=1e-6)
    assert slerp(start, stop, 1.0) == pytest.approx(stop, abs=1e-6)
    assert slerp(start, start, 0.3) == pytest.approx(start, abs=1e-6)


def test_a_row_of_zeros_has_no_direction_to_take():
    assert (normalized(np.zeros((1, 3))) == 0).all()


CALIBRATION = Calibration(np.array([0.1, 0.2, 0.4], np.float32), np.array([0.3, 0.6, 0.9], np.float32))


def of(calibration, *scores):
    """Without a cohort: whoever asks."""
    nobody = np.zeros((1, 1), np.float32)
    return calibration.gauge(nobody, nobody).of(np.array(scores, np.float32), 0)


def test_a_calibrated_score_is_what_its_rank_scores_in_the_new_space():
    assert of(CALIBRATION, *CALIBRATION.bridged) == pytest.approx(CALIBRATION.native)
    assert of(CALIBRATION, 0.15, 0.3) == pytest.approx([0.45, 0.75])


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=20, unique=True))
def test_calibration_keeps_the_order_also_outside_of_what_it_saw(scores):
    calibrated = of(CALIBRATION, *sorted(scores))
    assert (np.diff(calibrated) >= 0).all()


@pytest.mark.parametrize(("bridged", "native"), [([], []), ([0.1], [0.1, 0.2]), ([0.2, 0.1], [0.1, 0.2])])
def test_scores_that_do_not_rise_are_refused(bridged, native):
    with pytest.raises(ValueError, match="expected rising scores"):
        Calibration(np.array(bridged, np.float32), np.array(native, np.float32))


def test_a_calibration_holds_the_mean_score_of_each_rank():
    nobody, few = (
        np.zeros((2, 3), np.float32),
        Cohort(np.zeros((9, 3), np.float32), np.zeros((9, 3), np.float32)),
    )
    found = calibrate(
        np.array([[0.4, 0.2], [0.6, 0.4]], np.float32),
        np.array([[0.9, 0.5], [0.7, 0.5]], np.float32),
        queries=nobody,
        crossed=nobody,
        cohort=few,
    )
    assert found.cohort is None
    assert found.bridged == pytest.approx([0.3, 0.5])
    assert found.native == pytest.approx([0.5, 0.8])


def test_a_single_rank_is_a_shift():
    shift = Calibration(np.array([0.2], np.float32), np.array([0.5], np.float32))
    assert of(shift, 0.1, 0.2, 0.4) == pytest.approx([0.4, 0.5, 0.7])


def with_cohort():
    """A calibration that holds queries of ten dimensions against a hundred documents."""
    rng = np.random.default_rng(4)
    cohort = Cohort(unit(rng, 100, 10), unit(rng, 100, 10))
    return Calibration(CALIBRATION.bridged, CALIBRATION.native, cohort)


def test_a_query_that_is_nearer_to_all_documents_has_higher_scores_from_across():
    calibration, rng = with_cohort(), np.random.default_rng(5)
    (query,), (crossed,) = unit(rng, 1, 10), unit(rng, 1, 10)
    nearer = np.array([query, 1.5 * query], np.float32)
    found = calibration.gauge(nearer, np.array([crossed] * 2)).of(
        np.full((2, 3), 0.3, np.float32), slice(None)
    )
    assert found[1] == pytest.approx(1.5 * found[0], rel=1e-5)


def test_scores_of_one_query_are_calibrated_as_among_those_of_others():
    rng = np.random.default_rng(6)
    gauge = with_cohort().gauge(unit(rng, 4, 10), unit(rng, 4, 10))
    scores = rng.uniform(-1, 1, (4, 7)).astype(np.float32)
    together = gauge.of(scores, slice(None))
    for query in range(4):
        assert gauge.of(scores[query], query) == pytest.approx(together[query], abs=1e-6)
    one_each = gauge.of(scores[:, 0], np.arange(4))
    assert one_each == pytest.approx(together[:, 0], abs=1e-6)


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=20, unique=True))
def test_a_cohort_keeps_the_order_of_each_query(scores):
    rng = np.random.default_rng(7)
    gauge = with_cohort().gauge(unit(rng, 1, 10), unit(rng, 1, 10))
    assert (np.diff(gauge.of(np.array(sorted(scores), np.float32), 0)) >= 0).all()


def test_with_a_cohort_ranks_are_compared_as_it_places_them():
    rng = np.random.default_rng(8)
    queries, crossed, cohort = unit(rng, 50, 10), unit(rng, 50, 10), with_cohort().cohort
    documents = unit(rng, 400, 10), unit(rng, 400, 10)
    bridged, native = (
        -np.sort(-(asked @ own.T), axis=1)[:, :20]
        for asked, own in zip((crossed, queries), documents, strict=True)
    )
    found = calibrate(bridged, native, queries=queries, crossed=crossed, cohort=cohort)
    again = found.gauge(queries, crossed).of(bridged, slice(None))
    assert again.mean(axis=0) == pytest.approx(native.mean(axis=0), abs=0.02)
