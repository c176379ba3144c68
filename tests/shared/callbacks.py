"""Callbacks of tests: one that keeps what it receives, and one that interrupts its run."""

from typing import Any

import fedveil as fv


class Log:
    """Callback that keeps the values it receives."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def start(self, run: fv.RunStart) -> None:
        self.values.append(run)

    def round(self, end: fv.RoundEnd) -> None:
        self.values.append(end)

    def end(self, ending: fv.RunEnd) -> None:
        self.values.append(ending)


class Stops(Log):
    """Callback that interrupts the run at once in its first round."""

    def round(self, end: fv.RoundEnd) -> None:
        raise KeyboardInterrupt
