"""Which number format the transformer computes in: decided once for a root, since it is part of the fingerprint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from pipeline.config import EncoderConfig, StorageConfig
from pipeline.embedding.encoder import load_encoder
from pipeline.embedding.hashing import HASHING_PREFIX
from pipeline.embedding.model import Dtype, pick_device
from pipeline.embedding.model_source import resolve_model
from pipeline.spaces.fingerprint import has_transformer

__all__ = ["SAMPLE_TEXTS", "ChosenDtype", "choose_dtype", "computes_bfloat16", "settled_dtype"]

MIN_COSINE = 0.99
MEAN_COSINE = 0.999
"""Agreement with float32 that bfloat16 must reach over the sample: its worst text and its mean."""

SENTENCES = (
    "Vitamin D.",
    "Parse and validate e-mail addresses.",
    "How do I reset a forgotten password?",
    "A buffer overflow in the TLS parser allows remote attackers to execute arbitrary code via a crafted record.",
    "The committee postponed its decision until the spring, citing three studies that had not been reviewed.",
    "Statins lowered LDL cholesterol by 38% (95% CI 35-41) in 1,204 patients followed for 18 months.",
    "def merge(left, right): return sorted(left + right, key=lambda item: item.rank)",
    "Der Zug nach München fährt heute von Gleis 7 ab.",
    "La fonction renvoie une erreur lorsque le fichier est vide.",
    "boundary-layer transition on a flat plate at mach 5.8",
    "a small, usually nocturnal mammal with large ears and a bushy tail",
    "Supports sqlite>=3.35, PostgreSQL 12-17; see https://example.org/docs?page=2#install.",
    "ERROR 2024-05-17T09:31:02Z worker-14 retry=3 timeout after 30000ms",
    "She sold her share of the vineyard and moved to the coast, where nobody asked about the war.",
    "The enzyme is inhibited by zinc ions at neutral pH but recovers its activity when EDTA is added.",
    "Quarterly revenue rose 4.2 percent, less than analysts had expected, while margins held steady.",
)


def _sample() -> tuple[str, ...]:
    """Each sentence alone, then runs of 3 and of 12: from a few tokens to several hundred."""
    ring = SENTENCES * 2
    runs = [" ".join(ring[i : i + n]) for n in (3, 12) for i in range(0, len(SENTENCES), 2)]
    return (*SENTENCES, *runs)


SAMPLE_TEXTS = _sample()
"""32 texts of varied kind and length; what `choose_dtype` measures on where the caller brings none."""


@dataclass(frozen=True)
class ChosenDtype:
    """A number format, and what spoke for or against bfloat16."""

    dtype: Dtype
    min_cosine: float | None = None
    """Smallest cosine of a bfloat16 vector to its float32 twin; None: not measured, since there was no choice."""
    mean_cosine: float | None = None
    """Mean of the same."""


def choose_dtype(
    config: EncoderConfig,
    sample_texts: Sequence[str] = SAMPLE_TEXTS,
    *,
    device: str | None = None,
    threads: int | None = None,
    storage: StorageConfig | None = None,
) -> ChosenDtype:
    """Decide what a model computes in: as configured, or bfloat16 if it is fast here and agrees with float32.

    Args:
        config: The encoder.
        sample_texts: Texts to compare on, at least one.
        device: Where the encoders of the run will work; absent: a GPU if there is one.
        threads: As in `load_encoder`.
        storage: S3 settings for models on S3.

    Returns:
        float32 for models without a transformer, whatever is configured: they compute in nothing else.

    Raises:
        ConfigError: The model cannot be found or may not be loaded.
        StorageUnavailableError: The model could not be fetched now.
    """
    settled = settled_dtype(config, storage)
    if settled is not None:
        return settled
    if not computes_bfloat16(device or pick_device()):
        return ChosenDtype("float32")
    dtypes: tuple[Dtype, Dtype] = ("float32", "bfloat16")
    exact, rounded = (
        load_encoder(config, dtype=dtype, device=device, threads=threads, storage=storage) for dtype in dtypes
    )
    cosines = _cosines(exact.encode_documents(sample_texts), rounded.encode_documents(sample_texts))
    least, mean = float(cosines.min()), float(cosines.mean())
    agrees = least >= MIN_COSINE and mean >= MEAN_COSINE
    return ChosenDtype("bfloat16" if agrees else "float32", least, mean)


def settled_dtype(config: EncoderConfig, storage: StorageConfig | None = None) -> ChosenDtype | None:
    """What an encoder computes in where there is nothing to try; None where there is. Loads neither torch nor the model.

    Raises:
        ConfigError: The model cannot be found or may not be loaded.
        StorageUnavailableError: The model could not be fetched now.
    """
    if not _has_transformer(config, storage):
        return ChosenDtype("float32")
    return ChosenDtype(config.dtype) if config.dtype != "auto" else None


def computes_bfloat16(device: str) -> bool:
    """Whether the processor has bfloat16 instructions; emulation does not count."""
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = torch.cpu.get_capabilities()
    return device == "cpu" and any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def _has_transformer(config: EncoderConfig, storage: StorageConfig | None) -> bool:
    if config.model.startswith(HASHING_PREFIX):
        return False
    return has_transformer(
        resolve_model(config.model, trust_remote_code=config.trust_remote_code, storage=storage)
    )


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n,) cosines of the rows of two (n, d) matrices of unit rows; NaN, which fails every bound, where one is not."""
    return cast("NDArray[np.float64]", np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64)))
