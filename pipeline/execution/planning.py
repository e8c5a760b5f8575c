"""`strata plan`: freeze the shard plan and reckon what the run will cost, with the encoder's speed measured here and now."""

import contextlib
import os
import time
from dataclasses import asdict
from typing import Any

from pipeline.config import Config
from pipeline.corpus import plan_corpus
from pipeline.embedding.cache import bucket_count
from pipeline.embedding.encoder import load_encoder
from pipeline.embedding.precision import SAMPLE_TEXTS
from pipeline.errors import MissingFileError
from pipeline.execution.encoders import EncoderInForce, encoder_in_force
from pipeline.execution.estimates import CONSTANTS, check_fits, estimate, expected_vectors, sized
from pipeline.release import claim_root, record_plan
from pipeline.storage import open_store

__all__ = ["plan_job"]


def plan_job(config: Config) -> dict[str, Any]:
    """Plan a run and write the plan, nothing else of the run.

    Raises:
        ConfigError: The plan does not fit; the message names the setting to change.
    """
    store = open_store(config.root, config.storage)
    plan = plan_corpus(config.corpus, config.storage)
    with contextlib.suppress(MissingFileError):
        store.head("root.json")
        claim_root(store, config.corpus)
    encoder = encoder_in_force(store, config, plan, remember=False)
    buckets = bucket_count(store, encoder.fingerprint, expected_vectors(plan, config))
    cpus = config.ray.num_cpus or os.cpu_count() or 1
    speed = _tokens_per_s(encoder)
    settled, serving = sized(plan, config, dims=encoder.dims)
    cost = estimate(plan, settled, dims=encoder.dims, text_buckets=buckets, cpus=cpus, tokens_per_s=speed)
    check_fits(cost.memory_by_stage, config)
    record_plan(store, plan)
    return {
        "plan": plan.fingerprint,
        "corpus": config.corpus.identity,
        "files": len(plan.files),
        "serving": asdict(serving),
        **cost.as_dict(),
    }


def _tokens_per_s(encoder: EncoderInForce) -> float:
    """Speed of the encoder on one core, on the sample texts that also decide the number format."""
    if encoder.ready_made or encoder.spec is None:
        return CONSTANTS.tokens_per_s
    spec = encoder.spec
    model = load_encoder(spec.config, dtype=spec.dtype, name=spec.name, threads=1, storage=spec.storage)
    tokens = int(model.num_tokens(SAMPLE_TEXTS).sum())
    model.encode_documents(SAMPLE_TEXTS)
    start = time.perf_counter()
    model.encode_documents(SAMPLE_TEXTS)
    return tokens / max(time.perf_counter() - start, 1e-9)
