"""Classification: clients' examples lie one after the other in one memory, in the order in which they were dealt."""

import numpy as np
import pytest
import torch

from fedveil.base.refusal import Refusal
from fedveil.tasks.classification import Classification, classification, softmax_regression
from fedveil.tasks.data import Examples, only
from fedveil.tasks.partition import Partition

WHOLE = Examples(
    torch.arange(60.0).view(20, 3),
    torch.arange(20) % 2,
    [f"person {number // 2}" for number in range(20)],
    {"town": torch.arange(20) % 5 - 1},
)
DEAL = Partition("dirichlet", 4, 0.5, seed=3)


def task() -> Classification:
    return classification(WHOLE, WHOLE, 2, DEAL, lambda: softmax_regression(3, 2))


def test_clients_have_the_examples_of_their_shares() -> None:
    shares = DEAL.shares(WHOLE.targets.numpy(), None)
    assert [task().client_size(client) for client in range(4)] == [len(share) for share in shares]
    for client, share in enumerate(shares):
        own, expected = task().client_data(client), only(WHOLE, share)
        assert torch.equal(own.inputs, expected.inputs) and torch.equal(own.targets, expected.targets)
        assert own.persons == expected.persons
        assert own.groups is not None and expected.groups is not None
        assert torch.equal(own.groups["town"], expected.groups["town"])


def test_a_clients_examples_are_no_copy() -> None:
    whole = task()
    assert isinstance(whole.train, Examples)
    begin, size = whole.train.inputs.data_ptr(), whole.train.inputs.nbytes
    for client in range(4):
        assert begin <= whole.client_data(client).inputs.data_ptr() < begin + size


@pytest.mark.parametrize("client", [-1, 4, np.int64(9)])
def test_a_client_that_is_none_is_refused(client: int) -> None:
    with pytest.raises(Refusal, match="clients run from 0 to 3"):
        task().client_data(client)
