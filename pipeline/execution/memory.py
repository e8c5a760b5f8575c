"""Memory of this process while a unit of work is under way.

Anonymous memory (RssAnon) is what the kernel cannot take back and what a memory kill is about; mapped files and the object
store's shared memory, which resident size counts too, are not a task's own.
"""

import ctypes
import re
import resource
import sys
import threading
from pathlib import Path
from typing import Self

import pyarrow as pa

__all__ = ["PeakMemory", "give_back"]

INTERVAL_S = 0.02
STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak anonymous memory between entry and exit, sampled; where /proc does not tell, the process's resident peak."""

    def __init__(self) -> None:
        self._peak_mb = 0.0
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    @property
    def peak_mb(self) -> float:
        """So far, in MB of 1024 * 1024 bytes."""
        return self._peak_mb

    def __enter__(self) -> Self:
        self._look()
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._sampler.join()
        self._look()

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        self._peak_mb = max(self._peak_mb, _anonymous_mb())


def give_back() -> None:
    """Return freed memory to the system: allocators keep it, and the next unit's peak would stand on this one's."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _anonymous_mb() -> float:
    try:
        status = STATUS.read_bytes()
    except OSError:
        return _resident_peak_mb()
    # Kernels before 4.5 and some sandboxed runtimes have the file without this line.
    found = re.search(rb"^RssAnon:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else _resident_peak_mb()


def _resident_peak_mb() -> float:
    unit = 1024 if sys.platform == "linux" else 1024 * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
