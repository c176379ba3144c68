"""Class weights at record level: the loss that the refusal prints is the one that trains, end to end."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedveil as fv
from fedveil.tasks.independence import WEIGHTS_REMEDY

WEIGHT = torch.tensor([1 / 9, 1.0])  # public; at most 1, because the clip would cut larger ones
MEAN_OF_WEIGHTS = "cross_entropy(outputs, targets, weight=weight)"


@dataclass
class Rare:
    """Task in which one example in ten is of the second class, and nothing but its weight speaks for it."""

    expression: str
    simulated: bool = True
    num_clients: int = 4

    def model(self) -> nn.Module:
        net = nn.Linear(3, 2)
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
        return net

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        names: dict[str, Any] = {"weight": WEIGHT, "outputs": outputs, "targets": targets}
        return eval(self.expression, {"cross_entropy": cross_entropy}, names)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        found = outputs.argmax(1)[targets == 1]
        return {"recall": float((found == 1).float().mean())}

    def client_data(self, client: int) -> fv.Examples:
        generator = np.random.default_rng(client)
        targets = torch.from_numpy((generator.random(200) < 0.1).astype(np.int64))
        inputs = torch.from_numpy(generator.normal(size=(200, 3)).astype(np.float32))
        inputs[:, 0] += 0.7 * targets
        return fv.Examples(inputs, targets)

    def held_out(self) -> fv.Examples:
        return self.client_data(99)


def run(expression: str, **keys: Any) -> fv.FinishedRun:
    return fv.simulate(
        Rare(expression), privacy=fv.Record(target_epsilon=8.0), cohort="all", quiet=True, num_rounds=8, batch_size=40,
        **keys,
    )  # fmt: skip


def remedy() -> str:
    found = re.search(r"class weights so: (.+\.mean\(\)), which", WEIGHTS_REMEDY)
    assert found is not None
    return found[1]


def test_the_loss_that_the_refusal_prints_trains_at_record_level() -> None:
    weighted = run(remedy(), learning_rate=1.0)
    plain = run("cross_entropy(outputs, targets)", learning_rate=1.0)
    assert weighted.status == plain.status == "completed"
    assert weighted.epsilon <= 8
    assert weighted.metrics["recall"] > plain.metrics["recall"] + 0.3


def test_a_mean_of_weights_is_refused_with_that_loss() -> None:
    with pytest.raises(fv.Refusal) as refused:
        run(MEAN_OF_WEIGHTS)
    assert remedy() in str(refused.value)


def test_clip_bounds_an_example_of_any_weight() -> None:
    """A weight of 1 000 changes nothing of what one example may move: each gradient is clipped after its weight."""
    heavy = run(remedy().replace("weight[", "1000 * weight["), learning_rate=1.0)
    assert heavy.status == "completed" and heavy.epsilon <= 8
    assert all(bool(p.isfinite().all()) for p in heavy.model.parameters())
