"""Choice among a client's models: what diverged counts as the worst."""

import numpy as np
import pytest

from fedveil.personal.choice import LOCAL, OWN, SHARED, Evidence


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        ((1.0, np.inf, np.inf, 2.0), SHARED),
        ((np.inf, np.nan, 1.0, np.inf), OWN),
        ((np.inf, np.inf, np.inf, 3.0), LOCAL),
        ((np.nan, np.inf, -np.inf, np.nan), SHARED),
    ],
)
def test_a_model_that_diverged_is_not_chosen(losses: tuple[float, ...], name: str) -> None:
    evidence = Evidence(np.reshape(losses, (4, 1, 1)), np.array([40.0]))
    assert evidence.decide().name == name
