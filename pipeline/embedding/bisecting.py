"""Encode a batch of texts around those that cannot be encoded. Pure; who remembers the failures is `cache`.

A batch on which the encoder raises is tried three times, since the cause may pass; then it is halved until single texts
are left, and a text that fails three times alone is condemned. p bad ones among n texts cost at most
4 + p * (2 * log2(n) + 7) calls, about. Where memory ran out, the same batch would fail again: it is halved at once.
A vector that cannot be compared with others condemns its text without further tries.

No text is condemned by an encoder that is broken itself: some errors stay with a process (after an assert on a GPU every
call fails until the process ends), and memory that others took fails everybody. So a plain text is encoded first, each
time; if that fails too, nothing is said of any text.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError, EncoderBrokenError, PipelineError

__all__ = [
    "ATTEMPTS",
    "ENCODER_ERROR",
    "KILLED_WORKER",
    "NOT_FINITE",
    "OUT_OF_MEMORY",
    "REASONS",
    "ZERO_VECTOR",
    "Condemned",
    "check_works",
    "encode_around",
    "is_out_of_memory",
]

ENCODER_ERROR = "encoder_error"
OUT_OF_MEMORY = "out_of_memory"
NOT_FINITE = "not_finite"
ZERO_VECTOR = "zero_vector"
KILLED_WORKER = "killed_worker"
REASONS = (ENCODER_ERROR, OUT_OF_MEMORY, NOT_FINITE, ZERO_VECTOR, KILLED_WORKER)
"""Why a text has no vector."""

ATTEMPTS = 3
"""Tries of a batch before it is halved, and of a text alone before it is condemned."""
PLAIN_TEXT = "a plain text"
SHOWN_CHARS = 200
"""Characters of an error that are kept."""

Encode = Callable[[Sequence[str]], NDArray[np.floating]]


class Condemned(NamedTuple):
    """A text that cannot be encoded."""

    row: int
    """Its place in the batch."""
    reason: str
    """One of REASONS."""
    attempts: int
    """Times that it was tried alone."""
    error: str
    """What the encoder said."""


def encode_around(
    encode: Encode, texts: Sequence[str], *, dims: int
) -> tuple[NDArray[np.float32], list[Condemned]]:
    """Vectors of all texts that have one, and the others with the reason.

    Args:
        encode: Turns n texts into (n, d); a vector must be a function of its text alone.
        texts: (n,) the batch.
        dims: Width of a vector.

    Returns:
        (n, d) float32, zeros in the rows of condemned texts; the condemned, in order.

    Raises:
        EncoderBrokenError: Texts failed, and then a plain one did: the process should end.
        PipelineError: Whatever of ours the encoder raises: no text is to blame for a lost store or a wrong setting.
    """
    vectors = np.zeros((len(texts), dims), dtype=np.float32)
    condemned: list[Condemned] = []
    spans = [(0, len(texts))]
    while spans:
        start, stop = spans.pop()
        attempts = ATTEMPTS if stop - start in (1, len(texts)) else 1
        try:
            vectors[start:stop] = _encode_patiently(encode, texts[start:stop], dims, attempts)
        except _GaveUpError as failure:
            if stop - start == 1:
                _check_unbroken(encode, dims, failure.said)
                condemned.append(Condemned(start, failure.reason, failure.attempts, failure.said))
                continue
            middle = (start + stop) // 2
            spans += [(middle, stop), (start, middle)]
    useless = _useless(vectors, {found.row for found in condemned})
    if useless:
        _check_unbroken(encode, dims, useless[0].error)
    condemned += useless
    vectors[[found.row for found in condemned]] = 0
    return vectors, sorted(condemned)


def check_works(encode: Encode, *, dims: int, name: str) -> None:
    """See that an encoder encodes a plain text, before any text is blamed for what it does.

    Raises:
        ConfigError: It does not.
    """
    said = _control(encode, dims)
    if said is not None:
        problem = f"cannot encode {PLAIN_TEXT!r}: {said}"
        raise ConfigError(f"encoder {name}", problem, "mend the model, its libraries or its memory")


def _check_unbroken(encode: Encode, dims: int, said: str) -> None:
    """See that an encoder still encodes a plain text after it has failed on another, saying so."""
    if _control(encode, dims) is not None:
        problem = f"fails on {PLAIN_TEXT!r} too after: {said}"
        raise EncoderBrokenError("encoder", problem, "end its process and load it anew")


def _control(encode: Encode, dims: int) -> str | None:
    """What an encoder says that cannot encode a plain text; None if it can."""
    try:
        vectors = _encode_patiently(encode, [PLAIN_TEXT], dims, ATTEMPTS)
    except _GaveUpError as failure:
        return failure.said
    useless = _useless(vectors.astype(np.float32), set())
    return useless[0].error if useless else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in Python or in torch, on a GPU or not."""
    # torch raises a plain RuntimeError where the memory of the processor ends.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


class _GaveUpError(Exception):
    def __init__(self, reason: str, attempts: int, said: str) -> None:
        super().__init__(reason, attempts, said)
        self.reason, self.attempts, self.said = reason, attempts, said


def _encode_patiently(encode: Encode, texts: Sequence[str], dims: int, attempts: int) -> NDArray[np.floating]:
    attempt = 1
    while True:
        try:
            return _checked(encode(texts), len(texts), dims)
        except PipelineError:
            raise
        except Exception as error:
            ran_out = is_out_of_memory(error)
            if attempt >= attempts or (ran_out and len(texts) > 1):
                reason = OUT_OF_MEMORY if ran_out else ENCODER_ERROR
                raise _GaveUpError(reason, attempt, _said(error)) from error
        attempt += 1


def _checked(vectors: NDArray[np.floating], rows: int, dims: int) -> NDArray[np.floating]:
    found = np.asarray(vectors)
    if found.shape != (rows, dims) or not np.issubdtype(found.dtype, np.floating):
        raise ValueError(
            f"expected ({rows}, {dims}) floats of the encoder, found {found.shape} {found.dtype}"
        )
    return found


def _useless(vectors: NDArray[np.float32], known: set[int]) -> list[Condemned]:
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    usable = finite & vectors.any(axis=1)
    rows = [int(row) for row in np.flatnonzero(~usable) if row not in known]
    return [
        Condemned(row, ZERO_VECTOR, 1, "its vector has no length")
        if finite[row]
        else Condemned(row, NOT_FINITE, 1, "its vector has NaN or infinite values")
        for row in rows
    ]


def _said(error: BaseException) -> str:
    """One line of an error, without addresses: what is recorded must not differ from run to run."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"0x[0-9a-f]+", "0x…", text)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"
