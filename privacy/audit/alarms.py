"""Alarms of a whole run on p-values: one false-alarm budget, split in advance over tests and looks.

By the union bound a correct run raises any alarm at all with probability `alpha` at most, however its looks
depend on each other. Estimates raise none: half of all correct runs measure more than they claim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from ...base.refusal import Refusal


class Level(StrEnum):
    """Severity of an alarm, ascending; `blind` is no alarm and means that the audit could not have detected a fault."""

    BLIND = "blind"
    YELLOW = "yellow"  # the model memorises; no claim is refuted
    ORANGE = "orange"  # the claim is refuted, and nothing else confirms it so far
    RED = "red"  # the claim is refuted


class Check(StrEnum):
    """Test of a p-value. Tests that can raise an alarm have equal parts of alpha; `BOOKS` takes none."""

    CANARIES = "canaries"  # the t test of canary scores
    ACCURACY = "accuracy"  # guesses by the median of the same scores; confirms, and raises no alarm alone
    NORM = "norm"  # the norm of a released sum against its noise, `free_checks.norm_p`
    REUSE = "reuse"  # noise that is used again, `free_checks.reuse_p`
    DRAW = "draw"  # the numbers of sampled clients, `free_checks.draw_p`
    MEMORISATION = "memorisation"  # exposure, or a black-box bound where nothing is claimed
    RECORDS = "records"  # the t test of canary records' scores
    RECORDS_ACCURACY = "records accuracy"  # guesses by the median of those scores; confirms
    LOSSES = "losses"  # of odd records, against their owners' claim, by a bound for any mechanism
    BOOKS = "books"  # the ledger's count against the cost of the sums; deterministic


# The test that must agree before an alarm of the key is red.
CONFIRMED_BY: Mapping[Check, Check] = MappingProxyType(
    {Check.CANARIES: Check.ACCURACY, Check.RECORDS: Check.RECORDS_ACCURACY}
)
_CONFIRMS = {confirming: test for test, confirming in CONFIRMED_BY.items()}


# The free checks: every round brings noise and a draw of its own.
FREE = (Check.NORM, Check.REUSE, Check.DRAW)
# A free check is red at once below CERTAIN times its threshold. Otherwise its alarm is orange, and red if one of its
# next CONFIRMING looks falls below alpha / CONFIRMING: later rounds are new evidence. A correct run with free checks
# alone turns red with probability (CERTAIN + 2 alpha) alpha at most.
CERTAIN = 0.01
CONFIRMING = 10

# Actions on an alarm (audit.on_alarm), and what each does not undo.
CANNOT_UNDO: Mapping[str, str] = MappingProxyType(
    {
        "stop": "what was released stays released, and its epsilon spent",
        "pause": "what was released stays released, and its epsilon spent",
        "raise_noise": "later rounds leak less; earlier ones are as they were",
        "drop_client": "the model does not unlearn a dropped client",
        "rollback": "the rounds that are taken back were released: their epsilon stays spent",
    }
)


@dataclass(frozen=True)
class Alarm:
    """Alarm: the test, its p-value, and the threshold that it fell below.

    For a draw, `p_value` is the threshold: the exact one would tell how many clients were drawn in secret.
    """

    level: Level
    test: Check
    p_value: float
    threshold: float

    @property
    def evidence(self) -> str:
        """The p-value as text, such as ``p = 1e-20``."""
        return f"p {'<' if self.test is Check.DRAW else '='} {self.p_value:.2g}"


@dataclass(frozen=True)
class Look:
    """Evidence of one look.

    Attributes:
      p_values: one for each test made.
      claim: claimed epsilon, if canaries were scored; otherwise 0, so that the look is never blind.
      ceiling: largest epsilon that these canaries could have shown.
    """

    p_values: Mapping[Check, float]
    claim: float = 0.0
    ceiling: float = math.inf


@dataclass(frozen=True)
class AlarmState:
    """False-alarm budget of a run, and its use.

    Attributes:
      planned: number of looks that each test is allowed in the whole run.
      alpha: bound on the probability of any alarm in a correct run.
      looks: number of looks that each test had so far.
      alarmed: number of the look, from 1, at which each test alarmed last.
    """

    planned: Mapping[Check, int]
    alpha: float = 0.01
    looks: Mapping[Check, int] = field(default_factory=dict[Check, int])
    alarmed: Mapping[Check, int] = field(default_factory=dict[Check, int])

    def threshold(self, test: Check) -> float:
        """Return a test's equal part of alpha for one look: it alarms below that, but where a look confirms (`limit`)."""
        families = sum(1 for each in self.planned if each not in _CONFIRMS and each is not Check.BOOKS)
        return self.alpha / (families * self.planned[_CONFIRMS.get(test, test)])

    def limit(self, test: Check) -> float:
        """Return the p-value below which a test alarms at its next look, larger if that may confirm a free check's alarm."""
        looks_since = self.looks.get(test, 0) - self.alarmed.get(test, -CONFIRMING)
        return self.alpha / CONFIRMING if test in FREE and looks_since < CONFIRMING else self.threshold(test)


def look_at(state: AlarmState, look: Look) -> tuple[AlarmState, tuple[Alarm, ...]]:
    """Judge one look: count it against each test's planned looks, and compare its p-values with their limits.

    Returns:
      The state after the look, and the alarms that it raises.

    Raises:
      Refusal: a test was not planned, or its looks are used up: alpha is then spent.
    """
    looks = dict(state.looks)
    for test in look.p_values:
        looks[test] = looks.get(test, 0) + 1
        if looks[test] > state.planned.get(test, 0):
            remedy = f"{state.planned.get(test, 0)} were planned for {test}; plan them all"
            raise Refusal("looks", looks[test], remedy)
    alarms: list[Alarm] = []
    for test, p_value in look.p_values.items():
        limit = state.limit(test)
        # "not >=" instead of "<": NaN raises an alarm.
        if test not in _CONFIRMS and not p_value >= limit:
            public = limit if test is Check.DRAW else p_value
            alarms.append(Alarm(_level(state, look, test), test, public, limit))
    alarmed = {**state.alarmed, **{alarm.test: looks[alarm.test] for alarm in alarms}}
    if look.ceiling < look.claim:
        alarms.append(Alarm(Level.BLIND, Check.CANARIES, 1.0, state.threshold(Check.CANARIES)))
    return replace(state, looks=looks, alarmed=alarmed), tuple(alarms)


def _level(state: AlarmState, look: Look, test: Check) -> Level:
    """Return the level of an alarm of a test: red if it is certain or confirmed."""
    if test is Check.MEMORISATION:
        return Level.YELLOW
    if test is Check.LOSSES:
        return Level.RED
    confirming = CONFIRMED_BY.get(test)
    if confirming is not None:
        confirmed = look.p_values.get(confirming, 1.0) < state.threshold(confirming)
    else:
        certain = not look.p_values[test] >= CERTAIN * state.threshold(test)
        confirmed = certain or test in state.alarmed  # `state` is before this look: an earlier one alarmed
    return Level.RED if confirmed else Level.ORANGE
