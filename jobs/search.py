"""Answer a file of queries from the current release.

Reads    the current release, the queries
Writes   results: query_id, rank, doc_id, score, release
Rerun    safe: the results are replaced
Run      strata search conf/quickstart.yaml --queries conf/quickstart/queries.parquet --out data/results.parquet
"""

from typing import Annotated

import typer

from jobs._main import Conf, Overrides, finish, run_command

__all__ = ["command"]


def command(  # noqa: PLR0913, PLR0917  (the public contract's options)
    conf: Conf,
    queries: Annotated[
        str, typer.Option(help="Parquet or JSONL: query_id, text or embedding, optional filter.")
    ],
    out: Annotated[str, typer.Option(help="Parquet to write, local or s3://.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Documents per query.")] = 10,
    exact: Annotated[bool, typer.Option("--exact", help="Score every passing document.")] = False,
    rerank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Candidates re-ranked; 0: codes only. Absent: the release's default, in proportion for k above ten.",
        ),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Encoder of the queries; default: the one in force.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
) -> None:
    """Answer a file of queries from the current release."""

    def work() -> dict[str, object]:
        from pipeline.config import load_config
        from pipeline.execution.searching import search_file

        config = load_config(conf, tuple(overrides))
        return search_file(config, queries=queries, out=out, k=k, exact=exact, rerank=rerank, encoder=encoder)

    finish(work)


if __name__ == "__main__":
    run_command(command)
