"""Linear model of NumPy beside torch's."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedveil.deployment.device.linear_model import Table, gradients_of


def test_loss_and_gradients_are_those_of_torch() -> None:
    rows = np.random.default_rng(0)
    inputs, targets = rows.normal(size=(9, 4)).astype(np.float32), rows.integers(3, size=9)
    weight, bias = (rows.normal(size=shape).astype(np.float32) for shape in ((3, 4), (3,)))
    loss, *gradients = gradients_of(weight, bias, Table(inputs, targets))
    parameters = [torch.tensor(each, requires_grad=True) for each in (weight, bias)]
    expected = cross_entropy(torch.tensor(inputs) @ parameters[0].t() + parameters[1], torch.tensor(targets))
    assert abs(float(loss) - expected.item()) < 1e-6
    for own, other in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        np.testing.assert_allclose(own, other.numpy(), atol=1e-6)


def test_a_mask_and_positions_select_the_same_rows() -> None:
    table = Table(np.arange(8, dtype=np.float32).reshape(4, 2), np.arange(4))
    some = table.only(np.array([False, True, False, True]))
    assert len(some) == 2 and (some.inputs == table.only(np.array([1, 3])).inputs).all()
