"""Queries by the million on Ray: sorted by where they look, cut into shards, each answered once; parts of Parquet in a folder.

What is done is kept beside the parts until all is: a job that died goes on where it stopped. `_SUCCESS` comes last.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.artifacts import FileRef, StageOutput
from pipeline.config import Config
from pipeline.corpus.identity import DOC_HASH_BYTES
from pipeline.errors import IncompatibleModelsError, MissingFileError
from pipeline.evaluation.queries import Queries
from pipeline.execution.progress import track
from pipeline.execution.runner import Runner
from pipeline.execution.work import Done, StoreSpec, Task, digest
from pipeline.filters import Filter, parse_filter, with_constants
from pipeline.index.batch import ManyHits, search_many
from pipeline.index.partition import nearest_lists
from pipeline.index.reader import IndexReader, Release, SearchStats, open_release
from pipeline.postings import Probing
from pipeline.release import hold_root
from pipeline.schemas import RESULTS
from pipeline.spaces import EncoderIdentity
from pipeline.storage import Store, open_store
from pipeline.tables import read_columns, to_matrix, vector_array, write_table

__all__ = ["How", "RunnerOf", "answer_items", "answer_queries", "filters_of", "results_table"]

SHARD_QUERIES = 16_384
"""Of a shard at most: each reads every list that it wants once."""
WORK = "_work"
SUCCESS = "_SUCCESS"
PART = re.compile(r"part-\d{5}\.parquet")
"""Names of our own: others that stand in the folder are left alone."""
DISTANCES_AT_ONCE = 1 << 24
"""Of queries to heads."""

RunnerOf = Callable[[StoreSpec], AbstractContextManager[Runner]]


@dataclass(frozen=True)
class How:
    """How queries are answered."""

    k: int
    """Documents per query."""
    exact: bool = False
    """Whether every query is compared with every document that passes its filter."""
    rerank: int | None = None
    """Candidates scored with float16 vectors; None: the release's default, in proportion for k above ten."""
    cascade: int | None = None
    """First documents of a query that the encoder of the release embeds where a bridge leads to them; None: none."""
    admit: int = 0
    """Queries of the file that find a document among these before a cascade embeds it; 0: whatever they find."""


def answer_queries(
    config: Config,
    release: Release,
    asked: Queries,
    vectors: NDArray[np.floating],
    out: str,
    how: How,
    runner_of: RunnerOf,
) -> dict[str, Any]:
    """Answer queries into a folder.

    Args:
        config: Names the root and the cluster.
        release: To search.
        asked: The queries.
        vectors: (q, d) of them.
        out: Folder, local or on S3.
        how: How they are answered.
        runner_of: Gives a runner for a store.

    Returns:
        Figures for the summary.
    """
    reader = release.reader
    filters = filters_of(reader, asked.filters)

    def tasks(work: Store) -> list[Task]:
        order = _by_place(reader, vectors, filters)
        shards = np.array_split(order, -(-len(order) // SHARD_QUERIES)) if len(order) else []
        files = [_write_queries(work, asked.subset(rows.tolist()), vectors[rows]) for rows in shards]
        return [
            Task("search", {"queries": ref, "shard": no}, partial(answer_shard, queries=ref))
            for no, ref in enumerate(files)
        ]

    vectors_hash = hashlib.sha256(vectors.tobytes()).hexdigest()
    request = {"queries": asked.query_ids, "filters": asked.filters, "vectors": vectors_hash}
    return _answered(config, release, out, request, tasks, how, runner_of)


def answer_items(
    config: Config, release: Release, where: str | None, out: str, how: How, runner_of: RunnerOf
) -> dict[str, Any]:
    """Find the neighbours of every document of a release, itself left out.

    Args:
        config: Names the root and the cluster.
        release: To search.
        where: WHERE text over the attributes, `{q.NAME}` in it a value of the document's own; None: no filter.
        out: Folder, local or on S3.
        how: How they are answered.
        runner_of: Gives a runner for a store.
    """
    _check_filter(release.reader, where)
    _check_one_space(release)
    places = [
        {
            "partition": number,
            "segment": no,
            "first": first,
            "rows": min(SHARD_QUERIES, segment.vectors.rows - first),
        }
        for number, partition in enumerate(release.reader.manifest.partitions)
        for no, segment in enumerate(partition.segments)
        for first in range(0, segment.vectors.rows, SHARD_QUERIES)
    ]

    def tasks(_: Store) -> list[Task]:
        return [
            Task(
                "items", {**place, "where": where, "shard": no}, partial(item_shard, place=place, where=where)
            )
            for no, place in enumerate(places)
        ]

    return _answered(config, release, out, {"items": where}, tasks, how, runner_of)


def _answered(
    config: Config,
    release: Release,
    out: str,
    request: Any,
    tasks_of: Callable[[Store], list[Task]],
    how: How,
    runner_of: RunnerOf,
) -> dict[str, Any]:
    """Perform the shards and put their parts into the folder, unless that was done before.

    Args:
        config: Names the root and the cluster.
        release: To search.
        out: Folder, local or on S3.
        request: What is asked: with the release and `k`, it names the results.
        tasks_of: Shards, from the store of the work.
        how: How it is answered.
        runner_of: Gives a runner for a store.
    """
    folder = out.rstrip("/")
    asked = {
        "index": release.reader.manifest.index,
        "release": release.number,
        "k": how.k,
        "exact": how.exact,
    }
    fingerprint = digest({**asked, "request": request})
    target, spec = (
        open_store(folder, config.storage),
        StoreSpec(f"{folder}/{WORK}/{fingerprint}", config.storage),
    )
    with hold_root(open_store(f"{folder}/{WORK}", config.storage), "search", config.lease) as lease:
        if (before := _success(target)) is not None and before["request"] == fingerprint:
            _clear(spec.open())
            return {**before["figures"], "skipped": True}
        figures, parts = _performed(config, release, spec, tasks_of, asked, how, runner_of)
        lease.check()
        _publish(target, f"{WORK}/{fingerprint}", parts)
        target.write(SUCCESS, json.dumps({"request": fingerprint, "figures": figures}).encode())
        _clear(spec.open())
    return {**figures, "skipped": False}


def _clear(work: Store) -> None:
    for found in list(work.list("")):
        work.delete(found.path)


def _performed(
    config: Config,
    release: Release,
    spec: StoreSpec,
    tasks_of: Callable[[Store], list[Task]],
    asked: dict[str, Any],
    how: How,
    runner_of: RunnerOf,
) -> tuple[dict[str, Any], list[FileRef]]:
    """Figures of all shards, and their hits."""
    shared = {
        "root": StoreSpec(config.root, config.storage),
        "release": release.number,
        "k": how.k,
        "exact": how.exact,
    }
    tasks = [replace(task, inputs={**task.inputs, **asked}, shared=shared) for task in tasks_of(spec.open())]
    start = time.perf_counter()
    with runner_of(spec) as runner:
        started = time.perf_counter()
        finished = track(runner.run(tasks), label="search", total=len(tasks))
        done = [one for _, one in sorted(finished, key=lambda pair: pair[0])]
    figures = _figures(done) | {
        "start_seconds": round(started - start, 3),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return figures, [one.output.files["hits"] for one in done]


def _success(target: Store) -> dict[str, Any] | None:
    """What stands there of earlier results; None where another tool left it, or nobody."""
    try:
        found = json.loads(target.read(SUCCESS))
    except (MissingFileError, ValueError):
        return None
    return found if isinstance(found, dict) and {"request", "figures"} <= found.keys() else None


def _figures(done: Sequence[Done]) -> dict[str, Any]:
    stats = reduce(SearchStats.plus, (SearchStats(**_counts(one.output)) for one in done), SearchStats())
    return {
        "queries": stats.queries,
        "hits": sum(one.output.files["hits"].rows for one in done),
        **stats.summary(),
        "shards": len(done),
        "shards_reused": sum(one.reused for one in done),
    }


def _counts(output: StageOutput) -> dict[str, int]:
    return {name: int(number) for name, number in output.numbers.items()}


def _publish(target: Store, work: str, parts: Sequence[FileRef]) -> None:
    """Parts under their numbers; those of earlier results go first, and what says that those were whole before them."""
    target.delete(SUCCESS)
    for found in list(target.list("")):
        if PART.fullmatch(found.path):
            target.delete(found.path)
    for number, ref in enumerate(parts):
        target.copy(f"{work}/{ref.path}", f"part-{number:05d}.parquet")


# ------------------------------------------------------------------------------------------------ shards


def _by_place(
    reader: IndexReader, vectors: NDArray[np.float32], filters: Sequence[Filter | None]
) -> NDArray[np.int64]:
    """Order of the queries: by the partitions that they reach, then the nearest list."""
    # Neighbours in one space are so in all of them, near enough for an order of reading.
    side = reader.sides()[0]
    parts, vectors = side.partitions, side.queries(np.asarray(vectors, np.float32))
    size = max(1, DISTANCES_AT_ONCE // sum(one.part.num_lists for one in parts))
    # One thread: products, and so shards and their names, must not depend on the machine's cores.
    with threadpool_limits(1):
        starts = range(0, len(vectors), size)
        blocks = [nearest_lists(parts, vectors[a : a + size], Probing(1, 0.0)) for a in starts]
    nearest = np.array([lists[0] for block in blocks for lists, _ in block], np.int64)
    reached = {where: tuple(reader.reached(where)) for where in set(filters)}
    ranks = {route: rank for rank, route in enumerate(sorted(set(reached.values())))}
    route = np.array([ranks[reached[where]] for where in filters], np.int64)
    return np.lexsort((np.arange(len(vectors)), nearest, route))


def _write_queries(work: Store, asked: Queries, vectors: NDArray[np.float32]) -> FileRef:
    table = pa.table(
        {
            "query_id": pa.array(asked.query_ids, pa.string()),
            "filter": pa.array(asked.filters, pa.string()),
            "embedding": vector_array(vectors),
        }
    )
    return write_table(work, "queries", table.schema, [table])


def answer_shard(
    store: Store, queries: FileRef, root: StoreSpec, release: int, *, k: int, exact: bool
) -> StageOutput:
    """Answer the queries of one shard.

    Args:
        store: Of the work.
        queries: query_id, filter, embedding.
        root: Of the index.
        release: Number of the release.
        k: Documents per query.
        exact: Compare every query with every document that passes.

    Returns:
        File `hits`: rows of RESULTS.
    """
    opened = open_release(root.uri, release=release, storage=root.config)
    table = read_columns(store, queries.path)
    filters = filters_of(opened.reader, table["filter"].to_pylist())
    vectors = to_matrix(table["embedding"]).astype(np.float32)
    found = search_many(opened.reader, vectors, filters, k=k, exact=exact)
    return _written(store, results_table(table["query_id"], found, release), found)


def item_shard(
    store: Store,
    place: dict[str, int],
    where: str | None,
    root: StoreSpec,
    release: int,
    *,
    k: int,
    exact: bool,
) -> StageOutput:
    """Find the neighbours of some documents of one segment; the first chunk stands for a document of several.

    Args:
        store: Of the work.
        place: partition, segment, first row and rows.
        where: As of `answer_items`.
        root: Of the index.
        release: Number of the release.
        k: Documents per document.
        exact: Compare every one with every document that passes.
    """
    opened = open_release(root.uri, release=release, storage=root.config)
    manifest = opened.reader.manifest
    ref = manifest.partitions[place["partition"]].segments[place["segment"]].vectors
    names = [one.name for one in manifest.attributes]
    rows = read_columns(root.open(), ref.path, ["vector_id", "doc_id", "embedding", *names])
    rows = rows.slice(place["first"], place["rows"])
    rows = rows.filter(
        pa.array(_is_first_chunk(rows["vector_id"], _condemned_chunks(root.open(), manifest.condemned)))
    )
    texts = with_constants([where] * rows.num_rows, rows, place=f"--filter {where!r}")
    filters = filters_of(opened.reader, texts)
    vectors = to_matrix(rows["embedding"]).astype(np.float32)
    found = search_many(opened.reader, vectors, filters, k=k + 1, exact=exact)
    return _written(store, _without_themselves(results_table(rows["doc_id"], found, release), k), found)


def _check_filter(reader: IndexReader, where: str | None) -> None:
    """Refuse a filter before anything is started, as if a document of nulls asked.

    Raises:
        FilterError: It cannot be parsed or does not fit the attributes.
        SchemaMismatchError: It asks for a value that documents do not have.
    """
    nulls = pa.table({one.name: pa.nulls(1, one.type) for one in reader.attributes})
    filters_of(reader, with_constants([where], nulls, place=f"--filter {where!r}"))


def _check_one_space(release: Release) -> None:
    """Refuse documents as queries where a bridge leads to them: from their old vectors none leads back to new ones.

    Raises:
        IncompatibleModelsError: The message names the encoders.
    """
    manifest = release.reader.manifest
    for bridge in manifest.bridges:
        old, new = (EncoderIdentity.model_validate(one) for one in (bridge.encoder, manifest.encoder))
        problem = f"expected documents with vectors of {new}, as queries have, found vectors of {old}"
        remedy = "backfill them first, or roll back to a release of one encoder"
        raise IncompatibleModelsError(f"release {release.number}", problem, remedy)


def _condemned_chunks(store: Store, files: Sequence[FileRef]) -> dict[bytes, set[int]]:
    """Chunks that are in no list because their text cannot be encoded, by the document's bytes of their vector_ids."""
    found: dict[bytes, set[int]] = {}
    for ref in files:
        for one in read_columns(store, ref.path, ["vector_id"])["vector_id"].to_pylist():
            found.setdefault(one[:DOC_HASH_BYTES], set()).add(int.from_bytes(one[DOC_HASH_BYTES:], "big"))
    return found


def _is_first_chunk(vector_ids: pa.ChunkedArray, condemned: Mapping[bytes, set[int]]) -> NDArray[np.bool_]:
    """(n,) which of some vectors are the first of their document that there are."""
    first = {
        document: next(number for number in count() if number not in chunks)
        for document, chunks in condemned.items()
    }
    return np.array(
        [
            int.from_bytes(one[DOC_HASH_BYTES:], "big") == first.get(one[:DOC_HASH_BYTES], 0)
            for one in vector_ids.to_pylist()
        ],
        np.bool_,
    )


def _without_themselves(results: pa.Table, k: int) -> pa.Table:
    """Results whose document is another than the query, ranked anew, `k` at most."""
    results = results.filter(pc.not_equal(results["query_id"], results["doc_id"]))
    query = results["query_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.diff(query, prepend=-1))
    rank = np.arange(len(query)) - np.repeat(starts, np.diff(starts, append=len(query))) + 1
    place = RESULTS.get_field_index("rank")
    results = results.set_column(place, RESULTS.field("rank"), pa.array(rank.astype(np.int32)))
    return results.filter(pc.less_equal(results["rank"], k))


def _written(store: Store, results: pa.Table, found: ManyHits) -> StageOutput:
    return StageOutput(
        files={"hits": write_table(store, "hits", RESULTS, [results])},
        numbers={"queries": found.stats.queries, **found.stats.summary()},
    )


def results_table(query_ids: pa.ChunkedArray | pa.Array, found: ManyHits, release: int) -> pa.Table:
    """Rows of RESULTS.

    Args:
        query_ids: Of each query.
        found: Their hits.
        release: Number of the release.
    """
    names = query_ids.take(pa.array(found.query))
    release_of = np.full(len(found.query), release, np.int64)
    return pa.table([names, found.rank, found.doc_id, found.score, release_of], schema=RESULTS)


def filters_of(reader: IndexReader, texts: Sequence[str | None]) -> list[Filter | None]:
    """Filters of WHERE texts, each parsed once."""
    known = {text: parse_filter(text, reader.attributes) for text in set(texts) if text is not None}
    return [None if text is None else known[text] for text in texts]
