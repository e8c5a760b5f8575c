"""Runs that learn their binarizer from given pairs: what is looked up, what is left out, what is done once, what is refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import structlog

from pipeline.embedding.hashing import HashingEncoder
from pipeline.errors import ConfigError, DataError, QualityGateError
from pipeline.execution.flows import run
from pipeline.execution.ledger import Ledger
from pipeline.execution.work import StoreSpec
from pipeline.index.reader import open_release
from pipeline.release import verify
from pipeline.release.records import read_manifest
from pipeline.reporting.page import render
from pipeline.reporting.stage import gather
from pipeline.storage import LocalStore
from pipeline.tables import to_matrix
from tests.integration.roads import Inline, configured, rows_of, settings, write_jsonl, write_parquet

LARGE, SMALL = 2400, 300
"""Rows: enough to learn from, and not."""


class Road:
    """A corpus, queries that people ask of it, and what they want."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.rows = rows_of(rows)
        write_parquet(folder / "corpus.parquet", self.rows)

    @property
    def store(self):
        return LocalStore(str(self.folder / "root"))

    def question(self, document: int) -> str:
        """Words of a document, and one of another kind."""
        return " ".join([*self.rows[document]["text"].split()[:3], f"asked{document % 9}"])

    def ask(self, documents, *, name: str = "asked", qrels=None) -> dict[str, str]:
        """Queries q0, q1, ... made of words of documents, each of which wants its document unless `qrels` say otherwise."""
        queries = [{"_id": f"q{i}", "text": self.question(i)} for i in documents]
        write_jsonl(self.folder / f"{name}.jsonl", queries)
        qrels = qrels or [(f"q{i}", self.rows[i]["_id"], 1) for i in documents]
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, line)) for line in qrels)]
        (self.folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
        return {
            "queries": str(self.folder / f"{name}.jsonl"),
            "qrels": str(self.folder / f"{name}.tsv"),
        }

    def config(self, pairs, **more):
        content = settings(self.folder / "root", self.folder / "corpus.parquet")
        content["binarizer"] |= {"pairs": pairs} | more.pop("binarizer", {})
        content["corpus"] |= more.pop("corpus", {})
        return configured(self.folder, content | more)

    def run(self, pairs, ledger=None, **more):
        config = self.config(pairs, **more)
        spec = StoreSpec(config.root, config.storage)
        return run(config, spec, lambda: Inline(spec), ledger)

    def pairs(self):
        """Vectors of the queries and of the documents that the last lookup found."""
        (path,) = [info.path for info in self.store.list("scratch/pairs")]
        table = pq.read_table(self.folder / "root" / path)
        return to_matrix(table["query"]), to_matrix(table["document"])

    def card(self):
        record = open_release(self.store.uri).record
        codes = read_manifest(self.store, record).partitions[0].codes
        return codes, json.loads(self.store.read(f"{codes.binarizer}/binarizer.json"))

    def encode(self, texts):
        return HashingEncoder(self.config(None).encoders["words"]).encode_documents(texts)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A root whose binarizer was learned from given pairs, after an attempt that the gates stopped."""
    road = Road(tmp_path_factory.mktemp("pairs"), LARGE)
    # Their judgments cannot be met, so that a gate can stop a run.
    judged = road.ask(
        range(40), name="judged", qrels=[(f"q{i}", road.rows[i + 50]["_id"], 1) for i in range(40)]
    )
    # Twenty of them are reported on, two want what is not there, and one a document that is of no use to it.
    wanted = [(f"q{i}", road.rows[i]["_id"], 2.5) for i in range(20, 900)]
    wanted += [("q900", "gone", 1), ("q901", "gone", 1), ("q902", road.rows[902]["_id"], 0)]
    road.asked = road.ask(range(20, 903), qrels=wanted)
    road.ledgers = [Ledger(), Ledger()]
    more = {"evaluation": judged | {"sample_queries": 50}}
    with pytest.raises(QualityGateError):
        road.run(road.asked, road.ledgers[0], gates={"min_ndcg_at_10": 1.0}, **more)
    with structlog.testing.capture_logs() as road.logs:
        road.summary = road.run(road.asked, road.ledgers[1], **more)
    road.more = more
    return road


def test_given_pairs_are_looked_up_learned_from_and_judged_on(large) -> None:
    found = large.summary["binarizer"]
    assert found["judged_on"] == "queries"
    assert 600 < found["given_pairs"] < 860
    codes, card = large.card()
    assert (codes.given_pairs, codes.judged_on) == (found["given_pairs"], "queries")
    assert (card["given_pairs"], card["judged_on"]) == (found["given_pairs"], "queries")
    assert card["held_out_queries"] >= 32
    assert verify(large.store).problems == ()
    config = large.config(large.asked)
    html = render(gather(large.store, config, large.summary["release"]))
    assert "What the binarizer was learned from" in html
    assert "given queries" in html


def test_each_query_stands_beside_the_vector_of_its_document(large) -> None:
    queries, documents = large.pairs()
    assert len(queries) == 860
    row_of = {vector.tobytes(): i for i, vector in enumerate(documents)}
    for i in (40, 500, 899):
        text = f"{large.rows[i]['title']} {large.rows[i]['text']}"
        document, query = large.encode([text, large.question(i)])
        assert np.array_equal(queries[row_of[document.tobytes()]], query)


def test_queries_that_are_reported_on_are_left_out_and_lost_documents_counted(large) -> None:
    (read,) = [line for line in large.logs if line["event"] == "pairs_to_learn_from"]
    assert (read["pairs"], read["of_reported"]) == (862, 20)
    (found,) = [line for line in large.logs if line["event"] == "pairs_found"]
    assert (found["pairs"], found["without_document"]) == (860, 2)
    queries, _ = large.pairs()
    assert large.encode([large.question(25)])[0].tobytes() not in {query.tobytes() for query in queries}


def test_a_rerun_finds_the_receipts_of_the_lookup_and_of_the_learning(large) -> None:
    for stage in ("wanted", "pairs", "learn"):
        assert [ledger.stages[stage].reused for ledger in large.ledgers] == [0, 1], stage


def test_a_run_on_the_same_of_all_takes_the_binarizer_without_a_lookup(large) -> None:
    ledger = Ledger()
    before = large.card()[0].files
    large.run(large.asked, ledger, search={"rerank": 50}, **large.more)
    assert not {"wanted", "pairs", "learn"} & set(ledger.stages)
    assert large.card()[0].files == before


def test_other_files_ask_for_another_binarizer_and_other_content_lets_the_drift_decide(large) -> None:
    before = large.card()[0].files
    fewer = large.ask(range(20, 800))
    assert fewer == large.asked
    refresh = large.run(fewer, **large.more)["binarizer"]["refresh"]
    assert refresh["outcome"] == "kept"
    assert large.card()[0].files == before
    elsewhere = large.ask(range(20, 800), name="elsewhere")
    summary = large.run(elsewhere, **large.more)
    assert summary["binarizer"]["refresh"] is None
    assert large.card()[0].files != before


@pytest.fixture
def road(tmp_path):
    return Road(tmp_path, SMALL)


def test_ready_made_vectors_of_queries_are_learned_from(road) -> None:
    asked = road.ask([3])
    vectors = 3 * road.encode(["river1 stone2"])
    rows = [{"query_id": "q3", "embedding": vector.tolist()} for vector in vectors]
    write_jsonl(road.folder / "asked.jsonl", rows)
    road.run(asked)
    (query,), _ = road.pairs()
    np.testing.assert_allclose(query, vectors[0] / 3, atol=1e-6)


def test_pairs_of_which_no_document_is_in_the_corpus_are_refused_with_both_files(road) -> None:
    asked = road.ask([1, 2], qrels=[("q1", "gone", 1), ("q2", "away", 1)])
    with pytest.raises(DataError, match="none of the documents of its 2 pairs") as caught:
        road.run(asked)
    assert asked["queries"] in str(caught.value)
    assert asked["qrels"] in str(caught.value)


@pytest.mark.parametrize(
    "qrels", [[("p1", "doc-00001", 1)], [("q1", "doc-00001", 0), ("q2", "doc-00002", -1)]]
)
def test_qrels_without_a_pair_are_refused_before_anything_is_built(road, qrels) -> None:
    asked = road.ask([1, 2], qrels=qrels)
    with pytest.raises(DataError, match="has no pair") as caught:
        road.run(asked)
    assert asked["queries"] in str(caught.value)
    assert asked["qrels"] in str(caught.value)
    assert not list(road.store.list("documents"))


def test_pairs_all_of_whose_queries_are_reported_on_are_refused(road) -> None:
    asked, judged = road.ask(range(10)), road.ask(range(30), name="judged")
    with pytest.raises(DataError, match="reports on all its queries"):
        road.run(asked, evaluation=judged)


def test_what_a_release_is_reported_on_is_no_pair_to_learn_from(road) -> None:
    asked = road.ask(range(10))
    with pytest.raises(ConfigError, match="are what evaluation reports on"):
        road.config(asked, evaluation=asked)
    assert road.config(asked, evaluation=asked | {"qrels": "other.tsv"}).binarizer.pairs is not None


@pytest.mark.parametrize("missing", ["queries", "qrels"])
def test_pairs_are_two_files(road, missing: str) -> None:
    asked = road.ask(range(10))
    del asked[missing]
    with pytest.raises(ConfigError, match=f"binarizer.pairs.{missing}"):
        road.config(asked)


def test_a_rotation_takes_no_pairs(road) -> None:
    with pytest.raises(ConfigError, match="learns nothing from them"):
        road.config(road.ask(range(10)), binarizer={"method": "rotation"})
