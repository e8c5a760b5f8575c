import numpy as np

from pipeline.postings.graph import HeadGraph


def heads_of(n, d=24, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((20, d))
    return (centres[np.sort(rng.integers(0, 20, n))] + 0.5 * rng.standard_normal((n, d))).astype(np.float32)


def exact(queries, heads, count):
    distances = np.square(queries[:, None] - heads).sum(axis=2)
    order = np.argsort(distances, axis=1)[:, :count]
    return order, np.take_along_axis(distances, order, axis=1)


def test_the_graph_finds_nearly_all_of_the_nearest_heads():
    heads, queries = heads_of(3000), heads_of(50, seed=1)
    numbers, distances = HeadGraph.build(heads).nearest(queries, 40)
    expected, apart = exact(queries, heads, 40)
    shared = [len(set(a) & set(b)) / 40 for a, b in zip(numbers.tolist(), expected.tolist(), strict=True)]
    assert np.mean(shared) > 0.99
    assert (np.diff(distances, axis=1) >= 0).all()
    np.testing.assert_allclose(np.square(queries[:, None] - heads[numbers]).sum(axis=2), distances, rtol=1e-4)
    np.testing.assert_allclose(distances[:, 0], apart[:, 0], rtol=1e-4)


def test_the_same_heads_give_the_same_bytes_which_give_the_same_answers(tmp_path):
    heads, queries = heads_of(500), heads_of(20, seed=1)
    graph = HeadGraph.build(heads)
    graph.write(tmp_path / "one")
    HeadGraph.build(heads).write(tmp_path / "other")
    data = (tmp_path / "one").read_bytes()
    assert (tmp_path / "other").read_bytes() == data
    for one, other in zip(
        HeadGraph.from_bytes(data).nearest(queries, 9), graph.nearest(queries, 9), strict=True
    ):
        assert np.array_equal(one, other)


def test_a_graph_of_few_heads_gives_all_of_them():
    heads = heads_of(3)
    numbers, distances = HeadGraph.build(heads).nearest(heads, 3)
    assert sorted(numbers[0].tolist()) == [0, 1, 2]
    assert numbers[:, 0].tolist() == [0, 1, 2]
    assert np.isfinite(distances).all()
