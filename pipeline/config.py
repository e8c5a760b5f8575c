"""The knobs of one run: strict, typed, frozen; one YAML describes one run.

`load_config` reads the YAML, applies dotted `--set key=value` overrides and returns a `Config`. Unknown keys
are refused with the nearest known one. `conf/schema.json` is generated from these models (`json_schema`),
and so is the reference in `conf/README.md` (`reference`). Nothing here touches a corpus or a store.
"""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError

__all__ = [
    "BinarizerConfig",
    "ChunkConfig",
    "ClusterConfig",
    "Config",
    "CorpusConfig",
    "EmbeddingConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "ExampleSearch",
    "GatesConfig",
    "LayoutConfig",
    "LeaseConfig",
    "NodeGroupConfig",
    "ReleaseConfig",
    "ReportConfig",
    "SearchConfig",
    "ServingConfig",
    "SizedConfig",
    "SizedLayout",
    "StorageConfig",
    "json_schema",
    "load_config",
    "reference",
]

AttributeType = Literal["string", "int", "float", "bool", "timestamp", "list<string>"]


MOST_ROWS_PER_LIST = 4096
"""Two times as many are the longest list, and such a list is one run of bytes."""


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Columns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ChunkConfig(_Strict):
    """Cutting of long documents; a search reports documents, never chunks."""

    max_tokens: int = Field(256, ge=16)
    """Most tokens of one chunk, in the encoder's own tokens."""
    overlap_tokens: int = Field(0, ge=0)
    """Tokens that a chunk repeats from the one before."""
    tokenizer: str | None = None
    """Name of the encoder whose tokenizer cuts; absent: the one in force. Named, it stays the same through `strata upgrade`, and
    with it the chunks."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.overlap_tokens >= self.max_tokens:
            raise ValueError(f"overlap_tokens must be below max_tokens ({self.max_tokens})")
        return self


class CorpusConfig(_Strict):
    """Where the documents are, and which columns mean what."""

    uri: str
    """File, folder or glob; local or s3://."""
    format: Literal["parquet", "jsonl"]
    """How the files are written. In a folder, files that end otherwise (.parquet; .jsonl, .json, .ndjson) are left alone."""
    id: str = "_id"
    """Column with the document's name: strings of at most 1,024 bytes or integers, unique."""
    text: Columns = ()
    """Columns whose non-empty values, joined by `separator`, are the text that is embedded."""
    separator: str = " "
    """What stands between two text columns."""
    attributes: tuple[str, ...] | dict[str, AttributeType] = ()
    """Columns to filter by. A list takes the types from the files; a mapping states them."""
    embedding: str | None = None
    """Column with ready-made vectors; encoding is skipped. They are normalized to unit length."""
    name: str | None = None
    """Name of the corpus that the root belongs to; the uri if absent. Set it when every snapshot has a uri of its own."""
    chunk: ChunkConfig | None = None
    """Cut long documents; absent: one vector per document, longer texts truncated by the encoder."""
    shard_rows: int = Field(20_000, ge=1)
    """Most rows of one shard."""
    error_budget: float = Field(0.01, ge=0)
    """Bad rows that a run may set aside, those counted whose text cannot be encoded: below 1 a fraction of the rows read, from 1
    on a number of rows."""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if not self.text and self.embedding is None:
            raise ValueError("needs `text` columns, or an `embedding` column with ready-made vectors")
        if self.chunk is not None and self.embedding is not None:
            raise ValueError("`chunk` cuts texts, which `embedding` does not use; remove one of them")
        return self

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the attribute columns, in the order of the configuration."""
        return tuple(self.attributes)

    @property
    def identity(self) -> str:
        """What `root.json` records: the corpus that a root belongs to."""
        return self.name or self.uri


class EncoderConfig(_Strict):
    """One sentence-transformers model and how it is used."""

    model: str
    """`package:<module>` (a model inside an installed package), `hf:<repo>@<revision>`, `path:<folder>` or `s3://<prefix>`;
    `hashing:<dims>` for tests and dry runs."""
    query_model: str | None = None
    """A separate encoder for queries that shares the documents' space; same forms as `model`."""
    query_prompt: str = ""
    """Put in front of every query."""
    document_prompt: str = ""
    """Put in front of every document."""
    max_tokens: int | None = Field(None, ge=1)
    """Longer inputs are truncated; absent: the model's own limit."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the processor or GPU computes it and a measured sample agrees with float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


class EmbeddingConfig(_Strict):
    """How texts become vectors."""

    unit_texts: int = Field(1024, ge=1)
    """Texts encoded and stored in one step: what a crash can cost, per actor."""
    batch_tokens: int = Field(4096, ge=16)
    """Tokens of one batch, padding counted."""
    actors: int | None = Field(None, ge=1)
    """Encoder actors; absent: one per GPU share, or one per CPU core."""
    gpus_per_actor: float | None = Field(None, gt=0)
    """Share of a GPU that one actor takes; absent: one whole GPU where the cluster has any."""
    threads_per_actor: int = Field(1, ge=1)
    """CPU threads of one actor."""
    memory_mb_per_actor: int = Field(1024, ge=128)
    """Memory of one actor: plan reckons with it, and the actor reserves it, so that a node runs no more than fit."""


class PairsConfig(_Strict):
    """Queries of people with documents that they want, for learning the binarizer: clicks, or judgments of relevance."""

    queries: str
    """Parquet or JSONL of queries, as `evaluation.queries`; filters do not matter here. They must be other queries than those
    that a release is reported on, or the report would be of what was learned by heart: reported ones that are found here, by
    their vectors, are left out."""
    qrels: str
    """Which documents they want, as `evaluation.qrels`: each line with a score above 0 is a pair. Of clicks the score is their
    weight, but all pairs count the same. At most `layout.max_train_rows` / 8 pairs are used, chosen by hash."""


class BinarizerConfig(_Strict):
    """How codes are made, and their size: at most one of bytes, levels, bits_per_dim (none: by `serving`)."""

    method: Literal["auto", "rotation", "learned", "recurrent"] = "auto"
    """rotation: in closed form; learned: from pairs of near vectors, too; auto: both are fitted, and the one is kept that finds
    more for queries held out from both; recurrent: the network of BEBR on top of the learned one, slower and by our
    measurements no better. Of fewer than 2,048 sample vectors nothing is learned."""
    hidden_units: int = Field(0, ge=0)
    """Of each perceptron of the recurrent network; 0: its maps are linear. The paper has 2,048, for millions of pairs."""
    bytes: int | None = Field(None, ge=1)
    """Code bytes per vector, factor and offset not counted; the levels are chosen from the spectrum. Absent, as all three: by
    `serving`, one for 8 dimensions on a disk, 48 at least, and twice as many in an object store."""
    levels: tuple[int, ...] | None = None
    """Dimensions of each residual level, not growing, multiples of 8: [256, 256, 128, 128]."""
    bits_per_dim: int | None = Field(None, ge=1, le=8)
    """The same number of levels for every dimension."""
    gpus: float | None = Field(None, ge=0)
    """Share of a GPU for learning, 0 for none; absent: a whole one where the cluster has any, beside `ray.task_memory_mb`."""
    max_drift: float | None = Field(0.01, ge=0, le=1)
    """What the binarizer of the current release may lose on a changed corpus, in recall@10 by codes alone, beyond the error of
    measuring, and be kept: then nothing is learned, and equal vectors keep their codes. null: a changed corpus always gets a
    binarizer of its own."""
    pairs: PairsConfig | None = None
    """What people want; absent: vectors of documents stand in for queries, and want their neighbours. Other files ask for
    another binarizer; where only their content changed, the corpus counts as changed, and `max_drift` decides."""

    @model_validator(mode="after")
    def _pairs_are_learned_from(self) -> Self:
        if self.pairs is not None and self.method == "rotation":
            raise ValueError(
                "pairs: method rotation learns nothing from them; leave them out, or use method auto"
            )
        return self

    @model_validator(mode="after")
    def _units_of_a_network(self) -> Self:
        if self.hidden_units and self.method != "recurrent":
            raise ValueError(f"hidden_units are the recurrent network's; found method {self.method}")
        return self

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        given = [n for n in ("bytes", "levels", "bits_per_dim") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of bytes, levels, bits_per_dim; found {' and '.join(given)}")
        if self.levels is not None:
            if not self.levels or any(m <= 0 or m % 8 for m in self.levels):
                raise ValueError("levels must be multiples of 8 above 0")
            if list(self.levels) != sorted(self.levels, reverse=True):
                raise ValueError("levels must not grow: level t covers the first m_t dimensions")
        return self


class LayoutConfig(_Strict):
    """How vectors are laid out in partitions and posting lists."""

    workload: str | None = None
    """Parquet of past queries: `filter`, the WHERE text of a query or null, and optionally `weight`. Rows that these filters want
    together become partitions of their own, which other queries need not look into. Absent: one partition."""
    min_partition_rows: int = Field(8192, ge=1)
    """Rows of a partition at least, about."""
    max_partitions: int = Field(64, ge=1, le=4096)
    """Partitions at most. Fewer are made where more would cost queries more than they save."""
    unfiltered_slowdown: float = Field(1.3, ge=1)
    """How many times as long as in one partition a query without a filter may take, about: bounds the partitions, unless every
    query of the workload has a filter."""
    rows_per_list: int | None = Field(None, ge=1, le=MOST_ROWS_PER_LIST)
    """Rows of a posting list, about, copies not counted; the number of lists follows from the rows. No list has more than twice
    as many. Absent: 100, more where the heads would not fit in `serving.memory_mb`."""
    max_replicas: int | None = Field(None, ge=1, le=8)
    """Posting lists that a vector may be in: its own, and near ones whose heads a query for it might find first. 1: no copies;
    absent: 2."""
    heads: Literal["means", "vectors"] = "means"
    """What stands for a posting list in memory: the mean of its rows, or the vector of the corpus nearest to it, as in SPANN."""
    segment_rows: int = Field(131_072, ge=1)
    """Rows of a segment, about; bounds the memory of a build task."""
    train_rows_per_list: int = Field(64, ge=1)
    """Sample rows per posting list for clustering."""
    max_train_rows: int = Field(65_536, ge=256)
    """Most sample rows that one task holds: for the binarizer and for the first level of the clustering. The second level has
    `train_rows_per_list` for every list, in as many tasks as that takes."""


class SizedLayout(LayoutConfig):
    """A layout all of whose sizes are settled."""

    rows_per_list: int = Field(ge=1, le=MOST_ROWS_PER_LIST)
    max_replicas: int = Field(ge=1, le=8)


class ServingConfig(_Strict):
    """What servers read releases with; the sizes of posting lists and codes follow from it."""

    storage: Literal["ssd", "object_store"] = "ssd"
    """What they read posting lists from. A disk answers thousands of small requests in the time of one to an object store."""
    memory_mb: int | None = Field(None, ge=1)
    """Memory that heads and directory of a release may take on a server, libraries and filters not counted. A plan that needs
    more is refused."""


class SearchConfig(_Strict):
    """Defaults that a release gives to its readers."""

    lists: int | None = Field(None, ge=1)
    """Most posting lists per query; absent: chosen for `evaluation.target_recall`."""
    margin: float | None = Field(None, ge=0, le=4)
    """By how much the squared L2 distance of a query to a list's head may exceed that to the nearest head; absent: chosen."""
    rerank: int | None = Field(None, ge=0)
    """Candidates scored again with float16 vectors where ten documents are asked for, in proportion where more are; 0: codes
    only; absent: chosen."""


class ExampleSearch(_Strict):
    """A search that the run prints with the text of its hits."""

    text: str
    """The query."""
    filter: str | None = None
    """WHERE text over the attributes."""


class EvaluationConfig(_Strict):
    """What a release is judged on."""

    queries: str | None = None
    """Parquet or JSONL of queries (query_id or _id, text or embedding)."""
    qrels: str | None = None
    """Relevance judgments: TSV (query-id, corpus-id, score) or Parquet with these columns."""
    sample_queries: int = Field(500, ge=1)
    """Queries judged against exact search; document vectors stand in where no queries are given."""
    target_recall: float = Field(0.98, gt=0, le=1)
    """Share of the true ten nearest that a search should find. Lists, margin and re-rank depth are the cheapest that reach it,
    with their standard error to spare, on tuning queries: those of `queries` that are not reported on, document vectors where
    there are too few. Lower reads less: 0.95 about half."""
    examples: tuple[ExampleSearch, ...] = ()
    """Searches to print at the end of a run."""


class GatesConfig(_Strict):
    """Thresholds below which a release is not published; absent: not checked."""

    min_recall_at_10: float | None = Field(None, ge=0, le=1)
    """Least recall@10 against exact search."""
    min_ndcg_at_10: float | None = Field(None, ge=0, le=1)
    """Least nDCG@10 against the qrels."""
    max_ndcg_loss: float | None = Field(None, ge=0, le=1)
    """Most nDCG@10 that the index may lose against exact float32 search."""
    max_removed_fraction: float | None = Field(None, ge=0, le=1)
    """Largest share of the last release's documents that may be missing now: a guard against half a corpus."""


class ReleaseConfig(_Strict):
    """How long releases and unnamed files stay."""

    keep: int = Field(3, ge=1)
    """Newest releases that gc does not retire."""
    grace_hours: float = Field(24.0, ge=0)
    """Age, by the store's own clock, before gc deletes a file that nothing names."""


class ReportConfig(_Strict):
    """Prices for `strata report`; without them it shows no money."""

    machines_price_per_hour: float | None = Field(None, ge=0)
    """Price of one hour of all the machines that a run occupies."""
    storage_price_per_gb_month: float | None = Field(None, ge=0)
    """Price of 10^9 bytes for one month."""
    currency: str = "USD"
    """What prices are in."""


class UpgradeConfig(_Strict):
    """How a new encoder is judged before queries use it."""

    sample_documents: int = Field(20_000, ge=100)
    """Documents that the new encoder embeds to train bridges and to judge them, beside those that evaluation.qrels name. Their
    vectors stay in its cache."""
    tolerance: float = Field(0.01, ge=0, le=1)
    """By how much nDCG@10, or overlap@10 with the new model where nobody judged, may be below the status quo over a bridge."""
    workload: str | None = None
    """Past queries as Parquet or JSONL (query_id, text or embedding, optional weight): a backfill embeds first what they look at.
    Other ones than `evaluation.queries`. Absent: what the bridge misses most comes first."""
    cascade_depths: tuple[int, ...] = (50, 100, 200)
    """Candidates of a query that the cascades of the ladder embed."""


class LeaseConfig(_Strict):
    """What a job does while another one changes the same root."""

    on_busy: Literal["wait", "leave"] = "wait"
    """wait: until the other has ended; leave: with exit 75, once the other is seen to be alive."""
    wait_minutes: float = Field(60.0, ge=0)
    """Longest wait; then the job leaves with exit 75."""
    stale_after_s: float = Field(30.0, gt=0)
    """Silence, watched by the waiting job's own clock, after which a holder counts as dead. A holder shows every 5 seconds that
    it lives, oftener where this is below 30. One that was killed on this machine is found dead at once."""


class StorageConfig(_Strict):
    """S3 settings; credentials come from the environment only."""

    endpoint_url: str | None = None
    """An S3-compatible server; absent: AWS, or AWS_ENDPOINT_URL."""
    attempts: int = Field(8, ge=1)
    """Tries of one request before the run stops with exit 75; 8 take about 16 s where a store answers at once that it is busy."""


class NodeGroupConfig(_Strict):
    """Nodes that a cluster's autoscaler may start."""

    nodes: int = Field(ge=1)
    """Most of them at once."""
    cpus: float = Field(ge=0)
    """Cores of one, as Ray counts them."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of one."""
    memory_mb: int = Field(ge=64)
    """Memory of one that tasks and actors may reserve."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels of one."""


class ClusterConfig(_Strict):
    """Where the work runs. `num_cpus`, `memory_mb`, `object_store_mb` and `temp_dir` are a local Ray's: a cluster has its own."""

    address: str | None = None
    """A Ray cluster (`auto`: the one that this process runs in; host:port; ray://host:port); absent: this machine."""
    namespace: str | None = None
    """Ray namespace of the run on a cluster that others use too; absent: one of its own."""
    num_cpus: int | None = Field(None, ge=1)
    """Cores of a local Ray; absent: all."""
    memory_mb: int | None = Field(None, ge=64)
    """Memory that tasks and actors of a local Ray share; absent: what is free when it starts, less the object store. Then a
    machine with less than `task_memory_mb` still runs one task at a time."""
    object_store_mb: int | None = Field(None, ge=80)
    """Object store of a local Ray, in /dev/shm; absent: Ray's choice, about 30 % of the memory. Rows do not pass through it."""
    temp_dir: str | None = Field(None, pattern="^/")
    """Folder for the logs and sockets of a local Ray, absolute and short; absent: /tmp/ray."""
    pass_env: tuple[str, ...] = ()
    """Environment variables of this process that the workers of a cluster get too; `AWS_*` takes all that start so. Ray's
    dashboard shows their values: where nodes have credentials of their own, as in `infra/kuberay`, leave it empty."""
    task_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that tasks may run on, so that they stay off GPU nodes: {pool: cpu}, {pool: "!gpu"}, {zone: "in(a,b)"}.
    Encoder actors, and the task that learns a binarizer, go wherever a GPU is; where none is, actors go anywhere."""
    autoscaling: tuple[NodeGroupConfig, ...] = ()
    """Groups that the cluster's autoscaler may start, such as {nodes: 16, cpus: 8, memory_mb: 27136, labels: {pool: cpu}}. Ray
    does not tell; without this, work is cut for the nodes that are there, and a GPU group that stands at zero is not used."""
    max_in_flight: int | None = Field(None, ge=1)
    """Tasks submitted at once; absent: twice the cores that are there or that `autoscaling` may add."""
    task_memory_mb: int = Field(1536, ge=64)
    """Memory that one task reserves, so that a node runs no more at once than fit. A plan whose tasks, or whose driver,
    need more is refused."""
    max_retries: int = Field(3, ge=0)
    """Attempts after a lost worker or a transient error."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port on which a local Ray exports metrics for Prometheus; absent: any free one. A cluster has its own setting."""


class Config(_Strict):
    """One run."""

    root: str
    """Where all artifacts live: a folder or s3://bucket/prefix. Belongs to one corpus."""
    corpus: CorpusConfig
    encoders: dict[str, EncoderConfig] = Field(default_factory=dict)
    """Every encoder the run may use, by name."""
    encoder: str | None = None
    """The encoder in force; may be absent where there is one, or with ready-made vectors."""
    embedding: EmbeddingConfig = EmbeddingConfig()
    binarizer: BinarizerConfig = BinarizerConfig()
    layout: LayoutConfig = LayoutConfig()
    serving: ServingConfig = ServingConfig()
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gates: GatesConfig = GatesConfig()
    release: ReleaseConfig = ReleaseConfig()
    report: ReportConfig = ReportConfig()
    upgrade: UpgradeConfig = UpgradeConfig()
    lease: LeaseConfig = LeaseConfig()
    storage: StorageConfig = StorageConfig()
    ray: ClusterConfig = ClusterConfig()
    seed: int = Field(0, ge=0)
    """Seed of every random choice."""

    @model_validator(mode="after")
    def _encoder_is_known(self) -> Self:
        if self.encoder is not None and self.encoder not in self.encoders:
            known = ", ".join(sorted(self.encoders)) or "none"
            raise ValueError(f"encoder: {self.encoder!r} is not among `encoders` (known: {known})")
        if self.encoder is None and self.corpus.embedding is None and len(self.encoders) != 1:
            raise ValueError("encoder: name the one of `encoders` that is in force")
        return self

    @model_validator(mode="after")
    def _tokenizer_is_known(self) -> Self:
        chunk = self.corpus.chunk
        if chunk is not None and chunk.tokenizer is not None and chunk.tokenizer not in self.encoders:
            known = ", ".join(sorted(self.encoders)) or "none"
            raise ValueError(
                f"corpus.chunk.tokenizer: {chunk.tokenizer!r} is not among `encoders` (known: {known})"
            )
        return self

    @model_validator(mode="after")
    def _pairs_are_not_judged_on(self) -> Self:
        pairs, judged = self.binarizer.pairs, self.evaluation
        if pairs is not None and (pairs.queries, pairs.qrels) == (judged.queries, judged.qrels):
            raise ValueError(
                f"binarizer.pairs: {pairs.queries} and {pairs.qrels} are what evaluation reports on; "
                "give other queries or other judgments, or the report would be of what was learned by heart"
            )
        return self

    @property
    def encoder_name(self) -> str | None:
        """Name of the encoder in force; None where vectors are ready-made and no encoder is given."""
        if self.encoder is not None:
            return self.encoder
        return next(iter(self.encoders)) if len(self.encoders) == 1 else None


class SizedConfig(Config):
    """One run whose sizes are settled."""

    layout: SizedLayout


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read one YAML and apply `key.sub=value` overrides, whose values are YAML themselves.

    Raises:
        ConfigError: The file is missing, is not YAML, or breaks the schema; the message names the key path.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            str(path), f"cannot be read ({error.strerror})", "give the path of a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            str(path), f"is not YAML: {' '.join(str(error).split())}", "mend the syntax"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(str(path), "must be a mapping of settings", "see conf/README.md")
    for override in overrides:
        _apply_override(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise _explained(error, str(path)) from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}", "expected key=value", "for example --set search.rerank=200")
    *parents, leaf = key.split(".")
    node: Any = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"--set {override}", f"`{parent}` is a value, not a section", "name a setting below a section"
            )
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}", "the value is not YAML", "quote it") from error


def _explained(error: ValidationError, path: str) -> ConfigError:
    """One message of all findings, each with its key path and, for an unknown key, the nearest known one."""
    lines = []
    for found in error.errors():
        where = ".".join(str(part) for part in found["loc"]) or "(top level)"
        message = found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(found["loc"][-1]), _known_keys(), n=1)
            message = "unknown setting" + (f", did you mean `{near[0]}`?" if near else "")
        elif found["type"] == "missing":
            message = "is required"
        elif not isinstance(found["input"], dict):
            message += f", found {found['input']!r}"
        lines.append(f"{where}: {message}")
    return ConfigError(path, "; ".join(lines), "see conf/README.md")


def _known_keys() -> list[str]:
    schema = Config.model_json_schema()
    models = [schema, *schema.get("$defs", {}).values()]
    return sorted({key for model in models for key in model.get("properties", {})})


def json_schema() -> str:
    """The JSON schema of a configuration, for editors; kept as conf/schema.json."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def reference() -> str:
    """The reference of every setting in Markdown; kept as conf/README.md."""
    lines = [
        "# Configuration",
        "",
        "One YAML is one run. This page is generated from `pipeline/config.py` (`make docs`); `schema.json` gives completion",
        "in editors: put `# yaml-language-server: $schema=schema.json` on the first line. Any setting can be overridden:",
        "`strata run conf/quickstart.yaml --set search.rerank=200`. Relative paths are relative to the working directory.",
    ]
    lines += _section("", Config)
    return "\n".join(lines) + "\n"


def _section(prefix: str, model: type[BaseModel]) -> list[str]:
    lines = [
        "",
        f"## {prefix.rstrip('.') or 'Top level'}",
        "",
        "| setting | type | default | meaning |",
        "|---|---|---|---|",
    ]
    nested: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        inner = _inner_model(field.annotation)
        if inner is not None:
            key = f"{name}.<name>" if "dict" in str(field.annotation) else name
            nested.append((f"{prefix}{key}.", inner))
        kind = _type_text(field.annotation)
        default = (
            "required" if field.is_required() else _default_text(field.get_default(call_default_factory=True))
        )
        meaning = (field.description or (inner.__doc__ if inner else "") or "").replace("\n", " ")
        lines.append(f"| `{prefix}{name}` | {kind} | {default} | {meaning} |")
    for nested_prefix, inner in nested:
        lines += _section(nested_prefix, inner)
    return lines


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _type_text(annotation: Any) -> str:
    if isinstance(annotation, type) and not getattr(annotation, "__args__", ()):
        return annotation.__name__
    text = str(annotation).replace("typing.", "").replace("pipeline.config.", "").replace("NoneType", "None")
    return "`" + text.replace("|", "or") + "`"


def _default_text(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    return "absent" if value is None else f"`{json.dumps(value)}`"
