"""Vulnerabilities with year, weakness and products, and a workload of filtered queries: ten templates, Zipf-weighted."""

import json
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.real_vectors import cache_folder, real_set, stored_vectors

HELD_OUT = 5000
"""Vulnerabilities that queries are made of."""
QUERIES = 20_000
"""That are reported; a third as many more are the past ones."""
UNFILTERED = 0.2
FILTERS = 300
"""Distinct filters of a template that are drawn from, at most."""
SKEW = 1.0
"""Of Zipf's law over them."""
NEAREST = 10
SEED = 11


class HybridSet(NamedTuple):
    """What the benchmarks read."""

    corpus: object
    """Parquet of _id, embedding and attributes, by number of the vector."""
    workload: object
    """Parquet of past queries: filter."""
    base: np.ndarray
    """(n, d) unit vectors."""
    table: pa.Table
    """Attributes of them."""
    queries: np.ndarray
    filters: list
    """WHERE text of each query, or None."""
    past_queries: np.ndarray
    past_filters: list


def hybrid_set(data):
    """Made at the first call, from the vectors of `real_set`."""
    folder = cache_folder() / "cve"
    if not (folder / "done").exists():
        real_set(data)
        folder.mkdir(parents=True, exist_ok=True)
        _make(folder, data)
        (folder / "done").touch()
    asked = json.loads((folder / "asked.json").read_text())
    return HybridSet(
        folder / "corpus.parquet",
        folder / "workload.parquet",
        np.load(folder / "base.npy"),
        pq.read_table(folder / "attributes.parquet"),
        np.load(folder / "queries.npy"),
        asked["filters"],
        np.load(folder / "past.npy"),
        asked["past"],
    )


def _make(folder, data):
    names, vectors = stored_vectors("cve/")
    rows = duckdb.sql(
        f"""SELECT DISTINCT ON (id) 'cve/' || id AS name, year, cwe, products
        FROM '{data}/cve/cve.parquet' ORDER BY id"""
    ).to_arrow_table()
    place = {name: at for at, name in enumerate(rows["name"].to_pylist())}
    table = rows.select(["year", "cwe", "products"]).take(pa.array([place[name] for name in names]))
    rng = np.random.default_rng(SEED)
    held = np.zeros(len(vectors), np.bool_)
    held[rng.choice(len(vectors), HELD_OUT, replace=False)] = True
    base, own = vectors[~held], table.filter(pa.array(~held)).combine_chunks()
    np.save(folder / "base.npy", base)
    pq.write_table(own, folder / "attributes.parquet")
    ids = pa.array([str(i) for i in range(len(base))])
    flat = pa.array(base.reshape(-1))
    embedding = pa.FixedSizeListArray.from_arrays(flat, base.shape[1])
    pq.write_table(
        pa.table({"_id": ids, "embedding": embedding, **{n: own[n] for n in own.column_names}}),
        folder / "corpus.parquet",
        row_group_size=20_000,
    )
    past = QUERIES // 3
    filters = _workload(own, rng, QUERIES + past)
    from_texts = vectors[held][rng.integers(0, HELD_OUT, len(filters))]
    noise = 0.15 / np.sqrt(base.shape[1]) * rng.standard_normal(from_texts.shape)
    queries = (from_texts + noise).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    np.save(folder / "past.npy", queries[:past])
    np.save(folder / "queries.npy", queries[past:])
    pq.write_table(pa.table({"filter": pa.array(filters[:past], pa.string())}), folder / "workload.parquet")
    (folder / "asked.json").write_text(json.dumps({"past": filters[:past], "filters": filters[past:]}))


def _workload(table, rng, count):
    """WHERE texts of queries, in the order in which they came."""
    drawn = [_drawn(make, rng, count) for make in _makers(table, rng)]
    template = rng.integers(0, len(drawn), count)
    unfiltered = rng.random(count) < UNFILTERED
    return [
        None if bare else drawn[one][at]
        for at, (one, bare) in enumerate(zip(template.tolist(), unfiltered, strict=True))
    ]


def _drawn(make, rng, count):
    """Filters of one template."""
    distinct = list(dict.fromkeys(make() for _ in range(8 * FILTERS)))[:FILTERS]
    weights = 1 / np.arange(1, len(distinct) + 1) ** SKEW
    return [distinct[i] for i in rng.choice(len(distinct), count, p=weights / weights.sum())]


def _makers(table, rng):
    years = np.array([y for y in table["year"].to_pylist() if y is not None])
    weaknesses = np.array([c for c in table["cwe"].to_pylist() if c is not None])
    products = np.array([p for ps in table["products"].to_pylist() for p in ps or ()])

    def year():
        return int(rng.choice(years))

    def weakness():
        return str(rng.choice(weaknesses))

    def product():
        return str(rng.choice(products)).replace("'", "''")

    def span(most):
        first = year()
        return f"year BETWEEN {first} AND {first + int(rng.integers(1, most))}"

    return [
        lambda: f"year = {year()}",
        lambda: f"year >= {max(2025, year())}",
        lambda: span(3),
        lambda: f"cwe = '{weakness()}'",
        lambda: f"cwe = '{weakness()}' AND year >= {year()}",
        lambda: f"cwe IN ('{weakness()}', '{weakness()}', '{weakness()}')",
        lambda: f"list_contains(products, '{product()}')",
        lambda: f"list_contains(products, '{product()}') AND year >= {year()}",
        lambda: f"cwe IS NULL AND {span(3)}",
        lambda: f"NOT (cwe = '{weakness()}') AND {span(3)}",
    ]
