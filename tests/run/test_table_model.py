"""Model of tables that follows from public numbers, the same in every run on them."""

import re
from pathlib import Path

import pytest

from fedveil.configs.settings import settings_from_overrides
from fedveil.run.build import build
from fedveil.run.table_model import ModelChoice, model_choice, with_model_of_run

COLUMNS = (
    "label: y\ncolumns:\n  a: {low: 0, high: 1}\n  b: {low: 0, high: 1}\n  y: {categories: ['no', 'yes']}\n"
)


def tables(folder: Path, rows: int, clients: int = 1, more: str = "") -> list[str]:
    """Tables of equal rows, with the keys of a run on them."""
    (folder / "tables").mkdir()
    for client in range(clients):
        lines = [f"0.{row % 10},0.5,{'yes' if row % 3 else 'no'}" for row in range(rows)]
        (folder / "tables" / f"{client}.csv").write_text("\n".join(["a,b,y", *lines]))
    (folder / "tables" / "schema.yaml").write_text(COLUMNS + more)
    return ["task=csv", f"task.folder={folder / 'tables'}", "task.simulated=true"]


@pytest.mark.parametrize(
    ("rows", "clients", "keys", "model"),
    [
        (50, 1, ["privacy=none"], "gam"),
        (38, 1, ["privacy=none"], "linear"),
        (50, 1, ["privacy.target_epsilon=3"], "gam"),
        (50, 1, ["privacy.target_epsilon=0.5"], "linear"),
        (50, 4, ["privacy=record_distributed", "privacy.target_epsilon=0.5"], "gam"),
        (30, 4, ["privacy=record"], "gam"),
        (20, 4, ["privacy=record", "privacy.target_epsilon=0.8"], "linear"),
        (500, 4, ["privacy=client_central"], "linear"),
    ],
)
def test_records_epsilon_and_mode_choose_the_model(
    rows: int, clients: int, keys: list[str], model: str, tmp_path: Path
) -> None:
    overrides = [*tables(tmp_path, rows, clients), "privacy.allow_large_delta=true", *keys]
    if "privacy=none" in keys:
        overrides.remove("privacy.allow_large_delta=true")
    settings = settings_from_overrides(overrides)
    assert model_choice(settings).model == model
    assert build(settings).settings.task.model == model  # pyright: ignore


def test_a_choice_has_its_numbers_in_a_sentence(tmp_path: Path) -> None:
    settings = settings_from_overrides([*tables(tmp_path, 100), "privacy=none"])
    choice = model_choice(settings)
    assert choice.model == "gam"
    assert re.fullmatch(r"10\d records for 2 columns are at least 20 a column", choice.reason)


def test_pairs_and_a_scaling_choose_the_model_whatever_the_numbers(tmp_path: Path) -> None:
    keys = [*tables(tmp_path, 9, more="pairs: [[a, b]]\n"), "privacy=none"]
    assert model_choice(settings_from_overrides(keys)).model == "gam"
    (tmp_path / "tables" / "schema.yaml").write_text(COLUMNS)
    scaled = settings_from_overrides([*keys, "task.scaling=asked"])
    assert model_choice(scaled) == ModelChoice("linear", "task.scaling scales its numbers")


def test_a_model_of_your_own_choice_stays(tmp_path: Path) -> None:
    settings = settings_from_overrides([*tables(tmp_path, 100), "privacy=none", "task.model=linear"])
    assert build(settings).settings.task.model == "linear"  # pyright: ignore


@pytest.mark.parametrize("model", ["linear", "gam"])
def test_a_question_about_a_run_has_the_model_of_the_run(model: str, tmp_path: Path) -> None:
    keys = [*tables(tmp_path, 100), "privacy=none"]
    task = build(settings_from_overrides([*keys, f"task.model={model}"])).task
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "schema.yaml").write_text(task.schema.text())  # pyright: ignore
    settings = settings_from_overrides(keys)
    assert with_model_of_run(settings, tmp_path / "run").task.model == model  # pyright: ignore
    assert with_model_of_run(settings, None) == settings
