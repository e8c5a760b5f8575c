"""The hashing encoder with faults on demand, for tests and drills: `model: hashing:<dims>!faulty`.

A document that holds one of these words makes the encoder fail; every other text gets the vector that `hashing:<dims>`
gives. Queries fail by words of their own, `faulty_query_raise` and so on: those that look for marked documents must not.

    faulty_raise      raises RuntimeError              faulty_nan    its vector has a NaN
    faulty_memory     raises MemoryError               faulty_inf    its vector has an infinite value
    faulty_short      loses a row of the batch         faulty_zero   its vector is all zero
    faulty_exit       ends the process (os._exit)      faulty_kill   kills the process (SIGKILL)
    faulty_segfault   crashes the process (SIGSEGV)
    faulty_stick      raises RuntimeError, and so does every later call, whatever its texts: as after an assert on a GPU

With `_first_<n>` behind it (`faulty_raise_first_2`), a word fails the first n times that its text is tried. Whoever counts
over the deaths of processes names an existing folder for the counts: `hashing:64!faulty:/tmp/counts`.

Its fingerprint is that of `hashing:<dims>`, so to use that model next is what a mended encoder looks like. Never for a
release that people search; it cannot be chosen but by its name.
"""

import hashlib
import os
import re
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import EncoderConfig
from pipeline.embedding.hashing import FAULTY_MARK, HashingEncoder
from pipeline.spaces.fingerprint import EncoderIdentity

__all__ = ["FaultyEncoder"]

FAULT = re.compile(
    r"\bfaulty_(query_)?(raise|memory|short|exit|kill|segfault|stick|nan|inf|zero)(?:_first_(\d+))?\b"
)
SPOILED = {"nan": np.nan, "inf": np.inf, "zero": 0.0}


class FaultyEncoder:
    """Fails on marked documents, and on queries that are marked as such.

    Args:
        config: An encoder whose model is `hashing:<dims>!faulty[:<folder>]`.
        name: Name of the encoder in the configuration.
    """

    def __init__(self, config: EncoderConfig, *, name: str = "hashing") -> None:
        self._sound = HashingEncoder(config, name=name)
        self._prompt = config.document_prompt
        self.identity: EncoderIdentity = self._sound.identity
        _, _, folder = config.model.partition(FAULTY_MARK)[2].partition(":")
        self._folder = Path(folder) if folder else None
        self._counts: Counter[str] = Counter()
        self._is_stuck = False

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Turn n texts into (n, d) float32 of unit length, or fail as the texts say."""
        faults = [self._fault(self._prompt + text, "") for text in texts]
        return self._spoiled(self._sound.encode_documents(texts), faults)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Turn n queries into (n, d) float32 of unit length, or fail as the queries say."""
        faults = [self._fault(text, "query_") for text in texts]
        return self._spoiled(self._sound.encode_queries(texts), faults)

    def num_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(n,) words of each text that count, prompt left out."""
        return self._sound.num_tokens(texts)

    def _spoiled(self, vectors: NDArray[np.float32], faults: Sequence[str]) -> NDArray[np.float32]:
        self._is_stuck |= "stick" in faults
        if self._is_stuck:
            raise RuntimeError("device-side assert triggered")
        for row, fault in enumerate(faults):
            if fault in SPOILED:
                vectors[row, 0 if fault != "zero" else slice(None)] = SPOILED[fault]
            elif fault:
                _fail(fault)
        return vectors[:-1] if "short" in faults else vectors

    def _fault(self, text: str, kind: str) -> str:
        """What is to go wrong with a text of a kind now; empty for nothing."""
        found = FAULT.search(text)
        if found is None or (found[1] or "") != kind:
            return ""
        _, fault, times = found.groups()
        return fault if times is None or self._tries(text) <= int(times) else ""

    def _tries(self, text: str) -> int:
        """Times that a text was tried, this one counted."""
        name = hashlib.sha256(text.encode()).hexdigest()
        if self._folder is None:
            self._counts[name] += 1
            return self._counts[name]
        with (self._folder / name).open("ab") as file:
            file.write(b".")
            return file.tell()


def _fail(fault: str) -> None:
    match fault:
        case "raise":
            raise RuntimeError("this text was marked to fail")
        case "memory":
            raise MemoryError("this text was marked to take all memory")
        case "exit":
            os._exit(9)
        case "kill" | "segfault":
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSEGV)
