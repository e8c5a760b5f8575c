"""Compatible heads: new queries read the stored codes of old vectors, without a vector of a document."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.binarization import Binarizer, Codes, binarize, rotate_queries, score
from pipeline.binarization.learning import mine_neighbours
from pipeline.upgrade.exam import DEPTH, Exam, Pairs
from pipeline.upgrade.ranking import ranked_by

__all__ = ["StoredCodes", "find_by_codes", "stored_codes"]


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """What an index holds of documents besides their vectors, and what lets new queries read it."""

    binarizer: Binarizer
    codes: Codes
    """(n) of the documents."""
    reader: Binarizer
    """Of queries of the new encoder."""


def stored_codes(
    fit: Pairs, exam: Exam, documents: NDArray[np.float32], old: Binarizer, *, seed: int
) -> StoredCodes | None:
    """Codes as an index holds them, and a reader trained for them; None where the new vectors are narrower than the codes.

    Source: BEBR, arXiv 2302.08714, section 3.4.

    Args:
        fit: Texts to train on; their codes are made of the old vectors here, as the index did.
        exam: Held-out queries, which stop the training.
        documents: (n, d_old) old vectors of what is searched by codes.
        old: Binarizer of the stored codes.
        seed: Of every random choice.
    """
    # Torch, which no other job than an upgrade needs for this.
    from pipeline.binarization.compatible import fit_reader, train_reader

    if old.levels[0] > fit.new.shape[1]:
        return None
    codes, neighbours = binarize(old, fit.old), mine_neighbours(fit.new, np.random.default_rng(seed))
    start = fit_reader(fit.new, old, codes)
    held_out = binarize(old, exam.old)

    def recall(reader: Binarizer) -> float:
        return float(exam.overlap(find_by_codes(exam, reader, held_out, exam.new_queries)).mean())

    reader, _ = train_reader(start, fit.new, codes, neighbours, recall=recall, seed=seed)
    return StoredCodes(old, binarize(old, documents), reader)


def find_by_codes(
    exam: Exam, reader: Binarizer, codes: Codes, queries: NDArray[np.float32]
) -> NDArray[np.int64]:
    """(q, DEPTH) rows of the documents whose codes say that they are nearest, but for each query's own.

    Args:
        exam: Says which document is a query's own.
        reader: Of the codes.
        codes: Of the documents (n).
        queries: (q, d) of the encoder that the reader is for.
    """
    rotated = rotate_queries(reader, queries)
    return ranked_by(
        lambda block: score(reader, rotated[block], *codes), len(codes.code), DEPTH, own=exam.own
    )
