"""Tests of tables/one_score.py: a model with one score and several offsets."""

import torch

from fedveil.client.dp_sgd.train import chosen_engine
from fedveil.tables.one_score import one_score
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.data import Examples


def test_outputs_are_the_score_plus_each_offset() -> None:
    model = one_score(2, [0.5, -1.0])
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[1.0, 2.0]]))
    assert model(torch.tensor([[3.0, 1.0]])).tolist() == [[5.5, 4.0]]


def test_weight_of_ones_is_not_sent_and_gradients_are_fast() -> None:
    model = one_score(2, [0.5, -1.0, 3.0])
    assert {name: each.shape for name, each in read_arrays(model).items()} == {
        "0.weight": (1, 2),
        "1.bias": (3,),
    }
    assert chosen_engine("auto", model, Examples(torch.zeros(5, 2), torch.zeros(5))) == "book_keeping"
