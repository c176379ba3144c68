"""A device's task on torch follows orders for its own model and base alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedveil.base.refusal import Refusal
from fedveil.deployment.device.torch_task import TorchTask
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.training_order import ModeName, TrainingOrder
from fedveil.tasks import load_task
from fedveil.tasks.arrays import agreement_of

TASK = """
import torch
from torch import nn

class Adapted:
    simulated, num_clients, data_id = False, 1, "notes"

    def __init__(self, shift=0.0):
        self.shift = shift

    def model(self):
        base, head = nn.Linear(4, 4), nn.Linear(4, 2)
        for layer in (base, head):
            nn.init.constant_(layer.weight, 0.5)
            nn.init.zeros_(layer.bias)
        base.requires_grad_(False).bias += self.shift
        return nn.Sequential(base, head)

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {}

    def client_data(self, client):
        return torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)

    held_out = lambda self: self.client_data(0)
"""


def test_an_order_for_another_base_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes_task.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    name, allow = "notes_task:Adapted", ("notes_task",)
    settings = ClientSettings(name, LocalTraining(), allow_modules=allow)
    device, order = TorchTask(settings, 0), TrainingOrder("r", ModeName.NONE, LocalTraining())
    own, other = (agreement_of(load_task(name, {"shift": shift}, allow)) for shift in (0.0, 1e-6))
    device.check_order(replace(order, agreement=own), None)
    for agreement in (other, None):
        with pytest.raises(Refusal, match="another schema, model or base"):
            device.check_order(replace(order, agreement=agreement), None)
