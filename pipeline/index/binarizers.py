"""Binarizers on the root: learned or kept, written, read back."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from pipeline.artifacts import FileRef, StageOutput
from pipeline.binarization import (
    Binarizer,
    Choice,
    Drift,
    Pairs,
    choose_binarizer,
    from_tensors,
    may_stay,
    measure_drift,
    to_tensors,
)
from pipeline.config import BinarizerConfig
from pipeline.errors import IncompatibleModelsError
from pipeline.index.models import folder_of, read_model, write_model
from pipeline.index.vectors import VectorSource, sample_vectors
from pipeline.storage import Store
from pipeline.tables import read_columns, to_matrix

__all__ = ["PAIR_COLUMNS", "learn_binarizer", "load_binarizer"]

PAIR_COLUMNS = ("query", "document")
"""Vectors of each given pair, where they are learned from."""


def learn_binarizer(
    store: Store,
    source: VectorSource,
    *,
    sample_rows: int,
    config: BinarizerConfig,
    seed: int,
    stored: Mapping[str, FileRef] | None = None,
    pairs: FileRef | None = None,
) -> StageOutput:
    """Keep a stored binarizer that is still good enough for a sample; otherwise learn one.

    What is learned depends on the sample and the pairs alone, never on what was stored.

    Args:
        store: The root.
        source: Live documents and their vectors.
        sample_rows: Rows to look at.
        config: Method, size, and what a stored binarizer may lose.
        seed: Of every random choice.
        stored: Files of a binarizer of the kind that the configuration asks for.
        pairs: File of `gather_pairs`.

    Returns:
        Files `weights` and `binarizer`: the artifact; numbers `drift`, `error` and `queries` where a stored one was measured.
    """
    sample = sample_vectors(store, source, sample_rows)
    drift = None
    if stored is not None:
        binarizer = load_binarizer(store, folder_of(stored["binarizer"]), dims=source.cache.dims)
        drift = measure_drift(binarizer, sample, config=config, seed=seed)
        if may_stay(drift, config):
            return StageOutput(files=dict(stored), numbers=_drift_numbers(drift))
    given = _read_pairs(store, pairs) if pairs is not None else None
    choice = choose_binarizer(sample, config=config, seed=seed, pairs=given)
    data = hashlib.sha256(np.ascontiguousarray(sample).data).hexdigest()
    size = config.model_dump(mode="json", include={"bytes", "levels", "bits_per_dim", "hidden_units"})
    files = _write_binarizer(store, choice, rows=len(sample), seed=seed, sample=data, asked=size)
    return StageOutput(files=files, numbers=_drift_numbers(drift))


def _read_pairs(store: Store, ref: FileRef) -> Pairs:
    table = read_columns(store, ref.path)
    queries, documents = (to_matrix(table[name]).astype(np.float32) for name in PAIR_COLUMNS)
    rows = np.arange(len(queries))
    return Pairs(queries, documents, rows, rows)


def _drift_numbers(drift: Drift | None) -> dict[str, int | float]:
    if drift is None:
        return {}
    return {"drift": round(drift.lost, 6), "error": round(drift.error, 6), "queries": drift.queries}


def _write_binarizer(store: Store, choice: Choice, **trained_on: object) -> dict[str, FileRef]:
    card = {
        "format": 2,
        "method": choice.method,
        "levels": list(choice.binarizer.levels),
        "held_out_recall": dict(choice.recall),
        "held_out_queries": choice.held_out_queries,
        "judged_on": choice.judged_on,
        "given_pairs": choice.given_pairs,
        "curve": [asdict(look) for look in choice.curve],
        **trained_on,
    }
    return write_model(store, "binarizer", card, to_tensors(choice.binarizer))


def load_binarizer(store: Store, folder: str, *, dims: int) -> Binarizer:
    """Read a binarizer artifact.

    Args:
        store: The root.
        folder: Of the binarizer.
        dims: Width of the vectors that it is for.

    Raises:
        CorruptArtifactError: The folder holds the card or the weights of another binarizer, or damaged ones.
        IncompatibleModelsError: The binarizer is for vectors of another width.
    """
    card, tensors = read_model(store, "binarizer", folder)
    binarizer = from_tensors(tensors, tuple(card["levels"]))
    found = len(binarizer.mean)
    if found != dims:
        problem = f"expected a binarizer of vectors of {dims} dimensions, found one of {found}"
        raise IncompatibleModelsError(f"{store.uri}/{folder}", problem, "name the binarizer of these vectors")
    return binarizer
