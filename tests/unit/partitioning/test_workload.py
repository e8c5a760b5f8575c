"""Past queries as filters with weights."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import StorageConfig
from pipeline.errors import CorruptArtifactError, MissingFileError, SchemaMismatchError
from pipeline.partitioning import read_workload, summarize

SCHEMA = pa.schema([("kind", pa.string()), ("n", pa.int64())])


def test_filters_that_mean_the_same_are_counted_as_one():
    asked = [("n > 1 AND kind = 'a'", 2.0), ("kind='a' and 1 < n", 1.0), (None, 1.0), ("n = 4", 1.0)]
    found = summarize(asked, SCHEMA, coverage=1.0)
    assert [one.text for one in found.filters] == ['"kind" = \'a\' AND "n" > 1', '"n" = 4']
    assert found.weights == (0.6, 0.2)
    assert found.unfiltered == 0.2


def test_rare_filters_are_left_out_once_the_others_cover_enough():
    asked = [(f"n = {i}", weight) for i, weight in enumerate([50.0, 30.0, 15.0, 4.0, 1.0])]
    assert len(summarize(asked, SCHEMA, coverage=0.8).filters) == 2
    assert len(summarize(asked, SCHEMA, coverage=0.95).filters) == 3
    assert len(summarize(asked, SCHEMA).filters) == 4


def test_a_filter_that_does_not_fit_is_set_aside_with_the_reason():
    found = summarize([("n = 1", 3.0), ("gone = 2", 1.0)], SCHEMA)
    assert found.weights == (0.75,)
    assert found.unreadable == 0.25
    assert "gone" in found.reason


def test_the_fingerprint_is_of_the_filters_and_not_of_their_order_or_wording():
    one = summarize([("n = 1", 1.0), ("n = 2", 2.0)], SCHEMA)
    assert one.fingerprint == summarize([("n=2", 2.0), ("1 = n", 1.0)], SCHEMA).fingerprint
    assert one.fingerprint != summarize([("n = 1", 2.0), ("n = 2", 1.0)], SCHEMA).fingerprint


def read(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "workload.parquet")
    return read_workload(str(tmp_path / "workload.parquet"), StorageConfig(), SCHEMA)


def test_a_file_of_filters_is_read_with_weights_or_without(tmp_path):
    assert read(tmp_path, filter=["n = 1", None], weight=[3, 1]).weights == (0.75,)
    assert read(tmp_path, filter=["n = 1", None], query=["a", "b"]).weights == (0.5,)
    assert read(tmp_path, filter=pa.nulls(3)).unfiltered == 1.0


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"where": ["n = 1"]}, "column filter"),
        ({"filter": [1]}, "strings in `filter`"),
        ({"filter": ["n = 1"], "weight": ["x"]}, "numbers in `weight`"),
        ({"filter": ["n = 1"], "weight": [-1.0]}, "weight from 0, found -1.0"),
        ({"filter": ["n = 1"], "weight": [float("nan")]}, "weight from 0, found nan"),
        ({"filter": ["n = 1"], "weight": pa.array([None], pa.float64())}, "found None"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path, columns, problem):
    with pytest.raises(SchemaMismatchError, match=problem):
        read(tmp_path, **columns)


def test_a_file_that_is_not_there_or_not_parquet_is_refused(tmp_path):
    with pytest.raises(MissingFileError):
        read_workload(str(tmp_path / "none.parquet"), StorageConfig(), SCHEMA)
    (tmp_path / "bad.parquet").write_text("filter\n")
    with pytest.raises(CorruptArtifactError):
        read_workload(str(tmp_path / "bad.parquet"), StorageConfig(), SCHEMA)
