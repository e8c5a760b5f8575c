"""An index between two encoders: its partitions in earlier spaces stay as they are, and all other documents are in the new one.

A row leaves an earlier space for good: by a tombstone. So every document is found under one encoder exactly, in any release.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.artifacts import (
    Attribute,
    BridgeInfo,
    FileRef,
    IndexManifest,
    Partition,
    Plan,
    Segment,
    StageOutput,
    arrow_schema,
)
from pipeline.errors import DataError
from pipeline.execution.building import FittedTree
from pipeline.execution.documents import DocumentFiles
from pipeline.execution.learning import Parent
from pipeline.execution.session import Session
from pipeline.execution.work import Task, digest
from pipeline.index.vectors import VectorSource
from pipeline.partitioning import UNCUT, joined_partitions, read_partition_tree
from pipeline.upgrade.backfill import (
    Chosen,
    DocumentBucket,
    Moving,
    OldSegment,
    bury_rows,
    list_members,
    rebucket_documents,
    settle_documents,
)

__all__ = ["OldSide", "Settled", "plain_leaves"]


@dataclass(frozen=True)
class Settled:
    """What becomes of an index's two sides."""

    texts: tuple[FileRef, ...]
    """Of the documents in the new space, by bucket of text hash."""
    vectors: int
    """How many these are."""
    condemned: tuple[FileRef, ...]
    """Rows of documents that stay in an earlier space, but for those rows, which are in no index."""
    partitions: tuple[Partition, ...]
    """In earlier spaces, those that have a row left, with their tombstones."""


@dataclass(frozen=True)
class OldSide:
    """Partitions of a release that are in another space than its encoder's."""

    manifest: IndexManifest
    """The release."""

    @classmethod
    def of(cls, parent: Parent | None) -> "OldSide | None":
        """Of a release; None where all of it is in its encoder's own space."""
        return cls(parent.manifest) if parent is not None and parent.manifest.bridges else None

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """Those partitions."""
        return tuple(
            one for one in self.manifest.partitions if self.manifest.bridge_to(one.space) is not None
        )

    @property
    def segments(self) -> list[OldSegment]:
        """Their segments, numbered through."""
        places = [(one, place) for one in self.partitions for place in range(len(one.segments))]
        return [OldSegment(number, one, place) for number, (one, place) in enumerate(places)]

    @property
    def first_segments(self) -> dict[int, int]:
        """By the place of each of those partitions in the release, the number of its first segment."""
        found, number = {}, 0
        for place, one in enumerate(self.manifest.partitions):
            if self.manifest.bridge_to(one.space) is not None:
                found[place] = number
                number += len(one.segments)
        return found

    @property
    def rows(self) -> int:
        """Rows that are still there."""
        return sum(one.rows for one in self.partitions)

    def members(self, session: Session, *, buckets: int) -> tuple[FileRef, ...]:
        """Its rows, by bucket of their documents."""
        tasks = [
            Task(
                "members",
                {
                    "segment": one.segment,
                    "directory": one.partition.directory,
                    "number": one.number,
                    "buckets": buckets,
                },
                partial(list_members, old=one, buckets=buckets),
            )
            for one in self.segments
        ]
        return tuple(output.files["members"] for output in session.outputs("migrate", tasks))

    def settled(
        self,
        session: Session,
        documents: Sequence[FileRef],
        members: tuple[FileRef, ...],
        *,
        text_buckets: int,
        moving: Moving | None = None,
    ) -> Settled:
        """Tell which documents are in the new space, and bury the rows that are no longer in an earlier one.

        Args:
            session: The job.
            documents: As they are now, one file a bucket.
            members: What `members` gave for as many buckets.
            text_buckets: Buckets of the new encoder's cache.
            moving: What moves without having changed; None: nothing.
        """
        before = () if tuple(documents) == self.manifest.documents else self._before(session, len(documents))
        arguments: dict[str, Any] = {
            "members": members,
            "moving": moving,
            "condemned": self.manifest.condemned,
            "text_buckets": text_buckets,
        }
        of = digest(arguments | {"moving": _plain(moving), "before": before})
        tasks = [
            Task(
                "settle_documents",
                {"of": of, "documents": ref, "bucket": number},
                partial(settle_documents, bucket=DocumentBucket(number, ref, before)),
                arguments,
            )
            for number, ref in enumerate(documents)
        ]
        outputs = session.outputs("migrate", tasks)
        return Settled(
            texts=tuple(output.files["texts"] for output in outputs),
            vectors=sum(int(output.numbers["move"]) for output in outputs),
            condemned=tuple(ref for output in outputs if (ref := output.files["condemned"]).rows),
            partitions=self._buried(session, tuple(output.files["gone"] for output in outputs)),
        )

    def _before(self, session: Session, buckets: int) -> tuple[FileRef, ...]:
        tasks = [
            Task(
                "before",
                {"documents": ref, "buckets": buckets},
                partial(rebucket_documents, documents=ref, buckets=buckets),
            )
            for ref in self.manifest.documents
        ]
        return tuple(output.files["documents"] for output in session.outputs("migrate", tasks))

    def _buried(self, session: Session, gone: tuple[FileRef, ...]) -> tuple[Partition, ...]:
        of = digest(gone)
        tasks = [
            Task(
                "bury",
                {"of": of, "segment": one.segment, "number": one.number},
                partial(bury_rows, gone=gone, old=one),
            )
            for one in self.segments
        ]
        outputs = iter(session.outputs("migrate", tasks))
        found = [_with_tombstones(one, outputs) for one in self.partitions]
        return tuple(one for one in found if one.rows)

    def made_of(self, *inputs: object) -> str:
        """Names what an index is made of whose old side is this one, and of what else."""
        return digest(
            {"old": [one.model_dump(mode="json") for one in self.partitions], "inputs": list(inputs)}
        )

    # -------------------------------------------------------------------------------------------- beside a new side

    def check_attributes(self, attributes: tuple[Attribute, ...]) -> None:
        """Refuse attributes that the rows of earlier spaces do not have.

        Raises:
            DataError: They are others; the message says what to do.
        """
        if attributes != self.manifest.attributes:
            problem = f"attributes changed while {self.rows:,} rows are in the space of an earlier encoder"
            remedy = "finish `strata backfill` first, or take the change back"
            raise DataError("corpus.attributes", problem, remedy)

    def tree(self, session: Session) -> FittedTree:
        """The partitions that the new side has, too: those of the release."""
        manifest = self.manifest
        if manifest.partition_tree is None:
            return FittedTree(UNCUT, None, None)
        tree = read_partition_tree(session.store, manifest.partition_tree, arrow_schema(manifest.attributes))
        return FittedTree(tree, manifest.partition_tree, manifest.workload)

    def beside(
        self,
        session: Session,
        plan: Plan,
        documents: DocumentFiles,
        source: VectorSource,
        settled: Settled,
        build: Callable[[FittedTree], IndexManifest],
    ) -> IndexManifest:
        """The index of both sides; of one, where the other has no row.

        Args:
            session: The job.
            plan: Of the documents.
            documents: All of them, with the vectors of the new side.
            source: The new side.
            settled: The old one.
            build: Builds the new side, with these partitions.
        """
        if not documents.vectors:
            return self._alone(session, plan, documents, source, settled)
        left, new = settled.partitions, build(self.tree(session))
        if not left:
            return new
        own = [place for place, one in enumerate(new.partitions) if one.rows]
        partitions = (*left, *(new.partitions[place] for place in own))
        lists = sum(one.heads.rows for one in partitions)
        return new.model_copy(
            update={
                "bridges": self._bridges(left),
                "condemned": (*new.condemned, *settled.condemned),
                "partitions": partitions,
                "partition_table": self._table(session, left, new.partition_table, own),
                "search": new.search.model_copy(update={"lists": lists}),
                "statistics": {**self.manifest.statistics, **new.statistics, "lists": float(lists)},
            }
        )

    def _alone(
        self,
        session: Session,
        plan: Plan,
        documents: DocumentFiles,
        source: VectorSource,
        settled: Settled,
    ) -> IndexManifest:
        """The release with other documents and fewer rows."""
        left = settled.partitions
        return self.manifest.model_copy(
            update={
                "plan": plan.fingerprint,
                "documents": documents.files,
                "document_buckets": plan.document_buckets,
                "num_documents": documents.documents,
                "condemned": (*source.condemned.values(), *settled.condemned),
                "bridges": self._bridges(left),
                "partitions": left,
                "partition_table": self._table(session, left, None, ()),
            }
        )

    def _bridges(self, left: Sequence[Partition]) -> tuple[BridgeInfo, ...]:
        spaces = {one.space for one in left}
        return tuple(bridge for bridge in self.manifest.bridges if bridge.space in spaces)

    def _table(
        self, session: Session, left: Sequence[Partition], new: FileRef | None, own: Sequence[int]
    ) -> FileRef | None:
        """What is known of the attributes of all partitions; in earlier spaces what it was: it holds of fewer rows, too."""
        old = self.manifest
        if old.partition_table is None:
            return None
        places = {(one.space, one.partition_id): place for place, one in enumerate(old.partitions)}
        kept = [places[one.space, one.partition_id] for one in left]
        tables = [(old.partition_table, kept), *([(new, own)] if new is not None else [])]
        return joined_partitions(session.store, tables)


def _plain(moving: Moving | None) -> object:
    """For a digest."""
    if moving is None:
        return None
    return {"chosen": plain_leaves(moving.chosen), "stuck": moving.stuck}


def plain_leaves(chosen: Chosen) -> dict[str, list[int]]:
    """For a digest."""
    return {str(number): leaves.tolist() for number, leaves in chosen.items()}


def _with_tombstones(partition: Partition, outputs: Iterator[StageOutput]) -> Partition:
    """The partition with what `bury_rows` made of each of its segments."""
    segments = tuple(_buried_segment(segment, next(outputs)) for segment in partition.segments)
    return partition.model_copy(update={"segments": segments, "rows": sum(one.rows for one in segments)})


def _buried_segment(segment: Segment, output: StageOutput) -> Segment:
    return segment.model_copy(update={"tombstones": output.files.get("tombstones")})
