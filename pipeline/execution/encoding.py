"""The encode stage of a run: texts without a vector get one, or are condemned and become dead letters."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.artifacts import FileRef, Plan, StageOutput
from pipeline.corpus import check_error_budget
from pipeline.embedding.cache import Cache
from pipeline.embedding.stage import plan_units, store_given
from pipeline.execution.documents import DocumentFiles
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.session import Session
from pipeline.execution.units import Unit
from pipeline.execution.work import Task, digest
from pipeline.index.condemned import count_condemned, list_condemned

__all__ = ["Embedded", "embed", "encode_texts"]


@dataclass(frozen=True)
class Embedded:
    """What encoding came to."""

    encoded: int = 0
    """Texts encoded now."""
    condemned: Mapping[int, FileRef] = field(default_factory=dict)
    """By bucket of texts, the rows that have no vector."""
    dead_letters: tuple[FileRef, ...] = ()
    rows: int = 0
    """Rows without a vector."""
    documents: int = 0
    """Documents without any vector."""


def embed(
    session: Session, plan: Plan, documents: DocumentFiles, encoder: EncoderInForce, cache: Cache
) -> Embedded:
    """Fill the cache.

    Raises:
        ErrorBudgetError: More rows are bad, those counted that cannot be encoded, than the configuration allows.
    """
    buckets = range(cache.buckets)
    inputs = {"texts": digest(documents.texts), "encoder": encoder.fingerprint}
    shared: dict[str, Any] = {"cache": cache, "texts": documents.texts}
    if encoder.ready_made:
        tasks = _of_buckets("given", inputs, store_given, shared, buckets)
        session.outputs("embed", tasks)
        return Embedded()

    def check(condemned: int) -> None:
        session.check_budget(plan, documents.dead_letters, condemned=condemned)

    encoded, condemned = _encode_within_budget(session, documents.texts, encoder, cache, check)
    found = _listed(session, plan, documents, cache, inputs, sorted(condemned))
    letters = [output.files["dead_letters"] for output in found.values()]
    session.check_budget(plan, [*documents.dead_letters, *letters])
    refs = {bucket: output.files["condemned"] for bucket, output in found.items()}
    rows, whole = count_condemned(session.store, list(refs.values()))
    return Embedded(encoded, refs, tuple(letters), rows, whole)


def encode_texts(
    session: Session, texts: Sequence[FileRef], encoder: EncoderInForce, cache: Cache, *, rows: int
) -> int:
    """Fill the cache with the texts of some files, as far as they can be encoded; the number that were encoded now.

    Args:
        session: The job.
        texts: text_hash and text by bucket of the cache.
        encoder: Of the cache.
        cache: To fill.
        rows: Of the corpus, of which the configuration allows a share to be bad.

    Raises:
        ErrorBudgetError: More of the texts cannot be encoded than the configuration allows of the corpus.
    """

    def check(condemned: int) -> None:
        check_error_budget(
            session.store, session.config.corpus, rows=rows, bad_rows=0, dead_letters=(), condemned=condemned
        )

    return _encode_within_budget(session, texts, encoder, cache, check)[0]


def _of_buckets(
    stage: str,
    inputs: Mapping[str, str],
    call: Callable[..., StageOutput],
    shared: Mapping[str, Any],
    buckets: Sequence[int],
) -> list[Task]:
    """One task a bucket. What they find depends on the cache as it is now, so none stands for a later run."""
    return [
        Task(stage, {**inputs, "bucket": b}, partial(call, bucket=b), shared, remember=False) for b in buckets
    ]


def _encode_within_budget(
    session: Session,
    texts: Sequence[FileRef],
    encoder: EncoderInForce,
    cache: Cache,
    check: Callable[[int], None],
) -> tuple[int, Counter[int]]:
    """Texts encoded, and condemned texts by bucket; stops early, so that a broken encoder does not condemn a corpus."""
    units, known = _units(session, texts, encoder, cache)
    with session.timed("embed"):
        encoded, condemned = 0, Counter({bucket: number for bucket, number in known.items() if number})
        check(condemned.total())
        for place, done in session.perform("embed", [unit.task() for unit in units], encoder=encoder):
            encoded += int(done.output.numbers["encoded"])
            failed = int(done.output.numbers["condemned"])
            if failed:
                condemned[units[place].bucket] += failed
                check(condemned.total())
    return encoded, condemned


def _units(
    session: Session, texts: Sequence[FileRef], encoder: EncoderInForce, cache: Cache
) -> tuple[list[Unit], dict[int, int]]:
    """Texts without a vector in units, and by bucket how many are condemned already."""
    inputs = {"texts": digest(texts), "encoder": encoder.fingerprint}
    unit_texts = session.config.embedding.unit_texts
    shared: dict[str, Any] = {"cache": cache, "texts": tuple(texts), "unit_texts": unit_texts}
    tasks = _of_buckets("units", inputs, plan_units, shared, range(cache.buckets))
    planned = session.outputs("embed", tasks)
    units = [
        Unit(cache, encoder.fingerprint, b, file, 0, file.rows)
        for b, output in enumerate(planned)
        for file in output.files.values()
    ]
    return units, {b: int(output.numbers["condemned"]) for b, output in enumerate(planned)}


def _listed(
    session: Session,
    plan: Plan,
    documents: DocumentFiles,
    cache: Cache,
    inputs: Mapping[str, str],
    buckets: Sequence[int],
) -> dict[int, StageOutput]:
    """By bucket, the rows of the corpus whose text is condemned; nothing for a bucket that has none."""
    shared = {
        "cache": cache,
        "texts": documents.texts,
        "documents": documents.files,
        "places": documents.places,
        "plan": plan,
    }
    tasks = _of_buckets("condemned", inputs, list_condemned, shared, buckets)
    outputs: Iterator[StageOutput] = iter(session.outputs("embed", tasks))
    return {bucket: output for bucket, output in zip(buckets, outputs, strict=True) if output.files}
