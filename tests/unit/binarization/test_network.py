from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.binarization import (
    binarize,
    choose_binarizer,
    fit_binarizer,
    from_tensors,
    rotate_queries,
    score,
    to_tensors,
)
from pipeline.binarization.codec import quantize
from pipeline.binarization.learning import learn_binarizer, mine_neighbours
from pipeline.binarization.training import CodeMaker, contrast, start_network, train_network, weighted_signs
from pipeline.config import BinarizerConfig
from pipeline.errors import CorruptArtifactError
from tests.unit.binarization.test_learning import clustered

LEVELS = (32, 16, 8)


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return clustered(1000)


@pytest.fixture(scope="module")
def neighbours(sample):
    return mine_neighbours(sample, np.random.default_rng(1))


def started(sample, neighbours, hidden: int, levels: tuple[int, ...] = LEVELS):
    rotation = fit_binarizer(sample, config=BinarizerConfig(levels=levels), rng=np.random.default_rng(0))
    learned = learn_binarizer(rotation, neighbours.pairs(sample))
    return start_network(learned, sample, hidden=hidden, rng=np.random.default_rng(2))


def trained(binarizer, sample, neighbours):
    rising = iter(range(100))
    return train_network(binarizer, sample, neighbours, recall=lambda _: float(next(rising)), seed=4)


@pytest.fixture(scope="module")
def recurrent(sample, neighbours):
    return trained(started(sample, neighbours, hidden=24), sample, neighbours)


@pytest.mark.parametrize("hidden", [0, 24])
@pytest.mark.parametrize("levels", [(32,), LEVELS, (32, 32), (48, 16), (16, 8)])
def test_a_network_starts_with_the_signs_of_the_rotation(sample, neighbours, hidden: int, levels) -> None:
    start = started(sample, neighbours, hidden, levels)
    centred = sample.astype(np.float64) - start.mean
    level_0 = levels[0] // 8
    z = (centred @ start.rotation).astype(np.float32)
    plain, _ = quantize(start, z)
    signs, value = start.network.signs(centred, start.level_weights)
    assert np.array_equal(signs[:, :level_0], plain[:, :level_0])
    error, plain_error = (
        1 - (z * v).sum(axis=1) / np.linalg.norm(z, axis=1) / np.linalg.norm(v, axis=1)
        for v in (value, quantize(start, z)[1])
    )
    assert error.mean() < 1.05 * plain_error.mean()


def test_numpy_makes_the_codes_that_were_trained(sample, neighbours) -> None:
    start = started(sample, neighbours, hidden=24)
    maker = CodeMaker(start)
    centred = torch.from_numpy(sample - start.mean)
    # Statistics of the normalization, and last layers, far from where they start.
    for block in (*maker.encoders, *maker.decoders):
        torch.nn.init.normal_(block.outer, std=0.1)
        torch.nn.init.uniform_(block.normalization.weight, 0.5, 2)
        torch.nn.init.uniform_(block.normalization.bias, -0.5, 0.5)
    for _ in range(3):
        maker(2 * centred + 0.1)
    maker.eval()
    with torch.no_grad():
        expected = maker(centred).numpy()
    network = maker.network()
    _, value = network.signs(centred.numpy().astype(np.float64), start.level_weights)
    assert (np.abs(value - expected) > 1e-5).mean() < 1e-3
    _, untouched = start.network.signs(centred.numpy().astype(np.float64), start.level_weights)
    assert (np.abs(value - untouched) > 1e-5).mean() > 0.05


def test_training_lowers_the_loss_and_moves_codes(recurrent, sample, neighbours) -> None:
    binarizer, curve = recurrent
    losses = [look.loss for look in curve if look.loss is not None]
    assert losses[-1] < 0.95 * losses[0]
    before = binarize(started(sample, neighbours, hidden=24), sample)
    assert 0.005 < (before.code != binarize(binarizer, sample).code).mean() < 0.7


def test_training_twice_gives_the_same_bytes(recurrent, sample, neighbours) -> None:
    again, _ = trained(started(sample, neighbours, hidden=24), sample, neighbours)
    tensors = to_tensors(recurrent[0])
    assert {k: v.tobytes() for k, v in tensors.items()} == {
        k: v.tobytes() for k, v in to_tensors(again).items()
    }


def test_a_code_depends_on_its_vector_alone(recurrent, sample) -> None:
    binarizer, _ = recurrent
    whole = binarize(binarizer, sample[:300])
    for row in (0, 7, 299):
        alone = binarize(binarizer, sample[row : row + 1])
        assert all(np.array_equal(a[0], w[row]) for a, w in zip(alone, whole, strict=True))


def test_the_mean_has_a_code_and_no_factor(recurrent) -> None:
    binarizer, _ = recurrent
    code, factor, offset = binarize(binarizer, binarizer.mean[None])
    assert code.shape == (1, binarizer.code_bytes)
    assert factor == 0
    assert np.isfinite(offset).all()


def test_tensors_round_trip_and_a_missing_one_is_refused(recurrent, sample) -> None:
    binarizer, _ = recurrent
    tensors = to_tensors(binarizer)
    again = from_tensors(tensors, binarizer.levels)
    assert np.array_equal(binarize(again, sample).code, binarize(binarizer, sample).code)
    for name in ("network.decoder.1.outer", "network.lengths"):
        with pytest.raises(CorruptArtifactError, match=name):
            from_tensors({k: v for k, v in tensors.items() if k != name}, binarizer.levels)


def test_dimensions_above_the_vectors_own_lower_the_error(sample) -> None:
    narrow, wide = (
        fit_binarizer(sample, config=BinarizerConfig(levels=(m,)), rng=np.random.default_rng(0))
        for m in (32, 128)
    )
    queries = clustered(200, seed=9)
    errors = []
    for binarizer in (narrow, wide):
        codes = binarize(binarizer, sample)
        estimates = score(binarizer, rotate_queries(binarizer, queries), *codes) - codes.offset
        exact = (queries - binarizer.mean) @ (sample - binarizer.mean).T
        errors.append(float(np.square(estimates - exact).mean()))
    assert errors[1] < 0.6 * errors[0]


def test_the_method_recurrent_is_judged_beside_the_others() -> None:
    config = BinarizerConfig(levels=LEVELS, method="recurrent", hidden_units=8)
    choice = choose_binarizer(clustered(2200), config=config, seed=0)
    assert choice.method == "recurrent"
    assert set(choice.recall) == {"rotation", "learned", "recurrent"}
    assert choice.binarizer.network is not None
    assert choice.binarizer.network.encoders[0].inner.shape == (32, 8)


def test_contrast_is_that_of_the_wanted_against_the_hardest_unknown() -> None:
    rng = np.random.default_rng(0)
    queries, documents = (torch.from_numpy(rng.standard_normal((n, 8))) for n in (3, 20))
    wanted, known = torch.tensor([4, 9, 2]), torch.zeros(3, 20, dtype=torch.bool)
    known[torch.arange(3), wanted] = True
    known[0, :3] = True
    q, d = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (queries, documents))
    expected = 0.0
    for i, document in enumerate(wanted):
        allowed = np.flatnonzero(~known[i].numpy())
        logits = np.array([q[i] @ d[document], *np.sort(d[allowed] @ q[i])[-5:]]) / 0.05
        expected += np.logaddexp.reduce(logits) - logits[0]
        # Of the other queries, those that the document is near to are none of its negatives.
        others = [j for j in range(3) if j != i and not known[j, document]]
        logits = np.array([q[i] @ d[document], *(q[others] @ d[document])]) / 0.05
        expected += np.logaddexp.reduce(logits) - logits[0]
    assert float(contrast(queries, documents, wanted, known)) == pytest.approx(expected / 3)


def test_gradients_pass_signs_only_within_a_step() -> None:
    u = torch.tensor([-3.0, -0.4, 0.0, 0.4, 3.0], requires_grad=True)
    signs = weighted_signs(u, torch.full((5,), 0.5))
    assert signs.tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5]
    signs.sum().backward()
    assert u.grad.tolist() == [0, 1, 1, 1, 0]


def test_a_step_size_is_not_looked_for_where_a_network_makes_the_signs(sample, neighbours) -> None:
    start = started(sample, neighbours, hidden=0)
    assert start.learned.scales.tolist() == [1]
    stretched = replace(start, learned=replace(start.learned, scales=np.array([0.5, 2], np.float32)))
    assert np.array_equal(binarize(start, sample).code, binarize(stretched, sample).code)


def test_few_queries_are_trained_on_for_a_step(sample) -> None:
    few = mine_neighbours(sample[:12], np.random.default_rng(1))
    _, curve = trained(started(sample[:12], few, hidden=0), sample[:12], few)
    assert [look.step for look in curve] == [0, 1]
