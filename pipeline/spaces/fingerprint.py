"""Encoder fingerprints: a hash over everything about an encoder that a vector depends on.

Computed from the files of the model folder alone, streaming: no model is loaded and torch is not imported. Where a
model comes from, what it is called and who runs it do not count: a copied folder keeps its fingerprint.
Finding the folder is the business of `pipeline.embedding.model_source`.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.config import EncoderConfig
from pipeline.errors import ConfigError, CorruptArtifactError, IncompatibleModelsError
from pipeline.storage import canonical_json, sha256_of_file

__all__ = [
    "GIVEN_MODEL",
    "MODEL_SUFFIXES",
    "EncoderIdentity",
    "check_same_space",
    "given_identity",
    "has_transformer",
    "hashing_identity",
    "identify_folder",
    "model_files",
    "read_modules",
]

ENCODING_VERSION = 1
"""Raised when the code turns the same model and text into other bytes. 1: length buckets of 16 tokens, float32 pooling."""

MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Files that a model is made of: weights, configurations, vocabularies, tokenizers."""

GIVEN_MODEL = "given"
"""Model source of ready-made vectors."""

UNUSED_NAMES = frozenset({"data_config.json", "requirements.txt", "eval_results.json"})
"""Records of the training that many model folders carry; no vector depends on them."""

UNUSED_FOLDERS = frozenset({"onnx", "openvino"})
"""The same weights for other runtimes."""

NO_LIMIT = 1_000_000_000
"""Tokenizers without a limit say 1e30; a model_max_length above this is none."""


class EncoderIdentity(BaseModel):
    """What makes two vectors comparable, and what a reader wants to know of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    """Hex sha256 over weights, tokenizer, module configurations, prompts, token limit, dtype and query encoder."""
    name: str
    """Name in the configuration; not part of the fingerprint."""
    model: str
    """Where the model came from; not part of the fingerprint."""
    query_model: str | None = None
    """Where the separate query encoder came from; its content is part of the fingerprint."""
    dims: int
    """Width of the vectors."""
    dtype: Literal["float32", "bfloat16"]
    """Number format that the transformer computed in; the vectors themselves are float32."""
    max_tokens: int | None
    """Tokens after which a text is cut; None: no limit."""
    query_prompt: str = ""
    """Put in front of every query."""
    document_prompt: str = ""
    """Put in front of every document."""

    def same_space(self, other: "EncoderIdentity") -> bool:
        """Whether vectors of the two may be compared."""
        return self.fingerprint == other.fingerprint

    def __str__(self) -> str:
        return f"{self.name} ({self.model}, {self.dims} d, {self.dtype}, {self.fingerprint[:12]})"


def check_same_space(expected: EncoderIdentity, found: EncoderIdentity, *, place: str) -> None:
    """Refuse to compare vectors of two spaces.

    Args:
        expected: Encoder of the vectors that are there.
        found: Encoder of the vectors to compare with them.
        place: File or table that holds `found`, for the message.

    Raises:
        IncompatibleModelsError: The encoders differ; the message names both.
    """
    if not expected.same_space(found):
        problem = f"expected vectors of {expected}, found vectors of {found}"
        raise IncompatibleModelsError(place, problem, "use one encoder, or train a bridge: strata upgrade")


def identify_folder(
    config: EncoderConfig,
    folder: Path,
    *,
    name: str,
    dtype: Literal["float32", "bfloat16"],
    query_folder: Path | None = None,
) -> EncoderIdentity:
    """Identity of a sentence-transformers model on the local disk.

    Args:
        config: Prompts and token limit.
        folder: The model's folder.
        name: Name of the encoder in the configuration.
        dtype: What the transformer computes in, as decided; a model without one computes in float32.
        query_folder: Folder of the separate query encoder, if there is one.

    Raises:
        ConfigError: The folder holds no sentence-transformers model, or the two models differ in width.
        CorruptArtifactError: A file of the model cannot be parsed.
    """
    dims, max_tokens = _dims(folder), _token_limit(config, folder)
    dtype = dtype if has_transformer(folder) else "float32"
    content: dict[str, Any] = {
        **_settings(config, max_tokens),
        "dtype": dtype,
        "files": _file_hashes(folder, with_code=config.trust_remote_code),
    }
    if query_folder is not None:
        _check_query_dims(config, dims, _dims(query_folder))
        content["query_max_tokens"] = _token_limit(config, query_folder)
        content["query_files"] = _file_hashes(query_folder, with_code=config.trust_remote_code)
    return EncoderIdentity(
        fingerprint=_digest(content),
        name=name,
        model=config.model,
        query_model=config.query_model,
        dims=dims,
        dtype=dtype,
        max_tokens=max_tokens,
        query_prompt=config.query_prompt,
        document_prompt=config.document_prompt,
    )


def given_identity(name: str, dims: int) -> EncoderIdentity:
    """Identity of ready-made vectors, which no encoder of ours made; the corpus owner's name stands for them."""
    return EncoderIdentity(
        fingerprint=_digest({"given": name, "dims": dims}),
        name=name,
        model=GIVEN_MODEL,
        dims=dims,
        dtype="float32",
        max_tokens=None,
    )


def hashing_identity(config: EncoderConfig, dims: int, *, name: str) -> EncoderIdentity:
    """Identity of the weightless `hashing:<dims>` encoder."""
    return EncoderIdentity(
        fingerprint=_digest({**_settings(config, config.max_tokens), "hashing": dims}),
        name=name,
        model=config.model,
        dims=dims,
        dtype="float32",
        max_tokens=config.max_tokens,
        query_prompt=config.query_prompt,
        document_prompt=config.document_prompt,
    )


def model_files(folder: Path, *, with_code: bool = False) -> Iterator[Path]:
    """Files of a model folder that a vector can depend on, sorted by path.

    Args:
        folder: The model's folder.
        with_code: Python files too.
    """
    suffixes = (*MODEL_SUFFIXES, ".py") if with_code else MODEL_SUFFIXES
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part in UNUSED_FOLDERS for part in parts)
        if path.suffix in suffixes and path.name not in UNUSED_NAMES and not hidden and path.is_file():
            yield path


def read_modules(folder: Path) -> list[dict[str, Any]]:
    """Entries of `modules.json`: the model's parts in the order of their work.

    Raises:
        ConfigError: The folder is not a sentence-transformers model.
        CorruptArtifactError: The file is not the expected JSON.
    """
    if not (folder / "modules.json").is_file():
        remedy = "name the folder of a sentence-transformers model"
        raise ConfigError(str(folder), "holds no modules.json", remedy)
    modules = _read_json(folder / "modules.json")
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and {"type", "path"} <= m.keys() for m in modules
    ):
        raise CorruptArtifactError(
            str(folder / "modules.json"), "is not a list of modules", "fetch the model again"
        )
    return modules


def has_transformer(folder: Path) -> bool:
    """Whether a number format can be chosen; models without a transformer compute in float32."""
    return not str(read_modules(folder)[0]["type"]).endswith(".StaticEmbedding")


def _settings(config: EncoderConfig, max_tokens: int | None) -> dict[str, Any]:
    return {
        "encoding": ENCODING_VERSION,
        "query_prompt": config.query_prompt,
        "document_prompt": config.document_prompt,
        "max_tokens": max_tokens,
    }


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _file_hashes(folder: Path, *, with_code: bool) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_of_file(path)
        for path in model_files(folder, with_code=with_code)
    }


def _check_query_dims(config: EncoderConfig, dims: int, query_dims: int) -> None:
    if query_dims != dims:
        problem = f"expected {dims} dimensions as `{config.model}` has, found {query_dims}"
        raise ConfigError(
            f"query_model: {config.query_model}", problem, "name an encoder that shares the space"
        )


def _token_limit(config: EncoderConfig, folder: Path) -> int | None:
    """The smaller of the configured limit and the model's own."""
    limits = [limit for limit in (config.max_tokens, _own_limit(folder)) if limit is not None]
    return min(limits, default=None)


def _own_limit(folder: Path) -> int | None:
    """What sentence-transformers takes: max_seq_length, else model_max_length capped by the position table."""
    root = folder / str(read_modules(folder)[0]["path"])
    for path in sorted(root.glob("sentence_*_config.json")):
        limit = _read_json(path).get("max_seq_length")
        if limit is not None:
            return int(limit)
    limits = [
        _read_json(root / file).get(key) or NO_LIMIT
        for file, key in (
            ("tokenizer_config.json", "model_max_length"),
            ("config.json", "max_position_embeddings"),
        )
        if (root / file).is_file()
    ]
    limit = min((n for n in limits if n > 0), default=NO_LIMIT)
    return int(limit) if limit < NO_LIMIT else None


def _dims(folder: Path) -> int:
    """Width of the model's vectors: what the last module that sets one says."""
    widths = [
        _module_dims(folder / str(module["path"]), str(module["type"])) for module in read_modules(folder)
    ]
    known = [width for width in widths if width is not None]
    if not known:
        raise ConfigError(str(folder), "no module states the width of its vectors", "use another model")
    return known[-1]


def _module_dims(folder: Path, kind: str) -> int | None:
    match kind.rpartition(".")[2]:
        case "StaticEmbedding":
            return _static_dims(folder / "model.safetensors")
        case "Pooling":
            return _pooling_dims(_read_json(folder / "config.json"))
        case "Dense":
            return int(_read_json(folder / "config.json")["out_features"])
    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    width = next((config[key] for key in ("hidden_size", "d_model", "dim") if key in config), None)
    return None if width is None else int(width)


def _pooling_dims(config: dict[str, Any]) -> int:
    width = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    mode = config.get("pooling_mode", "mean")
    flags = sum(value is True for key, value in config.items() if key.startswith("pooling_mode_"))
    modes = len(mode) if isinstance(mode, list) else max(1, flags)
    return int(width or 0) * modes


def _static_dims(weights: Path) -> int | None:
    """Second dimension of the only matrix, from the safetensors header."""
    if not weights.is_file():
        return None
    with weights.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = _parse(weights, file.read(size))
    shapes = [entry["shape"] for key, entry in header.items() if key != "__metadata__"]
    return next((int(shape[1]) for shape in shapes if len(shape) == 2), None)  # noqa: PLR2004


def _read_json(path: Path) -> Any:
    try:
        return _parse(path, path.read_bytes())
    except OSError as error:
        raise CorruptArtifactError(
            str(path), f"cannot be read ({error.strerror})", "fetch the model again"
        ) from error


def _parse(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CorruptArtifactError(str(path), f"is not JSON ({error})", "fetch the model again") from error
