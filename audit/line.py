"""Audit line of a run in progress: its displayed values and their text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.bounded_decoding import format_number
from ..privacy.audit.alarms import Alarm
from ..privacy.audit.memorisation import MemorisationResult
from ..privacy.audit.run_audit import Measured
from ..privacy.audit.summary import Raised


@dataclass(frozen=True)
class AuditLine:
    """Displayed state of an audit.

    Attributes:
      checked: whether the sums' noise is checked.
      canaries: number of canary clients.
      measured: the last measurement by canary clients; None before the first.
      alarms: raised so far.
      memorisation: the last results of the probes for planted data, a text each.
      probed: whether these are of the last round.
      visible: smallest detectable shortfall of the noise, as a share of the claimed noise in [0, 1].
      records: the last measurement by canary records; None before the first.
      on_alarm: action on an alarm.
      p_values: of the checks in the last round, by name.
      untested: clause on a promise that nothing tests, shown where there is nothing else.
    """

    checked: bool
    canaries: int
    measured: Measured | None
    alarms: tuple[Raised, ...]
    memorisation: tuple[str, ...] = ()
    probed: bool = False
    visible: float = 1.0
    records: Measured | None = None
    on_alarm: str = "note"
    p_values: Mapping[str, float] = field(default_factory=dict[str, float])
    untested: str = ""

    def fresh(self, number: int) -> bool:
        """Return whether round `number` brought anything new."""
        events = [each for each in (self.measured, self.records, *self.alarms) if each]
        return self.probed or any(each.round == number for each in events)

    def words(self) -> list[str]:
        """Return the lines of a plain log."""
        clients = [_describe(self.measured)] if self.measured else []
        return [*clients, *self._record_lines(), *self.memorisation, *self._alarm_lines()]

    def _record_lines(self) -> list[str]:
        """Return the measurement by canary records, one line or none."""
        return [f"records: {_describe(self.records)}"] if self.records else []

    def _alarm_lines(self) -> list[str]:
        return [
            f"{each.alarm.level.upper()} after round {each.round}: {each.alarm.test}, {each.alarm.evidence}"
            for each in self.alarms
        ]

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the live display, each with its style."""
        rows: list[tuple[str, str]] = []
        if self.measured:
            rows.append((f"{_describe(self.measured)} (round {self.measured.round})", ""))
        elif self.canaries:
            rows.append((f"{self.canaries} canary clients, not measured yet", "dim"))
        rows += [(text, "") for text in (*self._record_lines(), *self.memorisation)]
        if self.alarms:
            rows += [(text, "bold red") for text in self._alarm_lines()]
        elif self.checked and self.visible == 1:
            rows.append(("noise too small beside updates to be checked, new each round", "green"))
        elif self.checked:
            rows.append((f"noise as claimed ({visibility(self.visible)}), new each round", "green"))
        return rows or [(self.untested, "dim")]

    def alarms_in_words(self) -> list[tuple[int, str]]:
        """Return the rounds and texts of the alarms."""
        return [(each.round, format_alarm(each.alarm)) for each in self.alarms]

    def status(self) -> dict[str, Any]:
        """Return the state of the audit of the released sums.

        `said` is for people, `alarms` and the last round's `p_values` for machines, `on_alarm` what an alarm does.
        """
        return {
            "on_alarm": self.on_alarm,
            "said": [text for text, _ in self.rows()],
            "alarms": [each.content for each in self.alarms],
            "p_values": dict(self.p_values),
        }


def format_alarm(alarm: Alarm) -> str:
    """Return an alarm as text, such as ``red: norm, p = 1e-20``."""
    return f"{alarm.level}: {alarm.test}, {alarm.evidence}"


def format_memorised(result: MemorisationResult) -> str:
    """Return what a test of memorisation measured, such as ``p = 0.002, bits 6.9, unplanted 1.4, limit 9.97``."""
    figures = "".join(f", {name} {value:.3g}" for name, value in result.figures.items())
    return f"p = {result.p_value:.2g}{figures}"


def visibility(visible: float) -> str:
    """Return a clause with the smallest shortfall of noise that its check detects."""
    if visible == 1:
        return "updates hide even missing noise"
    return f"{100 * visible:.1f} % less would be detected"


def _describe(measurement: Measured) -> str:
    """Return the claimed and the measured epsilon as text, and the largest one that could have been measured."""
    weak = ": too weak to tell" if measurement.ceiling <= measurement.claimed else ""
    sizes = (measurement.claimed, measurement.epsilon, measurement.low, measurement.high, measurement.ceiling)
    claimed, epsilon, low, high, ceiling = (format_number(size, ".2f") for size in sizes)
    return f"claimed {claimed}, measured {epsilon} ({low} to {high}), could have shown {ceiling}{weak}"
