"""Names and rows of a run's evaluations on ledgers, beside those of its rounds."""

from __future__ import annotations

# Beyond the rounds of any run: an evaluation has draws of its own, apart from its round's and other arms'.
FIRST_ROW = 1 << 20
NAME = "evaluation"  # behind the run's name, on ledgers


def name_of(run: str) -> str:
    """Return the name of a run's evaluations on ledgers."""
    return f"{run} {NAME}"


def row_after(number: int, arm: int = 1) -> int:
    """Return the row of the evaluation after a round; each arm, from 1, has rows of its own."""
    return arm * FIRST_ROW + number


def round_number(row: int) -> int:
    """Return the round of a row, which is that of a training round or of the evaluation after it."""
    return row % FIRST_ROW


def round_of(run: str, name: str, row: int) -> int | None:
    """Return the round of a ledger entry with this name of a run or of its evaluations; None for another run's."""
    return round_number(row) if name in (run, name_of(run)) else None
