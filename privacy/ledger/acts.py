"""Acts: free entries of a ledger that record a decision of a person, or of the budget, with time and reason."""

import getpass
import os

CAP, ALARM, VACUOUS = "cap changed", "alarm overridden", "vacuous promise accepted"
ROSTER = "roster approved"
REFUSAL, DECISION = "refusal", "owner's decision"
# In the place of a run's name, where the owner of the data decided.
CAPS, ROSTERS, DECISIONS = "caps", "rosters", "decisions"
ACTS = (CAP, ALARM, VACUOUS, ROSTER, REFUSAL, DECISION)


def acting_user() -> str:
    """Return the operating system's user name of the caller, or the user number if there is no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user's entry
        return f"user {os.getuid()}"
