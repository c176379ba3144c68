"""Grammar of the command line: every verb with its arguments, options, help and example; the bodies are imported when called.

A group's verbs are in a file of their own. Help, completion and the nearest name come only from this grammar.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from ..base.extras import require_extra
from ..configs.question_file import InquiryOptions, QuestionOptions
from . import audit, budget, client, ledger, provision, report, server
from .grammar import (
    GROUP,
    AcceptSweep,
    AcceptVacuous,
    Head,
    Json,
    Page,
    PagePort,
    Reason,
    acts,
    argument,
    option,
    options_of,
    own_modules,
    port_of,
    verb,
)
from .verbs import HydraVerb

app = typer.Typer(
    help="Federated learning that keeps count of what it reveals.", subcommand_metavar="VERB", **GROUP
)
for name, group, text in (
    ("ledger", ledger.group, "Read a ledger, check its entries, export it for an auditor."),
    ("budget", budget.group, "Cap the epsilon spent on your data; show what is spent."),
    ("audit", audit.group, "Test the claim of a run, or any privacy claim, by measurements."),
    ("report", report.group, "Write the report of a run: a page, JSON, a model card, a bill of materials."),
    ("provision", provision.group, "Make the bundles of a deployed federation, and change its members."),
    ("server", server.group, "Serve a federation of real clients."),
    ("client", client.group, "Run a client on a device, under its owner's policy."),
):
    app.add_typer(group, name=name, help=text)
KINDS = ("count", "mean", "variance", "histogram", "quantiles")
Plot = Annotated[Path | None, option("PNG", "Plot the guarantees to this file.", "--plot")]
Accuracy = Annotated[
    bool,
    Option("--accuracy", help="Predict accuracy over epsilon, rounds and clients, from public data alone."),
]


def _version() -> str:
    from importlib.metadata import version

    return f"fedveil {version('fedveil')}"


def _script() -> str:
    from .completion import script

    return script()


def _installed() -> str:
    from .completion import install_script

    return install_script()


def _answer(name: str, answer: Callable[[], str], text: str) -> Any:
    """Return an option that prints its answer and ends the command."""

    def callback(ctx: typer.Context, asked: bool) -> None:
        if asked and not ctx.resilient_parsing:
            typer.echo(answer())
            raise typer.Exit

    return Option(name, is_eager=True, callback=callback, help=text)


INSTALLS, SHOWS = "Install completion for this shell: bash, zsh or fish.", "Print the completion script."


@app.callback()
def root(
    version: Annotated[bool, _answer("--version", _version, "Print the version.")] = False,
    install_completion: Annotated[bool, _answer("--install-completion", _installed, INSTALLS)] = False,
    show_completion: Annotated[bool, _answer("--show-completion", _script, SHOWS)] = False,
) -> None:
    """Take what stands before a verb; each option ends the command by itself."""


# --- runs ---------------------------------------------------------------------------------------------------------


@verb(app, "simulate", "Train under a privacy budget.", HydraVerb, needs="simulation")
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

    own_modules()
    return body([*ctx.args, *acts(accept_vacuous, reason)], as_json, port_of(page, page_port), accept_sweep)


@verb(app, "plan", "Show what a budget affords.", HydraVerb, needs="simulation")
def plan(ctx: typer.Context, as_json: Json = False, plot: Plot = None, accuracy: Accuracy = False) -> int:
    """Show the noise that a budget needs, and epsilon after each tenth of the rounds. Nothing is trained.

    Example:
      fedveil plan
      fedveil plan privacy.target_epsilon=1 cohort.rate=0.1
      fedveil plan task=heart privacy=record
      fedveil plan --plot guarantee.png
      fedveil plan --accuracy task=digits privacy=record_distributed
    """
    from .simulate import plan as body

    own_modules()
    return body(ctx.args, as_json, plot, accuracy)


@verb(app, "ask", "Ask the clients under a privacy budget.")
@options_of(inquiry=InquiryOptions, question=QuestionOptions)
def ask(
    what: Annotated[str, argument("FILE|KIND", "YAML file of questions; or, with a column, ", words=KINDS)],
    inquiry: InquiryOptions,
    question: QuestionOptions,
    given: Annotated[
        list[str] | None, argument("KEY=VALUE", "Column to ask about; keys of the run, such as task=csv.")
    ] = None,
    into: Annotated[Path | None, option("FOLDER", "Folder for the answers; questions by default.")] = None,
    server: Annotated[
        Path | None, option("FOLDER", "Bundle of a server, to ask its clients.", file_okay=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Ask the clients about their data. Each figure has an interval, and each answer is one charge.

    Example:
      fedveil ask count --name rows --records 20 --epsilon 0.5 task=digits
      fedveil ask intake.yaml task=csv task.folder=clinics task.data_id=wards
      fedveil ask intake.yaml --server made/server task=csv

    Exit codes: 0 answered, 1 too few answers, 2 refused and not charged, 3 budget spent.
    """
    require_extra("simulation" if server is None else "server", "fedveil ask")
    from .ask import ask as body

    own_modules()
    return body(what, given or [], (inquiry, question), (into, server), as_json=as_json)


@verb(app, "compare", "Show the results of runs in one table.", needs="simulation")
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


@verb(app, "predict", "Apply a run's model to data.")
def predict(
    run: Annotated[
        Path, argument("RUN", "Folder of an ended run, an export or a client's bundle.", file_okay=False)
    ],
    data: Annotated[Path, argument("DATA", "A table, a folder of tables, or a .npy file.")],
    out: Annotated[Path | None, option("FILE", "CSV file to write; printed by default.")] = None,
    allow_module: Annotated[list[str] | None, option("MODULE", "Module of the run's own task.")] = None,
    explain: Annotated[
        str | None, option("METHOD", "Add each input's contribution to the score: integrated_gradients.")
    ] = None,
) -> int:
    """Write the prediction of a run's model for each row: the likeliest class and its probability, or a number.

    Example:
      fedveil predict runs/first patients.csv --out predictions.csv
      fedveil predict runs/first patients.csv --explain integrated_gradients
    """
    from .predict import predict as body

    own_modules()
    return body(run, data, out, tuple(allow_module or ()), explain)


@verb(app, "export", "Convert a run's model for a device.", needs="client")
def export(
    run: Annotated[Path, argument("RUN", "Folder of an ended run.", file_okay=False)],
    to: Annotated[str, option("FORMAT", "", words=("safetensors", "onnx", "torchscript", "int8"))],
    student: Annotated[
        str | None, option("MODULE:CLASS", "Smaller model to distil the model into; needs --public.")
    ] = None,
    public: Annotated[
        Path | None, option("DATA", "Public inputs for a student: a table, tables, or a .npy file.")
    ] = None,
    out: Annotated[
        Path | None, option("FOLDER", "Output folder; RUN/export/FORMAT by default.", file_okay=False)
    ] = None,
    allow_module: Annotated[list[str] | None, option("MODULE", "Module of the run's own task.")] = None,
    as_json: Json = False,
) -> int:
    """Write a run's model, or a smaller student of it, in the format of a runtime. Epsilon does not change.

    Example:
      fedveil export runs/first --to int8
      fedveil export runs/first --to onnx --student small:Net --public pictures.npy
    """
    from .export import export as body

    own_modules()
    return body(run, (to, student, public, out, tuple(allow_module or ())), as_json=as_json)


@verb(app, "verify", "Check a run, a bundle or ledgers.")
def verify(
    path: Annotated[Path, argument("PATH", "A bundle, a run folder, a ledger, or a folder of ledgers.")],
    keys: Annotated[
        list[str] | None,
        option(
            "PUB",
            "Public key of a required signer or of the authority (or its rollovers.json): file or hex.",
            "--key",
        ),
    ] = None,
    head: Head = None,
    device: Annotated[
        Path | None, option("FOLDER", "State folder of a device, to compare its ledgers with its receipt.")
    ] = None,
    roster: Annotated[
        str | None, option("HASH", "Hash of the roster whose members gave the receipts.")
    ] = None,
    receipts: Annotated[
        int | None,
        option("N", "Receipts needed, above the number of assumed colluders; of all members by default."),
    ] = None,
    witnesses: Annotated[
        list[str] | None,
        option("PUB", "Public key that must have co-signed the server's log: a file, or hex.", "--witness"),
    ] = None,
    tsa: Annotated[
        Path | None,
        option("FILE", "Root certificate, in PEM, of the authority of the run's time stamp.", "--tsa"),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check signatures, hashes, every ledger entry, every epsilon, the audit's verdict and every number of the page.

    Example:
      fedveil verify bundle --key federation.key.pub
      fedveil verify runs/2026-01-31/12-00-00

    Exit codes: 0 no check failed, and a ledger, a signature or receipts bind the run; 2 a check failed, which is named,
    or refused; 6 no check failed, but nothing binds the run.
    """
    from .verify import Outside
    from .verify import verify as body

    outside = Outside(device, witnesses or (), tsa)
    return body(path, keys or [], head or (), outside, roster=roster, receipts=receipts, as_json=as_json)


# --- this machine -------------------------------------------------------------------------------------------------


@verb(app, "new", "Create a project from a template.")
def new(
    folder: Annotated[Path, argument("FOLDER", "Folder to create.")],
    data: Annotated[
        list[Path] | None, argument("DATA", "Your tables, with --from csv: a folder, or files of one folder.")
    ] = None,
    source: Annotated[str, option("KIND", "", "--from", words=("csv", "torch", "sklearn", "flower"))] = "csv",
    label: Annotated[
        str | None, option("COLUMN", "Column of your tables to predict; the last by default.")
    ] = None,
) -> int:
    """Create a small project that runs and has a passing test. With your tables, draft their schema.

    Example:
      fedveil new shops --from csv
      fedveil new draft --from csv hospitals --label diagnosis
    """
    from .new import new as body

    return body(folder, source, data or [], label)


@verb(app, "doctor", "Check this machine's installation.")
def doctor(
    asked: Annotated[
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

    return body(asked or [], as_json)
