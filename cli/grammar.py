"""Grammar that verbs share: their declaration, common options, and decisions that are recorded as acts."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer import Argument, Option

from ..base.refusal import Refusal
from .verbs import CONTEXT, HydraVerb, Verb, Verbs

T = TypeVar("T")
DAY = "give a day as YYYY-MM-DD"

GROUP: dict[str, Any] = {
    "cls": Verbs,
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": CONTEXT,
}
app = typer.Typer(
    help="Federated learning that keeps count of what it reveals.", subcommand_metavar="VERB", **GROUP
)
HYDRA: dict[str, Any] = {**CONTEXT, "allow_extra_args": True, "ignore_unknown_options": True}


def option(metavar: str, text: str, *names: str, **more: Any) -> Any:
    """Return an option with a value, from its metavar, help and names; `words` as in `argument`."""
    return Option(*names, metavar=metavar, **_with_words(text, **more))


def argument(metavar: str, text: str, **more: Any) -> Any:
    """Return an argument, from its metavar and help; the permitted `words` end the help and are completed by shells."""
    return Argument(metavar=metavar, **_with_words(text, **more))


def _with_words(text: str, words: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    if not words:
        return {"help": text, **more}
    help_text = f"{text}{', '.join(words[:-1])} or {words[-1]}."
    return {"help": help_text, "autocompletion": lambda: [*words], **more}


AcceptVacuous = Annotated[
    bool, Option("--accept-vacuous", help="Train on real data although the plan calls the guarantee vacuous.")
]
AcceptSweep = Annotated[
    bool, Option("--accept-sweep", help="Run a sweep on real data; every run is charged to the same ledger.")
]
Reason = Annotated[
    str | None, option("TEXT", "Reason for accepting or overriding; recorded on the ledger.", "--reason")
]
Page = Annotated[bool, Option("--page", help="Serve a live page of the run, on this machine only.")]
PagePort = Annotated[
    int | None,
    Option(
        "--page-port", metavar="PORT", min=1024, max=65535, help="Port of the page; a free port by default."
    ),
]
Json = Annotated[bool, Option("--json", help="Print the result as JSON only.")]
Head = Annotated[
    tuple[str, str] | None,
    option("SEQ HASH", "Number and hash of an entry that the ledger must hold, as a result's ledger_head."),
]
Bundle = Annotated[Path, argument("FOLDER", "Bundle made by fedveil provision.", file_okay=False)]


def verb(
    of: typer.Typer,
    name: str,
    short: str,
    cls: type[Verb] = Verb,
    *,
    hidden: bool = False,
    needs: str | None = None,
) -> Any:
    """Return the decorator that makes a function the verb of this name; a hidden one takes any word that names no verb.

    Args:
      of: the group, or the whole command line.
      name: of the verb, or of what a hidden one takes first.
      short: its line in a list of verbs.
      cls: what reads its words.
      hidden: whether it is called without its name.
      needs: the extra without which it is refused; None where there is none, or it depends on the words.
    """
    settings = HYDRA if issubclass(cls, HydraVerb) else CONTEXT

    def declared(body: Callable[..., int]) -> Any:
        vars(body)["needs"] = needs  # `Verb` reads it
        return of.command(name, cls=cls, context_settings=settings, short_help=short, hidden=hidden)(body)

    return declared


def options_of(**kinds: type[Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return the decorator that shows a parameter of a verb as options, one for each field of its dataclass.

    Args:
      **kinds: by parameter its dataclass, whose fields have `metavar` and `help` in their metadata.
    """

    def decorate(body: Callable[..., int]) -> Callable[..., int]:
        parameters = inspect.signature(body, eval_str=True).parameters
        names = {name: [each.name for each in fields(kind)] for name, kind in kinds.items()}
        options: list[inspect.Parameter] = []
        for name, each in parameters.items():
            options += _options(kinds[name]) if name in kinds else [each.replace(kind=each.KEYWORD_ONLY)]

        @wraps(body)
        def call(**values: Any) -> int:
            grouped = {
                name: kind(**{each: values.pop(each) for each in names[name]}) for name, kind in kinds.items()
            }
            return body(**values, **grouped)

        call.__annotations__ = {}
        call.__signature__ = inspect.Signature(options)  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
        return call

    return decorate


def _options(kind: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(kind)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=Annotated[hints[each.name], Option(**each.metadata)],
        )
        for each in fields(kind)
    ]


def acts(accept_vacuous: bool, reason: str | None) -> list[str]:
    """Return as overrides what a person decides with this command, and why."""
    accepted = ["accept_vacuous=true"] if accept_vacuous else []
    if reason is None:
        return accepted
    text = reason.replace("\\", "\\\\").replace("'", "\\'")
    return [*accepted, f"reason='{text}'"]


def port_of(page: bool, port: int | None) -> int | None:
    """Return the port of a run's page: 0 for one that is free, None for no page."""
    return port if port is not None else 0 if page else None


def read(kind: Callable[[str], T], field: str, text: str, remedy: str = "give a number") -> T:
    """Return the value of a word of the command line.

    Args:
      kind: reads it, and raises ValueError for any other.
      field: of the word, for a refusal.
      text: the word.
      remedy: for a word that is none.
    """
    try:
        return kind(text)
    except ValueError:
        raise Refusal(field, text, remedy) from None


def allow_local_modules() -> None:
    """Let a user's own task or strategy lie in the folder of the command; last, so that it shadows nothing."""
    sys.path.append(os.getcwd())
