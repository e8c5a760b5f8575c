"""Documents that stand in for queries of an encoder that has embedded some of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import FileRef
from pipeline.embedding.cache import Cache, CachedBucket
from pipeline.execution.session import Session
from pipeline.execution.work import Task
from pipeline.index.vectors import cached_vectors
from pipeline.tables import hash_keys, read_columns
from pipeline.upgrade.stage import HASHED, name_texts, write_hashes

__all__ = ["documents_as_queries"]

SPARE = 2
"""Texts that are looked for, in units of those that are wanted: some are of documents that are there no longer."""


def documents_as_queries(
    session: Session, documents: Sequence[FileRef], cache: Cache, count: int
) -> tuple[NDArray[np.float32], list[str]]:
    """Those with the largest text hashes among the ones that an encoder has embedded, one of each text.

    Bridges are trained on the smallest.

    Args:
        session: The job.
        documents: Of a release.
        cache: Of the encoder.
        count: How many are wanted.

    Returns:
        (n, d) unit vectors and doc_ids, in order of hash; n is `count`, or less where there are fewer.
    """
    with session.timed("judge"):
        hashes = _largest(session, cache, SPARE * count)
        asked = write_hashes(session.store, hashes)
    arguments: dict[str, Any] = {"hashes": asked}
    tasks = [
        Task("stand_ins", {"documents": ref, **arguments}, partial(name_texts, documents=ref), arguments)
        for ref in documents
    ]
    tables = [
        read_columns(session.store, output.files["named"].path) for output in session.outputs("judge", tasks)
    ]
    named = pa.concat_tables([HASHED.empty_table(), *tables]).sort_by(
        [("text_hash", "ascending"), ("doc_id", "ascending")]
    )
    found, first = np.unique(hash_keys(named["text_hash"]), return_index=True)
    vectors = cached_vectors(session.store, cache, found[-count:]).vectors
    return vectors, named["doc_id"].take(pa.array(first[-count:])).to_pylist()


def _largest(session: Session, cache: Cache, count: int) -> NDArray[np.bytes_]:
    """(n,) hashes of texts in a cache, in order."""
    found: list[NDArray[np.bytes_]] = []
    for bucket in reversed(range(cache.buckets)):
        found.append(np.unique(CachedBucket(session.store, cache, bucket).keys))
        if sum(map(len, found)) >= count:
            break
    return np.concatenate([np.zeros(0, "S16"), *reversed(found)])[-count:]
