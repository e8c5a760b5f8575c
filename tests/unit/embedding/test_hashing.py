"""The weightless encoder that other tests stand on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import EncoderConfig
from pipeline.embedding.encoder import identify_encoder, load_encoder
from pipeline.embedding.precision import ChosenDtype, choose_dtype
from pipeline.errors import ConfigError

CONFIG = EncoderConfig(model="hashing:64")


def test_shared_words_make_texts_similar() -> None:
    encoder = load_encoder(CONFIG, dtype="float32")
    query, near, far = encoder.encode_documents(["red fox jumps", "the red fox", "quarterly revenue report"])
    assert query @ near > 0.4
    assert abs(query @ far) < 0.4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
def test_vectors_have_unit_length_and_depend_on_nothing_but_the_text(texts: list[str]) -> None:
    encoder = load_encoder(CONFIG, dtype="float32")
    together = encoder.encode_documents(texts)
    alone = np.vstack([encoder.encode_documents([text]) for text in texts])
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)


def test_prompts_change_vectors_and_fingerprint() -> None:
    config = EncoderConfig(model="hashing:64", query_prompt="question ")
    plain, prompted = load_encoder(CONFIG, dtype="float32"), load_encoder(config, dtype="float32")
    assert not np.array_equal(plain.encode_queries(["fox"]), prompted.encode_queries(["fox"]))
    np.testing.assert_array_equal(plain.encode_documents(["fox"]), prompted.encode_documents(["fox"]))
    assert not plain.identity.same_space(prompted.identity)


def test_max_tokens_limits_the_words() -> None:
    encoder = load_encoder(EncoderConfig(model="hashing:64", max_tokens=2), dtype="float32")
    first, second = encoder.encode_documents(["red fox jumps", "red fox sleeps"])
    np.testing.assert_array_equal(first, second)
    assert encoder.num_tokens(["red fox jumps", "red"]).tolist() == [2, 1]


def test_it_is_identified_without_being_loaded() -> None:
    found = identify_encoder(CONFIG, dtype="float32", name="h")
    assert found == load_encoder(CONFIG, dtype="float32", name="h").identity


def test_it_computes_in_float32_whatever_is_configured() -> None:
    config = EncoderConfig(model="hashing:64", dtype="bfloat16")
    assert choose_dtype(config) == ChosenDtype("float32")


@pytest.mark.parametrize("dims", ["", "0", "12", "many"])
def test_a_width_that_is_no_multiple_of_8_is_refused(dims: str) -> None:
    with pytest.raises(ConfigError, match="expected a positive multiple of 8"):
        load_encoder(EncoderConfig(model=f"hashing:{dims}"), dtype="float32")
