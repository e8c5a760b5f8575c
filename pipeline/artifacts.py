"""The nouns: frozen models that stages hand to each other and that JSON artifacts hold.

Paths are relative to the root. Bytes of each artifact: `canonical_json(model.model_dump(mode="json"))`.
"""

import json
from datetime import datetime
from typing import Any, Literal, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import CorruptArtifactError, DataError

__all__ = [
    "AliasEntry",
    "Attribute",
    "BridgeInfo",
    "CodesInfo",
    "FileRef",
    "IndexManifest",
    "Origin",
    "Partition",
    "Plan",
    "Receipt",
    "Refresh",
    "ReleaseRecord",
    "RunRecord",
    "SearchDefaults",
    "SearchPoint",
    "Segment",
    "ShardSpec",
    "SourceFile",
    "StageOutput",
    "arrow_schema",
    "parse_model",
]

FORMAT_VERSION = 1
"""Version of every artifact's layout but the manifest's."""
MANIFEST_FORMAT = 2
"""Version of a manifest and of the files that it names. 1: lists of one segment each, without copies, read by footers."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRef(_Frozen):
    """A data file, named by the hash of its content."""

    path: str
    rows: int
    bytes: int
    sha256: str
    tail: str = ""
    """Start of the sha256 of its last 64 KiB, of tables: tells a file that another tool wrote anew, without reading all of it."""


class Attribute(_Frozen):
    """A column to filter by."""

    name: str
    type: Literal["string", "int", "float", "bool", "timestamp", "list<string>"]


ARROW_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "list<string>": pa.list_(pa.string()),
}


def arrow_schema(attributes: tuple[Attribute, ...]) -> pa.Schema:
    """Arrow schema of attribute columns, all nullable."""
    return pa.schema([pa.field(a.name, ARROW_TYPES[a.type]) for a in attributes])


class SourceFile(_Frozen):
    """One file of the corpus as the plan saw it."""

    path: str
    """Relative to the corpus folder."""
    size: int
    content: str
    """sha256 of the bytes (local) or the store's etag (S3)."""
    rows: int


class ShardSpec(_Frozen):
    """A slice of one source file by rows; byte range too where the format has no row index (JSONL)."""

    shard_no: int
    file_no: int
    first_row: int
    rows: int
    first_byte: int = 0
    stop_byte: int = 0


class Plan(_Frozen):
    """The frozen shard plan: computed once from content, never from a live listing or the number of workers."""

    fingerprint: str
    """Hash of everything below."""
    corpus_folder: str
    format: Literal["parquet", "jsonl"]
    files: tuple[SourceFile, ...]
    shards: tuple[ShardSpec, ...]
    attributes: tuple[Attribute, ...]
    embedding_dims: int | None
    """Width of the ready-made vectors; None where texts are encoded."""
    document_buckets: int
    """Buckets of the document shuffle, by hash of doc_id."""
    rows: int
    text_bytes: int
    """Estimated bytes of text, from the file sizes."""


class StageOutput(_Frozen):
    """What one unit of work wrote and counted."""

    files: dict[str, FileRef]
    """By role, for example `documents`, `dead_letters`."""
    numbers: dict[str, int | float] = {}


class Receipt(_Frozen):
    """Who finished a unit of work first, and what it wrote."""

    key: str
    """Fingerprint of the inputs: contents of upstream files, stage, parameters, library versions."""
    stage: str
    output: StageOutput
    worker: str
    """Token of the attempt; tells a retried request from another worker."""


class SearchPoint(_Frozen):
    """How far a search looks, and what that found and cost on the tuning queries."""

    lists: int
    """Most posting lists per query."""
    margin: float
    """By how much the squared L2 distance to a list's head may exceed that to the nearest head."""
    rerank: int
    """Candidates scored again with float16 vectors where ten documents are asked for, in proportion where more are; 0: codes
    only."""
    tuning_recall: float | None = None
    """recall@10; None where nothing was tuned."""
    bytes: int | None = None
    """Of lists and of vectors scored again, per query."""


class SearchDefaults(SearchPoint):
    """What a reader uses where the caller names nothing."""

    curve: tuple[SearchPoint, ...] = ()
    """Settings than which none found more for as few bytes, by rising bytes: a reader may use any of them."""


class Refresh(_Frozen):
    """What became of the binarizer of the release before, on a corpus that has changed since."""

    outcome: Literal["kept", "replaced"]
    drift: float
    """recall@10 by codes alone that its closed form lost against one fitted anew."""
    error: float
    """Standard error of the drift."""
    max_drift: float
    """What it was allowed to lose; it is replaced where the drift exceeds that by more than its error."""
    queries: int
    """Held-out queries that say so."""
    since: int
    """Release that first had that binarizer."""


class Origin(_Frozen):
    """Why a release has its binarizer."""

    asked: dict[str, object]
    """Settings that say what kind of binarizer is wanted: method, size."""
    sources: str
    """Fingerprint of all that the choice was made from but for the earlier binarizer: documents, settings, library versions."""
    refresh: Refresh | None = None
    """None where there was no earlier binarizer of the kind that is asked for, or none may be kept."""


class CodesInfo(_Frozen):
    """Shape of the codes."""

    binarizer: str
    """Folder of the binarizer."""
    levels: tuple[int, ...]
    code_bytes: int
    files: tuple[FileRef, ...]
    """Files of the binarizer."""
    method: str = "rotation"
    """How it was made: rotation, learned or recurrent."""
    held_out_recall: dict[str, float] = {}
    """recall@10 by codes alone for held-out queries, by method that was tried."""
    judged_on: str = "vectors"
    """What those queries are: vectors of documents, or queries of given pairs."""
    given_pairs: int = 0
    """Pairs of queries and documents that were trained on, beside those mined among documents."""
    origin: Origin | None = None
    """Why this binarizer; absent in manifests of before it was recorded."""


class Segment(_Frozen):
    """Files added to a partition by one build; immutable."""

    lists: FileRef
    vectors: FileRef
    tombstones: FileRef | None = None
    """Rows of its vectors file that are there no longer, as a roaring bitmap."""

    @property
    def rows(self) -> int:
        """Rows that are there."""
        return self.vectors.rows - (self.tombstones.rows if self.tombstones is not None else 0)


class Partition(_Frozen):
    """Rows that live in one space under one set of heads."""

    partition_id: int
    path: str = ""
    """Condition on the attributes that holds for its rows and no others; empty where it is the only one."""
    bits: str = ""
    """What each of the manifest's cuts is on the way to it: 1 TRUE, 0 not TRUE, - not asked."""
    space: str
    """Encoder fingerprint of its vectors."""
    codes: CodesInfo
    heads: FileRef
    head_graph: FileRef | None = None
    """FAISS's HNSW over the heads, where these are too many to measure all."""
    directory: FileRef
    segments: tuple[Segment, ...]
    rows: int
    """Without those that have a tombstone."""

    @property
    def navigation(self) -> tuple[FileRef, ...]:
        """Files that a server reads whole."""
        graph = (self.head_graph,) if self.head_graph is not None else ()
        return (self.heads, self.directory, *graph)


class BridgeInfo(_Frozen):
    """How queries of a release's encoder reach partitions in the space of an earlier one."""

    encoder: dict[str, object]
    """Identity of the earlier encoder, whose vectors the partitions hold."""
    kind: str
    """How the bridge was found: see pipeline.spaces.bridges."""
    files: tuple[FileRef, ...]
    """Card and weights."""

    @property
    def space(self) -> str:
        """Fingerprint of the space that it leads to."""
        return str(self.encoder["fingerprint"])

    @property
    def dims(self) -> int:
        """Width of the vectors there."""
        return int(str(self.encoder["dims"]))


class IndexManifest(_Frozen):
    """Everything a reader needs; names files of this and of earlier indexes."""

    format: int = MANIFEST_FORMAT
    index: str
    """Hash of the manifest without this field."""
    corpus: str
    plan: str
    encoder: dict[str, object]
    """Identity of the encoder of queries, and of vectors but for those that a bridge leads to: see pipeline.spaces."""
    encoder_settings: dict[str, object] | None = None
    """What a reader needs to encode text queries; None where vectors are ready-made."""
    dims: int
    """Width of that encoder's vectors."""
    bridges: tuple[BridgeInfo, ...] = ()
    """Into the space of each partition that is not in the encoder's own."""
    attributes: tuple[Attribute, ...]
    documents: tuple[FileRef, ...]
    document_buckets: int
    num_documents: int
    """Those that a search can return: documents all of whose rows are condemned are left out."""
    condemned: tuple[FileRef, ...] = ()
    """Rows of `documents` that are in no partition, because their text cannot be encoded."""
    partitions: tuple[Partition, ...]
    cuts: tuple[str, ...] = ()
    """Conditions by which rows were told their partition, from the root of the tree down."""
    partition_tree: FileRef | None = None
    """The tree of those conditions; absent where there are none."""
    partition_table: FileRef | None = None
    """What is known of the attributes of each partition; absent where there is one."""
    workload: FileRef | None = None
    """Filters of past queries that the partitions were fitted to."""
    search: SearchDefaults
    statistics: dict[str, float]
    """Deterministic figures of the build: list sizes, bytes."""

    def bridge_to(self, space: str) -> BridgeInfo | None:
        """How queries reach partitions in a space; None where they are in it."""
        return next((bridge for bridge in self.bridges if bridge.space == space), None)

    def dims_of(self, partition: Partition) -> int:
        """Width of a partition's vectors."""
        bridge = self.bridge_to(partition.space)
        return self.dims if bridge is None else bridge.dims


class ReleaseRecord(_Frozen):
    """An immutable, gated index under a version number."""

    format: int = FORMAT_VERSION
    release: int
    index: str
    manifest: FileRef
    created: str
    """ISO 8601, UTC; information only."""
    summary: dict[str, object]
    """What the run reported: evaluation, counts, seconds."""


class AliasEntry(_Frozen):
    """One move of an alias."""

    seq: int
    release: int
    follows: int
    """Entry that the publisher had read when it started; 0 for the first."""
    token: str
    """Tells the publisher's own entry from another's."""
    reason: Literal["publish", "rollback"]
    created: str


class RunRecord(_Frozen):
    """How one run went, however it ended; for people and for alerts."""

    format: int = FORMAT_VERSION
    run: str
    """Id of the run, which is on every line of its logs."""
    status: Literal["finished", "failed", "stopped"]
    """`stopped`: by Ctrl-C or SIGTERM."""
    exit_code: int
    error: str | None = None
    """Class of the error."""
    message: str | None = None
    started: datetime
    finished: datetime
    seconds: float
    root: str
    corpus: str
    config: str
    """Fingerprint of the settings."""
    settings: dict[str, object]
    versions: dict[str, str]
    host: dict[str, object]
    """What kind of machine the driver ran on."""
    plan: str | None = None
    estimate: dict[str, object] = {}
    judged: dict[str, object] = {}
    """What the gates saw, of a run that did not finish."""
    seconds_by_part: dict[str, float] = {}
    stages: dict[str, dict[str, int | float]] = {}
    """By stage: tasks, done, reused, retried, workers_lost, rows, bytes, seconds, peak_memory_mb."""
    dead_letters_by_reason: dict[str, int] = {}
    summary: dict[str, object] = {}
    """The summary line of a run that finished."""


M = TypeVar("M", bound=BaseModel)


def parse_model(kind: type[M], data: bytes | Any, place: str) -> M:
    """A frozen model from its JSON.

    Raises:
        DataError: A later version of strata wrote it.
        CorruptArtifactError: It is not JSON, or not of this kind.
    """
    try:
        value = json.loads(data) if isinstance(data, bytes) else data
        expected = MANIFEST_FORMAT if kind is IndexManifest else FORMAT_VERSION
        version = value.get("format", expected)
        if version != expected:
            problem = f"expected format {expected}, found {version!r}"
            remedy = (
                "it was written by another version of strata; install that one, or build into another root"
            )
            raise DataError(place, problem, remedy)
        return kind.model_validate(value)
    except (ValueError, AttributeError, ValidationError) as error:
        problem = f"is not a readable {kind.__name__} ({' '.join(str(error).split())})"
        raise CorruptArtifactError(place, problem, "run `strata verify`") from error
