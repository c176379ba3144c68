"""Audit line of a run in progress: its displayed values and their text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.bounded_decoding import format_number
from ..privacy.audit.alarms import Alarm
from ..privacy.audit.run_audit import Measured
from ..privacy.audit.summary import Raised


@dataclass(frozen=True)
class AuditLine:
    """Displayed state of an audit.

    Attributes:
      checked: whether the sums' noise is checked.
      canaries: their number.
      measured: the last measurement by them.
      alarms: raised so far.
      memorisation: the last finding of a memorisation probe, as text.
      probed: whether that was after the last round.
      visible: smallest detectable shortfall of the noise, as a share of the claimed noise in [0, 1].
      records: the last measurement by canary records.
      on_alarm: action on an alarm.
      p_values: of the checks in the last round, by name.
      untested: clause on a promise that nothing tests.
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
        """Whether round `number` brought anything new."""
        looked = any(each.round == number for each in (self.measured, self.records) if each)
        return self.probed or looked or any(each.round == number for each in self.alarms)

    def words(self) -> list[str]:
        """Return the lines of a plain log."""
        clients = [_numbers(self.measured)] if self.measured else []
        return [*clients, *self.of_records(), *self.memorisation, *self.alarm_lines()]

    def of_records(self) -> list[str]:
        """Return the measurement by canary records, one line or none."""
        return [f"records: {_numbers(self.records)}"] if self.records else []

    def alarm_lines(self) -> list[str]:
        """Return the alarms, one line each."""
        return [
            f"{each.alarm.level.upper()} after round {each.round}: {each.alarm.test}, {each.alarm.evidence}"
            for each in self.alarms
        ]

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of text, each with its style."""
        rows: list[tuple[str, str]] = []
        if self.measured is not None:
            rows.append((_numbers(self.measured) + f" (round {self.measured.round})", ""))
        elif self.canaries:
            rows.append((f"{self.canaries} canary clients, not measured yet", "dim"))
        rows += [(text, "") for text in (*self.of_records(), *self.memorisation)]
        if self.alarms:
            rows += [(text, "bold red") for text in self.alarm_lines()]
        elif self.checked:
            size = (
                "noise too small beside updates to be checked"
                if self.visible == 1
                else f"noise as claimed ({visibility(self.visible)})"
            )
            rows.append((f"{size}, new each round", "green"))
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


def visibility(visible: float) -> str:
    """Return a clause with the smallest shortfall of noise that its check detects."""
    if visible == 1:
        return "updates hide even missing noise"
    return f"{100 * visible:.1f} % less would be detected"


def _numbers(measurement: Measured) -> str:
    weak = ": too weak to tell" if measurement.ceiling <= measurement.claimed else ""
    sizes = (measurement.claimed, measurement.epsilon, measurement.low, measurement.high, measurement.ceiling)
    claimed, epsilon, low, high, ceiling = (format_number(size, ".2f") for size in sizes)
    return f"claimed {claimed}, measured {epsilon} ({low} to {high}), could have shown {ceiling}{weak}"
