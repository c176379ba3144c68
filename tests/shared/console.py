"""Console of the tests of the command line: verbs run in this process, with a simulator of the test's choice."""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fedveil.configs.schema import SimulationSettings

main: Callable[[], int] = import_module("fedveil.__main__").main
Simulator = Callable[[SimulationSettings, Path], tuple[int, dict[str, Any]]]


@dataclass
class Console:
    """Runs the command line in this process, in an empty folder, with a simulator of the test's choice."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    folder: Path
    calls: list[tuple[SimulationSettings, Path]] = field(default_factory=list)

    def simulator(self, simulate: Simulator) -> None:
        def run(
            settings: SimulationSettings, folder: Path, quiet: bool = False, callbacks: object = ()
        ) -> types.SimpleNamespace:
            del callbacks
            self.calls.append((settings, folder))
            exit_code, result = simulate(settings, folder)
            return types.SimpleNamespace(exit_code=exit_code, result=result)

        room = types.ModuleType("fedveil.simulations.simulate")
        room.__dict__["simulate"] = run
        self.monkeypatch.setitem(sys.modules, "fedveil.simulations.simulate", room)

    def __call__(self, *argv: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["fedveil", *argv])
        code = main()
        out, err = self.capsys.readouterr()
        return code, out, err

    def written(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))


def completed(accuracy: float, epsilon: float | str) -> dict[str, Any]:
    privacy = [
        {"unit": "client", "adversary": "server", "epsilon": "infinity"},
        {"unit": "client", "adversary": "model", "epsilon": epsilon},
    ]
    return {"status": "completed", "metrics": {"accuracy": accuracy}, "privacy": privacy}
