"""Codes are progressive: a prefix of the levels, or of the dimensions of each, is a coarser code."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.binarization import (
    binarize,
    decode,
    fit_binarizer,
    rotate_queries,
    score,
    to_tensors,
    truncate_codes,
)
from pipeline.binarization.learning import learn_binarizer, mine_neighbours
from pipeline.binarization.training import start_network
from pipeline.config import BinarizerConfig
from tests.unit.binarization.cases import BINARIZERS
from tests.unit.binarization.test_learning import clustered

WHOLE = (32, 24, 16, 8)


@st.composite
def binarizers_with_a_prefix(draw):
    binarizer = draw(BINARIZERS)
    kept, most = [], binarizer.levels[0] // 8
    for m in binarizer.levels[: draw(st.integers(1, len(binarizer.levels)))]:
        most = draw(st.integers(1, min(most, m // 8)))
        kept.append(8 * most)
    return binarizer, tuple(kept)


@given(drawn=binarizers_with_a_prefix(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_prefix_of_a_code_is_the_code_of_the_truncated_binarizer(drawn, seed: int) -> None:
    binarizer, levels = drawn
    x = np.random.default_rng(seed).standard_normal((5, binarizer.levels[0])).astype(np.float32)
    prefix = truncate_codes(binarize(binarizer, x).code, binarizer.levels, levels)
    truncated = binarizer.truncated(levels)
    assert truncated.code_bytes == prefix.shape[1] == sum(levels) // 8
    assert np.array_equal(binarize(truncated, x).code, prefix)


@given(drawn=binarizers_with_a_prefix(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_the_value_of_a_prefix_is_the_sum_of_the_signs_that_it_keeps(drawn, seed: int) -> None:
    binarizer, levels = drawn
    rng = np.random.default_rng(seed)
    code = rng.integers(0, 256, (4, binarizer.code_bytes), dtype=np.uint8)
    expected = np.zeros((4, levels[0]), np.float32)
    start = 0
    for t, m in enumerate(binarizer.levels[: len(levels)]):
        signs = np.where(np.unpackbits(code[:, start : start + m // 8], axis=1), 1, -1)
        expected[:, : levels[t]] += (signs * binarizer.level_weights[t])[:, : levels[t]]
        start += m // 8
    prefix = truncate_codes(code, binarizer.levels, levels)
    np.testing.assert_allclose(decode(binarizer.truncated(levels), prefix), expected, rtol=1e-5, atol=1e-6)


def fitted(kind: str, sample: np.ndarray):
    rotation = fit_binarizer(sample, config=BinarizerConfig(levels=WHOLE), rng=np.random.default_rng(0))
    if kind == "rotation":
        return rotation
    learned = learn_binarizer(rotation, mine_neighbours(sample, np.random.default_rng(1)).pairs(sample))
    if kind == "learned":
        return learned
    return start_network(learned, sample, hidden=0, rng=np.random.default_rng(2))


@pytest.mark.parametrize("kind", ["rotation", "learned", "recurrent"])
@pytest.mark.parametrize(
    "ladder",
    [
        [(32,), (32, 24), (32, 24, 16), WHOLE],
        [(8,) * 4, (16, 16, 16, 8), (24, 24, 16, 8), WHOLE],
    ],
    ids=["levels", "dimensions"],
)
def test_each_longer_prefix_finds_more(kind: str, ladder: list[tuple[int, ...]]) -> None:
    everything = clustered(2300)
    sample, queries = everything[:2000], everything[2000:]
    binarizer = fitted(kind, sample)
    codes = binarize(binarizer, sample)
    exact = np.argsort(-(queries @ sample.T), axis=1)[:, :10]
    recalls = []
    for levels in ladder:
        truncated = binarizer.truncated(levels)
        code = truncate_codes(codes.code, WHOLE, levels)
        scores = score(truncated, rotate_queries(truncated, queries), code, codes.factor, codes.offset)
        found = np.argsort(-scores, axis=1)[:, :10]
        recalls.append(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]))
    assert recalls == sorted(recalls)
    assert recalls[0] > 0.15
    assert recalls[-1] > recalls[0] + 0.15


@pytest.mark.parametrize("levels", [(), (40, 8), (32, 24, 24), (12,), (16, 24), (8,) * 5])
def test_what_is_no_prefix_is_refused(levels: tuple[int, ...]) -> None:
    sample = clustered(100)
    binarizer = fit_binarizer(sample, config=BinarizerConfig(levels=WHOLE), rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="expected a prefix of levels"):
        binarizer.truncated(levels)
    with pytest.raises(ValueError, match="expected a prefix of levels"):
        truncate_codes(binarize(binarizer, sample).code, WHOLE, levels)


def test_codes_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(n, 10\) codes"):
        truncate_codes(np.zeros((2, 9), np.uint8), WHOLE, (8,))


def test_a_truncated_binarizer_is_not_stored() -> None:
    binarizer = fit_binarizer(
        clustered(100), config=BinarizerConfig(levels=WHOLE), rng=np.random.default_rng(0)
    )
    with pytest.raises(ValueError, match="store the whole one"):
        to_tensors(binarizer.truncated((32,)))
