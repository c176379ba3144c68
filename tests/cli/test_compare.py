"""Tables of runs: what differs, means over seeds, and sweeps whose jobs run in other processes."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image as mpimg
import numpy as np
import pytest

from fedveil.base.refusal import Refusal
from fedveil.cli.compare import compare, draw, format_table, over_seeds, read_rows, write_csv
from fedveil.cli.predict import write
from fedveil.configs.preflight import preflight
from fedveil.configs.settings import settings_from_overrides
from fedveil.tables.draft import draft_schema

SMALL = (
    "task=digits",
    "task.num_clients=10",
    "num_rounds=1",
    "cohort=all",
    "batch_size=100",
    "local_epochs=1",
)


def kept(folder: Path, accuracy: float, seed: int, *overrides: str, epsilon: float | str = 1.0) -> Path:
    """Write the folder of a run that ended."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(settings_from_overrides([*overrides, f"seed={seed}"]).source)
    privacy = [
        {"unit": "client", "adversary": "server", "epsilon": "infinity"},
        {"unit": "client", "adversary": "model", "epsilon": epsilon},
    ]
    metrics = {"accuracy": accuracy, "train/train_loss": 1.0}
    result = {"status": "completed", "seed": seed, "metrics": metrics, "privacy": privacy}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    low, high = "privacy.target_epsilon=1", "privacy.target_epsilon=3"
    return [
        kept(tmp_path / "a", 0.5, 0, low),
        kept(tmp_path / "b", 0.7, 1, low),
        kept(tmp_path / "c", 0.8, 0, high, epsilon="infinity"),
    ]


def test_runs_are_named_by_their_differences_and_seed(runs: list[Path]) -> None:
    rows = read_rows(runs)
    assert [dict(row.overrides) for row in rows] == [{"privacy.target_epsilon": value} for value in "113"]
    assert [(row.seed, row.epsilon["client"]) for row in rows] == [(0, 1.0), (1, 1.0), (0, math.inf)]
    assert format_table(rows).splitlines()[:2] == [
        "job                              accuracy  epsilon",
        "privacy.target_epsilon=1 seed=0  0.5       client 1",
    ]


def test_an_interval_over_seeds_is_students(runs: list[Path]) -> None:
    (low, high) = over_seeds(read_rows(runs))
    found = low.metrics["accuracy"]
    # Two values: the 97.5 % point of Student's t with one degree of freedom is 12.706.
    assert (low.runs, found.mean) == (2, pytest.approx(0.6))
    assert found.high == pytest.approx(0.6 + 12.706 * 0.1, rel=1e-4) and found.low == pytest.approx(
        0.6 - 1.2706, rel=1e-4
    )
    assert (high.runs, high.metrics["accuracy"].high) == (1, None)


def test_options_that_differ_are_named_by_their_group(tmp_path: Path) -> None:
    runs = [kept(tmp_path / name, 0.5, 0, f"privacy={name}") for name in ("record", "none")]
    assert [dict(row.overrides) for row in read_rows(runs)] == [
        {"learning_rate": "2", "local_epochs": "1", "privacy": "record"},
        {"learning_rate": "20", "local_epochs": "5", "privacy": "none"},
    ]


def test_a_table_file_and_a_figure(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(runs, tmp_path / "t.csv", tmp_path / "t.png", as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["epsilon"]["client"] for row in found["runs"]] == [1.0, 1.0, "infinity"]
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["accuracy"] for row in rows] == ["0.5", "0.7", "0.8"]
    assert float(rows[0]["accuracy mean"]) == pytest.approx(0.6) and rows[2]["accuracy low"] == ""
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_table_fits_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_folder: bool) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = [
        "privacy.target_epsilon=1",
        "learning_rate=0.123456",
        "cohort.rate=0.5",
        "privacy.clipping_norm=7",
    ]
    other = [
        "privacy.target_epsilon=3",
        "learning_rate=0.654321",
        "cohort.rate=0.25",
        "privacy.clipping_norm=8",
    ]
    runs = [kept(tmp_path / "a", 0.5, 0, *long), kept(tmp_path / "b", 0.6, 0, *other)]
    assert max(map(len, format_table(read_rows(runs, tmp_path), by_folder).splitlines())) <= 80


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refusal, match="holds no run that has ended"):
        compare([tmp_path / name])
    with pytest.raises(Refusal, match="cannot be written"):
        compare([kept(tmp_path / "run", 0.5, 0)], csv=tmp_path / "empty")
    for damaged in ("[" * 100_000, "[1]", ""):
        (tmp_path / "run" / "result.json").write_text(damaged)
        with pytest.raises(Refusal, match="restore it"):
            compare([tmp_path / "run"])


def test_a_diverged_metric_is_still_a_table(tmp_path: Path) -> None:
    rows = read_rows([kept(tmp_path / "a", math.nan, 0), kept(tmp_path / "b", 0.5, 1)])
    assert "nan" in format_table(rows)
    write_csv(rows, tmp_path / "t.csv")


FORMULA = '=HYPERLINK("https://example.org","ok")'
CELLS = [FORMULA, "+1+cmd", "-a", "@sum", "\t=1", "＝1"]


def test_a_spreadsheet_runs_no_cell_of_predictions_or_of_a_comparison(tmp_path: Path) -> None:
    numbers = ["-1", "+2.5", "1e3"]
    words = [*CELLS, *numbers] * 4
    columns = {"=label": np.array(words), "probability": np.linspace(-0.5, 1, len(words))}
    write(columns, tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["'=label", "probability"]
    assert [row[0] for row in rows] == [*(f"'{each}" for each in CELLS), *numbers] * 4
    assert rows[0][1] == "-0.5"
    draft, *_ = draft_schema([tmp_path / "p.csv"], "'=label")
    assert (f"'{FORMULA}",) in draft.columns[0].categories  # our own reader reads it
    write_csv(read_rows([kept(tmp_path / FORMULA[:10], 0.5, 0)], tmp_path), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines()[1].startswith("'=HYPERLINK")


# --- sweeps -------------------------------------------------------------------------------------------------------


def sweep(commands: Any, *words: str) -> tuple[int, Any]:
    return commands.run("simulate", "-m", *SMALL, *words, "hydra.sweep.dir=sweep")


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "sweep" / "sweep.json").read_text())["runs"]


def test_a_sweep_leaves_its_table_and_is_not_swept_over(commands: Any, tmp_path: Path) -> None:
    named = "hydra.sweep.subdir=${hydra.job.override_dirname}"
    code, done = sweep(commands, "privacy=none", "seed=0,1", named)
    assert code == 0, done.err
    assert [(row["seed"], row["status"]) for row in rows_in(tmp_path)] == [(0, "completed"), (1, "completed")]
    assert "mean over seeds, 95 % interval" in done.out
    with open(tmp_path / "sweep" / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{row[key] for key in row if key.startswith("epsilon")} for row in rows] == [{"inf"}, {"inf"}]
    assert not any(key.startswith("train/") for key in rows[0])
    for result in map(json.loads, (each.read_text() for each in tmp_path.glob("sweep/*/result.json"))):
        told = {key: result[key] for key in ("task", "population", "cohort", "strategy", "partition")}
        assert told == {
            "task": "digits",
            "population": 10,
            "cohort": "all",
            "strategy": "fedavg",
            "partition": "iid",
        }
    code, compared = commands.run("compare", *map(str, sorted((tmp_path / "sweep").iterdir())))
    assert code == 0 and "mean over seeds, 95 % interval" in compared.out, compared.err
    code, again = sweep(commands, "privacy=none", "seed=0,1")
    assert code == 2 and "already holds a sweep" in again.err


@pytest.mark.campaign
def test_jobs_may_run_in_processes_of_joblib(commands: Any, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    joblib = "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
    code, done = sweep(commands, "privacy=none", "seed=0,1", *joblib)
    assert code == 0, done.err
    assert [row["status"] for row in rows_in(tmp_path)] == ["completed", "completed"]


@pytest.mark.filterwarnings("ignore")  # what Optuna's plug-in warns of is no fault of a run
def test_a_sweeper_may_choose_values_and_optimise_a_metric(commands: Any, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    optuna = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize")
    wide = ("privacy=none", "learning_rate=interval(0.01,8.0)")
    code, done = commands.run(
        "simulate", "-m", *SMALL, *optuna, *wide, "optimize=acc", "hydra.sweep.dir=other"
    )
    assert code == 2 and "optimize='acc': the run reports accuracy, " in done.err
    assert "Traceback" not in done.err and "Error executing job" not in done.err
    code, done = sweep(commands, *optuna, *wide, "optimize=accuracy")
    assert code == 0, done.err
    accuracies = [row["metrics"]["accuracy"] for row in rows_in(tmp_path)]
    assert len(accuracies) == 2
    assert str(max(accuracies)) in (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    with pytest.raises(Refusal, match=r"learning_rate=-0\.5: must be above 0"):
        preflight(["-m", *optuna, "learning_rate=interval(-0.5,8.0)"], writes=True)
    for unplaced in ("hydra.sweeper.params={a: 1}", "+hydra.sweeper.params.learning_rate=1"):
        with pytest.raises(Refusal, match="null; a space to search is given as learning_rate=interval"):
            preflight(["-m", *optuna, unplaced], writes=True)


def test_an_experiment_may_bring_its_sweep(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /privacy: record\nnum_rounds: 1\n"
    text += "hydra:\n  sweeper:\n    params:\n      privacy.target_epsilon: 1,2\n"
    (tmp_path / "experiment" / "few.yaml").write_text(text)
    checked = preflight(["-m", "--config-dir", str(tmp_path), "+experiment=few", "seed=0,1"], writes=False)
    assert [settings.num_rounds for _, settings in checked.jobs] == [1] * 4
    assert [settings.privacy.target_epsilon for _, settings in checked.jobs] == [1.0, 1.0, 2.0, 2.0]  # type: ignore[union-attr]


def test_jobs_of_a_sweep_are_listed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedveil", "simulate", "-m", "--cfg", "job", "seed=3,4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if "seed" in line] == [
        "# seed=3",
        "seed: 3",
        "# seed=4",
        "seed: 4",
    ]
    assert list(tmp_path.iterdir()) == []


def test_figures_of_noised_training_are_no_columns_of_a_comparison(runs: list[Path], tmp_path: Path) -> None:
    rows = read_rows(runs)
    assert all(set(row.metrics) == {"accuracy"} for row in rows)
    write_csv(rows, tmp_path / "all.csv")
    assert "train/" not in (tmp_path / "all.csv").read_text()


def test_exposure_of_secrets_has_a_column_for_each_run(tmp_path: Path, runs: list[Path]) -> None:
    for run, bits in zip(runs[::2], ((1.5, 9.5), (1.0, 1.25)), strict=True):
        result = json.loads((run / "result.json").read_text())
        more = {"unplanted": 1.4, "limit": 9.966}
        tests = [
            {"name": f"exposure_x{copies}", "p_value": 0.5, "shown": {"bits": each, **more}}
            for copies, each in zip((16, 1), bits[::-1], strict=True)
        ]
        odd = {"name": "odd_examples", "p_value": 0.5, "shown": {"auc": 0.5}}
        (run / "result.json").write_text(json.dumps(result | {"audit": {"memorisation": [odd, *tests]}}))
    rows = read_rows(runs)
    first, none, second = (row.exposure for row in rows)
    assert list(first.items()) == [("1", 1.5), ("16", 9.5), ("unplanted", 1.4), ("limit", 9.966)]
    assert none == {} and second["16"] == 1.25
    *_, table = format_table(rows, by_folder=True).split("\n\n")[:2]
    lines = [line.split() for line in table.splitlines()]
    assert lines[0][-2:] == [str(runs[0]), str(runs[2])]
    assert lines[-4:] == [
        ["1", "1.5", "1"],
        ["16", "9.5", "1.25"],
        ["unplanted", "1.4", "1.4"],
        ["limit", "9.966", "9.966"],
    ]
    draw(rows, tmp_path / "both.png")
    draw(rows[1:2], tmp_path / "one.png")
    heights = [mpimg.imread(tmp_path / f"{name}.png").shape[0] for name in ("both", "one")]
    assert heights[0] > heights[1] + 500


def test_a_plot_has_room_for_long_settings(tmp_path: Path) -> None:
    keys = ("learning_rate=0.25", "local_epochs=3", "num_rounds=30", "batch_size=128", "cohort=all")
    runs = [kept(tmp_path / "plain", 0.5, 0), kept(tmp_path / "changed", 0.5, 0, *keys, "privacy=none")]
    draw(read_rows(runs), tmp_path / "both.png")  # a warning of its layout is an error
    assert mpimg.imread(tmp_path / "both.png").shape[1] == 960
