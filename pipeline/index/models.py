"""Fitted models on the root: a JSON card, whose hash names the folder, beside weights as safetensors, whose hash it holds."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from pipeline.artifacts import FileRef
from pipeline.errors import CorruptArtifactError
from pipeline.storage import Store, canonical_json, write_recorded

__all__ = ["folder_of", "read_model", "write_model"]

Kind = Literal["binarizer", "bridge"]
Tensors = Mapping[str, NDArray[np.float32]]

NAMED_BY = 32
"""Hex digits of the card's hash."""


def write_model(store: Store, kind: Kind, card: Mapping[str, object], tensors: Tensors) -> dict[str, FileRef]:
    """Write a model into the folder that its content names.

    Args:
        store: The root.
        kind: What it is: the name of its card.
        card: What is told of it.
        tensors: Its weights.

    Returns:
        The files of the card, under its kind, and of the `weights`.
    """
    weights = save(dict(tensors))
    written = canonical_json({**card, "weights": hashlib.sha256(weights).hexdigest()})
    folder = f"{kind}s/{hashlib.sha256(written).hexdigest()[:NAMED_BY]}"
    contents = {"weights": ("weights.safetensors", weights), kind: (f"{kind}.json", written)}
    files = {}
    for role, (name, data) in contents.items():
        files[role] = write_recorded(store, f"{folder}/{name}", data)
    return files


def read_model(store: Store, kind: Kind, folder: str) -> tuple[dict[str, Any], Tensors]:
    """Card and weights of `write_model`.

    Raises:
        CorruptArtifactError: The folder holds the card or the weights of another model, or damaged ones.
    """
    card = store.read(f"{folder}/{kind}.json")
    _check_digest(f"{store.uri}/{folder}/{kind}.json", kind, card, folder.rpartition("/")[2])
    fields = json.loads(card)
    weights = store.read(f"{folder}/weights.safetensors")
    _check_digest(f"{store.uri}/{folder}/weights.safetensors", kind, weights, fields["weights"])
    return fields, load(weights)


def folder_of(ref: FileRef) -> str:
    """Folder of a model's file."""
    return ref.path.rpartition("/")[0]


def _check_digest(place: str, kind: Kind, data: bytes, expected: str) -> None:
    """The expected digest may be cut."""
    found = hashlib.sha256(data).hexdigest()[: len(expected)]
    if found != expected:
        problem = f"expected the {kind}'s file of sha256 {expected}, found that of sha256 {found}"
        raise CorruptArtifactError(place, problem, "restore the file, or roll back to another release")
