import numpy as np
import pytest
import torch

from pipeline.binarization import binarize, fit_binarizer, rotate_queries, score, to_tensors
from pipeline.binarization.descending import PATIENCE
from pipeline.binarization.distilling import distil
from pipeline.binarization.learning import learn_binarizer, mine_neighbours
from pipeline.config import BinarizerConfig
from tests.unit.binarization.test_learning import clustered


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return clustered(3200)[:3000]


@pytest.fixture(scope="module")
def neighbours(sample):
    return mine_neighbours(sample, np.random.default_rng(1))


@pytest.fixture(scope="module")
def start(sample, neighbours):
    rotation = fit_binarizer(sample, config=BinarizerConfig(bytes=6), rng=np.random.default_rng(0))
    return learn_binarizer(rotation, neighbours.pairs(sample))


def distilled(start, sample, neighbours, recall):
    return distil(start, sample, neighbours, recall=recall, seed=5)


def divergence(binarizer, queries: np.ndarray, base: np.ndarray) -> float:
    """Of the distributions over all of the base that code scores and float scores stand for."""
    estimates = score(binarizer, rotate_queries(binarizer, queries), *binarize(binarizer, base))
    found, wanted = (
        torch.log_softmax(torch.from_numpy(s / 0.03), dim=1)
        for s in (estimates, queries @ base.T - (queries @ binarizer.mean)[:, None])
    )
    return float(torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True))


def test_distilled_scores_come_nearer_to_float_ones_for_queries_not_seen(start, sample, neighbours) -> None:
    steps = iter(range(100))
    trained, curve = distilled(start, sample, neighbours, lambda _: float(next(steps)))
    queries = clustered(3200)[3000:]
    assert divergence(trained, queries, sample) < 0.97 * divergence(start, queries, sample)
    losses = [look.loss for look in curve if look.loss is not None]
    assert losses[-1] < losses[0]


def test_codes_and_factors_stay_as_they_are(start, sample, neighbours) -> None:
    steps = iter(range(100))
    trained, _ = distilled(start, sample, neighbours, lambda _: float(next(steps)))
    before, after = binarize(start, sample[:200]), binarize(trained, sample[:200])
    assert np.array_equal(before.code, after.code)
    assert np.array_equal(before.factor, after.factor)
    assert not np.array_equal(before.offset, after.offset)


def test_what_finds_most_is_kept_and_training_stops_without_gain(start, sample, neighbours) -> None:
    falling = iter(np.linspace(1, 0, 100))
    kept, curve = distilled(start, sample, neighbours, lambda _: float(next(falling)))
    assert kept is start
    assert len(curve) == 1 + PATIENCE
    assert [look.step for look in curve] == sorted({look.step for look in curve})


def test_training_twice_gives_the_same_bytes_and_leaves_the_threads_alone(start, sample, neighbours) -> None:
    threads = torch.get_num_threads()
    runs = []
    for _ in range(2):
        steps = iter(range(100))
        trained, _ = distilled(start, sample, neighbours, lambda _, s=steps: float(next(s)))
        runs.append({name: array.tobytes() for name, array in to_tensors(trained).items()})
    assert runs[0] == runs[1]
    assert torch.get_num_threads() == threads
