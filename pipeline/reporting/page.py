"""Figures → one HTML page without scripts or anything to load. Pure; the markup is in page.html.

Everything is escaped by the template; only plots go in as they are, and those are made here.
"""

import re

import jinja2
import markupsafe

from pipeline.reporting.figures import Figures
from pipeline.reporting.sections import sections
from pipeline.reporting.wording import NOT_KNOWN, bytes_text, count, decimal, seconds_text, share

__all__ = ["render"]


def render(figures: Figures) -> str:
    """The page; the same figures give the same text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = markupsafe.Markup
    environment.filters["slug"] = _slug
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html").render(
        title=_title(figures),
        corpus=figures.manifest.corpus,
        verdict=_verdict(figures),
        facts=_facts(figures),
        tiles=_tiles(figures),
        sections=sections(figures),
    )


def _breakable(text: str) -> markupsafe.Markup:
    """Escaped, and to be broken after the dots and the underscores of a name rather than anywhere."""
    pieces = re.split(r"(?<=[._/])(?=\w)", text)
    return markupsafe.Markup("<wbr>").join(pieces)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _title(figures: Figures) -> str:
    if figures.release is not None:
        return f"Release {figures.release}"
    return f"Index {figures.manifest.index[:12]}"


def _verdict(figures: Figures) -> tuple[str, str]:
    """Kind and words."""
    if figures.release is None:
        return "bad", "Below its gates: not published"
    words = {None: "Gates not recorded", True: "All gates passed", False: "Gates failed"}[figures.is_good]
    if figures.measured.gates == ():
        words = "No gates configured"
    good = bool(figures.measured.gates) and bool(figures.is_good)
    return ("good" if good else "plain"), f"{words} · {figures.state}"


def _facts(figures: Figures) -> list[tuple[str, str]]:
    created = (figures.created or "").replace("T", " ")[:19]
    return [
        ("root", figures.root),
        ("index", figures.manifest.index),
        ("encoder", figures.measured.encoder or str(figures.manifest.encoder.get("name", NOT_KNOWN))),
        ("plan", figures.manifest.plan[:16]),
        ("created", f"{created} UTC" if created else "not published"),
        ("strata", figures.measured.versions.get("strata", "not recorded")),
    ]


def _tiles(figures: Figures) -> list[tuple[str, str]]:
    documents = max(figures.manifest.num_documents, 1)
    parts = figures.bytes_by_part
    scanned = (parts["codes"] + parts["heads"]) / documents
    served = sum(parts[name] for name in ("codes", "heads", "vectors"))
    return [
        ("documents", count(figures.manifest.num_documents)),
        ("recall@10", share(figures.measured.recall_at_10)),
        ("bytes scanned per document", decimal(scanned)),
        ("served from", bytes_text(served)),
        ("run took", seconds_text(figures.measured.seconds.get("total"))),
    ]
