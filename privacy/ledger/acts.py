"""Acts: entries of a ledger that cost nothing and say what people, or the budget, decided: who, when and why."""

import getpass
import os

CAP, ALARM, VACUOUS = "cap changed", "alarm overridden", "vacuous promise accepted"
ROSTER = "roster approved"
REFUSAL = "refusal"
CAPS, ROSTERS = "caps", "rosters"  # in the place of a run's name, where the owner of the data decided
ACTS = (CAP, ALARM, VACUOUS, ROSTER, REFUSAL)


def acting_user() -> str:
    """Return whom the operating system takes the caller for, by name, or by number where there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user's entry
        return f"user {os.getuid()}"
