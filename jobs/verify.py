"""Re-hash everything that a release names.

Reads    the current release (or --release N) and every file of it
Writes   nothing
Rerun    safe
Run      strata verify conf/quickstart.yaml
"""

from typing import Annotated

import typer

from jobs._main import Conf, Overrides, finish, run_command

__all__ = ["command"]


def command(
    conf: Conf,
    release: Annotated[
        int | None, typer.Option(min=1, help="Release to verify; default: the current one.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
) -> None:
    """Re-hash everything that a release names; a damaged or missing file ends with exit 65."""

    def work() -> dict[str, object]:
        from pipeline.config import load_config
        from pipeline.errors import CorruptArtifactError
        from pipeline.release import read_release, verify
        from pipeline.storage import open_store

        config = load_config(conf, tuple(overrides))
        store = open_store(config.root, config.storage)
        report = verify(store, read_release(store, release) if release is not None else None)
        if report.problems:
            shown = "; ".join(report.problems[:10])
            problem = f"{len(report.problems)} problems: {shown}"
            raise CorruptArtifactError(
                config.root, problem, "`strata rollback`, or `strata run` to build what is missing again"
            )
        return {"files": report.files, "bytes": report.bytes, "problems": []}

    finish(work)


if __name__ == "__main__":
    run_command(command)
