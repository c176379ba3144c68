"""Acts of people before a run continues, written to its ledger: what was accepted, by whom, when and why, and the caps."""

from ...privacy.ledger.acts import ALARM, CAP, REFUSAL, VACUOUS, acting_user
from ...privacy.ledger.caps import cap_acts
from ...privacy.ledger.ledger import Ledger
from ..rounds import Ending, Status
from .federation import Run

PAUSE = "pause"  # action of an alarm after which only a person can resume the run


def write_acts(run: Run, earlier: str | None, ledger: Ledger) -> None:
    """Record people's decisions before the next rounds; earlier records stay.

    Args:
      run: about to begin or resume.
      earlier: the run's name on the ledger under the previous process; None for a new run.
      ledger: that the run is charged on.

    Raises:
      LedgerUnavailable: it could not be written.
    """
    settings = run.federation.settings
    act = {"who": acting_user(), "reason": settings.reason}
    for key, said in cap_acts(ledger.path):
        ledger.act(CAP, key, said)
    if settings.accept_vacuous and not run.federation.simulated:
        ledger.act(VACUOUS, (run.name, 0, VACUOUS), act)
    if earlier is not None and run.checkpoint is not None:
        number = run.checkpoint.state.round
        if any(each.get("action") == PAUSE for each in ledger.noted(earlier, number)):
            ledger.act(ALARM, (earlier, number, ALARM), act)


def write_refusal(run: Run, ending: Ending) -> None:
    """Record, at no cost, that the budget refused a round and so ended the run.

    Raises:
      LedgerUnavailable: it could not be written.
    """
    if ending.status is Status.EXHAUSTED and run.ledger is not None and run.ledger.is_open:
        run.ledger.act(REFUSAL, (run.name, ending.state.round + 1, REFUSAL), {"reason": ending.reason})
