import time

import numpy as np
import pytest

from pipeline.execution import memory
from pipeline.execution.memory import PeakMemory, give_back

MB = 1024 * 1024


def test_the_peak_is_that_of_the_time_between_entry_and_exit():
    give_back()
    with PeakMemory() as calm:
        pass
    with PeakMemory() as busy:
        held = np.ones(200 * MB, np.uint8)
        # Until the sampler has come by.
        deadline = time.monotonic() + 10
        while busy.peak_mb - calm.peak_mb <= 180 and time.monotonic() < deadline:
            time.sleep(0.01)
        del held
    give_back()
    with PeakMemory() as after:
        pass
    assert busy.peak_mb - calm.peak_mb > 180
    assert after.peak_mb - calm.peak_mb < 50


@pytest.mark.parametrize("status", ["Name:\tpython\nVmRSS:\t 1000 kB\n", "", None])
def test_a_system_that_does_not_tell_anonymous_memory_gives_the_resident_peak(tmp_path, monkeypatch, status):
    path = tmp_path / "status"
    if status is not None:
        path.write_text(status)
    monkeypatch.setattr(memory, "STATUS", path)
    with PeakMemory() as found:
        pass
    assert 10 < found.peak_mb < 100_000
