"""Arrow schema of each table at rest, and which of its columns are raw-addressable (DESIGN §4)."""

import pyarrow as pa

__all__ = [
    "BINARIZER_KEY",
    "COPY_DISTANCE",
    "COPY_LIST",
    "DEAD_LETTERS",
    "DIRECTORY",
    "DISTANCE",
    "FILE_NO",
    "LIST_NO",
    "OWN_PREFIX",
    "PART",
    "RAW_COLUMNS",
    "RESERVED_COLUMNS",
    "RESULTS",
    "SPACE_KEY",
    "VECTOR_ID",
    "condemned_schema",
    "documents_schema",
    "embeddings_schema",
    "heads_schema",
    "lists_schema",
    "made_by",
    "vectors_schema",
]

VECTOR_ID = pa.binary(16)
"""12 bytes of hash(doc_id), then the chunk number, big endian: chunks of a document sort together."""
TEXT_HASH = pa.binary(16)

RAW_COLUMNS = frozenset(
    {"vector_id", "text_hash", "embedding", "head", "radius", "code", "factor", "offset", "row"}
)
"""Columns written uncompressed, PLAIN, one page per chunk, so that rows are read by byte range."""

FILE_NO = "strata.file_no"
LIST_NO, PART = "strata.list_no", "strata.part"
DISTANCE = "strata.distance"
COPY_LIST, COPY_DISTANCE = "strata.copy_list", "strata.copy_distance"
"""Columns of our own that stand beside attributes on their way through a shuffle: the source file of a row, its posting list,
which part of it if it was split, its distance to that list's head, and the same of lists that have a copy."""
OWN_PREFIX = "strata."
"""Of their names; an attribute cannot have it."""

RESERVED_COLUMNS = RAW_COLUMNS | {"doc_id", "chunk_no", "text", "bucket"}
"""Other names that it cannot have."""

SPACE_KEY = b"strata.space"
BINARIZER_KEY = b"strata.binarizer"
"""Metadata of heads, lists and vectors: the encoder fingerprint of the vectors, the folder of the binarizer of the codes."""


def made_by(space: str, binarizer: str | None = None) -> dict[bytes, bytes]:
    """Metadata that says what made a file's vectors, and its codes if it has any."""
    codes = {} if binarizer is None else {BINARIZER_KEY: binarizer.encode()}
    return {SPACE_KEY: space.encode(), **codes}


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _vector(name: str, value: pa.DataType, dims: int) -> pa.Field:
    return _required(name, pa.list_(pa.field("element", value, nullable=False), dims))


def documents_schema(attributes: pa.Schema) -> pa.Schema:
    """Documents of one bucket, sorted by vector_id; text is null where vectors are ready-made and no text is named."""
    fixed = [
        _required("vector_id", VECTOR_ID),
        _required("doc_id", pa.string()),
        _required("chunk_no", pa.int32()),
        pa.field("text", pa.string()),
        _required("text_hash", TEXT_HASH),
    ]
    return pa.schema([*fixed, *attributes])


def embeddings_schema(dims: int) -> pa.Schema:
    """Cached float32 unit vectors, sorted by text_hash."""
    return pa.schema([_required("text_hash", TEXT_HASH), _vector("embedding", pa.float32(), dims)])


def condemned_schema() -> pa.Schema:
    """Rows that are in no list because their text cannot be encoded, sorted by vector_id; `chunks` has their document."""
    return pa.schema(
        [
            _required("vector_id", VECTOR_ID),
            _required("text_hash", TEXT_HASH),
            _required("chunks", pa.int32()),
        ]
    )


def heads_schema(dims: int) -> pa.Schema:
    """One row per posting list, in list order; radius is the largest squared L2 distance of an entry.

    Of copies in a list that was split the distance is an estimate from their codes.
    """
    return pa.schema([_vector("head", pa.float32(), dims), _required("radius", pa.float32())])


DIRECTORY = pa.schema(
    [
        _required("segment", pa.int32()),
        _required("list_no", pa.int32()),
        _required("first_entry", pa.int32()),
        _required("num_entries", pa.int32()),
        _required("num_primaries", pa.int32()),
        _required("first_row", pa.int32()),
        _required("list_at", pa.int64()),
        _required("code_at", pa.int64()),
        _required("factor_at", pa.int64()),
        _required("offset_at", pa.int64()),
        _required("row_at", pa.int64()),
        _required("vector_ids_at", pa.int64()),
        _required("embeddings_at", pa.int64()),
        _required("doc_ids_at", pa.int64()),
        _required("doc_ids_bytes", pa.int32()),
    ]
)
"""One row per (segment, posting list), by list, then segment; every column is raw-addressable. A list is one row group of its
segment's lists file, the bytes [list_at, row_at + 4 * num_entries): entries from `first_entry`, their columns' values
from `code_at`, `factor_at`, `offset_at` and `row_at`. Its primaries are the rows of the partition from `first_row`. In the
segment's vectors file their values start at `vector_ids_at` and `embeddings_at`, and their doc_ids are the `doc_ids_bytes` from
`doc_ids_at`, each behind its length in 4 bytes."""


def lists_schema(code_bytes: int) -> pa.Schema:
    """One row per entry, sorted by posting list, then distance to the head.

    `row` counts through the vectors files of the partition's segments: a replica's may lie in another segment than its list.
    """
    return pa.schema(
        [
            _required("code", pa.binary(code_bytes)),
            _required("factor", pa.float16()),
            _required("offset", pa.float16()),
            _required("row", pa.int32()),
        ]
    )


def vectors_schema(dims: int, attributes: pa.Schema) -> pa.Schema:
    """One row per vector, in primary order."""
    fixed = [
        _required("vector_id", VECTOR_ID),
        _required("doc_id", pa.string()),
        _vector("embedding", pa.float16(), dims),
    ]
    return pa.schema([*fixed, *attributes])


DEAD_LETTERS = pa.schema(
    [
        _required("file", pa.string()),
        _required("row", pa.int64()),
        pa.field("doc_id", pa.string()),
        _required("stage", pa.string()),
        _required("reason", pa.string()),
        pa.field("chunk_no", pa.int32()),
        pa.field("text_hash_hex", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("error", pa.string()),
    ]
)
"""Rows set aside: where they stand in the corpus, and why. The last four columns are those of texts that could not be
encoded: one row for each chunk, the hash of its text, how often it was tried alone, and what the encoder said."""

RESULTS = pa.schema(
    [
        _required("query_id", pa.string()),
        _required("rank", pa.int32()),
        _required("doc_id", pa.string()),
        _required("score", pa.float32()),
        _required("release", pa.int64()),
    ]
)
"""Search results; rank counts from 1."""
