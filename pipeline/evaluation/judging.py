"""Rankings and costs → the numbers of a release, and the gates that they must pass. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.artifacts import SearchDefaults, SearchPoint
from pipeline.config import GatesConfig
from pipeline.measures import mean, ndcg_at_k, overlap_at_k, recall_at_k

__all__ = [
    "NEIGHBOURS",
    "TUNING_QUERIES",
    "GateResult",
    "check_gates",
    "curve_points",
    "judge_against_exact",
    "judge_against_qrels",
]

TUNING_QUERIES = 500
"""Queries on which it is chosen how far a search looks: not those that are reported, unless there are no others."""
NEIGHBOURS = 100
"""Depth of the exact rankings: recall@100 needs it."""

Rankings = Mapping[str, Mapping[str, float]]
"""query_id → doc_id → score, best first."""


def judge_against_exact(found: Rankings, exact: Rankings) -> dict[str, float]:
    """Recall 10@10 of the queries that have exact neighbours."""
    return {"recall_at_10": mean([overlap_at_k(found[query], exact[query], 10) for query in exact])}


def judge_against_qrels(
    found: Rankings,
    deep: Rankings,
    exact: Rankings,
    qrels: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """nDCG@10 and recall@100 of the index beside those of exact search, over the judged queries.

    Args:
        found: Rankings of the index to depth 10, as users get them.
        deep: Rankings of the index to depth 100.
        exact: Rankings of exact float32 search, to depth 100.
        qrels: Judgments of each query.
    """
    judged = sorted(query for query in qrels if query in found)
    return {
        "judged_queries": float(len(judged)),
        "ndcg_at_10": mean([ndcg_at_k(list(found[q]), qrels[q], 10) for q in judged]),
        "exact_ndcg_at_10": mean([ndcg_at_k(list(exact[q]), qrels[q], 10) for q in judged]),
        "recall_at_100": mean([recall_at_k(list(deep[q]), qrels[q], 100) for q in judged]),
        "exact_recall_at_100": mean([recall_at_k(list(exact[q]), qrels[q], 100) for q in judged]),
    }


CURVE_STEPS = 4
"""Settings on either side of the default at which a recall curve is measured."""


def curve_points(search: SearchDefaults) -> list[SearchPoint]:
    """Settings at which recall and costs are measured: the default, and some that find less or more on the tuning queries.

    Args:
        search: Of the release.

    Returns:
        By rising bytes, at most 2 * CURVE_STEPS + 1.
    """
    default = SearchPoint.model_validate(search.model_dump(exclude={"curve"}))
    below = [one for one in search.curve if (one.bytes or 0) < (default.bytes or 0)]
    above = [one for one in search.curve if (one.bytes or 0) > (default.bytes or 0)]
    return [*_spread(below), default, *_spread(above)]


def _spread(points: Sequence[SearchPoint]) -> list[SearchPoint]:
    count = min(CURVE_STEPS, len(points))
    return [points[(i + 1) * len(points) // count - 1] for i in range(count)]


@dataclass(frozen=True)
class GateResult:
    """One configured gate, held against what was measured."""

    gate: str
    """Name of its setting, below `gates.`."""
    threshold: float
    measured: float | None
    """None where what it asks for was not measured."""
    passed: bool
    problem: str
    """What to say of a gate that was not passed; empty otherwise."""


def check_gates(
    gates: GatesConfig, measured: Mapping[str, float], *, removed: int, documents_before: int
) -> list[GateResult]:
    """Hold an index against every configured gate.

    Args:
        gates: Thresholds; an absent one is not checked.
        measured: Numbers of `judge_against_exact` and `judge_against_qrels`.
        removed: Documents of the last release that are not in this one.
        documents_before: Documents of the last release.
    """
    results = []
    for name, least in (("recall_at_10", gates.min_recall_at_10), ("ndcg_at_10", gates.min_ndcg_at_10)):
        if least is not None:
            problem = _too_low(name, measured, least)
            results.append(GateResult(f"min_{name}", least, measured.get(name), not problem, problem))
    if gates.max_ndcg_loss is not None:
        results.append(_ndcg_loss(measured, gates.max_ndcg_loss))
    if gates.max_removed_fraction is not None:
        results.append(_removed_fraction(removed, documents_before, gates.max_removed_fraction))
    return results


def _ndcg_loss(measured: Mapping[str, float], most: float) -> GateResult:
    exact = measured.get("exact_ndcg_at_10", 0.0)
    problem = _too_low("ndcg_at_10", measured, exact - most)
    loss = exact - measured["ndcg_at_10"] if "ndcg_at_10" in measured else None
    return GateResult("max_ndcg_loss", most, loss, not problem, problem)


def _removed_fraction(removed: int, documents_before: int, most: float) -> GateResult:
    share = removed / documents_before if documents_before else 0.0
    problem = (
        f"{removed} of {documents_before} documents were removed ({share:.1%}),"
        f" gates.max_removed_fraction allows {most:.1%}"
    )
    return GateResult("max_removed_fraction", most, share, share <= most, problem if share > most else "")


def _too_low(name: str, measured: Mapping[str, float], least: float) -> str:
    if name not in measured:
        return f"{name} must be at least {least:.4f} but was not measured (evaluation.qrels is not set)"
    return "" if measured[name] >= least else f"{name} is {measured[name]:.4f}, must be at least {least:.4f}"
