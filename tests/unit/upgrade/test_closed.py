import numpy as np
import pytest

from pipeline.spaces.bridges import normalized
from pipeline.upgrade.closed import complete_orthogonally, fit_drift, fit_procrustes, fit_ridge, pick_anchors
from tests.unit.upgrade.cases import NEW_DIMS, OLD_DIMS, two_encoders


def cosines(a, b):
    return np.einsum("nd,nd->n", a, b)


@pytest.fixture(scope="module")
def vectors():
    return two_encoders(1500)


def test_procrustes_takes_back_a_rotation_of_the_same_model(vectors):
    old, _ = vectors
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((OLD_DIMS, OLD_DIMS)))[0]
    new = (old @ turn).astype(np.float32)
    again = fit_procrustes(new[:1000], old[:1000]).apply(new[1000:])
    assert cosines(again, old[1000:]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("is_wider", [True, False])
def test_procrustes_is_orthogonal_whichever_space_is_wider(vectors, is_wider):
    old, new = vectors if is_wider else vectors[::-1]
    matrix = fit_procrustes(new, old).matrix
    gram = matrix.T @ matrix if is_wider else matrix @ matrix.T
    assert gram == pytest.approx(np.eye(len(gram)), abs=1e-5)


def test_every_bridge_brings_new_vectors_nearer_to_old_ones_of_texts_that_it_did_not_see(vectors):
    old, new = vectors
    for bridge in (fit_procrustes(new[:1000], old[:1000]), fit_ridge(new[:1000], old[:1000], 0.01)):
        assert cosines(bridge.apply(new[1000:]), old[1000:]).mean() > 0.8, bridge.kind


def test_ridge_of_little_strength_is_least_squares_and_with_much_of_it_the_mean(vectors):
    old, new = vectors
    x, y = (v.astype(np.float64) - v.mean(axis=0, dtype=np.float64) for v in (new, old))
    assert fit_ridge(new, old, 1e-9).matrix == pytest.approx(np.linalg.lstsq(x, y, rcond=None)[0], abs=1e-4)
    assert np.abs(fit_ridge(new, old, 1e9).matrix).max() < 1e-6


def test_a_ridge_without_strength_is_refused(vectors):
    old, new = vectors
    with pytest.raises(ValueError, match="expected a strength above 0"):
        fit_ridge(new, old, 0.0)


def test_drift_is_taken_back(vectors):
    old, _ = vectors
    drift = 0.2 * np.random.default_rng(0).standard_normal(OLD_DIMS)
    new = normalized(old + drift)
    bridge = fit_drift(new[:1000], old[:1000])
    assert (
        cosines(bridge.apply(new[1000:]), old[1000:]).mean() > cosines(new[1000:], old[1000:]).mean() + 0.05
    )


def test_drift_between_spaces_of_two_widths_is_refused(vectors):
    old, new = vectors
    with pytest.raises(ValueError, match="expected spaces of one width, found 48 and 32"):
        fit_drift(new, old)


@pytest.mark.parametrize("fit", [fit_procrustes, fit_drift, lambda new, old: fit_ridge(new, old, 0.1)])
def test_vectors_of_different_texts_are_refused(vectors, fit):
    old, new = vectors
    with pytest.raises(ValueError, match="found 10 new and 9 old"):
        fit(new[:10], old[:9])


def test_a_completed_vector_loses_nothing_in_its_own_space_and_begins_with_the_bridged_one(vectors):
    old, new = vectors
    bridge = fit_procrustes(new, old)
    whole = complete_orthogonally(bridge)
    assert whole.shape == (NEW_DIMS, NEW_DIMS)
    turned = new @ whole
    assert turned @ turned.T == pytest.approx(new @ new.T, abs=1e-5)
    first = turned[:, :OLD_DIMS] - (bridge.mean_from @ whole)[:OLD_DIMS] + bridge.mean_to
    assert normalized(first) == pytest.approx(bridge.apply(new), abs=1e-5)


def test_only_an_orthogonal_bridge_into_a_space_no_wider_is_completed(vectors):
    old, new = vectors
    for bridge in (fit_ridge(new, old, 0.1), fit_procrustes(old, new)):
        with pytest.raises(ValueError, match="expected a Procrustes bridge"):
            complete_orthogonally(bridge)


def test_relative_representations_of_a_turned_model_are_the_same(vectors):
    old, _ = vectors
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((OLD_DIMS, OLD_DIMS)))[0].astype(np.float32)
    anchors = pick_anchors(old @ turn, old, 200, np.random.default_rng(1))
    assert anchors.of_queries(old @ turn) == pytest.approx(anchors.of_documents(old), abs=1e-4)


def test_no_more_anchors_than_texts(vectors):
    old, new = vectors
    assert pick_anchors(new[:20], old[:20], 200, np.random.default_rng(1)).of_queries(new).shape == (1500, 20)
