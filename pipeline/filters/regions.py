"""What the values of columns can be where predicates are known to hold, and whether a filter can be TRUE there. Conservative.

A region is a box: of each column a set of values, whatever the other columns have. Narrowing by conditions on one column is
exact; a filter that joins several may be said to have a match where there is none, never the other way round.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipeline.filters.predicates import (
    Comparison,
    Conjunction,
    Disjunction,
    ListContains,
    Membership,
    NullTest,
    Operator,
    Predicate,
    Truth,
    Value,
    negate,
)

__all__ = ["Atom", "Region", "Values", "atoms_of"]

Atom = Comparison | Membership | NullTest | ListContains
"""A predicate on one column."""
Edge = tuple[Value, bool]
"""A place in the order of values: just before one, or just behind it."""


@dataclass(frozen=True, slots=True)
class Values:
    """What a column can have: scalars by their order, lists by their elements.

    NaN is the greatest float, as in comparisons.
    """

    null: bool = True
    """Whether it can be null."""
    from_start: bool = True
    """Whether the least values are among them; without edges, whether any value is."""
    edges: tuple[Edge, ...] = ()
    """Rising places where being among them changes."""
    held: frozenset[str] = frozenset()
    """Elements that every list has."""
    absent: frozenset[str] = frozenset()
    """Elements that no list has."""
    occurs: Callable[[Value], bool] | None = None
    """Tells of a scalar, or of an element of a list, that it does not occur; may say of others that they do."""

    def where(self, atom: Atom) -> "Values":
        """Those for which the predicate is TRUE."""
        match atom:
            case NullTest(_, negated):
                return replace(self, null=False) if negated else replace(self, from_start=False, edges=())
            case ListContains(_, element, negated):
                if negated:
                    return replace(self, null=False, absent=self.absent | {element})
                return replace(self, null=False, held=self.held | {element})
            case Comparison(_, operator, value):
                return self._within(*_compared(operator, value))
            case Membership(_, values, negated):
                edges = tuple(edge for value in values for edge in ((value, False), (value, True)))
                return self._within(negated, edges)

    def where_not(self, atom: Atom) -> "Values":
        """Those for which the predicate is FALSE or NULL."""
        found = self.where(_negated(atom))
        return found if isinstance(atom, NullTest) else replace(found, null=self.null)

    def _within(self, from_start: bool, edges: tuple[Edge, ...]) -> "Values":
        """Values that are in this set, too, and no null."""
        mine, theirs = frozenset(self.edges), frozenset(edges)
        in_mine, in_theirs = self.from_start, from_start
        state = starts = in_mine and in_theirs
        kept = []
        for edge in sorted(mine | theirs):
            in_mine ^= edge in mine
            in_theirs ^= edge in theirs
            if (in_mine and in_theirs) != state:
                state = not state
                kept.append(edge)
        return replace(self, null=False, from_start=starts, edges=tuple(kept))

    @property
    def is_empty(self) -> bool:
        """Whether no row can have any of them."""
        return not self.null and not self._has_value()

    def _has_value(self) -> bool:
        if self.held & self.absent:
            return False
        if self.occurs is not None and not all(map(self.occurs, self.held)):
            return False
        if self.from_start or len(self.edges) % 2:
            return True
        pairs = zip(self.edges[::2], self.edges[1::2], strict=True)
        return any(low[0] != high[0] or self.occurs is None or self.occurs(low[0]) for low, high in pairs)


ANYTHING = Values()


def _compared(operator: Operator, value: Value) -> tuple[bool, tuple[Edge, ...]]:
    """Values that compare so, as `from_start` and `edges`."""
    before, behind = (value, False), (value, True)
    match operator:
        case "=":
            return False, (before, behind)
        case "<>":
            return True, (before, behind)
        case "<":
            return True, (before,)
        case "<=":
            return True, (behind,)
        case ">":
            return False, (behind,)
        case ">=":
            return False, (before,)


def _negated(atom: Atom) -> Atom:
    match atom:
        case Comparison(column, "=", value):
            return Comparison(column, "<>", value)
        case Membership(column, values, negated):
            return Membership(column, values, not negated)
        case _:
            found = negate(atom)
            assert isinstance(found, Atom)  # noqa: S101 - NOT of one of these is one of these
            return found


@dataclass(frozen=True, slots=True)
class Region:
    """What rows can have, by column; a column that is not named can have anything."""

    columns: Mapping[str, Values] = field(default_factory=dict)

    def where(self, atom: Atom, *, holds: bool) -> "Region":
        """The rows for which a predicate is TRUE, or those for which it is FALSE or NULL."""
        before = self.columns.get(atom.column, ANYTHING)
        return Region({**self.columns, atom.column: before.where(atom) if holds else before.where_not(atom)})

    @property
    def is_empty(self) -> bool:
        """Whether there can be no such row."""
        return any(values.is_empty for values in self.columns.values())

    def may_hold(self, predicate: Predicate) -> bool:
        """Whether the predicate can be TRUE for a row; False only if it is for none."""
        match predicate:
            case Truth(value):
                return value is True and not self.is_empty
            case Disjunction(operands):
                return any(self.may_hold(operand) for operand in operands)
            case Conjunction(operands):
                region, open_ends = self, []
                for operand in operands:
                    if isinstance(operand, Disjunction):
                        open_ends.append(operand)
                    elif not isinstance(operand, Truth | Conjunction):
                        region = region.where(operand, holds=True)
                    elif operand != Truth(value=True):
                        return False
                return not region.is_empty and all(map(region.may_hold, open_ends))
            case _:
                return not self.where(predicate, holds=True).is_empty

    def must_hold(self, predicate: Predicate) -> bool:
        """Whether the predicate is TRUE for every row; True only if it is."""
        match predicate:
            case Truth(value):
                return value is True or self.is_empty
            case Disjunction(operands):
                return any(map(self.must_hold, operands))
            case Conjunction(operands):
                return all(map(self.must_hold, operands))
            case _:
                return self.where(predicate, holds=False).is_empty


def atoms_of(predicate: Predicate) -> Iterator[Atom]:
    """Predicates on single columns of which it is made, none negated; those of IN both together and one by one."""
    match predicate:
        case Truth():
            return
        case Conjunction(operands) | Disjunction(operands):
            for operand in operands:
                yield from atoms_of(operand)
        case Comparison(column, "<>", value):
            yield Comparison(column, "=", value)
        case Membership(column, values, _):
            yield Membership(column, values, negated=False)
            yield from (Comparison(column, "=", value) for value in values)
        case Comparison():
            yield predicate
        case NullTest() | ListContains():
            yield replace(predicate, negated=False)
