import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import EncoderConfig
from pipeline.embedding.bisecting import ATTEMPTS, REASONS, check_works, encode_around
from pipeline.embedding.faulty import FaultyEncoder
from pipeline.embedding.hashing import HashingEncoder
from pipeline.errors import ConfigError, EncoderBrokenError, TransientError

SOUND = HashingEncoder(EncoderConfig(model="hashing:32"))
KINDS = {
    "raise": "encoder_error",
    "short": "encoder_error",
    "memory": "out_of_memory",
    "nan": "not_finite",
    "inf": "not_finite",
    "zero": "zero_vector",
}


class Counting:
    def __init__(self, model="hashing:32!faulty"):
        self._encoder = FaultyEncoder(EncoderConfig(model=model))
        self.calls = []

    def __call__(self, texts):
        self.calls.append(len(texts))
        return self._encoder.encode_documents(texts)


def on_others(encode):
    """An encoder that encodes the plain text, and does this to others."""
    return lambda texts: np.ones((1, 4), np.float32) if texts == ["a plain text"] else encode(texts)


def _texts(n, poison):
    return [f"word{i} word{i * 7}" + (f" faulty_{poison[i]}" if i in poison else "") for i in range(n)]


@given(st.data())
def test_exactly_the_poison_is_condemned_and_all_others_get_their_vectors(data):
    n = data.draw(st.integers(1, 200))
    poison = data.draw(st.dictionaries(st.integers(0, n - 1), st.sampled_from(sorted(KINDS)), max_size=12))
    texts = _texts(n, poison)
    encode = Counting()
    vectors, condemned = encode_around(encode, texts, dims=32)
    assert {found.row: found.reason for found in condemned} == {i: KINDS[kind] for i, kind in poison.items()}
    good = [i for i in range(n) if i not in poison]
    assert np.array_equal(vectors[good], SOUND.encode_documents([texts[i] for i in good]))
    assert not vectors[sorted(poison)].any()
    raising = sum(kind in ("raise", "short", "memory") for kind in poison.values())
    assert len(encode.calls) <= ATTEMPTS + 1 + raising * (2 * math.ceil(math.log2(n)) + 2 * ATTEMPTS + 1)


def test_a_text_is_tried_three_times_alone_and_a_vector_that_is_useless_once():
    _, condemned = encode_around(Counting(), _texts(9, {2: "raise", 4: "nan"}), dims=32)
    assert [(found.row, found.attempts) for found in condemned] == [(2, 3), (4, 1)]
    assert condemned[0].error == "RuntimeError: this text was marked to fail"


@pytest.mark.parametrize("times", [1, 2])
def test_a_failure_that_passes_condemns_nothing(times):
    encode = Counting()
    vectors, condemned = encode_around(encode, _texts(20, {3: f"raise_first_{times}"}), dims=32)
    assert condemned == []
    assert encode.calls == [20] * (times + 1)
    assert vectors.any(axis=1).all()


def test_a_failure_of_six_tries_is_healed_while_the_batch_is_halved():
    _, condemned = encode_around(Counting(), _texts(8, {3: "raise_first_6"}), dims=32)
    assert condemned == []


def test_a_batch_that_does_not_fit_in_memory_is_halved_at_once():
    encode = Counting()
    encode_around(encode, _texts(16, {0: "memory_first_1"}), dims=32)
    assert encode.calls == [16, 8, 8]


def test_errors_of_ours_condemn_nothing():
    def lost(_texts):
        raise TransientError("the store", "was away", "try again")

    with pytest.raises(TransientError):
        encode_around(lost, ["a", "b"], dims=4)


def test_vectors_of_another_width_or_kind_are_failures_of_the_encoder():
    odd = {5: np.ones((1, 5), np.float32), 4: np.ones((1, 4), np.int64)}
    for found in odd.values():
        _, condemned = encode_around(on_others(lambda _, found=found: found), ["a"], dims=4)
        assert condemned[0].reason == "encoder_error"
        shape = f"{found.shape} {found.dtype}"
        assert condemned[0].error == f"ValueError: expected (1, 4) floats of the encoder, found {shape}"


def test_addresses_and_length_do_not_make_errors_differ():
    def fail(_texts):
        raise ValueError(f"{object()!r} {'x' * 500}")

    said = {encode_around(on_others(fail), ["a"], dims=4)[1][0].error for _ in range(2)}
    assert len(said) == 1
    assert len(said.pop()) < 250


def test_no_text_gives_no_vector():
    vectors, condemned = encode_around(SOUND.encode_documents, [], dims=32)
    assert (vectors.shape, condemned) == ((0, 32), [])


def test_an_encoder_that_fails_on_a_plain_text_is_to_blame_itself():
    def broken(_texts):
        raise OSError("libcudart.so: cannot open shared object file")

    with pytest.raises(ConfigError, match=r"encoder words: cannot encode 'a plain text': OSError: libcudart"):
        check_works(broken, dims=32, name="words")
    check_works(SOUND.encode_documents, dims=32, name="words")


def test_an_encoder_that_breaks_on_a_text_condemns_neither_it_nor_any_after_it():
    encode = Counting()
    for texts in (_texts(64, {20: "stick"}), _texts(64, {})):
        with pytest.raises(
            EncoderBrokenError, match=r"fails on 'a plain text' too after: RuntimeError: device"
        ):
            encode_around(encode, texts, dims=32)
    assert len(encode.calls) <= 2 * (ATTEMPTS + math.log2(64) + 2 * ATTEMPTS)
    _, condemned = encode_around(Counting(), _texts(64, {}), dims=32)
    assert condemned == []


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_an_encoder_that_gives_useless_vectors_to_everything_condemns_nothing(value):
    with pytest.raises(EncoderBrokenError, match=r"too after: its vector has (NaN|no length)"):
        encode_around(lambda texts: np.full((len(texts), 4), value, np.float32), ["a", "b"], dims=4)


def test_memory_that_others_took_condemns_nothing():
    def exhausted(_texts):
        raise MemoryError

    with pytest.raises(EncoderBrokenError, match="fails on 'a plain text' too after: MemoryError"):
        encode_around(exhausted, ["a", "b", "c"], dims=4)


def test_every_reason_has_a_kind_of_fault_but_the_one_that_kills():
    assert set(KINDS.values()) | {"killed_worker"} == set(REASONS)


def test_the_faulty_encoder_is_the_hashing_one_on_every_other_text(tmp_path):
    faulty = FaultyEncoder(EncoderConfig(model=f"hashing:32!faulty:{tmp_path}"))
    assert faulty.identity.fingerprint == SOUND.identity.fingerprint
    texts = ["some words", "faulty", "raise the flag", "faulty_raiser", "not faulty_raise_first_0"]
    assert np.array_equal(faulty.encode_documents(texts), SOUND.encode_documents(texts))
    assert np.array_equal(faulty.encode_queries(["faulty_raise"]), SOUND.encode_queries(["faulty_raise"]))


def test_the_faulty_encoder_counts_over_processes_in_a_folder(tmp_path):
    config = EncoderConfig(model=f"hashing:32!faulty:{tmp_path}")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            FaultyEncoder(config).encode_documents(["faulty_raise_first_2"])
    assert len(FaultyEncoder(config).encode_documents(["faulty_raise_first_2"])) == 1
