"""What alerts need to know of jobs that live for minutes, as a file for Prometheus's node exporter.

`strata status CONF --metrics FILE` writes it from the records of runs in the root; point the node exporter's textfile
collector at the file's folder. The format: https://github.com/prometheus/node_exporter#textfile-collector
"""

from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from pipeline.artifacts import RunRecord
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.execution.metrics import label_value

__all__ = ["TEXTFILE_METRICS", "write_textfile"]

TEXTFILE_METRICS = {
    "strata_last_run_timestamp_seconds": "When the newest run ended, seconds since 1970",
    "strata_last_run_seconds": "How long the newest run took",
    "strata_last_run_exit_code": "Exit code of the newest run",
    "strata_last_success_timestamp_seconds": "When the newest successful run ended, seconds since 1970",
    "strata_last_success_seconds": "How long it took",
    "strata_consecutive_failures": "Runs that failed since the newest successful one",
    "strata_current_release": "Release that is current",
    "strata_current_documents": "Documents in the newest successful run's release",
    "strata_current_dead_letters": "Rows that the newest successful run set aside",
    "strata_current_recall_at_10": "recall@10 of that release, against exact search",
    "strata_current_ndcg_at_10": "nDCG@10 of that release, against the qrels",
    "strata_gate_min_recall_at_10": "Least recall@10 that the configuration lets pass",
}
FIGURES = {
    "strata_current_documents": "documents",
    "strata_current_dead_letters": "dead_letters",
    "strata_current_recall_at_10": "recall_at_10",
    "strata_current_ndcg_at_10": "ndcg_at_10",
}


def write_textfile(path: Path, config: Config, release: int | None, runs: Sequence[RunRecord]) -> None:
    """Write the figures of the newest runs, in one rename.

    Args:
        path: The file; a textfile collector reads those that end in `.prom`.
        config: Names the corpus, and has the gates.
        release: That is current.
        runs: Newest records, oldest of them first.

    Raises:
        ConfigError: The file cannot be written.
    """
    registry = CollectorRegistry()
    for name, value in _values(config, release, runs).items():
        gauge = Gauge(name, TEXTFILE_METRICS[name], ["corpus"], registry=registry)
        gauge.labels(corpus=label_value(config.corpus.identity)).set(value)
    try:
        write_to_textfile(str(path), registry)
    except OSError as error:
        raise ConfigError(
            str(path), f"cannot be written ({error.strerror})", "name a file in a folder that exists"
        ) from error


def _values(config: Config, release: int | None, runs: Sequence[RunRecord]) -> dict[str, float]:
    """Figures that are known; what never happened has no sample rather than a 0."""
    found: dict[str, float] = {"strata_consecutive_failures": _failures(runs)}
    if release is not None:
        found["strata_current_release"] = release
    if config.gates.min_recall_at_10 is not None:
        found["strata_gate_min_recall_at_10"] = config.gates.min_recall_at_10
    if runs:
        found["strata_last_run_timestamp_seconds"] = runs[-1].finished.timestamp()
        found["strata_last_run_seconds"] = runs[-1].seconds
        found["strata_last_run_exit_code"] = runs[-1].exit_code
    for success in [record for record in runs if record.status == "finished"][-1:]:
        found["strata_last_success_timestamp_seconds"] = success.finished.timestamp()
        found["strata_last_success_seconds"] = success.seconds
        known = {name: success.summary.get(field) for name, field in FIGURES.items()}
        found |= {name: float(value) for name, value in known.items() if isinstance(value, int | float)}
    return found


def _failures(runs: Sequence[RunRecord]) -> int:
    """Failed runs since the newest successful one; a run that somebody stopped is neither."""
    failed = 0
    for record in reversed(runs):
        if record.status == "finished":
            break
        failed += record.status == "failed"
    return failed
