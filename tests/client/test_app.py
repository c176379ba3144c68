"""A client without examples sits out of a round, and has not failed; where clients are hidden it answers as all others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.tasks import Classes
from torch import nn

import fedveil as fv

EVALUATED = {"clients": "final"}


class Uneven(Classes):
    """Four clients, of whom one has no examples."""

    num_clients = 4

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Linear(3, 2)

    def client_data(self, client: int) -> fv.Examples:
        inputs = torch.randn(0 if client == 2 else 8, 3, generator=torch.Generator().manual_seed(client))
        return fv.Examples(inputs, (inputs.sum(1) > 0).long())


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
        (Uneven(), {"privacy": fv.RecordDistributed(target_delta=1e-2), "evaluate": EVALUATED}),
    ],
    ids=["at once", "in place", "own training", "record", "together", "together, evaluated"],
)
def test_a_client_without_examples_sits_out(task: Uneven, how: dict[str, Any], tmp_path: Path) -> None:
    fv.simulate(task, cohort=fv.All(), num_rounds=1, folder=tmp_path / "run", quiet=True, **how)
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    together = isinstance(how["privacy"], fv.RecordDistributed)
    assert (line["replies"], line["dropped"]) == ((4, {}) if together else (3, {"no examples": 1}))
    assert not (tmp_path / "run" / "clients.log").exists()


@pytest.mark.parametrize(
    ("task", "how"),
    [
        (Uneven(), {}),
        (Uneven(), {"evaluate": EVALUATED}),
        (Uneven(), {"optimizer": {"name": "adafactor"}}),
        (Alone(), {}),
        (Uneven(), {"privacy": "client_distributed"}),
        (Uneven(), {"privacy": "record_and_client"}),
    ],
    ids=["at once", "evaluated", "in place", "own training", "messages", "both"],
)
def test_a_hidden_client_without_examples_answers_as_a_blanked_one(
    task: Uneven, how: dict[str, Any], tmp_path: Path
) -> None:
    """Under zero-out a client's neighbour is itself without examples: whether it answers must not tell."""
    privacy: dict[str, Any] = {"name": how.get("privacy", "client_central")}
    level = {"target_delta": 1e-2, "target_epsilon": 8.0, "allow_large_delta": True}
    privacy |= {"client": level} if privacy["name"] == "record_and_client" else level
    own = {"accept_vacuous": True, "num_rounds": 1, "folder": tmp_path / "run", "quiet": True}
    fv.simulate(task, cohort=fv.All(), **own, **{**how, "privacy": privacy})
    kept = tmp_path / "run" / "operator.jsonl"
    file = kept if kept.exists() else tmp_path / "run" / "metrics.jsonl"
    line = json.loads(file.read_text().splitlines()[0])
    assert (line["replies"], line["dropped"]) == (4, {})
