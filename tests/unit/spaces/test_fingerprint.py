"""Encoder fingerprints: what changes them, and what does not. The folders here are tiny: no model is loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.config import EncoderConfig
from pipeline.errors import ConfigError, CorruptArtifactError, IncompatibleModelsError
from pipeline.spaces import (
    EncoderIdentity,
    check_same_space,
    given_identity,
    hashing_identity,
    identify_folder,
)

CONFIG = EncoderConfig(model="path:anywhere")
MODULES = "sentence_transformers.models."


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    parts = (("", "Transformer"), ("1_Pooling", "Pooling"))
    write_json(root / "modules.json", [{"path": path, "type": MODULES + kind} for path, kind in parts])
    write_json(root / "config.json", {"hidden_size": 24, "max_position_embeddings": 512})
    write_json(root / "tokenizer.json", {"model": "words"})
    write_json(root / "tokenizer_config.json", {"model_max_length": 1e30})
    write_json(
        root / "1_Pooling" / "config.json", {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True}
    )
    save_file({"weight": np.arange(48, dtype=np.float32).reshape(2, 24)}, root / "model.safetensors")
    return root


def identify(folder: Path, config: EncoderConfig = CONFIG, **changes: object) -> EncoderIdentity:
    return identify_folder(config, folder, **{"name": "minilm", "dtype": "float32", **changes})  # type: ignore[arg-type]


def test_a_copied_folder_keeps_its_fingerprint(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copy)
    assert identify(copy) == identify(folder)


def test_name_and_source_of_a_model_do_not_count(folder: Path) -> None:
    other = identify(folder, EncoderConfig(model="hf:a/b@c0ffee"), name="another")
    assert other.same_space(identify(folder))


def test_one_flipped_bit_of_the_weights_changes_the_fingerprint(folder: Path) -> None:
    before = identify(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert not identify(folder).same_space(before)


@pytest.mark.parametrize("file", ["tokenizer.json", "1_Pooling/config.json", "config.json"])
def test_tokenizer_and_module_configurations_count(folder: Path, file: str) -> None:
    before = identify(folder)
    content = json.loads((folder / file).read_text())
    write_json(folder / file, {**content, "changed": True})
    assert not identify(folder).same_space(before)


@pytest.mark.parametrize("file", ["README.md", "data_config.json", "onnx/config.json", ".cache/x.json"])
def test_files_that_no_vector_depends_on_do_not_count(folder: Path, file: str) -> None:
    before = identify(folder)
    write_json(folder / file, {"changed": True})
    assert identify(folder) == before


@pytest.mark.parametrize("change", [{"query_prompt": "q: "}, {"document_prompt": "d: "}, {"max_tokens": 64}])
def test_prompts_and_token_limit_count(folder: Path, change: dict[str, object]) -> None:
    config = EncoderConfig(model=CONFIG.model, **change)  # type: ignore[arg-type]
    assert not identify(folder, config).same_space(identify(folder))


def test_the_number_format_counts(folder: Path) -> None:
    assert not identify(folder, dtype="bfloat16").same_space(identify(folder))


def test_the_separate_query_encoder_counts(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "query"
    shutil.copytree(folder, other)
    same = identify(folder, query_folder=other)
    write_json(other / "tokenizer.json", {"model": "pieces"})
    assert not identify(folder, query_folder=other).same_space(same)


def test_a_query_encoder_of_another_width_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "query"
    shutil.copytree(folder, other)
    write_json(other / "1_Pooling" / "config.json", {"word_embedding_dimension": 12})
    with pytest.raises(ConfigError, match=r"expected 24 dimensions .* found 12"):
        identify(folder, query_folder=other)


def test_a_limit_above_the_models_own_is_the_models_own(folder: Path) -> None:
    config = EncoderConfig(model=CONFIG.model, max_tokens=4096)
    assert identify(folder, config).max_tokens == 512
    assert identify(folder, config).same_space(identify(folder))


@pytest.mark.parametrize(
    ("pooling", "dims"),
    [
        ({"embedding_dimension": 24, "pooling_mode": "cls"}, 24),
        ({"embedding_dimension": 24, "pooling_mode": ["cls", "mean"]}, 48),
        (
            {
                "word_embedding_dimension": 24,
                "pooling_mode_mean_tokens": True,
                "pooling_mode_max_tokens": True,
            },
            48,
        ),
    ],
)
def test_width_follows_the_pooling(folder: Path, pooling: dict[str, object], dims: int) -> None:
    write_json(folder / "1_Pooling" / "config.json", pooling)
    assert identify(folder).dims == dims


def test_width_of_a_projection_wins(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    write_json(folder / "modules.json", [*modules, {"path": "2_Dense", "type": MODULES + "Dense"}])
    write_json(folder / "2_Dense" / "config.json", {"in_features": 24, "out_features": 8})
    assert identify(folder).dims == 8


def test_width_of_a_static_embedding_is_that_of_its_matrix(folder: Path) -> None:
    write_json(folder / "modules.json", [{"path": "", "type": MODULES + "StaticEmbedding"}])
    assert identify(folder).dims == 24


def test_an_identity_survives_json(folder: Path) -> None:
    identity = identify(folder)
    assert EncoderIdentity.model_validate_json(identity.model_dump_json()) == identity


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no modules\.json"):
        identify(tmp_path)


def test_a_damaged_configuration_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptArtifactError, match=r"config\.json: is not JSON"):
        identify(folder)


def test_comparing_two_spaces_is_refused_naming_both() -> None:
    mine, theirs = given_identity("catalog-v1", 64), given_identity("catalog-v2", 64)
    with pytest.raises(
        IncompatibleModelsError, match=r"bridges/b: expected .*catalog-v1.* found .*catalog-v2"
    ):
        check_same_space(mine, theirs, place="bridges/b")


def test_comparing_a_space_with_itself_is_fine() -> None:
    check_same_space(given_identity("a", 64), given_identity("a", 64), place="x")


def test_ready_made_vectors_are_known_by_name_and_width() -> None:
    assert not given_identity("a", 64).same_space(given_identity("a", 32))


def test_the_hashing_encoders_fingerprint_knows_width_and_prompts() -> None:
    config = EncoderConfig(model="hashing:64")
    prompted = EncoderConfig(model="hashing:64", query_prompt="q: ")
    found = {
        hashing_identity(c, d, name="h").fingerprint for c, d in ((config, 64), (config, 32), (prompted, 64))
    }
    assert len(found) == 3


def test_identifying_a_model_imports_no_torch() -> None:
    code = "import sys, pipeline.spaces, pipeline.embedding.encoder, pipeline.embedding.precision; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
