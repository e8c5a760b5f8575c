import numpy as np
import pytest

from pipeline.binarization import Drift, binarize, choose_binarizer, may_stay, measure_drift
from pipeline.config import BinarizerConfig

DIMS = 32
CONFIG = BinarizerConfig(bytes=16)


def _vectors(n: int, wide: slice, seed: int) -> np.ndarray:
    """Unit vectors of some clusters that vary most in some dimensions."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, DIMS))
    vectors = 0.6 * centres[rng.integers(0, 40, n)] + rng.standard_normal((n, DIMS))
    vectors[:, wide] *= 4
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


FIRST = _vectors(3000, slice(8), 0)
SHIFTED = _vectors(3000, slice(16, 24), 1)


@pytest.fixture(scope="module", params=["rotation", "learned"])
def stored(request):
    config = CONFIG.model_copy(update={"method": request.param})
    return choose_binarizer(FIRST[:2400], config=config, seed=1).binarizer


def test_nothing_drifts_on_the_sample_that_a_binarizer_was_made_from(stored):
    drift = measure_drift(stored, FIRST[:2400], config=CONFIG, seed=1)
    assert drift is not None
    # What is not learned is fitted on the held-out vectors, too.
    assert abs(drift.lost) <= (0 if stored.learned is not None else 2 * drift.error)
    assert 0.5 < drift.stored < 1


def test_more_of_the_same_drifts_less_than_a_shift(stored):
    more, shifted = (measure_drift(stored, x, config=CONFIG, seed=1) for x in (FIRST, SHIFTED))
    assert more is not None
    assert shifted is not None
    assert abs(more.lost) < 0.03
    assert shifted.lost > 0.08
    assert more.queries == pytest.approx(len(FIRST) / 32, rel=0.4)


def test_the_drift_is_the_same_every_time_and_leaves_the_codes_alone(stored):
    before = binarize(stored, FIRST[:50]).code
    assert measure_drift(stored, SHIFTED, config=CONFIG, seed=1) == measure_drift(
        stored, SHIFTED, config=CONFIG, seed=1
    )
    assert (binarize(stored, FIRST[:50]).code == before).all()


@pytest.mark.parametrize("sample", [FIRST[:2000], np.repeat(FIRST[:1], 3000, axis=0)])
def test_too_few_vectors_tell_nothing_and_nothing_stays(stored, sample):
    assert measure_drift(stored, sample, config=CONFIG, seed=1) is None
    assert not may_stay(None, CONFIG)


@pytest.mark.parametrize(
    ("max_drift", "queries", "stays"),
    [
        (None, 10_000, False),
        (0.0, 10_000, False),
        (0.01, 10_000, False),
        (0.0145, 10_000, True),
        (0.02, 10_000, True),
        (0.01, 64, True),
        (0.0, 64, False),
    ],
)
def test_a_binarizer_stays_unless_it_clearly_loses_more_than_is_allowed(max_drift, queries, stays):
    config = CONFIG.model_copy(update={"max_drift": max_drift})
    assert may_stay(Drift(stored=0.80, fitted=0.815, queries=queries), config) is stays


def test_a_binarizer_that_finds_more_than_a_fresh_one_stays_whatever_is_allowed():
    config = CONFIG.model_copy(update={"max_drift": 0.0})
    assert may_stay(Drift(stored=0.82, fitted=0.81, queries=100), config)
