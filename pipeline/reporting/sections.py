"""Figures → titled sections of plots and tables, every cell a text. Pure; nothing here is HTML."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import CodesInfo, Partition, Refresh
from pipeline.reporting.figures import Figures, Interval, ListSizes, ReleaseLine, is_default
from pipeline.reporting.plots import Plot, draw
from pipeline.reporting.wording import (
    NOT_KNOWN,
    bytes_text,
    count,
    decimal,
    percent,
    refresh_text,
    seconds_text,
    share,
)

__all__ = ["Column", "Section", "Table", "sections"]

SHOWN_REASONS = 12
SHOWN_PARTITIONS = 64
GB = 1e9
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Column:
    """Head of a column."""

    label: str
    unit: str = ""
    is_number: bool = True
    is_long: bool = False
    """May be cut anywhere: names and texts of any length."""


@dataclass(frozen=True)
class Table:
    """Cells as they are read; the first column names the row."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    is_wide: bool = False
    """Takes the whole width of the page."""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    intro: str = ""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    note: str = ""


def sections(figures: Figures) -> list[Section]:
    """The parts of the page, in order."""
    plots = draw(figures)

    def of(*names: str) -> tuple[Plot, ...]:
        return tuple(plots[name] for name in names if name in plots)

    return [
        _gates(figures),
        _quality(figures, of("recall-curve")),
        _changes(figures),
        *_migration(figures),
        _layout(figures, of("list-sizes", "levels")),
        _storage(figures, of("bytes")),
        _run(figures, of("stages", "memory")),
        *_costs(figures),
        _history(figures, of("history")),
        _configuration(figures),
    ]


def _pairs(caption: str, pairs: Iterable[tuple[str, str]]) -> Table:
    return Table(caption, (_text(""), Column("")), tuple(pairs))


def _text(label: str, *, is_long: bool = False) -> Column:
    return Column(label, is_number=False, is_long=is_long)


# ------------------------------------------------------------------------------------------------ quality


GATE_WORDS = {
    "min_recall_at_10": "recall@10 at least",
    "min_ndcg_at_10": "nDCG@10 at least",
    "max_ndcg_loss": "nDCG@10 lost at most",
    "max_removed_fraction": "share of documents removed at most",
}


def _gates(figures: Figures) -> Section:
    gates = figures.measured.gates
    if gates is None:
        return Section(
            "gates",
            "Gates",
            note="An earlier version of strata made this release; it kept no record of its gates.",
        )
    if not gates:
        return Section("gates", "Gates", note="No gate is configured: whatever is built is published.")
    rows = tuple(
        (
            GATE_WORDS.get(gate.gate, gate.gate),
            share(gate.threshold),
            share(gate.measured),
            "passed" if gate.passed else "failed",
        )
        for gate in gates
    )
    problems = " ".join(f"{gate.problem}." for gate in gates if gate.problem)
    columns = (_text("gate"), Column("threshold"), Column("measured"), _text("result"))
    return Section("gates", "Gates", tables=(Table("Configured gates", columns, rows),), note=problems)


def _quality(figures: Figures, plots: tuple[Plot, ...]) -> Section:
    m = figures.measured
    columns = (_text("measure"), Column("this index"), Column("exact float32"))
    rows = [("recall@10 of exact search", share(m.recall_at_10), share(1.0))]
    if m.ndcg_at_10 is not None:
        rows.append(("nDCG@10", share(m.ndcg_at_10), share(m.exact_ndcg_at_10)))
        rows.append(("recall@100 of judged documents", share(m.recall_at_100), share(m.exact_recall_at_100)))
    judged = f"Measured on {count(m.judged_queries)} judged queries. " if m.judged_queries else ""
    search = figures.manifest.search
    depth = (
        f"A query probes posting lists whose head is at most {search.margin:.3f} farther than the nearest one, in squared L2, "
        f"no more than {count(search.lists)}, and re-ranks {search.rerank} candidates."
    )
    tables = [Table("Quality", columns, tuple(rows)), _one_query(figures)]
    if m.recall_curve:
        tables.append(_curve(figures))
    note = "" if m.recall_curve else "No recall curve was measured for this index."
    return Section("quality", "Quality", judged + depth, plots, tuple(tables), note)


def _one_query(figures: Figures) -> Table:
    m = figures.measured
    pairs = [
        ("median time", f"{decimal(m.p50_ms)} ms"),
        ("95th percentile", f"{decimal(m.p95_ms)} ms"),
        ("read", bytes_text(m.bytes_per_query)),
        ("requests", decimal(m.requests_per_query)),
        ("posting lists", decimal(m.lists_per_query)),
        ("rows scanned", f"{percent(m.scanned_fraction)} %"),
        ("rounds of reading", count(m.rounds)),
    ]
    return _pairs("One query, on average", pairs)


def _curve(figures: Figures) -> Table:
    columns = (
        _text("setting"),
        Column("recall@10"),
        Column("read", "KiB"),
        Column("lists"),
        Column("rows scanned", "%"),
        Column("re-ranked"),
    )
    rows = tuple(
        (
            f"at most {count(point.lists)}, margin {point.margin:.3f}"
            + (" (default)" if is_default(point, figures) else ""),
            share(point.recall_at_10),
            decimal(point.bytes_per_query / 1024),
            decimal(point.lists_per_query),
            percent(point.scanned_fraction),
            count(point.rerank),
        )
        for point in figures.measured.recall_curve
    )
    return Table("Recall curve", columns, rows)


# ------------------------------------------------------------------------------------------------ documents


def _changes(figures: Figures) -> Section:
    m = figures.measured
    pairs = [
        ("documents", count(m.documents)),
        ("vectors", count(m.vectors)),
        ("added", count(m.added)),
        ("changed", count(m.changed)),
        ("removed", count(m.removed)),
        ("texts encoded", count(m.encoded)),
        ("dead letters", count(m.dead_letters)),
    ]
    letters = figures.dead_letters
    tables = [_pairs("Documents", pairs)]
    if letters.reasons:
        tables += [_reasons(letters.reasons), _letters(letters.examples)]
    return Section("changes", "What changed", tables=tuple(tables), note=letters.unreadable)


def _reasons(reasons: Sequence[tuple[str, int]]) -> Table:
    rows = [(kind, count(rows)) for kind, rows in reasons[:SHOWN_REASONS]]
    rest = sum(rows for _, rows in reasons[SHOWN_REASONS:])
    rows += [(f"{len(reasons) - SHOWN_REASONS} other reasons", count(rest))] if rest else []
    return Table("Dead letters by reason", (_text("reason", is_long=True), Column("rows")), tuple(rows))


def _letters(examples: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        _text("document", is_long=True),
        _text("reason", is_long=True),
        _text("file", is_long=True),
        Column("row"),
    )
    rows = tuple(
        (x["doc_id"] if x["doc_id"] is not None else NOT_KNOWN, x["reason"], x["file"], count(x["row"]))
        for x in examples
    )
    return Table(f"Dead letters, the first {len(rows)}", columns, rows, is_wide=True)


# ------------------------------------------------------------------------------------------------ layout and bytes


def _layout(figures: Figures, plots: tuple[Plot, ...]) -> Section:
    codes = figures.manifest.partitions[0].codes
    sizes, statistics = figures.list_sizes, figures.manifest.statistics
    partitions = figures.manifest.partitions
    tables = [_partitions_table(partitions)] if len(partitions) > 1 else []
    tables += [] if sizes is None else [_list_table(sizes), _copies_table(sizes, statistics)]
    tables.append(
        Table(
            "Levels of a code",
            (_text("bit"), Column("dimensions"), Column("bytes")),
            tuple((str(i), count(width), count(width // 8)) for i, width in enumerate(codes.levels, 1)),
        )
    )
    if codes.held_out_recall:
        tables.append(_binarizer_table(codes))
        tables.append(_pairs_table(codes))
    refresh = codes.origin.refresh if codes.origin is not None else None
    if refresh is not None:
        tables.append(_refresh_table(refresh))
    size, dims = codes.code_bytes, figures.manifest.dims_of(figures.manifest.partitions[0])
    intro = f"A code has {size} bytes for a vector of {dims} dimensions: most bits where vectors vary most."
    gone = "" if sizes is not None else "The directory of this release was collected by gc."
    return Section("layout", "Posting lists and codes", intro, plots, tuple(tables), gone)


def _binarizer_table(codes: CodesInfo) -> Table:
    """What each binarizer found for queries held out from its training, in the corpus that it was learned for."""
    columns = (_text("binarizer"), Column("recall@10 by codes alone"), _text(""))
    rows = tuple(
        (method, share(recall), "in use" if method == codes.method else "")
        for method, recall in codes.held_out_recall.items()
    )
    return Table("Binarizers, on held-out queries", columns, rows)


def _pairs_table(codes: CodesInfo) -> Table:
    """What it was learned from, and whose queries were held out."""
    mined = "neighbours mined among vectors" + (", and given pairs" if codes.given_pairs else "")
    queries = "given queries" if codes.judged_on == "queries" else "vectors of documents"
    columns = (_text("learned from"), Column("given pairs"), _text("held-out queries"))
    return Table(
        "What the binarizer was learned from", columns, ((mined, count(codes.given_pairs), queries),)
    )


def _refresh_table(refresh: Refresh) -> Table:
    """Why the binarizer of the release before was kept or not."""
    columns = (_text("binarizer"), Column("held-out queries"))
    rows = ((refresh_text(refresh), count(refresh.queries)),)
    return Table("The binarizer of the release before, on this corpus", columns, rows)


def _partitions_table(partitions: Sequence[Partition]) -> Table:
    """The largest; a filter that rules out the condition of one never reads it."""
    largest = sorted(partitions, key=lambda one: -one.rows)[:SHOWN_PARTITIONS]
    total = sum(one.rows for one in partitions)
    caption = f"Partitions learned from the workload, {len(largest)} of {len(partitions)}, largest first"
    columns = (
        _text("partition"),
        Column("rows"),
        Column("of all", "%"),
        Column("lists"),
        _text("condition", is_long=True),
    )
    rows = tuple(
        (str(one.partition_id), count(one.rows), percent(one.rows / total), count(one.heads.rows), one.path)
        for one in largest
    )
    return Table(caption, columns, rows, is_wide=True)


def _list_table(sizes: ListSizes) -> Table:
    columns = (_text(""), Column("own vectors"), Column("with copies"))
    shown: tuple[tuple[str, Callable[[NDArray[np.int64]], str]], ...] = (
        ("mean", lambda rows: decimal(float(rows.mean()))),
        ("coefficient of variation", lambda rows: f"{float(rows.std() / rows.mean()):.3f}"),
        ("smallest", lambda rows: count(int(rows.min()))),
        ("99 of 100 have at most", lambda rows: count(int(np.quantile(rows, 0.99)))),
        ("largest", lambda rows: count(int(rows.max()))),
    )
    rows = tuple((label, *(text(of) for of in sizes)) for label, text in shown)
    return Table("Sizes of posting lists", columns, rows)


def _copies_table(sizes: ListSizes, statistics: Mapping[str, float]) -> Table:
    pairs = [
        ("lists", count(len(sizes.entries))),
        ("entries of a vector, on average", f"{sizes.entries.sum() / sizes.primaries.sum():.3f}"),
    ]
    # Not recorded by versions that made no copies.
    words = {
        "lists_without_vectors": "left out, as no vector is theirs",
        "lists_split": "there because another was too long",
        "replicas_dropped": "copies dropped, as lists were full",
    }
    pairs += [(label, count(int(statistics[name]))) for name, label in words.items() if name in statistics]
    return _pairs("Posting lists", pairs)


PART_WORDS = {
    "documents": "documents: texts and attributes",
    "codes": "codes: scanned",
    "heads": "heads and directory: in memory",
    "vectors": "vectors: float16 to re-rank, attributes to filter",
    "cache": "cache: float32 of every text ever encoded",
}


def _storage(figures: Figures, plots: tuple[Plot, ...]) -> Section:
    documents = max(figures.manifest.num_documents, 1)
    parts = {PART_WORDS[name]: size for name, size in figures.bytes_by_part.items()}
    parts |= {"total": sum(parts.values()), "float32 vectors alone": figures.float32_bytes}
    rows = tuple((name, bytes_text(size), decimal(size / documents)) for name, size in parts.items())
    columns = (_text("part"), Column("size"), Column("per document", "bytes"))
    intro = "The cache holds what makes the next run cheap: it serves no query and is shared by all releases of the root."
    return Section("storage", "Storage", intro, plots, (Table("Bytes by part", columns, rows),))


# ------------------------------------------------------------------------------------------------ run


def _run(figures: Figures, plots: tuple[Plot, ...]) -> Section:
    m = figures.measured
    tables = [_stage_table(figures), _pairs("Tasks", _task_pairs(figures))]
    if m.memory_by_stage:
        columns = (_text("stage"), Column("estimate", "MB"), Column("measured peak", "MB"))
        rows = tuple(
            (stage, count(x.estimate_mb), count(x.peak_mb)) for stage, x in figures.stage_memory.items()
        )
        tables.append(Table("Memory of the largest task", columns, rows))
    return Section("run", "The run", plots=plots, tables=tuple(tables))


def _stage_table(figures: Figures) -> Table:
    seconds, rows_of = figures.stage_seconds, figures.stage_rows
    total = figures.measured.seconds.get("total", sum(seconds.values()))
    columns = (_text("stage"), Column("time", "s"), Column("share", "%"), Column("rows"), Column("rows/s"))
    rows = [
        (stage, decimal(value), percent(value / total if total else 0.0), *_speed(rows_of.get(stage), value))
        for stage, value in seconds.items()
    ]
    rows.append(("total", decimal(total), percent(1.0), "", ""))
    return Table("Stages", columns, tuple(rows))


def _speed(rows: int | None, seconds: float) -> tuple[str, str]:
    return ("", "") if rows is None else (count(rows), decimal(rows / seconds) if seconds else NOT_KNOWN)


def _task_pairs(figures: Figures) -> Iterator[tuple[str, str]]:
    m = figures.measured
    yield "tasks", count(m.tasks)
    yield "done before and reused", count(m.tasks_reused)
    if m.tasks_retried is not None:
        yield "retried", count(m.tasks_retried)
    if not m.memory_by_stage:
        yield "peak memory of a task", _beside(m.task_memory_mb, m.estimate.get("task_memory_mb"), "MB")
        yield "peak memory of an encoder", _beside(m.actor_memory_mb, m.estimate.get("actor_memory_mb"), "MB")
    yield "bytes written or reused", _beside_bytes(m.bytes, m.estimate.get("bytes"))
    yield "time", _beside(m.seconds.get("total"), m.estimate.get("seconds"), "s")


def _beside(measured: float | None, estimate: float | None, unit: str) -> str:
    if measured is None:
        return NOT_KNOWN
    reckoned = f" (estimate {decimal(estimate)})" if estimate is not None else ""
    return f"{decimal(measured)} {unit}{reckoned}"


def _beside_bytes(measured: int | None, estimate: int | None) -> str:
    return bytes_text(measured) + (f" (estimate {bytes_text(estimate)})" if estimate is not None else "")


# ------------------------------------------------------------------------------------------------ encoders


def _migration(figures: Figures) -> Iterator[Section]:
    """Only of a release between two encoders, or one that an upgrade made."""
    tables = [*_sides(figures), *_ladder(figures)]
    if tables:
        intro = (
            "Queries are encoded by the newer encoder. A bridge takes them to documents that an earlier one embedded; "
            "scores from across it are calibrated before they meet the others."
        )
        yield Section("migration", "From one encoder to the next", intro, tables=tuple(tables))


def _sides(figures: Figures) -> Iterator[Table]:
    manifest = figures.manifest
    if not manifest.bridges:
        return
    spaces = [(str(manifest.encoder["fingerprint"]), str(manifest.encoder["name"]), "none: its own space")]
    spaces += [(one.space, str(one.encoder["name"]), one.kind) for one in manifest.bridges]
    columns = (_text("documents embedded by"), _text("bridge"), Column("vectors"), Column("share", "%"))
    rows = []
    for space, name, kind in spaces:
        vectors = sum(one.rows for one in manifest.partitions if one.space == space)
        rows.append((name, kind, count(vectors), percent(vectors / max(1, figures.manifest_rows))))
    yield Table("Where documents are", columns, tuple(rows))


LADDER_WORDS = {"ndcg_at_10": "nDCG@10", "recall_at_100": "recall@100", "overlap_at_10": "overlap@10"}


def _ladder(figures: Figures) -> Iterator[Table]:
    ladder = figures.measured.upgrade
    if ladder is None:
        return
    names = [name for name in LADDER_WORDS if getattr(ladder.rungs[0], name) is not None]
    columns = (
        _text("rung"),
        *(Column(LADDER_WORDS[name]) for name in names),
        Column("to the status quo"),
        Column("share of the gain"),
        Column("documents embedded"),
        Column("time", "s"),
        Column("cost", figures.prices.currency),
    )
    rows = []
    for rung in ladder.rungs:
        judged = getattr(rung, ladder.judged_by)
        gain, kept = Interval.of(judged.gain), Interval.of(judged.share_kept)
        rows.append(
            (
                f"{rung.name} (in use)" if rung.name == ladder.chosen else rung.name,
                *(share(getattr(rung, name).value) for name in names),
                _interval_text(gain),
                _interval_text(kept),
                count(rung.documents_embedded),
                decimal(rung.seconds),
                decimal(rung.cost),
            )
        )
    caption = (
        f"What {ladder.queries:,} new queries find among {ladder.documents:,} documents of a sample, rung by rung; "
        f"judged by {LADDER_WORDS[ladder.judged_by]}"
    )
    yield Table(caption, columns, tuple(rows), is_wide=True)


def _interval_text(interval: Interval | None) -> str:
    if interval is None:
        return NOT_KNOWN
    low, high = (NOT_KNOWN if end is None else share(end) for end in (interval.low, interval.high))
    return f"{share(interval.value)} [{low}, {high}]"


def _costs(figures: Figures) -> Iterator[Section]:
    """Only where a price is configured: the page invents none."""
    prices = figures.prices
    hourly, monthly = prices.machines_price_per_hour, prices.storage_price_per_gb_month
    rows: list[tuple[str, str, str, str]] = []
    seconds = figures.measured.seconds.get("total")
    if hourly is not None and seconds is not None:
        cost = seconds / SECONDS_PER_HOUR * hourly
        rows.append(("machines, this run", seconds_text(seconds), f"{hourly:g} per hour", f"{cost:,.4f}"))
    if monthly is not None:
        size = sum(figures.bytes_by_part.values())
        cost = size / GB * monthly
        rows.append(("storage, one month", bytes_text(size), f"{monthly:g} per GB and month", f"{cost:,.4f}"))
    if rows:
        columns = (_text("what"), Column("amount"), _text("price"), Column("cost", prices.currency))
        yield Section(
            "costs", "Costs", tables=(Table("Costs at the configured prices", columns, tuple(rows)),)
        )


# ------------------------------------------------------------------------------------------------ releases


def _history(figures: Figures, plots: tuple[Plot, ...]) -> Section:
    columns = (
        _text("release"),
        _text("state"),
        Column("created"),
        Column("documents"),
        Column("recall@10"),
        Column("nDCG@10"),
        Column("time", "s"),
    )
    rows = tuple(_history_row(line) for line in reversed(figures.history))
    tables = (Table("Releases, newest first", columns, rows),) if rows else ()
    note = "" if rows else "Nothing is published in this root yet."
    return Section("history", "Releases", plots=plots, tables=tables, note=note)


def _history_row(line: ReleaseLine) -> tuple[str, ...]:
    m = line.measured
    figures = (
        count(m.documents),
        share(m.recall_at_10),
        share(m.ndcg_at_10),
        decimal(m.seconds.get("total")),
    )
    return (str(line.release), line.state, line.created[:10], *figures)


def _configuration(figures: Figures) -> Section:
    m = figures.measured
    columns = (_text("", is_long=True), _text("", is_long=True))
    named = (("Settings", _leaves(m.configuration)), ("Libraries that shape bytes", _leaves(m.versions)))
    found = [(caption, tuple(pairs)) for caption, pairs in named]
    tables = [Table(caption, columns, rows) for caption, rows in found if rows]
    note = (
        ""
        if tables
        else "An earlier version of strata made this release; it kept no record of its configuration."
    )
    return Section("configuration", "Configuration", tables=tuple(tables), note=note)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        elif value not in (None, "", []):
            yield prefix + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
