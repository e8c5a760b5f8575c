"""Say what a run will read, write and cost, before it costs anything.

Reads    names, sizes and footers of the corpus; times the encoder on a few texts
Writes   plans/<fingerprint>.json
Rerun    safe
Run      strata plan conf/quickstart.yaml
"""

from jobs._main import Conf, Overrides, finish, run_command

__all__ = ["command"]


def command(conf: Conf, overrides: Overrides = []) -> None:  # noqa: B006  (typer reads the default, nobody changes it)
    """Say what a run will read, write and cost: rows, shards, bytes, memory, time."""

    def work() -> dict[str, object]:
        from jobs._show import show_pairs
        from pipeline.config import load_config
        from pipeline.execution.planning import plan_job

        summary = plan_job(load_config(conf, tuple(overrides)))
        show_pairs(summary)
        return summary

    finish(work)


if __name__ == "__main__":
    run_command(command)
