"""Vectors of queries that a file has as texts or ready-made: those that a release is judged on, and those to learn from."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.evaluation.queries import Queries
from pipeline.evaluation.stage import encode_query_texts, read_query_vectors
from pipeline.execution.encoders import EncoderInForce
from pipeline.execution.session import Session
from pipeline.execution.work import Task

__all__ = ["query_vectors"]


def query_vectors(
    session: Session, stage: str, queries: Queries, encoder: EncoderInForce, *, place: str
) -> NDArray[np.float32]:
    """(q, d) unit vectors; texts are encoded by a task.

    Args:
        session: The run.
        stage: Part of the run that this belongs to.
        queries: Texts or vectors.
        encoder: Of the texts.
        place: Where they stand, for messages.

    Raises:
        ConfigError: They are texts, and no encoder is configured.
        DataError: One cannot be encoded.
    """
    if queries.vectors is not None:
        return queries.vectors / np.linalg.norm(queries.vectors, axis=1, keepdims=True)
    if encoder.spec is None:
        problem = "has texts, and no encoder is configured"
        raise ConfigError(place, problem, "give vectors, or configure an encoder")
    inputs = {"texts": queries.texts, "encoder": encoder.query_fingerprint}
    call = partial(encode_query_texts, texts=queries.texts or (), query_ids=queries.query_ids, place=place)
    output = session.outputs(stage, [Task("queries", inputs, call)], encoder=encoder)[0]
    return read_query_vectors(session.store, output.files["queries"])
