import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.index.scoring import Candidates, best_documents, best_rows, groups_of_lists, spans_of

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40)


@given(SCORES, st.integers(1, 50), st.randoms())
def test_best_rows_equal_a_full_sort_whatever_the_order_of_the_input(scores, depth, random):
    rows = list(enumerate(scores))
    random.shuffle(rows)
    given_rows = Candidates(np.array([p for p, _ in rows]), np.array([s for _, s in rows], np.float32))
    wanted = sorted(rows, key=lambda row: (-row[1], row[0]))[:depth]
    assert best_rows(given_rows, depth).places.tolist() == [place for place, _ in wanted]


def _ids(pairs):
    return np.array(
        [list(doc.to_bytes(12, "big") + chunk.to_bytes(4, "big")) for doc, chunk in pairs], np.uint8
    ).reshape(-1, 16)


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])),
        unique_by=lambda t: t[:2],
        min_size=1,
    ),
    st.integers(1, 8),
)
def test_each_document_comes_once_with_its_best_chunk(rows, k):
    found = best_documents(_ids([r[:2] for r in rows]), np.array([r[2] for r in rows], np.float32), k)
    best = {}
    for doc, chunk, score in sorted(rows, key=lambda r: (-r[2], r[0], r[1])):
        best.setdefault(doc, (doc, chunk, score))
    assert [rows[i] for i in found] == list(best.values())[:k]


@given(st.lists(st.lists(st.integers(0, 9), unique=True), max_size=6))
def test_groups_hold_every_probe_exactly_once(probed):
    wanted = sorted((query, number) for query, lists in enumerate(probed) for number in lists)
    arrays = [np.array(lists, np.int64) for lists in probed]
    found = sorted(
        (int(q), int(n)) for lists, queries in groups_of_lists(arrays) for q in queries for n in lists
    )
    assert found == wanted


@given(st.sets(st.integers(0, 50)))
def test_spans_cover_exactly_the_rows(rows):
    spans = spans_of(np.array(sorted(rows), np.int64))
    assert [row for start, stop in spans for row in range(start, stop)] == sorted(rows)
    assert all(b < c for (_, b), (c, _) in zip(spans, spans[1:], strict=False))
