"""Tests of tables/counts.py: Poisson regression, its figures, and a run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import PoissonRegressor
from sklearn.metrics import d2_tweedie_score

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.tables.counts import SHARE, Counts
from fedveil.tasks.shapes import read_shapes
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load

LABEL = "{kind: count, column: visits, mean: 2}"
SCHEMA = """label: LABEL
columns:
  age: {low: -1, high: 1}
  dose: {low: -1, high: 1}
  visits: {low: 0, high: 40}
"""


def write(folder: Path, label: str = LABEL) -> tuple[np.ndarray, np.ndarray]:
    """Write two clinics with 300 patients each; return the inputs and the counts of all."""
    draw = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    inputs = draw.uniform(-1, 1, (600, 2)).round(4)
    counts = draw.poisson(np.exp(0.5 + inputs @ [0.8, -0.5]))
    for name, rows in (("north", range(300)), ("south", range(300, 600))):
        lines = [f"{inputs[row, 0]},{inputs[row, 1]},{counts[row]}" for row in rows]
        (folder / f"{name}.csv").write_text("\n".join(["age,dose,visits", *lines]) + "\n")
    (folder / "schema.yaml").write_text(SCHEMA.replace("LABEL", label))
    return inputs, counts


def label_of(folder: Path) -> Counts:
    outcome = read_schema(folder / "schema.yaml").outcome
    assert isinstance(outcome, Counts)
    return outcome


def test_fit_without_privacy_is_that_of_scikit_learn(tmp_path: Path) -> None:
    inputs, counts = write(tmp_path / "clinics")
    (tmp_path / "public.csv").write_text((tmp_path / "clinics" / "north.csv").read_text())
    own = [
        f"task.folder={tmp_path / 'clinics'}",
        f"task.held_out_file={tmp_path / 'public.csv'}",
        "num_rounds=60",
    ]
    own += ["task.simulated=true", "task.model=linear", "privacy=none", "audit=off", "seed=1"]
    own += [f"hydra.run.dir={tmp_path / 'run'}"]
    assert run(["simulate", "task=csv", *own]) == 0
    fit = PoissonRegressor(alpha=0, tol=1e-9).fit(inputs, counts)
    shapes = read_shapes(tmp_path / "run" / "schema.yaml", tmp_path / "run" / "model.safetensors")
    assert shapes is not None and shapes["scores"] == ["log of visits"]
    slopes = {each["column"]: np.ptp(each["values"][0]) / 2 for each in shapes["shapes"]}
    assert [slopes["age"], slopes["dose"]] == pytest.approx(np.abs(fit.coef_), abs=0.02)
    assert shapes["intercept"] == pytest.approx([fit.intercept_], abs=0.02)
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["deviance_explained"] == pytest.approx(fit.score(inputs[:300], counts[:300]), abs=0.005)


def test_deviance_explained_is_that_of_scikit_learn(tmp_path: Path) -> None:
    _, counts = write(tmp_path)
    outputs = torch.randn(600, 1, generator=torch.Generator().manual_seed(0))
    metrics = label_of(tmp_path).metrics(outputs, torch.from_numpy(counts / 2))
    rates = np.minimum(2 * outputs.double().exp().numpy()[:, 0], 40)
    assert metrics["deviance_explained"] == pytest.approx(d2_tweedie_score(counts, rates, power=1), abs=1e-9)
    assert metrics["mean_absolute_error"] == pytest.approx(np.abs(rates - counts).mean())


def test_loss_beyond_the_largest_count_is_a_straight_line(tmp_path: Path) -> None:
    write(tmp_path)
    outputs = torch.tensor([[0.3], [2.9957323], [9.0], [10.0]], requires_grad=True)
    loss = SHARE * label_of(tmp_path).loss(outputs, torch.tensor([1.5] * 4), ())
    (gradient,) = torch.autograd.grad(4 * loss, outputs)
    assert gradient.flatten().tolist() == pytest.approx([np.exp(0.3) - 1.5, 18.5, 18.5, 18.5], abs=1e-4)
    assert label_of(tmp_path).predictions(np.array([[9.0], [0.0]]))["visits"].tolist() == pytest.approx(
        [40, 2]
    )


def test_counts_are_whole_and_clipped_to_their_bounds(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "north.csv").write_text("age,dose,visits\n0,0,3\n0,0,90\n")
    examples = load(str(tmp_path)).client_data(0)
    assert examples.targets.tolist() == [1.5, 20]
    assert label_of(tmp_path).values(examples.targets.numpy())["visits"].tolist() == [3, 40]
    for cell, fault in (("2.5", "is no count"), ("-1", "is no count"), ("", "is the label and missing")):
        (tmp_path / "north.csv").write_text(f"age,dose,visits\n0,0,1\n0,0,{cell}\n")
        with pytest.raises(Refusal, match=f"column 'visits', row 3.*{fault}"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        ("{kind: count, column: age}", "label.column='age': must hold numbers, with low from 0"),
        ("{kind: count, column: visits, mean: 0}", "label.mean='0': must be above 0 and at most 40"),
        ("{kind: count, column: visits, rate: 1}", "label.rate='1'"),
    ],
)
def test_a_label_with_a_mistake_is_refused(label: str, fault: str, tmp_path: Path) -> None:
    write(tmp_path, label)
    with pytest.raises(Refusal) as refused:
        label_of(tmp_path)
    assert fault in str(refused.value)


@pytest.mark.parametrize(("mode", "model"), [("record", "gam"), ("record_distributed", "mlp")])
def test_private_modes_train_counts(mode: str, model: str, tmp_path: Path) -> None:
    write(tmp_path / "clinics")
    own = [
        f"task.folder={tmp_path / 'clinics'}",
        "task.simulated=true",
        f"task.model={model}",
        "num_rounds=3",
    ]
    own += [f"privacy={mode}", "audit=off", f"hydra.run.dir={tmp_path / 'run'}", "seed=1"]
    assert run(["simulate", "task=csv", *own, *(["batch_size=50"] if mode == "record" else [])]) == 0
    assert "deviance_explained" in json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
