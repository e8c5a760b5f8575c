from dataclasses import replace

import numpy as np
import pytest

from pipeline.binarization import (
    binarize,
    choose_binarizer,
    decode,
    fit_binarizer,
    from_tensors,
    rotate_queries,
    score,
    to_tensors,
)
from pipeline.binarization.choosing import FEWEST_ROWS
from pipeline.binarization.learning import Pairs, is_held_out, learn_binarizer, mine_neighbours
from pipeline.config import BinarizerConfig
from pipeline.errors import CorruptArtifactError

SIZE = BinarizerConfig(bytes=6)


def clustered(n: int, d: int = 32, seed: int = 0) -> np.ndarray:
    """Unit vectors around centres, with less noise in later dimensions: neighbours tell something."""
    rng = np.random.default_rng(seed)
    noise = np.arange(1, d + 1) ** -0.7
    centres = rng.standard_normal((60, d)) * noise
    x = centres[rng.integers(0, 60, n)] + 0.6 * rng.standard_normal((n, d)) * noise
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return clustered(4000)


@pytest.fixture(scope="module")
def rotation(sample):
    return fit_binarizer(sample, config=SIZE, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def learned(sample, rotation):
    return learn_binarizer(rotation, mine_neighbours(sample, np.random.default_rng(1)).pairs(sample))


def test_mined_pairs_are_the_nearest_others(sample: np.ndarray) -> None:
    pairs = mine_neighbours(sample[:500], np.random.default_rng(0)).pairs(sample[:500])
    scores = sample[:500] @ sample[:500].T
    np.fill_diagonal(scores, -2)
    assert (pairs.query_rows != pairs.document_rows).all()
    assert len(pairs.query_rows) == 500 * 20
    for row in (0, 123, 499):
        mine = pairs.query_rows[pairs.document_rows == row]
        np.testing.assert_allclose(
            np.sort(scores[row][mine]), np.sort(scores[row])[-20:], rtol=1e-5, atol=1e-6
        )


def test_equal_vectors_are_never_paired_with_themselves_and_none_is_missing() -> None:
    sample = np.repeat(clustered(10), 30, axis=0)
    pairs = mine_neighbours(sample, np.random.default_rng(0)).pairs(sample)
    assert (pairs.query_rows != pairs.document_rows).all()
    assert (np.bincount(pairs.document_rows) == 20).all()


def test_the_expectation_takes_back_the_error_at_the_expected_query(rotation, learned) -> None:
    x = clustered(50, seed=7)
    codes = binarize(learned, x)
    centred = (x - learned.mean).astype(np.float64)
    expected = centred @ learned.learned.expectation
    estimate = (
        codes.factor * np.sum((expected @ learned.query_map) * decode(learned, codes.code), axis=1)
        + codes.offset
    )
    # ⟨q̄, x⟩ in full, but for ⟨q̄, mean⟩, which scores leave out.
    truth = (expected * centred).sum(axis=1) + (centred * learned.mean).sum(axis=1)
    np.testing.assert_allclose(estimate, truth, atol=2e-3)
    plain = binarize(rotation, x)
    missed = (
        plain.factor * np.sum((expected @ rotation.rotation) * decode(rotation, plain.code), axis=1)
        + plain.offset
    )
    assert np.abs(missed - truth).mean() > 10 * np.abs(estimate - truth).mean()


def test_each_vector_gets_the_step_size_that_costs_least(learned) -> None:
    x = clustered(64, seed=3)
    z = (x - learned.mean) @ learned.rotation

    def cost(value: np.ndarray) -> np.ndarray:
        factor = (z * z).sum(axis=1) / (z * value).sum(axis=1)
        return ((z - factor[:, None] * value) ** 2 * learned.learned.spread).sum(axis=1)

    values = [
        decode(
            learned,
            binarize(
                replace(learned, learned=replace(learned.learned, scales=np.array([s], np.float32))), x
            ).code,
        )
        for s in learned.learned.scales
    ]
    chosen = cost(decode(learned, binarize(learned, x).code))
    np.testing.assert_allclose(chosen, np.min([cost(v) for v in values], axis=0), rtol=1e-4)
    assert len(learned.learned.scales) > 2


def test_a_learned_code_depends_on_its_vector_alone(learned) -> None:
    x = clustered(300, seed=5)
    whole = binarize(learned, x)
    alone = [binarize(learned, x[i : i + 1]) for i in range(0, 300, 37)]
    for part, field in enumerate(whole):
        assert np.array_equal(field[::37], np.concatenate([codes[part] for codes in alone]))


def test_a_learned_binarizer_survives_its_tensors(learned) -> None:
    again = from_tensors(to_tensors(learned), learned.levels)
    x = clustered(20, seed=9)
    for mine, theirs in zip(binarize(learned, x), binarize(again, x), strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("damage", ["query_map", "scales", "spread", "expectation"])
def test_a_learned_binarizer_with_a_tensor_missing_or_cut_is_refused(learned, damage: str) -> None:
    tensors = to_tensors(learned)
    for broken in (
        {k: v for k, v in tensors.items() if k != damage},
        tensors | {damage: tensors[damage][None]},
    ):
        with pytest.raises(CorruptArtifactError, match=damage):
            from_tensors(broken, learned.levels)


def test_learning_twice_gives_the_same_bytes(sample, rotation, learned) -> None:
    again = learn_binarizer(rotation, mine_neighbours(sample, np.random.default_rng(1)).pairs(sample))
    first, second = to_tensors(learned), to_tensors(again)
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}


def test_pairs_of_people_are_used_as_mined_ones_are(sample, rotation) -> None:
    """Queries that lie elsewhere than documents: what is expected of them is what the pairs say."""
    shift = np.zeros(32, np.float32)
    shift[3] = 0.5
    rows = np.arange(len(sample))
    learned = learn_binarizer(rotation, Pairs(0.4 * sample + shift, sample, rows, rows))
    expected = (sample - learned.mean) @ learned.learned.expectation / 0.75
    wanted = 0.4 * sample + shift - learned.mean
    wanted -= wanted.mean(axis=0)
    assert np.corrcoef(expected.ravel(), wanted.ravel())[0, 1] > 0.99


# ------------------------------------------------------------------------------------------------ choosing


def test_the_split_is_by_content() -> None:
    x = clustered(3000)
    split = is_held_out(x)
    order = np.random.default_rng(0).permutation(3000)
    assert np.array_equal(is_held_out(x[order]), split[order])
    assert 0.01 < split.mean() < 0.06


@pytest.mark.parametrize("method", ["auto", "learned", "rotation"])
def test_the_method_asked_for_is_taken_and_auto_takes_the_better(sample: np.ndarray, method: str) -> None:
    choice = choose_binarizer(sample, config=BinarizerConfig(bytes=6, method=method), seed=3)
    assert choice.binarizer.code_bytes == 6
    assert (choice.binarizer.learned is None) == (choice.method == "rotation")
    if method == "rotation":
        assert choice.recall == {}
        return
    assert set(choice.recall) == {"rotation", "learned"}
    best = max(choice.recall, key=lambda name: choice.recall[name])
    assert choice.method == ("learned" if method == "learned" else best)
    assert choice.held_out_queries == is_held_out(sample).sum() // 2
    assert choice.curve[0].step == 0


def test_the_recall_of_a_choice_is_that_of_queries_that_were_held_out(sample: np.ndarray) -> None:
    choice = choose_binarizer(sample, config=BinarizerConfig(bytes=6, method="learned"), seed=3)
    split = is_held_out(sample)
    queries, base = sample[split][1::2], sample[~split]
    scores = score(
        choice.binarizer, rotate_queries(choice.binarizer, queries), *binarize(choice.binarizer, base)
    )
    found, exact = (np.argsort(-s, axis=1)[:, :10] for s in (scores, queries @ base.T))
    recall = np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)])
    assert choice.recall["learned"] == pytest.approx(recall, abs=0.002)


def test_of_a_small_sample_nothing_is_learned(sample: np.ndarray) -> None:
    few = choose_binarizer(sample[: FEWEST_ROWS - 1], config=BinarizerConfig(bytes=6), seed=0)
    assert (few.method, few.recall) == ("rotation", {})


@pytest.mark.parametrize("distinct", [1, 2, 40])
def test_many_copies_of_few_vectors_have_a_binarizer(distinct: int) -> None:
    few = clustered(distinct)[np.arange(3000) % distinct]
    choice = choose_binarizer(few, config=BinarizerConfig(bytes=6, method="learned"), seed=0)
    codes = binarize(choice.binarizer, few)
    assert np.isfinite(codes.factor).all()
    assert np.isfinite(codes.offset).all()


def test_learning_from_one_vector_expects_nothing() -> None:
    sample = np.repeat(clustered(1), 100, axis=0)
    rotation = fit_binarizer(sample, config=SIZE, rng=np.random.default_rng(0))
    learned = learn_binarizer(rotation, mine_neighbours(sample, np.random.default_rng(0)).pairs(sample))
    assert all(np.isfinite(array).all() for array in to_tensors(learned).values())
