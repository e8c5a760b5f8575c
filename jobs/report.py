"""Show one release as a page: what was built, how good it is, what it took.

Reads    the release (the current one, --release N, or the unpublished --index HASH), what came before it, dead letters
Writes   one HTML file: --out, or reports/ below the root
Rerun    safe: the page is replaced
Run      strata report conf/quickstart.yaml --out report.html
"""

from typing import Annotated

import typer

from jobs._main import Conf, Overrides, finish, run_command

__all__ = ["command"]


def command(
    conf: Conf,
    release: Annotated[
        int | None, typer.Option(min=1, help="Release to show; default: the current one.")
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Show an index that its gates kept from being published instead.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="HTML to write, local or s3://; default: reports/ below the root.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nobody changes it)
) -> None:
    """Write one self-contained HTML page: what was built, how good it is, what it took."""
    if release is not None and index is not None:
        raise typer.BadParameter("--index shows an unpublished index: give it, or --release, not both")

    def work() -> dict[str, object]:
        from jobs._show import show_pairs
        from pipeline.config import load_config
        from pipeline.reporting.stage import default_place, gather, gather_rejected, write_page
        from pipeline.storage import open_store

        config = load_config(conf, tuple(overrides))
        store = open_store(config.root, config.storage)
        figures = gather(store, config, release) if index is None else gather_rejected(store, config, index)
        place = out or default_place(figures)
        summary: dict[str, object] = {
            "release": figures.release,
            "index": figures.manifest.index,
            "gates_passed": figures.is_good,
            "bytes": write_page(figures, config, place),
            "out": place,
        }
        show_pairs(summary)
        return summary

    finish(work)


if __name__ == "__main__":
    run_command(command)
