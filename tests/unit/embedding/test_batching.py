"""Length buckets: what may share a batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.embedding.batching import BUCKET_TOKENS, Batch, halves, pad_features, plan_batches

lengths_of = st.lists(st.integers(0, 300), max_size=60).map(lambda values: np.array(values, dtype=np.int64))


@given(lengths_of, st.integers(16, 2048))
def test_every_text_is_in_exactly_one_batch(lengths: np.ndarray, batch_tokens: int) -> None:
    rows = [row for b in plan_batches(lengths, longest=None, batch_tokens=batch_tokens) for row in b.rows]
    assert sorted(rows) == list(range(len(lengths)))


@given(lengths_of, st.integers(16, 2048), st.sampled_from([None, 300, 310]))
def test_padded_length_and_masking_depend_on_the_text_alone(
    lengths: np.ndarray, tokens: int, longest: int | None
) -> None:
    for batch in plan_batches(lengths, longest=longest, batch_tokens=tokens):
        for row in batch.rows:
            (alone,) = plan_batches(lengths[row : row + 1], longest=longest, batch_tokens=tokens)
            assert alone.length == batch.length
        assert len({bool(lengths[row] == batch.length) for row in batch.rows}) == 1


@given(lengths_of, st.integers(16, 2048))
def test_batches_keep_the_token_budget(lengths: np.ndarray, batch_tokens: int) -> None:
    for batch in plan_batches(lengths, longest=None, batch_tokens=batch_tokens):
        assert len(batch.rows) == 1 or len(batch.rows) * batch.length <= batch_tokens


@given(lengths_of)
def test_padding_stays_below_a_bucket_and_within_the_models_positions(lengths: np.ndarray) -> None:
    for batch in plan_batches(lengths, longest=300, batch_tokens=512):
        assert batch.length <= 300
        assert all(0 <= batch.length - lengths[row] <= BUCKET_TOKENS for row in batch.rows)


@given(lengths_of)
def test_whole_batches_of_one_length_have_one_size(lengths: np.ndarray) -> None:
    batches = list(plan_batches(lengths, longest=None, batch_tokens=512, whole=True))
    assert len({(b.length, b.size) for b in batches}) == len({b.length for b in batches})


def test_padding_is_put_behind_or_in_front() -> None:
    encodings = {"input_ids": [[7, 8], [9]], "attention_mask": [[1, 1], [1]]}
    batch = Batch(np.array([1, 0]), length=3, size=2)
    behind = pad_features(encodings, batch, {"input_ids": 5})
    assert behind["input_ids"].tolist() == [[9, 5, 5], [7, 8, 5]]
    assert behind["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0]]
    front = pad_features(encodings, batch, {"input_ids": 5}, left=True)
    assert front["input_ids"].tolist() == [[5, 5, 9], [5, 7, 8]]


def test_rows_beyond_the_texts_repeat_the_first() -> None:
    found = pad_features({"input_ids": [[7, 8]]}, Batch(np.array([0]), length=2, size=3), {})
    assert found["input_ids"].tolist() == [[7, 8]] * 3


@pytest.mark.parametrize(
    ("rows", "size", "wanted"),
    [
        (8, 8, [(4, 4), (4, 4)]),
        (5, 5, [(3, 3), (2, 2)]),
        (3, 8, [(3, 4)]),
        (5, 8, [(4, 4), (1, 4)]),
        (2, 2, [(1, 1), (1, 1)]),
    ],
)
def test_half_a_batch_holds_half_the_rows_and_keeps_a_fixed_size(
    rows: int, size: int, wanted: list[tuple[int, int]]
) -> None:
    found = halves(Batch(np.arange(rows), 16, size))
    assert [(len(batch.rows), batch.size) for batch in found] == wanted
    assert np.concatenate([batch.rows for batch in found]).tolist() == list(range(rows))
