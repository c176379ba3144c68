"""Tests of tasks/labels.py: the two kinds of label of the core."""

import numpy as np
import pytest
import torch

from fedveil.tasks.labels import Classes, Number
from fedveil.tasks.table_schema import Column, categorical


def test_two_classes_have_one_score_the_log_odds() -> None:
    label = Classes(categorical("ill", ["no", "yes"]))
    scores = label.scores(np.array([[1.0, 2.0], [4.0, 8.0]]), np.array([0.5, 2.0]))
    assert scores.names == ("yes",) and scores.weight.tolist() == [[3, 6]] and scores.bias.tolist() == [1.5]


def test_classes_are_predicted_with_their_probability() -> None:
    label = Classes(categorical("ill", ["no", "yes"]))
    found = label.predictions(np.log(np.array([[1.0, 3.0], [9.0, 1.0]])))
    assert found["ill"].tolist() == ["yes", "no"] and found["probability"] == pytest.approx([0.75, 0.9])


def test_a_number_is_predicted_within_its_bounds() -> None:
    label = Number(Column("dose", 0, 10))
    assert label.predictions(np.array([[0.5], [-3.0]]))["dose"].tolist() == [7.5, 0]
    metrics = label.metrics(torch.tensor([[0.5], [0.0]]), torch.tensor([0.5, -0.5]))
    assert metrics == pytest.approx({"mean_absolute_error": 1.25, "r2": 0.5})
