import math

import numpy as np
import pytest

from pipeline.upgrade.series import compatibility


def test_scores_are_those_of_the_lower_triangle():
    matrix = np.array([[0.4, 0.0, 0.0], [0.5, 0.6, 0.0], [0.45, 0.55, 0.8]])
    found = compatibility(matrix)
    assert found.average_compatibility == pytest.approx(2 / 3)
    assert found.average_multimodel == pytest.approx((0.4 + 0.5 + 0.6 + 0.45 + 0.55 + 0.8) / 6)
    assert found.update_gain == pytest.approx(0.05 / 0.4)


def test_without_a_gain_there_is_no_share_of_it():
    assert math.isnan(compatibility(np.array([[0.5, 0.0], [0.4, 0.5]])).update_gain)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4,)])
def test_what_is_not_a_matrix_of_models_is_refused(shape):
    with pytest.raises(ValueError, match="expected a square matrix"):
        compatibility(np.ones(shape))
