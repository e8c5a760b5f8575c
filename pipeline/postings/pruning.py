"""Which posting lists a query probes (SPANN, arXiv 2111.08566, section 3.3 and Eq. 3), and what that costs and finds. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MOST_MARGIN",
    "WANTED",
    "Probing",
    "Scanned",
    "Setting",
    "choose_setting",
    "frontier",
    "head_distances",
    "nearest_heads",
    "rules_for",
    "select_lists",
    "settings_of",
]


MOST_MARGIN = 4.0
"""No two vectors of unit length are farther apart, in squared L2."""
WANTED = 10
"""True neighbours that a search is asked for: of codes alone it returns so many, whatever it re-ranks."""


@dataclass(frozen=True)
class Probing:
    """Which lists a query probes.

    SPANN's rule is d(q, c) ≤ (1 + ε)·d(q, c₁) in squared L2. Here what the nearest head allows is added instead: the
    further a query is from all heads, the fewer lists a ratio leaves out. *Measured* on 97,000 summaries, entries
    scanned to hold .95 and .99 of the true ten: a fixed number of lists 8,300 and 28,000; a ratio 9,600 and 29,100,
    with a maximum 6,800 and 23,400; a margin 6,800 and 23,000, with a maximum 6,500 and 21,500.
    """

    lists: int
    """Most lists."""
    margin: float
    """By how much the squared L2 distance to a list's head may exceed that to the nearest head."""


def head_distances(
    queries: NDArray[np.float32], heads: NDArray[np.float32], squares: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Squared L2 distances of queries to heads; SPANN's rules are on squared distances.

    Args:
        queries: (q, d) float32.
        heads: (l, d) float32.
        squares: (l,) squared lengths of the heads.

    Returns:
        (q, l).
    """
    return np.einsum("qd,qd->q", queries, queries)[:, None] + squares - 2.0 * (queries @ heads.T)


def nearest_heads(
    distances: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest heads of each query; lower numbers go first among equals, as where a list of copies of one text was split.

    Args:
        distances: (q, l) float32 squared distances.
        count: In [1, l].

    Returns:
        (q, count) int64 numbers and (q, count) float32 distances, nearest first.
    """
    near = np.argpartition(distances, count - 1, axis=1)[:, :count]
    apart = np.take_along_axis(distances, near, axis=1)
    # Of equals on both sides of the border, partitioning takes any.
    unsure = np.flatnonzero((distances <= apart.max(axis=1, keepdims=True)).sum(axis=1) > count)
    near[unsure] = np.argsort(distances[unsure], axis=1, kind="stable")[:, :count]
    apart[unsure] = np.take_along_axis(distances[unsure], near[unsure], axis=1)
    order = np.lexsort((near, apart), axis=1)
    return np.take_along_axis(near, order, axis=1), np.take_along_axis(apart, order, axis=1)


def select_lists(
    distances: NDArray[np.float32],
    probing: Probing,
    passing: NDArray[np.int64] | None = None,
    *,
    min_rows: int = 0,
) -> NDArray[np.int64]:
    """Posting lists that one query probes, nearest first, at least one where there is one.

    Lists without a passing row are left out, so that a filter spends no probe on them; more lists than the rule allows are
    taken where those hold fewer than `min_rows` passing rows.

    Args:
        distances: (l,) squared distances of the query to the heads.
        probing: The rule.
        passing: (l,) rows of each list that pass the filter; None: all of them do, and every list has one.
        min_rows: Passing rows that the probed lists must hold, if that many exist.
    """
    if passing is None:
        return _nearest(distances, probing)
    alive = np.flatnonzero(passing > 0)
    order = alive[np.argsort(distances[alive], kind="stable")]
    within = len(_nearest(distances[order], probing)) if len(order) else 0
    enough = int(np.searchsorted(np.cumsum(passing[order]), min_rows)) + 1
    return order[: max(within, enough)]


def _nearest(distances: NDArray[np.float32], probing: Probing) -> NDArray[np.int64]:
    count = min(probing.lists, len(distances))
    if count < len(distances):
        border = np.partition(distances, count - 1)[count - 1]
        border = min(border, distances.min() + probing.margin)
    else:
        border = distances.min() + probing.margin
    near = np.flatnonzero(distances <= border)
    return near[np.argsort(distances[near], kind="stable")][:count]


# ------------------------------------------------------------------------------------------------ tuning


@dataclass(frozen=True)
class Scanned:
    """What one query met on its way through its nearest lists, far enough to tell what any smaller setting would find."""

    margin: NDArray[np.float32]
    """(p,) of each list, nearest first: how much farther its head is than the nearest head, in squared L2."""
    entries: NDArray[np.int64]
    """(p,) entries of each list, replicas counted."""
    first_seen: NDArray[np.int32]
    """(n,) place of the first list that held it, of each vector met, best code first."""
    wanted: NDArray[np.int64]
    """(w,) places of true neighbours, and of what is as near, among the vectors met."""
    enough: int
    """How many of them a search should find."""


@dataclass(frozen=True)
class Setting:
    """A rule, a depth, and what they found and cost per tuning query."""

    probing: Probing
    rerank: int
    """Candidates scored again with float16 vectors."""
    recall: float
    """Share of the true neighbours found."""
    error: float
    """Standard error of the recall, over queries."""
    lists: float
    """Lists probed."""
    bytes: float
    """Bytes of lists and of vectors scored again."""

    @property
    def sure_recall(self) -> float:
        """The recall less its standard error."""
        return self.recall - self.error


def settings_of(
    scanned: Sequence[Scanned],
    rules: Iterable[Probing],
    depths: Sequence[int],
    *,
    entry_bytes: int,
    vector_bytes: int,
) -> list[Setting]:
    """What every rule finds and costs at every depth.

    Args:
        scanned: One for each tuning query.
        rules: None of which probes more lists than were scanned.
        depths: Re-rank depths, rising.
        entry_bytes: Of one entry of a list.
        vector_bytes: Of one vector that is scored again.

    Returns:
        One for each rule and depth.
    """
    found = []
    enough = np.array([one.enough for one in scanned])
    query_of = np.repeat(np.arange(len(scanned)), [len(one.wanted) for one in scanned])
    sums = [np.cumsum(np.concatenate([[0], one.entries])) for one in scanned]
    ranks_of = [cache(partial(_ranks, one)) for one in scanned]
    for rule in rules:
        probed = [_probed(one.margin, rule) for one in scanned]
        ranks = np.concatenate([of(count) for of, count in zip(ranks_of, probed, strict=True)])
        entries = np.mean([own[count] for own, count in zip(sums, probed, strict=True)])
        lists = float(np.mean(probed))
        for depth in depths:
            met = np.bincount(query_of[ranks < max(depth, WANTED)], minlength=len(scanned))
            shares = np.minimum(1.0, met / enough)
            error = float(shares.std() / np.sqrt(len(shares)))
            size = float(entries * entry_bytes + depth * vector_bytes)
            found.append(Setting(rule, depth, float(shares.mean()), error, lists, size))
    return found


def choose_setting(settings: Sequence[Setting], target_recall: float) -> Setting:
    """The setting that reads least of those whose recall less its standard error reaches the target; else the best one.

    Args:
        settings: At least one.
        target_recall: In (0, 1].
    """
    enough = [one for one in settings if one.sure_recall >= target_recall]
    if enough:
        return min(enough, key=lambda one: (one.bytes, -one.sure_recall))
    return max(settings, key=lambda one: (one.sure_recall, -one.bytes))


def frontier(settings: Sequence[Setting]) -> list[Setting]:
    """Settings than which none surely finds more for as few bytes, by rising bytes; `choose_setting` names one of them."""
    best: list[Setting] = []
    for one in sorted(settings, key=lambda one: (one.bytes, -one.sure_recall)):
        if not best or one.sure_recall > best[-1].sure_recall:
            best.append(one)
    return best


def rules_for(scanned: Sequence[Scanned], *, steps: int = 10) -> list[Probing]:
    """Rules worth trying: maxima up to the lists scanned, margins that leave a few to all of the true neighbours' lists.

    Args:
        scanned: One for each tuning query.
        steps: Of either.
    """
    most = max(len(one.margin) for one in scanned)
    maxima = sorted({max(1, round(most * 2.0 ** (-step / 1.5))) for step in range(steps)})
    needed = np.concatenate([one.margin[one.first_seen[one.wanted]] for one in scanned])
    if not len(needed):
        return [Probing(most, MOST_MARGIN)]
    shares = 1 - 0.5 ** np.arange(1, steps)
    margins = [*np.unique(np.quantile(needed, shares)).tolist(), MOST_MARGIN]
    return [Probing(lists, margin) for lists, margin in product(maxima, margins)]


def _probed(margin: NDArray[np.float32], rule: Probing) -> int:
    return min(rule.lists, int((margin <= rule.margin).sum()))


def _ranks(one: Scanned, probed: int) -> NDArray[np.float64]:
    """(w,) how many vectors of the probed lists have a better code than each wanted one; infinite where it is in none."""
    seen = one.first_seen < probed
    place = np.cumsum(seen) - 1
    return np.where(seen[one.wanted], place[one.wanted], np.inf)
