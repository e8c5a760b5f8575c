"""Units of texts as tasks, and what becomes of one that kills its worker."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipeline.artifacts import FileRef
from pipeline.embedding.bisecting import KILLED_WORKER
from pipeline.embedding.cache import Cache
from pipeline.embedding.stage import condemn, encode_unit
from pipeline.execution.work import Task

__all__ = ["PIECES", "Unit"]

PIECES = 8
"""Pieces of a unit that killed two workers. Every level costs one death, which costs the loading of a model: eight
pieces need a third of the levels that halves would."""


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of a unit of texts; see `pipeline.execution.work.Rescue`."""

    cache: Cache
    encoder: str
    """Fingerprint."""
    bucket: int
    file: FileRef
    start: int
    stop: int

    def task(self) -> Task:
        """Encode them.

        The attempt of a run is not in the key: a unit that was encoded before a crash is not encoded again. The number of
        redrives is: what was condemned before one is tried again after it.
        """
        call = partial(
            encode_unit, cache=self.cache, bucket=self.bucket, unit=self.file, rows=(self.start, self.stop)
        )
        return Task("encode", self._inputs(), call, rescue=self)

    def pieces(self) -> Sequence[Task]:
        """Tasks of about an eighth each; none for a single row."""
        rows = self.stop - self.start
        if rows == 1:
            return ()
        size = -(-rows // PIECES)
        starts = range(self.start, self.stop, size)
        return [replace(self, start=a, stop=min(a + size, self.stop)).task() for a in starts]

    def give_up(self, deaths: int, said: str) -> Task:
        """Condemn them."""
        inputs = {**self._inputs(), "deaths": deaths}
        call = partial(
            condemn,
            cache=self.cache,
            bucket=self.bucket,
            unit=self.file,
            rows=(self.start, self.stop),
            reason=KILLED_WORKER,
            attempts=deaths,
            error=said,
        )
        return Task("condemn", inputs, call)

    def _inputs(self) -> dict[str, object]:
        place = {"bucket": self.bucket, "rows": (self.start, self.stop)}
        return {
            "unit": self.file,
            "encoder": self.encoder,
            "redrives": self.cache.generation,
            **place,
        }
