"""Tiny but whole indexes: real Parquet files, a manifest that names them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save

from pipeline.artifacts import (
    AliasEntry,
    CodesInfo,
    FileRef,
    IndexManifest,
    Partition,
    Plan,
    Receipt,
    ReleaseRecord,
    SearchDefaults,
    Segment,
    StageOutput,
)
from pipeline.binarization import Binarizer, to_tensors
from pipeline.release import publish, read_alias
from pipeline.schemas import (
    DEAD_LETTERS,
    DIRECTORY,
    documents_schema,
    embeddings_schema,
    heads_schema,
    lists_schema,
    made_by,
    vectors_schema,
)
from pipeline.storage import LocalStore, Log, Store, canonical_json
from pipeline.tables import RawFile, vector_array, write_table

NOW = datetime(2026, 11, 21, 3, 0, tzinfo=UTC)
DIMS, CODE_BYTES = 8, 4
LIST_SIZES = (3, 5, 0, 4)


@dataclass
class Root:
    """A store and what a test does to it."""

    store: Store
    tokens: int = 0
    indexes: dict[int, tuple[IndexManifest, FileRef]] = field(default_factory=dict)

    def index(self, seed: int) -> tuple[IndexManifest, FileRef]:
        """Write a small index; the seed is all that tells one from another."""
        if seed not in self.indexes:
            self.indexes[seed] = _write_index(self.store, seed)
        return self.indexes[seed]

    def publish(
        self, seed: int, *, started_at: AliasEntry | str | None = "now", **summary: Any
    ) -> ReleaseRecord:
        """Publish an index as a run that started just now, or when the alias was at the given entry."""
        self.tokens += 1
        manifest, ref = self.index(seed)
        start = read_alias(self.store) if isinstance(started_at, str) else started_at
        return publish(
            self.store,
            manifest,
            ref,
            {"documents": sum(LIST_SIZES), **summary},
            started_at=start,
            now=NOW,
            token=f"token {self.tokens}",
        )

    def receipt(self, key: str, *refs: FileRef, seq: int = 1) -> str:
        """Claim a unit of work; returns the receipt's path."""
        output = StageOutput(files={f"file-{i}": ref for i, ref in enumerate(refs)})
        receipt = Receipt(key=key, stage="build", output=output, worker="w")
        log = Log(self.store, f"receipts/{key}")
        log.append(seq, receipt.model_dump(mode="json"))
        return log.path(seq)

    def scratch(self, seed: int, folder: str = "scratch/placed") -> FileRef:
        """Write a file that nothing names."""
        return write_table(self.store, folder, heads_schema(DIMS), [_heads(np.random.default_rng(seed), 2)])

    def cached(self, seed: int, *, logged: bool) -> FileRef:
        """Write a file of the embedding cache."""
        rng = np.random.default_rng(seed)
        table = pa.table([_binary(rng, 3, 16), _vectors(rng, 3, np.float32)], schema=embeddings_schema(DIMS))
        ref = write_table(self.store, "embeddings/enc/0000", embeddings_schema(DIMS), [table])
        log = Log(self.store, "embeddings/enc/0000/log")
        entry = {"file": ref.model_dump(mode="json")}
        assert not logged or log.append(log.newest() + 1, entry)
        return ref

    def dead_letters(self) -> FileRef:
        """Write a file of rows set aside."""
        letter = {"file": "f", "row": 1, "doc_id": "d", "stage": "read", "reason": "why"}
        table = pa.Table.from_pylist([letter], schema=DEAD_LETTERS)
        return write_table(self.store, "dead_letters", DEAD_LETTERS, [table])

    def paths(self) -> set[str]:
        """Everything there is, but for leases: each collection leaves its own."""
        return {found.path for found in self.store.list("") if not found.path.startswith("leases/")}


@pytest.fixture
def root(any_store: Store) -> Root:
    """An empty root of each kind of store."""
    return Root(any_store)


@pytest.fixture
def local_root(tmp_path: Path) -> Root:
    """An empty root on the local disk, for rules that do not depend on the kind of store."""
    return Root(LocalStore(str(tmp_path / "root")))


@pytest.fixture
def make_plan() -> Callable[[str], Plan]:
    """A plan of nothing."""
    return lambda fingerprint: Plan(
        fingerprint=fingerprint,
        corpus_folder="corpus",
        format="parquet",
        files=(),
        shards=(),
        attributes=(),
        embedding_dims=None,
        document_buckets=1,
        rows=0,
        text_bytes=0,
    )


def _binary(rng: np.random.Generator, n: int, width: int) -> pa.Array:
    return pa.array([rng.bytes(width) for _ in range(n)], pa.binary(width))


def _vectors(rng: np.random.Generator, n: int, kind: type[np.floating]) -> pa.Array:
    return vector_array(rng.standard_normal((n, DIMS)).astype(kind))


def _heads(rng: np.random.Generator, n: int) -> pa.Table:
    columns = [_vectors(rng, n, np.float32), pa.array(np.ones(n, np.float32))]
    return pa.table(columns, schema=heads_schema(DIMS))


def _write_index(store: Store, seed: int) -> tuple[IndexManifest, FileRef]:
    rng = np.random.default_rng(seed)
    n = sum(LIST_SIZES)
    ids, names = _binary(rng, n, 16), pa.array([f"doc {seed} {i}" for i in range(n)])
    nothing = pa.schema([])
    documents = pa.table(
        [ids, names, pa.array([0] * n, pa.int32()), names, _binary(rng, n, 16)],
        schema=documents_schema(nothing),
    )
    vectors = pa.table([ids, names, _vectors(rng, n, np.float16)], schema=vectors_schema(DIMS, nothing))
    scores = pa.array(rng.standard_normal(n).astype(np.float16))
    own = np.split(np.arange(n), np.cumsum(LIST_SIZES)[:-1])
    rows = pa.array(np.concatenate([rng.permutation(rows) for rows in own]).astype(np.int32))
    lists = pa.table([_binary(rng, n, CODE_BYTES), scores, scores, rows], schema=lists_schema(CODE_BYTES))
    filled = [no for no, size in enumerate(LIST_SIZES) if size]
    first = np.cumsum([0, *LIST_SIZES])[filled]
    sizes = [LIST_SIZES[no] for no in filled]
    places = {
        "list_no": filled,
        "first_entry": first,
        "num_entries": sizes,
        "num_primaries": sizes,
        "first_row": first,
    }
    codes = write_binarizer(store, seed)
    segment = Segment(
        lists=_write(store, "lists", lists, made_by("enc", codes.binarizer)),
        vectors=_write(store, "vectors", vectors, made_by("enc")),
    )
    of_lists = RawFile(store, segment.lists, ["code", "factor", "offset", "row"])
    of_vectors = RawFile(store, segment.vectors, ["vector_id", "embedding"])
    places |= {f"{name}_at": of_lists.places(name, first) for name in ("code", "factor", "offset", "row")}
    places |= {f"{name}s_at": of_vectors.places(name, first) for name in ("vector_id", "embedding")}
    directory = pa.table(
        [
            pa.array(np.asarray(places.get(field.name, [0] * len(filled)))).cast(field.type)
            for field in DIRECTORY
        ],
        schema=DIRECTORY,
    )
    partition = Partition(
        partition_id=0,
        space="enc",
        codes=codes,
        heads=_write(store, "heads", _heads(rng, len(LIST_SIZES)), made_by("enc")),
        directory=_write(store, "directory", directory, {}),
        segments=(segment,),
        rows=n,
    )
    manifest = IndexManifest(
        index=f"index{seed}",
        corpus="corpus",
        plan="plan",
        encoder={"model": "m", "fingerprint": "enc"},
        dims=DIMS,
        attributes=(),
        documents=(write_table(store, "documents", documents.schema, [documents]),),
        document_buckets=1,
        num_documents=n,
        partitions=(partition,),
        search=SearchDefaults(lists=2, margin=4.0, rerank=10),
        statistics={},
    )
    return manifest, write_manifest(store, manifest)


def write_manifest(store: Store, manifest: IndexManifest) -> FileRef:
    """Store a manifest under its index."""
    data = canonical_json(manifest.model_dump(mode="json"))
    path = f"indexes/{manifest.index}/manifest.json"
    store.write(path, data)
    return FileRef(path=path, rows=0, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _write(store: Store, kind: str, table: pa.Table, made: dict[bytes, bytes]) -> FileRef:
    return write_table(
        store, "partitions", table.schema.with_metadata(made), [table], suffix=f".{kind}.parquet"
    )


def write_binarizer(store: Store, seed: int, dims: int = DIMS) -> CodesInfo:
    """Store a binarizer without having fitted one."""
    levels = (dims,) * (8 * CODE_BYTES // dims)
    weights = np.random.default_rng(seed).random((1, len(levels)), np.float32)
    binarizer = Binarizer(np.zeros(dims, np.float32), np.eye(dims, dtype=np.float32), levels, weights)
    data = save(to_tensors(binarizer))
    digest = hashlib.sha256(data).hexdigest()
    card = canonical_json({"levels": list(levels), "weights": digest})
    folder = f"binarizers/{hashlib.sha256(card).hexdigest()[:32]}"
    store.write(f"{folder}/weights.safetensors", data)
    store.write(f"{folder}/binarizer.json", card)
    ref = FileRef(path=f"{folder}/weights.safetensors", rows=0, bytes=len(data), sha256=digest)
    return CodesInfo(binarizer=folder, levels=levels, code_bytes=CODE_BYTES, files=(ref,))
