"""Records of runs, finished and failed alike: `runs/<UTC time>-<run id>.json`, newest last.

For people and for alerts. No run reads them, so nothing is done or skipped because of one.
"""

import contextlib
import re
from collections.abc import Sequence
from datetime import UTC

from pipeline.artifacts import RunRecord, parse_model
from pipeline.errors import DataError
from pipeline.release.records import corpus_of_root
from pipeline.storage import Store, canonical_json, side_by_side

__all__ = ["RUNS", "old_records", "read_runs", "write_run"]

RUNS = "runs"
KEPT_RUNS = 100
"""Newest records that gc leaves alone."""
NAME = re.compile(rf"{RUNS}/\d{{8}}T\d{{6}}Z-[0-9a-f]+\.json")


def write_run(store: Store, record: RunRecord) -> bool:
    """Keep the record of a run; False if the root is another corpus's, where it has no place."""
    owner = corpus_of_root(store)
    if owner is not None and owner != record.corpus:
        return False
    path = f"{RUNS}/{record.started.astimezone(UTC):%Y%m%dT%H%M%SZ}-{record.run}.json"
    store.write(path, canonical_json(record.model_dump(mode="json")))
    return True


def read_runs(store: Store, *, last: int) -> list[RunRecord]:
    """The newest runs, oldest of them first."""
    names = [found.path for found in store.list(RUNS) if NAME.fullmatch(found.path)][-last:]
    return [record for records in side_by_side(lambda path: _read(store, path), names) for record in records]


def _read(store: Store, path: str) -> list[RunRecord]:
    """A record; none if it is gone by now or a newer strata wrote it otherwise: it is no reason to show nothing at all."""
    with contextlib.suppress(DataError):
        return [parse_model(RunRecord, store.read(path), f"{store.uri}/{path}")]
    return []


def old_records(paths: Sequence[str]) -> frozenset[str]:
    """Of the paths of files, those of records that are not among the newest."""
    return frozenset(sorted(path for path in paths if NAME.fullmatch(path))[:-KEPT_RUNS])
