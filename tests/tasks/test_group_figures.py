"""Figures by group on public held-out data: MetricFrame's, in a run's result, and what privacy costs each group."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fedveil as fv
from fedveil.cli.compare import format_table, read_rows
from fedveil.configs.settings import settings_from_overrides
from fedveil.tasks.data import group_figures

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

WORDS = {"sex": ("f", "m"), "town": ("north", "south", "east")}


def people(rows: int = 3000) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    draw = np.random.default_rng(5)
    outputs, targets = (
        torch.from_numpy(draw.normal(size=(rows, 2))),
        torch.from_numpy(draw.integers(0, 2, rows)),
    )
    groups = {
        "sex": torch.from_numpy(draw.integers(-1, 2, rows)),
        "town": torch.from_numpy(draw.integers(0, 2, rows)),
    }
    return outputs, targets, groups


def test_figures_by_group_are_metric_frames() -> None:
    metrics = pytest.importorskip("fairlearn.metrics")
    outputs, targets, groups = people()
    found = group_figures(outputs, targets, groups, WORDS)
    known = (groups["sex"] >= 0).numpy()
    frame = metrics.MetricFrame(
        metrics={
            "true positive rate": metrics.true_positive_rate,
            "false positive rate": metrics.false_positive_rate,
            "selection rate": metrics.selection_rate,
            "accuracy": lambda y, p: float(np.mean(y == p)),
        },
        y_true=targets.numpy()[known], y_pred=outputs.argmax(1).numpy()[known],
        sensitive_features=groups["sex"].numpy()[known],
    )  # fmt: skip
    for code, word in enumerate(WORDS["sex"]):
        for name in frame.by_group.columns:
            assert found[f"groups/sex={word}/{name}"] == pytest.approx(frame.by_group[name][code], abs=1e-9)


def test_empty_group_and_numeric_label_have_no_figure() -> None:
    outputs, targets, groups = people()
    found = group_figures(outputs, targets, groups, WORDS)
    assert not any("east" in name for name in found) and len(found) == 4 * 4
    assert group_figures(outputs[:, :1], targets.double(), groups, WORDS) == {}
    three = group_figures(torch.eye(3)[targets], targets, groups, WORDS)
    assert set(three) == {
        f"groups/{where}/accuracy" for where in ("sex=f", "sex=m", "town=north", "town=south")
    }


def shops(folder: Path) -> dict[str, object]:
    draw = np.random.default_rng(1)
    for number in range(8):
        lines = ["size,sex,paid"]
        for size, sex in zip(draw.uniform(0, 1, 60), draw.choice(["f", "m"], 60), strict=True):
            lines.append(f"{size:.3f},{sex},{'yes' if size + 0.2 * draw.normal() > 0.5 else 'no'}")
        (folder / f"{number}.csv").write_text("\n".join(lines) + "\n")
    (folder / "schema.yaml").write_text(
        "label: paid\ncolumns:\n  size: {low: 0, high: 1}\n  paid: {categories: ['no', 'yes']}\n"
        "groups:\n  sex: {categories: [f, m]}\n"
    )
    return {"name": "csv", "folder": str(folder), "simulated": True, "groups": ["sex"]}


def test_a_run_measures_its_model_by_group(tmp_path: Path) -> None:
    (tmp_path / "shops").mkdir()
    run = fv.simulate(
        shops(tmp_path / "shops"),
        privacy="none",
        cohort="all",
        num_rounds=3,
        folder=tmp_path / "run",
        quiet=True,
    )
    told = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    rates = [told[f"groups/sex={word}/accuracy"] for word in "fm"]
    assert run.status == "completed" and min(rates) <= told["accuracy"] <= max(rates)


def test_cost_of_privacy_by_group_stands_with_the_run_without_it(tmp_path: Path) -> None:
    for privacy, rate in (("client_central", 0.6), ("none", 0.75)):
        folder = tmp_path / privacy
        folder.mkdir()
        (folder / "config.yaml").write_text(settings_from_overrides([f"privacy={privacy}", "seed=0"]).source)
        metrics = {"accuracy": 0.9, "groups/sex=f/true positive rate": rate}
        told = {"status": "completed", "seed": 0, "metrics": metrics, "privacy": []}
        (folder / "result.json").write_text(json.dumps(told))
    said = format_table(read_rows([tmp_path / "client_central", tmp_path / "none"]))
    line = next(each for each in said.splitlines() if each.startswith("sex=f/true positive rate"))
    assert line.split()[-3:] == ["0.75", "0.6", "(-0.1500)"]
