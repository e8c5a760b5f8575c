from prometheus_client.parser import text_string_to_metric_families

from pipeline.config import Config, CorpusConfig, EncoderConfig, GatesConfig
from pipeline.execution.metrics import label_value
from pipeline.execution.textfile import TEXTFILE_METRICS, write_textfile
from tests.unit.release.test_runs import record

CONFIG = Config(
    root="r",
    corpus=CorpusConfig(uri="c", format="parquet", text=("t",), name='a "quoted" corpus'),
    encoders={"e": EncoderConfig(model="hashing:8")},
    gates=GatesConfig(min_recall_at_10=0.9),
)
SUMMARY = {"documents": 7, "dead_letters": 2, "recall_at_10": 0.97, "ndcg_at_10": 0.5}


def written(tmp_path, runs, release=3):
    path = tmp_path / "strata.prom"
    write_textfile(path, CONFIG, release, runs)
    assert list(tmp_path.iterdir()) == [path]
    families = text_string_to_metric_families(path.read_text())
    found = [sample for family in families for sample in family.samples]
    assert {sample.labels["corpus"] for sample in found} == {'a "quoted" corpus'}
    return {sample.name: sample.value for sample in found}


def finished(n):
    return record(n).model_copy(update={"summary": SUMMARY})


def failed(n):
    return record(n, status="failed").model_copy(update={"exit_code": 65, "seconds": 9.0})


def test_labels_are_those_of_the_live_series():
    assert label_value('C:\\ "wiki"') == 'C:\\ "wiki"'
    assert label_value("Bücher … №1") == "B&#252;cher ... &#8470;1"


def test_every_figure_of_a_successful_run_is_there(tmp_path):
    found = written(tmp_path, [finished(1)])
    assert set(found) == set(TEXTFILE_METRICS)
    assert found["strata_last_success_timestamp_seconds"] == finished(1).finished.timestamp()
    assert found["strata_current_recall_at_10"] == 0.97
    assert found["strata_gate_min_recall_at_10"] == 0.9


def test_failures_are_counted_since_the_last_success_and_stopped_runs_are_none(tmp_path):
    stopped = record(5, status="stopped").model_copy(update={"exit_code": 143})
    found = written(tmp_path, [failed(1), finished(2), failed(3), stopped, failed(6)])
    assert found["strata_consecutive_failures"] == 2
    assert found["strata_last_run_exit_code"] == 65
    assert found["strata_last_run_seconds"] == 9.0
    assert found["strata_last_success_timestamp_seconds"] == finished(2).finished.timestamp()
    assert found["strata_current_documents"] == 7


def test_what_never_happened_has_no_sample(tmp_path):
    assert set(written(tmp_path, [], release=None)) == {
        "strata_consecutive_failures",
        "strata_gate_min_recall_at_10",
    }
