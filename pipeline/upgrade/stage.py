"""Stages of an upgrade: sample documents, then train, judge and write a bridge."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import FileRef, StageOutput
from pipeline.corpus.identity import bucket_of, hash_array, hash_matrix
from pipeline.embedding.cache import Cache
from pipeline.errors import DataError
from pipeline.evaluation.stage import read_query_vectors
from pipeline.index.binarizers import load_binarizer
from pipeline.index.bridges import Crossing, write_crossing
from pipeline.index.vectors import cached_vectors
from pipeline.measures import Interval, mean, paired_interval, share_interval
from pipeline.spaces import EncoderIdentity
from pipeline.storage import Store, canonical_json, write_recorded
from pipeline.tables import hash_keys, read_columns, write_bucketed, write_table
from pipeline.upgrade.choosing import Choice, choose, held_out_exam
from pipeline.upgrade.exam import Exam, Figures, Pairs, Rung
from pipeline.upgrade.heads import stored_codes
from pipeline.upgrade.ladder import FULL, STATUS_QUO, climb

__all__ = [
    "HASHED",
    "AskedOfBoth",
    "SampledTexts",
    "cutoff_for",
    "judge_bridges",
    "name_texts",
    "sample_texts",
    "write_hashes",
]

SAMPLED = pa.schema(
    [
        pa.field("text_hash", pa.binary(16), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
HASHED = pa.schema(
    [pa.field("text_hash", pa.binary(16), nullable=False), pa.field("doc_id", pa.string(), nullable=False)]
)
FIT_TEXTS = 10_000
"""Texts to train on, at most: what the benchmark of upgrades trains on."""
FIT_SHARE = 0.8
"""Of the sample, where that is smaller."""
REPORTED = 1000
"""Documents that stand in for reported queries, at most."""
METRICS = ("ndcg_at_10", "recall_at_100", "overlap_at_10")
FEWEST_TEXTS = 8


@dataclass(frozen=True)
class AskedOfBoth:
    """Queries with vectors of both encoders, and what people say that they want."""

    new: FileRef
    """Those that are reported first, then those that choose."""
    old: FileRef
    """In the space of the vectors that the index holds."""
    query_ids: tuple[str, ...]
    """Of the reported ones."""
    qrels: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class SampledTexts:
    """A sample of an index."""

    files: tuple[FileRef, ...]
    """Of `sample_texts`."""
    corpus: int
    """Vectors that the index holds."""
    binarizer: str
    """Of its codes."""


def cutoff_for(share: float) -> bytes:
    """The text hash below which a share of all of them lie, which may be above 1."""
    return min(2**128 - 1, int(share * 2**128)).to_bytes(16, "big")


def sample_texts(
    store: Store, documents: FileRef, *, cutoff: bytes, wanted: frozenset[str], buckets: int
) -> StageOutput:
    """Texts of one file of documents whose hash is small, and those of documents that are asked for.

    Of a document of several chunks only the first: it stands for all of them.

    Args:
        store: The root.
        documents: Of a release.
        cutoff: From `cutoff_for`.
        wanted: doc_ids of documents that are sampled whatever their hash is.
        buckets: Buckets of text hashes of the new encoder's cache.

    Returns:
        File `texts`: rows of SAMPLED by bucket of text hash.
    """
    columns = ["text_hash", "doc_id", "text", "chunk_no"]
    table = read_columns(store, documents.path, columns)
    hashes = hash_keys(table["text_hash"])
    is_wanted = pc.is_in(table["doc_id"], pa.array(sorted(wanted), pa.string())).to_numpy()
    is_first = table["chunk_no"].to_numpy() == 0
    kept = table.filter(pa.array(is_first & ((hashes <= np.bytes_(cutoff)) | is_wanted)))
    kept = kept.select(SAMPLED.names).cast(SAMPLED)
    of_row = bucket_of(hash_matrix(kept["text_hash"]), buckets)
    return StageOutput(files={"texts": write_bucketed(store, "scratch/sampled", kept, of_row)})


def write_hashes(store: Store, hashes: NDArray[np.bytes_]) -> FileRef:
    """Put hashes of texts (n,) where every task can read them."""
    column = hash_array(hashes.view(np.uint8).reshape(-1, 16))
    table = pa.table({"text_hash": column})
    return write_table(store, "scratch/hashes", table.schema, [table])


def name_texts(store: Store, documents: FileRef, hashes: FileRef) -> StageOutput:
    """Documents of one file whose text is one of some.

    Args:
        store: The root.
        documents: Of a release.
        hashes: File of `write_hashes`.

    Returns:
        File `named`: rows of HASHED.
    """
    table = read_columns(store, documents.path, HASHED.names).cast(HASHED).replace_schema_metadata(None)
    wanted = hash_keys(read_columns(store, hashes.path)["text_hash"])
    found = table.filter(pa.array(np.isin(hash_keys(table["text_hash"]), wanted)))
    return StageOutput(files={"named": write_table(store, "scratch/named_texts", HASHED, [found])})


def judge_bridges(
    store: Store,
    *,
    sampled: SampledTexts,
    caches: tuple[Cache, Cache],
    encoders: tuple[EncoderIdentity, EncoderIdentity],
    asked: AskedOfBoth | None,
    cascade_depths: Sequence[int],
    seed: int,
) -> StageOutput:
    """Train every bridge, choose one, and hold it against the other ways to answer queries of the new encoder.

    Args:
        store: The root.
        sampled: Texts, and of which index.
        caches: Of the new encoder and of the old one.
        encoders: The new one and the old one.
        asked: Queries; None: documents stand in for them.
        cascade_depths: Candidates of the ladder's cascades.
        seed: Of every random choice.

    Returns:
        Files `bridge` and `weights`: the artifact; `ladder`: JSON with the rungs.

    Raises:
        DataError: There are too few texts with vectors of both encoders.
    """
    sample, corpus = _read_sample(store, sampled.files, *caches), sampled.corpus
    fit, held_out, places = _split(sample, asked)
    spare, exam = _asked(store, asked, fit, held_out, places, corpus)
    choice = choose(fit, held_out, corpus=corpus, seed=seed, queries=spare)
    order = np.random.default_rng(seed).permutation(len(exam.old))
    codes = load_binarizer(store, sampled.binarizer, dims=exam.old.shape[1])
    stored = stored_codes(fit, held_out_exam(fit, held_out, corpus, spare), exam.old, codes, seed=seed)
    rungs = list(climb(exam, choice, depths=cascade_depths, order=order, stored=stored))
    new, old = encoders
    said = {"recall": choice.recall, "chosen": choice.chosen, "texts": len(fit), "queries": len(exam.own)}
    crossing = Crossing(choice.bridge, choice.calibration)
    bridge, weights = write_crossing(store, crossing, new=new, old=old, **said).files
    ladder = _write_json(store, {**said, **_described(exam, choice, rungs, corpus=corpus, seed=seed)})
    return StageOutput(files={"bridge": bridge, "weights": weights, "ladder": ladder})


# ------------------------------------------------------------------------------------------------ sample


@dataclass(frozen=True, eq=False)
class _Sample:
    """Distinct texts that both encoders have embedded, by rising hash."""

    pairs: Pairs
    rows_of: Mapping[str, int]
    """By document."""


def _read_sampled(store: Store, sampled: Sequence[FileRef]) -> pa.Table:
    tables = [read_columns(store, ref.path, ["text_hash", "doc_id"]) for ref in sampled]
    return pa.concat_tables(tables).replace_schema_metadata(None)


def _read_sample(store: Store, sampled: Sequence[FileRef], new: Cache, old: Cache) -> _Sample:
    table = _read_sampled(store, sampled)
    hashes, row_of = np.unique(hash_keys(table["text_hash"]), return_inverse=True)
    by_new, by_old = (cached_vectors(store, cache, hashes) for cache in (new, old))
    has_both = by_new.is_there & by_old.is_there
    place = np.cumsum(has_both) - 1
    names = table["doc_id"].to_pylist()
    rows_of = {
        name: int(place[row]) for name, row in zip(names, row_of.tolist(), strict=True) if has_both[row]
    }
    return _Sample(Pairs(by_new.vectors[has_both], by_old.vectors[has_both]), rows_of)


def _split(sample: _Sample, asked: AskedOfBoth | None) -> tuple[Pairs, Pairs, dict[str, int]]:
    """Texts to train on, those held out, and the rows of judged documents among these."""
    judged = {doc for grades in (asked.qrels if asked else {}).values() for doc in grades}
    wanted = sorted({row for doc, row in sample.rows_of.items() if doc in judged})
    free = np.setdiff1d(np.arange(len(sample.pairs)), wanted)
    if len(free) < FEWEST_TEXTS:
        problem = f"expected {FEWEST_TEXTS} texts or more with vectors of both encoders, found {len(free)}"
        raise DataError("upgrade", problem, "a corpus as small as this is embedded anew by `strata run`")
    fit = free[: min(FIT_TEXTS, math.floor(FIT_SHARE * len(free)))]
    held_out = np.concatenate([free[len(fit) :], np.array(wanted, np.int64)])
    place = {row: at for at, row in enumerate(held_out.tolist())}
    places = {doc: place[row] for doc, row in sample.rows_of.items() if row in place}
    return _rows(sample.pairs, fit), _rows(sample.pairs, held_out), places


def _rows(pairs: Pairs, rows: NDArray[np.int64]) -> Pairs:
    return Pairs(pairs.new[rows], pairs.old[rows])


# ------------------------------------------------------------------------------------------------ exam


def _asked(
    store: Store,
    asked: AskedOfBoth | None,
    fit: Pairs,
    held_out: Pairs,
    places: Mapping[str, int],
    corpus: int,
) -> tuple[Pairs | None, Exam]:
    """Queries that choose, None where documents do, and the exam of the reported ones."""
    if asked is None:
        # The first half of what is held out stands in for queries that choose, at most.
        reported = np.arange(len(held_out) - min(REPORTED, len(held_out) // 2), len(held_out))
        queries = _rows(held_out, reported)
        exam = held_out_exam(fit, held_out, corpus, queries)
        return None, Exam(exam.old, exam.new, queries.old, queries.new, reported)
    new, old = (read_query_vectors(store, ref) for ref in (asked.new, asked.old))
    count = len(asked.query_ids)
    exam = held_out_exam(fit, held_out, corpus, Pairs(new[:count], old[:count]))
    grades = tuple(
        {places[doc]: grade for doc, grade in asked.qrels.get(query, {}).items() if doc in places}
        for query in asked.query_ids
    )
    judged = Exam(exam.old, exam.new, exam.old_queries, exam.new_queries, exam.own, grades)
    spare = Pairs(new[count:], old[count:])
    return spare if len(spare) > 1 else None, judged


# ------------------------------------------------------------------------------------------------ ladder


def _described(
    exam: Exam, choice: Choice, rungs: Sequence[Rung], *, corpus: int, seed: int
) -> dict[str, Any]:
    figures = {rung.name: exam.figures(rung) for rung in rungs}
    metrics = METRICS if exam.judged else METRICS[-1:]
    return {
        "judged_by": metrics[0],
        "judged_queries": len(exam.judged),
        "documents": len(exam.old),
        "share": choice.share,
        "rungs": [
            {
                "name": rung.name,
                "documents_embedded": _scaled(rung, len(exam.old), corpus),
                **{metric: _compared(figures, rung.name, metric, seed) for metric in metrics},
            }
            for rung in rungs
        ],
    }


def _scaled(rung: Rung, documents: int, corpus: int) -> int:
    """Documents of the index that it takes: a backfill's share of them; of a cascade those that the queries at hand ask for."""
    return rung.embedded if rung.name.startswith("cascade") else round(rung.embedded / documents * corpus)


def _compared(figures: Mapping[str, Figures], name: str, metric: str, seed: int) -> dict[str, Any]:
    """Its mean, its paired difference to the status quo, and the share of a full backfill's gain that it keeps."""
    part, base, whole = (getattr(figures[rung], metric) for rung in (name, STATUS_QUO, FULL))
    gain = paired_interval(part, base, np.random.default_rng(seed))
    possible = paired_interval(whole, base, np.random.default_rng(seed))
    kept = share_interval(part, base, whole, np.random.default_rng(seed)) if possible.low > 0 else None
    return {"value": round(mean(part.tolist()), 4), "gain": _rounded(gain), "share_kept": _rounded(kept)}


def _rounded(interval: Interval | None) -> list[float | None] | None:
    """None for an end that is infinite."""
    if interval is None:
        return None
    return [round(one, 4) if math.isfinite(one) else None for one in interval]


def _write_json(store: Store, content: Mapping[str, Any]) -> FileRef:
    """Under the hash of its content."""
    data = canonical_json(content)
    return write_recorded(store, f"bridges/ladders/{hashlib.sha256(data).hexdigest()[:32]}.json", data)
