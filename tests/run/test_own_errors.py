"""Errors of a user's own code, whose text reaches whoever runs it on this machine, and nobody else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shared.tasks import Points
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedveil as fv

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

TEXT = "the words of own code"


class Shops(Points):
    """A task that works."""

    num_clients, held_out_client = 30, 1000


class Evaluated(nn.Linear):
    """Fails in evaluation mode, on some number of rows or more."""

    def __init__(self, rows: int) -> None:
        super().__init__(4, 2)
        self.rows = rows

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training and len(inputs) >= self.rows:
            raise RuntimeError(TEXT)
        return super().forward(inputs)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


def late(outputs: Tensor, targets: Tensor) -> Tensor:
    if 2 < len(targets) < 20 or outputs.requires_grad:
        raise RuntimeError(TEXT)
    return cross_entropy(outputs, targets)


@pytest.mark.parametrize(
    ("part", "value", "field"),
    [
        ("loss", failing(RuntimeError(TEXT)), "client 0: targets=.*loss fails on them: RuntimeError"),
        ("loss", failing(fv.Refusal("loss", 1, TEXT)), "client 0: targets=.*: loss=1"),
        ("model", lambda: Evaluated(1), "client 0: inputs=.*in evaluation mode.*RuntimeError"),
        ("model", lambda: Evaluated(3), "task.model='RuntimeError.*in evaluation mode"),
        ("metrics", failing(RuntimeError(TEXT)), "task.metrics='RuntimeError"),
    ],
)
def test_a_refusal_holds_the_text_of_ones_own_exception(
    part: str, value: Any, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shops, part, staticmethod(value))
    with pytest.raises(fv.Refusal, match=field) as refused:
        fv.simulate(Shops(), privacy="none", folder=tmp_path / "run", quiet=True, num_rounds=1)
    assert TEXT in str(refused.value) and not (tmp_path / "run").exists()


def test_failure_in_a_round_is_reported_with_the_end_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Shops, "loss", staticmethod(late))
    run = fv.simulate(Shops(), privacy="none", folder=tmp_path, optimizer="adam", num_rounds=1)
    assert run.status == "failed" and TEXT not in (tmp_path / "result.json").read_text()
    assert f"clients.log ends with: RuntimeError: {TEXT}" in capsys.readouterr().err


class Breaks(fv.Callback):
    """Lets training fail once the run's checks have passed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def start(self, run: fv.RunStart) -> None:
        self.patch.setattr(Shops, "loss", staticmethod(failing(RuntimeError(TEXT))))


def test_a_failure_on_real_data_is_for_its_log_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a screen it would show whether a client was drawn that fails."""
    monkeypatch.setattr(Shops, "simulated", False, raising=False)
    monkeypatch.setattr(Shops, "data_id", "shops", raising=False)
    privacy = fv.ClientCentral(target_epsilon=8.0, target_delta=1e-2, allow_large_delta=True)
    keys: dict[str, Any] = {"cohort": fv.All(), "num_rounds": 1, "accept_vacuous": True}
    keys |= {"ledger": {"dir": str(tmp_path / "ledgers")}, "callbacks": [Breaks(monkeypatch)]}
    run = fv.simulate(Shops(), privacy=privacy, folder=tmp_path / "run", **keys)
    assert run.status == "failed" and TEXT in (tmp_path / "run" / "clients.log").read_text()
    said = capsys.readouterr()
    assert TEXT not in said.err and TEXT not in said.out
