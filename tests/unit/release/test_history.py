import pytest

from pipeline.artifacts import AliasEntry
from pipeline.release.history import History, explain_conflict, find_gaps


def _entries(moves: str) -> tuple[AliasEntry, ...]:
    """`p1 p2 r1` → publish 1, publish 2, roll back to 1."""
    reasons = {"p": "publish", "r": "rollback"}
    return tuple(
        AliasEntry.model_validate(
            {
                "seq": seq,
                "release": int(move[1:]),
                "follows": seq - 1,
                "token": f"t{seq}",
                "reason": reasons[move[0]],
                "created": "",
            }
        )
        for seq, move in enumerate(moves.split(), start=1)
    )


@pytest.mark.parametrize(
    ("moves", "standing", "withdrawn"),
    [
        ("", (), set()),
        ("p1 p2 p3", (1, 2, 3), set()),
        ("p1 p2 p3 r2", (1, 2), {3}),
        ("p1 p2 p3 r2 r1", (1,), {2, 3}),
        ("p1 p2 p3 r1", (1,), {2, 3}),
        ("p1 p2 r1 p3", (1, 3), {2}),
        ("p1 p2 r1 p3 r1", (1,), {2, 3}),
        ("p1 p2 r1 r2", (1, 2), set()),
        ("p1 p2 r1 p2", (1, 2), set()),
        ("p1 p2 p1", (2, 1), set()),
        ("p1 r1", (1,), set()),
    ],
)
def test_history_says_what_stands_and_what_was_withdrawn(
    moves: str, standing: tuple[int, ...], withdrawn: set[int]
) -> None:
    history = History(_entries(moves))
    assert history.standing == standing
    assert history.withdrawn == withdrawn
    assert history.current == (standing[-1] if standing else None)


def test_a_log_without_gaps_has_no_problems() -> None:
    assert find_gaps(_entries("p1 p2 r1"), [1, 2]) == []


def test_gaps_and_unknown_releases_are_named() -> None:
    first, _, third = _entries("p1 p2 p7")
    problems = find_gaps([first, third], [1, 2])
    assert problems == [
        "alias entry 2 says that it is 3 after 2, expected 2 after 1",
        "alias entry 2 names release 7, which does not exist",
    ]


def test_the_three_conflicts_read_differently() -> None:
    first, second = _entries("p1 r1")
    created, moved, tampered = (
        explain_conflict(start, found)[0] for start, found in [(None, first), (first, second), (second, None)]
    )
    assert "another run created the alias" in created
    assert "expected entry 1 (release 1), found entry 2 (release 1) by rollback" in moved
    assert "entry 2, which this run had read when it started, is no longer there" in tampered
