"""Must-show: what even lists, copies and pruning each save of the bytes read for the same recall."""

import faiss
import numpy as np
import pytest

from pipeline.clustering import HeadTree, NearHeads, Prices, assign, charged_lists, near_heads
from pipeline.config import SizedLayout
from pipeline.index.assembly import PLACED_AMONG
from pipeline.index.training import (
    ROUNDS,
    GrownTree,
    after_round,
    grown_rows,
    sort_into_lists,
    train_branch,
    train_trunk,
)
from pipeline.postings import kept_entries, longest_list, replicas_of
from tests.benchmarks.real_vectors import NEAREST, real_set

RECALLS = (0.9, 0.95, 0.98, 0.99)
ENTRY_BYTES = 48 + 8
MAXIMA = tuple(np.unique(np.geomspace(1, 1500, 60).astype(int)).tolist())
MARGINS = tuple(np.linspace(0.02, 0.6, 40).tolist())
BLOCK = 50_000
SAME = 1.05
"""Of bytes: what even lists may cost. They bound the longest."""


def _once_each(vectors):
    """Of equal vectors the first: copies fill lists that are split later, whatever the clustering does."""
    rows = np.ascontiguousarray(vectors).view(f"V{4 * vectors.shape[1]}").reshape(-1)
    return vectors[np.sort(np.unique(rows, return_index=True)[1])]


def one_partition(vectors):
    return np.zeros(len(vectors), np.int32)


def _grown(base, layout):
    """Heads by k-means in two levels, without prices, and the sample."""
    rng = np.random.default_rng(1)
    sample = base[np.sort(rng.choice(len(base), grown_rows(len(base), layout), replace=False))]
    trained = sample[: layout.max_train_rows]
    trunk = train_trunk(
        trained, one_partition(trained), num_partitions=1, num_vectors=len(base), layout=layout, seed=1
    )
    of_row = assign(sample, trunk.branches)[0]
    heads = [
        train_branch(sample[of_row == i], trunk.branches[i], num_lists=int(n), seed=i)
        for i, n in enumerate(trunk.lists)
    ]
    starts = np.concatenate([[0], np.cumsum([len(one) for one in heads])])
    every = np.concatenate(heads)
    tree = HeadTree.of(every, trunk.branches, starts)
    return GrownTree(tree, Prices.none(len(every)), trunk.partitions), sample


def _evened(grown, sample):
    mean_rows = len(sample) / len(grown.tree.heads)
    for _ in range(ROUNDS):
        grown = after_round(grown, sort_into_lists(sample, one_partition(sample), grown), mean_rows=mean_rows)
    return grown


def _lists(base, grown, *, max_replicas):
    """(list_no, row) of every entry, and the number of lists."""
    found = [
        _of_block(base[start : start + BLOCK], grown, max_replicas) for start in range(0, len(base), BLOCK)
    ]
    list_no, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    row, copy = np.nonzero(list_no >= 0)
    lists, count = list_no[row, copy], len(grown.tree.heads)
    entries, primaries = np.bincount(lists, minlength=count), np.bincount(lists[copy == 0], minlength=count)
    most = longest_list(entries, primaries, least=len(base) // count)
    kept = kept_entries(lists, copy, distance[row, copy], most=most)
    return list_no[row, copy][kept], row[kept]


def _of_block(block, grown, max_replicas):
    near: NearHeads = near_heads(block, grown.tree, PLACED_AMONG)
    primary = charged_lists(near, grown.prices.now)
    own = near.distance[np.arange(len(block)), (near.list_no == primary[:, None]).argmax(axis=1)]
    if max_replicas == 1:
        return primary[:, None], own[:, None]
    copies = replicas_of(near, primary, grown.tree.heads, max_replicas=max_replicas)
    return np.hstack([primary[:, None], copies.list_no]), np.hstack([own[:, None], copies.distance])


def _curve(heads, entries, queries, truth, *, pruned):
    """(entries, recall) of every rule: share of the true ten in the lists probed, whatever codes say."""
    list_no, row = entries
    sizes = np.bincount(list_no, minlength=len(heads))
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(row.max() + 2))
    points: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for query, wanted in zip(queries, truth, strict=True):
        apart = np.square(heads - query).sum(axis=1)
        nearest = np.argsort(apart)[: MAXIMA[-1]]
        rank = np.full(len(heads), len(heads))
        rank[nearest] = np.arange(len(nearest))
        seen = np.array([rank[list_no[order[first[i] : first[i + 1]]]].min() for i in wanted])
        scanned = np.concatenate([[0], np.cumsum(sizes[nearest])])
        within = apart[nearest] - apart[nearest[0]]
        for margin in MARGINS if pruned else (np.inf,):
            reach = int(np.searchsorted(within, margin, side="right"))
            for most in MAXIMA:
                probed = min(most, reach)
                found = (float(scanned[probed]), float((seen < probed).mean()))
                points.setdefault((most, margin), []).append(found)
    return np.array([np.mean(found, axis=0) for found in points.values()])


def _bytes_at(curve, recall):
    enough = curve[curve[:, 1] >= recall]
    return ENTRY_BYTES * float(enough[:, 0].min()) if len(enough) else np.inf


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(7200)
def test_even_lists_cost_nothing_and_copies_and_pruning_each_read_less(shared_data):
    folder = real_set(shared_data).folder
    base, queries = _once_each(np.load(folder / "base.npy")), np.load(folder / "report.queries.npy")
    exact = faiss.IndexFlatIP(base.shape[1])
    exact.add(base)
    truth = exact.search(queries, NEAREST)[1]
    layout = SizedLayout(rows_per_list=100, max_replicas=2)
    plain, sample = _grown(base, layout)
    even = _evened(plain, sample)
    steps = {
        "k-means, a fixed number of lists": (plain, 1, False),
        "even lists": (even, 1, False),
        "+ copies": (even, 2, False),
        "+ pruning": (even, 2, True),
    }
    print(
        f"\n{len(base):,} vectors; kB of lists that hold a share of the true ten\n| | CV | longest | entries a vector | "
        + " | ".join(map(str, RECALLS))
        + " |"
    )
    read = {}
    for name, (grown, copies, pruned) in steps.items():
        entries = _lists(base, grown, max_replicas=copies)
        curve = _curve(grown.tree.heads, entries, queries, truth, pruned=pruned)
        read[name] = [_bytes_at(curve, recall) for recall in RECALLS]
        sizes = np.bincount(entries[0], minlength=len(grown.tree.heads))
        shown = " | ".join(f"{one / 1000:,.0f}" for one in read[name])
        cv = sizes.std() / sizes.mean()
        print(f"| {name} | {cv:.2f} | {sizes.max()} | {len(entries[0]) / len(base):.2f} | {shown} |")
    plain, even, copied, pruned = read.values()
    assert all(b < SAME * a for a, b in zip(plain, even, strict=True))
    assert all(b < a for a, b in zip(even, copied, strict=True))
    assert all(b < a for a, b in zip(copied, pruned, strict=True))
