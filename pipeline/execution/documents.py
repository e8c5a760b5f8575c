"""The first two stages of a run: shards are read and checked, and the first document of each id is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.artifacts import FileRef, Plan, StageOutput
from pipeline.config import Config
from pipeline.corpus import merge_documents, read_shard
from pipeline.embedding.cache import Cache
from pipeline.errors import DataError
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.session import BuildSession
from pipeline.execution.work import Task, digest

__all__ = ["DocumentFiles", "check_any_is_left", "read_documents"]


@dataclass(frozen=True)
class DocumentFiles:
    """What the merge stage wrote, and what was set aside until then."""

    files: tuple[FileRef, ...]
    texts: tuple[FileRef, ...]
    places: tuple[FileRef, ...]
    dead_letters: tuple[FileRef, ...]
    documents: int
    vectors: int

    @property
    def num_dead_letters(self) -> int:
        return sum(ref.rows for ref in self.dead_letters)


def read_documents(session: BuildSession, plan: Plan, encoder: EncoderInForce, cache: Cache) -> DocumentFiles:
    """Read and merge the corpus.

    Raises:
        ErrorBudgetError: More rows are bad than the configuration allows.
        DataError: No document is left.
    """
    with session.timed("read"):
        shards = _within_budget(session, _read_tasks(session.config, plan, encoder), plan)
    rows = tuple(output.files["rows"] for output in shards)
    merged = session.outputs("merge", _merge_tasks(session.config, plan, rows, cache))
    letters = [
        output.files["dead_letters"] for output in [*shards, *merged] if "dead_letters" in output.files
    ]
    session.check_budget(plan, letters)
    documents = DocumentFiles(
        files=tuple(output.files["documents"] for output in merged),
        texts=tuple(output.files["texts"] for output in merged),
        places=tuple(output.files["places"] for output in merged),
        dead_letters=tuple(letters),
        documents=_total(merged, "documents"),
        vectors=_total(merged, "vectors"),
    )
    check_any_is_left(session.config, plan, documents)
    return documents


def _shape(config: Config, plan: Plan) -> dict[str, Any]:
    """What of the configuration shapes documents; where the corpus lies and how many rows may be bad do not."""
    corpus = config.corpus.model_dump(mode="json", exclude={"uri", "name", "error_budget"})
    return {
        "corpus": corpus,
        "attributes": plan.attributes,
        "dims": plan.embedding_dims,
        "buckets": plan.document_buckets,
    }


def _read_tasks(config: Config, plan: Plan, encoder: EncoderInForce) -> list[Task]:
    shared = {
        "plan": plan,
        "corpus": config.corpus,
        "storage": config.storage,
        "tokenizer_json": encoder.tokenizer_json,
    }
    inputs = {"tokenizer": encoder.tokenizer_hash, **_shape(config, plan)}
    return [
        Task(
            "read",
            {**inputs, "file": plan.files[shard.file_no], "shard": shard},
            partial(read_shard, shard=shard),
            shared,
        )
        for shard in plan.shards
    ]


def _merge_tasks(config: Config, plan: Plan, rows: tuple[FileRef, ...], cache: Cache) -> list[Task]:
    shared = {"shard_rows_files": rows, "plan": plan, "text_buckets": cache.buckets}
    names = [file.path for file in plan.files]
    content = {"rows": rows, "text_buckets": cache.buckets, "files": names, **_shape(config, plan)}
    # Receipts from before a bucket's places were written do not stand for it.
    inputs = digest({**content, "places": True})
    return [
        Task("merge", {"of": inputs, "bucket": bucket}, partial(merge_documents, bucket=bucket), shared)
        for bucket in range(plan.document_buckets)
    ]


def _within_budget(session: BuildSession, tasks: Sequence[Task], plan: Plan) -> list[StageOutput]:
    """Read shards until done, or until more rows are bad than the budget allows for the whole corpus."""
    found: dict[int, StageOutput] = {}
    letters: list[FileRef] = []
    for place, done in session.perform("read", tasks):
        found[place] = done.output
        if "dead_letters" in done.output.files:
            letters.append(done.output.files["dead_letters"])
            session.check_budget(plan, letters)
    return [found[place] for place in range(len(tasks))]


def check_any_is_left(config: Config, plan: Plan, documents: DocumentFiles) -> None:
    """Refuse a corpus all of whose documents were set aside; DataError."""
    if documents.documents == 0:
        problem = f"no document is left of {plan.rows} rows: all were set aside"
        raise DataError(config.corpus.uri, problem, "see the reasons in the dead-letter table")


def _total(outputs: Sequence[StageOutput], name: str) -> int:
    return int(sum(output.numbers.get(name, 0) for output in outputs))
