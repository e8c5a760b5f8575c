import numpy as np
import pytest

from pipeline.binarization import choose_binarizer, to_tensors
from pipeline.binarization.choosing import FEWEST_QUERIES, hold_out
from pipeline.binarization.learning import Pairs, is_held_out
from pipeline.binarization.pooling import MOST_REPEATS, fill_pool, mined_pool, split_pairs
from pipeline.config import BinarizerConfig
from tests.unit.binarization.test_learning import clustered

SIZE = BinarizerConfig(bytes=6)


def asked(documents: np.ndarray, *, seed: int = 5) -> np.ndarray:
    """A query of each document: near it, and all of them shifted to where no document is."""
    noise = np.random.default_rng(seed).standard_normal(documents.shape)
    shift = np.zeros(documents.shape[1])
    shift[2] = 0.8
    queries = documents + 0.08 * noise + shift
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)


def pairs_of(documents: np.ndarray) -> Pairs:
    rows = np.arange(len(documents))
    return Pairs(asked(documents), documents, rows, rows)


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return clustered(3000)


@pytest.fixture(scope="module")
def train(sample):
    return sample[~is_held_out(sample)]


@pytest.fixture(scope="module")
def mined(train):
    return mined_pool(train, np.random.default_rng(0))


def test_queries_stand_behind_the_documents_and_look_for_documents_only(train, mined) -> None:
    others = clustered(40, seed=8)
    pool = fill_pool(mined, pairs_of(np.concatenate([train[:60], others])))
    assert np.array_equal(pool.documents[: len(train)], train)
    assert np.array_equal(pool.documents[len(train) :], others)
    assert np.array_equal(pool.vectors[: len(pool.documents)], pool.documents)
    assert len(pool.vectors) == len(pool.documents) + 100
    rows, nearest = pool.neighbours
    given = rows >= len(pool.documents)
    assert set(rows[given]) == set(range(len(pool.documents), len(pool.vectors)))
    assert nearest.max() < len(pool.documents)
    assert pool.given == 100


def test_the_wanted_document_comes_first_and_none_comes_twice(train, mined) -> None:
    # The second query wants what it is farthest from, the first what it is nearest to.
    queries = asked(train[:2])
    farthest = int((train @ queries[1]).argmin())
    nearest = int((train @ queries[0]).argmax())
    documents = train[[nearest, farthest]]
    pool = fill_pool(mined, Pairs(queries, documents, np.arange(2), np.arange(2)))
    for query, wanted in ((0, nearest), (1, farthest)):
        row = len(pool.documents) + query
        found = pool.neighbours.nearest[pool.neighbours.rows == row][0]
        assert found[0] == wanted
        assert len(set(found)) == len(found) == mined.neighbours.nearest.shape[1]
        ranked = np.argsort(-(train @ pool.vectors[row]), kind="stable")
        expected = [i for i in ranked if i != wanted][: len(found) - 1]
        assert set(found[1:]) == set(expected)


def test_equal_queries_and_equal_documents_are_one_row_each(train, mined) -> None:
    one = pairs_of(clustered(5, seed=9))
    many = Pairs(np.tile(one.queries, (3, 1)), np.tile(one.documents, (3, 1)), np.arange(15), np.arange(15))
    pool = fill_pool(mined, many)
    assert len(pool.documents) == len(train) + 5
    assert len(pool.vectors) == len(pool.documents) + 5
    assert pool.given == 15


@pytest.mark.parametrize(("given", "repeats"), [(10, MOST_REPEATS), (1000, 2), (2000, 1)])
def test_given_pairs_are_repeated_up_to_half_of_all(train, mined, given: int, repeats: int) -> None:
    pool = fill_pool(mined, pairs_of(train[:given]))
    rows = pool.neighbours.rows
    counts = np.bincount(rows[rows >= len(pool.documents)] - len(pool.documents))
    assert (counts == repeats).all()
    assert len(rows) == len(mined.neighbours.rows) + repeats * given
    in_closed_form = pool.pairs.query_rows >= len(pool.documents)
    assert in_closed_form.sum() == given * min(MOST_REPEATS, len(mined.pairs.query_rows) // given)


def test_a_held_out_query_is_in_no_pair_and_the_split_follows_content(sample) -> None:
    pairs = pairs_of(sample)
    kept, held_out = split_pairs(pairs, fewest=2 * FEWEST_QUERIES)
    judges = {query.tobytes() for query in held_out}
    assert 0.08 < len(held_out) / len(sample) < 0.17
    assert not judges & {query.tobytes() for query in kept.queries[kept.query_rows]}
    order = np.random.default_rng(0).permutation(len(sample))
    shuffled = Pairs(pairs.queries, pairs.documents, pairs.query_rows[order], pairs.document_rows[order])
    again, same = split_pairs(shuffled, fewest=2 * FEWEST_QUERIES)
    assert np.array_equal(same, held_out)
    assert len(again.query_rows) == len(kept.query_rows)
    for pair in (0, 17, 200):
        query = kept.queries[kept.query_rows[pair]]
        document = kept.documents[kept.document_rows[pair]]
        row = int((pairs.queries == query).all(axis=1).argmax())
        assert np.array_equal(document, pairs.documents[row])


def test_what_the_sample_holds_out_is_in_no_pair(sample) -> None:
    kept, _ = split_pairs(pairs_of(sample), fewest=2 * FEWEST_QUERIES)
    assert is_held_out(sample).any()
    assert not is_held_out(kept.documents).any()


def test_too_few_queries_judge_nothing_and_all_are_trained_on(sample) -> None:
    documents = sample[:100]
    kept, held_out = split_pairs(pairs_of(documents), fewest=2 * FEWEST_QUERIES)
    assert len(held_out) == 0
    assert len(kept.query_rows) == (~is_held_out(documents)).sum()
    choice = choose_binarizer(sample, config=SIZE, seed=0, pairs=pairs_of(documents))
    assert choice.judged_on == "vectors"
    assert choice.given_pairs == len(kept.query_rows)


def test_given_queries_judge_and_what_is_learned_from_them_finds_more_for_such_queries(sample) -> None:
    config = BinarizerConfig(bytes=6, method="learned")
    mined = choose_binarizer(sample, config=config, seed=0)
    given = choose_binarizer(sample, config=config, seed=0, pairs=pairs_of(sample))
    assert (mined.judged_on, mined.given_pairs) == ("vectors", 0)
    assert given.judged_on == "queries"
    _, held_out = split_pairs(pairs_of(sample), fewest=2 * FEWEST_QUERIES)
    assert given.held_out_queries == len(held_out) // 2
    documents = clustered(3300)[3000:]
    judges = hold_out(asked(documents, seed=6), sample)
    assert judges.recall(given.binarizer) > judges.recall(mined.binarizer)


def test_learning_from_the_same_pairs_twice_gives_the_same_bytes(sample) -> None:
    runs = [choose_binarizer(sample, config=SIZE, seed=0, pairs=pairs_of(sample)) for _ in range(2)]
    first, second = (
        {name: array.tobytes() for name, array in to_tensors(choice.binarizer).items()} for choice in runs
    )
    assert first == second
