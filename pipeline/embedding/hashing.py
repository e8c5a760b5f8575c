"""A weightless encoder for tests and dry runs, selected by `model: hashing:<dims>`.

Each word is a fixed ±1 vector made of its hash; a text is the sum of its words, scaled to unit length. Texts that
share words have a high cosine, others one near 0. The sum is of small integers, so it is exact in any order.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config import EncoderConfig
from pipeline.errors import ConfigError
from pipeline.spaces.fingerprint import EncoderIdentity, hashing_identity

__all__ = ["FAULTY_MARK", "HASHING_PREFIX", "HashingEncoder", "hashing_dims"]

HASHING_PREFIX = "hashing:"
FAULTY_MARK = "!faulty"
"""Ends the width where the encoder is to fail on marked texts: see `faulty`."""
WORD = re.compile(r"\w+")


def hashing_dims(source: str) -> int:
    """Width named by `hashing:<dims>`, with or without the mark of the faulty one.

    Raises:
        ConfigError: It is not a positive multiple of 8.
    """
    text = source.removeprefix(HASHING_PREFIX).partition(FAULTY_MARK)[0]
    if not text.isdecimal() or int(text) < 1 or int(text) % 8:
        raise ConfigError(f"model: {source}", "expected a positive multiple of 8", "for example hashing:64")
    return int(text)


class HashingEncoder:
    """Word overlap as cosine; for tests and dry runs, never for a release that people search.

    Args:
        config: An encoder whose model is `hashing:<dims>`; `max_tokens` limits the words of a text.
        name: Name of the encoder in the configuration.
    """

    def __init__(self, config: EncoderConfig, *, name: str = "hashing") -> None:
        self._config = config
        self._dims = hashing_dims(config.model)
        self.identity: EncoderIdentity = hashing_identity(config, self._dims, name=name)

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Turn n texts into (n, d) float32 of unit length."""
        return self._encode([self._config.document_prompt + text for text in texts])

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Turn n queries into (n, d) float32 of unit length."""
        return self._encode([self._config.query_prompt + text for text in texts])

    def num_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(n,) words of each text that count, prompt left out."""
        return np.array([len(self._words(text)) for text in texts], dtype=np.int64)

    def _words(self, text: str) -> list[str]:
        return WORD.findall(text.lower())[: self._config.max_tokens]

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        # sums: (n, d); a text without words, or whose words cancel, becomes the empty word
        sums = np.zeros((len(texts), self._dims), dtype=np.int64)
        memo: dict[str, NDArray[np.int64]] = {}
        for row, text in enumerate(texts):
            for word in self._words(text) or [""]:
                if word not in memo:
                    memo[word] = _signs(word, self._dims)
                sums[row] += memo[word]
        sums[~sums.any(axis=1)] = _signs("", self._dims)
        lengths = np.sqrt((sums * sums).sum(axis=1, keepdims=True).astype(np.float64))
        return (sums / lengths).astype(np.float32)


def _signs(word: str, dims: int) -> NDArray[np.int64]:
    """(d,) of ±1 from the word's hash."""
    digest = hashlib.shake_256(word.encode()).digest(dims // 8)
    return np.unpackbits(np.frombuffer(digest, dtype=np.uint8)).astype(np.int64) * 2 - 1
