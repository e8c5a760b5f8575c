"""The build stages on the root: learn; train → cut (a bucket) → grow (some branches) → place (a bucket) → build (a segment).

`place_bucket` and `build_segment` are the two halves of an out-of-core shuffle from buckets of texts to segments of
posting lists, `cut_sample` and `grow_branches` those of one from buckets to branches of the heads' tree; no step holds more
than one bucket, one group of branches or one segment. `iterate_vectors` streams live documents joined with
their float32 vectors, which training, placing and exact search share.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from safetensors.numpy import load, save

from pipeline import clustering, postings
from pipeline.artifacts import (
    Attribute,
    CodesInfo,
    FileRef,
    Origin,
    Partition,
    Segment,
    StageOutput,
    arrow_schema,
)
from pipeline.binarization import (
    Binarizer,
    Choice,
    Drift,
    Pairs,
    choose_binarizer,
    from_tensors,
    may_stay,
    measure_drift,
    to_tensors,
)
from pipeline.clustering import BranchedHeads
from pipeline.config import BinarizerConfig, LayoutConfig
from pipeline.embedding.cache import Cache, CachedBucket
from pipeline.errors import CorruptArtifactError, IncompatibleModelsError
from pipeline.index.assembly import DIRECTORY_PART, directory_part, place_rows, placed_schema, sort_placed
from pipeline.index.condemned import drop_condemned
from pipeline.index.training import TrainedLayout, train_branch, train_trunk
from pipeline.partitioning import ONLY_PARTITION
from pipeline.schemas import (
    LIST_NO,
    SPACE_KEY,
    directory_schema,
    heads_schema,
    lists_schema,
    made_by,
    vectors_schema,
)
from pipeline.storage import Store, canonical_json
from pipeline.tables import (
    RawFile,
    check_made_by,
    hash_keys,
    open_parquet,
    read_bucket,
    read_columns,
    to_matrix,
    vector_array,
    write_bucketed,
    write_table,
)

__all__ = [
    "PAIR_COLUMNS",
    "VectorSource",
    "build_segment",
    "cut_sample",
    "finish_layout",
    "finish_partition",
    "grow_branches",
    "iterate_vectors",
    "learn_binarizer",
    "load_binarizer",
    "place_bucket",
    "sample_vectors",
    "train_index",
]

PAIR_COLUMNS = ("query", "document")
"""Vectors of each given pair, where they are learned from."""
SLICE_ROWS = 8192
"""Rows placed at once. Fixed: distances can change in the last bit with the size of a product."""


@dataclass(frozen=True)
class VectorSource:
    """Live documents by bucket of text hash, and the cache that holds their vectors."""

    texts: tuple[FileRef, ...]
    cache: Cache
    attributes: tuple[Attribute, ...]
    condemned: Mapping[int, FileRef] = field(default_factory=dict)
    """By bucket, rows that have no vector because their text cannot be encoded."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the attributes."""
        return arrow_schema(self.attributes)


def iterate_vectors(
    store: Store,
    source: VectorSource,
    bucket: int,
    *,
    backwards: bool = False,
    only: pa.Array | None = None,
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    """Rows of one bucket in slices, sorted by (text_hash, vector_id), with their vectors.

    Args:
        store: The root.
        source: Live documents and their vectors.
        bucket: Bucket of text hashes.
        backwards: Last slice first; the same slices, each in the same order.
        only: doc_ids: of the slices only the rows of these documents, without attributes.

    Yields:
        (n) rows with vector_id, doc_id, text_hash and the attributes; (n, d) float32. n is at most SLICE_ROWS.
    """
    columns = ["vector_id", "doc_id", "text_hash", *(source.schema.names if only is None else [])]
    table = pa.concat_tables([read_bucket(store, ref.path, bucket, columns) for ref in source.texts])
    if bucket in source.condemned:
        table = drop_condemned(table, read_columns(store, source.condemned[bucket].path), by="text_hash")
    order = pc.sort_indices(table, sort_keys=[("text_hash", "ascending"), ("vector_id", "ascending")])
    table = table.take(order)
    cached = CachedBucket(store, source.cache, bucket)
    starts = range(0, table.num_rows, SLICE_ROWS)
    for start in reversed(starts) if backwards else starts:
        rows = table.slice(start, SLICE_ROWS)
        rows = rows if only is None else rows.filter(pc.is_in(rows["doc_id"], only))
        distinct, places = np.unique(hash_keys(rows["text_hash"]), return_inverse=True)
        yield rows, cached.read(distinct)[places]


def sample_vectors(
    store: Store, source: VectorSource, rows: int, *, from_end: bool = False
) -> tuple[NDArray[np.float32], list[str]]:
    """Vectors with the smallest (or largest) text hashes: a uniform sample that does not depend on the shards.

    Returns:
        (n, d) float32 and their doc_ids, in order of hash; n is `rows`, or less in a smaller corpus.
    """
    vectors = np.empty((rows, source.cache.dims), dtype=np.float32)
    pieces: list[list[str]] = []
    filled = 0
    for table, found in _slices(store, source, backwards=from_end):
        n = min(len(found), rows - filled)
        kept = slice(len(found) - n, None) if from_end else slice(n)
        place = slice(rows - filled - n, rows - filled) if from_end else slice(filled, filled + n)
        vectors[place] = found[kept]
        pieces.append(table["doc_id"].to_pylist()[kept])
        filled += n
        if filled == rows:
            break
    names = [name for part in (pieces[::-1] if from_end else pieces) for name in part]
    return vectors[rows - filled :] if from_end else vectors[:filled], names


def _slices(
    store: Store, source: VectorSource, *, backwards: bool
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    buckets = range(source.cache.buckets)
    for bucket in reversed(buckets) if backwards else buckets:
        yield from iterate_vectors(store, source, bucket, backwards=backwards)


# ------------------------------------------------------------------------------------------------ training


def learn_binarizer(
    store: Store,
    source: VectorSource,
    *,
    sample_rows: int,
    config: BinarizerConfig,
    seed: int,
    stored: Mapping[str, FileRef] | None = None,
    pairs: FileRef | None = None,
) -> StageOutput:
    """Keep a stored binarizer that is still good enough for a sample; otherwise learn one.

    What is learned depends on the sample and the pairs alone, never on what was stored.

    Args:
        store: The root.
        source: Live documents and their vectors.
        sample_rows: Rows to look at.
        config: Method, size, and what a stored binarizer may lose.
        seed: Of every random choice.
        stored: Files of a binarizer of the kind that the configuration asks for.
        pairs: File of `gather_pairs`.

    Returns:
        Files `weights` and `binarizer`: the artifact; numbers `drift`, `error` and `queries` where a stored one was measured.
    """
    sample, _ = sample_vectors(store, source, sample_rows)
    drift = None
    if stored is not None:
        binarizer = load_binarizer(store, _folder_of(stored["binarizer"]), dims=source.cache.dims)
        drift = measure_drift(binarizer, sample, config=config, seed=seed)
        if may_stay(drift, config):
            return StageOutput(files=dict(stored), numbers=_drift_numbers(drift))
    given = _read_pairs(store, pairs) if pairs is not None else None
    choice = choose_binarizer(sample, config=config, seed=seed, pairs=given)
    data = hashlib.sha256(np.ascontiguousarray(sample).data).hexdigest()
    size = config.model_dump(mode="json", include={"bytes", "levels", "bits_per_dim", "hidden_units"})
    files = _write_binarizer(store, choice, rows=len(sample), seed=seed, sample=data, asked=size)
    return StageOutput(files=files, numbers=_drift_numbers(drift))


def _read_pairs(store: Store, ref: FileRef) -> Pairs:
    table = read_columns(store, ref.path)
    queries, documents = (to_matrix(table[name]).astype(np.float32) for name in PAIR_COLUMNS)
    rows = np.arange(len(queries))
    return Pairs(queries, documents, rows, rows)


def _drift_numbers(drift: Drift | None) -> dict[str, int | float]:
    if drift is None:
        return {}
    return {"drift": round(drift.lost, 6), "error": round(drift.error, 6), "queries": drift.queries}


def train_index(
    store: Store,
    source: VectorSource,
    *,
    num_vectors: int,
    sample_rows: int,
    layout: LayoutConfig,
    seed: int,
) -> StageOutput:
    """Train the first level of the heads' tree on a sample.

    Returns:
        File `branches` (scratch: centroids, lists to make in each, groups); numbers `branches`, `groups`.
    """
    sample, _ = sample_vectors(store, source, sample_rows)
    trunk = train_trunk(sample, num_vectors=num_vectors, layout=layout, seed=seed)
    schema = _tree_schema(source.cache.dims, "lists", "group")
    table = pa.table(
        [vector_array(trunk.branches), pa.array(trunk.lists), pa.array(trunk.groups)], schema=schema
    )
    return StageOutput(
        files={"branches": write_table(store, "scratch/branches", schema, [table])},
        numbers={"branches": len(trunk.branches), "groups": int(trunk.groups.max()) + 1},
    )


def _tree_schema(dims: int, *names: str) -> pa.Schema:
    """Vectors of one level of the heads' tree, each with numbers."""
    numbers = [pa.field(name, pa.int32(), nullable=False) for name in names]
    return pa.schema([heads_schema(dims).field("head"), *numbers])


def cut_sample(
    store: Store, source: VectorSource, bucket: int, branches: FileRef, *, share: float
) -> StageOutput:
    """Cut the sample rows of one bucket by branch: texts whose hash is among the lowest `share` of all hashes.

    Args:
        store: The root.
        source: Live documents and their vectors.
        bucket: Bucket of text hashes.
        branches: File of `train_index`.
        share: In (0, 1].

    Returns:
        File `sample`: branch, embedding (float16 will do for k-means), in order of text hash, cut by group.
    """
    table = read_columns(store, branches.path)
    centroids, groups = to_matrix(table["head"]).astype(np.float32), table["group"].to_numpy()
    element = pa.field("element", pa.float16(), nullable=False)
    schema = pa.schema(
        [
            pa.field("branch", pa.int32(), nullable=False),
            pa.field("embedding", pa.list_(element, source.cache.dims), nullable=False),
        ]
    )
    pieces = [schema.empty_table()]
    for rows, vectors in iterate_vectors(store, source, bucket):
        kept = vectors[_hash_shares(rows["text_hash"]) < share]
        if not len(kept):
            break  # rows come in the order of their hashes
        numbers = pa.array(clustering.assign(kept, centroids)[0])
        pieces.append(pa.table([numbers, vector_array(kept.astype(np.float16))], schema=schema))
    sample = pa.concat_tables(pieces)
    ref = write_bucketed(store, "scratch/samples", sample, groups[sample["branch"].to_numpy()])
    return StageOutput(files={"sample": ref}, numbers={"rows": ref.rows})


def _hash_shares(hashes: pa.ChunkedArray) -> NDArray[np.float64]:
    """(n,) where each hash stands among all possible ones, in [0, 1)."""
    prefix = np.ascontiguousarray(hash_keys(hashes)).view(">u4").reshape(-1, 4)[:, 0]
    shares: NDArray[np.float64] = prefix / 2.0**32
    return shares


def grow_branches(
    store: Store, samples: Sequence[FileRef], group: int, branches: FileRef, *, max_rows: int, seed: int
) -> StageOutput:
    """Train the heads of one group of branches.

    Args:
        store: The root.
        samples: Files of `cut_sample`, in the order of the buckets.
        group: The group.
        branches: File of `train_index`.
        max_rows: Most rows that one branch is trained on: those with the lowest hashes, a uniform sample of it.
        seed: Of every random choice; each branch draws from its own.

    Returns:
        File `heads`: head, branch, sample_rows, in storage order; number `lists`.
    """
    table = read_columns(store, branches.path)
    centroids, groups = to_matrix(table["head"]).astype(np.float32), table["group"].to_numpy()
    wanted = table["lists"].to_numpy()
    sample = pa.concat_tables([read_bucket(store, ref.path, group) for ref in samples])
    of_row, vectors = sample["branch"].to_numpy(), to_matrix(sample["embedding"])
    grown = []
    for branch in np.flatnonzero(groups == group):
        own = np.random.SeedSequence([seed, int(branch)]).generate_state(1)[0] >> 1
        rows = vectors[np.flatnonzero(of_row == branch)[:max_rows]].astype(np.float32)
        heads, sizes = train_branch(rows, centroids[branch], num_lists=int(wanted[branch]), seed=int(own))
        grown.append((heads, np.full(len(heads), branch), sizes))
    schema = _tree_schema(centroids.shape[1], "branch", "sample_rows")
    heads, numbers, sizes = (np.concatenate(column) for column in zip(*grown, strict=True))
    table = pa.table(
        [vector_array(heads), pa.array(numbers, pa.int32()), pa.array(sizes, pa.int32())], schema=schema
    )
    ref = write_table(store, "scratch/heads", schema, [table])
    return StageOutput(files={"heads": ref}, numbers={"lists": ref.rows})


def finish_layout(
    store: Store,
    trained_files: dict[str, FileRef],
    grown: Sequence[FileRef],
    *,
    num_vectors: int,
    segment_rows: int,
) -> StageOutput:
    """Put the groups' heads one after the other and cut the lists into segments.

    Args:
        store: The root.
        trained_files: Files of `train_index` and `learn_binarizer`.
        grown: Files of `grow_branches`, in the order of the groups.
        num_vectors: Vectors of the corpus.
        segment_rows: Rows of a segment, about.

    Returns:
        Files `layout` (head, branch, segment), `branches`, `weights` and `binarizer`; numbers `lists`, `segments`.
    """
    sizes = np.concatenate(
        [read_columns(store, ref.path, ["sample_rows"])["sample_rows"].to_numpy() for ref in grown]
    )
    expected = sizes * (num_vectors / max(int(sizes.sum()), 1))
    segments = postings.segments_of_lists(expected, segment_rows)
    stops = np.cumsum([ref.rows for ref in grown])
    tables = (
        read_columns(store, ref.path, ["head", "branch"]).append_column(
            pa.field("segment", pa.int32(), nullable=False), pa.array(segments[stop - ref.rows : stop])
        )
        for ref, stop in zip(grown, stops, strict=True)
    )
    dims = read_columns(store, trained_files["branches"].path, ["head"])["head"].type.list_size
    layout = write_table(store, "scratch/layouts", _tree_schema(dims, "branch", "segment"), tables)
    return StageOutput(
        files={**trained_files, "layout": layout},
        numbers={"lists": layout.rows, "segments": int(segments.max()) + 1},
    )


def _write_binarizer(store: Store, choice: Choice, **trained_on: object) -> dict[str, FileRef]:
    weights = save(to_tensors(choice.binarizer))
    digest = hashlib.sha256(weights).hexdigest()
    card = canonical_json(
        {
            "format": 2,
            "method": choice.method,
            "levels": list(choice.binarizer.levels),
            "weights": digest,
            "held_out_recall": dict(choice.recall),
            "held_out_queries": choice.held_out_queries,
            "judged_on": choice.judged_on,
            "given_pairs": choice.given_pairs,
            "curve": [asdict(look) for look in choice.curve],
            **trained_on,
        }
    )
    folder = f"binarizers/{hashlib.sha256(card).hexdigest()[:32]}"
    files = {}
    for role, name, data in (
        ("weights", "weights.safetensors", weights),
        ("binarizer", "binarizer.json", card),
    ):
        store.write(f"{folder}/{name}", data)
        digest = hashlib.sha256(data).hexdigest()
        files[role] = FileRef(path=f"{folder}/{name}", rows=0, bytes=len(data), sha256=digest)
    return files


def load_binarizer(store: Store, folder: str, *, dims: int) -> Binarizer:
    """Read a binarizer artifact: the folder's name is the hash of the card, the card has that of the weights.

    Args:
        store: The root.
        folder: Of the binarizer.
        dims: Width of the vectors that it is for.

    Raises:
        CorruptArtifactError: The folder holds the card or the weights of another binarizer, or damaged ones.
        IncompatibleModelsError: The binarizer is for vectors of another width.
    """
    card = store.read(f"{folder}/binarizer.json")
    _check_digest(f"{store.uri}/{folder}/binarizer.json", card, folder.rpartition("/")[2])
    fields = json.loads(card)
    weights = store.read(f"{folder}/weights.safetensors")
    _check_digest(f"{store.uri}/{folder}/weights.safetensors", weights, fields["weights"])
    binarizer = from_tensors(load(weights), tuple(fields["levels"]))
    found = len(binarizer.mean)
    if found != dims:
        problem = f"expected a binarizer of vectors of {dims} dimensions, found one of {found}"
        raise IncompatibleModelsError(f"{store.uri}/{folder}", problem, "name the binarizer of these vectors")
    return binarizer


def _check_digest(place: str, data: bytes, expected: str) -> None:
    """The expected digest may be cut."""
    found = hashlib.sha256(data).hexdigest()[: len(expected)]
    if found != expected:
        problem = f"expected the binarizer's file of sha256 {expected}, found that of sha256 {found}"
        raise CorruptArtifactError(place, problem, "restore the file, or roll back to another release")


def _load_layout(store: Store, files: dict[str, FileRef]) -> TrainedLayout:
    # Byte ranges instead of decoding: a decoded column of a million heads takes five times their size for a moment.
    heads = RawFile(store, files["layout"], ["head"]).read_all("head").view(np.float32)
    table = read_columns(store, files["layout"].path, ["branch", "segment"])
    branches = to_matrix(read_columns(store, files["branches"].path, ["head"])["head"]).astype(np.float32)
    starts = np.searchsorted(table["branch"].to_numpy(), np.arange(len(branches) + 1))
    tree = BranchedHeads.of(heads, branches, starts)
    binarizer = load_binarizer(store, _folder_of(files["binarizer"]), dims=heads.shape[1])
    return TrainedLayout(binarizer, tree, table["segment"].to_numpy())


def _folder_of(ref: FileRef) -> str:
    return ref.path.rpartition("/")[0]


# ------------------------------------------------------------------------------------------------ building


def place_bucket(
    store: Store, source: VectorSource, bucket: int, trained_files: dict[str, FileRef]
) -> StageOutput:
    """Assign the rows of one bucket to lists, binarize them and cut them by segment; the file says what made them.

    Args:
        store: The root.
        source: Live documents and their vectors.
        bucket: Bucket of text hashes.
        trained_files: Files of `finish_layout`.
    """
    trained = _load_layout(store, trained_files)
    schema = placed_schema(source.cache.dims, sum(trained.binarizer.levels) // 8, source.schema)
    pieces = [
        place_rows(rows, found, trained, source.schema)
        for rows, found in iterate_vectors(store, source, bucket)
    ]
    placed = pa.concat_tables(pieces) if pieces else schema.empty_table()
    placed = placed.replace_schema_metadata(
        made_by(source.cache.encoder, _folder_of(trained_files["binarizer"]))
    )
    segments = trained.segments[placed[LIST_NO].to_numpy()]
    ref = write_bucketed(store, "scratch/placed", placed, segments)
    return StageOutput(files={"placed": ref}, numbers={"rows": placed.num_rows})


def build_segment(
    store: Store, placed: Sequence[FileRef], segment_no: int, attributes: tuple[Attribute, ...]
) -> StageOutput:
    """Sort the placed rows of one segment into posting lists and write its files, which say what made them.

    Returns:
        Files `vectors`, `lists` and `directory_part`.

    Raises:
        IncompatibleModelsError: The placed rows come from more than one encoder or binarizer.
    """
    unsorted = _placed_rows(store, placed, segment_no)
    made, table = unsorted.schema.metadata, sort_placed(unsorted)
    dims, code_bytes = (
        table.schema.field("embedding").type.list_size,
        table.schema.field("code").type.byte_width,
    )
    rows = pa.array(np.arange(table.num_rows, dtype=np.int32))
    part = directory_part(table, segment_no)
    vectors = _whole_lists(table, part)
    lists = _whole_lists(table.append_column(pa.field("row", pa.int32(), nullable=False), rows), part)
    files = {
        "vectors": write_table(
            store,
            "partitions",
            vectors_schema(dims, arrow_schema(attributes)).with_metadata({SPACE_KEY: made[SPACE_KEY]}),
            vectors,
            suffix=".vectors.parquet",
        ),
        "lists": write_table(
            store,
            "partitions",
            lists_schema(code_bytes).with_metadata(made),
            lists,
            suffix=".lists.parquet",
        ),
        "directory_part": write_table(store, "scratch/directories", DIRECTORY_PART, [part]),
    }
    return StageOutput(files=files, numbers={"rows": table.num_rows})


def _placed_rows(store: Store, placed: Sequence[FileRef], segment_no: int) -> pa.Table:
    """Rows of one segment from every bucket, with what made all of them as metadata."""
    tables = [read_bucket(store, ref.path, segment_no) for ref in placed]
    for ref, table in zip(placed, tables, strict=True):
        check_made_by(f"{store.uri}/{ref.path}", table.schema.metadata, tables[0].schema.metadata)
    return pa.concat_tables(tables)


def _whole_lists(table: pa.Table, part: pa.Table) -> Iterator[pa.Table]:
    """Cut a segment into row groups that end at list borders."""
    start = 0
    stops = (part["first_entry"].to_numpy() + part["num_entries"].to_numpy()).astype(np.int64)
    while start < table.num_rows:
        within = stops[(stops > start) & (stops <= start + SLICE_ROWS)]
        # A list longer than a row group is cut by the writer.
        stop = int(within[-1]) if len(within) else int(stops[stops > start][0])
        yield table.slice(start, stop - start)
        start = stop


def finish_partition(
    store: Store,
    built: Sequence[StageOutput],
    trained_files: dict[str, FileRef],
    *,
    space: str,
    origin: Origin | None = None,
) -> Partition:
    """Write directory and heads, and describe the partition.

    Args:
        store: The root.
        built: Outputs of `build_segment`, in segment order.
        trained_files: Files of `finish_layout`.
        space: Fingerprint of the encoder.
        origin: Why this binarizer.
    """
    parts = pa.concat_tables([read_columns(store, output.files["directory_part"].path) for output in built])
    directory = parts.select(directory_schema().names)
    card = json.loads(store.read(trained_files["binarizer"].path))
    return Partition(
        partition_id=ONLY_PARTITION,
        space=space,
        codes=CodesInfo(
            binarizer=_folder_of(trained_files["binarizer"]),
            levels=card["levels"],
            code_bytes=sum(card["levels"]) // 8,
            files=(trained_files["binarizer"], trained_files["weights"]),
            method=card["method"],
            held_out_recall=card["held_out_recall"],
            # Kept ones may be older than these.
            judged_on=card.get("judged_on", "vectors"),
            given_pairs=card.get("given_pairs", 0),
            origin=origin,
        ),
        heads=_write_heads(store, trained_files["layout"], parts, space),
        directory=write_table(
            store, "partitions", directory_schema(), [directory], suffix=".directory.parquet"
        ),
        segments=tuple(Segment(lists=o.files["lists"], vectors=o.files["vectors"]) for o in built),
        rows=sum(output.files["vectors"].rows for output in built),
    )


def _write_heads(store: Store, layout: FileRef, directory: pa.Table, space: str) -> FileRef:
    """Heads with the radius of their lists, a row group at a time."""
    radius = np.zeros(layout.rows, dtype=np.float32)
    radius[directory["list_no"].to_numpy()] = directory["radius"].to_numpy()
    with open_parquet(store, layout.path) as file:
        schema = heads_schema(file.schema_arrow.field("head").type.list_size).with_metadata(made_by(space))
        ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
        tables = (
            file.read_row_group(group, columns=["head"], use_threads=False).append_column(
                schema.field("radius"), pa.array(radius[end - file.metadata.row_group(group).num_rows : end])
            )
            for group, end in enumerate(ends)
        )
        return write_table(store, "partitions", schema, tables, suffix=".heads.parquet")
