"""The surest patches and the shares over several pictures, worked by hand."""

import numpy as np
import pytest

from demo.routing_view import Routing
from demo.survey import Best, Survey


def _routing(experts: list[list[int]], gates: list[list[float]]) -> Routing:
    return Routing((np.array(experts),), (np.array(gates, np.float32),), num_experts=3)


def test_best_patch_of_each_picture_counts_and_the_surest_stand_first() -> None:
    survey = Survey(num_kept=2)
    survey.add(_routing([[0, 0], [1, 0]], [[0.5, 0.75], [0.5, 0.25]]), picture=0)
    survey.add(_routing([[1, 0], [1, 1]], [[0.5, 0.875], [1.0, 0.75]]), picture=1)
    survey.add(_routing([[0, 0], [0, 0]], [[0.75, 0.5], [0.5, 0.5]]), picture=2)
    # Picture 2 ties with picture 0 for expert 0 and comes after it; only two are kept.
    assert survey.best(0) == [[Best(0.875, 1, 1), Best(0.75, 0, 1)], [Best(1.0, 1, 2), Best(0.5, 0, 2)], []]
    assert survey.shares(0) == pytest.approx([8 / 12, 4 / 12, 0.0])
    assert survey.num_pictures == 3
