"""Train every bridge, choose one for queries held out from that, and learn how its scores compare.

Documents stand in for queries where there are none to spare. They lie nearer to what they want than texts of people do, so that
scores learned from them do not compare for those. What is searched are texts that no bridge was trained on, and of those that it
was trained on as many in proportion as the index holds: among these alone, the bridge that fits them best would look best.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.spaces.bridges import Bridge, slerp
from pipeline.spaces.calibration import Calibration, Cohort, calibrate
from pipeline.upgrade.closed import ANCHORS, Anchors, fit_drift, fit_procrustes, fit_ridge, pick_anchors
from pipeline.upgrade.exam import Exam, Pairs
from pipeline.upgrade.ranking import scores_of

__all__ = ["Choice", "choose", "held_out_exam", "simplest_of_the_best"]

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Of the ridge."""
SHARES = tuple(round(0.1 * step, 1) for step in range(1, 10))
"""Of the bridged query in SLERP."""
MEAN_SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the old mean that is added back to what Procrustes turned."""
COHORT = 2000
"""Texts that what a query scores is held against. *Measured*, 29,000 summaries, a tenth migrated, share of the new ones in
the first ten (.101 is due) and overlap: GloVe to MiniLM none .357, .087; 500 .139, .119; 1,000 .124, .123; 2,000 .110, .124;
MiniLM to mpnet none .106, .496; 500 .117, .490; 1,000 .107, .495; 2,000 .104, .496."""
QUERIES = 1000
"""Held-out texts that stand in for queries, half of all at most: the others are there for who reports."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Bridges, the best of them, and what goes with it."""

    bridges: dict[str, Bridge]
    recall: dict[str, float]
    """overlap@10 for held-out queries, by name."""
    chosen: str
    """The simplest of those that find as much as the best, within a standard error."""
    share: float
    """Of the bridged query in SLERP with the old one."""
    anchors: Anchors
    calibration: Calibration

    @property
    def bridge(self) -> Bridge:
        """The best one."""
        return self.bridges[self.chosen]


def choose(fit: Pairs, held_out: Pairs, *, corpus: int, seed: int, queries: Pairs | None = None) -> Choice:
    """Train on some texts, choose and calibrate on others.

    Args:
        fit: Texts to train on, in any order that says nothing of them.
        held_out: Other texts, in such an order.
        corpus: Texts that the index holds, those of `fit` among them.
        seed: Of every random choice.
        queries: At least two queries that nothing is reported on; None: the first held-out texts stand in for them.

    Raises:
        ValueError: There are fewer than two queries, or texts to look for.
    """
    exam = held_out_exam(fit, held_out, corpus, queries)
    rows = np.arange(len(exam.own))
    # One half chooses, the other one calibrates: scores of what was chosen are higher where it was.
    judge, gauge = exam.of(rows[::2]), exam.of(rows[1::2])
    bridges = _trained(fit, judge, seed)
    overlaps = {name: _overlaps(judge, one.apply(judge.new_queries)) for name, one in bridges.items()}
    chosen = simplest_of_the_best(overlaps)
    bridged = bridges[chosen].apply(judge.new_queries)
    shares = {share: _overlap(judge, slerp(judge.old_queries, bridged, share)) for share in SHARES}
    anchors = pick_anchors(fit.new, fit.old, ANCHORS, np.random.default_rng(seed))
    return Choice(
        bridges=bridges,
        recall={name: float(found.mean()) for name, found in overlaps.items()},
        chosen=chosen,
        share=max(shares, key=lambda share: shares[share]),
        anchors=anchors,
        calibration=_calibrated(gauge, bridges[chosen], Cohort(fit.new[:COHORT], fit.old[:COHORT])),
    )


def held_out_exam(fit: Pairs, held_out: Pairs, corpus: int, queries: Pairs | None = None) -> Exam:
    """What bridges and heads are chosen by; arguments and errors as `choose`."""
    stand_ins = min(QUERIES, len(held_out) // 2)
    seen = round(len(held_out) * len(fit) / max(1, corpus - len(fit)))
    old, new = (
        np.concatenate(pair) for pair in ((held_out.old, fit.old[:seen]), (held_out.new, fit.new[:seen]))
    )
    asked = queries if queries is not None else Pairs(held_out.new[:stand_ins], held_out.old[:stand_ins])
    own = np.full(len(asked), -1) if queries is not None else np.arange(len(asked))
    if len(asked) < 2 or len(old) < 2:  # noqa: PLR2004
        raise ValueError(f"expected two queries and texts to look for, found {len(asked)} and {len(old)}")
    return Exam(old, new, asked.old, asked.new, own)


def _trained(fit: Pairs, exam: Exam, seed: int) -> dict[str, Bridge]:
    """Bridges by name, the simplest first."""
    # Torch, which no other job than an upgrade needs for this.
    from pipeline.upgrade.tuning import regress_residual, tune_bridge, with_residual

    def recall(bridge: Bridge) -> float:
        return _recall(exam, bridge)

    def best(bridges: list[Bridge]) -> Bridge:
        return max(bridges, key=recall)

    procrustes = fit_procrustes(fit.new, fit.old)
    start = best([procrustes.with_mean(share) for share in MEAN_SHARES])
    layered = with_residual(start, np.random.default_rng(seed))
    found = {"drift": fit_drift(fit.new, fit.old)} if fit.new.shape[1] == fit.old.shape[1] else {}
    return found | {
        "procrustes": procrustes,
        "ridge": best([fit_ridge(fit.new, fit.old, strength) for strength in STRENGTHS]),
        "tuned": tune_bridge(start, fit.new, fit.old, recall=recall, seed=seed)[0],
        "residual": regress_residual(layered, fit.new, fit.old, recall=recall, seed=seed)[0],
        "tuned with a layer": tune_bridge(layered, fit.new, fit.old, recall=recall, seed=seed)[0],
    }


def simplest_of_the_best(figures: Mapping[str, NDArray[np.float64]]) -> str:
    """The first name whose figures (q,) are below the best ones by no more than a standard error of their differences.

    Source: the rule of one standard error, Breiman, Friedman, Olshen and Stone, "Classification and Regression Trees", 1984.
    """
    best = figures[max(figures, key=lambda name: figures[name].mean())]
    lost = {name: best - found for name, found in figures.items()}
    return next(name for name, one in lost.items() if one.mean() <= one.std() / math.sqrt(len(one)))


def _overlaps(exam: Exam, queries: NDArray[np.float32]) -> NDArray[np.float64]:
    return exam.overlap(exam.find(queries, exam.old))


def _overlap(exam: Exam, queries: NDArray[np.float32]) -> float:
    return float(_overlaps(exam, queries).mean())


def _recall(exam: Exam, bridge: Bridge) -> float:
    return _overlap(exam, bridge.apply(exam.new_queries))


def _calibrated(exam: Exam, bridge: Bridge, cohort: Cohort) -> Calibration:
    crossed = bridge.apply(exam.new_queries)
    return calibrate(
        scores_of(crossed, exam.old, exam.find(crossed, exam.old)),
        scores_of(exam.new_queries, exam.new, exam.wanted),
        queries=exam.new_queries,
        crossed=crossed,
        cohort=cohort,
    )
