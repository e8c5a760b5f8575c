"""Say what is published, what came before it, what is unfinished, who holds the root, and how the last runs went.

Reads    alias, releases, plans, the lease, records of runs
Writes   nothing; with --metrics a file for Prometheus
Rerun    safe
Run      strata status conf/quickstart.yaml
         strata status CONF --workload last_week.parquet
"""

from pathlib import Path
from typing import Annotated

import typer

from jobs._main import Conf, Overrides, finish, run_command

__all__ = ["command"]

RUNS_READ, RUNS_SHOWN = 100, 10


def command(
    conf: Conf,
    metrics: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write figures for the node exporter's textfile collector."),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Parquet of past queries: how well the partitions serve these."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
) -> None:
    """Say what is published, what came before it, what is unfinished, who holds the root, and how the last runs went."""

    def work() -> dict[str, object]:
        from jobs._show import run_line, show_runs, show_status
        from pipeline.config import load_config
        from pipeline.release import describe, read_runs
        from pipeline.storage import open_store

        config = load_config(conf, tuple(overrides))
        store = open_store(config.root, config.storage)
        summary, runs = describe(store), read_runs(store, last=RUNS_READ)
        show_status(summary)
        show_runs(runs[-RUNS_SHOWN:])
        if metrics is not None:
            from pipeline.execution.textfile import write_textfile

            write_textfile(metrics, config, summary["release"], runs)
        if workload is not None:
            from jobs._show import show_drift
            from pipeline.execution.drifting import layout_drift

            summary["workload"] = layout_drift(config, workload)
            show_drift(summary["workload"])
        return {**summary, "runs": [run_line(record) for record in runs[-RUNS_SHOWN:]]}

    finish(work)


if __name__ == "__main__":
    run_command(command)
