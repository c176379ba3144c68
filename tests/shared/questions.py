"""Clients with ages, and questions to them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedveil import Examples
from fedveil.configs.settings import settings_from_overrides
from fedveil.modes.federation import Federation
from fedveil.privacy.statistics.inquiry import Inquiry, read_inquiry
from fedveil.questions.question_plan import Spend
from fedveil.run.build import RunObjects, build

CLIENTS, ROWS = 40, 10
FREE = Spend(noise_multiplier=0.02)  # nobody is hidden, so that an answer can be held against the truth


class Ages:
    """Clients with a few people each, whose ages are a column."""

    simulated, num_clients = True, CLIENTS

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {}

    def client_data(self, client: int) -> Examples:
        return Examples(torch.zeros(ROWS, 1), torch.zeros(ROWS, dtype=torch.int64))

    def held_out(self) -> Examples:
        return self.client_data(0)

    def columns(self, client: int) -> Mapping[str, np.ndarray]:
        return {"age": np.random.default_rng(client).uniform(20, 80, ROWS)}


class Few(Ages):
    """Three clients with real data."""

    simulated, data_id, num_clients = False, "few-2026", 3


def inquiry(name: str = "ages", **keys: Any) -> Inquiry:
    """Return an inquiry about the mean age."""
    ask = [{"kind": "mean", "name": "age", "of": "age", "low": 0, "high": 100, **keys}]
    return read_inquiry({"name": name, "records": ROWS, "why": "How old are they?", "ask": ask})


def federation(*overrides: str, task: Any = None) -> Federation:
    """Return a federation of clients with ages, or with another task."""
    common = ["task=custom", "task.target=object:Ages", "allow_modules=[object]"]
    privacy = [
        "privacy.target_delta=0.005",
        "privacy.allow_large_delta=true",
        "privacy.target_epsilon=100000",
    ]
    cohort = [] if any(each.startswith("cohort") for each in overrides) else ["cohort=all"]
    settings = settings_from_overrides([*common, *cohort, *privacy, *overrides])
    return build(settings, objects=RunObjects(task=task or Ages()))


def figure(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the figure of this name in the record of an answer."""
    return next(each for answer in record["answers"] for each in answer["figures"] if each["name"] == name)
