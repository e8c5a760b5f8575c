"""`redrive`: after a fix, try the texts again that an encoder had failed on, and say what became of them.

A redrive is one entry of a log, which forgets every condemnation made before it, and then an ordinary run. A mark beside
the entry says that the run came to its end. One that did not is gone on with as long as nothing was condemned since:
what was, be it by that run or by a later one, only a new entry forgets. Whatever redrives of the same kind did not come
to their end are reported on together.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import structlog
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.embedding.bisecting import REASONS
from pipeline.embedding.cache import (
    Cache,
    CachedBucket,
    Redrives,
    condemned_texts,
    find_cache,
    finish_redrive,
    first_of_each,
    forget_condemned,
    is_redrive_finished,
)
from pipeline.errors import ConfigError
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.flows import run
from pipeline.execution.ledger import Ledger
from pipeline.execution.work import StoreSpec
from pipeline.storage import Store
from pipeline.tables import hash_keys

__all__ = ["redrive"]

FATES = ("recovered", "dead_again", "not_in_corpus")


def redrive(
    config: Config,
    spec: StoreSpec,
    runner_of: Callable[[], Any],
    *,
    reasons: Sequence[str] = (),
    ledger: Ledger | None = None,
) -> dict[str, Any]:
    """Forget which texts could not be encoded, and run.

    Args:
        config: The run.
        spec: The root.
        runner_of: As in `run`.
        reasons: Only what was condemned for these; none: everything.
        ledger: As in `run`.

    Returns:
        The summary of the run, with `redriven` (by old reason: dead, recovered, dead_again, not_in_corpus; in texts) and
        `bad_in_source` (by reason, the rows that are bad in the corpus itself, which only its owner can mend).

    Raises:
        ConfigError: There is no such reason.
        PipelineError: As `run`; the same command then goes on.
    """
    unknown = sorted(set(reasons) - set(REASONS))
    if unknown:
        raise ConfigError(f"--reason {unknown[0]}", f"expected one of {', '.join(REASONS)}", "mend it")
    begun: list[_Begun] = []

    def begin(store: Store, encoder: EncoderInForce) -> None:
        begun.extend(_begin(store, encoder, tuple(sorted(set(reasons)))))

    summary = run(config, spec, runner_of, ledger, begin=begin)
    counts = _finish(spec.open(), begun)
    by_reason = summary.get("dead_letters_by_reason", {})
    in_source = {reason: count for reason, count in by_reason.items() if reason not in REASONS}
    return {**summary, "redriven": counts, "bad_in_source": in_source}


@dataclass(frozen=True)
class _Begun:
    """A redrive under way."""

    encoder: str
    """Fingerprint."""
    cache: Cache
    """With this redrive."""
    dead: Mapping[int, pa.Table]
    """By bucket, what it forgot."""


def _begin(store: Store, encoder: EncoderInForce, reasons: tuple[str, ...]) -> list[_Begun]:
    """Begin a redrive, or go on with one that did not come to its end; none where nothing is condemned."""
    cache = find_cache(store, encoder.fingerprint)
    if cache is None:
        return []
    log, done = structlog.get_logger(), cache.redrives
    first = _first_open(store, encoder.fingerprint, done, reasons)
    forgotten = [_dead(store, replace(cache, redrives=done[:n]), reasons) for n in range(first, len(done))]
    since = _dead(store, cache, reasons)
    dead = _union([*forgotten, since])
    if since:
        redrives = forget_condemned(store, encoder.fingerprint, after=done, reasons=reasons)
        log.info("redrive_began", redrive=len(redrives), texts=sum(table.num_rows for table in dead.values()))
        return [_Begun(encoder.fingerprint, replace(cache, redrives=redrives), dead)]
    if dead:
        log.info("redrive_goes_on", redrive=cache.generation)
        return [_Begun(encoder.fingerprint, cache, dead)]
    log.info("nothing_to_redrive")
    return []


def _first_open(store: Store, encoder: str, done: Redrives, reasons: tuple[str, ...]) -> int:
    """Place of the oldest of the last redrives that are of this kind and did not come to their end."""
    first = len(done)
    while first and done[first - 1] == reasons and not is_redrive_finished(store, encoder, first):
        first -= 1
    return first


def _union(found: Sequence[Mapping[int, pa.Table]]) -> dict[int, pa.Table]:
    """By bucket, each text once, with the oldest of its reasons."""
    tables: dict[int, list[pa.Table]] = {}
    for one in found:
        for bucket, table in one.items():
            tables.setdefault(bucket, []).append(table)
    return {bucket: first_of_each(pa.concat_tables(parts)) for bucket, parts in tables.items()}


def _dead(store: Store, cache: Cache, reasons: tuple[str, ...]) -> dict[int, pa.Table]:
    found = condemned_texts(store, cache)
    if reasons:
        wanted = pa.array(reasons, pa.string())
        found = {b: table.filter(pc.is_in(table["reason"], wanted)) for b, table in found.items()}
    return {bucket: table for bucket, table in found.items() if table.num_rows}


def _finish(store: Store, begun: Sequence[_Begun]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for one in begun:
        for bucket, table in one.dead.items():
            fates = _fates(CachedBucket(store, one.cache, bucket), hash_keys(table["text_hash"]))
            for reason, fate in zip(table["reason"].to_pylist(), fates, strict=True):
                counts.setdefault(reason, Counter()).update(["dead", FATES[fate]])
        finish_redrive(store, one.encoder, one.cache.generation)
    return {
        reason: {name: found[name] for name in ("dead", *FATES)} for reason, found in sorted(counts.items())
    }


def _fates(cached: CachedBucket, hashes: NDArray[np.bytes_]) -> NDArray[np.intp]:
    """(n,) places in FATES."""
    again = np.isin(hashes, hash_keys(cached.condemned["text_hash"]))
    return np.where(np.isin(hashes, cached.keys), 0, np.where(again, 1, 2))
