"""Learning rates of tables: they follow from a bound on the loss's curvature, and without privacy the run reaches the optimum."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared.runs import run_quietly

from fedveil.base.refusal import Refusal
from fedveil.cli.plan import show_plan
from fedveil.configs.privacy_settings import RecordDistributed
from fedveil.configs.schema import SimulationSettings
from fedveil.configs.settings import settings_from_overrides
from fedveil.run.build import build
from fedveil.run.learning_rate import rise_of
from fedveil.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

COLUMNS, ROWS = 5, 240
TABLES = ("task.model=linear", "task=csv", "task.simulated=true", "audit=off")


@pytest.fixture
def number(tmp_path: Path) -> Path:
    """Tables of three owners whose rows differ, a public one, and a label that is nearly a sum of the columns."""
    draw = np.random.default_rng(7)
    columns = "\n".join(f"  x{each}: {{low: -1, high: 1}}" for each in range(COLUMNS))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "schema.yaml").write_text(
        f"label: y\ncolumns:\n{columns}\n  y: {{low: -4, high: 4}}\n"
    )
    for place, name in enumerate(("tables/a.csv", "tables/b.csv", "tables/c.csv", "public.csv")):
        inputs = draw.uniform(-1, 1, (ROWS, COLUMNS))
        inputs[:, 0] = inputs[:, 0] * 0.4 + (place % 3 - 1) * 0.5
        y = inputs.sum(1) + 0.5 * draw.standard_normal(ROWS)
        lines = [",".join(f"{each:.6f}" for each in row) for row in np.column_stack([inputs, y])]
        header = ",".join([*(f"x{each}" for each in range(COLUMNS)), "y"])
        (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
    return tmp_path


@pytest.fixture
def shops(tmp_path: Path) -> list[str]:
    """Tables of two shops with a label of two classes; the settings that name them."""
    draw = np.random.default_rng(0)
    (tmp_path / "shops").mkdir()
    (tmp_path / "shops" / "schema.yaml").write_text(
        "label: back\ncolumns:\n  visits: {low: 0, high: 20, edges: [2, 5, 10]}\n  age: {low: 18, high: 90}\n"
        '  member: {categories: ["no", "yes"]}\n  back: {categories: ["no", "yes"]}\n'
    )
    for name in ("north", "south"):
        visits, age, member = draw.integers(0, 21, 400), draw.integers(18, 91, 400), draw.random(400) < 0.5
        back = draw.random(400) < 0.2 + 0.5 * (visits > 5) + 0.2 * member
        words = (np.where(each, "yes", "no") for each in (member, back))
        lines = [",".join(map(str, row)) for row in zip(visits, age, *words, strict=True)]
        (tmp_path / "shops" / f"{name}.csv").write_text("\n".join(["visits,age,member,back", *lines]))
    return [*TABLES, f"task.folder={tmp_path / 'shops'}"]


def settings(where: Path, *more: str) -> SimulationSettings:
    folder, public = f"task.folder={where / 'tables'}", f"task.held_out_file={where / 'public.csv'}"
    return settings_from_overrides([*TABLES, folder, public, *more])


def result(where: Path, *more: str) -> dict[str, Any]:
    simulate(settings(where, *more), where / "run", quiet=True)
    return json.loads((where / "run" / "result.json").read_text())


def least_squares(where: Path) -> float:
    """Return the best share of the public rows' variance that a linear fit to all owners' rows explains."""
    read = {each.name: np.loadtxt(each, delimiter=",", skiprows=1) for each in where.rglob("*.csv")}
    rows, public = np.vstack([read[f"{each}.csv"] for each in "abc"]), read["public.csv"]
    ones = [np.column_stack([each[:, :-1], np.ones(len(each))]) for each in (rows, public)]
    fit = np.linalg.lstsq(ones[0], rows[:, -1], rcond=None)[0]
    residual = public[:, -1] - ones[1] @ fit
    return float(1 - (residual**2).sum() / ((public[:, -1] - public[:, -1].mean()) ** 2).sum())


def test_table_without_privacy_reaches_the_least_squares_fit(number: Path) -> None:
    found = result(number, "privacy=none")
    assert found["strategy"] == "fedavgm" and found["learning_rate"] == pytest.approx(1.9 / (2 * 6), rel=5e-3)
    assert found["metrics"]["r2"] == pytest.approx(least_squares(number), abs=2e-3)


@pytest.mark.parametrize(
    ("mode", "strategy", "limit"),
    [
        ("none", "fedavgm", 1),
        ("client_central", "fedavg", 1),
        ("record", "fedavg", 4),
        ("record_distributed", "fedavgm", 1),
    ],
)
def test_no_mode_steps_further_than_the_curvature_allows(
    number: Path, mode: str, strategy: str, limit: float
) -> None:
    few, much = build(settings(number, f"privacy={mode}", "num_rounds=1")), 6 * 2
    assert few.settings.strategy.name == strategy
    assert few.settings.training.learning_rate == pytest.approx(limit / much, rel=5e-3)
    many = build(settings(number, f"privacy={mode}", "num_rounds=2000"))
    noised = mode.startswith("record")
    assert (many.settings.training.learning_rate < few.settings.training.learning_rate / 2) is noised


def test_updates_of_classes_that_are_clipped_take_longer_steps(shops: list[str]) -> None:
    rates = {
        mode: build(settings_from_overrides([*shops, f"privacy={mode}", "num_rounds=1"])).settings.training
        for mode in ("client_central", "client_distributed", "record_distributed")
    }
    one = 1 / (4 * 0.5)
    found = {mode: each.learning_rate / one for mode, each in rates.items()}
    assert found == pytest.approx(
        {"client_central": 4, "client_distributed": 4, "record_distributed": 1}, rel=5e-3
    )


@pytest.mark.parametrize("rounds", [3, 20])
def test_momentum_suits_the_number_of_rounds(tmp_path: Path, shops: list[str], rounds: int) -> None:
    run = tmp_path / "run"
    run_quietly([*shops, "privacy=none", f"num_rounds={rounds}"], run)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(losses) < 1.05 * losses[0] and losses[-1] < 1.05 * min(losses), losses


def test_a_rate_and_a_strategy_of_the_user_stay(number: Path) -> None:
    for key in ("learning_rate=0.3", "task.learning_rate=0.3"):
        found = build(settings(number, "privacy=none", key, "strategy=fedavg", "batch_size=10")).settings
        assert (found.training.learning_rate, found.training.batch_size) == (0.3, 10)
        assert found.strategy.name == "fedavg"
    asked = settings(number, "privacy=none", "strategy=fedadam")
    assert build(asked).settings.strategy.name == "fedadam"


def test_a_task_without_a_bound_needs_a_rate() -> None:
    with pytest.raises(Refusal, match="learning_rate=None"):
        build(settings_from_overrides(["task=digits", "learning_rate=null"]))


def test_the_plan_shows_the_rate(number: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(settings(number, "privacy=none"))
    assert "learning_rate 0.158, batch_size 100000, fedavgm" in capsys.readouterr().out
    show_plan(settings(number, "privacy=record", "num_rounds=1"), as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["learning_rate"] == 0.333


def test_run_with_a_rising_loss_ends_with_the_remedy(
    number: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(settings(number, "privacy=none", "num_rounds=12", "learning_rate=9"), number / "run")
    said = json.loads((number / "run" / "result.json").read_text())["rise"]
    assert said in capsys.readouterr().out and "try a learning_rate below 9" in said


@pytest.mark.parametrize(
    ("losses", "above"),
    [
        ([3, 2, 1, 0.5], None),
        ([1, 0.5, 0.52, 0.51, 0.54, 0.5], None),  # converged, with noise
        ([1, 2, 1.5, 3], 3),
        ([1, 1.2, 0.9, None], 2),  # diverged: not a number
        ([1, 0.5, 0.6, 0.4], None),
        ([], None),
    ],
)
def test_half_of_the_rounds_decide_whether_a_loss_rises(
    losses: list[float | None], above: int | None
) -> None:
    run = settings_from_overrides(["task=digits", "privacy=none"])
    said = rise_of([{"round": place, "loss": loss} for place, loss in enumerate(losses)], run)
    assert said is None if above is None else f"in {above} of {len(losses)} rounds" in str(said)


def test_training_loss_counts_only_in_the_clear() -> None:
    rows, clear = [{"train/train_loss": each} for each in (1.0, 2.0, 3.0)], ["task=digits", "privacy=none"]
    assert "learning_rate" in str(rise_of(rows, settings_from_overrides(clear)))
    hidden = settings_from_overrides(["task=digits"])
    assert rise_of(rows, hidden) is None
    assert "clipping_norm" in str(rise_of([{"loss": each} for each in (1.0, 2.0, 3.0)], hidden))


@pytest.mark.parametrize(("mode", "norm"), [("record", 1), ("record_distributed", 0.5)])
def test_rising_loss_under_clipped_records_names_the_clip_as_remedy(mode: str, norm: float) -> None:
    rows, run = [{"loss": each} for each in (1.0, 2.0, 3.0)], settings_from_overrides([f"privacy={mode}"])
    assert f"try a privacy.max_grad_norm above {norm:g}, or fewer rounds" in str(rise_of(rows, run))


@pytest.mark.parametrize(
    ("keys", "clip"),
    [
        (("privacy.target_epsilon=1",), 1.0),
        (("privacy.target_epsilon=3", "privacy.records=100000"), 2.45),  # the length of a row: sqrt(6)
        (("privacy.target_epsilon=1", "privacy.records=30000"), 1.6),
        (("privacy.max_grad_norm=0.25",), 0.25),
        (("learning_rate=0.1", "privacy.records=100000"), 0.5),
        (("privacy.noise_multiplier=1", "privacy.target_epsilon=null"), 0.5),
    ],
    ids=["few", "many", "between", "own", "own-rate", "own-noise"],
)
def test_clip_of_a_table_grows_with_records_and_epsilon(
    number: Path, keys: tuple[str, ...], clip: float
) -> None:
    federation = build(settings(number, "privacy=record_distributed", *keys))
    level = federation.settings.privacy
    assert isinstance(level, RecordDistributed) and level.clip == pytest.approx(clip, abs=0.01)
    assert federation.mode.record_order().max_grad_norm == level.clip
