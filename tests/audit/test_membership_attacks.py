"""Membership inference on a final model: what overfits is found out by each attack, what never trained is not."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared.runs import run_quietly
from torch import nn
from torch.utils.data import default_collate

from fedveil.audit.membership_attacks import (
    ATTACKS,
    Attacked,
    attack_on,
    by_loss,
    concatenated,
    measure_attack,
    membership,
)
from fedveil.base.refusal import Refusal
from fedveil.client.training.sgd import train
from fedveil.configs.settings import settings_from_overrides
from fedveil.messages.local_training import LocalTraining
from fedveil.simulations.simulate import simulate
from fedveil.tasks import Examples
from fedveil.tasks.classification import classification
from fedveil.tasks.data import LazyExamples
from fedveil.tasks.partition import Partition

HAS_ART = find_spec("art") is not None
EACH = [
    pytest.param(each, marks=pytest.mark.skipif(each == "art" and not HAS_ART, reason="fedveil[mia]"))
    for each in ATTACKS
]
RECORDS = 60
OVERFIT = LocalTraining(0.5, 40, 10)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 4))


@cache
def attacked(epochs: int) -> Attacked:
    """Labels that nothing but memory can tell."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(4 * RECORDS, 20, generator=generator)
    labels = torch.randint(4, (4 * RECORDS,), generator=generator)
    data = Examples(inputs, labels)
    task = classification(data, data, 4, Partition("iid", 1), network)
    inside, outside, spare, population = (
        Examples(inputs[n * RECORDS : (n + 1) * RECORDS], labels[n * RECORDS : (n + 1) * RECORDS])
        for n in range(4)
    )
    model = task.model()
    if epochs:
        train(model, task, inside, LocalTraining(0.5, epochs, 10), 0, key=1)
    records = Examples(
        torch.cat([inside.inputs, outside.inputs]), torch.cat([inside.targets, outside.targets])
    )
    return Attacked(task, OVERFIT, model, records, RECORDS, spare, population)


@pytest.mark.parametrize("attack", EACH)
def test_overfitting_model_is_detected(attack: str) -> None:
    scores = ATTACKS[attack](attacked(40), 4)
    found = measure_attack(scores[:RECORDS], scores[RECORDS:])
    assert found["AUC"].low > 0.8
    assert list(found) == ["AUC", "true positives at 0.1% false", "true positives at 1.0% false"]


@pytest.mark.parametrize("attack", EACH)
def test_a_model_that_never_trained_tells_nothing(attack: str) -> None:
    scores = ATTACKS[attack](attacked(0), 4)
    area = measure_attack(scores[:RECORDS], scores[RECORDS:])["AUC"]
    assert area.low < 0.55 and area.high > 0.45


def read_on_access(examples: Examples, collate: Callable[[list[Any]], Any]) -> LazyExamples:
    return LazyExamples([*zip(examples.inputs, examples.targets, strict=True)], collate=collate)


def test_data_read_on_access_are_attacked(tmp_path: Path) -> None:
    one = attacked(40)
    parts = [read_on_access(each, default_collate) for each in (one.records, one.spare, one.population)]
    other = replace(one, records=concatenated(parts[:1], tmp_path), spare=parts[1], population=parts[2])
    for attack in ("loss", "rmia", "lira"):
        assert np.allclose(ATTACKS[attack](other, 2), ATTACKS[attack](one, 2), atol=1e-5)
    whole = concatenated(parts[:2], tmp_path)
    rows = torch.arange(len(whole))
    assert torch.equal(whole.batch(rows)[0], torch.cat([one.records.inputs, one.spare.inputs]))


def test_data_that_are_read_in_several_ways_are_refused(tmp_path: Path) -> None:
    spare = attacked(0).spare
    lazy = read_on_access(spare, default_collate)
    others = (
        spare,
        replace(lazy, collate=lambda items: default_collate(items)),
        replace(lazy, transform=print),
    )
    for other in others:
        with pytest.raises(Refusal, match="read their data in different ways, and only one way is attacked"):
            concatenated([lazy, other], tmp_path)


def test_the_command_attacks_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refusal, match="holds no model"):
        attack_on(tmp_path, 1)
    settings = settings_from_overrides(["task=digits", "num_rounds=1", "privacy=none"])
    simulate(settings, tmp_path / "a run", quiet=True)
    capsys.readouterr()
    assert membership(tmp_path / "a run", "rmia", 8, 1, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["members"], found["others"]) == (718, 180)
    assert 0.3 < found["measured"]["AUC"]["value"] < 0.7
    assert membership(tmp_path / "a run", "loss", 8, 20) == 0
    assert "718 records that trained, 180 that did not" in capsys.readouterr().out
    with pytest.raises(Refusal, match="membership='guess': choose one of loss, rmia"):
        membership(tmp_path / "a run", "guess", 8, 20)
    with pytest.raises(Refusal, match="at least 1"):
        membership(tmp_path / "a run", "lira", 0, 20)


def test_the_same_records_are_attacked_every_time(tmp_path: Path) -> None:
    settings = settings_from_overrides(["task=digits", "num_rounds=1", "privacy=none"])
    simulate(settings, tmp_path / "run", quiet=True)
    first, second = (attack_on(tmp_path / "run", 1) for _ in range(2))
    assert torch.equal(first.records.inputs, second.records.inputs)
    assert np.array_equal(by_loss(first, 0), by_loss(second, 0))
    members = {row.numpy().tobytes() for row in first.records.inputs[: first.members]}
    assert not members & {row.numpy().tobytes() for row in first.spare.inputs}


def test_reference_models_have_no_noise_to_take_out(tmp_path: Path) -> None:
    told = ["task=digits", "task.num_clients=4", "num_rounds=1", "privacy=record", "optimizer=dp_adambc"]
    run_quietly([*told, "cohort=all"], tmp_path / "run")
    found = attack_on(tmp_path / "run", 1)
    assert found.training.optimizer.name == "adam"
    assert found.reference(found.spare, 0) is not None


def test_without_its_extra_the_toolbox_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "art.attacks.inference.membership_inference", None)
    with pytest.raises(Refusal, match=r"install fedveil\[mia\]"):
        ATTACKS["art"](attacked(0), 1)


@pytest.mark.skipif(not HAS_ART, reason="fedveil[mia]")
def test_toolbox_attacks_classes_alone_and_deterministically() -> None:
    first, second = (ATTACKS["art"](attacked(40), 1) for _ in range(2))
    assert np.array_equal(first, second)
    characters = Examples(torch.zeros(4, 20), torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(Refusal, match="has no classes"):
        ATTACKS["art"](replace(attacked(0), population=characters), 1)
