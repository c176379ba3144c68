"""Tests of ``record``."""

from pathlib import Path

import pytest
import torch
from shared.tasks import Points

from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.modes.federation import Federation
from fedveil.modes.record import MAX_NOISE_LEVELS
from fedveil.privacy.accounting.renyi_filter import admits
from fedveil.run.build import RunObjects, build
from fedveil.run.client_instructions import client_settings
from fedveil.strategies.record_plan import record_plan
from fedveil.tasks.data import Examples


class Uneven(Points):
    """Clients with 20 to 60 records, each size once."""

    num_clients = 41

    def client_data(self, client: int) -> Examples:
        rows = 20 + client % 41
        return Examples(torch.zeros(rows, self.width), torch.zeros(rows).long())


class Empty(Points):
    """Clients without records."""

    rows = 0


def federation_of(task: Points, *more: str) -> Federation:
    keys = ["task=custom", "task.target=object:Points", "allow_modules=[object]", "batch_size=10"]
    keys += ["privacy=record", "privacy.target_delta=1e-3", "cohort=all", "num_rounds=5", *more]
    return build(settings_from_overrides(keys), objects=RunObjects(task))


def test_clients_that_share_a_noise_afford_every_round_of_the_plan(tmp_path: Path) -> None:
    """One record more than whole batches is a step more, for which the noise of fewer records is too little."""
    parts = federation_of(Uneven())
    settings = client_settings(parts, tmp_path)
    record = settings.record
    assert record is not None and len(record.noise_by_records) <= MAX_NOISE_LEVELS < len(parts.mode.sizes)
    for size in parts.mode.sizes:
        event = record_plan(record, size, settings).event()
        assert admits([event] * parts.settings.num_rounds, record.terms.budget, None), size


def test_the_plan_is_of_the_size_that_loses_most(tmp_path: Path) -> None:
    parts = federation_of(Uneven(), "privacy.target_epsilon=null", "privacy.noise_multiplier=2")
    settings = client_settings(parts, tmp_path)
    assert settings.record is not None and settings.record.noise_by_records == ((0, 2.0),)
    plan = parts.mode.client_plan(settings)
    assert plan.num_rounds == parts.settings.num_rounds
    for size in parts.mode.sizes:
        assert record_plan(settings.record, size, settings).epsilon(1e-3, 5) <= plan.epsilon(1e-3, 5), size


def test_a_federation_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no client has an example"):
        client_settings(federation_of(Empty()), tmp_path)


def test_limits_name_the_records_that_a_promise_leaves_out(tmp_path: Path) -> None:
    parts = federation_of(Uneven())
    _, of_unit = parts.limits(parts.mode.client_plan(client_settings(parts, tmp_path)))
    assert of_unit == "This guarantee does not cover a person whose records are at two clients."
