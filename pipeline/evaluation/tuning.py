"""How far a search looks: the cheapest rule and depth that find the wanted share of true neighbours, on queries held back."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config import SearchConfig
from pipeline.index.reader import IndexReader, Side
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
"""Posting lists that a tuning query scans at most where none are set: to read more of them 500 times over takes minutes, and
queries that need more are hardly cheaper than exact ones."""
ENTRIES_AT_ONCE = 1 << 20
"""Entries that it scans at most, about: all of one query are in memory at once."""
LEFT_OUT = (0.5, 0.125, 0.0)
"""Of the share of true neighbours that a search may miss, the part that may lie beyond the lists scanned; the next where the
codes of the others lose too many."""
DEPTHS = (10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400)
"""Re-rank depths to choose from."""


def tune(
    reader: IndexReader,
    side: Side,
    queries: NDArray[np.float32],
    wanted: Sequence[Sequence[bytes]],
    search: SearchConfig,
    target_recall: float,
) -> tuple[Setting, list[Setting]]:
    """The setting that reads least of those that reach a recall 10@10, and all that none beats.

    Among those that scan no more lists than it takes to meet the share that is asked for and half of the rest. A true
    neighbour whose own list lies beyond these counts as missed even where they hold a copy of it: recall is what is told, or
    more.

    Args:
        reader: The index.
        side: Its partitions in one space; a search looks into those of every space by the same rule.
        queries: (q, d) unit vectors, at least one, other ones than it is reported on.
        wanted: Of each, vector_ids of the true ten of the side and of what is as near as the tenth, at least one.
        search: What is set and not to be chosen.
        target_recall: In (0, 1].
    """
    partitions, queries = side.partitions, side.queries(queries)
    most, missed = _most_lists(reader, side), 1 - target_recall
    tracker = Tracker(partitions, queries, wanted, enough=WANTED)
    enough = [min(WANTED, len(ids)) for ids in wanted]
    tried: list[Setting] = []
    for left_out in LEFT_OUT:
        # Where the lists are set, whatever they hold is to count, copies of vectors of farther lists, too.
        located = tracker.locate(1.0 if search.lists else 1 - left_out * missed, most)
        lists = min(search.lists or located.lists, _all_lists(side))
        met = scan(partitions, queries, located.places, enough, lists=lists)
        tried = settings_of(met, _rules(search, met), depths_of(search), **_widths(reader, side))
        is_reached = choose_setting(tried, target_recall).sure_recall >= target_recall
        # More lists leave less to chance, too, so that nothing is taken off for it here.
        within_reach = max(one.recall for one in tried) + left_out * missed
        if search.lists or is_reached or lists == most or within_reach < target_recall:
            break
    return choose_setting(tried, target_recall), frontier(tried)


def depths_of(search: SearchConfig) -> Sequence[int]:
    """Re-rank depths to choose from."""
    return DEPTHS if search.rerank is None else (search.rerank,)


def _all_lists(side: Side) -> int:
    return sum(one.part.num_lists for one in side.partitions)


def _most_lists(reader: IndexReader, side: Side) -> int:
    """Lists that are worth looking through for the true neighbours of a query."""
    fit = max(1, round(ENTRIES_AT_ONCE / reader.manifest.statistics["list_rows_mean"]))
    return min(_all_lists(side), fit, MOST_LISTS)


def _rules(search: SearchConfig, met: Sequence[Scanned]) -> list[Probing]:
    """Those worth trying, as far as the configuration leaves a choice."""
    rules = rules_for(met)
    most = {search.lists} if search.lists else {rule.lists for rule in rules}
    margins = {search.margin} if search.margin is not None else {rule.margin for rule in rules}
    return [Probing(lists, margin) for lists in sorted(most) for margin in sorted(margins)]


def _widths(reader: IndexReader, side: Side) -> dict[str, int]:
    manifest, partition = reader.manifest, reader.manifest.partitions[side.partitions[0].number]
    return {
        "entry_bytes": partition.codes.code_bytes + 8,
        "vector_bytes": 2 * manifest.dims_of(partition),
    }
