"""Compatible heads: queries of the new encoder read the stored codes of the old one, without a vector of either. Imports torch.

The rotation that the head starts from is completed orthogonally, so that one code of a new vector serves among new codes, and
its first dimensions among old ones (`binarization.compatible`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.binarization import Binarizer, Codes, binarize, rotate_queries, score
from pipeline.binarization.compatible import CompatibleHead, fit_compatible, train_compatible
from pipeline.binarization.learning import mine_neighbours
from pipeline.upgrade.exam import DEPTH, Exam, Pairs
from pipeline.upgrade.ranking import ranked_by

__all__ = ["StoredCodes", "find_by_codes", "train_head"]


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """What an index holds of documents besides their vectors, and the head that lets new queries read it."""

    binarizer: Binarizer
    codes: Codes
    """(n) of the documents."""
    head: CompatibleHead


def train_head(fit: Pairs, exam: Exam, old: Binarizer, *, seed: int) -> CompatibleHead:
    """Train a head for codes that an index holds.

    Source: BEBR, arXiv 2302.08714, section 3.4.

    Args:
        fit: Texts to train on; their codes are made of the old vectors here, as the index did.
        exam: Held-out queries, which stop the training.
        old: Binarizer of the stored codes.
        seed: Of every random choice.
    """
    codes = binarize(old, fit.old)
    # New codes as wide as new vectors: of the stored codes' levels behind a first one that takes all dimensions.
    levels = (max(old.levels[0], fit.new.shape[1] // 8 * 8), *old.levels)
    rng = np.random.default_rng(seed)
    start = fit_compatible(fit.new, old, codes, levels=levels, rng=rng)
    held_out = binarize(old, exam.old)

    def recall(head: CompatibleHead) -> float:
        return float(exam.overlap(find_by_codes(exam, head.reader, held_out, exam.new_queries)).mean())

    neighbours = mine_neighbours(fit.new, rng)
    return train_compatible(start, fit.new, codes, neighbours, hidden=0, recall=recall, seed=seed)[0]


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
