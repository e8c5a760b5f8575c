"""One loaded sentence-transformers model: padded batches in, unit vectors out.

The transformer runs in float32 or bfloat16; pooling, projection and normalization are float32.

On a CPU nothing but the text shapes the bytes of a vector (measured: see `batching`). On a GPU every batch of one
length has the same number of rows, since kernels are chosen by the shape; that this suffices is not measured. There
the bytes also depend on the kind of GPU and on `batch_tokens`.
"""

import contextlib
import logging
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from pipeline.config import EncoderConfig
from pipeline.embedding.batching import Batch, halves, pad_features, plan_batches
from pipeline.embedding.bisecting import is_out_of_memory
from pipeline.errors import CorruptArtifactError

__all__ = ["BATCH_TOKENS", "Dtype", "LoadedModel", "pick_device"]

Dtype = Literal["float32", "bfloat16"]

BATCH_TOKENS = 4096
"""MiniLM on one core: 1,024 to 16,384 differ by less than 10 %; long texts are slowest at 16,384 (2026-11-21)."""

STATIC_TEXTS = 4096
"""Texts of one batch of a model without a transformer."""


def pick_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class LoadedModel:
    """A model in memory.

    Three ways to run it, by what its first module is: a transformer with a fast tokenizer in length buckets; a static
    embedding in one float32 pass, whose sums are per text anyway; anything else one text at a time, slow and safe.

    Args:
        folder: The model's folder, checked by `model_source`.
        config: Token limit; whether code of the model may run.
        dtype: What the transformer computes in.
        device: Where it works.
        batch_tokens: Tokens of one batch, padding counted.

    Raises:
        CorruptArtifactError: The files make no model.
    """

    def __init__(
        self, folder: Path, *, config: EncoderConfig, dtype: Dtype, device: str, batch_tokens: int
    ) -> None:
        try:
            with _quiet():
                self._model = _load_model(folder, config, dtype, device)
        except (OSError, ValueError, SafetensorError) as error:
            problem = f"cannot be loaded ({' '.join(str(error).split())})"
            raise CorruptArtifactError(str(folder), problem, "fetch the model again") from error
        self.dims = int(self._model.get_embedding_dimension())
        self._device = device
        self._batch_tokens = batch_tokens
        self._first = self._model[0]
        self._static = type(self._first).__name__ == "StaticEmbedding"
        self._bucketed = _is_plain_transformer(self._first)
        self._positions = _token_limit(self._first) if self._bucketed else None
        self._max_tokens = _smaller(config.max_tokens, self._positions)
        if not self._bucketed:
            _limit_tokens(self._model, config.max_tokens)

    def encode(self, texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
        """Turn n texts, each behind the prompt, into (n, d) float32 of unit length."""
        import torch

        vectors = np.zeros((len(texts), self.dims), dtype=np.float32)
        run = self._run_buckets if self._bucketed else self._run_pieces
        with torch.inference_mode():
            for rows, embedding in run([prompt + text for text in texts], prompt):
                unit = torch.nn.functional.normalize(embedding.float(), dim=1)
                vectors[rows] = unit[: len(rows)].cpu().numpy()
        return vectors

    def num_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(n,) tokens of each text after truncation."""
        if self._bucketed:
            return _lengths(self._tokenize(list(texts)))
        features = [self._model.preprocess([text])["input_ids"] for text in texts]
        return np.array([ids.shape[-1] for ids in features], dtype=np.int64)

    def _run_buckets(self, texts: list[str], prompt: str) -> Iterator[tuple[NDArray[np.intp], Any]]:
        encodings = self._tokenize(texts)
        tokenizer = self._first.tokenizer
        fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        left = tokenizer.padding_side == "left"
        waiting = deque(self._batches(_lengths(encodings)))
        while waiting:
            batch = waiting.popleft()
            features = pad_features(encodings, batch, fill, left=left)
            try:
                embedding = self._forward(self._tensors(features, prompt))
            except (MemoryError, RuntimeError) as error:
                if batch.size == 1 or not is_out_of_memory(error):
                    raise
                # Other work shares the device: what fits today may be less than `batch_tokens` says.
                waiting.extendleft(reversed(halves(batch)))
                continue
            yield batch.rows, embedding

    def _batches(self, lengths: NDArray[np.int64]) -> Iterator[Batch]:
        return plan_batches(
            lengths, longest=self._positions, batch_tokens=self._batch_tokens, whole=self._device != "cpu"
        )

    def _run_pieces(self, texts: list[str], prompt: str) -> Iterator[tuple[NDArray[np.intp], Any]]:
        size = STATIC_TEXTS if self._static else 1
        for start in range(0, len(texts), size):
            piece = texts[start : start + size]
            features = self._model.preprocess(piece)
            tensors = {key: self._move(value) for key, value in features.items()}
            yield np.arange(start, start + len(piece)), self._forward(self._with_prompt(tensors, prompt))

    def _tokenize(self, texts: list[str]) -> dict[str, list[list[int]]]:
        if not texts:  # transformers asks for one at least
            return {"input_ids": []}
        with _serial_tokenizer():
            found = self._first.tokenizer(
                texts, truncation=self._max_tokens is not None, max_length=self._max_tokens, padding=False
            )
        return dict(found)

    def _tensors(self, features: dict[str, NDArray[np.int64]], prompt: str) -> dict[str, Any]:
        import torch

        tensors = {key: self._move(torch.from_numpy(matrix)) for key, matrix in features.items()}
        return self._with_prompt(tensors, prompt)

    def _with_prompt(self, features: dict[str, Any], prompt: str) -> dict[str, Any]:
        """Add the prompt's length, which a pooling that leaves the prompt out asks for."""
        leaves_out = any(getattr(module, "include_prompt", True) is False for module in self._model)
        return (
            {**features, "prompt_length": self._prompt_tokens(prompt)} if prompt and leaves_out else features
        )

    def _prompt_tokens(self, prompt: str) -> int:
        """Tokens in front of the text: a special token at the end does not count."""
        ids = self._first.tokenizer(prompt)["input_ids"]
        return len(ids) - (ids[-1] in self._first.tokenizer.all_special_ids)

    def _move(self, value: Any) -> Any:
        return value.to(self._device) if hasattr(value, "to") else value

    def _forward(self, features: dict[str, Any]) -> Any:
        """Run all modules, the first in its own dtype and the others in float32; returns (rows, d)."""
        features = _as_float32(self._first(features))
        for module in list(self._model)[1:]:
            features = module(features)
        return features["sentence_embedding"]


# ---------------------------------------------------------------------------------------------------- loading


def _load_model(folder: Path, config: EncoderConfig, dtype: Dtype, device: str) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder),
        device=device,
        local_files_only=True,
        trust_remote_code=config.trust_remote_code,
        model_kwargs={"dtype": getattr(torch, dtype), "use_safetensors": True},
    )
    for module in list(model)[1:]:
        module.float()
    return model.eval()


def _is_plain_transformer(module: Any) -> bool:
    """Whether bucketing by our own tokens gives what the module's own preprocessing would."""
    if type(module).__name__ != "Transformer" or "text" not in module.modality_config:
        return False
    special = (module.processing_kwargs, module.query_length, module.document_length, module.query_expansion)
    tokenizer = module.tokenizer
    fast = tokenizer is not None and tokenizer.is_fast and tokenizer.pad_token_id is not None
    return fast and not any(special) and module.modality_config["text"]["method"] == "forward"


def _token_limit(module: Any) -> int | None:
    limit = module.max_seq_length
    return int(limit) if limit is not None and limit < np.iinfo(np.int32).max else None


def _smaller(first: int | None, second: int | None) -> int | None:
    return min((limit for limit in (first, second) if limit is not None), default=None)


def _limit_tokens(model: Any, max_tokens: int | None) -> None:
    if max_tokens is None:
        return
    if hasattr(model[0].tokenizer, "enable_truncation"):
        model[0].tokenizer.enable_truncation(max_tokens)
    else:
        model.max_seq_length = min(max_tokens, model.max_seq_length or max_tokens)


def _lengths(encodings: dict[str, list[list[int]]]) -> NDArray[np.int64]:
    return np.fromiter(map(len, encodings["input_ids"]), dtype=np.int64)


def _as_float32(features: dict[str, Any]) -> dict[str, Any]:
    """All floating tensors, also those in lists of layers, as float32."""
    import torch

    def cast(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(cast(item) for item in value)
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.float() if floating else value

    return {key: cast(value) for key, value in features.items()}


@contextlib.contextmanager
def _serial_tokenizer() -> Iterator[None]:
    """No thread pool for tokenizing inside: it takes 2 % of the time, and a pool per actor would claim every core."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, notices or warnings of the model libraries inside; as it was outside."""
    from transformers.utils import logging as transformers_logging

    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    own = logging.getLogger("sentence_transformers")
    own_level = own.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    own.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.setLevel(own_level)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
