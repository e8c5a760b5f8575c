"""Real corpora as they come: Parquet of one row group, many shards long, with lists, nulls and odd texts."""

import duckdb
import pytest

from pipeline import open_release
from pipeline.release import verify
from pipeline.storage import open_store
from tests.integration.roads import configured, run_inline

CORPORA = {
    "cve": {
        "file": "cve/cve.parquet",
        "id": "id",
        "text": ["description"],
        "attributes": ["year", "products", "weakness", "cwe", "n_refs", "n_github_poc"],
        "filter": "year = 2009 AND n_refs > 3",
    },
    "debian": {
        "file": "debian/debian_packages.parquet",
        "id": "package",
        "text": ["package", "synopsis", "description"],
        "attributes": ["section", "priority", "installed_size_kb", "size", "n_depends", "tags"],
        "filter": "section = 'games' AND list_contains(tags, 'uitoolkit::sdl')",
    },
    "wordnet": {
        "file": "wordnet/wordnet30.parquet",
        "id": "id",
        "text": ["gloss"],
        "attributes": ["pos", "lexfile", "lemmas", "n_senses"],
        "filter": "lexfile = 'noun.animal' AND n_senses >= 3",
    },
}


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", CORPORA)
def test_every_document_of_a_real_corpus_is_found_by_its_attributes(shared_data, tmp_path, name):
    corpus = dict(CORPORA[name])
    file, where = shared_data / corpus.pop("file"), corpus.pop("filter")
    config = configured(
        tmp_path,
        {
            "root": str(tmp_path / "root"),
            "corpus": {"uri": str(file), "format": "parquet", **corpus},
            "encoders": {"words": {"model": "hashing:64"}},
            "encoder": "words",
            "binarizer": {"bytes": 16, "method": "rotation"},
        },
    )
    summary = run_inline(config)
    name_of = corpus["id"]
    expected = duckdb.sql(f"SELECT {name_of} FROM '{file}' WHERE {where}").fetchall()
    ((rows,),) = duckdb.sql(f"SELECT count(DISTINCT {name_of}) FROM '{file}'").fetchall()
    assert (summary["documents"], summary["dead_letters"]) == (rows, 0)
    assert verify(open_store(config.root), None).problems == ()
    found = open_release(config.root).search("small animal game", k=len(expected) + 10, filter=where)[0]
    assert len(expected) > 10
    assert sorted(hit.doc_id for hit in found) == sorted(str(doc_id) for (doc_id,) in expected)
