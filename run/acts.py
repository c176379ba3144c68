"""Acts of people before a run continues, written to its ledger: what was accepted, by whom, when and why, and the caps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..base.notice import warn
from ..base.refusal import Refusal
from ..modes.federation import Federation
from ..privacy.ledger.acts import ALARM, CAP, REFUSAL, VACUOUS, acting_user
from ..privacy.ledger.caps import cap_acts
from ..privacy.ledger.ledger import Ledger
from ..privacy.plan import Plan
from ..privacy.preconditions import emptiness
from ..server.run_status import Status
from .prepared_run import Run

if TYPE_CHECKING:
    from ..server.rounds import Ending

PAUSE = "pause"  # action of an alarm after which only a person can resume the run


def write_acts(run: Run, ledger: Ledger) -> None:
    """Write people's decisions before the next rounds to the ledger: caps, an accepted vacuous run, an overridden alarm.

    A decision that the ledger already holds is not written again.

    Args:
      run: about to begin or resume.
      ledger: ledger on which the run is charged, open.

    Raises:
      LedgerUnavailable: it could not be written.
    """
    for key, cap in cap_acts(ledger.path):
        ledger.act(CAP, key, cap)
    write_accepted(run.federation, run.name, ledger)
    if run.checkpoint.run:  # whoever resumes a run that an alarm has paused overrides the alarm
        name, number = run.saved.name, run.checkpoint.state.round
        if any(each.get("action") == PAUSE for each in ledger.noted(name, number)):
            act = {"who": acting_user(), "reason": run.federation.settings.reason}
            ledger.act(ALARM, (name, number, ALARM), act)


def write_accepted(federation: Federation, name: str, ledger: Ledger) -> None:
    """Write to the ledger that a person accepted a useless guarantee on real data, for a run or question of this name."""
    settings = federation.settings
    if settings.accept_vacuous and not federation.simulated:
        ledger.act(VACUOUS, (name, 0, VACUOUS), {"who": acting_user(), "reason": settings.reason})


def write_refusal(run: Run, ending: Ending) -> None:
    """Record, at no cost, that the budget refused a round and so ended the run."""
    if ending.status is Status.EXHAUSTED and run.ledger is not None and run.ledger.is_open:
        run.ledger.act(REFUSAL, (run.name, ending.state.round + 1, REFUSAL), {"reason": ending.reason})


def unless_accepted(federation: Federation, refusal: Refusal, accept: str = "--accept-vacuous") -> None:
    """Refuse what would spend real people's budget on nothing, unless a person accepts it; on simulated data only warn.

    Args:
      federation: whose budget it is.
      refusal: says why it is useless.
      accept: how a person accepts it.
    """
    if federation.settings.accept_vacuous:
        return
    if federation.simulated:
        warn(str(refusal))
    else:
        raise Refusal(refusal.field, refusal.value, f"{refusal.remedy}, or accept it with {accept}")


def require_use(federation: Federation, plan: Plan | None) -> None:
    """Refuse to spend real people's budget on a useless run, unless a person accepts it; on simulated data only warn.

    Args:
      federation: whose clients would pay.
      plan: calibrated plan of the sums; None where they have no noise.
    """
    clients, rate = federation.declared_clients, federation.cohort.coin
    if plan is not None and (reason := federation.mode.vacuity(plan)) is not None:
        refusal = Refusal("privacy", str(federation.mode.name), f"{reason}; use privacy=record_distributed")
        unless_accepted(federation, refusal)
    elif rate is not None and (reason := emptiness(rate, clients)) is not None:
        unless_accepted(federation, Refusal("cohort.rate", float(rate), f"{reason}; use cohort=all"))
