"""Embed the next documents of a release that migrates with its new encoder, those first that gain most.

Reads    the current release, the caches of both encoders, past queries, queries and qrels of CONF
Writes   embeddings, partitions, tombstones, an index, a release, a record of the run; moves the alias `current`
Holds    the lease of the root
Rerun    safe: a backfill that died goes on with the same documents; one that had published embeds no more
Run      strata backfill conf/quickstart.yaml --budget 10%
"""

from typing import Annotated

import typer

from jobs._main import Conf, Overrides, exit_code_of, finish, run_command

__all__ = ["command"]

BudgetText = Annotated[
    str,
    typer.Option("--budget", metavar="FRACTION|DOCS", help="Documents to embed at most: 20000, 0.1 or 10%."),
]
To = Annotated[
    str,
    typer.Option(
        metavar="FRACTION|DOCS",
        help="Documents in the new space that are enough: a job that is repeated does no more than once.",
    ),
]
Watch = Annotated[
    bool, typer.Option("--watch", help="Tell what would move and what it would cost; embed nothing.")
]


def command(
    conf: Conf,
    budget: BudgetText = "100%",
    to: To = "100%",
    watch: Watch = False,
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
) -> None:
    """Embed the next documents with the new encoder, best first, and publish a release in which they are in its space."""

    def work() -> dict[str, object]:
        from jobs._show import show_backfill
        from pipeline.config import load_config
        from pipeline.execution.backfilling import Count, Reach, backfill
        from pipeline.execution.recording import recorded
        from pipeline.execution.runner import RayRunner
        from pipeline.execution.work import StoreSpec

        config = load_config(conf, tuple(overrides))
        reach = Reach(Count.parse("--budget", budget), Count.parse("--to", to))
        spec = StoreSpec(config.root, config.storage)
        with recorded(config, exit_code_of) as under_way:
            runner_of = lambda: RayRunner(spec, config.ray)  # noqa: E731
            summary = backfill(config, spec, runner_of, under_way.ledger, reach=reach, watch=watch)
            under_way.summary = summary
        show_backfill(config, summary)
        return summary

    finish(work)


if __name__ == "__main__":
    run_command(command)
