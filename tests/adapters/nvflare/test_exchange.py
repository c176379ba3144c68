"""Exchange of a job's two halves: which arrays of a model are in the sum."""

import numpy as np
import pytest
from shared.nvflare_jobs import START, Client, result_of, task_of

from fedveil.adapters.nvflare.exchange import float_arrays, layout_of, spec_of, terms_of
from fedveil.privacy.mechanisms.sum_spec import MIN_CELLS


def test_the_arrays_of_a_sum_are_those_of_floats() -> None:
    model = START | {"classes": 3, "name": "net", "empty": None}
    assert layout_of(model) == {"w": (2, 3), "b": (2,)}
    assert terms_of(spec_of(2.0, layout_of(model))) == [2.0 / MIN_CELLS, MIN_CELLS]


def test_a_model_that_is_not_of_numpy_is_no_task() -> None:
    with pytest.raises(TypeError, match="w is a list, not an array of NumPy"):
        Client().answer(task_of({"w": [1.0, 2.0]}), result_of(START))
    with pytest.raises(ValueError, match="no floating-point array"):
        float_arrays({"n": np.array(7), "name": "net"})
