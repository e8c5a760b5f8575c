"""Documents: files of a corpus → frozen shard plan → checked shards → documents, unique and sorted, and dead letters.

`planning` looks at the files once and freezes what each shard is. `stage` reads a shard, merges a bucket of
documents and judges the bad rows; between them lie the pure parts: the rules that a row must keep (`rules` for one
row, `columns` for whole Arrow columns), `chunking` by tokens, `identity` (names made from content) and `changes`
(what differs between two sets of documents). Texts become vectors elsewhere: see `pipeline.embedding`.
"""

from pipeline.corpus.changes import Changes, count_changes
from pipeline.corpus.chunking import chunk_texts, make_splitter
from pipeline.corpus.identity import bucket_of, embedding_hashes, text_hashes, vector_ids
from pipeline.corpus.planning import plan_corpus
from pipeline.corpus.stage import (
    check_error_budget,
    count_reasons,
    documents_by_id,
    merge_documents,
    read_dead_letters,
    read_shard,
)

__all__ = [
    "Changes",
    "bucket_of",
    "check_error_budget",
    "chunk_texts",
    "count_changes",
    "count_reasons",
    "documents_by_id",
    "embedding_hashes",
    "make_splitter",
    "merge_documents",
    "plan_corpus",
    "read_dead_letters",
    "read_shard",
    "text_hashes",
    "vector_ids",
]
