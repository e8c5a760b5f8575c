"""Try again what the encoder had failed on, after a fix: a mended model, another library, more memory.

Reads    the corpus, the cache of vectors, queries and qrels of CONF
Writes   one log entry that forgets condemned texts; then what `strata run` writes
Holds    the lease of the root
Rerun    safe: a redrive that was stopped is gone on with
Run      strata redrive conf/quickstart.yaml --reason killed_worker
"""

from typing import Annotated

import typer

from jobs._main import Conf, Overrides, exit_code_of, finish, run_command

__all__ = ["command"]


def command(
    conf: Conf,
    reason: Annotated[
        list[str],
        typer.Option(
            help="Only texts condemned for this reason (encoder_error, out_of_memory, not_finite, zero_vector, "
            "killed_worker); may be repeated. Default: all."
        ),
    ] = [],  # noqa: B006  (typer reads the default, nobody changes it)
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
) -> None:
    """Try again what the encoder had failed on, publish, and say per reason what recovered.

    Rows that are bad in the corpus itself are not redriven: mend the corpus, any run reads it again.
    """

    def work() -> dict[str, object]:
        from jobs._show import show_redrive
        from pipeline.config import load_config
        from pipeline.execution.recording import recorded
        from pipeline.execution.redriving import redrive
        from pipeline.execution.runner import RayRunner
        from pipeline.execution.work import StoreSpec

        config = load_config(conf, tuple(overrides))
        spec = StoreSpec(config.root, config.storage)
        with recorded(config, exit_code_of) as under_way:
            summary = redrive(
                config, spec, lambda: RayRunner(spec, config.ray), reasons=reason, ledger=under_way.ledger
            )
            under_way.summary = summary
        show_redrive(config, summary)
        return summary

    finish(work)


if __name__ == "__main__":
    run_command(command)
