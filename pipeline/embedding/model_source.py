"""From a model source in the configuration to a checked folder on the local disk.

`package:<module>`, `path:<folder>`, `hf:<repo>@<revision>` and `s3://<prefix>`. Pickled weights are always refused;
models that bring their own Python code are refused unless the configuration trusts it in so many words.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import EncoderConfig, StorageConfig
from pipeline.errors import ConfigError, CorruptArtifactError, StorageUnavailableError
from pipeline.spaces.fingerprint import MODEL_SUFFIXES, UNUSED_FOLDERS, read_modules
from pipeline.storage import ObjectInfo, Store, canonical_json, open_store

__all__ = ["resolve_model", "tokenizer_file"]

PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
OWN_MODULES = "sentence_transformers."
CONFIGS_WITH_CODE = ("config.json", "tokenizer_config.json", "processor_config.json")
"""Files whose `auto_map` names Python classes of the model."""


def resolve_model(
    source: str,
    *,
    trust_remote_code: bool = False,
    storage: StorageConfig | None = None,
    cache: Path | None = None,
) -> Path:
    """Find, or fetch, the folder of a model and check that it is safe to load.

    Args:
        source: `model` or `query_model` of an encoder's configuration.
        trust_remote_code: Accept a model that runs its own Python code.
        storage: S3 settings for `s3://` sources.
        cache: Where `s3://` models are kept; absent: `~/.cache/strata/models`.

    Raises:
        ConfigError: The source is malformed or not there, has only pickled weights, or needs code that is not trusted.
        StorageUnavailableError: A model could not be fetched now.
    """
    folder = _locate(source, trust_remote_code=trust_remote_code, storage=storage, cache=cache)
    _check_weights(source, folder)
    if not trust_remote_code:
        _check_no_code(source, folder)
    return folder


def tokenizer_file(config: EncoderConfig, folder: Path) -> Path:
    """The `tokenizer.json` of a model, as `TextSplitter.from_huggingface_tokenizer_file` takes it.

    Raises:
        ConfigError: The model has none, so its tokens cannot be counted outside of it.
    """
    path = folder / str(read_modules(folder)[0]["path"]) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            config.model, "has no tokenizer.json", "use a model with a fast tokenizer to cut documents"
        )
    return path


def _locate(
    source: str, *, trust_remote_code: bool, storage: StorageConfig | None, cache: Path | None
) -> Path:
    kind, colon, rest = source.partition(":")
    match kind:
        case "package" if rest:
            return _package_folder(rest)
        case "path" if rest:
            return _local_folder(source, Path(rest).expanduser())
        case "hf" if rest:
            return _from_hub(rest, with_code=trust_remote_code)
        case "s3" if colon:
            folder = cache or Path.home() / ".cache" / "strata" / "models"
            return _from_store(source, open_store(source, storage), folder, with_code=trust_remote_code)
    forms = "use package:<module>, path:<folder>, hf:<repo>@<revision> or s3://<prefix>"
    raise ConfigError(f"model: {source}", "is not a model source", forms)


def _package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        remedy = f"pip install {module.replace('_', '-')}"
        raise ConfigError(f"model: package:{module}", "no such package is installed", remedy)
    package = Path(next(iter(spec.submodule_search_locations)))
    for folder in (package / "model", package):
        if (folder / "modules.json").is_file():
            return folder
    problem = f"{package} holds no sentence-transformers model (no modules.json)"
    raise ConfigError(f"model: package:{module}", problem, "name a package that ships a model")


def _local_folder(source: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"model: {source}", f"there is no folder {folder.resolve()}", "mend the path")
    return folder


# --------------------------------------------------------------------------------------------------- fetching


def _from_hub(rest: str, *, with_code: bool) -> Path:
    repo, at, revision = rest.partition("@")
    if not (repo and at and revision):
        remedy = f"write hf:{repo or '<repo>'}@<commit>: a moving model would change the vectors"
        raise ConfigError(f"model: hf:{rest}", "names no revision", remedy)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    suffixes = (*MODEL_SUFFIXES, ".py") if with_code else MODEL_SUFFIXES
    patterns, unused = [f"*{s}" for s in suffixes], [f"{name}/*" for name in UNUSED_FOLDERS]
    try:
        with quiet_hub():
            found = snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=unused
            )
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            f"model: hf:{rest}", _first_line(error), "check repository, revision, access"
        ) from error
    except (OSError, RuntimeError) as error:
        remedy = "try again, or fetch the model elsewhere and use path:<folder>"
        raise StorageUnavailableError(f"model: hf:{rest}", _first_line(error), remedy) from error
    return Path(found)


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """No progress bars of the hub client inside; as it was outside."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _from_store(source: str, store: Store, cache: Path, *, with_code: bool) -> Path:
    """Download a prefix once per content: the folder is keyed by paths, sizes and etags."""
    suffixes = (
        (*MODEL_SUFFIXES, ".py", *PICKLED_SUFFIXES) if with_code else (*MODEL_SUFFIXES, *PICKLED_SUFFIXES)
    )
    wanted = [item for item in store.list("") if Path(item.path).suffix in suffixes]
    if not wanted:
        raise ConfigError(f"model: {source}", "holds no files of a model", "mend the prefix")
    listing = [[item.path, item.size, item.etag] for item in wanted]
    folder = cache / hashlib.sha256(canonical_json([source, listing])).hexdigest()[:32]
    if not folder.is_dir():
        _download(store, wanted, folder)
    return folder


def _download(store: Store, wanted: list[ObjectInfo], folder: Path) -> None:
    """Fill a folder whole or not at all; of two processes that race, either may win. Pickles stay where they are."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for item in wanted:
            path = staging / item.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in PICKLED_SUFFIXES:
                path.touch()
                continue
            with store.open_input(item.path) as remote, path.open("wb") as local:
                shutil.copyfileobj(remote, local, 8 * 1024 * 1024)
        with contextlib.suppress(OSError):
            os.rename(staging, folder)  # noqa: PTH104  # Path.rename is the same call, but replaces nothing here
        if not folder.is_dir():
            raise StorageUnavailableError(str(folder), "could not be written", "check the local disk")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- refusals


def _check_weights(source: str, folder: Path) -> None:
    """Every folder with weights must have them as safetensors; a folder without any weight at all is no model."""
    files = [path for path in folder.rglob("*") if not UNUSED_FOLDERS & set(path.relative_to(folder).parts)]
    safe = {path.parent for path in files if path.suffix == ".safetensors"}
    pickled = sorted(path for path in files if path.suffix in PICKLED_SUFFIXES and path.parent not in safe)
    if pickled:
        problem = f"{pickled[0].relative_to(folder)} is pickled: loading it would run code"
        raise ConfigError(f"model: {source}", problem, "convert to safetensors")
    dense = [folder / str(m["path"]) for m in read_modules(folder) if str(m["type"]).endswith(".Dense")]
    if not safe or any(path not in safe for path in dense):
        raise ConfigError(f"model: {source}", f"no safetensors weights in {folder}", "convert to safetensors")


def _check_no_code(source: str, folder: Path) -> None:
    modules = read_modules(folder)
    foreign = [str(m["type"]) for m in modules if not str(m["type"]).startswith(OWN_MODULES)]
    foreign += [
        f"auto_map in {path.relative_to(folder)}"
        for name in CONFIGS_WITH_CODE
        for path in folder.rglob(name)
        if _has_auto_map(path)
    ]
    if foreign:
        problem = f"runs code that comes with the model ({foreign[0]})"
        raise ConfigError(f"model: {source}", problem, "read that code, then set trust_remote_code: true")


def _has_auto_map(path: Path) -> bool:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptArtifactError(str(path), f"is not JSON ({error})", "fetch the model again") from error
    return isinstance(config, dict) and bool(config.get("auto_map"))
