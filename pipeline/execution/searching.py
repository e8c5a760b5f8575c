"""Many queries from a file, their hits to a file: what `strata search` does."""

import io
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits

from pipeline.artifacts import IndexManifest
from pipeline.config import Config
from pipeline.corpus import documents_by_id
from pipeline.errors import ConfigError
from pipeline.evaluation.queries import Queries, read_queries
from pipeline.execution.answering import (
    How,
    RunnerOf,
    answer_items,
    answer_queries,
    filters_of,
    results_table,
)
from pipeline.execution.cascading import admitted, cascade
from pipeline.execution.encoders import check_encoder_of_queries, query_encoder_for
from pipeline.index.batch import search_many
from pipeline.index.reader import Hit, Release, SearchStats, open_release
from pipeline.schemas import RESULTS
from pipeline.storage import Store, open_store, split_uri

__all__ = ["ExampleHits", "How", "example_searches", "search_file", "search_items"]


def search_file(
    config: Config,
    *,
    queries: str,
    out: str,
    how: How,
    runner_of: RunnerOf,
    encoder: str | None = None,
) -> dict[str, Any]:
    """Search the current release for every query of a file.

    Many queries are answered together, unless a re-rank depth is asked for; into a folder they are on the cluster.

    Args:
        config: Names the root and the encoders.
        queries: Parquet or JSONL: query_id, text or embedding, optional filter.
        out: Parquet to write, local or on S3: schemas.RESULTS; or a folder for parts of it, if it ends with a slash.
        how: How they are answered.
        encoder: Name of the configured encoder for text queries, or of the one that made query vectors; None: the one in force.
        runner_of: Gives a runner for a store; asked only for a folder.

    Returns:
        The summary that the job prints.

    Raises:
        IncompatibleModelsError: The encoder is in another space than the release; the message names both.
    """
    release = open_release(config.root, storage=config.storage)
    asked = read_queries(queries, config.storage, dims=release.reader.manifest.dims)
    if how.cascade is not None:
        return {
            "release": release.number,
            **_cascade_to_file(config, release, asked, out, how, encoder),
            "out": out,
        }
    release = _with_encoder(config, release, asked, encoder)
    if out.endswith("/"):
        if how.rerank is not None:
            raise ConfigError("--rerank", "queries into a folder are scored with vectors", "leave it out")
        vectors = release.vectors_of(_content(asked))
        figures = answer_queries(config, release, asked, vectors, out, how, runner_of)
        return {"release": release.number, **figures, "out": out}
    return {"release": release.number, **_search_to_file(config, release, asked, out, how), "out": out}


def _with_encoder(config: Config, release: Release, asked: Queries, encoder: str | None) -> Release:
    """The release with the encoder of text queries; that of query vectors is only held against it."""
    if asked.texts is not None:
        found = query_encoder_for(config, release.reader.manifest, encoder)
        return Release(release.reader, release.record, found)
    if encoder is not None:
        check_encoder_of_queries(config, release.reader.manifest, encoder)
    return release


def _search_to_file(config: Config, release: Release, asked: Queries, out: str, how: How) -> dict[str, Any]:
    start = time.perf_counter()
    table, stats = _search(release, asked, how)
    seconds = time.perf_counter() - start
    _write_results(config, table, out)
    return {
        "queries": len(asked),
        "hits": table.num_rows,
        "seconds": round(seconds, 4),
        **stats.summary(),
    }


def _cascade_to_file(
    config: Config, release: Release, asked: Queries, out: str, how: How, encoder: str | None
) -> dict[str, Any]:
    manifest = release.reader.manifest
    if not manifest.bridges:
        problem = f"release {release.number} has no bridge: all its documents are in the space of its encoder"
        raise ConfigError("--cascade", problem, "leave it out")
    depth = how.cascade or 0
    if how.k > depth:
        problem = f"ranks {depth} documents of each query, and -k asks for {how.k}"
        raise ConfigError("--cascade", problem, f"name {how.k} or more")
    start = time.perf_counter()
    made = query_encoder_for(config, manifest, encoder)
    vectors = np.asarray(
        Release(release.reader, release.record, made).vectors_of(_content(asked)), np.float32
    )
    deeper = replace(how, k=depth)
    asked = replace(asked, texts=None, vectors=vectors)
    found, stats = _search_by_filter(release, asked, deeper)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    store = open_store(config.root, config.storage)
    wanted = admitted(found, depth=depth, admit=how.admit, weights=asked.weights)
    ranked = cascade(store, manifest, made, unit, found, depth=depth, embed=wanted)
    _write_results(config, _results(asked, [hits[: how.k] for hits in ranked.hits], release.number), out)
    return {
        "queries": len(asked),
        "documents_embedded": ranked.embedded,
        "documents_across": ranked.across,
        "seconds": round(time.perf_counter() - start, 4),
        **stats.summary(),
    }


def _write_results(config: Config, table: pa.Table, out: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    folder, name = split_uri(out)
    open_store(folder, config.storage).write(name, buffer.getvalue())


def search_items(
    config: Config, *, out: str, where: str | None, how: How, runner_of: RunnerOf
) -> dict[str, Any]:
    """Find the nearest documents of every document of the current release.

    Args:
        config: Names the root and the cluster.
        out: Folder for parts of schemas.RESULTS, local or on S3; query_id is the document.
        where: WHERE text over the attributes, `{q.NAME}` in it a value of the document's own; None: no filter.
        how: How they are answered; a document itself is not among its neighbours.
        runner_of: Gives a runner for a store.
    """
    release = open_release(config.root, storage=config.storage)
    figures = answer_items(config, release, where, out, how, runner_of)
    return {"release": release.number, **figures, "out": out}


def _content(asked: Queries) -> NDArray[np.float32] | list[str]:
    return asked.vectors if asked.vectors is not None else list(asked.texts or ())


def _search(release: Release, asked: Queries, how: How) -> tuple[pa.Table, SearchStats]:
    """Rows of RESULTS in the order of the queries, and what they cost."""
    if how.rerank is None and _pays_together(release.reader.manifest, len(asked)):
        filters = filters_of(release.reader, asked.filters)
        vectors = release.vectors_of(_content(asked))
        threads = max(one["num_threads"] for one in threadpool_info())
        with threadpool_limits(1):
            found = search_many(release.reader, vectors, filters, k=how.k, exact=how.exact, threads=threads)
        return results_table(pa.array(asked.query_ids, pa.string()), found, release.number), found.stats
    hits, stats = _search_by_filter(release, asked, how)
    return _results(asked, hits, release.number), stats


def _pays_together(manifest: IndexManifest, queries: int) -> bool:
    """Whether reading the vectors of all lists once is cheaper than the codes of those that each query probes."""
    partition = manifest.partitions[0]
    entry_bytes, vector_bytes = partition.codes.code_bytes + 8, 2 * manifest.dims_of(partition)
    lists = sum(one.heads.rows for one in manifest.partitions)
    return queries * min(manifest.search.lists, lists) * entry_bytes >= lists * vector_bytes


def _search_by_filter(release: Release, asked: Queries, how: How) -> tuple[list[list[Hit]], SearchStats]:
    """Queries with the same filter are searched together."""
    hits: list[list[Hit]] = [[] for _ in range(len(asked))]
    stats = SearchStats()
    for where in sorted(set(asked.filters), key=lambda text: text or ""):
        rows = [i for i, text in enumerate(asked.filters) if text == where]
        group = asked.subset(rows)
        found = release.search(_content(group), k=how.k, filter=where, rerank=how.rerank, exact=how.exact)
        stats = stats.plus(found.stats)
        for i, one in zip(rows, found, strict=True):
            hits[i] = one
    return hits, stats


def _results(asked: Queries, hits: list[list[Hit]], release: int) -> pa.Table:
    rows = [
        (query, rank, hit)
        for query, one in zip(asked.query_ids, hits, strict=True)
        for rank, hit in enumerate(one, 1)
    ]
    columns = [
        [query for query, _, _ in rows],
        np.array([rank for _, rank, _ in rows], dtype=np.int32),
        [hit.doc_id for _, _, hit in rows],
        np.array([hit.score for _, _, hit in rows], dtype=np.float32),
        np.full(len(rows), release, dtype=np.int64),
    ]
    return pa.table(columns, schema=RESULTS)


@dataclass(frozen=True)
class ExampleHits:
    """An example search and what it found."""

    text: str
    filter: str | None
    hits: tuple[tuple[Hit, str], ...]
    """Hits with the text of their document."""


def example_searches(config: Config, *, k: int = 3) -> list[ExampleHits]:
    """Answer the configured examples from the current release."""
    release = open_release(config.root, storage=config.storage)
    manifest = release.reader.manifest
    release = Release(release.reader, release.record, query_encoder_for(config, manifest, None))
    store = open_store(config.root, config.storage)
    found = []
    for example in config.evaluation.examples:
        hits = release.search(example.text, k=k, filter=example.filter)[0]
        texts = _texts(store, manifest, [hit.doc_id for hit in hits])
        found.append(
            ExampleHits(example.text, example.filter, tuple((hit, texts[hit.doc_id]) for hit in hits))
        )
    return found


def _texts(store: Store, manifest: IndexManifest, doc_ids: list[str]) -> dict[str, str]:
    """Text of each document; its first chunk where it was cut."""
    table = documents_by_id(store, manifest.documents, doc_ids, ["doc_id", "chunk_no", "text"])
    rows = sorted(table.to_pylist(), key=lambda row: -row["chunk_no"])
    return {row["doc_id"]: row["text"] or "" for row in rows}
