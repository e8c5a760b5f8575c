"""A real Prometheus with the scrape configuration that we ship, a real run on Ray, and its series asked for over HTTP."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from contextlib import nullcontext

import pytest
import yaml

from pipeline.config import ClusterConfig
from pipeline.execution.flows import run
from pipeline.execution.ledger import Ledger
from pipeline.execution.runner import RayRunner
from pipeline.execution.work import StoreSpec
from tests.design.sources import ROOT
from tests.design.test_infra import panel_expressions
from tests.integration.roads import configured, rows_of, settings, write_parquet

pytestmark = [pytest.mark.ray, pytest.mark.prometheus]

SECONDS = 90


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def shipped_configuration(target):
    """Our example, with the place to scrape and faster."""
    found = yaml.safe_load((ROOT / "infra/prometheus.yml").read_text())
    found["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    found["rule_files"] = [str(ROOT / "infra/alerts/strata.rules.yml")]
    (local,) = [job for job in found["scrape_configs"] if job["job_name"] == "strata-local"]
    local["static_configs"] = [{"targets": [target]}]
    return found | {"scrape_configs": [local]}


class Server:
    def __init__(self, url):
        self.url = url

    def query(self, expression):
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=10) as answer:  # noqa: S310
            return json.loads(answer.read())["data"]["result"]

    def wait_for(self, expression, until=bool):
        """The result as soon as it is as wanted; the last one if it never is."""
        found, deadline = [], time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                if until(found := self.query(expression)):
                    break
            except OSError:
                pass
            time.sleep(0.25)
        return found


def by(label, found):
    return {sample["metric"][label]: float(sample["value"][1]) for sample in found}


@pytest.fixture
def metrics_port():
    return free_port()


@pytest.fixture
def prometheus(tmp_path, metrics_port):
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("needs prometheus: apt-get install prometheus")
    folder = tmp_path / "prometheus"
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(shipped_configuration(f"127.0.0.1:{metrics_port}")))
    address = f"127.0.0.1:{free_port()}"
    words = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([binary, *words, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield Server(f"http://{address}")
    finally:
        server.terminate()
        server.wait(30)


def test_a_run_is_scraped_and_its_rates_are_known(prometheus, metrics_port, tmp_path, monkeypatch):
    # Ray's own interval is ten seconds, and it forgets a gauge after two: the test need not wait for that.
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    write_parquet(tmp_path / "corpus.parquet", [*rows_of(600), *rows_of(3)])
    config = configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))
    ledger, name = Ledger(), config.corpus.identity
    corpus = f'{{corpus="{name}"}}'
    spec = StoreSpec(config.root, config.storage)
    # The runner outlives the run, so that the last figures are scraped too.
    with RayRunner(spec, ClusterConfig(num_cpus=2, metrics_port=metrics_port)) as runner:
        summary = run(config, spec, lambda: nullcontext(runner), ledger)
        # Figures do not arrive all at once.
        (released,) = prometheus.wait_for(f"ray_strata_release{corpus}")
        assert float(released["value"][1]) == summary["release"] == 1
        assert not any(name.startswith("otel_scope") for name in released["metric"])

        done = {stage: figures.done for stage, figures in ledger.stages.items()}
        expected = {
            f"sum by (stage) (ray_strata_tasks_total{corpus})": ("stage", done),
            f"ray_strata_recall_at_10{corpus}": ("corpus", {name: summary["recall_at_10"]}),
            f"ray_strata_dead_letters_total{corpus}": ("reason", {"duplicate": 3}),
            f"ray_strata_run_state{corpus}": ("corpus", {name: 0}),
        }
        for expression, (label, wanted) in expected.items():
            found = prometheus.wait_for(expression, lambda f, k=label, w=wanted: by(k, f) == w)
            assert by(label, found) == wanted

        rates = f"rate(ray_strata_rows_total{corpus}[1m])"
        assert by("stage", prometheus.wait_for(rates, lambda f: by("stage", f).keys() == done.keys())) != {}
        assert all(rate >= 0 for rate in by("stage", prometheus.query(rates)).values())
        for expression in live_panels():
            assert prometheus.wait_for(expression), expression
        # Ray forgets a gauge after two seconds here.
        seconds = f"count_over_time(ray_strata_stage_tasks{corpus}[8s:1s])"
        unbroken = prometheus.wait_for(seconds, lambda f: set(by("stage", f).values()) == {8.0})
        assert by("stage", unbroken) == dict.fromkeys(done, 8.0)


def live_panels():
    """Expressions of the dashboard that a run without trouble answers once it has ended."""
    silent = ("strata_ndcg_at_10", "strata_retries", "strata_worker_deaths", "strata_run_started")
    filled = [e.replace("$corpus", ".*").replace("$__rate_interval", "1m") for e in panel_expressions()]
    return [e for e in filled if "ray_strata" in e and not any(name in e for name in silent)]
