"""Return to an earlier release.

Reads    alias and releases
Writes   one alias entry
Rerun    goes back one release further
Run      strata rollback conf/quickstart.yaml --to 1
"""

from typing import Annotated

import typer

from jobs._main import Conf, Overrides, finish, run_command

__all__ = ["command"]


def command(
    conf: Conf,
    to: Annotated[
        int | None, typer.Option(min=1, help="Release to return to; default: the one before.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
) -> None:
    """Return to an earlier release, at once."""

    def work() -> dict[str, object]:
        import uuid
        from datetime import UTC, datetime

        from pipeline.config import load_config
        from pipeline.release import rollback
        from pipeline.storage import open_store

        config = load_config(conf, tuple(overrides))
        store = open_store(config.root, config.storage)
        entry = rollback(store, to, now=datetime.now(UTC), token=uuid.uuid4().hex)
        return {"release": entry.release, "alias_entry": entry.seq}

    finish(work)


if __name__ == "__main__":
    run_command(command)
