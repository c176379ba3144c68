"""Advice on `privacy=`: six questions, of which the first that is answered yes decides."""

from __future__ import annotations

import sys
from typing import NamedTuple

from ..base.refusal import Refusal


class AdviceQuestion(NamedTuple):
    """One question and what follows from a yes."""

    text: str
    privacy: str
    reason: str


# As on the page docs/choose.md.
QUESTIONS = (
    AdviceQuestion(
        "Is nothing about the data worth hiding, as with public or synthetic data?",
        "none",
        "epsilon is infinite, and the reports say so",
    ),
    AdviceQuestion(
        "Is there one client alone, with many people's records?",
        "record",
        "one record is hidden, by noise that the client adds",
    ),
    AdviceQuestion(
        "Are there fewer than about 30 clients, each with many people's records?",
        "record_distributed",
        "one record is hidden, and the clients share the noise",
    ),
    AdviceQuestion(
        "Must a record and a whole client both be hidden, each under its own budget?",
        "record_and_client",
        "two promises with two budgets",
    ),
    AdviceQuestion(
        "Is each client one person, and may the server see single updates?",
        "client_central",
        "all that a client contributes is hidden from everybody but the server",
    ),
    AdviceQuestion(
        "Is each client one person, and must the server not see single updates?",
        "client_distributed",
        "clients add the noise, and sums are masked",
    ),
)
OTHERWISE = AdviceQuestion("", "record_distributed", "one record is hidden, at the least noise")


def advise(overrides: list[str]) -> int:
    """Ask the questions in a terminal, print what follows, and return the exit code.

    Args:
      overrides: the user's words, which the printed commands repeat.

    Raises:
      Refusal: standard input is no terminal.
    """
    if not sys.stdin.isatty():
        raise Refusal("--advise", "standard input", "is no terminal; read docs/choose.md instead")
    choice = next((each for each in QUESTIONS if _is_yes(each.text)), OTHERWISE)
    words = " ".join([*overrides, f"privacy={choice.privacy}"])
    print(f"\nprivacy={choice.privacy}: {choice.reason}.\n")
    print(f"  fedveil plan {words}\n  fedveil plan --accuracy {words}")
    return 0


def _is_yes(question: str) -> bool:
    """Ask a question until it is answered yes or no."""
    while True:
        answer = input(f"{question} [y/n] ").strip().lower()
        if answer in ("y", "yes", "n", "no"):
            return answer.startswith("y")
