"""Rankings and costs → the numbers of a release, and the gates that they must pass. Pure."""

from collections.abc import Mapping, Sequence

from pipeline.config import GatesConfig
from pipeline.measures import mean, ndcg_at_k, overlap_at_k, recall_at_k

__all__ = ["gate_failures", "judge_against_exact", "judge_against_qrels"]

Rankings = Mapping[str, Sequence[str]]
"""query_id → doc_ids, best first."""


def judge_against_exact(found: Rankings, exact: Rankings) -> dict[str, float]:
    """Recall 10@10 of the queries that have exact neighbours."""
    return {"recall_at_10": mean([overlap_at_k(found[query], exact[query], 10) for query in exact])}


def judge_against_qrels(
    found: Rankings, deep: Rankings, exact: Rankings, qrels: Mapping[str, Mapping[str, float]]
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
        "ndcg_at_10": mean([ndcg_at_k(found[q], qrels[q], 10) for q in judged]),
        "exact_ndcg_at_10": mean([ndcg_at_k(exact[q], qrels[q], 10) for q in judged]),
        "recall_at_100": mean([recall_at_k(deep[q], qrels[q], 100) for q in judged]),
        "exact_recall_at_100": mean([recall_at_k(exact[q], qrels[q], 100) for q in judged]),
    }


def gate_failures(
    gates: GatesConfig, measured: Mapping[str, float], *, removed: int, documents_before: int
) -> list[str]:
    """What keeps an index from being published; empty if nothing does.

    Args:
        gates: Thresholds; an absent one is not checked.
        measured: Numbers of `judge_against_exact` and `judge_against_qrels`.
        removed: Documents of the last release that are not in this one.
        documents_before: Documents of the last release.
    """
    failures = []
    for name, least in (("recall_at_10", gates.min_recall_at_10), ("ndcg_at_10", gates.min_ndcg_at_10)):
        if least is not None:
            failures += _too_low(name, measured, least)
    if gates.max_ndcg_loss is not None:
        failures += _too_low(
            "ndcg_at_10", measured, measured.get("exact_ndcg_at_10", 0.0) - gates.max_ndcg_loss
        )
    if gates.max_removed_fraction is not None and documents_before:
        share = removed / documents_before
        if share > gates.max_removed_fraction:
            failures.append(
                f"{removed} of {documents_before} documents were removed ({share:.1%}),"
                f" gates.max_removed_fraction allows {gates.max_removed_fraction:.1%}"
            )
    return failures


def _too_low(name: str, measured: Mapping[str, float], least: float) -> list[str]:
    if name not in measured:
        return [f"{name} must be at least {least:.4f} but was not measured (evaluation.qrels is not set)"]
    return (
        [] if measured[name] >= least else [f"{name} is {measured[name]:.4f}, must be at least {least:.4f}"]
    )
