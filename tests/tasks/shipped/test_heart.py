"""Heart disease: the hospitals as clients, and missing values."""

import pytest
import torch

from fedveil.base.refusal import Refusal
from fedveil.tasks import load_task
from fedveil.tasks.shipped.heart import BOUND, CATEGORIES, HOSPITALS, MEASURED, encode


def test_heart_hospitals_are_the_clients() -> None:
    task = load_task("heart")
    data = [task.client_data(client) for client in range(len(HOSPITALS))]
    # Held out by outcome: 28 + 33 of 304 patients, 21 + 37 of 293, 23 + 2 of 123, 30 + 10 of 200.
    assert [len(each) for each in data] == [243, 235, 98, 160]
    assert torch.cat([each.inputs for each in data]).abs().max() <= BOUND
    with pytest.raises(Refusal, match="has 4 clients"):
        load_task("heart", {"num_clients": 5})
    assert load_task("heart", {"num_clients": 5, "partition": "iid"}).num_clients == 5


def test_missing_values_of_a_patient_are_zero_for_any_others() -> None:
    blank = dict.fromkeys((*MEASURED, *CATEGORIES), "")
    assert not any(encode(blank))
    assert not any(encode({**blank, "trestbps": "0", "chol": "0"}))
    assert encode({**blank, "age": "70"})[list(MEASURED).index("age")] == 2.0
    assert encode({**blank, "chol": "603"})[list(MEASURED).index("chol")] == BOUND
