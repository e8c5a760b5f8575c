"""Rows that have a tombstone: no search finds them, and lists that hold nothing else are not read."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import CorruptArtifactError
from pipeline.filters import parse_filter
from pipeline.index.batch import search_many
from pipeline.index.reader import IndexReader
from pipeline.index.stage import graph_heads
from pipeline.index.tombstones import read_tombstones, write_tombstones
from pipeline.postings import Probing
from pipeline.storage import LocalStore
from pipeline.tables import read_columns
from tests.unit.index.test_reader import (
    EVERY,
    _corpus,
    _layout,
    _learned,
    _manifest,
    _plain,
    _queries,
    _source,
    _table,
)


class Graves:
    """An index some of whose rows have a tombstone."""

    def __init__(self, store, chunks):
        self.store = store
        self.vectors, *columns = _corpus(np.random.default_rng(5), chunks)
        self.table = _table(self.vectors, *columns)
        source = _source(store, self.table, self.vectors, "given")
        layout, binarizer = (
            _layout(store, source, len(self.vectors)),
            _learned(store, source, len(self.vectors)),
        )
        self.whole = _manifest(store, source, layout, binarizer, len(self.vectors) // chunks)
        self.place = {one.as_py(): i for i, one in enumerate(self.table["vector_id"])}

    def without(self, rng, share, *, segment=None):
        """The index with a share of its rows buried, or one segment whole; and which rows of the table are left."""
        (partition,) = self.whole.partitions
        left = np.ones(len(self.vectors), np.bool_)
        segments = []
        for number, one in enumerate(partition.segments):
            rows = np.flatnonzero(rng.random(one.vectors.rows) < share)
            rows = np.arange(one.vectors.rows) if number == segment else rows
            ids = read_columns(self.store, one.vectors.path, ["vector_id"])["vector_id"].take(pa.array(rows))
            left[[self.place[name] for name in ids.to_pylist()]] = False
            ref = write_tombstones(self.store, rows) if len(rows) else None
            segments.append(one.model_copy(update={"tombstones": ref}))
        rows = sum(one.rows for one in segments)
        part = partition.model_copy(update={"segments": tuple(segments), "rows": rows})
        documents = len(
            {name for name, is_left in zip(self.table["doc_id"].to_pylist(), left, strict=True) if is_left}
        )
        return self.whole.model_copy(update={"partitions": (part,), "num_documents": documents}), left


@pytest.fixture(scope="module", params=[1, 3], ids=["one vector each", "chunks"])
def graves(request, tmp_path_factory):
    return Graves(LocalStore(str(tmp_path_factory.mktemp("root"))), request.param)


def _found(result):
    return [[hit.doc_id for hit in hits] for hits in result]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_no_search_finds_a_row_with_a_tombstone_and_all_find_what_is_left(graves, share):
    manifest, left = graves.without(np.random.default_rng(1), share)
    queries = _queries(12)
    reader = IndexReader(graves.store, manifest)
    wanted = [_plain(graves.vectors, graves.table, query, 10, left)[0] for query in queries]
    assert _found(reader.search(queries, k=10, exact=True)) == wanted
    assert _found(reader.search(queries, k=10, probing=EVERY, rerank=len(graves.vectors))) == wanted
    many = search_many(reader, queries, [None] * len(queries), k=10, exact=True)
    assert [many.doc_id.filter(pa.array(many.query == i)).to_pylist() for i in range(12)] == wanted
    probing = _found(reader.search(queries, k=10))
    alive = {name for name, is_left in zip(graves.table["doc_id"].to_pylist(), left, strict=True) if is_left}
    assert all({*hits} <= alive and len(hits) == min(10, len(alive)) for hits in probing)


def test_a_filter_lets_no_row_with_a_tombstone_pass(graves):
    manifest, left = graves.without(np.random.default_rng(2), 0.4)
    reader = IndexReader(graves.store, manifest)
    where = parse_filter("year >= 2010", reader.attributes)
    passes = np.array([year is not None and year >= 2010 for year in graves.table["year"].to_pylist()])
    queries = _queries(6)
    wanted = [_plain(graves.vectors, graves.table, query, 10, left & passes)[0] for query in queries]
    assert _found(reader.search(queries, k=10, where=where, exact=True)) == wanted
    many = search_many(reader, queries, [where] * 6, k=10, exact=True)
    assert [many.doc_id.filter(pa.array(many.query == i)).to_pylist() for i in range(6)] == wanted


@pytest.mark.parametrize("has_graph", [False, True])
def test_lists_of_a_buried_segment_are_not_probed(graves, has_graph):
    manifest, left = graves.without(np.random.default_rng(3), 0.0, segment=0)
    (partition,) = manifest.partitions
    if has_graph:
        graph = graph_heads(graves.store, partition.heads).files["graph"]
        partition = partition.model_copy(update={"head_graph": graph})
        manifest = manifest.model_copy(update={"partitions": (partition,)})
    directory = read_columns(graves.store, partition.directory.path)
    of_buried = set(directory.filter(pa.compute.equal(directory["segment"], 0))["list_no"].to_pylist())
    (one,) = IndexReader(graves.store, manifest).partitions()
    assert set(np.flatnonzero(~one.part.open_lists).tolist()) == of_buried
    reader = IndexReader(graves.store, manifest)
    queries = _queries(20)
    found = reader.search(queries, k=10, probing=Probing(1000, 4.0), rerank=400)
    assert found.stats.lists_probed <= len(queries) * (partition.heads.rows - len(of_buried))
    wanted = [_plain(graves.vectors, graves.table, query, 10, left)[0] for query in queries]
    agreed = [len({*a} & {*b}) for a, b in zip(_found(found), wanted, strict=True)]
    assert np.mean(agreed) >= 9.9


def test_tombstones_come_back_as_they_were_written(tmp_path):
    store = LocalStore(str(tmp_path))
    rows = np.random.default_rng(1).permutation(100_000)[:7000]
    ref = write_tombstones(store, rows)
    assert (read_tombstones(store, ref) == np.sort(rows)).all()
    assert ref.rows == 7000
    assert write_tombstones(store, rows[::-1]) == ref


def test_damaged_tombstones_are_refused(tmp_path):
    store = LocalStore(str(tmp_path))
    ref = write_tombstones(store, np.arange(10))
    (tmp_path / ref.path).write_bytes(b"\x00" * ref.bytes)
    with pytest.raises(CorruptArtifactError, match="expected sha256"):
        read_tombstones(store, ref)
