"""Grammar that verbs share: how one is declared, the options that several have, and what a person decides by them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from .verbs import CONTEXT, HydraVerb, Verb, Verbs

GROUP: dict[str, Any] = {
    "cls": Verbs,
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": CONTEXT,
}
HYDRA: dict[str, Any] = {**CONTEXT, "allow_extra_args": True, "ignore_unknown_options": True}
AcceptVacuous = Annotated[
    bool, Option("--accept-vacuous", help="Train on real data although the plan calls the promise vacuous.")
]
AcceptSweep = Annotated[
    bool,
    Option("--accept-sweep", help="Run several private runs on real data, each charged to the same people."),
]
Reason = Annotated[
    str | None,
    Option(
        "--reason",
        metavar="TEXT",
        help="Why a promise is accepted or an alarm overridden; kept on the ledger.",
    ),
]
Page = Annotated[bool, Option("--page", help="Serve the run's page on this machine alone, while it goes on.")]
PagePort = Annotated[
    int | None,
    Option("--page-port", metavar="PORT", min=1024, max=65535, help="Its port; one that is free by default."),
]
Json = Annotated[bool, Option("--json", help="Print the result as JSON, and nothing else.")]
Bundle = Annotated[
    Path, Argument(metavar="FOLDER", help="The bundle that provisioning made.", file_okay=False)
]


def verb(of: typer.Typer, name: str, short: str, cls: type[Verb] = Verb, *, hidden: bool = False) -> Any:
    """Return the decorator that makes a function the verb of this name; a hidden one stands for what is no verb's name.

    Args:
      of: the group, or the whole command line.
      name: of the verb, or of what a hidden one takes first.
      short: its line in a list of verbs.
      cls: what reads its words.
      hidden: whether it is called without its name.
    """
    settings = HYDRA if issubclass(cls, HydraVerb) else CONTEXT
    return of.command(name, cls=cls, context_settings=settings, short_help=short, hidden=hidden)


def acts(accept_vacuous: bool, reason: str | None) -> list[str]:
    """Return as overrides what a person decides with this command, and why."""
    accepted = ["accept_vacuous=true"] if accept_vacuous else []
    if reason is None:
        return accepted
    text = reason.replace("\\", "\\\\").replace("'", "\\'")
    return [*accepted, f"reason='{text}'"]


def port_of(page: bool, port: int | None) -> int | None:
    """Return the port of a run's page: 0 for one that is free, None where no page was asked for."""
    return port if port is not None else 0 if page else None


def own_modules() -> None:
    """Let a user's own task or strategy lie in the folder of the command; last, so that it shadows nothing."""
    sys.path.append(os.getcwd())
