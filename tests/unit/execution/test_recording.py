import pytest
import structlog

from pipeline.errors import DataError
from pipeline.execution.recording import recorded
from pipeline.release import read_runs
from pipeline.storage import LocalStore
from tests.integration.roads import configured, settings


@pytest.fixture
def config(tmp_path):
    return configured(tmp_path, settings(tmp_path / "root", tmp_path / "corpus.parquet"))


def _run(config, error):
    with recorded(config, lambda _: 65):
        raise error


def test_a_failed_run_leaves_a_record_with_its_exit_code(config):
    with pytest.raises(DataError):
        _run(config, DataError("row 3", "is bad", "mend it"))
    (record,) = read_runs(LocalStore(config.root), last=9)
    assert (record.status, record.exit_code, record.error) == ("failed", 65, "DataError")


def test_a_record_that_cannot_be_made_does_not_replace_the_failure(config):
    """A file name that is no UTF-8 reaches messages with surrogates, which JSON in UTF-8 cannot hold."""
    with (
        structlog.testing.capture_logs() as log,
        pytest.raises(DataError, match="is bad"),
    ):
        _run(config, DataError("corpus/\udcff.parquet", "is bad", "mend it"))
    events = {line["event"]: line for line in log}
    assert events["run_not_recorded"]["reason"] in {"UnicodeEncodeError", "ValidationError"}
    assert events["run_failed"]["exit_code"] == 65
