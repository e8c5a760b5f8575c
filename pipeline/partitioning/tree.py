"""A tree of cuts that tells every row its partition (qd-tree, Yang et al., arXiv 2004.10898, section 3). Pure.

At a cut, rows for which its predicate is TRUE go one way, all others, those for which it is NULL among them, the other way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.filters import (
    Atom,
    NullTest,
    Predicate,
    Region,
    all_of,
    any_of,
    evaluate,
    filter_of,
    negate,
    to_sql,
)

__all__ = ["NOT_ASKED", "ONLY_PARTITION", "UNCUT", "Cut", "PartitionTree", "Step", "narrowed"]

ONLY_PARTITION = 0
"""The partition of every row where there are no cuts."""
NOT_ASKED = "-"


class Step(NamedTuple):
    """A cut on the way to a partition."""

    cut: int
    """Its number."""
    holds: bool
    """Whether the rows are those for which it is TRUE."""


class Cut(NamedTuple):
    """Where a node of the tree sends rows: to another node, or as ~number to a partition."""

    atom: Atom
    if_true: int
    otherwise: int


@dataclass(frozen=True)
class PartitionTree:
    """Cuts from the root down; without any, all rows are one partition."""

    cuts: tuple[Cut, ...] = ()
    """The first is the root; every other is named by one before it."""

    @property
    def num_partitions(self) -> int:
        """Partitions are numbered from 0 to this."""
        return len(self.cuts) + 1

    def assign(self, table: pa.Table) -> NDArray[np.int32]:
        """Tell every row its partition.

        Args:
            table: n rows with at least the columns of the cuts.

        Returns:
            (n,) int32.
        """
        found = np.full(table.num_rows, ONLY_PARTITION, np.int32)
        if not self.cuts:
            return found
        rows_of = {0: np.arange(table.num_rows)}
        for number, cut in enumerate(self.cuts):
            rows = rows_of.pop(number)
            holds = evaluate(filter_of(cut.atom), table.select([cut.atom.column]).take(pa.array(rows)))
            for child, some in ((cut.if_true, rows[holds]), (cut.otherwise, rows[~holds])):
                if child < 0:
                    found[some] = ~child
                else:
                    rows_of[child] = some
        return found

    @cached_property
    def paths(self) -> tuple[tuple[Step, ...], ...]:
        """Cuts on the way to each partition, from the root."""
        found: dict[int, tuple[Step, ...]] = {}
        self._collect(0 if self.cuts else ~ONLY_PARTITION, (), found)
        return tuple(found[number] for number in range(self.num_partitions))

    def _collect(self, node: int, path: tuple[Step, ...], found: dict[int, tuple[Step, ...]]) -> None:
        if node < 0:
            found[~node] = path
            return
        cut = self.cuts[node]
        self._collect(cut.if_true, (*path, Step(node, holds=True)), found)
        self._collect(cut.otherwise, (*path, Step(node, holds=False)), found)

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """What the rows of each partition can have."""
        atoms = [cut.atom for cut in self.cuts]
        return tuple(narrowed(Region(), atoms, self.bits(number)) for number in range(self.num_partitions))

    def text(self, cut: int) -> str:
        """WHERE text of a cut."""
        return to_sql(self.cuts[cut].atom)

    @property
    def nodes(self) -> list[tuple[str, int, int]]:
        """Text of each cut, and where it sends rows: what determines a tree."""
        return [(self.text(number), cut.if_true, cut.otherwise) for number, cut in enumerate(self.cuts)]

    def bits(self, partition: int) -> str:
        """What each cut is on the way to a partition: 1 TRUE, 0 not TRUE, - not asked."""
        asked = dict(self.paths[partition])
        return "".join(
            str(int(asked[number])) if number in asked else NOT_ASKED for number in range(len(self.cuts))
        )

    def readable_path(self, partition: int) -> str:
        """Condition that holds for the rows of a partition and for no others; TRUE where there are no cuts."""
        steps = [(self.cuts[step.cut].atom, step.holds) for step in self.paths[partition]]
        return to_sql(all_of(atom if holds else _not_true(atom) for atom, holds in steps))


def narrowed(region: Region, atoms: Sequence[Atom], bits: str) -> Region:
    """What rows of a region can have that are in a partition.

    Args:
        region: What is known of them already.
        atoms: Of each cut.
        bits: What each cut is on the way to the partition, as `PartitionTree.bits` has it.
    """
    for atom, bit in zip(atoms, bits, strict=True):
        if bit != NOT_ASKED:
            region = region.where(atom, holds=bit == "1")
    return region


def _not_true(atom: Atom) -> Predicate:
    no = negate(atom)
    return no if isinstance(atom, NullTest) else any_of([no, NullTest(atom.column, negated=False)])


UNCUT = PartitionTree()
"""One partition of all rows."""
