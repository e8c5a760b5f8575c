"""Long documents cut by the encoder's own tokens, at the largest semantic borders that fit."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from semantic_text_splitter import TextSplitter

from pipeline.config import ChunkConfig
from pipeline.errors import CorruptArtifactError

__all__ = ["Chunks", "chunk_texts", "make_splitter"]


class Chunks(NamedTuple):
    """Chunks of several texts, in the order of the texts."""

    rows: NDArray[np.int64]
    """(m,) text that each chunk was cut from."""
    chunk_no: NDArray[np.int32]
    """(m,) number inside its text, from 0."""
    texts: list[str]
    """(m,) the chunks."""


def make_splitter(chunk: ChunkConfig, tokenizer_json: bytes) -> TextSplitter:
    """A splitter that counts tokens as the encoder does, special tokens left out.

    Args:
        chunk: Size and overlap, in tokens.
        tokenizer_json: Content of the encoder's `tokenizer.json`.

    Raises:
        CorruptArtifactError: The bytes are not a Hugging Face tokenizer.
    """
    try:
        tokenizer = json.loads(tokenizer_json)
        # Models ship with truncation and padding to their own length: every long text would count as that many tokens.
        tokenizer |= {"truncation": None, "padding": None}
        return TextSplitter.from_huggingface_tokenizer_str(
            json.dumps(tokenizer), chunk.max_tokens, overlap=chunk.overlap_tokens
        )
    except Exception as error:
        # The Rust library raises plain Exception; `from` keeps a programming error in view.
        problem = f"is not a Hugging Face tokenizer ({error})"
        raise CorruptArtifactError(
            "tokenizer.json", problem, "use an encoder with a fast tokenizer"
        ) from error


def chunk_texts(texts: Sequence[str], splitter: TextSplitter) -> Chunks:
    """Cut each text; a text that fits stays as it is, as its chunk 0.

    Args:
        texts: (n,) texts, each with a character that is not white space.
        splitter: From `make_splitter`.

    Returns:
        At least one chunk per text. A chunk is a span of its text; together they hold all but white space at borders.
    """
    pieces = [
        found if len(found) > 1 else [text]
        for text, found in zip(texts, splitter.chunk_all(texts), strict=True)
    ]
    counts = np.array([len(found) for found in pieces], dtype=np.int64)
    ends = np.cumsum(counts)
    rows = np.repeat(np.arange(len(pieces), dtype=np.int64), counts)
    chunk_no = (np.arange(len(rows)) - np.repeat(ends - counts, counts)).astype(np.int32)
    return Chunks(rows, chunk_no, [chunk for found in pieces for chunk in found])
