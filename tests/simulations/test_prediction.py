"""Predictions of accuracy: the noise of the whole run on the mean of a smaller draw, on public data, uncharged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedveil as fv
from fedveil.__main__ import run as command
from fedveil.base.refusal import Refusal
from fedveil.benchmarks import search
from fedveil.configs.settings import settings_from_overrides
from fedveil.run.sum_plan import sum_plan
from fedveil.simulations import prediction
from fedveil.simulations.prediction import predict, public_federation

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

SHORT = ("task=digits", "num_rounds=3", "privacy.allow_large_delta=true")


def played(monkeypatch: pytest.MonkeyPatch, *overrides: str, clients: float = 1.0) -> tuple[Any, Any]:
    """Return the federation that was asked for and the one that was played in its place."""
    small: list[Any] = []

    def kept(whole: Any, made: Any) -> dict[str, float]:
        small.append(made)
        return {"accuracy": 0.5}

    monkeypatch.setattr(prediction, "_simulated", kept)
    whole = public_federation(settings_from_overrides(overrides))
    predict(whole, (0,), clients)
    return whole, small[0]


def noise_on_the_mean(federation: Any) -> float:
    """Return the noise's standard deviation on the mean of a round, in clips."""
    plan = sum_plan(federation)
    return plan.noise_std / plan.clipping_norm / federation.mode.expected_units


@pytest.mark.parametrize(
    "mode", ["cohort.rate=0.5", "cohort=all", "cohort=fixed", "privacy=record_distributed"]
)
def test_a_smaller_draw_has_as_much_noise_on_its_mean(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for clients in (1.0, 2.0):
        whole, small = played(
            monkeypatch,
            *SHORT,
            *(["cohort.size=50"] if mode == "cohort=fixed" else []),
            mode,
            clients=clients,
        )
        assert noise_on_the_mean(small) == pytest.approx(noise_on_the_mean(whole) / clients)
    if "record" not in mode:
        assert small.cohort.expected_size(100) == pytest.approx(max(12, whole.cohort.expected_size(100) / 8))


def test_masked_sums_are_played_openly_with_the_noise_of_colluders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, small = played(monkeypatch, *SHORT, "privacy=client_distributed")
    assert small.masking is None and small.settings.privacy.name == "client_central"
    assert noise_on_the_mean(small) == pytest.approx(noise_on_the_mean(whole) / 0.9**0.5)


def test_each_clients_own_noise_falls_with_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, small = played(monkeypatch, *SHORT, "privacy=record", "cohort=all")
    alone = prediction._clients_noise(whole)
    assert small.settings.privacy.noise_multiplier == pytest.approx(alone * (1 / 8) ** 0.5)


def test_a_prediction_is_near_the_run_and_charges_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("task=digits", "num_rounds=40")
    found = predict(public_federation(settings_from_overrides(asked)))
    run = fv.simulate("digits", num_rounds=40, quiet=True)
    assert found.metric == "accuracy" and len(set(found.values)) == 2
    assert found.mean == pytest.approx(run.metrics["accuracy"], abs=0.05)
    assert not list(tmp_path.rglob("*.ledger"))


class Private:
    """Real records of three clients."""

    simulated, num_clients = False, 3

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"accuracy": 0.0}

    def client_data(self, client: int) -> Any:
        return torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)

    held_out = lambda self: self.client_data(0)


def test_private_data_are_refused() -> None:
    asked = (
        "task=custom",
        f"task.target={__name__}:Private",
        f"allow_modules=[{__name__}]",
        "privacy=record",
    )
    with pytest.raises(Refusal, match="public or made up alone"):
        public_federation(settings_from_overrides(asked))
    with pytest.raises(Refusal, match="fedveil simulate alone"):
        public_federation(settings_from_overrides(["task=digits", "privacy=record_and_client"]))


def test_the_command_shows_the_knee_and_names_a_better_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(whole: Any, made: Any) -> dict[str, float]:
        return {
            "accuracy": 0.93
            if whole.mode.sums_records
            else 0.30 + min(0.04, 0.02 * made.settings.num_rounds / 3)
        }

    monkeypatch.setattr(prediction, "_simulated", told)
    assert command(["plan", "--accuracy", *SHORT, "privacy=record"]) == 0
    shown = capsys.readouterr().out
    assert "public data of digits" in shown and "Nothing is charged" in shown
    assert "record_distributed: 93%, record: 32%" in shown
    assert [line.split()[0] for line in shown.splitlines() if "knee" in line] == ["1", "50"]
    assert command(["plan", "--accuracy", "--json", *SHORT]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["axis"], row["value"]) for row in rows if row["axis"] == "rounds"] == [
        ("rounds", 1),
        ("rounds", 2),
        ("rounds", 3),
        ("rounds", 6),
    ]
    assert rows[-1] == {"axis": "mode", "value": "record_distributed", "values": [0.93, 0.93]}
    assert command(["plan", "--accuracy", "task=digits", "privacy=none"]) == 2


def test_a_search_prints_the_best_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        prediction, "_simulated", lambda whole, made: {"accuracy": made.settings.num_rounds / 100}
    )
    assert search.main(["--task", "digits", "num_rounds=5,20", "task.clipping_norm=2,4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("0.2000") and "num_rounds=20" in lines[0]
