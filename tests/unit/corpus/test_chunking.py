import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.config import ChunkConfig
from pipeline.corpus.chunking import chunk_texts, make_splitter

words = st.sampled_from(
    ["wing", "aerodynamics", "The flow.", "\n\n", "naïve", "日本語の文。", "🛩️", "  ", "x" * 60]
)
texts = st.lists(words, min_size=1, max_size=80).map(" ".join).filter(lambda text: text.strip())


@pytest.fixture(scope="module")
def counted(tokenizer_json):
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def splitter(tokenizer_json):
    return make_splitter(ChunkConfig(max_tokens=16), tokenizer_json)


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(texts, min_size=1, max_size=4))
def test_chunks_are_spans_that_cover_all_but_white_space(batch, splitter, counted):
    chunks = chunk_texts(batch, splitter)
    for i, text in enumerate(batch):
        mine = [chunk for row, chunk in zip(chunks.rows, chunks.texts, strict=True) if row == i]
        assert all(chunk in text for chunk in mine)
        assert "".join("".join(mine).split()) == "".join(text.split())
        assert max(counted(chunk) for chunk in mine) <= 16
    assert chunks.rows.tolist() == sorted(chunks.rows.tolist())


def test_chunks_are_numbered_inside_their_text(splitter):
    chunks = chunk_texts(["short", "one sentence here. " * 20, " also short "], splitter)
    numbers = [
        [int(n) for row, n in zip(chunks.rows, chunks.chunk_no, strict=True) if row == i] for i in range(3)
    ]
    assert (numbers[0], numbers[2]) == ([0], [0])
    assert numbers[1] == list(range(len(numbers[1])))
    assert (chunks.texts[0], chunks.texts[-1]) == ("short", " also short ")


def test_chunks_overlap_by_the_tokens_asked_for(tokenizer_json):
    text = " ".join(f"word{i}" for i in range(200))
    chunks = chunk_texts(
        [text], make_splitter(ChunkConfig(max_tokens=32, overlap_tokens=8), tokenizer_json)
    ).texts
    assert all(set(a.split()) & set(b.split()) for a, b in itertools.pairwise(chunks))


def test_a_tokenizer_that_truncates_still_counts_whole_texts(tokenizer_json, counted):
    cut = json.loads(tokenizer_json) | {
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    }
    chunks = chunk_texts(["wing " * 100], make_splitter(ChunkConfig(max_tokens=16), json.dumps(cut).encode()))
    assert max(counted(chunk) for chunk in chunks.texts) <= 16


def test_no_texts_give_no_chunks(splitter):
    chunks = chunk_texts([], splitter)
    assert (len(chunks.rows), len(chunks.chunk_no), chunks.texts) == (0, 0, [])
