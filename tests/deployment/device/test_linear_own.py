"""Own model of a device without torch: that of torch, step by step and in its choice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedveil.base.refusal import Refusal
from fedveil.deployment.device import linear_own
from fedveil.deployment.device.linear import Table
from fedveil.deployment.device.personal_choice import PersonalChoice
from fedveil.messages.local_training import LocalTraining
from fedveil.personal import training
from fedveil.personal.own_model import Rows, own_model
from fedveil.personal.steps import RATE_SHARE
from fedveil.tasks.classification import class_metrics, softmax_regression
from fedveil.tasks.data import Examples

FEATURES, CLASSES = 5, 3


def tables(seed: int, noise: float, rows: int = 80) -> tuple[Table, Table]:
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(rows, FEATURES)).astype(np.float32)
    targets = (inputs[:, :CLASSES] + draw.normal(0, noise, (rows, CLASSES))).argmax(1)
    table = Table(inputs, targets)
    mask = np.arange(rows) % 4 == 0
    return table.only(~mask), table.only(mask)


def task() -> Any:
    return SimpleNamespace(
        model=lambda: softmax_regression(FEATURES, CLASSES),
        loss=nn.functional.cross_entropy,
        metrics=lambda outputs, targets: {"accuracy": class_metrics(outputs, targets)["accuracy"]},
    )


def examples(table: Table) -> Examples:
    return Examples(torch.from_numpy(table.inputs), torch.from_numpy(table.targets))


@pytest.mark.parametrize(
    ("seed", "noise", "rows"), [(1, 0.1, 80), (2, 1.0, 80), (3, 5.0, 80), (4, 0.3, 28), (5, 2.0, 41)]
)
@pytest.mark.parametrize(
    "personal",
    [
        PersonalChoice(name="after", steps=20, learning_rate=0.3),
        PersonalChoice(name="ditto", steps=30, pull=0.5, batch_size=7),
        PersonalChoice(name="after", steps=10, layers=("bias",)),
    ],
)
def test_numpy_makes_the_own_model_that_torch_makes(
    personal: PersonalChoice, seed: int, noise: float, rows: int
) -> None:
    """With 28 and 41 rows, the training rows make up for held-out ones."""
    trained, held_out = tables(seed, noise, rows)
    draw, local = np.random.default_rng(7), LocalTraining(0.8, 1, 10)
    shared = {
        "weight": draw.normal(size=(CLASSES, FEATURES)).astype(np.float32),
        "bias": draw.normal(size=CLASSES).astype(np.float32),
    }
    own = training.OwnTraining(
        personal.steps,
        personal.learning_rate or RATE_SHARE * local.learning_rate,
        personal.batch_size or local.batch_size,
        personal.pull_or_none,
        personal.layers,
    )
    parts = Rows(examples(trained), examples(held_out))
    arrays, choice = linear_own.own_model(trained, held_out, shared, personal, local, 11)
    expected, of_torch = own_model(task(), task().model(), parts, shared, own, 11)
    assert (choice.name, choice.share, choice.rows) == (of_torch.name, of_torch.share, of_torch.rows)
    for name in expected:
        np.testing.assert_allclose(arrays[name], expected[name], atol=2e-5)
    for column, figures in of_torch.columns.items():
        assert choice.columns[column] == pytest.approx(figures, abs=1e-5)


def test_layers_of_another_model_are_refused() -> None:
    trained, held_out = tables(1, 1.0)
    personal = PersonalChoice(name="after", layers=("head.*",))
    with pytest.raises(Refusal, match=r"matches no parameter; the model has weight, bias"):
        linear_own.own_model(trained, held_out, {}, personal, LocalTraining(), 0)


def test_numpy_needs_no_torch_for_an_own_model(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from fedveil.deployment.device import own_models\n"
        "from fedveil.deployment.device.linear import LinearTask, Table\n"
        "from fedveil.deployment.device.personal_choice import PersonalChoice\n"
        "from fedveil.deployment.device.run_rows import TrainedRows\n"
        "x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)\n"
        "task = LinearTask(Table(x, (x[:, 0] > 0).astype(np.int64)), 0)\n"
        "shared = {'weight': np.zeros((2, 2), np.float32), 'bias': np.zeros(2, np.float32)}\n"
        "arrays, choice = task.own_model(shared, TrainedRows(0.3), PersonalChoice(name='after'), '', 3)\n"
        "print(choice.rows, bool(arrays['weight'].any()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, changed = done.stdout.split()
    assert int(rows) > 4 and changed == "True"
