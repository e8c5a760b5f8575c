import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.binarization import choose_levels
from pipeline.binarization.levels import levels_of
from pipeline.config import BinarizerConfig
from pipeline.errors import ConfigError


@given(dims=st.integers(8, 130), share=st.floats(0, 1), decay=st.floats(0, 3))
@settings(deadline=None, max_examples=80)
def test_every_size_in_reach_is_met_exactly(dims: int, share: float, decay: float) -> None:
    largest = dims // 8 * 8
    code_bytes = max(1, round(share * largest))
    levels = choose_levels(np.arange(1, dims + 1) ** -decay, code_bytes)
    assert sum(levels) == 8 * code_bytes
    assert list(levels) == sorted(levels, reverse=True)
    assert all(m % 8 == 0 and 0 < m <= dims for m in levels)
    assert len(levels) <= 8


def test_a_flat_spectrum_gets_even_levels() -> None:
    assert choose_levels(np.ones(64), 16) == (64, 64)


def test_a_steep_spectrum_gets_deep_levels_in_front() -> None:
    levels = choose_levels(np.repeat([1.0, 0.01], 32), 16)
    assert levels[0] < 64
    assert len(levels) > 2


def test_directions_without_variance_come_last() -> None:
    assert choose_levels(np.repeat([1.0, 0.0], 32), 32) == (32,) * 8


@pytest.mark.parametrize("code_bytes", [0, 25, 97])
def test_a_size_out_of_reach_names_the_sizes_in_reach(code_bytes: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"binarizer.bytes: no code of {code_bytes} bytes for 30 dimensions; give 1 to 24"
    ):
        choose_levels(np.ones(30), code_bytes)


def test_too_narrow_vectors_are_named() -> None:
    with pytest.raises(ConfigError, match="vectors need at least 8 dimensions"):
        choose_levels(np.ones(7), 1)


@pytest.mark.parametrize(
    ("config", "dims", "levels"),
    [
        (BinarizerConfig(bits_per_dim=2), 64, (64, 64)),
        (BinarizerConfig(bits_per_dim=3), 30, (24, 24, 24)),
        (BinarizerConfig(levels=(32, 16, 16)), 40, (32, 16, 16)),
        (BinarizerConfig(levels=(64, 64, 32)), 40, (64, 64, 32)),
        (BinarizerConfig(bytes=16), 16, (16,) * 8),
        (BinarizerConfig(), 16, (16,) * 8),
    ],
)
def test_configured_levels(config: BinarizerConfig, dims: int, levels: tuple[int, ...]) -> None:
    assert levels_of(config, np.ones(dims)) == levels


@pytest.mark.parametrize(
    ("dims", "code_bytes"), [(8, 8), (30, 24), (44, 40), (100, 48), (384, 48), (1024, 128)]
)
def test_a_bit_for_each_dimension_and_more_of_narrow_vectors_is_the_default(
    dims: int, code_bytes: int
) -> None:
    assert sum(levels_of(BinarizerConfig(), np.ones(dims))) == code_bytes * 8


@pytest.mark.parametrize(
    ("config", "dims", "message"),
    [
        (
            BinarizerConfig(levels=(64, 48)),
            44,
            r"binarizer.levels: vectors of 44 dimensions cannot fill \(64, 48\); give a first level of at most 352",
        ),
        (BinarizerConfig(levels=(360,)), 44, r"cannot fill \(360,\)"),
        (BinarizerConfig(levels=(8,) * 9), 16, "expected at most 8 levels, found 9"),
        (BinarizerConfig(bits_per_dim=1), 7, "binarizer.bits_per_dim: found vectors of 7 dimensions"),
        (BinarizerConfig(), 7, "vectors need at least 8 dimensions"),
    ],
)
def test_what_the_vectors_cannot_give_is_refused(config: BinarizerConfig, dims: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        levels_of(config, np.ones(dims))
