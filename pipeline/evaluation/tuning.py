"""How far a search looks: the cheapest rule and depth that find the wanted share of true neighbours, on queries held back."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config import SearchConfig
from pipeline.index.reader import IndexReader
from pipeline.index.scanning import Tracker, scan
from pipeline.postings import (
    WANTED,
    Probing,
    Scanned,
    Setting,
    choose_setting,
    frontier,
    rules_for,
    settings_of,
)

__all__ = ["depths_of", "tune"]

MOST_LISTS = 4096
"""Posting lists that a tuning query scans at most."""
MOST_ENTRIES = 1 << 20
"""Entries that it scans at most, about: all of one query are in memory at once."""
LEFT_OUT = (0.5, 0.125, 0.0)
"""Of the share of true neighbours that a search may miss, the part that may lie beyond the lists scanned; the next where the
codes of the others lose too many."""
DEPTHS = (10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400)
"""Re-rank depths to choose from."""


def tune(
    reader: IndexReader,
    queries: NDArray[np.float32],
    wanted: Sequence[Sequence[bytes]],
    search: SearchConfig,
    target_recall: float,
) -> tuple[Setting, list[Setting]]:
    """The setting that reads least of those that reach a recall 10@10, and all that none beats.

    Args:
        reader: The index.
        queries: (q, d) unit vectors, at least one, other ones than it is reported on.
        wanted: Of each, vector_ids of the true ten and of what is as near as the tenth, at least one.
        search: What is set and not to be chosen.
        target_recall: In (0, 1].
    """
    partitions, most, missed = reader.partitions(), _most_lists(reader, search), 1 - target_recall
    tracker = Tracker(partitions, queries, wanted, enough=WANTED)
    enough = [min(WANTED, len(ids)) for ids in wanted]
    tried: list[Setting] = []
    for left_out in LEFT_OUT:
        located = tracker.locate(1 - left_out * missed, most)
        lists = most if search.lists else located.lists
        met = scan(partitions, queries, located.places, enough, lists=lists)
        tried = settings_of(met, _rules(search, met), depths_of(search), **_widths(reader))
        recall = choose_setting(tried, target_recall).sure_recall
        is_within_reach = recall + left_out * missed >= target_recall
        if recall >= target_recall or lists == most or not is_within_reach:
            break
    return choose_setting(tried, target_recall), frontier(tried)


def depths_of(search: SearchConfig) -> Sequence[int]:
    """Re-rank depths to choose from."""
    return DEPTHS if search.rerank is None else (search.rerank,)


def _most_lists(reader: IndexReader, search: SearchConfig) -> int:
    every = sum(part.num_lists for part in reader.partitions())
    fit = max(1, round(MOST_ENTRIES / reader.manifest.statistics["list_rows_mean"]))
    return min(every, search.lists or every, fit, MOST_LISTS)


def _rules(search: SearchConfig, met: Sequence[Scanned]) -> list[Probing]:
    """Those worth trying, as far as the configuration leaves a choice."""
    rules = rules_for(met)
    most = {search.lists} if search.lists else {rule.lists for rule in rules}
    margins = {search.margin} if search.margin is not None else {rule.margin for rule in rules}
    return [Probing(lists, margin) for lists in sorted(most) for margin in sorted(margins)]


def _widths(reader: IndexReader) -> dict[str, int]:
    (partition,) = reader.manifest.partitions
    return {"entry_bytes": partition.codes.code_bytes + 8, "vector_bytes": 2 * reader.manifest.dims}
