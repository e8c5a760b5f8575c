"""What a new release changed, in documents: two sorted streams of document tables, a piece of each at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.corpus.identity import DOC_HASH_BYTES, hash_matrix, sort_keys

__all__ = ["Changes", "count_changes", "is_same"]

Keys = NDArray[np.bytes_]


@dataclass(frozen=True)
class Changes:
    """Numbers of documents."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0

    def __add__(self, other: "Changes") -> "Changes":
        return Changes(
            self.added + other.added,
            self.changed + other.changed,
            self.removed + other.removed,
            self.unchanged + other.unchanged,
        )


def count_changes(old: Iterable[pa.Table], new: Iterable[pa.Table]) -> Changes:
    """Compare two sets of documents: chunks, text hashes, and all other columns that the tables have.

    A document is changed if a chunk was added or removed, or if a value in a chunk's row differs; if the columns
    themselves differ, every document on both sides is. `text` may be left out where `text_hash` stands for it.

    Args:
        old: Tables sorted by `vector_id`, each of them and one after the other (documents files in bucket order).
        new: The same; the borders between tables need not be those of `old`.
    """
    counts = Changes()
    for left, right in _aligned(_Stream(old), _Stream(new)):
        counts += _compared(left, right)
    return counts


def is_same(old: pa.Table, new: pa.Table) -> NDArray[np.bool_]:
    """(n,) which rows of the new table have a row in the old one with the same values; none where the columns differ.

    Args:
        old: Rows with distinct `vector_id`.
        new: (n) rows, the same.
    """
    found = np.zeros(new.num_rows, np.bool_)
    if old.schema.equals(new.schema):
        _, in_new, differs = _matched(old, new)
        found[in_new] = ~differs
    return found


class _Stream:
    """The front of a stream of tables: at least two documents of it, unless it ends."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = (table for table in tables if table.num_rows)
        self._held: list[pa.Table] = []
        self.has_more = True

    def fill(self) -> None:
        """Hold whole documents: all that stand before the last one held cannot go on in the next table."""
        while self.has_more and len(set(self._ends())) < 2:  # noqa: PLR2004  (a first and a last document)
            following = next(self._tables, None)
            self.has_more = following is not None
            self._held += [] if following is None else [following]

    def last_document(self) -> bytes:
        return self._ends()[-1]

    def take_before(self, document: bytes | None) -> list[pa.Table]:
        """Give away what stands before a document; everything if None."""
        taken, self._held = self._held, []
        if document is None:
            return taken
        cuts = [int(np.searchsorted(_documents(table), document)) for table in taken]
        self._held = [t.slice(cut) for t, cut in zip(taken, cuts, strict=True) if cut < t.num_rows]
        return [t.slice(0, cut) for t, cut in zip(taken, cuts, strict=True) if cut]

    def _ends(self) -> list[bytes]:
        ends = [table.take([0, table.num_rows - 1]) for table in (self._held[:1] + self._held[-1:])]
        return [bytes(document) for end in ends for document in _documents(end)]


def _aligned(old: _Stream, new: _Stream) -> Iterator[tuple[list[pa.Table], list[pa.Table]]]:
    """Pieces of both streams that span the same documents, each document whole."""
    while old.has_more or new.has_more:
        old.fill()
        new.fill()
        stop = min((s.last_document() for s in (old, new) if s.has_more), default=None)
        yield old.take_before(stop), new.take_before(stop)


def _compared(old: list[pa.Table], new: list[pa.Table]) -> Changes:
    left, right = _counted(old), _counted(new)
    added, removed = len(right.keys() - left.keys()), len(left.keys() - right.keys())
    common = left.keys() & right.keys()
    touched = common & _touched(pa.concat_tables(old), pa.concat_tables(new)) if common else common
    changed = len(touched | {document for document in common if left[document] != right[document]})
    return Changes(added, changed, removed, len(common) - changed)


def _counted(tables: list[pa.Table]) -> dict[bytes, int]:
    """Chunks of each document."""
    keys = np.concatenate([np.zeros(0, f"S{DOC_HASH_BYTES}"), *(_documents(table) for table in tables)])
    documents, counts = np.unique(keys, return_counts=True)
    return dict(zip(documents.tolist(), counts.tolist(), strict=True))


def _touched(old: pa.Table, new: pa.Table) -> set[bytes]:
    """Documents of which a chunk differs, or has no counterpart on the other side."""
    if not old.schema.equals(new.schema):
        return set(_documents(old).tolist())
    in_old, _, differs = _matched(old, new)
    documents = _documents(old)
    return set(documents[in_old][differs].tolist()) | set(np.delete(documents, in_old).tolist())


def _matched(old: pa.Table, new: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Rows of both tables that have one vector_id, and whether any of their values differs."""
    left, right = (sort_keys(hash_matrix(table["vector_id"])) for table in (old, new))
    _, in_old, in_new = np.intersect1d(left, right, assume_unique=True, return_indices=True)
    old, new = old.take(pa.array(in_old)), new.take(pa.array(in_new))
    differs = np.zeros(len(in_old), dtype=np.bool_)
    for name in old.schema.names:
        differs |= _differs(old[name].combine_chunks(), new[name].combine_chunks())
    return in_old, in_new, differs


def _differs(old: pa.Array, new: pa.Array) -> NDArray[np.bool_]:
    if old.equals(new):
        return np.zeros(len(old), dtype=np.bool_)
    if pa.types.is_nested(old.type):
        pairs = zip(old.to_pylist(), new.to_pylist(), strict=True)
        return np.array([left != right for left, right in pairs], dtype=np.bool_)
    if pa.types.is_float64(old.type):
        # By their bits: a NaN that stayed one has not changed.
        old, new = old.view(pa.int64()), new.view(pa.int64())
    is_same = pc.or_(pc.fill_null(pc.equal(old, new), False), pc.and_(old.is_null(), new.is_null()))
    return ~is_same.to_numpy(zero_copy_only=False)


def _documents(table: pa.Table) -> Keys:
    """(n,) document part of each vector id."""
    return sort_keys(hash_matrix(table["vector_id"])[:, :DOC_HASH_BYTES])
