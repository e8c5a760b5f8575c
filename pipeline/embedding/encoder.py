"""Encoders: texts to float32 vectors of unit length, each a function of its text alone.

What the pipeline holds and passes around: identities, documents against queries, prompts. `model` runs one loaded
model, `batching` says how texts share a batch, `model_source` where models come from, `precision` which number format
is good enough, `hashing` is the weightless twin for tests and `faulty` the one that fails on demand. Nothing here
imports torch before a model is loaded.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.config import EncoderConfig, StorageConfig
from pipeline.embedding.faulty import FaultyEncoder
from pipeline.embedding.hashing import FAULTY_MARK, HASHING_PREFIX, HashingEncoder, hashing_dims
from pipeline.embedding.model import BATCH_TOKENS, Dtype, LoadedModel, pick_device
from pipeline.embedding.model_source import resolve_model
from pipeline.errors import ConfigError
from pipeline.spaces.fingerprint import (
    EncoderIdentity,
    hashing_identity,
    identify_folder,
)

__all__ = [
    "Dtype",
    "Encoder",
    "TextEncoder",
    "identify_encoder",
    "load_encoder",
    "pick_device",
]


class TextEncoder(Protocol):
    """What the rest of the pipeline asks of an encoder."""

    @property
    def identity(self) -> EncoderIdentity:
        """Fingerprint and readable description."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Turn n texts into (n, d) float32 of unit length, in the order given."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Turn n queries into (n, d) float32 of unit length, in the order given."""
        ...

    def num_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(n,) tokens of each text as it is encoded, without its prompt, after truncation."""
        ...


def identify_encoder(
    config: EncoderConfig, *, dtype: Dtype, name: str | None = None, storage: StorageConfig | None = None
) -> EncoderIdentity:
    """Identity of an encoder without loading it; equals `load_encoder(…).identity`.

    Args:
        config: The encoder.
        dtype: What the transformer computes in, as decided; not looked at where there is no transformer.
        name: Name of the encoder in the configuration; absent: the model source.
        storage: S3 settings for models on S3.

    Raises:
        ConfigError: The model cannot be found or may not be loaded.
        StorageUnavailableError: The model could not be fetched now.
    """
    if config.model.startswith(HASHING_PREFIX):
        return hashing_identity(config, hashing_dims(config.model), name=name or config.model)
    folder = _folder(config, config.model, storage)
    query_folder = _folder(config, config.query_model, storage) if config.query_model else None
    return identify_folder(config, folder, name=name or config.model, dtype=dtype, query_folder=query_folder)


def load_encoder(
    config: EncoderConfig,
    *,
    dtype: Dtype,
    name: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    storage: StorageConfig | None = None,
) -> TextEncoder:
    """Load an encoder to work with for a long time.

    Args:
        config: The encoder.
        dtype: What the transformer computes in, decided once for a root by `precision.choose_dtype`.
        name: Name of the encoder in the configuration; absent: the model source.
        device: `cpu`, `cuda`, `cuda:0`, …; absent: a GPU if there is one.
        threads: CPU threads of torch in this process from now on; absent: left as they are.
        batch_tokens: Tokens of one batch, padding counted.
        storage: S3 settings for models on S3.

    Raises:
        ConfigError: The model cannot be found or may not be loaded.
        StorageUnavailableError: The model could not be fetched now.
    """
    if config.model.startswith(HASHING_PREFIX):
        kind = FaultyEncoder if FAULTY_MARK in config.model else HashingEncoder
        return kind(config, name=name or config.model)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    identity = identify_encoder(config, dtype=dtype, name=name, storage=storage)
    encoder = Encoder(config, identity, device=device, batch_tokens=batch_tokens, storage=storage)
    encoder.load_documents()
    return encoder


class Encoder:
    """A sentence-transformers model, and a second one for queries if the configuration names it.

    Each is loaded when first used: an actor that embeds documents never holds the query encoder.

    Args:
        config: Models and prompts.
        identity: What the encoder is.
        device: As in `load_encoder`.
        batch_tokens: As in `load_encoder`.
        storage: As in `load_encoder`.
    """

    def __init__(
        self,
        config: EncoderConfig,
        identity: EncoderIdentity,
        *,
        device: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
        storage: StorageConfig | None = None,
    ) -> None:
        self.identity = identity
        self._config = config
        self._device = device or pick_device()
        self._batch_tokens = batch_tokens
        self._storage = storage

    @functools.cached_property
    def _documents(self) -> LoadedModel:
        return self._load(self._config.model)

    @functools.cached_property
    def _queries(self) -> LoadedModel:
        return self._load(self._config.query_model) if self._config.query_model else self._documents

    def _load(self, source: str) -> LoadedModel:
        folder = _folder(self._config, source, self._storage)
        model = LoadedModel(
            folder,
            config=self._config,
            dtype=self.identity.dtype,
            device=self._device,
            batch_tokens=self._batch_tokens,
        )
        if model.dims != self.identity.dims:
            problem = f"its files state {self.identity.dims} dimensions, it makes {model.dims}"
            raise ConfigError(f"model: {source}", problem, "use another model")
        return model

    def load_documents(self) -> None:
        """Load the document model now rather than at the first text."""
        _ = self._documents

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Turn n texts into (n, d) float32 of unit length, in the order given; a text without any token gives zeros."""
        return self._documents.encode(texts, self._config.document_prompt)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Turn n queries into (n, d) float32 of unit length, in the order given; a text without any token gives zeros."""
        return self._queries.encode(texts, self._config.query_prompt)

    def num_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(n,) tokens of each document as it is encoded, without its prompt, after truncation."""
        return self._documents.num_tokens(texts)


def _folder(config: EncoderConfig, source: str, storage: StorageConfig | None) -> Path:
    return resolve_model(source, trust_remote_code=config.trust_remote_code, storage=storage)
