"""A client without examples sits out of a round, whichever way a cohort is trained, and has not failed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedveil as fv


class Uneven:
    """Four clients, of whom one has no examples."""

    simulated, num_clients = True, 4

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Linear(3, 2)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(1) == targets).float().mean())}

    def client_data(self, client: int) -> fv.Examples:
        inputs = torch.randn(0 if client == 2 else 8, 3, generator=torch.Generator().manual_seed(client))
        return fv.Examples(inputs, (inputs.sum(1) > 0).long())

    def held_out(self) -> fv.Examples:
        return self.client_data(9)


class Alone(Uneven):
    """The same, trained by a function of its own."""

    def train(self, model: nn.Module, data: fv.Examples, training: Any) -> None:
        assert len(data)


@pytest.mark.parametrize(
    ("task", "how"),
    [
        (Uneven(), {"privacy": "none"}),  # many clients at once
        (Uneven(), {"privacy": "none", "optimizer": {"name": "adafactor"}}),
        (Alone(), {"privacy": "none"}),
        (Uneven(), {"privacy": fv.Record(target_delta=1e-2)}),
        (Uneven(), {"privacy": fv.RecordDistributed(target_delta=1e-2)}),
    ],
    ids=["at once", "in place", "own training", "record", "together"],
)
def test_a_client_without_examples_sits_out(task: Uneven, how: dict[str, Any], tmp_path: Path) -> None:
    fv.simulate(task, cohort=fv.All(), num_rounds=1, folder=tmp_path / "run", quiet=True, **how)
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    together = isinstance(how["privacy"], fv.RecordDistributed)
    assert (line["replies"], line["dropped"]) == ((4, {}) if together else (3, {"no examples": 1}))
    assert not (tmp_path / "run" / "clients.log").exists()
