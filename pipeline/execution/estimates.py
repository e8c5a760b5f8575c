"""What a plan will cost in bytes, memory and time, reckoned before it costs anything.

The formulas count what each stage holds and writes per row; `CONSTANTS` were fitted on runs of the corpora in the tests,
whose summaries put the measured numbers beside these. A plan that does not fit is refused with the setting to change.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pipeline.artifacts import Plan
from pipeline.binarization.choosing import FEWEST_ROWS
from pipeline.binarization.levels import MAX_LEVELS, default_code_bytes
from pipeline.clustering import SEARCHED_BRANCHES
from pipeline.clustering.assignment import PAIRS_PER_BLOCK, SCORES_PER_BLOCK
from pipeline.config import (
    BinarizerConfig,
    Config,
    SizedConfig,
    SizedLayout,
)
from pipeline.errors import ConfigError
from pipeline.evaluation.judging import NEIGHBOURS, TUNING_QUERIES
from pipeline.evaluation.stage import QUERY_BLOCK as EXACT_BLOCK
from pipeline.index.reader import ENTRIES_AT_ONCE, GATHERED
from pipeline.index.reader import QUERY_BLOCK as SEARCH_BLOCK
from pipeline.index.sizing import Sizing, longest_lists, propose_sizing
from pipeline.index.training import (
    ROUNDS,
    branch_count,
    grown_rows,
    most_pairs,
    rows_per_group,
    sample_rows,
)
from pipeline.index.vectors import SLICE_ROWS
from pipeline.postings import EXACT_HEADS, LINK_BYTES, list_count
from pipeline.upgrade.closed import ANCHORS
from pipeline.upgrade.ranking import QUERY_BLOCK as RANKED_TOGETHER

__all__ = ["Estimate", "Serving", "check_fits", "estimate", "expected_vectors", "migration_memory", "sized"]

MB = 1024 * 1024


@dataclass(frozen=True)
class Constants:
    """Measured on two cores of an AVX-512 server."""

    worker_mb: float = 250.0
    """Anonymous memory of a worker that has imported the libraries of the build stages."""
    torch_mb: float = 170.0
    """What torch adds to it."""
    start_s: float = 9.0
    """Cluster and workers ready."""
    load_s: float = 9.0
    """Encoder actors ready."""
    task_s: float = 0.05
    """Receipt, files and footers of one task."""
    rows_per_s: float = 12_000.0
    """Rows through read, merge, place and build, all together, on one core."""
    flops_per_s: float = 4e10
    """Float32 products on one core."""
    tokens_per_s: float = 6_500.0
    """Tokens through a small encoder (22 million parameters) in bfloat16 on one core; scaled by `strata plan`."""
    learning_row_s: float = 2.5e-3
    """Learning a binarizer from a sample row of 384 dimensions, on one core."""
    network_row_s: float = 15e-3
    """Training the recurrent network on a sample row, its maps linear."""
    bytes_per_token: float = 4.2
    compression: float = 0.45
    """Of text, in our Parquet files."""


CONSTANTS = Constants()
MOST_LEARNED = 32_000
"""Sample rows beyond which learning takes no longer."""
MOST_TRAINED = 16_000
"""Sample rows beyond which training the network does not."""
STEP_ROWS = 2200
"""Vectors whose codes one step of that training makes."""
KMEANS_ITERATIONS = 12
JUDGED_QUERIES = 1000
COPIES = 0.75
"""Further entries of a vector with every doubling of `max_replicas`: 1.7 of 2 and 2.3 of 4 were measured."""
MOST_VECTORS = 2**31 - 1
"""Rows of a partition are numbered in 32 bits."""
SKEW = 1.5
"""Rows of a large branch, in units of the mean."""


@dataclass(frozen=True)
class Estimate:
    """Cost of a plan."""

    rows: int
    shards: int
    bytes: int
    """Written under the root by a first run."""
    memory_by_stage: dict[str, int]
    """Peak of one task of each stage, in MB; of `encode`, of one actor; of `driver`, of the process that starts the tasks."""
    seconds: float
    """Of a first run. Later ones encode new texts alone, and learn a binarizer only where the drift says so, which the
    sample tells and the plan does not know: this bounds them."""

    def as_dict(self) -> dict[str, Any]:
        """For a summary."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}


def estimate(
    plan: Plan,
    config: SizedConfig,
    *,
    dims: int,
    text_buckets: int,
    cpus: int,
    tokens_per_s: float = CONSTANTS.tokens_per_s,
) -> Estimate:
    """Reckon the cost of a first run.

    Args:
        plan: The frozen shard plan.
        config: The run.
        dims: Width of the vectors.
        text_buckets: Buckets of the embedding cache, which an earlier and smaller corpus may have fixed.
        cpus: Cores that work.
        tokens_per_s: Measured speed of the encoder on one core.
    """
    torch_mb = CONSTANTS.torch_mb if _is_learned(expected_vectors(plan, config), config) else 0
    memory = {
        stage: round(CONSTANTS.worker_mb + (torch_mb if stage == "learn" else 0) + held / MB)
        for stage, held in _held_bytes(plan, config, dims, text_buckets).items()
    }
    if not plan.embedding_dims:
        memory["encode"] = config.embedding.memory_mb_per_actor
    return Estimate(
        rows=plan.rows,
        shards=len(plan.shards),
        bytes=_bytes(plan, config, dims),
        memory_by_stage=memory,
        seconds=_seconds(plan, config, dims, text_buckets, cpus, tokens_per_s),
    )


@dataclass(frozen=True)
class Serving:
    """What a release will ask of the servers that read it."""

    storage: str
    lists: int
    rows_per_list: int
    max_replicas: int
    code_bytes: int
    memory_mb: int
    """Of heads, directory and binarizer, libraries and filters not counted."""


def sized(plan: Plan, config: Config, *, dims: int) -> tuple[SizedConfig, Serving]:
    """Settle the sizes that the configuration leaves open.

    Args:
        plan: The frozen shard plan.
        config: The run.
        dims: Width of the vectors.

    Raises:
        ConfigError: A server would need more memory than it is allowed; the message says how long lists would have to be.
    """
    serving, layout = config.serving, config.layout
    vectors = expected_vectors(plan, config)
    _check_addressable(vectors, config, dims)
    allowed = None if serving.memory_mb is None else serving.memory_mb * MB
    found = propose_sizing(
        vectors,
        dims,
        storage=serving.storage,
        memory_bytes=allowed,
        rows_per_list=layout.rows_per_list,
        max_replicas=layout.max_replicas,
    )
    _check_server(found, config, propose_sizing(vectors, dims, storage=serving.storage, memory_bytes=allowed))
    sizes = {"rows_per_list": found.rows_per_list, "max_replicas": found.max_replicas}
    binarizer = _with_size(config.binarizer, found.code_bytes)
    settled = SizedConfig(
        **dict(config) | {"layout": SizedLayout(**dict(layout) | sizes), "binarizer": binarizer}
    )
    code = _code_shape(binarizer, dims)
    return settled, Serving(
        storage=serving.storage,
        lists=found.lists,
        **sizes,
        code_bytes=code.num_bytes,
        memory_mb=math.ceil(found.server_bytes / MB),
    )


def _with_size(config: BinarizerConfig, code_bytes: int) -> BinarizerConfig:
    is_given = any(size is not None for size in (config.bytes, config.levels, config.bits_per_dim))
    return config if is_given else config.model_copy(update={"bytes": code_bytes})


def _check_addressable(vectors: int, config: Config, dims: int) -> None:
    """Refuse what the numbers and the row groups of our files cannot hold."""
    if vectors > MOST_VECTORS:
        problem = f"has about {vectors:,} vectors; a release holds at most {MOST_VECTORS:,}"
        raise ConfigError("corpus", problem, "cut the corpus into several roots")
    asked, most = config.layout.rows_per_list, longest_lists(dims)
    if asked is not None and asked > most:
        problem = f"must be at most {most} for vectors of {dims} dimensions, found {asked}"
        raise ConfigError("layout.rows_per_list", problem, "lower it")


def _check_server(found: Sizing, config: Config, free: Sizing) -> None:
    """Refuse sizes whose heads do not fit a server; `free` are those that strata would choose."""
    allowed = config.serving.memory_mb
    need = math.ceil(found.server_bytes / MB)
    if allowed is None or need <= allowed:
        return
    remedy = "raise serving.memory_mb"
    if config.layout.rows_per_list is not None and free.server_bytes <= allowed * MB:
        remedy = f"raise layout.rows_per_list to {free.rows_per_list}, or {remedy}"
    what = f"the heads of {found.lists:,} lists of {found.rows_per_list} rows need about {need} MB"
    raise ConfigError(
        "serving.memory_mb",
        f"the release would not fit a server: {what}, allowed are {allowed} MB",
        remedy,
    )


def _text_per_row(plan: Plan) -> float:
    return plan.text_bytes / max(plan.rows, 1)


def expected_vectors(plan: Plan, config: Config) -> int:
    """Vectors of the corpus: its rows, or their chunks by the mean length of a text."""
    chunk = config.corpus.chunk
    if chunk is None:
        return plan.rows
    tokens = _text_per_row(plan) / CONSTANTS.bytes_per_token
    return plan.rows * max(1, math.ceil(tokens / (chunk.max_tokens - chunk.overlap_tokens)))


def _held_bytes(plan: Plan, config: SizedConfig, dims: int, text_buckets: int) -> dict[str, float]:
    """Bytes that one task of each stage holds at once, besides what a worker holds that does nothing."""
    vectors, layout = expected_vectors(plan, config), config.layout
    vector = 4 * dims
    text = _text_per_row(plan) + 150
    row = text + (vector if plan.embedding_dims else 0)
    texts = vectors / text_buckets
    lists = list_count(vectors, layout.rows_per_list)
    code = _code_shape(config.binarizer, dims)
    copies = layout.max_replicas
    placed = 2 * dims + code.num_bytes + 100 + 8 * (copies - 1)
    entry = code.num_bytes + 40
    block = SLICE_ROWS * vector
    segment = min(vectors, layout.segment_rows)
    branch = SKEW * grown_rows(vectors, layout) / branch_count(lists, sample_rows(vectors, layout))
    group = min(max(SKEW * rows_per_group(layout), branch), grown_rows(vectors, layout))
    near = 12 * SCORES_PER_BLOCK + 3 * PAIRS_PER_BLOCK * vector
    queries = config.evaluation.sample_queries + TUNING_QUERIES
    pairs = most_pairs(layout) if config.binarizer.pairs is not None else 0
    held = {
        "read": 3 * min(config.corpus.shard_rows, plan.rows) * row,
        "merge": 3.5 * plan.rows / plan.document_buckets * row,
        "learn": (2.5 * vector + 8 * code.width) * sample_rows(vectors, layout)
        + 24 * pairs * vector
        + _network_bytes(config.binarizer, dims, code),
        "train": 5 * sample_rows(vectors, layout) * vector,
        "cut": 3 * texts * (2 * dims + 100) + 3 * block + near,
        "grow": 3 * group * vector + 6 * min(branch, layout.max_train_rows) * vector + near,
        "sort": 3 * group * vector + near,
        "recentre": 8 * 2 * group / layout.train_rows_per_list * vector,
        "place": 3.6 * texts * placed + 4 * block + near,
        "settle": 3.5 * segment * placed + 2 * segment * copies * entry,
        "build": 5 * segment * copies * entry,
        "exact": 2 * texts * 100 + 3 * block + SLICE_ROWS * min(queries, EXACT_BLOCK) * 8,
        "driver": 3 * lists * vector
        + 3 * min(queries, SEARCH_BLOCK) * lists * 4
        + 24 * GATHERED * min(queries, SEARCH_BLOCK)
        + 2 * ENTRIES_AT_ONCE * entry
        + len(plan.shards) * 2000
        + queries * (3 * NEIGHBOURS * 150 + 2 * vector)
        + 3 * pairs * (vector + 200),
    }
    if layout.heads == "vectors":
        held["snap"] = 3 * group * vector
    if lists > EXACT_HEADS:
        held["graph"] = lists * (3 * vector + LINK_BYTES)
    if pairs:
        held |= {"wanted": 3 * texts * 150 + 3 * block + 3 * pairs * vector, "pairs": 6 * pairs * vector}
    if plan.embedding_dims:
        return held | {"given": 3.8 * texts * row}
    return held | {"units": 3 * texts * text}


class _CodeShape(NamedTuple):
    num_bytes: int
    width: int
    """Most dimensions that its first level can have."""
    levels: int


def _code_shape(config: BinarizerConfig, dims: int) -> _CodeShape:
    if config.levels is not None:
        return _CodeShape(sum(config.levels) // 8, config.levels[0], len(config.levels))
    if config.bits_per_dim is not None:
        return _CodeShape(dims // 8 * config.bits_per_dim, dims, config.bits_per_dim)
    return _CodeShape(config.bytes or default_code_bytes(dims), dims, MAX_LEVELS)


def _network_bytes(config: BinarizerConfig, dims: int, code: _CodeShape) -> float:
    """Parameters with gradients, Adam's moments and their average; values of one step that its gradient needs."""
    if config.method != "recurrent":
        return 0.0
    blocks = 2 * code.levels - 1
    parameters = blocks * (dims * code.width + config.hidden_units * (dims + code.width))
    values = STEP_ROWS * blocks * (dims + 2 * code.width + 3 * config.hidden_units)
    return 4.0 * (5 * parameters + values)


def _bytes(plan: Plan, config: SizedConfig, dims: int) -> int:
    vectors, layout = expected_vectors(plan, config), config.layout
    text = plan.text_bytes * CONSTANTS.compression + plan.rows * 60
    code = _code_shape(config.binarizer, dims).num_bytes
    entries = 1 + COPIES * math.log2(layout.max_replicas)
    # The cache, placed and settled vectors, entries on their way and in their lists.
    per_vector = (4 * dims + 16) + 2 * (2 * dims + 40) + code + entries * (2 * code + 40)
    given = 2 * 4 * dims * plan.rows if plan.embedding_dims else 0
    units = 0 if plan.embedding_dims else plan.text_bytes * CONSTANTS.compression
    return int(3 * text + units + vectors * per_vector + given + _training_bytes(vectors, layout, dims))


def _training_bytes(vectors: int, layout: SizedLayout, dims: int) -> float:
    """Samples, twice, and the heads; with several groups, those and sums of their members after each round."""
    grown, lists = grown_rows(vectors, layout), list_count(vectors, layout.rows_per_list)
    rounds = ROUNDS if grown > rows_per_group(layout) else 0
    return 2 * grown * 2 * dims + lists * dims * (8 + rounds * (4 + 1.5 * 8))


def _seconds(
    plan: Plan, config: SizedConfig, dims: int, text_buckets: int, cpus: int, tokens_per_s: float
) -> float:
    vectors = expected_vectors(plan, config)
    lists = list_count(vectors, config.layout.rows_per_list)
    sample, grown = sample_rows(vectors, config.layout), grown_rows(vectors, config.layout)
    branches = branch_count(lists, sample)
    near = min(lists, branches + SEARCHED_BRANCHES * lists / branches)
    kmeans = 2.0 * dims * KMEANS_ITERATIONS / CONSTANTS.flops_per_s
    train = kmeans * (sample * branches + grown * lists / branches / cpus)
    train += 2.0 * dims * ROUNDS * grown * near / CONSTANTS.flops_per_s / cpus
    products = 2.0 * vectors * dims * (near + JUDGED_QUERIES) / CONSTANTS.flops_per_s / cpus
    rows = plan.rows / CONSTANTS.rows_per_s / cpus
    learn = _learning_seconds(sample, dims, config) if _is_learned(vectors, config) else 0.0
    tasks = (len(plan.shards) + plan.document_buckets + 4 * text_buckets) * CONSTANTS.task_s / cpus
    encode = 0.0
    if not plan.embedding_dims:
        limit = config.encoders[config.encoder_name or ""].max_tokens or 256
        tokens = min(_text_per_row(plan) / CONSTANTS.bytes_per_token, limit) * plan.rows
        encode = CONSTANTS.load_s + tokens / tokens_per_s / cpus
    return CONSTANTS.start_s + learn + train + products + rows + tasks + encode


def _is_learned(vectors: int, config: SizedConfig) -> bool:
    """Whether there is more to a binarizer than its closed form."""
    return config.binarizer.method != "rotation" and sample_rows(vectors, config.layout) >= FEWEST_ROWS


def _learning_seconds(sample: int, dims: int, config: Config) -> float:
    """On one core; a large sample costs no more than so many rows."""
    seconds = CONSTANTS.learning_row_s * min(sample, MOST_LEARNED)
    if config.binarizer.method == "recurrent":
        # A perceptron's two layers beside each map of dims to about as many.
        wider = 1 + 2 * config.binarizer.hidden_units / dims
        seconds += CONSTANTS.network_row_s * wider * min(sample, MOST_TRAINED)
    return seconds * (dims / 384) ** 2


SHRINKING = {
    "read": "lower corpus.shard_rows",
    "settle": "lower layout.segment_rows",
    "build": "lower layout.segment_rows",
    "wanted": "lower layout.max_train_rows",
    "pairs": "lower layout.max_train_rows",
    "learn": "lower layout.max_train_rows",
    "train": "lower layout.max_train_rows",
    "grow": "lower layout.max_train_rows",
    "sort": "lower layout.max_train_rows",
    "snap": "lower layout.max_train_rows",
    "recentre": "lower layout.max_train_rows",
    "graph": "raise layout.rows_per_list",
    "driver": "raise layout.rows_per_list",
    "upgrade": "lower upgrade.sample_documents",
    "members": "lower layout.segment_rows",
}
"""What makes the tasks of a stage smaller, where a setting does."""


def migration_memory(
    plan: Plan, config: SizedConfig, *, dims: tuple[int, int], text_buckets: int
) -> dict[str, int]:
    """Peak of one task of each stage that an upgrade or a backfill has besides those of a run, in MB.

    Args:
        plan: Of the documents.
        config: The job.
        dims: Of the new vectors and of the old ones.
        text_buckets: Of the new encoder's cache.
    """
    vectors, (new, old) = expected_vectors(plan, config), dims
    both = 4 * (new + old)
    sample, texts = min(vectors, config.upgrade.sample_documents), vectors / text_buckets
    text = _text_per_row(plan) + 150
    documents = 3.5 * vectors / plan.document_buckets * text
    segment = min(vectors, config.layout.segment_rows)
    held = {
        "sample": documents,
        "upgrade": sample * (4 * both + 2 * 4 * ANCHORS + RANKED_BYTES * RANKED_TOGETHER)
        + CONSTANTS.torch_mb * MB,
        "members": 4 * segment * MEMBER_BYTES,
        "name_members": 4 * vectors / plan.document_buckets * MEMBER_BYTES,
        "weigh_texts": texts * (both + 4 * old + 4 * MEMBER_BYTES),
        "weigh_leaves": 6 * vectors / plan.document_buckets * MEMBER_BYTES,
        "moving": documents,
        "settle_documents": documents + 4 * vectors / plan.document_buckets * MEMBER_BYTES,
    }
    return {stage: round(CONSTANTS.worker_mb + need / MB) for stage, need in held.items()}


MEMBER_BYTES = 60
"""Of a row in an earlier space, its id and its place, with the keys that it is joined by."""
RANKED_BYTES = 20
"""Of a document for each query that is ranked together with others."""


def check_fits(memory_by_stage: Mapping[str, int], config: Config) -> None:
    """Refuse a job one of whose tasks needs more memory than the configuration gives it.

    Args:
        memory_by_stage: Of `estimate` and `migration_memory`, in MB.
        config: The job.

    Raises:
        ConfigError: Names the stage, the setting that shrinks it, and the setting that allows more.
    """
    allowed = config.ray.task_memory_mb
    tasks = {stage: need for stage, need in memory_by_stage.items() if stage != "encode"}
    largest = max(tasks, key=lambda stage: tasks[stage])
    if tasks[largest] <= allowed:
        return
    remedy = ", or ".join([*filter(None, [SHRINKING.get(largest)]), "raise ray.task_memory_mb"])
    what = "the driver" if largest == "driver" else f"a task of stage {largest}"
    need = f"{what} needs about {tasks[largest]} MB"
    raise ConfigError(
        "ray.task_memory_mb", f"the plan does not fit: {need}, allowed are {allowed} MB", remedy
    )
