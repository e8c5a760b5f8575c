import numpy as np
import pytest
import torch

from pipeline.binarization import binarize, decode, fit_binarizer, rotate_queries, score, to_tensors
from pipeline.binarization.compatible import fit_compatible, fit_reader, train_compatible, train_reader
from pipeline.binarization.descending import divergence
from pipeline.binarization.learning import learn_binarizer, mine_neighbours
from pipeline.config import BinarizerConfig
from tests.unit.binarization.test_learning import clustered

OLD_LEVELS, LEVELS = (24, 16, 8), (40, 24, 24, 8)


def two_encoders(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The same texts by an old encoder of 32 dimensions, and by a new one of 48 that sees more and turns it all."""
    rng = np.random.default_rng(3)
    seen_by_both, new = clustered(n), 0.4 * clustered(n, 16, seed=8)
    turn = np.linalg.qr(rng.standard_normal((48, 48)))[0]
    both = np.hstack([seen_by_both, new]) @ turn
    return seen_by_both, (both / np.linalg.norm(both, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> tuple[np.ndarray, np.ndarray]:
    return two_encoders(1500)


@pytest.fixture(scope="module")
def old(vectors):
    sample = vectors[0][:1200]
    rotation = fit_binarizer(sample, config=BinarizerConfig(levels=OLD_LEVELS), rng=np.random.default_rng(0))
    binarizer = learn_binarizer(rotation, mine_neighbours(sample, np.random.default_rng(1)).pairs(sample))
    return binarizer, binarize(binarizer, sample)


@pytest.fixture(scope="module")
def head(vectors, old):
    return fit_compatible(vectors[1][:1200], *old, levels=LEVELS, rng=np.random.default_rng(2))


@pytest.fixture(scope="module")
def trained(vectors, old, head):
    sample, rising = vectors[1][:1200], iter(range(100))
    return train_compatible(
        head,
        sample,
        old[1],
        mine_neighbours(sample, np.random.default_rng(1)),
        hidden=0,
        recall=lambda _: float(next(rising)),
        seed=4,
    )


def overlap(queries: np.ndarray, base: np.ndarray, scores: np.ndarray) -> float:
    """Share of the ten nearest of the base in the top ten of the scores."""
    exact, found = (np.argsort(-s, axis=1)[:, :10] for s in (queries @ base.T, scores))
    return float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]))


def new_on_old(head, old, queries: np.ndarray, base: np.ndarray) -> float:
    return overlap(queries, base, score(head.reader, rotate_queries(head.reader, queries), *old[1]))


def test_the_rotation_is_orthonormal_and_loses_nothing_of_new_vectors(head) -> None:
    rotation = head.binarizer.rotation
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(40), atol=1e-5)
    assert head.binarizer.levels == LEVELS
    assert (head.binarizer.weights >= 0).all()


def test_new_queries_find_in_old_codes_much_of_what_old_queries_find(vectors, old, head) -> None:
    base, queries = vectors[1][:1200], vectors[1][1200:]
    old_queries = vectors[0][1200:]
    status_quo = overlap(queries, base, score(old[0], rotate_queries(old[0], old_queries), *old[1]))
    naive = overlap(queries, base, (queries - base.mean(axis=0))[:, :24] @ decode(*old_decoded(old)).T)
    found = new_on_old(head, old, queries, base)
    assert found > 0.85 * status_quo
    assert found > naive + 0.1


def old_decoded(old):
    return old[0], old[1].code


def test_training_brings_new_queries_and_codes_nearer_to_old_codes(vectors, old, head, trained) -> None:
    base, queries = vectors[1][:1200], vectors[1][1200:]
    after, curve = trained
    losses = [look.loss for look in curve if look.loss is not None]
    assert losses[-1] < 0.97 * losses[0]
    wanted = torch.from_numpy(queries @ base.T - (queries @ base.mean(axis=0))[:, None])
    before, now = (
        float(
            divergence(torch.from_numpy(score(h.reader, rotate_queries(h.reader, queries), *old[1])), wanted)
        )
        for h in (head, after)
    )
    assert now < before - 0.001


def test_a_reader_alone_is_trained_as_far_as_within_its_head(vectors, old, head, trained) -> None:
    sample, rising = vectors[1][:1200], iter(range(100))
    neighbours = mine_neighbours(sample, np.random.default_rng(1))
    start = fit_reader(sample, *old)
    np.testing.assert_allclose(start.rotation, head.reader.rotation, atol=1e-6)
    alone, curve = train_reader(
        start, sample, old[1], neighbours, recall=lambda _: float(next(rising)), seed=4
    )
    np.testing.assert_allclose(alone.rotation, trained[0].reader.rotation, atol=1e-6)
    assert len(curve) == len(trained[1])


def test_the_prefix_of_a_new_code_finds_its_old_code(vectors, old, trained) -> None:
    binarizer, base = trained[0].binarizer, vectors[1][:1200]
    prefix = decode(binarizer, binarize(binarizer, base).code)[:, : OLD_LEVELS[0]]
    values = decode(*old_decoded(old))
    cosines = (prefix / np.linalg.norm(prefix, axis=1, keepdims=True)) @ (
        values / np.linalg.norm(values, axis=1, keepdims=True)
    ).T
    assert (cosines.argmax(axis=1) == np.arange(1200)).mean() > 0.5


def test_new_codes_find_new_vectors_about_as_well_as_a_head_of_their_own(vectors, trained) -> None:
    base, queries = vectors[1][:1200], vectors[1][1200:]
    own = fit_binarizer(base, config=BinarizerConfig(levels=LEVELS), rng=np.random.default_rng(0))
    found, best = (
        overlap(queries, base, score(b, rotate_queries(b, queries), *binarize(b, base)))
        for b in (trained[0].binarizer, own)
    )
    assert found > 0.85 * best


def test_fitting_twice_gives_the_same_bytes(vectors, old, head) -> None:
    again = fit_compatible(vectors[1][:1200], *old, levels=LEVELS, rng=np.random.default_rng(2))
    for one, other in ((head.binarizer, again.binarizer), (head.reader, again.reader)):
        assert [v.tobytes() for v in to_tensors(one).values()] == [
            v.tobytes() for v in to_tensors(other).values()
        ]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((24, 8, 8), "expected a prefix of levels"),
        ((40, 32, 8), "end at the old codes' 24 dimensions"),
        ((56, 24, 8), "within the vectors' 48"),
    ],
)
def test_levels_that_old_codes_are_no_prefix_of_are_refused(vectors, old, levels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_compatible(vectors[1][:1200], *old, levels=levels, rng=np.random.default_rng(2))


@pytest.mark.parametrize("rank", [26, 48])
def test_what_completes_the_old_dimensions_is_orthogonal_to_them_in_few_directions_too(
    old, vectors, rank
) -> None:
    rng = np.random.default_rng(5)
    flat = (vectors[1][:1200] @ rng.standard_normal((48, rank)) @ rng.standard_normal((rank, 48))).astype(
        np.float32
    )
    head = fit_compatible(flat, *old, levels=LEVELS, rng=np.random.default_rng(2))
    rotation = head.binarizer.rotation
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(40), atol=1e-5)


def test_vectors_that_are_all_alike_are_refused(vectors, old) -> None:
    alike = np.repeat(vectors[1][:1], 1200, axis=0)
    with pytest.raises(ValueError, match="expected vectors and codes that differ"):
        fit_compatible(alike, *old, levels=LEVELS, rng=np.random.default_rng(2))


def test_codes_of_other_rows_are_refused(vectors, old) -> None:
    with pytest.raises(ValueError, match="expected codes of 1100 vectors, found 1200"):
        fit_compatible(vectors[1][:1100], *old, levels=LEVELS, rng=np.random.default_rng(2))
