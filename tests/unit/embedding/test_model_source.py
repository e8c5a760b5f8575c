"""Where models come from, and which are refused. Nothing here reaches the network."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.config import EncoderConfig
from pipeline.embedding.model_source import _from_store, resolve_model, tokenizer_file
from pipeline.errors import ConfigError
from pipeline.storage import open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "config.json").write_text("{}")
    (root / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros((2, 8), dtype=np.float32)}, root / "model.safetensors")
    return root


def make_foreign(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(
        json.dumps([*modules, {"path": "", "type": "custom_pooling.Attention"}])
    )


def make_auto_map(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Own"}}))


def test_a_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve_model(f"path:{folder}") == folder


def test_a_package_is_found_among_the_installed_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder.parent / "packaged_model"
    package.mkdir()
    (package / "__init__.py").touch()
    folder.rename(package / "model")
    monkeypatch.syspath_prepend(str(folder.parent))
    assert resolve_model("package:packaged_model") == package / "model"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no_such_model", "pip install no-such-model"),
        ("package:json", "holds no sentence-transformers model"),
        ("path:/no/such/folder", "there is no folder /no/such/folder"),
        ("hf:sentence-transformers/all-MiniLM-L6-v2", "names no revision"),
        ("hf:sentence-transformers/all-MiniLM-L6-v2@", "names no revision"),
        ("all-MiniLM-L6-v2", "is not a model source"),
        ("path:", "is not a model source"),
        ("ftp://host/model", "is not a model source"),
    ],
)
def test_a_source_that_leads_nowhere_says_what_to_mend(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(source)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickled_weights_are_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ConfigError, match=r"pickled.*convert to safetensors"):
        resolve_model(f"path:{folder}", trust_remote_code=True)


def test_pickled_weights_of_a_later_module_are_refused(folder: Path) -> None:
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"2_Dense/pytorch_model.bin is pickled"):
        resolve_model(f"path:{folder}")


def test_pickles_beside_safetensors_do_not_matter(folder: Path) -> None:
    (folder / "pytorch_model.bin").touch()
    assert resolve_model(f"path:{folder}") == folder


def test_a_model_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no safetensors weights"):
        resolve_model(f"path:{folder}")


@pytest.mark.parametrize("change", [make_foreign, make_auto_map])
def test_code_that_comes_with_a_model_is_refused_unless_trusted(folder: Path, change) -> None:
    change(folder)
    with pytest.raises(ConfigError, match="set trust_remote_code: true"):
        resolve_model(f"path:{folder}")
    assert resolve_model(f"path:{folder}", trust_remote_code=True) == folder


def test_a_model_in_a_store_is_fetched_once_per_content(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("not needed")
    store, cache = open_store(str(folder)), tmp_path / "cache"
    first = _from_store("s3://b/m", store, cache, with_code=False)
    again = _from_store("s3://b/m", store, cache, with_code=False)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    changed = _from_store("s3://b/m", store, cache, with_code=False)
    assert first == again != changed
    assert {path.name for path in first.iterdir()} == {
        "modules.json",
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    assert sorted(cache.iterdir()) == sorted([first, changed])


def test_an_empty_prefix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no files of a model"):
        _from_store("s3://b/m", open_store(str(tmp_path / "empty")), tmp_path / "cache", with_code=False)


def test_the_tokenizer_file_is_the_first_modules(folder: Path) -> None:
    assert tokenizer_file(EncoderConfig(model="path:x"), folder) == folder / "tokenizer.json"


def test_a_model_without_a_tokenizer_file_cannot_cut_documents(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        tokenizer_file(EncoderConfig(model="path:x"), folder)
