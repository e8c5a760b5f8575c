"""What a person sees at the end of a run: tables and example searches, on stderr."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.artifacts import Refresh, RunRecord
from pipeline.config import Config
from pipeline.reporting.wording import refresh_text

__all__ = [
    "run_line",
    "show_backfill",
    "show_drift",
    "show_pairs",
    "show_redrive",
    "show_run",
    "show_runs",
    "show_status",
    "show_upgrade",
]

SHOWN_CHARS = 110
LADDER_METRICS = ("ndcg_at_10", "recall_at_100", "overlap_at_10")


def show_run(config: Config, summary: Mapping[str, Any]) -> None:
    """Print what was built, how good it is, what it took, and the configured example searches."""
    console = Console(stderr=True, highlight=False)
    console.print(_heading(config, summary))
    console.print(_figures(summary))
    if config.evaluation.examples:
        _show_examples(console, config)


def show_upgrade(config: Config, summary: Mapping[str, Any]) -> None:
    """Print the ladder: what each way to answer new queries finds beside the status quo, and what it costs."""
    console = Console(stderr=True, highlight=False)
    console.print(_heading(config, summary))
    ladder = summary.get("upgrade")
    if ladder is not None:
        console.print(_ladder(ladder, config.report.currency))
        console.print(_figures(summary))


def show_backfill(config: Config, summary: Mapping[str, Any]) -> None:
    """Print what moved into the new space, or what would."""
    if summary.get("watched"):
        show_pairs({name: value for name, value in summary.items() if name not in ("watched", "currency")})
        return
    console = Console(stderr=True, highlight=False)
    console.print(_heading(config, summary))
    if not summary.get("skipped"):
        console.print(
            f"{summary['documents_moved']:,} documents moved, {summary['documents_embedded']:,} embedded; "
            f"{summary['fraction_new']:.1%} are in the space of {summary['encoder']}"
        )
        console.print(_figures(summary))


def _ladder(ladder: Mapping[str, Any], currency: str) -> Table:
    metrics = [name for name in LADDER_METRICS if name in ladder["rungs"][0]]
    title = f"{ladder['queries']:,} queries, {ladder['documents']:,} documents; queries go by `{ladder['chosen']}`"
    table = Table(title=title, box=None)
    table.add_column("rung", no_wrap=True)
    for name in (*metrics, "to status quo", "share of the gain", "embedded", "seconds", currency):
        table.add_column(name, justify="right")
    by = ladder["judged_by"]
    for rung in ladder["rungs"]:
        found = rung[by]
        kept = found["share_kept"]
        cells = [
            *(f"{rung[name]['value']:.3f}" for name in metrics),
            _interval_text(found["gain"]),
            "" if kept is None else f"{kept[0]:.2f}",
            f"{rung['documents_embedded']:,}",
            *("" if rung[name] is None else f"{rung[name]:,g}" for name in ("seconds", "cost")),
        ]
        style = "bold" if rung["name"] == ladder["chosen"] else None
        table.add_row(escape(rung["name"]), *cells, style=style)
    return table


def _interval_text(interval: Sequence[float]) -> str:
    value, low, high = interval
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def show_redrive(config: Config, summary: Mapping[str, Any]) -> None:
    """Print what became of the texts that were tried again, and which rows only the owner of the corpus can mend."""
    console = Console(stderr=True, highlight=False)
    console.print(_heading(config, summary))
    table = Table("reason", "dead", "recovered", "dead again", "not in the corpus", title="texts tried again")
    for reason, found in summary["redriven"].items():
        table.add_row(reason, *(f"{number:,}" for number in found.values()))
    console.print(table if summary["redriven"] else "No text was condemned: there is nothing to redrive.")
    if summary["bad_in_source"]:
        rows = ", ".join(
            f"{count:,} x {escape(reason)}" for reason, count in summary["bad_in_source"].items()
        )
        console.print(f"Bad in the corpus itself, and to be mended there (see dead_letter_files): {rows}")


def _heading(config: Config, summary: Mapping[str, Any]) -> str:
    if summary.get("skipped"):
        text = f"release {summary['release']} at {escape(config.root)} is current; all work was skipped."
        return f"\n[bold]Nothing changed[/bold]: {text}"
    if not summary.get("published"):
        return "\n[bold yellow]Not published[/bold yellow]: this index was rolled back; `strata rollback --to N` returns."
    return f"\n[bold green]Published release {summary['release']}[/bold green] at {escape(config.root)}"


def _figures(summary: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _rows(summary):
        table.add_row(name, escape(text))
    return table


def _binarizer_text(b: Mapping[str, Any]) -> str:
    tried = ", ".join(f"{method} {recall:.4f}" for method, recall in b["held_out_recall"].items())
    parts = [b["method"], f"recall@10 by codes alone, held-out queries: {tried}" if tried else ""]
    if b.get("refresh"):
        parts.append(refresh_text(Refresh.model_validate(b["refresh"])))
    return "; ".join(filter(None, parts))


def _rows(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (
            "documents",
            f"{s['documents']:,} ({s['added']:,} added, {s['changed']:,} changed, {s['removed']:,} removed)",
        ),
        ("encoded", f"{s['encoded']:,} texts with {s['encoder']}"),
        ("dead letters", _letters_text(s)),
        ("codes", f"{s['code_bytes']} bytes per vector, levels {s['levels']}"),
        ("binarizer", _binarizer_text(s["binarizer"])),
        (
            "posting lists",
            _lists_text(s),
        ),
        (
            "bytes per document",
            _bytes_text(s),
        ),
        ("recall@10", f"{s['recall_at_10']:.4f} of exact float32 search"),
    ]
    if "ndcg_at_10" in s:
        rows.append(("nDCG@10", f"{s['ndcg_at_10']:.4f}, exact float32 {s['exact_ndcg_at_10']:.4f}"))
        rows.append(
            (
                "recall@100",
                f"{s['recall_at_100']:.4f}, exact float32 {s['exact_recall_at_100']:.4f} (judged documents)",
            )
        )
    rows.append(
        (
            "one query",
            _query_text(s),
        )
    )
    rows.append(("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in s["seconds"].items())))
    if "tasks" in s and not s.get("skipped"):
        rows.append(("tasks", f"{s['tasks']} ({s['tasks_reused']} done before and skipped)"))
    return rows


def _letters_text(s: Mapping[str, Any]) -> str:
    reasons = "; ".join(
        f"{count:,} x {reason}" for reason, count in s.get("dead_letters_by_reason", {}).items()
    )
    return f"{s['dead_letters']:,}" + (f": {reasons}" if reasons else "")


def _lists_text(s: Mapping[str, Any]) -> str:
    query = f"a query probes {s['lists_per_query']:.1f}, re-ranks {s['rerank']}"
    return f"{s['lists']:,} (CV {s['list_rows_cv']}); {query}; a server holds {s['server_memory_mb']:,} MB"


def _bytes_text(s: Mapping[str, Any]) -> str:
    stored = (
        f"{s['index_bytes_per_document']:,} scanned, {s['vectors_bytes_per_document']:,} re-rank and filters"
    )
    return f"{stored}; float32 alone {s['float32_bytes_per_document']:,}"


def _query_text(s: Mapping[str, Any]) -> str:
    times = f"p50 {s['p50_ms']:.1f} ms, p95 {s['p95_ms']:.1f} ms"
    return f"{times}; {s['bytes_per_query'] / 1024:,.0f} KiB read, {s['scanned_fraction']:.1%} of the rows scanned"


def _show_examples(console: Console, config: Config) -> None:
    from pipeline.execution.searching import example_searches

    for example in example_searches(config):
        condition = f"  [dim]where {escape(example.filter)}[/dim]" if example.filter else ""
        console.print(f"\n[bold]“{escape(example.text)}”[/bold]{condition}")
        for hit, text in example.hits:
            shown = text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"
            console.print(f"  {hit.score:.3f}  {hit.doc_id}  {shown}", markup=False)


def show_pairs(pairs: Mapping[str, Any]) -> None:
    """Print names and values."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in pairs.items():
        table.add_row(name, _value_text(value))
    Console(stderr=True, highlight=False).print(table)


def show_status(summary: Mapping[str, Any]) -> None:
    """Print what is published and who holds the root."""
    lease = summary["lease"]
    holder = "nobody"
    if lease is not None:
        who = f"strata {lease['job']}, pid {lease['pid']} on {lease['host']}, since {lease['since']}"
        holder = f"{who}; last beat {lease['last_beat'] or 'none'}"
    show_pairs(
        {name: summary[name] for name in ("root", "release", "index", "documents", "created")}
        | {"held by": holder, "unfinished plans": len(summary["unfinished_plans"])}
    )
    table = Table("release", "created", "documents", "state", box=None)
    for found in summary["releases"]:
        states = [name for name in ("published", "withdrawn", "retired") if found[name]]
        state = "current" if found["release"] == summary["release"] else ", ".join(states) or "not published"
        table.add_row(str(found["release"]), found["created"], str(found["documents"]), state)
    if summary["releases"]:
        Console(stderr=True, highlight=False).print(table)


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value_text(part)}" for name, part in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def run_line(record: RunRecord) -> dict[str, object]:
    """What `strata status` says of one run."""
    return {
        "run": record.run,
        "started": record.started.isoformat(timespec="seconds"),
        "status": record.status,
        "exit_code": record.exit_code,
        "seconds": record.seconds,
        "release": record.summary.get("release"),
        "documents": record.summary.get("documents"),
        "error": record.error,
        "message": record.message,
    }


def show_drift(found: Mapping[str, Any]) -> None:
    """Print how well the partitions serve a workload."""
    table = Table(box=None, show_header=False)
    rows = f"{found['rows']:,} rows"
    lines = [
        ("filters", f"{found['filters']:,}, {found['unfiltered']:.0%} of the queries have none"),
        (
            "unseen",
            f"{found['unseen_filters']:.0%} of the filtered queries have one that the layout was not fitted to",
        ),
        (
            "a query looks into",
            f"{found['rows_touched']:,} of {rows} in {found['partitions_touched']:g} partitions",
        ),
        (
            "after a new layout",
            f"{found['rows_touched_refitted']:,} rows in {found['partitions_touched_refitted']:g} partitions",
        ),
        (
            "a new layout",
            "pays: name this file in layout.workload" if found["refitting_pays"] else "would bring little",
        ),
    ]
    if found["unreadable"]:
        lines.insert(
            1,
            (
                "set aside",
                f"{found['unreadable']:.1%} of the queries, whose filter does not fit the attributes",
            ),
        )
    for name, text in lines:
        table.add_row(name, text)
    Console(stderr=True, highlight=False).print(table)


def show_runs(records: Sequence[RunRecord]) -> None:
    """Print how the last runs went."""
    if not records:
        return
    table = Table(box=None)
    for name in ("run", "started", "status", "seconds", "release", "documents"):
        table.add_column(name, no_wrap=True)
    table.add_column("error", overflow="fold")
    for record in records:
        line = run_line(record) | {
            "started": f"{record.started:%Y-%m-%d %H:%M}",
            "seconds": round(record.seconds),
        }
        names = ("run", "started", "status", "seconds", "release", "documents", "message")
        table.add_row(*(escape(str(line[name] if line[name] is not None else "")) for name in names))
    Console(stderr=True, highlight=False).print(table)
