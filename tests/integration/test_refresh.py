"""A root whose corpus changes from run to run: which binarizer each release has, and what of the codes stays."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import structlog

from pipeline.artifacts import CodesInfo, IndexManifest
from pipeline.errors import QualityGateError
from pipeline.execution.flows import run
from pipeline.execution.ledger import Ledger
from pipeline.execution.work import StoreSpec
from pipeline.index.reader import open_release
from pipeline.release import collect, rollback, verify
from pipeline.release.records import read_manifest
from pipeline.reporting.page import render
from pipeline.reporting.stage import gather
from pipeline.storage import LocalStore
from pipeline.tables import vector_array
from tests.integration.roads import Inline, configured, settings

DIMS = 32
ROWS = 2400


def vectors_of(n, *, wide, seed):
    """Unit vectors of some clusters that vary most in some dimensions."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, DIMS))
    vectors = 0.6 * centres[rng.integers(0, 40, n)] + rng.standard_normal((n, DIMS))
    vectors[:, wide] *= 4
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


FIRST = vectors_of(ROWS + 200, wide=slice(8), seed=0)
SHIFTED = np.vstack([FIRST[: ROWS // 2], vectors_of(ROWS // 2, wide=slice(16, 24), seed=1)])


class Road:
    """A root, and the corpus that it is made of."""

    def __init__(self, folder: Path, root: str = "root") -> None:
        self.folder, self.root = folder, root

    @property
    def store(self):
        return LocalStore(str(self.folder / self.root))

    def config(self, **more):
        corpus = self.folder / "corpus.parquet"
        content = settings(
            self.folder / self.root, corpus, layout={"rows_per_list": 100, "segment_rows": 4000}
        )
        del content["encoders"], content["encoder"]
        content["corpus"] = {
            "uri": str(corpus),
            "name": "vectors",
            "format": "parquet",
            "embedding": "embedding",
        }
        content["evaluation"] = {"sample_queries": 20}
        content["binarizer"] |= {"method": "rotation", "max_drift": 0.04} | more.pop("binarizer", {})
        return configured(self.folder, content | more)

    def run(self, vectors, ledger=None, **more):
        """The summary of a run on documents d0, d1, ... with these vectors."""
        ids = [f"d{i}" for i in range(len(vectors))]
        table = pa.table({"_id": ids, "text": [""] * len(ids), "embedding": vector_array(vectors)})
        pq.write_table(table, self.folder / "corpus.parquet")
        config = self.config(**more)
        spec = StoreSpec(config.root, config.storage)
        return run(config, spec, lambda: Inline(spec), ledger)

    def manifest(self) -> IndexManifest:
        return read_manifest(self.store, open_release(self.store.uri).record)

    def codes(self) -> CodesInfo:
        return self.manifest().partitions[0].codes

    def rows(self):
        """Code, factor and offset by document."""
        (partition,) = self.manifest().partitions
        (segment,) = partition.segments
        names = pq.read_table(Path(self.store.uri) / segment.vectors.path, columns=["doc_id"])[
            "doc_id"
        ].to_pylist()
        lists = pq.read_table(Path(self.store.uri) / segment.lists.path).to_pylist()
        return {names[row["row"]]: (row["code"], row["factor"], row["offset"]) for row in lists}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A root with one release, to be copied."""
    road = Road(tmp_path_factory.mktemp("first"))
    assert road.run(FIRST[:ROWS])["binarizer"]["refresh"] is None
    return road


@pytest.fixture
def road(first, tmp_path):
    shutil.copytree(first.store.uri, tmp_path / "root")
    return Road(tmp_path)


def test_a_grown_corpus_keeps_its_binarizer_and_the_codes_of_its_rows(road):
    first, before = road.codes(), road.rows()
    refresh = road.run(FIRST[: ROWS + 100])["binarizer"]["refresh"]
    assert (refresh["outcome"], refresh["since"], refresh["max_drift"]) == ("kept", 1, 0.04)
    assert abs(refresh["drift"]) < 0.04
    after = road.rows()
    assert len(after) == ROWS + 100
    assert {name: after[name] for name in before} == before
    again = road.run(FIRST)["binarizer"]["refresh"]
    assert (again["outcome"], again["since"]) == ("kept", 1)
    assert road.codes().files == first.files
    assert verify(road.store).problems == ()


def test_a_shifted_corpus_gets_the_binarizer_of_a_fresh_build(road):
    refresh = road.run(SHIFTED)["binarizer"]["refresh"]
    assert (refresh["outcome"], refresh["since"]) == ("replaced", 1)
    assert refresh["drift"] - refresh["error"] > refresh["max_drift"]
    kept = road.run(SHIFTED[:-50])["binarizer"]["refresh"]
    assert (kept["outcome"], kept["since"]) == ("kept", 2)
    fresh = Road(road.folder, "fresh")
    fresh.run(SHIFTED)
    assert fresh.codes().files == road.codes().files


def test_without_an_allowance_a_changed_corpus_gives_the_bytes_of_a_fresh_build(road):
    always = {"binarizer": {"max_drift": None}}
    assert road.run(FIRST, **always)["binarizer"]["refresh"] is None
    fresh = Road(road.folder, "fresh")
    fresh.run(FIRST, **always)
    assert _named(fresh) == _named(road)


def test_a_kept_binarizer_finds_what_one_of_a_fresh_build_finds(road):
    road.run(FIRST)
    fresh = Road(road.folder, "fresh")
    fresh.run(FIRST)
    kept, new = (
        [[hit.doc_id for hit in hits] for hits in open_release(r.store.uri).search(FIRST[:100], exact=True)]
        for r in (road, fresh)
    )
    assert kept == new
    assert road.codes().binarizer != fresh.codes().binarizer


def _named(road):
    (partition,) = road.manifest().partitions
    return [partition.codes.files, partition.heads, partition.directory, partition.segments]


@pytest.mark.parametrize("changed", [FIRST, SHIFTED], ids=["kept", "replaced"])
def test_the_same_corpus_again_learns_nothing_and_changes_nothing(road, changed):
    road.run(changed)
    codes, index = road.codes(), road.manifest().index
    assert road.run(changed)["skipped"] is True
    again = road.run(changed, search={"rerank": 50})
    assert again["published"] is True
    assert "learn" not in again["seconds"]
    assert road.codes() == codes
    back = road.run(changed)
    assert (back["published"], back["index"]) == (True, index)


def test_a_kept_binarizer_is_dated_from_the_release_that_first_had_it(road):
    road.run(FIRST[:ROWS], search={"rerank": 50})
    refresh = road.run(FIRST[: ROWS + 100])["binarizer"]["refresh"]
    assert (refresh["outcome"], refresh["since"]) == ("kept", 1)


def test_a_share_of_a_gpu_changes_no_release(road):
    assert road.run(FIRST[:ROWS], binarizer={"gpus": 0.5})["skipped"] is True


@pytest.mark.parametrize("changed", [FIRST[: ROWS - 50], SHIFTED[:-50]], ids=["kept", "replaced"])
def test_a_run_that_goes_on_after_another_ended_early_finds_its_receipt(road, changed):
    early, late = Ledger(), Ledger()
    with pytest.raises(QualityGateError):
        road.run(changed, early, gates={"max_removed_fraction": 0.0})
    assert road.run(changed, late)["published"] is True
    assert [ledger.stages["learn"].reused for ledger in (early, late)] == [0, 1]


def test_gc_keeps_what_a_kept_binarizer_is_made_of(road):
    for rows in (ROWS + 50, ROWS + 100):
        road.run(FIRST[:rows])
    files = road.codes().files
    later = datetime.now(UTC) + timedelta(seconds=5)
    report = collect(road.store, grace=timedelta(0), now=later, keep=1)
    assert report.retired == (1, 2)
    assert verify(road.store).problems == ()
    assert open_release(road.store.uri).search(FIRST[:1])[0][0].doc_id == "d0"
    assert road.run(FIRST)["binarizer"]["refresh"]["outcome"] == "kept"
    assert road.codes().files == files


def test_rolling_back_goes_back_to_the_binarizer_of_that_release_and_stands(road):
    for corpus in (SHIFTED, SHIFTED[:-50]):
        road.run(corpus)
    newest = road.manifest().index
    rollback(road.store, 1)
    again = road.run(SHIFTED[:-50])
    assert again["index"] != newest, "learned for fewer rows than the one that release 3 has kept"
    assert again["published"] is False
    refresh = road.run(FIRST)["binarizer"]["refresh"]
    assert (refresh["outcome"], refresh["since"]) == ("kept", 1)


@pytest.mark.parametrize("other", [{"bytes": 8}, {"method": "auto"}, {"bytes": None, "bits_per_dim": 4}])
def test_a_binarizer_of_another_kind_than_asked_for_is_not_measured(road, other):
    before = road.codes().binarizer
    assert road.run(FIRST, binarizer=other)["binarizer"]["refresh"] is None
    assert road.codes().binarizer != before


def test_what_was_fitted_on_too_little_to_learn_from_is_not_kept_and_what_was_learned_then_is(tmp_path):
    road, auto = Road(tmp_path), {"binarizer": {"method": "auto"}}
    assert road.run(FIRST[:1000], **auto)["binarizer"]["held_out_recall"] == {}
    grown = road.run(FIRST[:ROWS], **auto)["binarizer"]
    assert grown["refresh"] is None
    before = road.rows()
    kept = road.run(FIRST, **auto)["binarizer"]
    assert (kept["refresh"]["outcome"], kept["refresh"]["since"]) == ("kept", 2)
    assert kept["held_out_recall"] == grown["held_out_recall"]
    assert grown["held_out_recall"].keys() == {"rotation", "learned"}
    after = road.rows()
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("name", ["weights.safetensors", "binarizer.json"])
def test_a_kept_binarizer_whose_file_is_gone_is_learned_anew(road, name):
    road.run(FIRST)
    folder = Path(road.store.uri) / road.codes().binarizer
    (folder / name).unlink()
    assert road.run(FIRST)["binarizer"]["refresh"] is None
    assert verify(road.store).problems == ()


def test_log_page_and_verdict_say_what_became_of_the_binarizer(road):
    with structlog.testing.capture_logs() as logs:
        refresh = road.run(FIRST)["binarizer"]["refresh"]
    (said,) = [entry for entry in logs if entry["event"] == "binarizer"]
    assert {key: said[key] for key in refresh} == refresh
    page = render(gather(road.store, road.config(), None))
    assert "kept since release 1 (drift" in page
    with structlog.testing.capture_logs() as logs:
        road.run(SHIFTED)
    assert [entry["outcome"] for entry in logs if entry["event"] == "binarizer"] == ["replaced"]
    assert "replaces that of release 1 (drift +0." in render(gather(road.store, road.config(), None))
