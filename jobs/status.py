"""Say what is published, what came before it, what is unfinished, and who holds the root.

Reads    alias, releases, plans, the lease
Writes   nothing
Rerun    safe
Run      strata status conf/quickstart.yaml
"""

from jobs._main import Conf, Overrides, finish, run_command

__all__ = ["command"]


def command(conf: Conf, overrides: Overrides = []) -> None:  # noqa: B006  (typer reads the default, nobody changes it)
    """Say what is published, what came before it, what is unfinished, and who holds the root."""

    def work() -> dict[str, object]:
        from jobs._show import show_pairs
        from pipeline.config import load_config
        from pipeline.release import describe
        from pipeline.storage import open_store

        config = load_config(conf, tuple(overrides))
        summary = describe(open_store(config.root, config.storage))
        show_pairs(summary)
        return summary

    finish(work)


if __name__ == "__main__":
    run_command(command)
