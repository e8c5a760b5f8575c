"""What a workload looks into, and how much of it is new."""

import pyarrow as pa
import pytest

from pipeline.filters import Region, parse_filter
from pipeline.partitioning import reach_of, summarize, unseen_share

SCHEMA = pa.schema([("kind", pa.string())])


def region(text, *, holds=True):
    return Region().where(parse_filter(text, SCHEMA).predicate, holds=holds)


def test_queries_count_the_rows_of_the_partitions_that_they_can_have_a_match_in():
    regions = [region("kind = 'a'"), region("kind = 'a'", holds=False)]
    asked = summarize([("kind = 'a'", 2.0), ("kind = 'b'", 1.0), (None, 1.0), ("gone = 1", 6.0)], SCHEMA)
    reach = reach_of(regions, [10, 90], asked)
    assert reach.rows == pytest.approx((2 * 10 + 90 + 100) / 4)
    assert reach.partitions == pytest.approx(5 / 4)
    assert reach.cost(100) == pytest.approx(reach.rows + 125)


def test_filters_that_were_not_fitted_are_unseen_by_their_weight():
    asked = summarize([("kind = 'a'", 3.0), ("kind = 'b'", 1.0), (None, 9.0)], SCHEMA, coverage=1.0)
    assert unseen_share({"\"kind\" = 'a'": 0.1}, asked) == pytest.approx(0.25)
    assert unseen_share({}, summarize([(None, 1.0)], SCHEMA)) == 0
