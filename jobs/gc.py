"""Delete what nothing names any more.

Reads    releases, aliases, plans, receipts; lists the root
Writes   retire markers; deletes files and aborts uploads after the grace period
Holds    the lease of the root, but for --dry-run
Rerun    safe
Run      strata gc conf/quickstart.yaml --dry-run
"""

from typing import Annotated

import typer

from jobs._main import Conf, Overrides, finish, run_command

__all__ = ["command"]


def command(
    conf: Conf,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
) -> None:
    """Delete what no kept release, cache or unfinished run names, after the grace period."""

    def work() -> dict[str, object]:
        from datetime import timedelta

        from pipeline.config import load_config
        from pipeline.release import collect
        from pipeline.storage import open_store

        config = load_config(conf, tuple(overrides))
        store = open_store(config.root, config.storage)
        grace = timedelta(hours=config.release.grace_hours)
        report = collect(store, grace=grace, keep=config.release.keep, dry_run=dry_run, lease=config.lease)
        return {
            "dry_run": dry_run,
            "retired": list(report.retired),
            "deleted": len(report.deleted),
            "bytes": report.bytes,
            "kept": report.kept,
            "uploads_aborted": report.aborted,
        }

    finish(work)


if __name__ == "__main__":
    run_command(command)
