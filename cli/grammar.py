"""Declarations of verbs: the decorators, options that several verbs have, and values from words of the command line."""

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
from .verbs import CONTEXT, HydraVerb, Root, Verb, Verbs

T = TypeVar("T")
DAY = "give a day as YYYY-MM-DD"

ROOT: dict[str, Any] = {
    "cls": Root,
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": CONTEXT,
}
GROUP: dict[str, Any] = {**ROOT, "cls": Verbs}
app = typer.Typer(
    help="Federated learning that keeps count of what it reveals.",
    subcommand_metavar="VERB",
    **ROOT,
)
HYDRA: dict[str, Any] = {**CONTEXT, "allow_extra_args": True, "ignore_unknown_options": True}


def option(metavar: str, text: str, *names: str, **more: Any) -> Any:
    """Return an option with a value, from its metavar, help and names; `more` as in `argument`."""
    return Option(*names, metavar=metavar, **_with_words(text, **more))


def flag(name: str, text: str) -> Any:
    """Return an option without a value, from its name and help."""
    return Option(name, help=text)


def argument(metavar: str, text: str, **more: Any) -> Any:
    """Return an argument, from its metavar and help; `more` has the permitted `words`, and keywords of typer's."""
    return Argument(metavar=metavar, **_with_words(text, **more))


def _with_words(text: str, words: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """Return typer's keywords for a help text; permitted words are listed at its end, and completed by shells."""
    if not words:
        return {"help": text, **more}
    help_text = f"{text}{', '.join(words[:-1])} or {words[-1]}."
    return {"help": help_text, "autocompletion": lambda: [*words], **more}


AcceptVacuous = Annotated[
    bool, flag("--accept-vacuous", "Train on real data although the plan calls the guarantee vacuous.")
]
AcceptSweep = Annotated[
    bool, flag("--accept-sweep", "Run a sweep on real data; every run is charged to the same ledger.")
]
Reason = Annotated[
    str | None, option("TEXT", "Reason for accepting or overriding; recorded on the ledger.", "--reason")
]
Page = Annotated[bool, flag("--page", "Serve a live page of the run, on this machine only.")]
PagePort = Annotated[
    int | None,
    Option(
        "--page-port", metavar="PORT", min=1024, max=65535, help="Port of the page; a free port by default."
    ),
]
Json = Annotated[bool, flag("--json", "Print the result as JSON only.")]
Probe = Annotated[
    bool, flag("--probe", "Print nothing: the exit code alone, for a platform that asks often.")
]
Head = Annotated[
    tuple[str, str] | None,
    option("SEQ HASH", "Number and hash of an entry that the ledger must hold, as a result's ledger_head."),
]
MovedBase = Annotated[
    str,
    option(
        "PATH", "Language model of a run with task=text, if it is no longer where the run read it.", "--base"
    ),
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
    panel: str | None = None,
) -> Any:
    """Return a decorator that declares a function as a verb.

    Args:
      of: the group of the verb, or the whole command line.
      name: name of the verb; of a hidden one the metavar of its first argument.
      short: line in the list of verbs.
      cls: parser of the verb's words.
      hidden: whether it is the group's verb without a name, for words that name no other verb of the group.
      needs: extra without which the verb is refused; None if there is none, or it depends on the words.
      panel: heading of the verb in the help of the whole command line, one of `verbs.PANELS`; None in a group.
    """
    settings = HYDRA if issubclass(cls, HydraVerb) else CONTEXT

    def declare(body: Callable[..., int]) -> Any:
        vars(body)["needs"] = needs  # `Verb` reads it
        keywords: dict[str, Any] = {"short_help": short, "hidden": hidden, "rich_help_panel": panel}
        return of.command(name, cls=cls, context_settings=settings, **keywords)(body)

    return declare


def options_of(**kinds: type[Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return a decorator that replaces parameters of a verb by options, one for each field of their dataclass.

    Args:
      **kinds: dataclasses by parameter; their fields have typer's `metavar` and `help` as metadata.
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

        call.__annotations__ = {}  # typer would prefer those of the body to the signature
        call.__signature__ = inspect.Signature(options)  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
        return call

    return decorate


def _options(kind: type[Any]) -> list[inspect.Parameter]:
    """Return the parameters by which typer reads the fields of a dataclass as options."""
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
    """Return --accept-vacuous and --reason as overrides of the run, whose ledger records them."""
    overrides = ["accept_vacuous=true"] if accept_vacuous else []
    if reason is not None:
        text = reason.replace("\\", "\\\\").replace("'", "\\'")
        overrides.append(f"reason='{text}'")
    return overrides


def port_of(page: bool, port: int | None) -> int | None:
    """Return the port of a run's page from --page and --page-port: 0 for any free port, None for no page."""
    return 0 if page and port is None else port


def task_keys(base: str) -> dict[str, str]:
    """Return --base as a key of the run's task; nothing if it is empty."""
    return {name: value for name, value in {"base": base}.items() if value}


def read(kind: Callable[[str], T], field: str, text: str, remedy: str = "give a number") -> T:
    """Return the value of a word of the command line.

    Args:
      kind: type or function that converts the word; ValueError refuses it.
      field: name of the option, for a refusal.
      text: the word.
      remedy: remedy of the refusal.
    """
    try:
        return kind(text)
    except ValueError:
        raise Refusal(field, text, remedy) from None


def allow_local_modules() -> None:
    """Make modules of the working folder importable, for a user's own task or strategy."""
    sys.path.append(os.getcwd())  # last, so that none of them shadows an installed one
