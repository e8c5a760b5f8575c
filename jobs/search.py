"""Answer a file of queries from the current release.

Reads    the current release, the queries
Writes   results: query_id, rank, doc_id, score, release
Rerun    safe: the results are replaced; a folder of them is finished where it was left
Run      strata search conf/quickstart.yaml --queries conf/quickstart/queries.parquet --out data/results.parquet
         strata search conf/quickstart.yaml --items --out data/neighbours/ --filter 'pos = {q.pos}'
"""

from typing import Annotated, Any

import typer

from jobs._main import Conf, Overrides, finish, run_command

__all__ = ["command"]

Rerank = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Candidates re-ranked; 0: codes only. Absent: the release's default, in proportion for k above ten.",
    ),
]
Cascade = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="While the release migrates: documents of a query that its encoder embeds, into its cache, and ranks.",
    ),
]
Admit = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --cascade: queries of the file, by their weight, that must find a document before it is embedded.",
    ),
]


def command(  # noqa: PLR0913, PLR0917  (the public contract's options)
    conf: Conf,
    out: Annotated[
        str,
        typer.Option(
            help="Parquet to write, local or s3://; a folder, if it ends with a slash, that the cluster fills."
        ),
    ],
    queries: Annotated[
        str | None,
        typer.Option(
            help="Parquet or JSONL: query_id, text or embedding, optional filter, in which {q.NAME} is the value of a column."
        ),
    ] = None,
    items: Annotated[
        bool,
        typer.Option("--items", help="Instead of queries: the neighbours of every document, into a folder."),
    ] = False,
    where: Annotated[
        str | None,
        typer.Option("--filter", help="With --items: WHERE text; {q.NAME} is the document's own value."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Documents per query.")] = 10,
    exact: Annotated[bool, typer.Option("--exact", help="Score every passing document.")] = False,
    rerank: Rerank = None,
    cascade: Cascade = None,
    admit: Admit = None,
    encoder: Annotated[
        str | None, typer.Option(help="Encoder of the queries; default: the one in force.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
) -> None:
    """Answer a file of queries from the current release."""
    _check_options(queries, out, where, rerank, encoder, items=items)
    _check_cascade(out, cascade, admit)

    def work() -> dict[str, object]:
        from pipeline.config import load_config
        from pipeline.execution.runner import RayRunner
        from pipeline.execution.searching import How, search_file, search_items

        config = load_config(conf, tuple(overrides))
        to: dict[str, Any] = {
            "out": out,
            "how": How(k, exact=exact, rerank=rerank, cascade=cascade, admit=admit or 0),
            "runner_of": lambda store: RayRunner(store, config.ray),
        }
        if queries is None:
            return search_items(config, where=where, **to)
        return search_file(config, queries=queries, encoder=encoder, **to)

    finish(work)


def _check_options(
    queries: str | None,
    out: str,
    where: str | None,
    rerank: int | None,
    encoder: str | None,
    *,
    items: bool,
) -> None:
    """Refuse options that say nothing together.

    Raises:
        typer.BadParameter: Which, and what to give instead.
    """
    if items == (queries is not None):
        raise typer.BadParameter("give either --queries or --items")
    if items and not out.endswith("/"):
        raise typer.BadParameter("with --items, --out is a folder: let it end with a slash")
    if items and (rerank is not None or encoder is not None):
        raise typer.BadParameter("--rerank and --encoder are of --queries")
    if not items and where is not None:
        raise typer.BadParameter("--filter is of --items; queries have a column `filter`")


def _check_cascade(out: str, cascade: int | None, admit: int | None) -> None:
    """Refuse options of a cascade where there is none.

    Raises:
        typer.BadParameter: Which, and what to give instead.
    """
    if cascade is not None and out.endswith("/"):
        raise typer.BadParameter("--cascade is of --queries into a file")
    if admit is not None and cascade is None:
        raise typer.BadParameter("--admit is of --cascade")


if __name__ == "__main__":
    run_command(command)
