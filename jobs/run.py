"""Take the corpus to a published release.

Reads    the corpus, queries and qrels of CONF
Writes   documents, embeddings, partitions, an index, a release, a record of the run; moves the alias `current`
Holds    the lease of the root
Rerun    safe: finished work is skipped, unchanged input ends at once
Run      strata run conf/quickstart.yaml
"""

from jobs._main import Conf, Overrides, exit_code_of, finish, run_command

__all__ = ["command"]


def command(conf: Conf, overrides: Overrides = []) -> None:  # noqa: B006  (typer reads the default, nobody changes it)
    """Take the corpus to a published release: plan, embed, binarize, build, judge, publish."""

    def work() -> dict[str, object]:
        import structlog

        from jobs._show import show_run
        from pipeline.config import load_config
        from pipeline.errors import PipelineError
        from pipeline.execution.flows import run
        from pipeline.execution.recording import recorded
        from pipeline.execution.runner import RayRunner
        from pipeline.execution.work import StoreSpec

        config = load_config(conf, tuple(overrides))
        spec = StoreSpec(config.root, config.storage)
        with recorded(config, exit_code_of) as under_way:
            summary = run(config, spec, lambda: RayRunner(spec, config.ray), under_way.ledger)
            under_way.summary = summary
        try:
            show_run(config, summary)
        except PipelineError as error:
            structlog.get_logger().warning("examples_not_shown", message=str(error))
        return summary

    finish(work)


if __name__ == "__main__":
    run_command(command)
