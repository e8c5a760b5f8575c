import hashlib

import numpy as np
import pyarrow as pa
import pytest

from pipeline.embedding.cache import add_vectors, open_cache
from pipeline.evaluation.stage import write_query_vectors
from pipeline.index import stage
from pipeline.index.pairs import find_wanted, gather_pairs, write_wanted
from pipeline.index.stage import VectorSource
from pipeline.schemas import TEXT_HASH, condemned_schema
from pipeline.storage import LocalStore
from pipeline.tables import read_columns, to_matrix, vector_array, write_bucketed, write_table

DIMS, DOCUMENTS, CHUNKS, BUCKETS = 8, 60, 3, 2


def units(n, seed):
    vectors = np.random.default_rng(seed).standard_normal((n, DIMS))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


VECTORS = units(DOCUMENTS * CHUNKS, 0)
HASHES = [hashlib.sha256(str(i).encode()).digest()[:16] for i in range(DOCUMENTS * CHUNKS)]
QUERIES = units(20, 1)


class Root:
    """Documents of three chunks each, whose texts lie in two buckets, and their cached vectors."""

    def __init__(self, folder) -> None:
        self.store = LocalStore(str(folder))
        buckets = np.array([value[0] >> 7 for value in HASHES])
        rows = pa.table(
            {
                "vector_id": pa.array(HASHES, pa.binary(16)),
                "doc_id": [f"d{i // CHUNKS}" for i in range(len(HASHES))],
                "text_hash": pa.array(HASHES, TEXT_HASH),
            },
            schema=pa.schema(
                [
                    pa.field("vector_id", pa.binary(16), nullable=False),
                    pa.field("doc_id", pa.string(), nullable=False),
                    pa.field("text_hash", TEXT_HASH, nullable=False),
                ]
            ),
        )
        texts = write_bucketed(self.store, "scratch/texts", rows, buckets)
        cache = open_cache(self.store, "enc", dims=DIMS, rows=70_000)
        assert cache.buckets == BUCKETS
        for bucket in range(BUCKETS):
            here = sorted(np.flatnonzero(buckets == bucket), key=HASHES.__getitem__)
            table = pa.table(
                {
                    "text_hash": pa.array([HASHES[i] for i in here], TEXT_HASH),
                    "embedding": vector_array(VECTORS[here]),
                }
            )
            add_vectors(self.store, cache, bucket, table)
        self.buckets = buckets
        self.source = VectorSource((texts,), cache, ())

    def pairs(self, wanted, source=None):
        """Vectors of the queries and of the documents of pairs (row of the query, document)."""
        files = {
            "queries": write_query_vectors(self.store, QUERIES),
            "wanted": write_wanted(self.store, *zip(*wanted, strict=True)),
        }
        found = [
            find_wanted(self.store, source or self.source, bucket, **files).files["found"]
            for bucket in range(BUCKETS)
        ]
        output = gather_pairs(self.store, found=found, **files)
        table = read_columns(self.store, output.files["pairs"].path)
        assert output.numbers["pairs"] == table.num_rows
        return to_matrix(table["query"]), to_matrix(table["document"])


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path)


def nearest_chunk(query, document):
    chunks = VECTORS[document * CHUNKS : (document + 1) * CHUNKS]
    return chunks[(chunks @ QUERIES[query]).argmax()]


@pytest.mark.parametrize("slice_rows", [7, 8192])
def test_of_a_document_in_chunks_a_query_wants_the_nearest_in_whatever_bucket(
    root, monkeypatch, slice_rows
) -> None:
    monkeypatch.setattr(stage, "SLICE_ROWS", slice_rows)
    assert {len(set(root.buckets[i * CHUNKS : (i + 1) * CHUNKS])) for i in range(DOCUMENTS)} == {1, 2}
    wanted = [(query, f"d{(7 * query + more) % DOCUMENTS}") for query in range(20) for more in range(4)]
    queries, documents = root.pairs(wanted)
    assert np.array_equal(queries, QUERIES[[query for query, _ in wanted]])
    expected = [nearest_chunk(query, int(name[1:])) for query, name in wanted]
    assert np.array_equal(documents, np.array(expected))


def test_pairs_without_a_document_are_left_out_and_none_may_be_left(root) -> None:
    queries, documents = root.pairs([(3, "gone"), (4, "d9"), (5, "away")])
    assert np.array_equal(queries, QUERIES[[4]])
    assert np.array_equal(documents, [nearest_chunk(4, 9)])
    queries, documents = root.pairs([(3, "gone")])
    assert queries.shape == documents.shape == (0, DIMS)


def test_chunks_that_have_no_vector_are_not_wanted(root) -> None:
    gone = int((VECTORS[: 2 * CHUNKS] @ QUERIES[0])[:CHUNKS].argmax())
    rows = pa.table(
        [pa.array([HASHES[gone]]), pa.array([HASHES[gone]]), pa.array([CHUNKS])], schema=condemned_schema()
    )
    ref = write_table(root.store, "condemned", condemned_schema(), [rows])
    source = VectorSource(root.source.texts, root.source.cache, (), {int(root.buckets[gone]): ref})
    _, documents = root.pairs([(0, "d0")], source)
    others = np.delete(VECTORS[:CHUNKS], gone, axis=0)
    assert np.array_equal(documents[0], others[(others @ QUERIES[0]).argmax()])
