"""Choose a binarizer by what it finds for queries that nothing was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.binarization.binarizer import Binarizer
from pipeline.binarization.codec import binarize
from pipeline.binarization.fitting import fit_binarizer
from pipeline.binarization.learning import Look, Pairs, is_held_out, learn_binarizer
from pipeline.binarization.pooling import Pool, fill_pool, mined_pool, split_pairs
from pipeline.binarization.scoring import rotate_queries, score
from pipeline.config import BinarizerConfig

__all__ = ["Choice", "HeldOut", "can_compare", "choose_binarizer", "hold_out"]

FEWEST_ROWS = 2048
FEWEST_QUERIES = 32
"""With fewer rows or held-out queries methods cannot be told apart: the closed form stands. Of one vector many times over there
are none, or nothing else."""
HELD_OUT_QUERIES = 1000
STOPPING_BASE = 8192
HELD_OUT_BASE = 32_768
"""Rows among which held-out queries look for their neighbours: bounds time."""
QUERY_BLOCK = 128
"""Bounds memory."""
K = 10


@dataclass(frozen=True)
class Choice:
    """A binarizer, and what spoke for it."""

    binarizer: Binarizer
    method: str
    """rotation, learned or recurrent."""
    recall: Mapping[str, float] = field(default_factory=dict)
    """By method that was fitted: recall@10 of held-out queries by codes alone; nothing where only one was."""
    held_out_queries: int = 0
    """Queries that say so; as many others said when to stop training."""
    judged_on: Literal["vectors", "queries"] = "vectors"
    """What these are: vectors of the sample, or queries of given pairs."""
    given_pairs: int = 0
    """Pairs of queries and documents that were trained on beside mined ones."""
    curve: tuple[Look, ...] = ()
    """Of the training."""


@dataclass(frozen=True)
class HeldOut:
    """Queries that nothing is trained on, and what they are to find."""

    queries: NDArray[np.float32]
    """(q, d)."""
    base: NDArray[np.float32]
    """(n, d)."""
    exact: NDArray[np.int64]
    """(q, k) rows of `base` with the largest inner products."""

    def recall(self, binarizer: Binarizer) -> float:
        """Share of the exact ones among as many best by codes alone."""
        codes, k = binarize(binarizer, self.base), self.exact.shape[1]
        found = 0
        for start in range(0, len(self.queries), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            scores = score(binarizer, rotate_queries(binarizer, self.queries[block]), *codes)
            best = np.argpartition(scores, -k, axis=1)[:, -k:]
            found += int((best[:, :, None] == self.exact[block, None, :]).sum())
        return found / self.exact.size


def choose_binarizer(
    sample: NDArray[np.float32], *, config: BinarizerConfig, seed: int, pairs: Pairs | None = None
) -> Choice:
    """Fit the binarizer that the configuration asks for; by `auto`, the one with the higher held-out recall.

    One vector in thirty-two is held out, by its content; half of those stop the training, half judge. Of given queries
    one in eight is; where those are enough, they do it. Same sample, pairs, seed, threads, hardware and libraries: same bits.

    Args:
        sample: (n, d) float32 unit vectors, a uniform sample of the corpus.
        config: Method, and size of the codes.
        seed: Of every random choice.
        pairs: Queries of people with documents of the corpus, unit vectors; absent: vectors stand in for queries.

    Raises:
        ConfigError: The vectors are too narrow for the size asked for.
    """
    rotations, mining, distilling = np.random.SeedSequence(seed).spawn(3)
    rng = np.random.default_rng(rotations)
    if config.method == "rotation" or len(sample) < FEWEST_ROWS:
        return Choice(fit_binarizer(sample, config=config, rng=rng), "rotation")
    for_queries = is_held_out(sample)
    if not can_compare(for_queries):
        return Choice(fit_binarizer(sample, config=config, rng=rng), "rotation")
    lesson = _lesson(sample, for_queries, pairs, np.random.default_rng(mining))
    rotation = fit_binarizer(lesson.train, config=config, rng=rng)
    trained = _trained(rotation, lesson, config, distilling)
    recall = {name: lesson.judges.recall(binarizer) for name, (binarizer, _) in trained.items()}
    # The last one is the one asked for; by default the one that finds more.
    method = max(recall, key=recall.__getitem__) if config.method == "auto" else list(trained)[-1]
    binarizer, curve = trained[method]
    return Choice(
        binarizer,
        method,
        recall,
        held_out_queries=len(lesson.judges.queries),
        judged_on=lesson.judged_on,
        given_pairs=lesson.pool.given,
        curve=curve or trained["learned"][1],
    )


@dataclass(frozen=True)
class _Lesson:
    """What is trained on, and what is not."""

    train: NDArray[np.float32]
    pool: Pool
    stopping: HeldOut
    judges: HeldOut
    judged_on: Literal["vectors", "queries"]


def _lesson(
    sample: NDArray[np.float32],
    held_out: NDArray[np.bool_],
    pairs: Pairs | None,
    rng: np.random.Generator,
) -> _Lesson:
    pool, queries = mined_pool(sample[~held_out], rng), sample[:0]
    mined = len(pool.documents)
    if pairs is not None:
        pairs, queries = split_pairs(pairs, fewest=2 * FEWEST_QUERIES)
        pool = fill_pool(pool, pairs) if len(pairs.query_rows) else pool
    judged_on: Literal["vectors", "queries"] = "queries" if len(queries) else "vectors"
    queries = (queries if len(queries) else sample[held_out])[:HELD_OUT_QUERIES]
    stopping = hold_out(queries[::2], _base(pool, mined, STOPPING_BASE))
    judges = hold_out(queries[1::2], _base(pool, mined, HELD_OUT_BASE))
    # A view, and the sample without its queries is held once.
    return _Lesson(pool.documents[:mined], pool, stopping, judges, judged_on)


def _base(pool: Pool, mined: int, rows: int) -> NDArray[np.float32]:
    """Rows of the sample with all documents of given pairs."""
    if rows >= mined:
        return pool.documents
    if mined == len(pool.documents):
        return pool.documents[:rows]
    return np.concatenate([pool.documents[:rows], pool.documents[mined:]])


def _trained(
    rotation: Binarizer, lesson: _Lesson, config: BinarizerConfig, distilling: np.random.SeedSequence
) -> dict[str, tuple[Binarizer, tuple[Look, ...]]]:
    """By method, each on top of the one before it: the binarizer and the curve of its training."""
    # Torch, which who reads a release need not have.
    from pipeline.binarization.distilling import distil
    from pipeline.binarization.training import start_network, train_network

    pool, found = lesson.pool, lesson.stopping.recall
    start = learn_binarizer(rotation, pool.pairs)
    seed, network_seed = (int(number) for number in distilling.generate_state(2))
    learned, curve = distil(start, pool.vectors, pool.neighbours, recall=found, seed=seed)
    trained = {"rotation": (rotation, ()), "learned": (learned, curve)}
    if config.method != "recurrent":
        return trained
    rng = np.random.default_rng(network_seed)
    recurrent = start_network(learned, lesson.train, hidden=config.hidden_units, rng=rng)
    trained["recurrent"] = train_network(
        recurrent, pool.vectors, pool.neighbours, recall=found, seed=network_seed
    )
    return trained


def can_compare(held_out: NDArray[np.bool_]) -> bool:
    """Whether a sample is large enough to tell binarizers apart.

    Args:
        held_out: (n,) which vectors of the sample are queries.
    """
    queries = int(held_out.sum())
    return len(held_out) >= FEWEST_ROWS and FEWEST_QUERIES <= queries < len(held_out) / 2


def hold_out(queries: NDArray[np.float32], base: NDArray[np.float32]) -> HeldOut:
    """Queries with the nearest vectors of a base, by float32."""
    _, exact = faiss.knn(queries, base, min(K, len(base)), metric=faiss.METRIC_INNER_PRODUCT)
    return HeldOut(queries, base, exact)
