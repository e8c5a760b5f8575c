"""Stages of the corpus: read a shard, merge a bucket of documents, judge the bad rows, find documents by id.

The only module of the package that writes. A stage takes names of files and returns names of files
(`StageOutput`); it knows nothing of what ran before or of the cluster it runs on.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import FileRef, Plan, ShardSpec, StageOutput, arrow_schema
from pipeline.config import CorpusConfig, StorageConfig
from pipeline.corpus.chunking import chunk_texts, make_splitter
from pipeline.corpus.columns import CheckedBatch
from pipeline.corpus.identity import (
    DOC_HASH_BYTES,
    bucket_of,
    embedding_hashes,
    hash_array,
    hash_matrix,
    sort_keys,
    text_hashes,
    vector_ids,
)
from pipeline.corpus.merging import Letter, common_reasons, first_wins, letters_of_duplicates
from pipeline.corpus.reading import read_batches
from pipeline.corpus.rules import kind_of_reason
from pipeline.errors import ConfigError, ErrorBudgetError
from pipeline.schemas import DEAD_LETTERS, FILE_NO, documents_schema
from pipeline.storage import Store, open_store
from pipeline.tables import (
    RawFile,
    open_parquet,
    read_bucket,
    read_columns,
    vector_array,
    write_bucketed,
    write_table,
)

__all__ = [
    "check_error_budget",
    "count_reasons",
    "documents_by_id",
    "merge_documents",
    "read_dead_letters",
    "read_shard",
]

ROWS_FOLDER, TEXTS_FOLDER, PLACES_FOLDER = "scratch/rows", "scratch/texts", "scratch/places"
DOCUMENTS_FOLDER, DEAD_LETTERS_FOLDER = "documents", "dead_letters"
SHOWN_FILES = 3

PLACES = pa.schema(
    [pa.field(FILE_NO, pa.int32(), nullable=False), pa.field("row", pa.int64(), nullable=False)]
)
"""Where a row stands in the corpus."""


def read_shard(
    store: Store,
    plan: Plan,
    shard: ShardSpec,
    corpus: CorpusConfig,
    storage: StorageConfig,
    tokenizer_json: bytes | None,
) -> StageOutput:
    """Read, check and chunk one shard, cut into document buckets.

    Args:
        store: The root.
        plan: The frozen plan.
        shard: One of its shards.
        corpus: The corpus section that the plan was made with.
        storage: How to reach the corpus.
        tokenizer_json: The encoder's tokenizer; needed where `corpus.chunk` is set.

    Returns:
        Files `rows` (documents_schema, FILE_NO int32, row int64, and embedding where ready-made) and, if a row was set
        aside, `dead_letters`; numbers `rows`, `bad_rows`, `chunks`, `text_bytes`.

    Raises:
        DataError: The source file changed since it was planned, or cannot be decoded.
    """
    batches = list(read_batches(open_store(plan.corpus_folder, storage), plan, shard, corpus))
    table = _chunked(_with_places(batches, shard.file_no), corpus, tokenizer_json)
    table = _identified(table, plan)
    buckets = bucket_of(hash_matrix(table["vector_id"]), plan.document_buckets)
    files = {"rows": write_bucketed(store, ROWS_FOLDER, table, buckets)}
    bad = [row for batch in batches for row in batch.bad]
    files |= _dead_letters(store, "read", [(plan.files[shard.file_no].path, *row) for row in bad])
    numbers = {
        "rows": sum(batch.num_rows for batch in batches),
        "bad_rows": len(bad),
        "chunks": table.num_rows,
        "text_bytes": pc.sum(pc.binary_length(table["text"])).as_py() or 0,
    }
    return StageOutput(files=files, numbers=numbers)


def merge_documents(
    store: Store, bucket: int, shard_rows_files: Sequence[FileRef], plan: Plan, text_buckets: int
) -> StageOutput:
    """Keep the first document of each id in one bucket, and set the others aside.

    Args:
        store: The root.
        bucket: One of the plan's document buckets.
        shard_rows_files: `rows` of every shard, in the order of the plan.
        plan: The frozen plan.
        text_buckets: Buckets of the shuffle by text hash.

    Returns:
        Files `documents` (sorted by vector_id), `places` (FILE_NO and row of each row of it), `texts` (the same rows in
        text buckets, sorted by text_hash and vector_id, with embedding where ready-made) and, if there were duplicates,
        `dead_letters`; numbers `documents`, `vectors`, `duplicates`.

    Raises:
        DataError: Two document ids have one hash.
    """
    table = pa.concat_tables([read_bucket(store, ref.path, bucket) for ref in shard_rows_files])
    # The footer of a shard's file came along as metadata, and would go into the files written here.
    table = table.replace_schema_metadata(None)
    winners, is_kept = first_wins(table)
    dropped = np.flatnonzero(~is_kept & (table["chunk_no"].to_numpy() == 0))
    duplicates = letters_of_duplicates(table, dropped, winners[dropped], plan)
    kept = np.flatnonzero(is_kept)
    ids = sort_keys(hash_matrix(table["vector_id"]))[kept]
    table = table.take(pa.array(kept[np.argsort(ids, kind="stable")]))
    places = table.select(PLACES.names).cast(PLACES)
    table = table.drop_columns(PLACES.names)
    schema = documents_schema(arrow_schema(plan.attributes))
    files = {"documents": write_table(store, DOCUMENTS_FOLDER, schema, [table.select(schema.names)])}
    files["places"] = write_table(store, PLACES_FOLDER, PLACES, [places])
    files["texts"] = _texts(store, table, text_buckets)
    files |= _dead_letters(store, "merge", duplicates)
    num_documents = int((table["chunk_no"].to_numpy() == 0).sum())
    numbers = {"documents": num_documents, "vectors": table.num_rows, "duplicates": len(duplicates)}
    return StageOutput(files=files, numbers=numbers)


def check_error_budget(
    store: Store,
    config: CorpusConfig,
    *,
    rows: int,
    bad_rows: int,
    dead_letters: Sequence[FileRef],
    condemned: int = 0,
) -> None:
    """Stop a run that has set aside more rows than it may.

    Args:
        store: The root.
        config: Has the budget.
        rows: Rows that a budget below 1 is a fraction of: the plan's, to judge early by the whole corpus.
        bad_rows: Rows set aside so far.
        dead_letters: Where they are; read only if the budget is passed.
        condemned: Texts beside them that the encoder failed on, which are in no dead-letter table yet.

    Raises:
        ErrorBudgetError: Names the commonest reasons with a place each, the table, and what to do.
    """
    budget = config.error_budget
    allowed = budget * rows if budget < 1 else budget
    if bad_rows + condemned <= allowed:
        return
    remedy = "mend the rows or raise corpus.error_budget"
    problem = f"{bad_rows + condemned} of {rows} rows are bad, error_budget {budget:g} allows {int(allowed)}"
    if condemned:
        problem += f", {condemned} of them texts that the encoder failed on"
        remedy += "; the encoder's failures are tried again by `strata redrive`"
    table = read_dead_letters(store, dead_letters)
    paths = [f"{store.uri}/{ref.path}" for ref in dead_letters]
    more = f" and {len(paths) - SHOWN_FILES} more" if len(paths) > SHOWN_FILES else ""
    place = f"all of them are in {', '.join(paths[:SHOWN_FILES])}{more}; " if paths else ""
    reasons = f": {common_reasons(table)}" if table.num_rows else ""
    raise ErrorBudgetError(config.uri, f"{problem}{reasons}", f"{place}{remedy}")


def read_dead_letters(store: Store, files: Sequence[FileRef]) -> pa.Table:
    """Rows of several dead-letter files as one table (schemas.DEAD_LETTERS)."""
    # Files of earlier versions lack columns, which become null.
    tables = [read_columns(store, ref.path) for ref in files]
    return pa.concat_tables([DEAD_LETTERS.empty_table(), *tables], promote_options="default").cast(
        DEAD_LETTERS
    )


def count_reasons(store: Store, files: Sequence[FileRef]) -> dict[str, int]:
    """Dead letters by kind of reason, the commonest first; all duplicates are one kind, whatever they are duplicates of."""
    counts: Counter[str] = Counter()
    for ref in files:
        reasons = read_columns(store, ref.path, ["reason"])["reason"]
        for found in pc.value_counts(reasons).to_pylist():
            reason = found["values"]
            kind = "duplicate" if reason.startswith("duplicate of") else kind_of_reason(reason)
            counts[kind] += found["counts"]
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def documents_by_id(
    store: Store, documents: Sequence[FileRef], doc_ids: Sequence[str], columns: Sequence[str] | None = None
) -> pa.Table:
    """Text and attributes of documents, touching only their buckets and only the row groups they are in.

    Args:
        store: The root.
        documents: One file per document bucket, in bucket order.
        doc_ids: Wanted ids, in any order.
        columns: Columns to read; all if absent.

    Returns:
        All chunks of the documents that are there, sorted by vector_id; an id that is not there has no row.
    """
    wanted = np.unique(sort_keys(vector_ids(doc_ids, np.zeros(len(doc_ids), np.int32))[:, :DOC_HASH_BYTES]))
    raw = wanted.view(np.uint8).reshape(-1, DOC_HASH_BYTES)
    buckets = bucket_of(raw, len(documents))
    found = [
        _documents_of(store, documents[bucket], wanted[buckets == bucket], columns)
        for bucket in np.unique(buckets)
    ]
    empty = _rows_of(store, documents[0], np.zeros(0, np.int64), columns)
    return pa.concat_tables([empty, *found])


# ------------------------------------------------------------------------------------------------ shards


def _with_places(batches: Sequence[CheckedBatch], file_no: int) -> pa.Table:
    table = pa.concat_tables([batch.table for batch in batches])
    rows = np.concatenate([batch.rows for batch in batches])
    table = table.append_column(FILE_NO, pa.array(np.full(len(rows), file_no, np.int32)))
    table = table.append_column("row", pa.array(rows))
    vectors = [batch.vectors for batch in batches if batch.vectors is not None]
    return table.append_column("embedding", vector_array(np.concatenate(vectors))) if vectors else table


def _chunked(table: pa.Table, corpus: CorpusConfig, tokenizer_json: bytes | None) -> pa.Table:
    if corpus.chunk is None:
        return table.append_column("chunk_no", pa.array(np.zeros(table.num_rows, np.int32)))
    if tokenizer_json is None:
        problem = "chunks are cut by the encoder's tokens, and no tokenizer was given"
        raise ConfigError("corpus.chunk", problem, "use an encoder with a tokenizer.json, or remove it")
    chunks = chunk_texts(table["text"].to_pylist(), make_splitter(corpus.chunk, tokenizer_json))
    table = table.drop_columns(["text"]).take(pa.array(chunks.rows))
    table = table.append_column("text", pa.array(chunks.texts, pa.string()))
    return table.append_column("chunk_no", pa.array(chunks.chunk_no))


def _identified(table: pa.Table, plan: Plan) -> pa.Table:
    ids = vector_ids(table["doc_id"].combine_chunks(), table["chunk_no"].to_numpy())
    schema = documents_schema(arrow_schema(plan.attributes))
    places = list(PLACES)
    if plan.embedding_dims is None:
        hashes = text_hashes(table["text"].combine_chunks())
    else:
        vectors = table["embedding"].combine_chunks()
        places.append(pa.field("embedding", vectors.type, nullable=False))
        flat = vectors.flatten().to_numpy()
        hashes = embedding_hashes(flat.reshape(-1, plan.embedding_dims))
    table = table.append_column("vector_id", hash_array(ids)).append_column("text_hash", hash_array(hashes))
    schema = pa.schema([*schema, *places])
    return table.select(schema.names).cast(schema)


def _dead_letters(store: Store, stage: str, bad: Sequence[Letter]) -> dict[str, FileRef]:
    """Write (file, row, doc_id, reason) of bad rows, if there are any."""
    if not bad:
        return {}
    file, row, doc_id, reason = (list(column) for column in zip(*bad, strict=True))
    nothing = [pa.nulls(len(bad), field.type) for field in DEAD_LETTERS][5:]
    table = pa.table([file, row, doc_id, [stage] * len(bad), reason, *nothing], schema=DEAD_LETTERS)
    return {"dead_letters": write_table(store, DEAD_LETTERS_FOLDER, DEAD_LETTERS, [table])}


# ------------------------------------------------------------------------------------------------ documents


def _texts(store: Store, table: pa.Table, text_buckets: int) -> FileRef:
    hashes = hash_matrix(table["text_hash"])
    # The table is sorted by vector_id, which a stable sort keeps among equal texts.
    order = np.argsort(sort_keys(hashes), kind="stable")
    return write_bucketed(
        store, TEXTS_FOLDER, table.take(pa.array(order)), bucket_of(hashes[order], text_buckets)
    )


def _documents_of(
    store: Store, ref: FileRef, wanted: NDArray[np.bytes_], columns: Sequence[str] | None
) -> pa.Table:
    ids = RawFile(store, ref, ["vector_id"]).read_all("vector_id")
    keys = sort_keys(ids[:, :DOC_HASH_BYTES])
    first, stop = np.searchsorted(keys, wanted), np.searchsorted(keys, wanted, side="right")
    spans = [np.arange(a, b) for a, b in zip(first, stop, strict=True)]
    return _rows_of(store, ref, np.concatenate([np.zeros(0, np.int64), *spans]), columns)


def _rows_of(store: Store, ref: FileRef, rows: NDArray[np.int64], columns: Sequence[str] | None) -> pa.Table:
    with open_parquet(store, ref.path) as file:
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        ends = np.cumsum(sizes, dtype=np.int64)
        group_of_row = np.searchsorted(ends, rows, side="right")
        groups = np.unique(group_of_row)
        table = file.read_row_groups(groups.tolist(), columns=columns and list(columns), use_threads=False)
    # rows before the first group read, and in the groups left out between
    kept = np.isin(np.arange(len(sizes)), groups)
    new_starts = np.cumsum(np.where(kept, sizes, 0)) - np.where(kept, sizes, 0)
    places = rows - (ends - sizes)[group_of_row] + new_starts[group_of_row]
    return table.take(pa.array(places))
