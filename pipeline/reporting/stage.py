"""Gathers the figures of a page from a root, and writes the page. The only module of the package that does I/O."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.artifacts import FileRef, IndexManifest, ReleaseRecord
from pipeline.config import Config
from pipeline.corpus import read_dead_letters
from pipeline.corpus.rules import kind_of_reason
from pipeline.embedding.cache import cached_bytes
from pipeline.errors import ConfigError, MissingFileError
from pipeline.release import History, list_releases, read_history, read_manifest, read_rejection, read_release
from pipeline.release.records import is_retired
from pipeline.reporting.figures import DeadLetters, Figures, ListSizes, Measured, ReleaseLine
from pipeline.reporting.page import render
from pipeline.storage import Store, open_store, split_uri
from pipeline.tables import read_columns

__all__ = ["default_place", "gather", "gather_rejected", "write_page"]

EXAMPLE_LETTERS = 20
"""Rows of the dead-letter table that a page shows."""
SIZES = ("num_primaries", "num_entries")
"""Columns of the directory that tell how long lists are."""


def gather(store: Store, config: Config, release: int | None) -> Figures:
    """Figures of a release.

    Args:
        store: The root.
        config: Has the prices.
        release: Its number; None: the current one.

    Raises:
        MissingFileError: There is no such release, or its files were collected.
    """
    history, records = read_history(store), list_releases(store)
    number = history.current if release is None else release
    if number is None:
        raise MissingFileError(store.uri, "no release is published here", "run `strata run CONF` first")
    record = read_release(store, number)
    lines = _lines(store, history, records)
    return _figures(
        store,
        config,
        read_manifest(store, record),
        Measured.model_validate(record.summary),
        lines,
        next(line for line in lines if line.release == number),
    )


def gather_rejected(store: Store, config: Config, index: str) -> Figures:
    """Figures of an index that its gates kept from being published.

    Raises:
        MissingFileError: There is no such index, or it was collected.
    """
    manifest, summary = read_rejection(store, index)
    lines = _lines(store, read_history(store), list_releases(store))
    return _figures(store, config, manifest, Measured.model_validate(summary), lines, None)


def _figures(
    store: Store,
    config: Config,
    manifest: IndexManifest,
    measured: Measured,
    history: tuple[ReleaseLine, ...],
    line: ReleaseLine | None,
) -> Figures:
    return Figures(
        root=store.uri,
        release=line.release if line is not None else None,
        created=line.created if line is not None else None,
        state=line.state if line is not None else "not published",
        manifest=manifest,
        measured=measured,
        list_sizes=_list_sizes(store, manifest),
        dead_letters=_dead_letters(store, measured.dead_letter_files),
        cache_bytes=sum(cached_bytes(store, space) for space in {p.space for p in manifest.partitions}),
        history=history,
        prices=config.report,
    )


def _lines(store: Store, history: History, records: Sequence[ReleaseRecord]) -> tuple[ReleaseLine, ...]:
    return tuple(
        ReleaseLine(
            record.release,
            record.created,
            Measured.model_validate(record.summary),
            _state(store, history, record.release),
        )
        for record in records
    )


def _state(store: Store, history: History, release: int) -> str:
    if release == history.current:
        return "current"
    if is_retired(store, release):
        return "retired"
    if release in history.withdrawn:
        return "rolled back"
    return "replaced" if release in history.published else "not published"


def _list_sizes(store: Store, manifest: IndexManifest) -> ListSizes | None:
    """Of all partitions, one after the other, each list over all its segments."""
    found = []
    for partition in manifest.partitions:
        try:
            table = read_columns(store, partition.directory.path, ["list_no", *SIZES])
        except MissingFileError:
            return None
        lists = table["list_no"].to_numpy()
        found.append(
            [
                np.bincount(lists, weights=table[name].to_numpy(), minlength=partition.heads.rows)
                for name in SIZES
            ]
        )
    return ListSizes(*(np.concatenate(sizes).astype(np.int64) for sizes in zip(*found, strict=True)))


def _dead_letters(store: Store, paths: Sequence[str]) -> DeadLetters:
    """Counts of the reasons and the first rows; one file after the other, as there may be many."""
    reasons: Counter[str] = Counter()
    examples: list[dict[str, object]] = []
    for path in paths:
        try:
            table = read_dead_letters(store, [FileRef(path=path, rows=0, bytes=0, sha256="")])
        except MissingFileError:
            return DeadLetters(unreadable=f"{store.uri}/{path} is gone: gc has collected it")
        reasons.update(map(kind_of_reason, table["reason"].to_pylist()))
        examples += table.slice(0, EXAMPLE_LETTERS - len(examples)).to_pylist()
    return DeadLetters(tuple(reasons.most_common()), tuple(examples))


def default_place(figures: Figures) -> str:
    """Where a page goes that nobody gave a place: below the root, where gc leaves it alone."""
    name = f"release-{figures.release}" if figures.release is not None else f"index-{figures.manifest.index}"
    return f"{figures.root}/reports/{name}.html"


def write_page(figures: Figures, config: Config, out: str) -> int:
    """Render the page and write it, local or to S3; returns its bytes.

    Raises:
        ConfigError: `out` names no file.
    """
    folder, name = split_uri(out)
    if not name:
        raise ConfigError("--out", f"expected the name of a file, found {out!r}", "give FOLDER/FILE.html")
    data = render(figures).encode()
    open_store(folder, config.storage).write(name, data)
    return len(data)
