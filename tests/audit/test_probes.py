"""Probes of planted data in a simulation: canary records, and odd examples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedveil.audit.probes import OddProbe, RecordProbe
from fedveil.audit.record_canaries import coins_in
from fedveil.base.refusal import Refusal
from fedveil.client.training.sgd import train
from fedveil.messages.local_training import LocalTraining
from fedveil.privacy.audit.client_rows import append
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.tasks import Examples
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.classification import Classification, classification
from fedveil.tasks.mislabelled import Mislabelled, mislabelled
from fedveil.tasks.partition import Partition

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


DELTA, CLIP, CANARIES = 1e-5, 0.5, 400


def budget(epsilon: float) -> Budget:
    return Budget(Unit.RECORD, epsilon, DELTA, Adjacency.ZERO_OUT)


def test_a_probe_weighs_all_clients_together(tmp_path: Path) -> None:
    probe = RecordProbe(tmp_path, budget(1.0))
    assert probe(1) is None
    generator = np.random.default_rng(0)
    for client in range(30):
        path = tmp_path / f"{client}.canaries"
        coins = coins_in(path, 20, Randomness(0).stream("record canaries", client))
        append(path, 1, generator.standard_normal(20) + 3.0 * coins)
    found = probe(2)
    assert found is not None and max(found.p_values.values()) < 1e-6
    assert found.lower["Steinke et al."] > 1.0 and found.round == 2


def odd_task(clients: int = 4, records: int = 400) -> Mislabelled:
    generator = torch.Generator().manual_seed(1)
    data = Examples(torch.randn(records, 60, generator=generator), torch.arange(records) % 3)
    task = classification(data, data, 3, Partition("iid", clients), lambda: overfitting(60, 3))
    return mislabelled(task, seed=5)


def overfitting(inputs: int, classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, 128), nn.Tanh(), nn.Linear(128, classes))


def test_odd_examples_train_where_their_coin_says_and_nowhere_else() -> None:
    task = odd_task()
    assert len(task.odd) == 80 and 20 < task.coins.sum() < 60
    added = torch.cat([task.client_data(c).inputs[len(task.task.client_data(c)) :] for c in range(4)])
    found = {tuple(row.tolist()) for row in added}
    inside = [tuple(row.tolist()) in found for row in task.odd.inputs]
    assert np.array_equal(inside, task.coins) and len(added) == task.coins.sum()
    held_out = {tuple(sorted(row.tolist())) for row in task.held_out().inputs}
    assert all(tuple(sorted(row.tolist())) in held_out for row in task.odd.inputs)
    real = Classification(**{**vars(task.task), "simulated": False})
    with pytest.raises(Refusal, match="no example is planted in real data"):
        mislabelled(real, 0)


def test_only_memorised_odd_examples_are_flagged() -> None:
    task = odd_task()
    model = task.model()
    probe = OddProbe(task, None)
    assert probe.look(read_arrays(model), 1)[0].p_value > 0.01
    everything = [task.client_data(client) for client in range(4)]
    inputs, targets = (
        torch.cat([getattr(data, part) for data in everything]) for part in ("inputs", "targets")
    )
    train(model, task, Examples(inputs, targets), LocalTraining(0.5, 40, 20), 0, key=1)
    (found,) = probe.look(read_arrays(model), 2)
    assert found.p_value < 1e-6 and found.figures["at_least"] > 0.8 and found.figures["auc_low"] > 0.8
    (against,) = OddProbe(task, budget(1.0)).look(read_arrays(model), 2)
    assert found.p_value < against.p_value < 0.01
