"""SPANN's posting lists: how many, who is in them, which of them a query probes. Pure: arrays in, arrays out.

sizing.py    rows → lists → segments
closure.py   vectors → further lists that get a copy
graph.py     many heads → a graph that finds the nearest       faiss
capping.py   lists that are too long → several; replicas beyond the cap → none
pruning.py   query → lists to probe; tuning queries → the rule

Heads are found by `pipeline.clustering`; the files are written and read by `pipeline.index`.
"""

from pipeline.postings.capping import MOST, MOST_ENTRIES, Split, kept_entries, longest_list, split_rows
from pipeline.postings.closure import RNG_FACTOR, Replicas, replicas_of
from pipeline.postings.graph import EXACT_HEADS, LINK_BYTES, HeadGraph
from pipeline.postings.pruning import (
    MOST_MARGIN,
    WANTED,
    Probing,
    Scanned,
    Setting,
    choose_setting,
    frontier,
    head_distances,
    nearest_heads,
    rules_for,
    select_lists,
    settings_of,
)
from pipeline.postings.sizing import list_count, segments_of_lists

__all__ = [
    "EXACT_HEADS",
    "LINK_BYTES",
    "MOST",
    "MOST_ENTRIES",
    "MOST_MARGIN",
    "RNG_FACTOR",
    "WANTED",
    "HeadGraph",
    "Probing",
    "Replicas",
    "Scanned",
    "Setting",
    "Split",
    "choose_setting",
    "frontier",
    "head_distances",
    "kept_entries",
    "list_count",
    "longest_list",
    "nearest_heads",
    "replicas_of",
    "rules_for",
    "segments_of_lists",
    "select_lists",
    "settings_of",
    "split_rows",
]
