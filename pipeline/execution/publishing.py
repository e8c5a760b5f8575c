"""From a judged index to a release: the gates of the configuration, the manifest, the alias."""

import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import structlog

from pipeline.artifacts import IndexManifest
from pipeline.errors import QualityGateError
from pipeline.evaluation.judging import check_gates
from pipeline.execution.current import Current
from pipeline.execution.session import Session
from pipeline.release import publish, record_rejection, was_withdrawn
from pipeline.storage import canonical_json, write_recorded

__all__ = ["publish_index"]


def publish_index(
    session: Session,
    manifest: IndexManifest,
    summary: dict[str, Any],
    current: Current | None,
) -> dict[str, Any]:
    """Hold an index against the gates, and make it the next release.

    Args:
        session: The job.
        manifest: The index.
        summary: What the job reports; `inputs` names all that determined the index, `made_of` where the release before did, too.
        current: What the job may follow.

    Returns:
        The summary with `release` and `published`: an index that was rolled back is not published again.

    Raises:
        QualityGateError: It is below the gates.
        PublishConflictError: Another job published meanwhile.
    """
    data = canonical_json(manifest.model_dump(mode="json"))
    ref = write_recorded(session.store, f"indexes/{manifest.index}/manifest.json", data)
    for name in ("recall_at_10", "ndcg_at_10"):
        if name in summary:
            session.ledger.metrics.record(f"strata_{name}", summary[name])
    summary = _through_gates(session, manifest.index, summary, current)
    started_at = current.alias if current is not None else None
    if was_withdrawn(session.store, manifest.index, inputs=str(summary.get("made_of", summary["inputs"]))):
        structlog.get_logger().warning("rolled_back_index_not_published_again", index=manifest.index)
        return {**summary, "release": started_at.release if started_at is not None else 0, "published": False}
    session.lease.check()
    record = publish(
        session.store,
        manifest,
        ref,
        summary,
        started_at=started_at,
        now=datetime.now(UTC),
        token=uuid.uuid4().hex,
    )
    session.ledger.metrics.record("strata_release", record.release)
    return {**summary, "release": record.release, "published": True}


def _through_gates(
    session: Session, index: str, summary: dict[str, Any], current: Current | None
) -> dict[str, Any]:
    """The summary with the gates and with what the job took."""
    before = int(str(current.record.summary.get("documents", 0))) if current is not None else 0
    gates = check_gates(session.config.gates, summary, removed=summary["removed"], documents_before=before)
    session.seconds["total"] = round(sum(session.seconds.values()), 3)
    summary = {**summary, **session.measured(), "gates": [asdict(gate) for gate in gates]}
    session.ledger.facts["judged"] = summary
    if not all(gate.passed for gate in gates):
        record_rejection(session.store, index, summary)
        problem = "not published: " + "; ".join(gate.problem for gate in gates if not gate.passed)
        raise QualityGateError(
            f"index {index}", problem, "the current release stays; change the index or the gates"
        )
    return summary
