"""Numbers → text. Pure."""

from pipeline.artifacts import Refresh

__all__ = [
    "NOT_KNOWN",
    "bytes_text",
    "compact",
    "count",
    "decimal",
    "percent",
    "refresh_text",
    "seconds_text",
    "share",
]

NOT_KNOWN = "\N{EN DASH}"
THOUSAND, MILLION, BILLION = 1e3, 1e6, 1e9


def count(value: float | None) -> str:
    """Whole number with separators."""
    return NOT_KNOWN if value is None else f"{round(value):,}"


def share(value: float | None) -> str:
    """A measure between 0 and 1, as papers print it."""
    return NOT_KNOWN if value is None else f"{value:.4f}".replace("-", "\N{MINUS SIGN}")


def refresh_text(refresh: Refresh) -> str:
    """What became of the binarizer of the release before, and why."""
    drift = f"{refresh.drift:+.4f}".replace("-", "\N{MINUS SIGN}")
    measured = (
        f"drift {drift} \N{PLUS-MINUS SIGN} {refresh.error:.4f} recall@10, allowed {share(refresh.max_drift)}"
    )
    if refresh.outcome == "kept":
        return f"kept since release {refresh.since} ({measured})"
    return f"replaces that of release {refresh.since} ({measured})"


def percent(value: float | None) -> str:
    """A fraction as a percentage, without its sign."""
    return NOT_KNOWN if value is None else f"{100 * value:,.1f}"


def decimal(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return NOT_KNOWN
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 1 else 2  # noqa: PLR2004  (powers of ten)
    return f"{value:,.{digits}f}"


def compact(value: float) -> str:
    """Short enough for an axis: 950, 1.2k, 35k, 1.5M."""
    for size, letter in ((BILLION, "G"), (MILLION, "M"), (THOUSAND, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.1f}".removesuffix(".0") + letter if scaled < 10 else f"{scaled:.0f}{letter}"  # noqa: PLR2004
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"  # noqa: PLR2004


def seconds_text(value: float | None) -> str:
    """A duration in the unit that people would use."""
    if value is None:
        return NOT_KNOWN
    if value < 120:  # noqa: PLR2004  (two minutes)
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def bytes_text(value: float | None) -> str:
    """A size in the binary unit that keeps three digits or so."""
    if value is None:
        return NOT_KNOWN
    size, units = float(value), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:  # noqa: PLR2004
        size, units = size / 1024, units[1:]
    return f"{size:,.0f} bytes" if units[0] == "bytes" else f"{decimal(size)} {units[0]}"
