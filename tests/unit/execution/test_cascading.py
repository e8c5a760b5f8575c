"""Which documents a cascade embeds."""

from pipeline.execution.cascading import admitted
from pipeline.index.reader import Hit


def _hits(text):
    return [Hit(doc, 0.5) for doc in text]


def test_whatever_a_query_finds_among_its_first_ones_is_admitted_unless_more_must_find_it():
    found = [_hits("abx"), _hits("bcx"), _hits("bx")]
    assert admitted(found, depth=2, admit=0) == ["a", "b", "c", "x"]
    assert admitted(found, depth=1, admit=0) == ["a", "b"]
    assert admitted(found, depth=2, admit=2) == ["b"]
    assert admitted(found, depth=3, admit=3) == ["b", "x"]


def test_a_query_counts_by_its_weight():
    found = [_hits("ab"), _hits("bc")]
    assert admitted(found, depth=2, admit=5, weights=(5.0, 1.0)) == ["a", "b"]
    assert admitted(found, depth=2, admit=0, weights=(0.1, 0.2)) == ["a", "b", "c"]


def test_fractions_of_a_query_add_up_in_any_order():
    for weights in ((0.7, 0.2, 0.1), (0.1, 0.2, 0.7)):
        assert admitted([_hits("a")] * 3, depth=1, admit=1, weights=weights) == ["a"]
