"""Let queries of a new encoder search the vectors that are there.

Reads    the current release, queries and qrels of CONF
Writes   vectors of a sample of the documents, a bridge, an index, a release, a record of the run; moves the alias `current`
Holds    the lease of the root
Rerun    safe: finished work is skipped, and where the encoder is in force already it ends at once
Run      strata upgrade conf/quickstart.yaml --encoder mpnet
"""

from typing import Annotated

import typer

from jobs._main import Conf, Overrides, exit_code_of, finish, run_command

__all__ = ["command"]

Encoder = Annotated[str, typer.Option("--encoder", metavar="NEW", help="One of `encoders`: the new one.")]


def command(conf: Conf, encoder: Encoder, overrides: Overrides = []) -> None:  # noqa: B006  (typer reads the default, nobody changes it)
    """Train and judge a bridge from a new encoder to the vectors of the current release, and publish what serves both."""

    def work() -> dict[str, object]:
        from jobs._show import show_upgrade
        from pipeline.config import load_config
        from pipeline.execution.recording import recorded
        from pipeline.execution.runner import RayRunner
        from pipeline.execution.upgrading import upgrade
        from pipeline.execution.work import StoreSpec

        config = load_config(conf, tuple(overrides))
        spec = StoreSpec(config.root, config.storage)
        with recorded(config, exit_code_of) as under_way:
            runner_of = lambda: RayRunner(spec, config.ray)  # noqa: E731
            summary = upgrade(config, spec, runner_of, under_way.ledger, encoder=encoder)
            under_way.summary = summary
        show_upgrade(config, summary)
        return summary

    finish(work)


if __name__ == "__main__":
    run_command(command)
