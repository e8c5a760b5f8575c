"""Disk indexes on the same vectors and queries: ours and those that a user would otherwise take, one to a process.

Run with the interpreter that has the system: `python disk_indexes.py build|serve SYSTEM DATA INDEX`, or `ask SYSTEM DATA INDEX
QUERIES KNOB` for so many queries at one setting. `strata` needs this project, the others `peers.txt`. Prints one line of JSON.

DATA holds base.npy (n, d) float32 unit vectors, and for `tuning` and `report` NAME.queries.npy and NAME.truth.npy, the places of
the ten nearest. A setting is chosen on the tuning queries: of those whose recall reaches the target the one that reads least,
where a system says what it reads, else the fastest. It is then measured on the others, one query after the other, in one thread
on one core.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import MappingProxyType

import numpy as np

K = 10
TARGETS = (0.95, 0.99)
TUNED_ON, COUNTED_ON = 300, 300
"""Queries to choose a setting on, and those whose cost is counted while no clock runs."""
WARM_UP = 50
PROBES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)


def resident_mb():
    """Anonymous memory of this process: what it holds and nobody else's page cache."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def lists_for(rows, per_list):
    """Inverted lists of about so many rows."""
    return max(1, round(rows / per_list))


class HnswLib:
    """A graph in memory, with float32 vectors."""

    is_coarse = True

    sweeps = (tuple({"ef": ef} for ef in (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)),)

    def load_library(self):
        import hnswlib

        self.library = hnswlib

    def build(self, base, folder):
        index = self.library.Index("ip", base.shape[1])
        index.init_index(len(base), ef_construction=200, M=16, random_seed=1)
        index.add_items(base, num_threads=os.cpu_count())
        index.save_index(str(folder / "hnsw"))

    def open(self, folder):
        self.index = self.library.Index("ip", self.dims)
        self.index.load_index(str(folder / "hnsw"))
        self.index.set_num_threads(1)

    def search(self, query, ef):
        self.index.set_ef(ef)
        return self.index.knn_query(query, K)[0][0], {}


class Faiss:
    """Shared by FAISS's two."""

    is_coarse = True

    def load_library(self):
        import faiss

        self.library = faiss

    def _trained(self, factory, base):
        index = self.library.index_factory(base.shape[1], factory, self.library.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(1).choice(len(base), min(len(base), 256 * 256), replace=False)
        index.train(base[np.sort(sample)])
        return index


class FaissFastScan(Faiss):
    """IVF, PQ codes of 96 bytes in fast-scan layout, re-ranked with float32 vectors, all in memory."""

    sweeps = tuple(tuple({"nprobe": n, "factor": factor} for n in PROBES) for factor in (2, 4, 8, 16))

    def build(self, base, folder):
        index = self._trained(f"IVF{lists_for(len(base), 400)},PQ{base.shape[1] // 2}x4fs,RFlat", base)
        index.add(base)
        self.library.write_index(index, str(folder / "fastscan"))

    def open(self, folder):
        self.index = self.library.read_index(str(folder / "fastscan"))
        self.library.omp_set_num_threads(1)
        self.ivf = self.library.extract_index_ivf(self.index)

    def search(self, query, nprobe, factor):
        self.ivf.nprobe = nprobe
        self.index.k_factor = factor
        return self.index.search(query[None], K)[1][0], {"lists": nprobe}


class FaissOnDisk(Faiss):
    """IVF with float32 vectors in lists that are mapped from disk."""

    sweeps = (tuple({"nprobe": nprobe} for nprobe in PROBES),)

    def build(self, base, folder):
        index = self._trained(f"IVF{lists_for(len(base), 400)},Flat", base)
        index.add(base)
        lists = self.library.OnDiskInvertedLists(index.nlist, index.code_size, str(folder / "lists"))
        lists.merge_from_1(index.invlists)
        index.replace_invlists(lists)
        self.library.write_index(index, str(folder / "ondisk"))

    def open(self, folder):
        self.index = self.library.read_index(str(folder / "ondisk"))
        self.library.omp_set_num_threads(1)
        lists = self.index.invlists
        self.sizes = np.array([lists.list_size(i) for i in range(self.index.nlist)])

    def search(self, query, nprobe):
        self.index.nprobe = nprobe
        found = self.index.search(query[None], K)[1][0]
        return found, {"lists": nprobe}

    def cost(self, query, nprobe):
        probed = self.index.quantizer.search(query[None], nprobe)[1][0]
        return {"bytes": int(self.sizes[probed].sum()) * (self.index.code_size + 8)}


class Lance:
    """Shared by LanceDB's; nothing of an index is kept in memory but its metadata, as it is with ours, unless it is `cached`."""

    cached, is_coarse = False, True

    sweeps = tuple(tuple({"nprobes": n, "refine": refine} for n in PROBES) for refine in (1, 4, 8))

    def load_library(self):
        os.environ.setdefault("RUST_LOG", "error")  # it warns at every query
        import lancedb
        import pyarrow as pa

        self.library, self.arrow = lancedb, pa

    def build(self, base, folder):
        flat = self.arrow.array(base.reshape(-1))
        vectors = self.arrow.FixedSizeListArray.from_arrays(flat, base.shape[1])
        table = self.arrow.table({"id": np.arange(len(base)), "vector": vectors})
        made = self.library.connect(self._place(folder), **self._options()).create_table("t", table)
        made.create_index(metric="dot", num_partitions=lists_for(len(base), 400), **self.settings)

    def _place(self, folder):
        return os.environ.get("DISK_INDEX_URI", str(folder))

    def _options(self):
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        return {"storage_options": {"allow_http": "true", "aws_endpoint": endpoint}} if endpoint else {}

    def open(self, folder):
        session = None if self.cached else self.library.Session(index_cache_size_bytes=0)
        database = self.library.connect(self._place(folder), session=session, **self._options())
        self.table = database.open_table("t")

    def search(self, query, nprobes, refine):
        asked = self.table.search(query).distance_type("dot").nprobes(nprobes).limit(K).select(["id"])
        if refine > 1:
            asked = asked.refine_factor(refine)
        return asked.to_arrow()["id"].to_numpy(), {"lists": nprobes}

    def cost(self, query, **knob):
        before = bytes_read()
        self.search(query, **knob)
        return {"bytes": bytes_read() - before}


class LancePq(Lance):
    """IVF_PQ, 96 bytes a code."""

    settings = MappingProxyType({"index_type": "IVF_PQ", "num_sub_vectors": 96})


class LanceRq(Lance):
    """IVF_RQ: RaBitQ."""

    settings = MappingProxyType({"index_type": "IVF_RQ"})


class Strata:
    """A release; settings are those of its manifest's curve, which rises in small steps."""

    is_coarse = False

    def load_library(self):
        from pipeline.index import reader
        from pipeline.postings import Probing

        self.library, self.rule = reader, Probing

    def open(self, folder):
        self.release = self.library.open_release(os.environ.get("DISK_INDEX_URI", str(folder)))
        curve = self.release.reader.manifest.search.curve
        self.sweeps = [[{"lists": p.lists, "margin": p.margin, "rerank": p.rerank} for p in curve]]

    def search(self, query, lists, margin, rerank):
        found = self.release.search(query, k=K, probing=self.rule(lists, margin), rerank=rerank)
        stats = found.stats
        cost = {"lists": stats.lists_probed, "bytes": stats.bytes_read, "requests": stats.requests}
        return [int(hit.doc_id) for hit in found[0]], cost | {"rounds": stats.rounds}


class LancePqCached(LancePq):
    """The same, with LanceDB's own cache of index pages."""

    cached, built_as = True, "lance-pq"


class LanceRqCached(LanceRq):
    """The same, with LanceDB's own cache of index pages."""

    cached, built_as = True, "lance-rq"


SYSTEMS = {
    "strata": Strata,
    "faiss-fastscan": FaissFastScan,
    "faiss-ondisk": FaissOnDisk,
    "lance-pq": LancePq,
    "lance-rq": LanceRq,
    "lance-pq-cached": LancePqCached,
    "lance-rq-cached": LanceRqCached,
    "hnswlib": HnswLib,
}


def bytes_read():
    """What this process has read so far, from the page cache or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


class Asked:
    """Queries with what tells a true neighbour: many texts come more than once, and any of them will do.

    Args:
        data: Folder of the vectors.
        name: Of the queries.
        count: The first so many.
    """

    def __init__(self, data, name, count=None):
        self._base = np.load(data / "base.npy", mmap_mode="r")
        self.queries = np.load(data / f"{name}.queries.npy")[:count]
        farthest = np.load(data / f"{name}.truth.npy")[:count, K - 1]
        self._least = np.einsum("qd,qd->q", self.queries, self._base[farthest])

    def recall(self, number, found):
        """Share of the K found that are as near as the K nearest."""
        scores = self._base[np.unique(np.asarray(found, np.int64)[:K])] @ self.queries[number]
        return float((scores >= self._least[number] - ROUNDING).sum()) / K


ROUNDING = 1e-5


def measured(system, asked, knob):
    """Recall, times and costs of a setting."""
    seconds, hits, costs = [], [], []
    for number, query in enumerate(asked.queries):
        start = time.perf_counter()
        found, cost = system.search(query, **knob)
        seconds.append(time.perf_counter() - start)
        hits.append(asked.recall(number, found))
        costs.append(cost)
    mean = {name: float(np.mean([cost[name] for cost in costs])) for name in costs[0]}
    p50, p95 = np.percentile(np.array(seconds) * 1e3, [50, 95])
    return {"recall": float(np.mean(hits)), "p50_ms": float(p50), "p95_ms": float(p95), **mean}


def with_cost(system, queries, knob):
    """What is too dear to count while the clock runs."""
    if not hasattr(system, "cost"):
        return {}
    costs = [system.cost(query, **knob) for query in queries]
    return {name: float(np.mean([cost[name] for cost in costs])) for name in costs[0]}


def swept(system, asked, sweep):
    """Settings of a sweep that looks ever farther and what they measured; it ends at the last target, or where it gains nothing."""
    tried = []
    for knob in sweep:
        tried.append((knob, measured(system, asked, knob)))
        recall = [one["recall"] for _, one in tried]
        stands = len(recall) > PATIENCE and recall[-1] - recall[-1 - PATIENCE] < GAIN
        if recall[-1] >= TARGETS[-1] or (stands and system.is_coarse):
            break
    return tried


PATIENCE, GAIN = 3, 0.001


def served(system, data, folder):
    """The system opened, tuned and measured."""
    system.load_library()
    system.dims = np.load(data / "base.npy", mmap_mode="r").shape[1]
    before = resident_mb()
    start = time.perf_counter()
    system.open(folder)
    found = {"open_s": time.perf_counter() - start, "opened_mb": resident_mb() - before, "at": {}}
    tuning, report = Asked(data, "tuning", TUNED_ON), Asked(data, "report")
    measured(system, Asked(data, "tuning", WARM_UP), system.sweeps[0][0])
    tried = [one for sweep in system.sweeps for one in swept(system, tuning, sweep)]
    for target in TARGETS:
        # Bytes are the same on every run, times are not.
        enough = [
            (one.get("bytes", one["p50_ms"]), i)
            for i, (_, one) in enumerate(tried)
            if one["recall"] >= target
        ]
        if not enough:
            found["at"][target] = {"most": max(one["recall"] for _, one in tried)}
            continue
        knob = tried[min(enough)[1]][0]
        line = measured(system, report, knob) | with_cost(system, report.queries[:COUNTED_ON], knob)
        found["at"][target] = line | {"knob": knob}
    return found | {"served_mb": resident_mb() - before}


def asked(system, data, folder, count, knob):
    """Times of the first queries at one setting, after one to warm up."""
    system.load_library()
    system.dims = np.load(data / "base.npy", mmap_mode="r").shape[1]
    system.open(folder)
    report = Asked(data, "report", count)
    system.search(np.load(data / "tuning.queries.npy")[0], **knob)
    return measured(system, report, knob) if count else {}


def built(system, data, folder):
    """Seconds to build and to save."""
    system.load_library()
    folder.mkdir(parents=True, exist_ok=True)
    base = np.load(data / "base.npy")
    start = time.perf_counter()
    system.build(base, folder)
    return {"build_s": time.perf_counter() - start}


def main(action, name, data, folder, count="0", knob="{}"):
    """Build an index, serve one, or ask it."""
    system, data, folder = SYSTEMS[name](), Path(data), Path(folder)
    if action == "build":
        found = built(system, data, folder)
    elif action == "ask":
        found = asked(system, data, folder, int(count), json.loads(knob))
    else:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        found = served(system, data, folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
