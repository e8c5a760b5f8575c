"""Tombstones: rows of an immutable segment that are there no longer, deleted, changed, or embedded anew elsewhere."""

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

from pipeline.artifacts import FileRef, Segment
from pipeline.storage import Store, adopt_file, read_recorded

__all__ = ["live_rows", "read_tombstones", "write_tombstones"]


def write_tombstones(store: Store, rows: NDArray[np.int64]) -> FileRef:
    """Write rows of a segment, in any order, as a roaring bitmap in the portable format."""
    bitmap = BitMap(rows.astype(np.uint32))
    bitmap.run_optimize()
    with store.staging() as local:
        local.write_bytes(bitmap.serialize())
        path, size, digest = adopt_file(store, local, "partitions", ".tombstones")
    return FileRef(path=path, rows=len(bitmap), bytes=size, sha256=digest)


def read_tombstones(store: Store, ref: FileRef) -> NDArray[np.int64]:
    """(n,) rising rows of `write_tombstones`.

    Raises:
        CorruptArtifactError: The bytes are not the recorded ones.
    """
    return np.array(BitMap.deserialize(read_recorded(store, ref)).to_array(), np.int64)


def live_rows(store: Store, segment: Segment) -> NDArray[np.bool_]:
    """(n,) which rows of a segment's vectors have no tombstone."""
    live = np.ones(segment.vectors.rows, np.bool_)
    if segment.tombstones is not None:
        live[read_tombstones(store, segment.tombstones)] = False
    return live
