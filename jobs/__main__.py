"""`strata`: every job as a subcommand; `python -m jobs` is the same."""

import typer

from jobs import backfill, gc, plan, redrive, report, rollback, run, search, status, upgrade, verify

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (run, redrive, upgrade, backfill, plan, status, report, search, verify, rollback, gc)
}
"""Modules of the subcommands by name, in the order of the help."""


def main() -> None:
    """Run `strata`."""
    app = typer.Typer(
        name="strata",
        help="From a document corpus to a published vector index, and current ever after.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    for name, module in COMMANDS.items():
        app.command(name)(module.command)
    app()


if __name__ == "__main__":
    main()
