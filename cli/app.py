"""Command line: the groups of verbs, and the declarations of verbs whose body is in another file.

Help, completion and the nearest name need only the declarations. So a file of declarations imports little, and bodies are
imported when they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from . import (
    ask,
    audit,
    budget,
    client,
    docs,
    export,
    generate,
    ledger,
    new,
    predict,
    provision,
    report,
    server,
    verify,
)
from .completion import install_script, script
from .grammar import (
    AcceptSweep,
    AcceptVacuous,
    Json,
    Page,
    PagePort,
    Reason,
    acts,
    allow_local_modules,
    app,
    argument,
    flag,
    option,
    port_of,
    verb,
)
from .verbs import HydraVerb

for name, group, panel, text in (
    ("report", report.group, "Look", "Write, sign and bundle the report of a run."),
    ("client", client.group, "Own your data", "Run a client on a device, under its owner's policy."),
    ("budget", budget.group, "Own your data", "Cap the epsilon spent on your data; show what is spent."),
    ("provision", provision.group, "Serve", "Make the bundles of a federation; change its members."),
    ("server", server.group, "Serve", "Serve a federation of real clients."),
    ("ledger", ledger.group, "Prove", "Show a ledger, check its entries, export it."),
    ("audit", audit.group, "Prove", "Test the claim of a run, or any claim, by measurements."),
):
    app.add_typer(group, name=name, help=text, rich_help_panel=panel)
Plot = Annotated[Path | None, option("PNG", "Plot the guarantees to this file.", "--plot")]
Accuracy = Annotated[
    bool,
    flag("--accuracy", "Predict accuracy over epsilon, rounds and clients, from public data alone."),
]

Advice = Annotated[bool, flag("--advise", "Ask six questions, and say which privacy= fits.")]


def _version() -> str:
    from importlib.metadata import version

    return f"fedveil {version('fedveil')}"


def _printing(name: str, make_text: Callable[[], str], help_text: str) -> Any:
    """Return an option that prints a text and ends the command."""

    def callback(ctx: typer.Context, is_set: bool) -> None:
        if is_set and not ctx.resilient_parsing:
            typer.echo(make_text())
            raise typer.Exit

    return Option(name, is_eager=True, callback=callback, help=help_text)


INSTALL_HELP = "Install completion for this shell: bash, zsh or fish."
SHOW_HELP = "Print the completion script."


@app.callback()
def root(
    version: Annotated[bool, _printing("--version", _version, "Print the version.")] = False,
    install_completion: Annotated[
        bool, _printing("--install-completion", install_script, INSTALL_HELP)
    ] = False,
    show_completion: Annotated[bool, _printing("--show-completion", script, SHOW_HELP)] = False,
) -> None:
    """Declare the options before a verb, each of which prints its text and ends the command."""


# --- runs ---------------------------------------------------------------------------------------------------------


@verb(app, "simulate", "Train under a privacy budget.", HydraVerb, needs="simulation", panel="Run")
def simulate(
    ctx: typer.Context,
    as_json: Json = False,
    accept_vacuous: AcceptVacuous = False,
    accept_sweep: AcceptSweep = False,
    reason: Reason = None,
    page: Page = False,
    page_port: PagePort = None,
) -> int:
    """Train a federation on this machine under a privacy budget.

    Example:
      fedveil simulate
      fedveil simulate privacy.target_epsilon=1 cohort.rate=0.1 num_rounds=50
      fedveil simulate task=heart privacy=record
      fedveil simulate partition=dirichlet partition.alpha=0.1 strategy=fedadam
      fedveil simulate -m privacy.target_epsilon=1,3,8 seed=0,1,2
      fedveil simulate tune=learning_rate tune.values=[5,20,80]
      fedveil simulate resume=runs/2026-01-31/12-00-00
      fedveil simulate --config-dir my_configs task=mine
      fedveil simulate --page
    """
    from .simulate import simulate as body

    allow_local_modules()
    return body([*ctx.args, *acts(accept_vacuous, reason)], as_json, port_of(page, page_port), accept_sweep)


@verb(app, "plan", "Show what a budget affords.", HydraVerb, needs="simulation", panel="Run")
def plan(
    ctx: typer.Context,
    as_json: Json = False,
    plot: Plot = None,
    accuracy: Accuracy = False,
    advice: Advice = False,
) -> int:
    """Show the noise that a budget needs, and epsilon after each tenth of the rounds. Nothing is trained.

    Example:
      fedveil plan
      fedveil plan privacy.target_epsilon=1 cohort.rate=0.1
      fedveil plan task=heart privacy=record
      fedveil plan --plot guarantee.png
      fedveil plan --accuracy task=digits privacy=record_distributed
      fedveil plan --advise
    """
    if advice:
        from .advise import advise

        return advise(ctx.args)
    from .simulate import plan as body

    allow_local_modules()
    return body(ctx.args, as_json, plot, accuracy)


@verb(app, "compare", "Show the results of runs in one table.", needs="simulation", panel="Look")
def compare(
    runs: Annotated[list[Path], argument("RUN", "Folders of runs or sweeps.")],
    csv: Annotated[Path | None, option("FILE", "Write one row per run as CSV.")] = None,
    plot: Annotated[Path | None, option("FILE", "Plot the first metric, .png or .pdf.")] = None,
    as_json: Json = False,
) -> int:
    """Show the results of runs in one table, with means and intervals over seeds.

    Example:
      fedveil compare multirun/2026-01-31/12-00-00
      fedveil compare runs/first runs/second --plot both.png
    """
    from .compare import compare as body

    return body(runs, csv, plot, as_json)


# --- this machine -------------------------------------------------------------------------------------------------


@verb(app, "doctor", "Check this machine's installation.", panel="Look")
def doctor(
    choices: Annotated[
        list[str] | None, argument("GROUP=OPTION", "What to try on this machine: task=, engine= or link=.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Check this machine: versions, extras, processor, clock and ledger folder. Exit code 1 if something is wrong.

    Example:
      fedveil doctor
      fedveil doctor task=heart engine=ray link=flower
    """
    from .doctor import doctor as body

    return body(choices or [], as_json)


# Order of the verbs in the help.
VERBS = (
    simulate,
    plan,
    ask.ask,
    compare,
    predict.predict,
    generate.generate,
    export.export,
    verify.verify,
    new.new,
    doctor,
    docs.docs,
)
app.registered_commands.sort(key=lambda each: VERBS.index(each.callback))
