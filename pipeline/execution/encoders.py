"""Which encoder is in force: found, fingerprinted, its number format decided once per root."""

import hashlib
import json
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import cast

from pipeline.artifacts import IndexManifest, Plan
from pipeline.config import Config, EmbeddingConfig, EncoderConfig, StorageConfig
from pipeline.embedding.encoder import Dtype, TextEncoder, identify_encoder, load_encoder
from pipeline.embedding.model_source import resolve_model, tokenizer_file
from pipeline.embedding.precision import ChosenDtype, choose_dtype, settled_dtype
from pipeline.errors import ConfigError, EncoderBrokenError, MissingFileError
from pipeline.index.reader import check_query_encoder
from pipeline.spaces import EncoderIdentity, given_identity
from pipeline.storage import Store, canonical_json

__all__ = [
    "GIVEN",
    "EncoderInForce",
    "EncoderSpec",
    "check_encoder_of_queries",
    "encoder_in_force",
    "named_encoder",
    "query_encoder_for",
]

GIVEN = "given"
"""Model of an identity whose vectors came with the corpus."""


@dataclass(frozen=True)
class EncoderSpec:
    """How a worker loads the encoder in force."""

    name: str
    config: EncoderConfig
    dtype: Dtype
    embedding: EmbeddingConfig
    storage: StorageConfig


@dataclass(frozen=True)
class EncoderInForce:
    """The space of the run's vectors, and how workers load what makes them."""

    space: EncoderIdentity
    spec: EncoderSpec | None
    """None where vectors are ready-made and no encoder is configured for text queries."""
    query_fingerprint: str
    """Names what encodes text queries: the space, unless vectors are ready-made and queries are not."""
    tokenizer_json: bytes | None
    """For chunking; None where nothing is cut."""

    @property
    def fingerprint(self) -> str:
        """Names the space."""
        return self.space.fingerprint

    @property
    def dims(self) -> int:
        """Width of the vectors."""
        return self.space.dims

    @property
    def label(self) -> str:
        """For people."""
        return "ready-made vectors" if self.ready_made else f"{self.space.name} ({self.space.dtype})"

    @property
    def ready_made(self) -> bool:
        """Whether the vectors came with the corpus."""
        return self.space.model == GIVEN

    @property
    def tokenizer_hash(self) -> str | None:
        """Content hash of the tokenizer that cuts documents."""
        return hashlib.sha256(self.tokenizer_json).hexdigest() if self.tokenizer_json is not None else None

    @property
    def identity(self) -> dict[str, object]:
        """For the manifest."""
        return self.space.model_dump(mode="json")

    @property
    def settings(self) -> dict[str, object] | None:
        """For the manifest: what a reader needs to encode text queries."""
        return self.spec.config.model_dump(mode="json") if self.spec is not None else None


def encoder_in_force(store: Store, config: Config, plan: Plan, *, remember: bool = True) -> EncoderInForce:
    """Find the encoder of a run and fingerprint it.

    Args:
        store: The root.
        config: Names the encoder.
        plan: Says whether vectors are ready-made.
        remember: Record the number format that was decided, for later runs.

    Raises:
        ConfigError: The model cannot be found or may not be loaded.
    """
    if plan.embedding_dims is None and config.encoder_name is None:
        raise ConfigError("encoder", "names no encoder", "name one of `encoders`")
    spec = _spec(store, config, config.encoder_name, remember=remember) if config.encoder_name else None
    made = (
        identify_encoder(spec.config, dtype=spec.dtype, name=spec.name, storage=config.storage)
        if spec
        else None
    )
    if plan.embedding_dims is not None:
        # Whoever made the vectors knows what made them: their name is the corpus's, its column's and their width.
        space = given_identity(f"{config.corpus.identity}:{config.corpus.embedding}", plan.embedding_dims)
        return EncoderInForce(space, spec, made.fingerprint if made else "", None)
    assert spec is not None  # noqa: S101  (an encoder is named, or the first lines refuse)
    assert made is not None  # noqa: S101
    return EncoderInForce(made, spec, made.fingerprint, _tokenizer(config, spec.config))


def named_encoder(store: Store, config: Config, name: str) -> EncoderInForce:
    """Find a configured encoder of texts and fingerprint it.

    Args:
        store: The root.
        config: Names the encoders.
        name: Of this one.

    Raises:
        ConfigError: There is none of that name, or its model cannot be found or may not be loaded.
    """
    if name not in config.encoders:
        known = ", ".join(sorted(config.encoders)) or "none"
        raise ConfigError(f"encoder {name}", f"is not among `encoders` (known: {known})", "configure it")
    spec = _spec(store, config, name, remember=True)
    made = identify_encoder(spec.config, dtype=spec.dtype, name=name, storage=config.storage)
    return EncoderInForce(made, spec, made.fingerprint, None)


def _spec(store: Store, config: Config, name: str, *, remember: bool) -> EncoderSpec:
    encoder = config.encoders[name]
    dtype = _decided_dtype(store, config, encoder, name, remember=remember)
    return EncoderSpec(name, encoder, dtype, config.embedding, config.storage)


def _decided_dtype(
    store: Store, config: Config, encoder: EncoderConfig, name: str, *, remember: bool
) -> Dtype:
    """The number format that the first run on this root decided; another processor tonight must not change it."""
    if encoder.dtype != "auto":
        return encoder.dtype
    # The float32 fingerprint stands for the model itself, whatever it is going to compute in.
    model = identify_encoder(encoder, dtype="float32", name=name, storage=config.storage).fingerprint
    path = f"embeddings/choices/{model}.json"
    try:
        return cast("Dtype", json.loads(store.read(path))["dtype"])
    except MissingFileError:
        chosen = settled_dtype(encoder, config.storage) or _chosen_apart(encoder, config.storage)
        choice = {"dtype": chosen.dtype, "min_cosine": chosen.min_cosine, "mean_cosine": chosen.mean_cosine}
        if not remember:
            return chosen.dtype
        store.put_if_absent(path, canonical_json(choice))
        return cast("Dtype", json.loads(store.read(path))["dtype"])


def _chosen_apart(encoder: EncoderConfig, storage: StorageConfig) -> ChosenDtype:
    """Try in a process of its own: what torch and two copies of a model take would stay with the driver for the whole run."""
    # Ctrl-C reaches it, too, and ends it without a word.
    quiet = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, quiet) as apart:
        try:
            return apart.submit(choose_dtype, encoder, storage=storage).result()
        except BrokenProcessPool as error:
            problem = "the process that tried its number formats died"
            remedy = "give the driver room for the model twice, or set its `dtype` to float32"
            raise EncoderBrokenError(f"encoder {encoder.model}", problem, remedy) from error


def _tokenizer(config: Config, encoder: EncoderConfig) -> bytes | None:
    chunk = config.corpus.chunk
    if chunk is None:
        return None
    encoder = config.encoders[chunk.tokenizer] if chunk.tokenizer is not None else encoder
    folder = resolve_model(encoder.model, trust_remote_code=encoder.trust_remote_code, storage=config.storage)
    return tokenizer_file(encoder, folder).read_bytes()


def query_encoder_for(config: Config, manifest: IndexManifest, name: str | None) -> TextEncoder:
    """Load the configured encoder for text queries, if it shares the space of the index.

    Args:
        config: Names the encoders.
        manifest: The index.
        name: Name of an encoder; None: the one in force.

    Raises:
        ConfigError: There is no such encoder.
        IncompatibleModelsError: It is in another space than the index; the message names both.
    """
    name, settings, dtype = _query_settings(config, manifest, name)
    encoder = load_encoder(settings, dtype=dtype, name=name, storage=config.storage)
    check_query_encoder(manifest, encoder.identity, place=f"encoder {name}")
    return encoder


def check_encoder_of_queries(config: Config, manifest: IndexManifest, name: str) -> None:
    """See that a configured encoder, which made query vectors, shares the space of the index; nothing is loaded.

    Raises:
        ConfigError: There is no such encoder.
        IncompatibleModelsError: It is in another space than the index; the message names both.
    """
    name, settings, dtype = _query_settings(config, manifest, name)
    identity = identify_encoder(settings, dtype=dtype, name=name, storage=config.storage)
    check_query_encoder(manifest, identity, place=f"encoder {name}")


def _query_settings(
    config: Config, manifest: IndexManifest, name: str | None
) -> tuple[str, EncoderConfig, Dtype]:
    """Name, settings and number format of a configured encoder, the one in force if none is named."""
    name = name or config.encoder_name
    if name is None or name not in config.encoders:
        known = ", ".join(sorted(config.encoders)) or "none"
        raise ConfigError(
            "encoder",
            f"text queries need an encoder; {name!r} is not configured (known: {known})",
            "configure it",
        )
    settings = config.encoders[name]
    built_with = EncoderIdentity.model_validate(manifest.encoder)
    return name, settings, built_with.dtype if settings.dtype == "auto" else settings.dtype
