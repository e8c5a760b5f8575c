"""Bridges on the root: written by an upgrade, read back to serve queries of a new encoder from vectors of an old one."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import BridgeInfo
from pipeline.errors import CorruptArtifactError, IncompatibleModelsError
from pipeline.index.models import folder_of, read_model, write_model
from pipeline.spaces import EncoderIdentity
from pipeline.spaces.bridges import Bridge, bridge_of, bridge_tensors
from pipeline.spaces.calibration import Calibration, Cohort
from pipeline.storage import Store

__all__ = ["Crossing", "load_crossing", "write_crossing"]

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Crossing:
    """The way of queries into another space, and of scores back."""

    bridge: Bridge
    calibration: Calibration

    def queries(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """(q, d_old) unit vectors that ask there what (q, d_new) ask here."""
        return self.bridge.apply(queries)


def write_crossing(
    store: Store, crossing: Crossing, *, new: EncoderIdentity, old: EncoderIdentity, **found: object
) -> BridgeInfo:
    """Write a bridge and the calibration of its scores.

    Args:
        store: The root.
        crossing: Both.
        new: Encoder of the queries.
        old: Encoder of the vectors.
        found: What else its card says: how it was chosen, and from what.
    """
    calibration = _tensors(crossing.calibration)
    card = {
        "format": FORMAT,
        "kind": crossing.bridge.kind,
        "new": new.model_dump(mode="json"),
        "old": old.model_dump(mode="json"),
        **found,
    }
    files = write_model(store, "bridge", card, bridge_tensors(crossing.bridge) | calibration)
    return BridgeInfo(
        encoder=old.model_dump(mode="json"),
        kind=crossing.bridge.kind,
        files=(files["bridge"], files["weights"]),
    )


def load_crossing(store: Store, info: BridgeInfo, encoder: EncoderIdentity) -> Crossing:
    """Read what `write_crossing` wrote.

    Args:
        store: The root.
        info: What a manifest says of it.
        encoder: Of the queries.

    Raises:
        CorruptArtifactError: The files are damaged, or those of another bridge.
        IncompatibleModelsError: It is for queries of another encoder, or leads into another space than the manifest says.
    """
    folder = folder_of(info.files[0])
    place = f"{store.uri}/{folder}"
    card, tensors = read_model(store, "bridge", folder)
    new, old = (EncoderIdentity.model_validate(card[side]) for side in ("new", "old"))
    if new.fingerprint != encoder.fingerprint or old.fingerprint != info.space:
        wanted = EncoderIdentity.model_validate(info.encoder)
        problem = f"expected a bridge from {encoder} to {wanted}, found one from {new} to {old}"
        raise IncompatibleModelsError(
            place, problem, "roll back to another release, or run `strata upgrade` anew"
        )
    try:
        calibration = Calibration(tensors["bridged"], tensors["native"], _cohort(tensors))
    except (KeyError, ValueError) as error:
        problem = f"holds no calibration of scores ({error})"
        raise CorruptArtifactError(place, problem, "run `strata upgrade` anew") from error
    arrays = {name: array for name, array in tensors.items() if name not in CALIBRATION}
    return Crossing(bridge_of(arrays, card["kind"]), calibration)


CALIBRATION = ("bridged", "native", "cohort_new", "cohort_old")
"""Tensors that are not the bridge's."""


def _tensors(calibration: Calibration) -> dict[str, NDArray[np.float32]]:
    curve = {"bridged": calibration.bridged, "native": calibration.native}
    if calibration.cohort is None:
        return curve
    return curve | {"cohort_new": calibration.cohort.new, "cohort_old": calibration.cohort.old}


def _cohort(tensors: Mapping[str, NDArray[np.float32]]) -> Cohort | None:
    if "cohort_new" not in tensors:
        return None
    return Cohort(tensors["cohort_new"], tensors["cohort_old"])
