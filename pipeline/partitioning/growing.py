"""Grows the tree of a workload: greedy, best cut first, by rows that queries need not read (HQI, arXiv 2304.01926). Pure."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import LayoutConfig
from pipeline.filters import (
    Atom,
    Comparison,
    Filter,
    Region,
    Value,
    atoms_of,
    evaluate_many,
    filter_of,
    to_sql,
)
from pipeline.partitioning.tree import UNCUT, Cut, PartitionTree
from pipeline.partitioning.workload import Workload

__all__ = ["SAMPLE_ROWS", "TreeLimits", "grow_tree", "limits_for"]

SAMPLE_ROWS = 100_000
"""Rows that a tree is grown on at most."""
MOST_CUTS = 256
"""Predicates of the workload that are tried at each node, heaviest first."""
MANY_VALUES, RANGES = 16, 128
"""Values that filters ask of a column one by one, at least, that ranges are tried for; and these ranges."""
SCANNED_ROWS = 1000
"""Passing rows after which a search of posting lists has found its neighbours, about: the more rows pass a filter, the smaller
the share of what it can reach that it must read."""
SLOWER = 0.17
"""By how much of its time in one partition a query without a filter is slower for each partition more, at most: its neighbours
are in lists of all of them. *Measured* on 162,093 vectors tuned to recall .95: 3 partitions took 1.26, 1.29 and 1.33 times the
time in three runs, 4 partitions 1.44 times."""
ROUNDING = 1e-9
OPEN_ROWS = {"ssd": 2000, "object_store": 8000}
"""What it costs a query to look into a partition more, in rows scanned."""


@dataclass(frozen=True)
class TreeLimits:
    """What a tree may become, and what its partitions cost."""

    rows: int
    """Of the corpus."""
    min_rows: int
    """Of a partition."""
    max_partitions: int
    open_rows: int
    """What it costs a query to look into a partition more, in rows scanned."""


def limits_for(
    workload: Workload, layout: LayoutConfig, *, rows: int, storage: Literal["ssd", "object_store"]
) -> TreeLimits:
    """Limits of a tree.

    Args:
        workload: Past queries: where none is without a filter, nothing bounds what those would pay.
        layout: Settings of partitions.
        rows: Of the corpus.
        storage: What servers read posting lists from.
    """
    most = layout.max_partitions
    if workload.unfiltered:
        most = min(most, 1 + int((layout.unfiltered_slowdown - 1) / SLOWER + ROUNDING))
    return TreeLimits(rows, layout.min_partition_rows, most, OPEN_ROWS[storage])


class _Questions(NamedTuple):
    """The workload against the cuts that are tried."""

    cuts: list[Atom]
    truth: NDArray[np.bool_]
    """(cuts, rows) whether each is TRUE."""
    needs_true: NDArray[np.bool_]
    """(filters, cuts) whether a row that passes the filter can be one for which the cut is TRUE."""
    needs_other: NDArray[np.bool_]
    """(filters, cuts) the same of rows for which it is not."""
    row_weights: NDArray[np.float64]
    """(filters,) what a query of each would gain for every row that it need not look at, times its share of the queries."""
    weights: NDArray[np.float64]
    """(filters,) share of the queries."""


@dataclass(frozen=True)
class _Leaf:
    """A partition that may still be cut."""

    rows: NDArray[np.int64]
    filters: NDArray[np.int64]
    """Those that can have a match here."""
    region: Region
    parent: tuple[int, bool]
    """The cut that made it, and on which side; (-1, True) of the root."""


def grow_tree(sample: pa.Table, workload: Workload, limits: TreeLimits) -> PartitionTree:
    """Cut the rows by predicates of the workload while that saves more than further partitions cost.

    The cost of a layout is a sum over queries by their weight: rows that they read, and `open_rows` for each partition that
    they reach; unfiltered ones reach all. Of the rows of the partitions that a filter reaches it reads those until
    `SCANNED_ROWS` have passed.

    Args:
        sample: Rows with the attributes, a uniform sample of the corpus.
        workload: Past queries.
        limits: Of the tree.
    """
    cuts = _candidates(workload)
    if not sample.num_rows or not cuts:
        return UNCUT
    questions = _questions(sample, workload, cuts, limits)
    each = limits.rows / sample.num_rows
    root = _Leaf(np.arange(sample.num_rows), np.arange(len(workload.filters)), Region(), (-1, True))
    made: list[tuple[int, tuple[int, bool]]] = []
    heap: list[tuple[float, int, int, _Leaf]] = []
    final: list[_Leaf] = []
    order = count()

    def consider(leaf: _Leaf) -> None:
        gain, cut = _best_cut(leaf, questions, workload.unfiltered, limits, each)
        if gain > 0:
            heapq.heappush(heap, (-gain, next(order), cut, leaf))
        else:
            final.append(leaf)

    consider(root)
    while heap and len(heap) + len(final) < limits.max_partitions:
        _, _, cut, leaf = heapq.heappop(heap)
        number = len(made)
        made.append((cut, leaf.parent))
        for side in (True, False):
            consider(_child(leaf, questions, workload, cut, number, side=side))
    return _tree(questions.cuts, made, [*final, *(entry[3] for entry in heap)])


def _questions(sample: pa.Table, workload: Workload, cuts: list[Atom], limits: TreeLimits) -> _Questions:
    masks = evaluate_many([*map(filter_of, cuts), *workload.filters], sample)
    truth = np.stack(list(islice(masks, len(cuts))))
    needs_true, needs_other = (_can_meet(workload.filters, cuts, holds=holds) for holds in (True, False))
    passing = np.array([mask.sum() for mask in masks])
    weights = np.array(workload.weights)
    share_read = np.minimum(1.0, SCANNED_ROWS / np.maximum(passing * limits.rows / sample.num_rows, 1))
    return _Questions(cuts, truth, needs_true, needs_other, weights * share_read, weights)


def _candidates(workload: Workload) -> list[Atom]:
    """Distinct predicates on one column, by falling weight of the filters that they stand in, and ranges of asked values."""
    found: dict[Atom, float] = {}
    for one, weight in zip(workload.filters, workload.weights, strict=True):
        for atom in dict.fromkeys(atoms_of(one.predicate)):
            found[atom] = found.get(atom, 0.0) + weight
    heaviest = sorted(found, key=lambda atom: (-found[atom], to_sql(atom)))[:MOST_CUTS]
    return list(dict.fromkeys([*heaviest, *_ranges(found)]))


def _ranges(weights: Mapping[Atom, float]) -> Iterator[Atom]:
    """Cuts between the values of columns of which many are asked for one by one, evenly by their weight.

    So filters on values that are too rare for partitions of their own share some, as tenants do.
    """
    asked: dict[str, list[tuple[Value, float]]] = {}
    for atom, weight in weights.items():
        if isinstance(atom, Comparison) and atom.operator == "=":
            asked.setdefault(atom.column, []).append((atom.value, weight))
    for column, pairs in sorted(asked.items()):
        if len(pairs) < MANY_VALUES:
            continue
        pairs.sort()
        reached = np.cumsum([weight for _, weight in pairs])
        steps = np.arange(1, RANGES) / RANGES * reached[-1]
        places = np.unique(np.searchsorted(reached[:-1], steps))
        yield from (
            Comparison(column, "<=", pairs[place][0]) for place in places[places < len(pairs) - 1].tolist()
        )


def _can_meet(filters: Sequence[Filter], cuts: Sequence[Atom], *, holds: bool) -> NDArray[np.bool_]:
    """(filters, cuts) whether a row that passes the filter can be one for which the cut is TRUE, or is not."""
    regions = [Region().where(cut, holds=holds) for cut in cuts]
    possible = np.array([not region.is_empty for region in regions], np.bool_)
    of_column: dict[str, list[int]] = {}
    for number, cut in enumerate(cuts):
        of_column.setdefault(cut.column, []).append(number)
    found = np.empty((len(filters), len(cuts)), np.bool_)
    for row, one in enumerate(filters):
        found[row] = possible & Region().may_hold(one.predicate)
        for number in chain.from_iterable(of_column.get(column, ()) for column in one.columns):
            found[row, number] = regions[number].may_hold(one.predicate)
    return found


def _best_cut(
    leaf: _Leaf, questions: _Questions, unfiltered: float, limits: TreeLimits, each: float
) -> tuple[float, int]:
    """What the best cut of a leaf saves, in rows per query, and its number; nothing where none is allowed."""
    rows_true = questions.truth[:, leaf.rows].sum(axis=1)
    rows_other = len(leaf.rows) - rows_true
    least = max(1.0, limits.min_rows / each)
    allowed = (rows_true >= least) & (rows_other >= least)
    if not allowed.any():
        return 0.0, 0
    of_rows, weights = questions.row_weights[leaf.filters], questions.weights[leaf.filters]
    skips_true = ~questions.needs_true[leaf.filters]
    skips_other = ~questions.needs_other[leaf.filters]
    saved = each * (rows_true * (of_rows @ skips_true) + rows_other * (of_rows @ skips_other))
    into_both = unfiltered + weights @ (~skips_true & ~skips_other)
    gain = np.where(allowed, saved - limits.open_rows * into_both, 0.0)
    best = int(gain.argmax())
    return float(gain[best]), best


def _child(
    leaf: _Leaf, questions: _Questions, workload: Workload, cut: int, number: int, *, side: bool
) -> _Leaf:
    truth = questions.truth[cut, leaf.rows]
    region = leaf.region.where(questions.cuts[cut], holds=side)
    kept = [no for no in leaf.filters.tolist() if region.may_hold(workload.filters[no].predicate)]
    rows = leaf.rows[truth if side else ~truth]
    return _Leaf(rows, np.array(kept, np.int64), region, (number, side))


def _tree(cuts: list[Atom], made: list[tuple[int, tuple[int, bool]]], leaves: list[_Leaf]) -> PartitionTree:
    """Nodes in the order in which they were cut; partitions are numbered along the tree, TRUE first."""
    children = {parent: node for node, (_, parent) in enumerate(made)}
    ends = {leaf.parent for leaf in leaves}
    numbers: dict[tuple[int, bool], int] = {}
    waiting = [(-1, True)]
    while waiting:
        place = waiting.pop()
        if place in ends:
            numbers[place] = ~len(numbers)
        else:
            waiting += [(children[place], False), (children[place], True)]

    def child(place: tuple[int, bool]) -> int:
        return children[place] if place in children else numbers[place]

    return PartitionTree(
        tuple(Cut(cuts[cut], child((node, True)), child((node, False))) for node, (cut, _) in enumerate(made))
    )
