"""The binarizer of a run: that of the current release as long as it is good enough for the corpus, otherwise a new one."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from pipeline.artifacts import CodesInfo, FileRef, IndexManifest, Origin, Refresh, StageOutput
from pipeline.binarization.choosing import FEWEST_ROWS
from pipeline.config import BinarizerConfig
from pipeline.execution.documents import DocumentFiles
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.session import Session
from pipeline.execution.work import Task
from pipeline.index.stage import VectorSource, learn_binarizer
from pipeline.index.training import sample_rows
from pipeline.storage import Store, is_whole

__all__ = ["BinarizerInForce", "Parent", "binarizer_in_force"]


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
class _Stored:
    codes: CodesInfo
    files: dict[str, FileRef]
    space: str
    """Fingerprint of the encoder."""
    since: int
    """Release that first had it."""

    @classmethod
    def of(cls, parent: Parent) -> "_Stored":
        partition = parent.manifest.partitions[0]
        codes = partition.codes
        files = {_role(ref): ref for ref in codes.files}
        refresh = codes.origin.refresh if codes.origin is not None else None
        kept = refresh is not None and refresh.outcome == "kept"
        since = refresh.since if refresh is not None and kept else parent.release
        return cls(codes, files, partition.space, since)


def _role(ref: FileRef) -> str:
    """binarizers/…/weights.safetensors → weights."""
    return ref.path.rpartition("/")[2].partition(".")[0]


def binarizer_in_force(
    session: Session,
    documents: DocumentFiles,
    source: VectorSource,
    encoder: EncoderInForce,
    parent: Parent | None,
) -> BinarizerInForce:
    """Take the binarizer of the current release if it was chosen from all the same; otherwise measure it, or learn one.

    Args:
        session: The run.
        documents: The live documents.
        source: Their vectors.
        encoder: What made them.
        parent: The release that was current when the run started; a run that goes on after a crash finds the same.
    """
    config = session.config.binarizer
    stored = _whole(session.store, parent)
    afresh = _task(session, documents, source, encoder, None)
    if stored is not None and stored.codes.origin is not None and stored.codes.origin.sources == afresh.key:
        _announce(stored.codes.origin)
        return BinarizerInForce(stored.files, stored.codes.origin)
    if stored is not None and not _is_candidate(stored, config, encoder, _rows(session, documents)):
        stored = None
    task = afresh if stored is None else _task(session, documents, source, encoder, stored.files)
    (output,) = session.outputs("learn", [task])
    origin = Origin(asked=asked(config), sources=afresh.key, refresh=_refresh(stored, output, config))
    _announce(origin)
    return BinarizerInForce(output.files, origin)


def asked(config: BinarizerConfig) -> dict[str, object]:
    """The settings that a binarizer must have been made with to be one of the kind that is asked for."""
    return config.model_dump(mode="json", exclude={"max_drift", "gpus"})


def _whole(store: Store, parent: Parent | None) -> _Stored | None:
    """The binarizer of the current release, if there is a release and its files are there."""
    if parent is None:
        return None
    stored = _Stored.of(parent)
    return stored if all(is_whole(store, ref) for ref in stored.codes.files) else None


def _rows(session: Session, documents: DocumentFiles) -> int:
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
    session: Session,
    documents: DocumentFiles,
    source: VectorSource,
    encoder: EncoderInForce,
    stored: dict[str, FileRef] | None,
) -> Task:
    config = session.config
    arguments: dict[str, Any] = {
        "sample_rows": _rows(session, documents),
        "seed": config.seed,
        "config": config.binarizer,
    }
    if stored is not None:
        arguments["stored"] = stored
    inputs = {"texts": documents.texts, "encoder": encoder.fingerprint, "condemned": source.condemned}
    gpus = 0.0 if config.binarizer.method == "rotation" else config.binarizer.gpus
    call = partial(learn_binarizer, source=source, **arguments)
    return Task("learn", {**inputs, **arguments}, call, gpus=gpus, ends_worker=gpus != 0)


def _refresh(stored: _Stored | None, output: StageOutput, config: BinarizerConfig) -> Refresh | None:
    if stored is None or config.max_drift is None or "drift" not in output.numbers:
        return None
    return Refresh(
        outcome="kept" if output.files == stored.files else "replaced",
        drift=output.numbers["drift"],
        error=output.numbers["error"],
        max_drift=config.max_drift,
        queries=int(output.numbers["queries"]),
        since=stored.since,
    )


def _announce(origin: Origin) -> None:
    said = {} if origin.refresh is None else origin.refresh.model_dump()
    structlog.get_logger().info("binarizer", **({"outcome": "new"} | said))
