"""The page of `strata report`, from a real small road: its content, and how a browser shows it."""

import html.parser
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, MissingFileError, QualityGateError
from pipeline.release import rollback
from pipeline.reporting.figures import DeadLetters, Measured, StageMemory
from pipeline.reporting.page import render
from pipeline.reporting.stage import default_place, gather, gather_rejected, write_page
from pipeline.reporting.wording import NOT_KNOWN
from pipeline.storage import open_store
from tests.integration.browser import chromium, opened
from tests.integration.roads import configured, rows_of, run_inline, settings, write_parquet

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = 600
HOSTILE = "<script>console.error('escaped?')</script>&\"'"
PLOTS = ("recall-curve", "list-sizes", "levels", "bytes", "stages", "memory", "history")
MEMORY = {
    "driver": StageMemory(estimate_mb=230, peak_mb=126),
    "grow": StageMemory(estimate_mb=212, peak_mb=83),
    "read": StageMemory(estimate_mb=395, peak_mb=361.2),
    "train": StageMemory(peak_mb=402),
}
"""With sorted keys, as in a summary at rest."""


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A root with two releases: the second has fewer documents, and dead letters with markup in them."""
    folder = tmp_path_factory.mktemp("report")
    rows = rows_of(ROWS)
    bad = [{**row, "_id": f"{HOSTILE}{i}", "title": None, "text": None} for i, row in enumerate(rows[:3])]
    config = configured(
        folder,
        settings(
            folder / "root",
            folder / "corpus.parquet",
            gates={"min_recall_at_10": 0.5, "max_removed_fraction": 0.5},
            report={"machines_price_per_hour": 3.6, "currency": "EUR"},
        ),
    )
    write_parquet(folder / "corpus.parquet", rows)
    run_inline(config)
    write_parquet(folder / "corpus.parquet", [*rows[20:], *bad, rows[50]])
    return config, run_inline(config)


@pytest.fixture(scope="module")
def figures(road):
    config, _ = road
    found = gather(open_store(config.root), config, None)
    return replace(found, measured=found.measured.model_copy(update={"memory_by_stage": MEMORY}))


@pytest.fixture(scope="module")
def page(figures):
    return render(figures)


# ------------------------------------------------------------------------------------------------ content


class Reader(html.parser.HTMLParser):
    """Cells of every table by caption, the text of the page, and tags that were not closed."""

    EMPTY = frozenset({"meta", "link", "wbr", "br"})

    def __init__(self, page):
        super().__init__()
        self.tables, self.text, self.ids, self.tags = {}, "", [], set()
        self._open, self._caption, self._cell = [], "", None
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.EMPTY:
            self._open.append(tag)
        if tag in {"caption", "th", "td"}:
            self._cell = ""

    def handle_startendtag(self, _tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "caption":
            self._caption = self._cell
            self.tables[self._caption] = []
        elif tag == "tr":
            self.tables[self._caption].append(())
        if tag in {"th", "td"}:
            rows = self.tables[self._caption] = self.tables[self._caption] or [()]
            rows[-1] += (self._cell,)

    def handle_data(self, data):
        self.text += data
        self._cell = (self._cell or "") + data

    def table(self, caption):
        return [row for row in self.tables[caption] if row]


@pytest.fixture(scope="module")
def read(page):
    return Reader(page)


def test_the_page_is_whole_html_and_no_id_stands_twice(read):
    assert len(read.ids) == len(set(read.ids))
    assert {f"plot-{name}" for name in PLOTS} <= set(read.ids)


def test_nothing_on_the_page_loads_or_runs(page, read):
    assert not read.tags & {"script", "img", "iframe", "object", "embed", "style "}
    linked = re.findall(r"(?:\bhref|\bsrc)=\"([^\"]*)\"", page)
    assert all(target.startswith(("#", "data:,")) for target in linked)
    assert "url(" not in re.sub(r"url\(#[a-z0-9-]+\)", "", page)
    assert "@import" not in page


def test_the_header_says_what_it_is_and_whether_it_is_good(read, road):
    _, summary = road
    for words in ("Release 2", "All gates passed · current", summary["index"], "words", version("strata")):
        assert words in read.text


def test_gates_are_shown_with_threshold_and_measurement(read, road):
    _, summary = road
    assert read.table("Configured gates")[1:] == [
        ("recall@10 at least", "0.5000", f"{summary['recall_at_10']:.4f}", "passed"),
        ("share of documents removed at most", "0.5000", f"{20 / ROWS:.4f}", "passed"),
    ]


def test_every_point_of_the_recall_curve_is_shown_and_the_default_is_named(read, road):
    _, summary = road
    rows = read.table("Recall curve")[1:]
    assert [(row[0].removesuffix(" (default)"), row[1]) for row in rows] == [
        (f"at most {point['lists']}, margin {point['margin']:.3f}", f"{point['recall_at_10']:.4f}")
        for point in summary["recall_curve"]
    ]
    expected = f"at most {summary['lists_at_most']}, margin {summary['margin']:.3f} (default)"
    assert [row[0] for row in rows if "default" in row[0]] == [expected]


def test_the_curve_agrees_with_the_release_at_its_default(road):
    _, summary = road
    asked = (summary["lists_at_most"], summary["margin"], summary["rerank"])
    (point,) = [p for p in summary["recall_curve"] if (p["lists"], p["margin"], p["rerank"]) == asked]
    assert point["recall_at_10"] == summary["recall_at_10"]
    recalls = [point["recall_at_10"] for point in summary["recall_curve"]]
    assert recalls[0] < point["recall_at_10"] <= max(recalls)
    scanned = [point["scanned_fraction"] for point in summary["recall_curve"]]
    assert scanned[0] < scanned[-1]


def test_what_changed_is_shown(read, road):
    _, summary = road
    found = dict(read.table("Documents"))
    assert found == {
        "documents": "580",
        "vectors": "580",
        "added": "0",
        "changed": "0",
        "removed": "20",
        "texts encoded": "0",
        "dead letters": str(summary["dead_letters"]),
    }


def test_dead_letters_are_counted_and_shown_as_text(page, read):
    counts = dict(read.table("Dead letters by reason")[1:])
    assert sorted(counts.values()) == ["1", "3"]
    shown = [row[0] for row in read.table("Dead letters, the first 4")[1:]]
    assert {f"{HOSTILE}{i}" for i in range(3)} <= set(shown)
    assert HOSTILE not in page


def test_lists_bytes_and_stages_are_shown(read, figures):
    lists = dict(read.table("Posting lists"))
    own, every = figures.list_sizes
    assert int(lists["lists"]) == len(own)
    assert own.sum() == 580 <= every.sum()
    largest = next(row for row in read.table("Sizes of posting lists") if row[0] == "largest")
    assert list(largest[1:]) == [str(own.max()), str(every.max())]
    parts = {row[0].split(":")[0]: row[2] for row in read.table("Bytes by part")[1:]}
    assert parts["float32 vectors alone"] == "256"
    assert float(parts["codes"]) >= 16 + 2 + 2 + 4
    stages = [row[0] for row in read.table("Stages")[1:]]
    assert stages[:4] == ["plan", "start", "read", "merge"]
    assert stages[-1] == "total"
    assert read.table("Memory of the largest task")[1:] == [
        ("read", "395", "361"),
        ("train", NOT_KNOWN, "402"),
        ("grow", "212", "83"),
        ("driver", "230", "126"),
    ]
    assert not any(name.startswith("peak memory") for name, _ in read.table("Tasks"))


def test_partitions_are_shown_with_their_conditions_the_largest_first(figures, read):
    assert not any(caption.startswith("Partitions") for caption in read.tables)
    (only,) = figures.manifest.partitions
    small = only.model_copy(update={"partition_id": 1, "rows": 20, "path": HOSTILE})
    large = only.model_copy(update={"rows": 560, "path": '"year" >= 2000'})
    manifest = figures.manifest.model_copy(update={"partitions": (small, large)})
    table = Reader(render(replace(figures, manifest=manifest))).table(
        "Partitions learned from the workload, 2 of 2, largest first"
    )
    lists = str(only.heads.rows)
    assert table[1:] == [
        ("0", "560", "96.6", lists, '"year" >= 2000'),
        ("1", "20", "3.4", lists, HOSTILE),
    ]


def test_money_is_shown_only_at_a_configured_price(read, figures):
    ((what, _, price, cost),) = read.table("Costs at the configured prices")[1:]
    assert (what, price) == ("machines, this run", "3.6 per hour")
    assert float(cost) == pytest.approx(figures.measured.seconds["total"] * 0.001, abs=1e-4)
    free = replace(figures, prices=type(figures.prices)())
    assert "Costs" not in Reader(render(free)).text


def test_releases_are_listed_newest_first_with_their_state(read):
    assert [row[:2] for row in read.table("Releases, newest first")[1:]] == [
        ("2", "current"),
        ("1", "replaced"),
    ]


def test_the_configuration_of_the_run_is_shown(read):
    assert ("gates.min_recall_at_10", "0.5") in read.table("Settings")


def test_the_same_figures_give_the_same_bytes(figures, page):
    assert render(figures) == page


def test_a_release_of_an_earlier_version_is_shown_as_far_as_it_was_measured(figures):
    old = Measured(documents=580, recall_at_10=0.75)
    bare = replace(
        figures, measured=old, list_sizes=None, history=(), dead_letters=DeadLetters(unreadable="gone")
    )
    found = Reader(render(bare))
    for words in (
        "Gates not recorded",
        "0.7500",
        "No recall curve was measured",
        "kept no record of its configuration",
    ):
        assert words in found.text
    assert not {"plot-recall-curve", "plot-list-sizes", "plot-stages", "plot-history"} & set(found.ids)


def test_colours_have_contrast_in_both_schemes(page):
    style = page[page.index("<style>") : page.index("</style>")]
    screen = style[: style.index("@media print")].split("prefers-color-scheme")
    light, dark = (dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block)) for block in screen)
    for colours in (light, dark):
        for text, paper in [("ink", "card"), ("muted", "card"), ("muted", "paper"), ("series-1", "paper")]:
            assert _contrast(colours[text], colours[paper]) >= 4.5, (text, paper)
        for kind in ("good", "bad"):
            assert _contrast(colours[kind], colours[f"{kind}-paper"]) >= 4.5
        for i in range(1, 6):
            assert _contrast(colours[f"series-{i}"], colours["card"]) >= 3


def _contrast(one, other):
    """Contrast ratio of WCAG 2.2."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dim, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dim + 0.05)


# ------------------------------------------------------------------------------------------------ which index


def test_an_earlier_release_keeps_its_own_figures(road):
    config, _ = road
    first = gather(open_store(config.root), config, 1)
    assert (first.release, first.state, first.manifest.num_documents) == (1, "replaced", ROWS)
    assert default_place(first) == f"{config.root}/reports/release-1.html"


def test_an_index_below_its_gates_is_shown_by_its_hash(tmp_path):
    write_parquet(tmp_path / "corpus.parquet", rows_of(150))
    content = settings(tmp_path / "root", tmp_path / "corpus.parquet", gates={"min_ndcg_at_10": 0.5})
    config = configured(tmp_path, content)
    with pytest.raises(QualityGateError) as refused:
        run_inline(config)
    index = re.search(r"index ([0-9a-f]{32})", str(refused.value))[1]
    store = open_store(config.root)
    found = Reader(render(gather_rejected(store, config, index)))
    assert "Below its gates: not published" in found.text
    assert found.table("Configured gates")[1] == ("nDCG@10 at least", "0.5000", NOT_KNOWN, "failed")
    assert "was not measured" in found.text
    with pytest.raises(MissingFileError, match="no release is published"):
        gather(store, config, None)
    with pytest.raises(MissingFileError, match="no run was stopped"):
        gather_rejected(store, config, "0" * 32)


def test_a_release_that_was_rolled_back_says_so(tmp_path):
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    for rows in (150, 140):
        write_parquet(tmp_path / "corpus.parquet", rows_of(rows))
        run_inline(config)
    store = open_store(config.root)
    rollback(store, 1)
    states = [(line.release, line.state) for line in gather(store, config, 2).history]
    assert states == [(1, "current"), (2, "rolled back")]


@pytest.mark.s3
def test_a_page_is_made_from_s3_and_written_to_s3(road, s3_root, s3_config):
    local, there = open_store(road[0].root), open_store(s3_root, s3_config)
    for folder in ("aliases", "releases", "indexes", "partitions", "dead_letters", "embeddings"):
        for info in local.list(folder):
            there.write(info.path, local.read(info.path))
    config = road[0].model_copy(update={"root": s3_root, "storage": s3_config})
    found = gather(there, config, None)
    written = write_page(found, config, default_place(found))
    assert len(there.read("reports/release-2.html")) == written
    with pytest.raises(ConfigError, match="name of a file"):
        write_page(found, config, f"{s3_root}/folder/")


def _strata_report(road, *words, hash_seed="0"):
    conf = Path(road[0].root).parent / "conf.yaml"
    return subprocess.run(
        [sys.executable, "-m", "jobs", "report", conf, *words],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": hash_seed},
    )  # fmt: skip


def test_the_job_writes_the_same_page_every_time_and_says_where(road, tmp_path):
    done = [_strata_report(road, "--out", tmp_path / f"{seed}.html", hash_seed=seed) for seed in "12"]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()
    summary = json.loads(done[0].stdout.strip().splitlines()[-1])
    assert summary["release"] == 2
    assert summary["gates_passed"] is True
    assert summary["out"] == str(tmp_path / "1.html")
    assert summary["bytes"] == (tmp_path / "1.html").stat().st_size


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--release", "9"], 65, "there is no release 9"),
        (["--index", "0"], 65, "no run was stopped by its gates"),
        (["--release", "1", "--index", "0"], 2, "--index"),
    ],
)
def test_what_cannot_be_shown_is_said(road, words, code, said):
    done = _strata_report(road, *words)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------ in a browser

LOOK = """JSON.stringify((() => {
  const box = e => e.getBoundingClientRect();
  const cut = (a, b) => [Math.min(a.right, b.right) - Math.max(a.left, b.left),
                         // A text's box has room above and below its letters.
                         Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) - .3 * Math.min(a.height, b.height)];
  const plots = [...document.querySelectorAll("figure")].map(figure => {
    const svg = figure.querySelector("svg"), texts = [...figure.querySelectorAll("svg text")];
    const shapes = [...figure.querySelectorAll('[id$="data"] path')];
    const seen = shapes.filter(p => p.getAttribute("d") && Math.max(box(p).width, box(p).height) > .05);
    const pairs = texts.flatMap((a, i) => texts.slice(i + 1).map(b => [a, b]))
      .filter(([a, b]) => cut(box(a), box(b)).every(side => side > 1));
    const out = texts.filter(t => box(t).left < box(figure).left || box(t).right > box(figure).right);
    return {name: figure.id.slice(5), width: svg ? box(svg).width : 0, height: svg ? box(svg).height : 0,
            data: seen.length,
            overlaps: pairs.map(([a, b]) => a.textContent + " | " + b.textContent),
            outside: out.map(t => t.textContent), smallest: Math.min(99, ...texts.map(t => box(t).height))};
  });
  const wide = [...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".table") && !e.closest("svg") && box(e).right > innerWidth + 1)
    .map(e => e.tagName + "." + e.className);
  return {plots, wide, scroll: document.documentElement.scrollWidth - innerWidth};
})())"""


def faults(browser, path, *, width, dark=False):
    """Everything that is wrong with a page in a browser; empty if nothing is."""
    browser.open(path.as_uri(), width=width, dark=dark)
    found = [f"console: {text}" for text in browser.complaints]
    found += [f"request: {uri}" for uri in browser.requests if uri not in {path.as_uri(), "data:,"}]
    look = json.loads(browser.ask(LOOK))
    found += [f"wider than the window: {element}" for element in look["wide"]]
    found += [f"scrolls sideways by {look['scroll']} px"] * (look["scroll"] > 0)
    plots = {plot["name"]: plot for plot in look["plots"]}
    found += [f"no plot {name}" for name in PLOTS if name not in plots]
    for name, plot in plots.items():
        found += [f"{name} is too small"] * (plot["width"] < 250 or plot["height"] < 80)
        found += [f"{name} shows no data"] * (plot["data"] == 0)
        found += [f"{name}: texts overlap: {pair}" for pair in plot["overlaps"]]
        found += [f"{name}: text outside: {text}" for text in plot["outside"]]
        found += [f"{name}: text of {plot['smallest']:.1f} px"] * (plot["smallest"] < 9)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = chromium()
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with opened(program, tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_fault(browser, page, tmp_path, width, dark):
    path = tmp_path / "page.html"
    path.write_text(page)
    assert faults(browser, path, width=width, dark=dark) == []
    paper = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(21, 24, 28)") is dark


BREAKS = {
    "no plot recall-curve": lambda page: re.sub(r'<figure id="plot-recall-curve">.*?</figure>', "", page, flags=re.DOTALL),
    "bytes is too small": lambda page: re.sub(
        r'(<figure id="plot-bytes">.*?)<svg.*?</svg>', r"\1", page, flags=re.DOTALL
    ),
    "levels shows no data": lambda page: re.sub(
        r'(id="levels-\d-data">\s*<path )d="[^"]*"', r'\1d=""', page
    ),
    "console: ": lambda page: page.replace("</body>", "<script>console.error('a fault')</script></body>").replace("default-src 'none'", "default-src 'unsafe-inline'"),
    "console: Loading the image": lambda page: page.replace("</body>", '<img src="http://127.0.0.1:9/x.png" alt=""></body>'),
    "request: ": lambda page: re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", '<img src="http://127.0.0.1:9/x.png" alt=""></body>'),
    "scrolls sideways": lambda page: page.replace("<main>", '<main><div style="width: 2000px">x</div>'),
    "wider than the window": lambda page: page.replace("<main>", '<main><div style="width: 2000px">x</div>'),
    "history: texts overlap": lambda page: re.sub(
        r'(<figure id="plot-history">.*?)(<text [^>]*>[^<]*</text>)', r"\1\2\2", page, flags=re.DOTALL
    ),
}  # fmt: skip


@pytest.mark.browser
@pytest.mark.parametrize("fault", BREAKS)
def test_a_fault_of_the_page_is_found(browser, page, tmp_path, fault):
    path = tmp_path / "page.html"
    broken = BREAKS[fault](page)
    assert broken != page
    path.write_text(broken)
    assert any(found.startswith(fault) for found in faults(browser, path, width=390))
