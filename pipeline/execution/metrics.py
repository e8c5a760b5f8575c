"""Figures of a run under way, for Prometheus by way of Ray, which puts `ray_` before each name.

Only the driver records, from what workers hand back: one writer per figure, whatever the size of the cluster. A batch job
is often gone before anybody scrapes it: what must outlive the run is in its record (`recording`) and in the
textfile of `strata status` (`textfile`).
"""

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

__all__ = ["METRICS", "Metric", "Metrics", "NoMetrics", "RayMetrics", "exported_names", "label_value"]


@dataclass(frozen=True)
class Metric:
    """One figure; every figure has the label `corpus` too."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    description: str
    labels: tuple[str, ...] = ()


SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
"""Bounds of task durations: from a receipt found to a training that takes a quarter of an hour."""

DECLARED = (
    Metric("gauge", "strata_run_state", "1 while a run is under way, 0 when it ended"),
    Metric("gauge", "strata_run_started_timestamp_seconds", "When the run started, seconds since 1970"),
    Metric("counter", "strata_tasks_total", "Tasks by outcome: done, reused, failed", ("stage", "outcome")),
    Metric(
        "histogram", "strata_task_seconds", "Duration of tasks that were not reused, in seconds", ("stage",)
    ),
    Metric("counter", "strata_rows_total", "Rows in the files that a stage wrote or reused", ("stage",)),
    Metric("counter", "strata_bytes_total", "Bytes of the files that a stage wrote or reused", ("stage",)),
    Metric("counter", "strata_texts_encoded_total", "Texts that got a vector in this run"),
    Metric("counter", "strata_dead_letters_total", "Rows set aside, by kind of reason", ("reason",)),
    Metric(
        "counter", "strata_retries_total", "Attempts that were made again, by reason", ("stage", "reason")
    ),
    Metric("counter", "strata_worker_deaths_total", "Attempts that lost their worker", ("stage",)),
    Metric("gauge", "strata_stage_tasks", "Tasks of a stage", ("stage",)),
    Metric("gauge", "strata_stage_tasks_done", "Tasks of a stage that are done", ("stage",)),
    Metric("gauge", "strata_worker_peak_memory_bytes", "Largest resident memory of a worker", ("stage",)),
    Metric(
        "gauge", "strata_worker_memory_limit_bytes", "Memory that the configuration gives one", ("stage",)
    ),
    Metric("gauge", "strata_recall_at_10", "recall@10 of the index that was judged, against exact search"),
    Metric("gauge", "strata_ndcg_at_10", "nDCG@10 of the index that was judged, against the qrels"),
    Metric("gauge", "strata_release", "Release that is current after the run"),
)
METRICS = {metric.name: metric for metric in DECLARED}


def exported_names() -> frozenset[str]:
    """Names of the series as Prometheus sees them."""
    parts = {"histogram": ("_bucket", "_count", "_sum")}
    return frozenset(f"ray_{m.name}{part}" for m in DECLARED for part in parts.get(m.kind, ("",)))


def label_value(text: str) -> str:
    """A text as the value of a label: Ray takes ASCII alone, and ends whoever gives it anything else with an exception."""
    return text.replace("…", "...").encode("ascii", "xmlcharrefreplace").decode()


class Metrics(Protocol):
    """Where figures go."""

    def record(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter, set a gauge, or observe a value in a histogram.

        Args:
            name: One of `METRICS`.
            value: A counter ignores what is not above 0.
            labels: Exactly those declared.
        """
        ...


class NoMetrics:
    """Takes figures nowhere: a run without Ray."""

    def record(self, name: str, value: float = 1.0, **labels: str) -> None:
        pass


REPEAT_SECONDS = 1.0
"""Ray reports every ten seconds, and no setting makes it do so more than once a second."""


class RayMetrics(AbstractContextManager["RayMetrics"]):
    """Figures through `ray.util.metrics`, which the Ray node of this process exports.

    Ray exports a gauge that was set, then forgets it: without a repetition its series ends two reports later, and with it
    every alert that asks for a state. So gauges are set again for as long as this is entered.

    Args:
        corpus: Value of the label `corpus`.
    """

    def __init__(self, corpus: str) -> None:
        self._corpus = corpus
        self._declared = {metric.name: _declare(metric) for metric in DECLARED}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._repeater = threading.Thread(target=self._repeat, name="strata-gauges", daemon=True)

    def __enter__(self) -> Self:
        self._repeater.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._repeater.join()

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_SECONDS):
            with self._lock:
                for (name, tags), value in self._gauges.items():
                    self._declared[name].set(value, dict(tags))

    def record(self, name: str, value: float = 1.0, **labels: str) -> None:
        declared = self._declared[name]
        tags = {label: label_value(text) for label, text in {"corpus": self._corpus, **labels}.items()}
        match METRICS[name].kind:
            case "gauge":
                # Under the lock: an older value must not be repeated after a newer one.
                with self._lock:
                    self._gauges[name, tuple(tags.items())] = value
                    declared.set(value, tags)
            case "histogram":
                declared.observe(value, tags)
            case "counter" if value > 0:
                declared.inc(value, tags)
            case _:
                pass


def _declare(metric: Metric) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    labels = ("corpus", *metric.labels)
    match metric.kind:
        case "counter":
            return Counter(metric.name, metric.description, labels)
        case "gauge":
            return Gauge(metric.name, metric.description, labels)
        case "histogram":
            return Histogram(metric.name, metric.description, SECONDS, labels)
