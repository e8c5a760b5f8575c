"""What watches strata agrees with strata: every series that an alert or a panel names is one that is exported."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from pipeline.execution.metrics import exported_names
from pipeline.execution.textfile import TEXTFILE_METRICS
from tests.design.sources import ROOT

INFRA = ROOT / "infra"
OF_OTHERS = {"node_textfile_mtime_seconds"}
"""Series of the node exporter that alerts use."""
SERIES = re.compile(r"\b(?:ray_|node_)?(?:strata|textfile)_[a-z0-9_]+")


def alerts():
    rules = yaml.safe_load((INFRA / "alerts/strata.rules.yml").read_text())
    return [rule for group in rules["groups"] for rule in group["rules"]]


def dashboard():
    return json.loads((INFRA / "dashboards/strata.json").read_text())


def panel_expressions():
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def anchor(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.fixture
def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool: apt-get install prometheus")
    return lambda *words: subprocess.run(
        [found, *map(str, words)],
        capture_output=True, text=True, check=False, cwd=INFRA / "alerts", timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "expression", [*panel_expressions(), *(alert["expr"] for alert in alerts())], ids=lambda e: e[:60]
)
def test_every_series_that_is_watched_is_exported(expression):
    named = set(SERIES.findall(expression))
    assert named
    assert named <= exported_names() | set(TEXTFILE_METRICS) | OF_OTHERS


def test_every_figure_is_shown_or_watched():
    watched = " ".join([*panel_expressions(), *(alert["expr"] for alert in alerts())])
    families = {name.removesuffix("_count").removesuffix("_sum") for name in exported_names()}
    shown = set(SERIES.findall(watched))
    ages = {"strata_last_run_timestamp_seconds"}
    histograms = {"ray_strata_task_seconds"}
    assert (families - histograms) | set(TEXTFILE_METRICS) <= shown | ages


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_every_alert_says_how_bad_what_and_where_to_read_on(alert):
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"]
    page, _, section = alert["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (.+)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert section == anchor(alert["alert"])
    assert section in [anchor(heading) for heading in headings]


def test_every_runbook_has_an_alert_and_every_link_in_it_an_end():
    text = (INFRA / "alerts/RUNBOOKS.md").read_text()
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings == [alert["alert"] for alert in alerts()]
    assert {anchor(name) for name in headings} >= set(re.findall(r"\]\(#([^)]+)\)", text))
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert all(f"**{part}**" in section for part in ("What it means.", "How to look.", "What to do."))


def test_every_alert_has_a_test_of_its_own():
    tests = yaml.safe_load((INFRA / "alerts/strata.rules.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    assert fires == {alert["alert"] for alert in alerts()}


def test_the_dashboard_is_one_that_grafana_reads():
    found = dashboard()
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {variable["name"] for variable in found["templating"]["list"]} == {"datasource", "corpus"}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        uids = {target["datasource"]["uid"] for target in panel.get("targets", [])}
        assert uids <= {"${datasource}"}
    taken = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))


@pytest.mark.prometheus
def test_promtool_accepts_the_alerts_and_their_tests(promtool):
    checked = promtool("check", "rules", "strata.rules.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", "strata.rules.test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    config = promtool("check", "config", "../prometheus.yml")
    assert config.returncode == 0, config.stdout + config.stderr


@pytest.mark.prometheus
def test_every_expression_of_the_dashboard_is_promql(promtool, tmp_path):
    filled = [e.replace("$corpus", ".*").replace("$__rate_interval", "1m") for e in panel_expressions()]
    rules = [{"record": f"panel:{no}", "expr": expression} for no, expression in enumerate(filled)]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = promtool("check", "rules", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    path.write_text(path.read_text().replace("rate(", "rate((", 1))
    assert promtool("check", "rules", path).returncode != 0
