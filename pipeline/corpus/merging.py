"""Documents of one bucket: the first of each id wins; and dead letters in words. Pure."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import Plan
from pipeline.corpus.identity import DOC_HASH_BYTES, hash_matrix, sort_keys
from pipeline.corpus.rules import kind_of_reason
from pipeline.errors import DataError
from pipeline.schemas import FILE_NO

__all__ = ["Letter", "common_reasons", "first_wins", "letters_of_duplicates"]

SHOWN_REASONS = 5

Letter = tuple[str, int, str | None, str]
"""File, row, doc_id and reason of a row set aside."""


def first_wins(table: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each row of a table in plan order, the first row of its document, and whether it is of that very document.

    Args:
        table: (n) rows with vector_id, doc_id, FILE_NO and row.

    Returns:
        (n,) winners and (n,) flags.

    Raises:
        DataError: Two document ids have one hash.
    """
    keys = sort_keys(hash_matrix(table["vector_id"])[:, :DOC_HASH_BYTES])
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    winners = first[inverse]
    _check_no_collision(table["doc_id"], winners)
    file_no, row = table[FILE_NO].to_numpy(), table["row"].to_numpy()
    return winners, (file_no == file_no[winners]) & (row == row[winners])


def _check_no_collision(doc_ids: pa.ChunkedArray, winners: NDArray[np.int64]) -> None:
    others = doc_ids.take(pa.array(winners))
    is_same = pc.equal(doc_ids, others).to_numpy()
    for i in np.flatnonzero(~is_same)[:1]:
        both = f"{others[int(i)].as_py()!r} and {doc_ids[int(i)].as_py()!r}"
        raise DataError("doc_id", f"{both} have the same hash of 12 bytes", "rename one of the two documents")


def letters_of_duplicates(
    table: pa.Table, dropped: NDArray[np.int64], winners: NDArray[np.int64], plan: Plan
) -> list[Letter]:
    """Dead letters of the `dropped` rows of a bucket, each naming the place of its winner."""
    places = table.select([FILE_NO, "row", "doc_id"])
    lost = places.take(pa.array(dropped)).to_pylist()
    won = places.take(pa.array(winners)).to_pylist()
    return [
        (
            plan.files[x[FILE_NO]].path,
            x["row"],
            x["doc_id"],
            f"duplicate of {plan.files[y[FILE_NO]].path} row {y['row']}",
        )
        for x, y in zip(lost, won, strict=True)
    ]


def common_reasons(table: pa.Table) -> str:
    """The commonest reasons of a dead-letter table, with their counts and an example each."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for letter in table.to_pylist():
        kind = kind_of_reason(letter["reason"])
        counts[kind] += 1
        examples.setdefault(kind, f"{letter['reason']} ({letter['file']} row {letter['row']})")
    return "; ".join(f"{count} x {examples[kind]}" for kind, count in counts.most_common(SHOWN_REASONS))
