"""The binarizer of a run: that of the current release as long as it is good enough for the corpus, otherwise a new one."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from pipeline.artifacts import CodesInfo, FileRef, IndexManifest, Origin, Refresh, StageOutput
from pipeline.binarization.choosing import FEWEST_ROWS
from pipeline.config import BinarizerConfig, PairsConfig
from pipeline.errors import DataError
from pipeline.evaluation.queries import Queries, read_qrels, read_queries
from pipeline.evaluation.stage import write_query_vectors
from pipeline.execution.asking import query_vectors
from pipeline.execution.documents import DocumentFiles
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.judgement import Questions
from pipeline.execution.session import BuildSession
from pipeline.execution.work import Task, digest
from pipeline.index.binarizers import learn_binarizer
from pipeline.index.pairs import find_wanted, gather_pairs, write_wanted
from pipeline.index.training import most_pairs, sample_rows
from pipeline.index.vectors import VectorSource
from pipeline.release.records import first_release_with
from pipeline.storage import Store, is_whole

__all__ = ["AskedPairs", "BinarizerInForce", "Parent", "binarizer_in_force", "read_pairs"]


@dataclass(frozen=True)
class Parent:
    """The release that the alias named when the run started."""

    release: int
    manifest: IndexManifest


@dataclass(frozen=True)
class BinarizerInForce:
    """Files `binarizer` and `weights`, and why these."""

    files: dict[str, FileRef]
    origin: Origin


@dataclass(frozen=True)
class AskedPairs:
    """Queries to learn from, encoded, and the names of the documents that they want."""

    queries: FileRef
    wanted: FileRef


@dataclass(frozen=True)
class _Stored:
    codes: CodesInfo
    files: dict[str, FileRef]
    space: str
    """Fingerprint of the encoder."""
    release: int
    """That has it, and was current when the run started."""

    @classmethod
    def of(cls, parent: Parent) -> "_Stored":
        # Of a release between two encoders, that of the newer one, if there is one yet.
        own = str(parent.manifest.encoder["fingerprint"])
        partitions = parent.manifest.partitions
        partition = next((one for one in partitions if one.space == own), partitions[0])
        codes = partition.codes
        files = {_role(ref): ref for ref in codes.files}
        return cls(codes, files, partition.space, parent.release)


def _role(ref: FileRef) -> str:
    """binarizers/…/weights.safetensors → weights."""
    return ref.path.rpartition("/")[2].partition(".")[0]


def read_pairs(
    session: BuildSession, encoder: EncoderInForce, questions: Questions | None
) -> AskedPairs | None:
    """The configured pairs, whose queries need nothing of the corpus; None where there are none.

    Args:
        session: The run.
        encoder: Of the queries.
        questions: Those that are reported on; none of them is learned from.

    Raises:
        DataError: The files break their contract, have no pair to learn from, or a query cannot be encoded.
        ConfigError: The queries are texts, and no encoder is configured.
    """
    config = session.config.binarizer.pairs
    if config is None:
        return None
    storage = session.config.storage
    queries = read_queries(config.queries, storage, dims=encoder.dims)
    pairs = _named_pairs(queries, read_qrels(config.qrels, storage))
    if not pairs:
        problem = f"has no pair: no query with a score above 0 is among those of {config.queries}"
        raise DataError(config.qrels, problem, "make query-id agree with query_id")
    pairs = sorted(pairs[: most_pairs(session.config.layout)])
    rows = sorted({row for row, _ in pairs})
    vectors = query_vectors(session, "learn", queries.subset(rows), encoder, place=config.queries)
    reported = {vector.tobytes() for vector in questions.reported} if questions is not None else set()
    is_reported = {row for row, vector in zip(rows, vectors, strict=True) if vector.tobytes() in reported}
    kept = [(row, name) for row, name in pairs if row not in is_reported]
    structlog.get_logger().info("pairs_to_learn_from", pairs=len(kept), of_reported=len(pairs) - len(kept))
    if not kept:
        problem = f"has no pair to learn from: evaluation reports on all its queries of {config.queries}"
        raise DataError(config.qrels, problem, "give other queries to learn from than to report on")
    place = {row: i for i, row in enumerate(rows)}
    return AskedPairs(
        queries=write_query_vectors(session.store, vectors),
        wanted=write_wanted(session.store, [place[row] for row, _ in kept], [name for _, name in kept]),
    )


def _named_pairs(queries: Queries, qrels: Mapping[str, Mapping[str, float]]) -> list[tuple[int, str]]:
    """Rows of queries and doc_ids that they want, in the order of the hashes of their names."""
    place = {query: i for i, query in enumerate(queries.query_ids)}
    pairs = [
        (query, name)
        for query, grades in qrels.items()
        if query in place
        for name, grade in grades.items()
        if grade > 0
    ]
    pairs.sort(key=lambda pair: hashlib.sha256("\n".join(pair).encode()).digest())
    return [(place[query], name) for query, name in pairs]


def binarizer_in_force(
    session: BuildSession,
    documents: DocumentFiles,
    source: VectorSource,
    encoder: EncoderInForce,
    parent: Parent | None,
    asked_pairs: AskedPairs | None,
) -> BinarizerInForce:
    """Take the binarizer of the current release if it was chosen from all the same; otherwise measure it, or learn one.

    Args:
        session: The run.
        documents: The live documents.
        source: Their vectors.
        encoder: What made them.
        parent: The release that was current when the run started; a run that goes on after a crash finds the same.
        asked_pairs: What `read_pairs` found.

    Raises:
        DataError: The corpus has none of the documents of the pairs.
    """
    config = session.config.binarizer
    stored = _whole(session.store, parent)
    afresh = _task(session, documents, source, encoder, asked_pairs)
    if stored is not None and stored.codes.origin is not None and stored.codes.origin.sources == afresh.key:
        structlog.get_logger().info("binarizer", outcome="unchanged")
        return BinarizerInForce(stored.files, stored.codes.origin)
    if stored is not None and not _is_candidate(stored, config, encoder, _rows(session, documents)):
        stored = None
    task = afresh if stored is None else _against(afresh, stored.files)
    if asked_pairs is not None:
        # While a release migrates, the documents that are wanted may all be on its other side.
        is_part = parent is not None and bool(parent.manifest.bridges)
        pairs = _found_pairs(session, source, encoder, asked_pairs, is_part=is_part)
        task = task if pairs is None else _with_pairs(task, pairs)
    (output,) = session.outputs("learn", [task])
    origin = Origin(asked=asked(config), sources=afresh.key, refresh=_refresh(session, stored, output))
    _announce(origin)
    return BinarizerInForce(output.files, origin)


def asked(config: BinarizerConfig) -> dict[str, object]:
    """The settings that a binarizer must have been made with to be one of the kind that is asked for."""
    settings = config.model_dump(mode="json", exclude={"max_drift", "gpus", "pairs"})
    pairs = {"pairs": config.pairs.model_dump(mode="json")} if config.pairs is not None else {}
    # Absent ones are left out: binarizers of before there were any are of the same kind.
    return settings | pairs


def _whole(store: Store, parent: Parent | None) -> _Stored | None:
    """The binarizer of the current release, if there is a release and its files are there."""
    if parent is None:
        return None
    stored = _Stored.of(parent)
    return stored if all(is_whole(store, ref) for ref in stored.codes.files) else None


def _rows(session: BuildSession, documents: DocumentFiles) -> int:
    return sample_rows(documents.vectors, session.config.layout)


def _is_candidate(stored: _Stored, config: BinarizerConfig, encoder: EncoderInForce, rows: int) -> bool:
    """Whether it may be kept if it loses little: of the kind asked for, and measurable on a sample of so many rows."""
    codes = stored.codes
    # Fitted when there was too little to learn from.
    is_makeshift = config.method != "rotation" and not codes.held_out_recall
    return (
        config.max_drift is not None
        and rows >= FEWEST_ROWS
        and stored.space == encoder.fingerprint
        and codes.origin is not None
        and codes.origin.asked == asked(config)
        and not is_makeshift
    )


def _task(
    session: BuildSession,
    documents: DocumentFiles,
    source: VectorSource,
    encoder: EncoderInForce,
    asked_pairs: AskedPairs | None,
) -> Task:
    """Learn a binarizer; keyed by all that the choice is made from."""
    config = session.config
    arguments: dict[str, Any] = {
        "sample_rows": _rows(session, documents),
        "seed": config.seed,
        "config": config.binarizer.model_copy(update={"gpus": None}),
    }
    inputs: dict[str, Any] = {
        "texts": documents.texts,
        "encoder": encoder.fingerprint,
        "condemned": source.condemned,
    }
    if asked_pairs is not None:
        inputs |= {"queries": asked_pairs.queries, "wanted": asked_pairs.wanted}
    gpus = 0.0 if config.binarizer.method == "rotation" else config.binarizer.gpus
    call = partial(learn_binarizer, source=source, **arguments)
    return Task("learn", {**inputs, **arguments}, call, gpus=gpus, ends_worker=gpus != 0)


def _against(task: Task, stored: dict[str, FileRef]) -> Task:
    """The same, unless a stored binarizer is still good enough."""
    return replace(task, inputs={**task.inputs, "stored": stored}, call=partial(task.call, stored=stored))


def _with_pairs(task: Task, pairs: FileRef) -> Task:
    """The same with the file of its pairs, which follows from what it is keyed by."""
    return replace(task, call=partial(task.call, pairs=pairs))


def _found_pairs(
    session: BuildSession,
    source: VectorSource,
    encoder: EncoderInForce,
    asked_pairs: AskedPairs,
    *,
    is_part: bool,
) -> FileRef | None:
    """Vectors of the pairs whose documents are in the corpus; None where none is in this part of it."""
    files = {"queries": asked_pairs.queries, "wanted": asked_pairs.wanted}
    inputs = {"texts": digest(source.texts), "encoder": encoder.fingerprint, **files}
    tasks = [
        Task(
            "wanted",
            {**inputs, "bucket": b, "condemned": source.condemned.get(b)},
            partial(find_wanted, bucket=b),
            {"source": source, **files},
        )
        for b in range(source.cache.buckets)
    ]
    found = tuple(output.files["found"] for output in session.outputs("learn", tasks))
    call = partial(gather_pairs, found=found, queries=asked_pairs.queries, wanted=asked_pairs.wanted)
    (output,) = session.outputs("learn", [Task("pairs", {**files, "found": found}, call)])
    pairs = output.files["pairs"]
    lost = asked_pairs.wanted.rows - pairs.rows
    structlog.get_logger().info("pairs_found", pairs=pairs.rows, without_document=lost)
    if pairs.rows:
        return pairs
    if is_part:
        return None
    raise _no_document(session.config.binarizer.pairs, lost)


def _no_document(config: PairsConfig | None, wanted: int) -> DataError:
    qrels, queries = (config.qrels, config.queries) if config is not None else ("", "")
    problem = f"none of the documents of its {wanted} pairs with {queries} is in the corpus"
    return DataError(qrels, problem, "make corpus-id agree with doc_id")


def _refresh(session: BuildSession, stored: _Stored | None, output: StageOutput) -> Refresh | None:
    max_drift = session.config.binarizer.max_drift
    if stored is None or max_drift is None or "drift" not in output.numbers:
        return None
    return Refresh(
        outcome="kept" if output.files == stored.files else "replaced",
        drift=output.numbers["drift"],
        error=output.numbers["error"],
        max_drift=max_drift,
        queries=int(output.numbers["queries"]),
        since=first_release_with(session.store, stored.codes.binarizer, until=stored.release),
    )


def _announce(origin: Origin) -> None:
    said = {} if origin.refresh is None else origin.refresh.model_dump()
    structlog.get_logger().info("binarizer", **({"outcome": "new"} | said))
