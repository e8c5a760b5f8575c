import numpy as np

from pipeline.execution.memory import PeakMemory, give_back

MB = 1024 * 1024


def test_the_peak_is_that_of_the_time_between_entry_and_exit():
    give_back()
    with PeakMemory() as calm:
        pass
    with PeakMemory() as busy:
        held = np.ones(200 * MB, np.uint8)
        del held
    give_back()
    with PeakMemory() as after:
        pass
    assert busy.peak_mb - calm.peak_mb > 180
    assert after.peak_mb - calm.peak_mb < 50
