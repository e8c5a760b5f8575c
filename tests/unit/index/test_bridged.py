"""Search of a release whose partitions are in another space than its queries: across a bridge, and on both of its sides."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import CorruptArtifactError, IncompatibleModelsError
from pipeline.filters import parse_filter
from pipeline.index.batch import search_many
from pipeline.index.bridges import Crossing, load_crossing, write_crossing
from pipeline.index.reader import IndexReader
from pipeline.spaces import EncoderIdentity
from pipeline.spaces.bridges import Bridge, Residual
from pipeline.spaces.calibration import Calibration, Cohort
from pipeline.storage import LocalStore
from tests.unit.index.test_reader import (
    DIMS,
    EVERY,
    _corpus,
    _layout,
    _learned,
    _manifest,
    _queries,
    _source,
    _table,
)

WIDER = DIMS + 8
ROWS = 2100
IDENTITY = Calibration(np.array([-1, 1], np.float32), np.array([-1, 1], np.float32))


def _identity(name, dims):
    return EncoderIdentity(
        fingerprint=(name * 8)[:24],
        name=name,
        model=f"path:{name}",
        dims=dims,
        dtype="float32",
        max_tokens=None,
    )


OLD, NEW = _identity("old", DIMS), _identity("new", WIDER)


@pytest.fixture(scope="module")
def isometry():
    """(WIDER, DIMS) with orthonormal columns: new vectors are old ones seen from a wider space."""
    return np.linalg.qr(np.random.default_rng(3).standard_normal((WIDER, DIMS)))[0].astype(np.float32)


@pytest.fixture(scope="module")
def crossing(isometry):
    zeros = np.zeros(WIDER, np.float32), np.zeros(DIMS, np.float32)
    return Crossing(Bridge("procrustes", *zeros, isometry), IDENTITY)


def _built(store, vectors, columns, rows, space):
    vectors, columns = vectors[rows], [[column[i] for i in rows] for column in columns]
    source = _source(store, _table(vectors, *columns), vectors, space)
    layout, binarizer = _layout(store, source, len(vectors)), _learned(store, source, len(vectors))
    return _manifest(store, source, layout, binarizer, len(vectors))


class Halves:
    """One corpus three times: all of it in the old space, half of it in each, and its old half."""

    def __init__(self, store, isometry, crossing):
        self.store = store
        self.vectors, *columns = _corpus(np.random.default_rng(5), chunks=1)
        self.names, self.years = columns[0], columns[1]
        every, old, new = np.arange(ROWS), np.arange(0, ROWS, 2), np.arange(1, ROWS, 2)
        bridge = write_crossing(store, crossing, new=NEW, old=OLD)
        self.native = _built(store, self.vectors, columns, every, OLD.fingerprint)
        bridged = {"encoder": NEW.model_dump(mode="json"), "dims": WIDER, "bridges": (bridge,)}
        self.bridged = self.native.model_copy(update=bridged)
        older = _built(store, self.vectors, columns, old, OLD.fingerprint).partitions[0]
        newer = _built(store, self.vectors @ isometry.T, columns, new, NEW.fingerprint).partitions[0]
        both = older, newer.model_copy(update={"partition_id": 1})
        self.mixed = self.bridged.model_copy(update={"partitions": both})

    def best(self, query, k, keep=None):
        """doc_ids of the k best by stored vectors, which of both halves are the same products."""
        scores = self.vectors @ query
        rows = np.arange(ROWS) if keep is None else np.flatnonzero([keep(year) for year in self.years])
        return [self.names[row] for row in rows[np.argsort(-scores[rows])][:k]]


@pytest.fixture(scope="module")
def halves(tmp_path_factory, isometry, crossing):
    return Halves(LocalStore(str(tmp_path_factory.mktemp("root"))), isometry, crossing)


def _hits(result):
    return [[hit.doc_id for hit in hits] for hits in result]


def test_new_queries_find_across_a_bridge_what_their_images_find_in_the_old_space(halves, isometry):
    queries = _queries(20)
    native = IndexReader(halves.store, halves.native).search(queries, k=10)
    bridged = IndexReader(halves.store, halves.bridged).search(queries @ isometry.T, k=10)
    assert _hits(bridged) == _hits(native)
    assert bridged.stats == native.stats
    scores = [[hit.score for hit in hits] for hits in native]
    assert [[hit.score for hit in hits] for hits in bridged] == [
        pytest.approx(own, abs=1e-5) for own in scores
    ]


@pytest.mark.parametrize("exact", [True, False])
def test_documents_on_both_sides_of_a_bridge_rank_together(halves, isometry, exact):
    queries = _queries(20)
    reader = IndexReader(halves.store, halves.mixed)
    found = reader.search(queries @ isometry.T, k=10, probing=EVERY, rerank=ROWS, exact=exact)
    agreed = [
        len({*hits} & {*halves.best(query, 10)}) for query, hits in zip(queries, _hits(found), strict=True)
    ]
    # Stored as float16, vectors of one text score in each space as near as that rounds them.
    assert np.mean(agreed) >= 9.9
    assert found.stats.queries == len(queries)
    assert all(len({*hits}) == 10 for hits in _hits(found))


def test_many_queries_together_find_on_both_sides_what_each_finds_alone(halves, isometry):
    queries = _queries(30) @ isometry.T
    where = parse_filter("year >= 2012", IndexReader(halves.store, halves.mixed).attributes)
    filters = [where if i % 3 else None for i in range(len(queries))]
    reader = IndexReader(halves.store, halves.mixed)
    found = search_many(reader, queries, filters, k=10, exact=True)
    for number, (query, one) in enumerate(zip(queries, filters, strict=True)):
        alone = reader.search(query, k=10, where=one, exact=True)[0]
        mine = found.query == number
        assert found.doc_id.filter(pa.array(mine)).to_pylist() == [hit.doc_id for hit in alone]
        assert found.rank[mine].tolist() == [*range(1, 11)]
        assert found.score[mine] == pytest.approx([hit.score for hit in alone], abs=1e-5)


def test_a_filter_holds_on_both_sides_of_a_bridge(halves, isometry):
    queries = _queries(10)
    reader = IndexReader(halves.store, halves.mixed)
    where = parse_filter("year = 2003", reader.attributes)
    found = reader.search(queries @ isometry.T, k=10, where=where)
    for query, hits in zip(queries, _hits(found), strict=True):
        assert hits == halves.best(query, 10, keep=lambda year: year == 2003)


def test_scores_from_across_are_calibrated_before_they_are_merged(halves, isometry, crossing):
    # Old documents score as if all of them were a little better than new ones: they take all places.
    lifted = Crossing(crossing.bridge, Calibration(IDENTITY.bridged, IDENTITY.native + np.float32(3)))
    bridge = write_crossing(halves.store, lifted, new=NEW, old=OLD)
    manifest = halves.mixed.model_copy(update={"bridges": (bridge,)})
    found = IndexReader(halves.store, manifest).search(_queries(5) @ isometry.T, k=10)
    old = {halves.names[row] for row in range(0, ROWS, 2)}
    assert all({*hits} <= old for hits in _hits(found))
    assert all(hit.score > 1 for hits in found for hit in hits)


def test_vectors_that_no_bridge_leads_to_are_refused_with_both_names(halves, isometry):
    manifest = halves.mixed.model_copy(update={"bridges": ()})
    with pytest.raises(IncompatibleModelsError, match=rf"{OLD.fingerprint[:12]}.*no bridge from new"):
        IndexReader(halves.store, manifest).search(_queries(1) @ isometry.T)


def test_queries_have_the_width_of_the_new_space(halves):
    with pytest.raises(ValueError, match=rf"{WIDER} dimensions, as new makes them, found {DIMS}"):
        IndexReader(halves.store, halves.mixed).search(_queries(1))


# ------------------------------------------------------------------------------------------------ files


def test_a_bridge_comes_back_as_it_was_written(tmp_path, crossing):
    store, rng = LocalStore(str(tmp_path)), np.random.default_rng(1)
    arrays = (rng.standard_normal(shape).astype(np.float32) for shape in [(WIDER, 5), (5,), (5, DIMS)])
    bridge = Bridge(
        "residual",
        crossing.bridge.mean_from,
        crossing.bridge.mean_to,
        crossing.bridge.matrix,
        Residual(*arrays),
    )
    cohort = Cohort(*(rng.standard_normal((60, dims)).astype(np.float32) for dims in (WIDER, DIMS)))
    held_against = Crossing(bridge, Calibration(IDENTITY.bridged, IDENTITY.native, cohort))
    loaded = load_crossing(store, write_crossing(store, held_against, new=NEW, old=OLD), NEW).calibration
    assert (loaded.cohort.new == cohort.new).all()
    assert (loaded.cohort.old == cohort.old).all()
    info = write_crossing(store, Crossing(bridge, IDENTITY), new=NEW, old=OLD, texts=7)
    found = load_crossing(store, info, NEW)
    assert found.calibration.cohort is None
    queries = rng.standard_normal((4, WIDER)).astype(np.float32)
    assert found.bridge.kind == "residual"
    assert (found.queries(queries) == bridge.apply(queries)).all()
    assert (info.space, info.dims) == (OLD.fingerprint, DIMS)
    assert write_crossing(store, Crossing(bridge, IDENTITY), new=NEW, old=OLD, texts=7) == info


def test_a_bridge_for_queries_of_another_encoder_is_refused(tmp_path, crossing):
    store = LocalStore(str(tmp_path))
    info = write_crossing(store, crossing, new=NEW, old=OLD)
    other = _identity("other", WIDER)
    with pytest.raises(IncompatibleModelsError, match=r"expected a bridge from other.*found one from new"):
        load_crossing(store, info, other)


def test_damaged_weights_of_a_bridge_are_refused(tmp_path, crossing):
    store = LocalStore(str(tmp_path))
    info = write_crossing(store, crossing, new=NEW, old=OLD)
    weights = tmp_path / info.files[1].path
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(CorruptArtifactError, match="expected the bridge's file of sha256"):
        load_crossing(store, info, NEW)
