"""What the entries of the alias mean. Pure: entries in, numbers and sentences out.

A publication stands on top of the release that was current; rolling back takes releases off until the wanted one is on
top. So repeated rollbacks walk further back, and a release that was taken off is withdrawn until the alias names it again:
published anew, or put on top by a rollback to its number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.artifacts import AliasEntry

__all__ = ["History", "explain_conflict", "find_gaps"]


@dataclass(frozen=True)
class History:
    """All moves of the alias, oldest first."""

    entries: tuple[AliasEntry, ...]

    @property
    def current(self) -> int | None:
        """Release that the alias names; None before the first publication."""
        return self.entries[-1].release if self.entries else None

    @property
    def published(self) -> frozenset[int]:
        """Releases that the alias has ever named."""
        return frozenset(entry.release for entry in self.entries)

    @property
    def standing(self) -> tuple[int, ...]:
        """The current release last, below it those to roll back to."""
        return _replay(self.entries)[0]

    @property
    def withdrawn(self) -> frozenset[int]:
        """Releases that were rolled back from and have not been named since."""
        return _replay(self.entries)[1]


def _replay(entries: Sequence[AliasEntry]) -> tuple[tuple[int, ...], frozenset[int]]:
    standing: list[int] = []
    withdrawn: set[int] = set()
    for entry in entries:
        if entry.reason == "rollback" and entry.release in standing:
            place = standing.index(entry.release)
            withdrawn.update(standing[place:])
            del standing[place:]
        elif entry.release in standing:
            standing.remove(entry.release)
        standing.append(entry.release)
        withdrawn.discard(entry.release)
    return tuple(standing), frozenset(withdrawn)


def explain_conflict(started_at: AliasEntry | None, found: AliasEntry | None) -> tuple[str, str]:
    """Problem and remedy for a run that may not move the alias.

    Args:
        started_at: Newest entry when the run started; None if there was none.
        found: Newest entry now; None if there is none, or if the entry of the start is no longer there.
    """
    if started_at is None and found is not None:
        problem = f"expected no publication yet, found release {found.release}: another run created the alias"
        return problem, "rerun: finished work is kept, and the new run follows that release"
    if started_at is not None and found is not None:
        problem = (
            f"expected entry {started_at.seq} (release {started_at.release}), "
            f"found entry {found.seq} (release {found.release}) by {found.reason}: another run moved the alias"
        )
        return problem, "rerun: finished work is kept, and the new run follows that release"
    seq = started_at.seq if started_at is not None else 0
    problem = f"entry {seq}, which this run had read when it started, is no longer there as it was"
    return problem, "the root was changed by hand or restored from an older copy; run `strata verify`"


def find_gaps(entries: Sequence[AliasEntry], releases: Sequence[int]) -> list[str]:
    """Breaches of the log's rules: numbers without gaps, each after the one before, each naming a release there is."""
    problems = []
    for seq, entry in enumerate(entries, start=1):
        if entry.seq != seq or entry.follows != seq - 1:
            problems.append(
                f"alias entry {seq} says that it is {entry.seq} after {entry.follows}, expected {seq} after {seq - 1}"
            )
        if entry.release not in releases:
            problems.append(f"alias entry {seq} names release {entry.release}, which does not exist")
    return problems
