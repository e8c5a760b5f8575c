"""Releases: publish an index, move the alias, roll back, retire, collect, verify.

records.py     what is small and named by number: root.json, release records, the alias, plans
history.py     what the alias's entries mean: what is current, what was withdrawn, where to roll back to (pure)
publishing.py  moves of the alias: publish, roll back; and retirement
leases.py      the lease of the root: one job at a time changes it
collecting.py  finds what nothing names and deletes it; the only code that lists data of the root
removal.py     deletion that can be taken back until it is known that nobody else was at work
runs.py        records of runs, for people and alerts
verifying.py   reads back and hashes everything that a release names

Data first, manifest next, release record after it, alias last: whatever crashes in between, readers see the old release
or the new one.
"""

from pipeline.release.collecting import CollectReport, collect
from pipeline.release.history import History
from pipeline.release.leases import Lease, hold_root, is_held
from pipeline.release.publishing import publish, retire, rollback
from pipeline.release.records import (
    claim_root,
    describe,
    files_are_there,
    list_releases,
    live_plans,
    mark_plan_done,
    read_alias,
    read_history,
    read_manifest,
    read_plan,
    read_rejection,
    read_release,
    record_plan,
    record_rejection,
    unfinished_work,
    was_withdrawn,
    write_plan,
)
from pipeline.release.runs import read_runs, write_run
from pipeline.release.verifying import VerifyReport, verify

__all__ = [
    "CollectReport",
    "History",
    "Lease",
    "VerifyReport",
    "claim_root",
    "collect",
    "describe",
    "files_are_there",
    "hold_root",
    "is_held",
    "list_releases",
    "live_plans",
    "mark_plan_done",
    "publish",
    "read_alias",
    "read_history",
    "read_manifest",
    "read_plan",
    "read_rejection",
    "read_release",
    "read_runs",
    "record_plan",
    "record_rejection",
    "retire",
    "rollback",
    "unfinished_work",
    "verify",
    "was_withdrawn",
    "write_plan",
    "write_run",
]
