"""Arrow schema of each table at rest, and which of its columns are raw-addressable (DESIGN §4)."""

import pyarrow as pa

__all__ = [
    "BINARIZER_KEY",
    "DEAD_LETTERS",
    "DISTANCE",
    "FILE_NO",
    "LIST_NO",
    "RAW_COLUMNS",
    "RESERVED_COLUMNS",
    "RESULTS",
    "SPACE_KEY",
    "condemned_schema",
    "directory_schema",
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
LIST_NO = "strata.list_no"
DISTANCE = "strata.distance"
"""Columns of our own that stand beside attributes on their way through a shuffle: the source file of a row, its posting list and
its distance to that list's head."""

RESERVED_COLUMNS = RAW_COLUMNS | {"doc_id", "chunk_no", "text", "bucket", FILE_NO, LIST_NO, DISTANCE}
"""Names that an attribute cannot have."""

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
    """One row per posting list, in list order; radius is the largest squared L2 distance of a member."""
    return pa.schema([_vector("head", pa.float32(), dims), _required("radius", pa.float32())])


def directory_schema() -> pa.Schema:
    """One row per (segment, posting list): where its entries lie in the segment's lists file."""
    return pa.schema(
        [
            _required("segment", pa.int32()),
            _required("list_no", pa.int32()),
            _required("first_entry", pa.int32()),
            _required("num_entries", pa.int32()),
        ]
    )


def lists_schema(code_bytes: int) -> pa.Schema:
    """One row per entry, sorted by posting list, then distance to the head; `row` points into the vectors file."""
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
