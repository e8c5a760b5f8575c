"""Filtered queries answered by other means than ours: all that a batch could be replaced by. Run by test_hybrid_search.

LanceDB runs in the environment of the peers: `python hybrid_search.py FOLDER QUERIES`.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

K = 10


def loop(base, table, queries, filters, parse, evaluate):
    """The ten-line loop: exact, queries grouped by distinct filter."""
    found = np.full((len(queries), K), -1, np.int64)
    groups = {}
    for query, text in enumerate(filters):
        groups.setdefault(text, []).append(query)
    for text, members in groups.items():
        rows = np.arange(len(base)) if text is None else np.flatnonzero(evaluate(parse(text), table))
        scores = base[rows] @ queries[members].T
        count = min(K, len(rows))
        if count:
            near = np.argpartition(-scores, count - 1, axis=0)[:count]
            order = np.argsort(-np.take_along_axis(scores, near, axis=0), axis=0)
            found[members, :count] = rows[np.take_along_axis(near, order, axis=0)].T
    return found


class FaissSystem:
    """One query at a time with a selector of the rows that pass; bitmaps of filters are made once each.

    Args:
        base: (n, d) float32.
        table: Attributes.
        parse: Of filters.
        evaluate: Of filters.
    """

    def __init__(self, base, table, parse, evaluate):
        self.base, self.table, self._parse, self._evaluate = base, table, parse, evaluate
        self._bits = {}

    def mask(self, text):
        return (
            np.ones(len(self.base), np.bool_)
            if text is None
            else self._evaluate(self._parse(text), self.table)
        )

    def selector(self, text):
        import faiss

        if text is None:
            return None
        if text not in self._bits:
            self._bits[text] = np.packbits(self.mask(text), bitorder="little")
        return faiss.IDSelectorBitmap(self._bits[text])


class Flat(FaissSystem):
    name = "FAISS flat, IDSelectorBitmap"
    sweep = (None,)

    def prepare(self):
        import faiss

        self._index = faiss.IndexFlatIP(self.base.shape[1])
        self._index.add(self.base)

    def search(self, query, text, _):
        import faiss

        parameters = faiss.SearchParameters(sel=self.selector(text)) if text is not None else None
        return self._index.search(query[None], K, params=parameters)[1][0]


class Ivf(FaissSystem):
    name = "FAISS IVF-Flat, IDSelectorBitmap"
    sweep = (8, 16, 32, 64, 128, 256, 512, 1024)

    def prepare(self):
        import faiss

        lists = 4 * int(np.sqrt(len(self.base)))
        coarse = faiss.IndexFlatIP(self.base.shape[1])
        self._index = faiss.IndexIVFFlat(coarse, self.base.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        self._index.own_fields, self._coarse = False, coarse
        self._index.train(self.base[:: max(1, len(self.base) // 100_000)])
        self._index.add(self.base)

    def search(self, query, text, nprobe):
        import faiss

        parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=self.selector(text))
        return self._index.search(query[None], K, params=parameters)[1][0]


class PostFilter(Ivf):
    name = "FAISS IVF-Flat, filtered afterwards"
    sweep = ((16, 200), (32, 1000), (64, 5000), (128, 20_000), (400, 80_000), (1608, 162_093))

    def search(self, query, text, knob):
        import faiss

        nprobe, depth = knob
        parameters = faiss.SearchParametersIVF(nprobe=nprobe)
        if text is None:
            return self._index.search(query[None], K, params=parameters)[1][0]
        if text not in self._bits:
            self._bits[text] = self.mask(text)
        found = self._index.search(query[None], depth, params=parameters)[1][0]
        found = found[found >= 0]
        return found[self._bits[text][found]][:K]


def one_by_one(search, queries, filters):
    """Results and seconds of queries one after the other."""
    found = np.full((len(queries), K), -1, np.int64)
    start = time.perf_counter()
    for at, (query, text) in enumerate(zip(queries, filters, strict=True)):
        hits = search(query, text)
        found[at, : len(hits)] = hits
    return found, time.perf_counter() - start


def lance(folder, count):
    """LanceDB with prefilter, IVF_PQ with refine or a flat scan, whichever; recall is judged by the caller."""
    import lancedb
    import pyarrow.parquet as pq

    folder = Path(folder)
    database = lancedb.connect(str(folder / "lance"))
    if "t" not in database.list_tables().tables:
        table = database.create_table("t", pq.read_table(folder / "corpus.parquet"))
        table.create_index(
            metric="dot", vector_column_name="embedding", index_type="IVF_PQ", num_sub_vectors=48
        )
        table.create_scalar_index("year", index_type="BTREE")
        table.create_scalar_index("cwe", index_type="BITMAP")
        table.create_scalar_index("products", index_type="LABEL_LIST")
    table = database.open_table("t")
    queries = np.load(folder / "queries.npy")[:count]
    filters = json.loads((folder / "asked.json").read_text())["filters"][:count]
    results = {}
    for nprobes, refine in ((16, 10), (48, 20), (192, 20)):
        found, seconds = [], 0.0
        for query, text in zip(queries, filters, strict=True):
            start = time.perf_counter()
            asked = table.search(query, vector_column_name="embedding").distance_type("dot")
            asked = asked.nprobes(nprobes).refine_factor(refine).limit(K).select(["_id"])
            if text is not None:
                asked = asked.where(text.replace("list_contains", "array_has"), prefilter=True)
            hits = asked.to_arrow()["_id"].to_pylist()
            seconds += time.perf_counter() - start
            found.append([int(hit) for hit in hits])
        results[f"{nprobes} lists, refine {refine}"] = {"found": found, "seconds": seconds}
    return results


if __name__ == "__main__":
    print(json.dumps(lance(sys.argv[1], int(sys.argv[2]))))
