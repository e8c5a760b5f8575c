import numpy as np
import pytest

from pipeline.config import EncoderConfig
from pipeline.embedding.faulty import FaultyEncoder
from pipeline.errors import DataError
from pipeline.evaluation.stage import encode_query_texts, read_query_vectors

ENCODER = FaultyEncoder(EncoderConfig(model="hashing:32!faulty"))
QUERIES = {"q1": "a river", "q2": "an engine", "q3": "faulty_raise"}


def _encode(store, queries):
    return encode_query_texts(
        store, ENCODER, texts=tuple(queries.values()), query_ids=tuple(queries), place="q.jsonl"
    )


def test_query_vectors_are_the_encoders_own(any_store):
    ref = _encode(any_store, QUERIES).files["queries"]
    assert np.array_equal(read_query_vectors(any_store, ref), ENCODER.encode_queries(list(QUERIES.values())))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise", "RuntimeError: this text was marked to fail"),
        ("nan", "its vector has NaN"),
        ("zero", "its vector has no length"),
    ],
)
def test_a_query_that_cannot_be_encoded_is_named(any_store, fault, said):
    with pytest.raises(DataError, match=f"q.jsonl: query q2 cannot be encoded: {said}"):
        _encode(any_store, QUERIES | {"q2": f"an engine faulty_query_{fault}"})
