import pytest

from pipeline.artifacts import Plan, ShardSpec, SourceFile
from pipeline.config import Config, CorpusConfig
from pipeline.corpus.planning import _document_buckets
from pipeline.embedding.cache import text_bucket_count
from pipeline.errors import ConfigError
from pipeline.execution.estimates import check_fits, estimate, migration_memory, sized

DIMS = 384


def _config(serving=None, layout=None, **ray):
    corpus = CorpusConfig(uri="corpus.parquet", format="parquet", embedding="embedding")
    return Config(root="root", corpus=corpus, serving=serving or {}, layout=layout or {}, ray=ray)


def _plan(rows):
    shards = tuple(
        ShardSpec(shard_no=i, file_no=0, first_row=0, rows=20_000) for i in range(max(1, rows // 20_000))
    )
    return Plan(
        fingerprint="f", corpus_folder="c", format="parquet", files=(SourceFile(path="p", size=1, content="c", rows=rows),),
        shards=shards[:10], attributes=(), embedding_dims=DIMS, document_buckets=_document_buckets(rows, 4 * DIMS * rows),
        rows=rows, text_bytes=0,
    )  # fmt: skip


def _estimated(rows, config):
    settled, _ = sized(_plan(rows), config, dims=DIMS)
    return estimate(_plan(rows), settled, dims=DIMS, text_buckets=text_bucket_count(rows), cpus=2)


def test_no_stage_needs_more_memory_for_more_rows_but_for_the_heads_and_up_to_the_cap_of_a_branch():
    config = _config()
    small, large = (_estimated(rows, config).memory_by_stage for rows in (1_000_000, 64_000_000))
    large = {stage: need for stage, need in large.items() if stage != "graph"}
    heads_mb = 64_000_000 / 100 * 4 * DIMS / 2**20
    assert small.keys() == large.keys()
    for stage, need in large.items():
        capped_mb = 6.4 * config.layout.max_train_rows * 4 * DIMS / 2**20
        more = {"driver": 6 * heads_mb, "grow": capped_mb, "sort": capped_mb}.get(stage, 0)
        assert need <= 1.05 * small[stage] + more, stage


def test_what_does_not_fit_is_refused_naming_the_stage_and_the_settings():
    config = _config(task_memory_mb=500)
    with pytest.raises(ConfigError, match=r"a task of stage \w+ needs about \d+ MB, allowed are 500 MB"):
        check_fits(_estimated(1_000_000, config).memory_by_stage, config)
    check_fits(_estimated(1_000_000, _config()).memory_by_stage, _config())


def test_given_pairs_cost_memory_up_to_their_cap_and_fit_where_the_same_run_fits_without():
    config = _config()
    pairs = {"pairs": {"queries": "q.jsonl", "qrels": "q.tsv"}}
    with_pairs = config.model_copy(
        update={"binarizer": type(config.binarizer).model_validate(config.binarizer.model_dump() | pairs)}
    )
    plain, paired = (_estimated(1_000_000, c).memory_by_stage for c in (config, with_pairs))
    assert paired.keys() - plain.keys() == {"wanted", "pairs"}
    # Measured, a sample of 65,536 with 8,192 pairs: 774 MB without, 1,053 MB with them.
    assert plain["learn"] >= 774
    assert 1053 <= paired["learn"] <= 1.1 * 1053
    check_fits(_estimated(1_000_000, with_pairs).memory_by_stage, with_pairs)
    assert _estimated(64_000_000, with_pairs).memory_by_stage["learn"] == paired["learn"]


def test_a_sample_too_small_to_learn_from_costs_no_torch():
    few, enough = (_estimated(rows, _config()) for rows in (2000, 2100))
    assert enough.memory_by_stage["learn"] - few.memory_by_stage["learn"] >= 170
    assert enough.seconds - few.seconds > 2


def test_the_size_of_codes_counts_however_it_is_given():
    def memory(**binarizer):
        config = _config()
        asked = type(config.binarizer)(**binarizer)
        return _estimated(1_000_000, config.model_copy(update={"binarizer": asked})).memory_by_stage

    plain, wide, deep = memory(bytes=96), memory(levels=(2 * DIMS,) * 8), memory(bits_per_dim=8)
    rows_mb = _config().layout.segment_rows / 2**20
    for code, need in ((2 * DIMS, wide), (DIMS, deep)):
        assert need["settle"] == pytest.approx(plain["settle"] + (3.5 + 4) * rows_mb * (code - 96), abs=1)
        assert need["build"] == pytest.approx(plain["build"] + 10 * rows_mb * (code - 96), abs=1)
    assert wide["learn"] > plain["learn"] + 100
    network = memory(bytes=96, method="recurrent", hidden_units=2048)
    assert network["learn"] > memory(bytes=96, method="recurrent")["learn"] + 500 > plain["learn"] + 600


def test_lists_are_as_long_as_the_memory_of_a_server_asks_and_codes_as_its_storage():
    def serving(layout=None, **settings):
        return sized(_plan(1_000_000), _config(serving=settings, layout=layout), dims=DIMS)[1]

    assert (serving().code_bytes, serving(storage="object_store").code_bytes) == (48, 96)
    assert serving({"rows_per_list": 50, "max_replicas": 3}).lists == 20_000
    tight = serving(memory_mb=8)
    assert tight.rows_per_list > 100
    assert tight.memory_mb <= 8 < serving().memory_mb
    assert serving(memory_mb=1000) == serving()


@pytest.mark.parametrize(
    ("layout", "memory_mb", "remedy"),
    [
        ({}, 2, "; raise serving.memory_mb$"),
        ({"rows_per_list": 100}, 8, r"; raise layout.rows_per_list to 2\d\d, or raise serving.memory_mb$"),
    ],
)
def test_what_no_server_could_hold_is_refused_naming_the_settings(layout, memory_mb, remedy):
    config = _config(serving={"memory_mb": memory_mb}, layout=layout)
    with pytest.raises(ConfigError, match=rf"need about \d+ MB, allowed are {memory_mb} MB{remedy}"):
        sized(_plan(1_000_000), config, dims=DIMS)


def _migrating(rows, config):
    settled, _ = sized(_plan(rows), config, dims=768)
    return migration_memory(_plan(rows), settled, dims=(768, DIMS), text_buckets=text_bucket_count(rows))


def test_no_stage_of_a_migration_needs_more_memory_for_more_rows():
    small, large = (_migrating(rows, _config()) for rows in (1_000_000, 64_000_000))
    assert all(need <= 1.05 * small[stage] for stage, need in large.items())


def test_a_sample_of_an_upgrade_that_does_not_fit_is_refused():
    config = _config()
    # Measured, 20,000 texts of 768 and 384 dimensions: 1,018 MB.
    assert 1018 <= _migrating(1_000_000, config)["upgrade"] <= 1.1 * 1018
    larger = config.upgrade.model_copy(update={"sample_documents": 500_000})
    config = config.model_copy(update={"upgrade": larger})
    with pytest.raises(ConfigError, match=r"stage upgrade needs about \d+ MB") as caught:
        check_fits(_migrating(1_000_000, config), config)
    assert "lower upgrade.sample_documents" in str(caught.value)
