"""Grammar of the command line: every verb with its arguments, options, help and example; the bodies are imported when called.

The list of verbs stands here and nowhere else: help, completion and the nearest name come from it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer import Argument, Option

from ..extras import require_extra
from .verbs import CONTEXT, HydraVerb, ServerVerb, Verb, Verbs

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
ledger, budget, audit, report, provision, server, client = [typer.Typer(**GROUP) for _ in range(7)]
for name, group, text in (
    ("ledger", ledger, "Read a ledger, check every entry, hand it to an auditor."),
    ("budget", budget, "Cap what may be spent on your data; see what is spent."),
    ("audit", audit, "Weigh a run, or any claim of privacy, against what was measured."),
    ("report", report, "Make the page of a run, for those who sign, train, run and repeat it."),
    ("provision", provision, "Make the bundles of a federation on real machines, and change who is in it."),
    ("server", server, "Serve a federation of real clients."),
    ("client", client, "Follow a server from a device, under its owner's policy."),
):
    app.add_typer(group, name=name, help=text)
HYDRA: dict[str, Any] = {**CONTEXT, "allow_extra_args": True, "ignore_unknown_options": True}


def _verb(of: typer.Typer, name: str, short: str, cls: type[Verb] = Verb, *, hidden: bool = False) -> Any:
    settings = HYDRA if issubclass(cls, HydraVerb) else CONTEXT
    return of.command(name, cls=cls, context_settings=settings, short_help=short, hidden=hidden)


AcceptVacuous = Annotated[
    bool, Option("--accept-vacuous", help="Train on real data although the plan calls the promise vacuous.")
]
Reason = Annotated[
    str | None,
    Option(
        "--reason",
        metavar="TEXT",
        help="Why a promise is accepted or an alarm overridden; kept on the ledger.",
    ),
]
Plot = Annotated[Path | None, Option("--plot", metavar="PNG", help="Draw the guarantees into this file.")]
Accuracy = Annotated[
    bool,
    Option("--accuracy", help="Predict what runs reach over epsilon, rounds and clients; public data alone."),
]
Json = Annotated[bool, Option("--json", help="Print the result as JSON, and nothing else.")]
Ledger = Annotated[Path, Argument(metavar="PATH", help="A ledger: a file of a run folder, or of real data.")]
Bundle = Annotated[
    Path, Argument(metavar="FOLDER", help="The bundle that provisioning made.", file_okay=False)
]
Desk = Annotated[Path, Argument(metavar="FOLDER", help="The folder that provisioning made.", file_okay=False)]
Ledgers = Annotated[
    bool,
    Option(
        "--ledgers", help="Remove the ledgers too: what is spent is then forgotten, and cannot be taken back."
    ),
]
LedgerDir = Annotated[
    Path | None,
    Option(metavar="FOLDER", help="Where the ledgers lie; ~/.local/share/fedveil/ledgers by default."),
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


INSTALLS, SHOWS = "Install completion for this shell: bash, zsh or fish.", "Print the script of completion."


@app.callback()
def root(
    version: Annotated[bool, _answer("--version", _version, "Print the version.")] = False,
    install_completion: Annotated[bool, _answer("--install-completion", _installed, INSTALLS)] = False,
    show_completion: Annotated[bool, _answer("--show-completion", _script, SHOWS)] = False,
) -> None:
    """Take what stands before a verb; each option ends the command by itself."""


# --- runs ---------------------------------------------------------------------------------------------------------


@_verb(app, "simulate", "Train, under a privacy budget.", HydraVerb)
def simulate(
    ctx: typer.Context, as_json: Json = False, accept_vacuous: AcceptVacuous = False, reason: Reason = None
) -> int:
    """Train a federation on this machine, under a privacy budget.

    Example:
      fedveil simulate
      fedveil simulate privacy.target_epsilon=1 cohort.rate=0.1 num_rounds=50
      fedveil simulate task=heart privacy=record
      fedveil simulate partition=dirichlet partition.alpha=0.1 strategy=fedadam
      fedveil simulate -m privacy.target_epsilon=1,3,8 seed=0,1,2
      fedveil simulate resume=runs/2026-01-31/12-00-00
      fedveil simulate --config-dir my_configs task=mine
    """
    require_extra("simulation", "fedveil simulate")
    from .simulate import simulate as body

    _own_modules()
    return body([*ctx.args, *_acts(accept_vacuous, reason)], as_json)


@_verb(app, "plan", "Show what a budget affords.", HydraVerb)
def plan(ctx: typer.Context, as_json: Json = False, plot: Plot = None, accuracy: Accuracy = False) -> int:
    """Show what a budget affords: the noise it takes and epsilon after each tenth of the rounds. Nothing is trained.

    Example:
      fedveil plan
      fedveil plan privacy.target_epsilon=1 cohort.rate=0.1
      fedveil plan task=heart privacy=record
      fedveil plan --plot guarantee.png
      fedveil plan --accuracy task=digits privacy=record_distributed
    """
    require_extra("simulation", "fedveil plan")
    from .simulate import plan as body

    _own_modules()
    return body(ctx.args, as_json, plot, accuracy)


@_verb(app, "ask", "Ask the clients, under a privacy budget.")
def ask(
    what: Annotated[
        str,
        Argument(
            metavar="FILE|KIND",
            help="A YAML file of questions; or count, mean, variance, histogram or quantiles, and a column.",
        ),
    ],
    given: Annotated[
        list[str] | None,
        Argument(metavar="KEY=VALUE", help="The column of a kind; and keys of the run, such as task=csv."),
    ] = None,
    name: Annotated[str | None, Option(metavar="NAME", help="Under which the answer is kept.")] = None,
    purpose: Annotated[str | None, Option(metavar="WORD", help="That owners allow or refuse.")] = None,
    why: Annotated[str | None, Option(metavar="TEXT", help="What it is for; owners read it.")] = None,
    records: Annotated[float | None, Option(metavar="N", help="Rows of a client that count in full.")] = None,
    epsilon: Annotated[float | None, Option(metavar="E", help="What the answer may cost.")] = None,
    noise_multiplier: Annotated[
        float | None, Option(metavar="Z", help="The noise, in the place of an epsilon.")
    ] = None,
    low: Annotated[float | None, Option(metavar="X", help="Lower bound of a number.")] = None,
    high: Annotated[float | None, Option(metavar="X", help="Upper bound of a number.")] = None,
    edges: Annotated[str | None, Option(metavar="X,X,..", help="Edges of a histogram's bins.")] = None,
    categories: Annotated[str | None, Option(metavar="A,B,..", help="Words of a histogram.")] = None,
    resolution: Annotated[
        float | None, Option(metavar="X", help="Half the width that an interval may have.")
    ] = None,
    at_least: Annotated[
        float | None, Option(metavar="N", help="Rows that there are, to plan an interval by.")
    ] = None,
    into: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where answers are kept; questions by default.")
    ] = None,
    server: Annotated[
        Path | None, Option(metavar="FOLDER", help="A server's bundle, to ask its clients.", file_okay=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Ask the clients about their data; each figure has an interval, and each answer is one charge.

    Example:
      fedveil ask count --name rows --records 20 --epsilon 0.5 task=digits
      fedveil ask intake.yaml task=csv task.folder=clinics task.data_id=wards
      fedveil ask intake.yaml --server made/server task=csv

    Exit codes: 0 answered, 1 too few clients answered, 2 refused and not charged, 3 the budget is spent.
    """
    require_extra("simulation" if server is None else "server", "fedveil ask")
    from .ask import ask as body

    _own_modules()
    asked = {
        "name": name, "purpose": purpose, "why": why, "records": records, "epsilon": epsilon,
        "noise_multiplier": noise_multiplier, "low": low, "high": high, "edges": edges,
        "categories": categories, "resolution": resolution, "at_least": at_least,
    }  # fmt: skip
    return body(what, given or [], asked, (into, server), as_json=as_json)


@_verb(app, "compare", "Show the results of runs in one table.")
def compare(
    runs: Annotated[
        list[Path], Argument(metavar="RUN", help="Folders of runs or of sweeps.", file_okay=False)
    ],
    csv: Annotated[Path | None, Option(metavar="FILE", help="Write a row a run.")] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw the first metric, .png or .pdf.")] = None,
    as_json: Json = False,
) -> int:
    """Show the results of runs in one table, with means and intervals over seeds.

    Example:
      fedveil compare multirun/2026-01-31/12-00-00
      fedveil compare runs/first runs/second --plot both.png
    """
    require_extra("simulation", "fedveil compare")
    from .compare import compare as body

    return body(runs, csv, plot, as_json)


@_verb(app, "predict", "Apply a run's model to data.")
def predict(
    run: Annotated[
        Path,
        Argument(
            metavar="RUN",
            help="The folder of a run that has ended, of an export, or of a client's bundle.",
            file_okay=False,
        ),
    ],
    data: Annotated[Path, Argument(metavar="DATA", help="A table, a folder of tables, or .npy of inputs.")],
    out: Annotated[Path | None, Option(metavar="FILE", help="Write CSV there; without it, print it.")] = None,
    allow_module: Annotated[
        list[str] | None, Option(metavar="MODULE", help="That the run's own task stands in.")
    ] = None,
    explain: Annotated[
        str | None,
        Option(metavar="METHOD", help="With what each input adds to the score: integrated_gradients."),
    ] = None,
) -> int:
    """Write what the released model of a run says of each row: the likeliest word and its probability, or a number.

    Example:
      fedveil predict runs/first patients.csv --out predictions.csv
      fedveil predict runs/first patients.csv --explain integrated_gradients
    """
    from .predict import predict as body

    _own_modules()
    return body(run, data, out, tuple(allow_module or ()), explain)


@_verb(app, "export", "Make a run's model fit a device.")
def export(
    run: Annotated[
        Path, Argument(metavar="RUN", help="The folder of a run that has ended.", file_okay=False)
    ],
    to: Annotated[str, Option(metavar="FORMAT", help="safetensors, onnx, torchscript or int8.")],
    student: Annotated[
        str | None,
        Option(metavar="MODULE:CLASS", help="A smaller model that learns to say the same; see --public."),
    ] = None,
    public: Annotated[
        Path | None,
        Option(metavar="DATA", help="Inputs that are nobody's, for a student: a table, tables, or .npy."),
    ] = None,
    out: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where to; RUN/export/FORMAT by default.", file_okay=False)
    ] = None,
    allow_module: Annotated[
        list[str] | None, Option(metavar="MODULE", help="That the run's own task stands in.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Write a run's released model in the format of a runtime, or a smaller one that says the same. Epsilon does not change.

    Example:
      fedveil export runs/first --to int8
      fedveil export runs/first --to onnx --student small:Net --public pictures.npy
    """
    require_extra("client", "fedveil export")
    from .export import export as body

    _own_modules()
    return body(run, (to, student, public, out, tuple(allow_module or ())), as_json=as_json)


def _acts(accept_vacuous: bool, reason: str | None) -> list[str]:
    """Return as overrides what a person decides with this command, and why."""
    accepted = ["accept_vacuous=true"] if accept_vacuous else []
    if reason is None:
        return accepted
    text = reason.replace("\\", "\\\\").replace("'", "\\'")
    return [*accepted, f"reason='{text}'"]


def _own_modules() -> None:
    """Let a user's own task or strategy lie in the folder of the command; last, so that it shadows nothing."""
    sys.path.append(os.getcwd())


@_verb(app, "verify", "Check a run, a bundle or ledgers.")
def verify(
    path: Annotated[
        Path, Argument(metavar="PATH", help="A bundle, a run folder, a ledger, or a folder of ledgers.")
    ],
    keys: Annotated[
        list[str] | None,
        Option("--key", metavar="PUB", help="A public key that must have signed: a file, or hexadecimal."),
    ] = None,
    head: Annotated[
        tuple[str, str] | None,
        Option(metavar="SEQ HASH", help="An entry that the ledger must hold, as you noted it."),
    ] = None,
    device: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="A device's state folder, whose ledgers are held against its receipt."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check what others rely on: signatures, hashes, every ledger entry, every epsilon, the audit's verdict, every number of the page.

    Example:
      fedveil verify bundle --key federation.key.pub
      fedveil verify runs/2026-01-31/12-00-00

    Exit codes: 0 it holds, 2 something does not, which is named, or it was refused.
    """
    from .verify import verify as body

    return body(path, keys or [], head or (), device, as_json=as_json)


# --- this machine -------------------------------------------------------------------------------------------------


@_verb(app, "new", "Make a project of your own that runs.")
def new(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="The folder to make.")],
    data: Annotated[
        list[Path] | None,
        Argument(metavar="DATA", help="Your tables, for --from csv: a folder, or files of one folder."),
    ] = None,
    source: Annotated[str, Option("--from", metavar="KIND", help="csv, torch, sklearn or flower.")] = "csv",
    label: Annotated[
        str | None, Option(metavar="COLUMN", help="Of your tables: what is predicted; else the last column.")
    ] = None,
) -> int:
    """Make a small project of your own that runs and whose test passes; of your tables, a first schema.

    Example:
      fedveil new shops --from csv
      fedveil new draft --from csv hospitals --label diagnosis
    """
    from .new import new as body

    return body(folder, source, data or [], label)


@_verb(app, "doctor", "Look at what this machine has.")
def doctor(
    asked: Annotated[
        list[str] | None,
        Argument(metavar="GROUP=OPTION", help="What shall run here: task=, engine= or link=. Each is tried."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Look at this machine: versions, extras, processor, clock, and where ledgers lie. Exit code 1 if something is wrong.

    Example:
      fedveil doctor
      fedveil doctor task=heart engine=ray link=flower
    """
    from .doctor import doctor as body

    return body(asked or [], as_json)


# --- ledgers and budgets ------------------------------------------------------------------------------------------


@_verb(ledger, "show", "Tell what stands on it.")
def ledger_show(
    path: Annotated[Path, Argument(metavar="PATH", help="A ledger, or a folder of ledgers.")],
    run: Annotated[str | None, Option(metavar="NAME", help="Only runs whose name begins so.")] = None,
    unit: Annotated[
        str | None,
        Option(metavar="UNIT", help="Only ledgers of client, record, person or person_everywhere."),
    ] = None,
    purpose: Annotated[
        str | None, Option(metavar="TEXT", help="Only releases whose purpose holds this.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Tell what stands on a ledger, in sentences, the newest run first: releases, refusals, what people decided, closes.

    Example:
      fedveil ledger show first/ledger
    """
    from .ledger import show

    return show(path, (run, unit, purpose), as_json=as_json)


@_verb(ledger, "verify", "Check every hash; recompute epsilon.")
def ledger_verify(
    paths: Annotated[
        list[Path], Argument(metavar="PATH ...", help="Ledgers; files beside them are passed over.")
    ],
    head: Annotated[
        tuple[str, str] | None,
        Option(metavar="SEQ HASH", help="An entry that the ledger must hold, as a result's ledger_head."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check every entry's hash and recompute epsilon with two accountants. Exit code 1 if a ledger is damaged.

    Example:
      fedveil ledger verify first/ledger
    """
    from .ledger import verify_all

    return verify_all(paths, head or (), as_json=as_json)


@_verb(ledger, "export", "Write it for an auditor.")
def ledger_export(
    path: Ledger,
    as_json: Annotated[bool, Option("--json", help="As JSON; what happens anyhow.")] = False,
    as_csv: Annotated[bool, Option("--csv", help="As CSV.")] = False,
) -> int:
    """Write a ledger, and epsilon recomputed from it, for an auditor.

    Example:
      fedveil ledger export first/ledger --csv
    """
    from .ledger import export

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other", click.get_current_context())
    return export(str(path), as_csv=as_csv)


@_verb(budget, "set", "Cap what may be spent on your data.")
def budget_set(
    epsilon: Annotated[str, Option(metavar="E", help="The most that a ledger may spend.")],
    delta: Annotated[str, Option(metavar="D", help="The largest delta at which epsilon may be counted.")],
    data: Annotated[
        str, Option(metavar="LEDGER", help="One ledger, by its name in `budget show`'s column data.")
    ] = "all",
    until: Annotated[
        str | None, Option(metavar="YYYY-MM-DD", help="The last day, UTC, on which anything may be released.")
    ] = None,
    questions: Annotated[
        str | None, Option(metavar="E", help="The most that questions may spend of it.")
    ] = None,
    purposes: Annotated[
        str | None, Option(metavar="WORDS", help="What questions may be for, with commas; none allows any.")
    ] = None,
    reason: Annotated[str | None, Option(metavar="TEXT", help="Why; kept with the decision.")] = None,
    ledger_dir: LedgerDir = None,
    as_json: Json = False,
) -> int:
    """Cap what may be spent, from the next release on.

    Example:
      fedveil budget set --epsilon 3 --delta 1e-5 --until 2099-12-31
      fedveil budget set --epsilon 3 --delta 1e-5 --purposes statistics
    """
    from .budget import set_budget

    asked = (data, epsilon, delta, until, questions, purposes)
    return set_budget(ledger_dir, asked, reason=reason, as_json=as_json)


@_verb(budget, "show", "Show the caps, and what is spent.")
def budget_show(ledger_dir: LedgerDir = None, as_json: Json = False) -> int:
    """Show the caps, and what the ledgers beside them have spent.

    Example:
      fedveil budget show
    """
    from .budget import show

    return show(ledger_dir, as_json=as_json)


@_verb(budget, "adopt", "Let a named data set answer for an older ledger.")
def budget_adopt(
    old: Annotated[str, Argument(metavar="LEDGER", help="Name of the ledger's file, without .ledger.")],
    data_id: Annotated[str, Argument(metavar="DATA_ID", help="As task.data_id names the data set.")],
    ledger_dir: LedgerDir = None,
) -> int:
    """Let a data set that has a name answer for what an older ledger holds; the next run charges it first.

    Example:
      fedveil budget adopt 9f86d081884c7d659a2feaa0c55ad015 clinics-2026
    """
    from .budget import adopt

    return adopt(ledger_dir, old, data_id)


# --- audits -------------------------------------------------------------------------------------------------------


@_verb(audit, "RUN", "Weigh a run: claimed beside measured.", hidden=True)
def audit_run(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder.", file_okay=False)],
    records: Annotated[bool, Option("--records", help="What it learnt by heart, by owner.")] = False,
    membership: Annotated[
        str | None, Option(metavar="ATTACK", help="Attack its final model: loss, rmia, lira or art.")
    ] = None,
    shadows: Annotated[int, Option(metavar="N", help="Models that lira trains.")] = 8,
    epochs: Annotated[int, Option(metavar="N", help="Of a reference model of an attack.")] = 20,
    as_json: Json = False,
) -> int:
    """Weigh a run again from its folder: what was claimed beside what was measured.

    Example:
      fedveil audit runs/2026-01-31/12-00-00
      fedveil audit runs/2026-01-31/12-00-00 --membership rmia

    Exit codes: 0 consistent, 3 violated, 4 too weak to tell, 2 refused.
    """
    require_extra("simulation", "fedveil audit RUN")
    if records and membership:
        raise click.UsageError("--records and --membership exclude each other", click.get_current_context())
    if records:
        from .audit_records import records as of_records

        return of_records(run, as_json=as_json)
    if membership is not None:
        from ..simulations.membership_attacks import membership as of_membership

        return of_membership(run, membership, shadows, epochs, as_json=as_json)
    from .audit_run import audit_run as body

    return body(run, as_text=not as_json)


@_verb(audit, "claim", "Weigh a claim against evidence.")
def audit_claim(
    epsilon: Annotated[str, Option(metavar="E", help="What is claimed, in nats.")],
    delta: Annotated[str, Option(metavar="D", help="What is claimed; 0 for pure differential privacy.")],
    guesses: Annotated[str | None, Option(metavar="N", help="One run: so many guesses who was in.")] = None,
    correct: Annotated[str | None, Option(metavar="R", help="How many of them were right.")] = None,
    canaries: Annotated[
        str | None, Option(metavar="M", help="Of how many canaries; as many as guesses by default.")
    ] = None,
    scores: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help=".npz with the arrays members and others, or .csv with the columns score and member (1 or 0).",
        ),
    ] = None,
    in_scores: Annotated[
        Path | None, Option(metavar="FILE", help="Scores of who was in: .npy, or one number a line.")
    ] = None,
    out_scores: Annotated[Path | None, Option(metavar="FILE", help="Scores of who was not.")] = None,
    confidence: Annotated[str, Option(metavar="C", help="Of the bounds and of the verdict.")] = "0.99",
    gaussian: Annotated[bool, Option("--gaussian", help="The claim is about a Gaussian mechanism.")] = False,
    many_runs: Annotated[bool, Option("--many-runs", help="Each score is of a run of its own.")] = False,
    as_json: Json = False,
) -> int:
    """Weigh any claim of differential privacy against evidence: guesses, or scores.

    Example:
      fedveil audit claim --epsilon 3 --delta 1e-5 --guesses 400 --correct 330
      fedveil audit claim --epsilon 4 --delta 1e-5 --scores scores.npz

    Evidence is one of: --guesses with --correct; --scores; --in-scores with --out-scores. Higher scores say in.
    Scores are of one run, each canary in or out by a fair coin of its own, unless --many-runs says otherwise.

    Exit codes: 0 consistent, 3 violated, 4 too weak to tell, 2 refused.
    """
    from .audit import AuditClaim, claim

    evidence = guesses, correct, canaries, scores, in_scores, out_scores
    return claim(AuditClaim(epsilon, delta, confidence, *evidence, gaussian, many_runs), as_json=as_json)


# --- reports ------------------------------------------------------------------------------------------------------


@_verb(report, "RUN", "Make the page of a run, and its JSON.", hidden=True)
def report_run(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder.", file_okay=False)],
    out: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where to; the run's folder by default.", file_okay=False)
    ] = None,
    assessment: Annotated[
        Path | None,
        Option(metavar="FILE", help="Answers of the organisation; RUN/assessment.yaml by default."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Make report.html, report.json, CARD.md and bom.cdx.json of a run, from its folder alone.

    Example:
      fedveil report runs/2026-01-31/12-00-00
    """
    require_extra("server", "fedveil report")
    from .report import report as body

    return body(run, out, assessment, as_json=as_json)


@_verb(report, "compare", "Say in what two runs differ.")
def report_compare(
    first: Annotated[Path, Argument(metavar="A", help="A run folder.", file_okay=False)],
    second: Annotated[Path, Argument(metavar="B", help="Another.", file_okay=False)],
    everything: Annotated[bool, Option("--all", help="What is the same in both, too.")] = False,
    as_json: Json = False,
) -> int:
    """Say in what the reports of two runs differ: what was asked for, promised, measured, reached and paid.

    Example:
      fedveil report compare runs/2026-01-31/12-00-00 runs/2026-01-31/12-05-00
    """
    require_extra("server", "fedveil report")
    from .report_compare import compare as body

    return body(first, second, everything=everything, as_json=as_json)


Signers = Annotated[
    list[Path] | None,
    Option("--key", metavar="F", help="A private key that signs; once for each algorithm."),
]


@_verb(report, "bundle", "Make what others check offline.")
def report_bundle(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder.", file_okay=False)],
    out: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where to; RUN/bundle by default.", file_okay=False)
    ] = None,
    keys: Signers = None,
    with_audit_rows: Annotated[
        bool,
        Option(
            "--with-audit-rows", help="With what the audit kept of real rounds: it tells how many took part."
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Make the bundle of a run: its files, its ledger, a list of hashes that roles sign, and a check that needs no fedveil.

    Example:
      fedveil report bundle runs/2026-01-31/12-00-00 --key federation.key
    """
    from .report_bundle import bundle

    return bundle(run, out, keys or [], with_audit_rows=with_audit_rows, as_json=as_json)


@_verb(report, "sign", "Sign a bundle in a role.")
def report_sign(
    folder: Annotated[Path, Argument(metavar="BUNDLE", help="A bundle.", file_okay=False)],
    role: Annotated[str, Option(metavar="ROLE", help="Who signs, such as 'data protection officer'.")],
    keys: Annotated[
        list[Path], Option("--key", metavar="F", help="A private key that signs; once for each algorithm.")
    ],
    day: Annotated[str | None, Option("--date", metavar="YYYY-MM-DD", help="Today, UTC, by default.")] = None,
) -> int:
    """Check a bundle and sign it in a role, over all who signed before.

    Example:
      fedveil report sign bundle --role "data protection officer" --key officer.key
    """
    from .report_bundle import sign

    return sign(folder, role, keys, day)


@_verb(report, "key", "Make a key that signs.")
def report_key(
    path: Annotated[Path, Argument(metavar="FILE", help="Of the private key; FILE.pub is the public one.")],
    ml_dsa: Annotated[bool, Option("--ml-dsa", help="Of ML-DSA-65, to stand beside one of Ed25519.")] = False,
    unlocked: Annotated[bool, Option("--unlocked", help="Without a passphrase.")] = False,
) -> int:
    """Make a key that signs bundles, locked by a passphrase that is asked for, or stands in FEDVEIL_PASSPHRASE.

    Example:
      fedveil report key officer.key
    """
    from .report_bundle import key

    return key(path, ml_dsa=ml_dsa, unlocked=unlocked)


# --- real machines ------------------------------------------------------------------------------------------------


@_verb(provision, "FILE", "Make the bundles of a federation.", hidden=True)
def provision_file(
    file: Annotated[Path, Argument(metavar="FILE", help="federation.yaml: who is in the federation.")],
    out: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where to; a folder of the federation's name by default.")
    ] = None,
    wheels: Annotated[
        Path | None, Option(metavar="FOLDER", help="What a device installs, for requirements with hashes.")
    ] = None,
    lock: Annotated[
        Path | None, Option(metavar="FILE", help="Hashes of what a device installs and --wheels lacks.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Make the bundles of a federation from one file, or complete them.

    Example:
      fedveil provision federation.yaml
    """
    require_extra("server", "fedveil provision")
    from .provision import make

    return make(file, out, wheels, lock, as_json=as_json)


@_verb(provision, "rotate", "Give a client new keys.")
def provision_rotate(
    folder: Desk,
    names: Annotated[
        list[str], Argument(metavar="NAME...", help="Of clients, 'hospital-*' for many, or server.")
    ],
    request: Annotated[
        Path | None, Option(metavar="FILE", help="Of the device, which made its new keys itself.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Give a client, or the server, new keys; the old ones are admitted no longer.

    Example:
      fedveil provision rotate hearts cleveland
      fedveil provision rotate hearts 'hospital-*' server
    """
    require_extra("server", "fedveil provision")
    from .provision import new_keys

    return new_keys(folder, names, request, as_json=as_json)


@_verb(provision, "renew", "Give clients later certificates.")
def provision_renew(
    folder: Desk,
    names: Annotated[
        list[str] | None,
        Argument(metavar="[NAME...]", help="Of clients, 'hospital-*' for many; all by default."),
    ] = None,
    within: Annotated[
        float, Option(metavar="DAYS", help="Leave alone what ends later than in so many days.")
    ] = 30.0,
    as_json: Json = False,
) -> int:
    """Give clients later certificates for the keys that they have. The server hands them over.

    Example:
      fedveil provision renew hearts
      fedveil provision renew hearts 'hospital-*' --within 60
    """
    require_extra("server", "fedveil provision")
    from .provision import new_certificates

    return new_certificates(folder, names or [], within, as_json=as_json)


@_verb(provision, "token", "Let a device enrol once.")
def provision_token(
    folder: Desk,
    names: Annotated[list[str], Argument(metavar="NAME...", help="Of clients, each of one device.")],
    hours: Annotated[float, Option(metavar="N", help="Until they end.")] = 24.0,
    qr: Annotated[bool, Option("--qr", help="As QR codes too.")] = False,
    as_json: Json = False,
) -> int:
    """Print a token for each name, by which one device enrols once: fedveil client enrol TOKEN FOLDER.

    Example:
      fedveil provision token hearts cleveland hungary --hours 2
    """
    require_extra("server", "fedveil provision")
    from .provision import tokens

    return tokens(folder, names, hours, qr=qr, as_json=as_json)


@_verb(provision, "approve", "Admit who asked by a token.")
def provision_approve(
    folder: Desk,
    names: Annotated[
        list[str] | None, Argument(metavar="[NAME...]", help="Of clients; all who have asked by default.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Admit the devices that have asked by a token, and sign what they get. Exit code 1 if one was refused.

    Example:
      fedveil provision approve hearts
    """
    require_extra("server", "fedveil provision")
    from .provision import admit_asked

    return admit_asked(folder, names or [], as_json=as_json)


@_verb(provision, "revoke", "Leave a client out.")
def provision_revoke(
    folder: Desk,
    names: Annotated[list[str], Argument(metavar="NAME...", help="Of clients, 'hospital-*' for many.")],
    as_json: Json = False,
) -> int:
    """Leave clients out, from the next roster on.

    Example:
      fedveil provision revoke hearts cleveland
    """
    require_extra("server", "fedveil provision")
    from .provision import leave_out

    return leave_out(folder, names, as_json=as_json)


@_verb(provision, "cosign", "Collect members' signatures.")
def provision_cosign(
    folder: Desk,
    files: Annotated[
        list[Path], Argument(metavar="FILE", help="Of members: what fedveil client roster --sign wrote.")
    ],
    as_json: Json = False,
) -> int:
    """Collect signatures of members under the newest roster, for owners who ask for them.

    Example:
      fedveil provision cosign hearts cosignature-2.toml
    """
    require_extra("server", "fedveil provision")
    from .provision import collect

    return collect(folder, files, as_json=as_json)


@_verb(server, "FOLDER", "Serve a federation of real clients.", ServerVerb, hidden=True)
def serve(
    ctx: typer.Context,
    folder: Bundle,
    as_json: Json = False,
    accept_vacuous: AcceptVacuous = False,
    despite_alarm: Annotated[
        bool, Option("--despite-alarm", help="Go on with a run that an alarm of its audit has paused.")
    ] = False,
    reason: Reason = None,
) -> int:
    """Serve the federation of this folder until the run is over.

    The same command again goes on with a run that was stopped or killed, and leaves one that is finished alone.

    Example:
      fedveil server hearts/server task=heart
      fedveil server hearts/server task=heart run=second num_rounds=50
    """
    require_extra("server", "fedveil server")
    from ..deployment.serve import serve as body

    _own_modules()
    given = [*ctx.args, *_acts(accept_vacuous, reason)]
    return body(folder, given, as_json=as_json, despite_alarm=despite_alarm)


@_verb(server, "status", "Say who is here, what is spent.")
def server_status(folder: Bundle, as_json: Json = False) -> int:
    """Say who is here, which round it is and what is spent. Exit code 1 if no server runs.

    Example:
      fedveil server status hearts/server
    """
    require_extra("server", "fedveil server")
    from ..deployment.status import show

    return show(folder, as_json=as_json)


@_verb(server, "log", "Say what it has told.")
def server_log(
    folder: Bundle,
    inclusion: Annotated[
        int | None, Option(metavar="ENTRY", help="Prove that this entry stands in the log; print JSON.")
    ] = None,
    consistency: Annotated[
        int | None,
        Option(metavar="SIZE", help="Prove that the log begins with its first SIZE entries; print JSON."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Say what the server has told its clients: rosters, each round's model, final models. --json exports all of it.

    Example:
      fedveil server log hearts/server
      fedveil server log hearts/server --json > log.json
    """
    require_extra("server", "fedveil server")
    from .log import of_server

    return of_server(folder, inclusion, consistency, as_json=as_json)


@_verb(server, "enrol", "Let devices enrol by tokens.")
def server_enrol(folder: Bundle) -> int:
    """Open the port for enrolments as long as tokens are open. It may run beside the server, and needs no run.

    Example:
      fedveil server enrol hearts/server
    """
    require_extra("client", "fedveil server enrol")
    from .enrolment import serve_enrolments

    return serve_enrolments(folder)


@_verb(client, "enrol", "Enrol this device by a token.")
def client_enrol(
    token: Annotated[str, Argument(metavar="TOKEN", help="Of the operator; - reads it from the terminal.")],
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Of the bundle.", file_okay=False)],
    wait: Annotated[
        float | None, Option(metavar="SECONDS", help="For the authority's answer; without end by default.")
    ] = None,
) -> int:
    """Make this device's keys, have them admitted, and complete its bundle. Exit code 1 if nobody has answered yet.

    Example:
      fedveil client enrol TOKEN hearts-cleveland
    """
    require_extra("client", "fedveil client")
    from .enrolment import enrol_device

    return enrol_device(token, folder, wait)


@_verb(client, "request", "Make a device's keys.")
def client_request(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Where the keys shall be.", file_okay=False)],
    name: Annotated[str, Option(metavar="NAME", help="Of the client, as federation.yaml has it.")],
    as_json: Json = False,
) -> int:
    """Make a device's keys there; only a request to admit them leaves it.

    Example:
      fedveil client request harbour --name harbour
    """
    require_extra("client", "fedveil client")
    from .client import request

    return request(folder, name, as_json=as_json)


@_verb(client, "start", "Follow the server until SIGTERM.")
def client_start(
    folder: Bundle,
    once: Annotated[bool, Option("--once", help="End when a run is over.")] = False,
) -> int:
    """Follow the server until SIGTERM; after a run its final model is in the bundle's state folder.

    Example:
      fedveil client start hearts/clients/cleveland
    """
    require_extra("client", "fedveil client")
    from ..client.device import agent

    return agent.start(folder, once=once)


@_verb(client, "status", "Say how the device is.")
def client_status(folder: Bundle, as_json: Json = False) -> int:
    """Say how the device is, and how its roster has changed. Exit code 1 if its agent does not run.

    Example:
      fedveil client status hearts/clients/cleveland
    """
    require_extra("client", "fedveil client")
    from .client import status

    return status(folder, as_json)


@_verb(client, "roster", "Say with whom it is summed.")
def client_roster(
    folder: Bundle,
    approve: Annotated[
        int | None, Option(metavar="VERSION", help="Approve of the change that waits, by its version.")
    ] = None,
    sign: Annotated[
        Path | None,
        Option(
            metavar="FILE", help="Sign the roster in this file, for owners who ask for others' signatures."
        ),
    ] = None,
    reason: Reason = None,
    as_json: Json = False,
) -> int:
    """Say with whom the device may be summed, by fingerprints of keys, and how that has changed.

    Example:
      fedveil client roster hearts/clients/cleveland
      fedveil client roster hearts/clients/cleveland --sign roster.bin
    """
    require_extra("client", "fedveil client")
    from .client import roster

    return roster(folder, approve, sign, reason, as_json=as_json)


@_verb(client, "log", "Say what the server has told.")
def client_log(
    folder: Bundle,
    against: Annotated[
        Path | None,
        Option(
            metavar="FILE", help="Compare with this export of another client or of the server, or a proof."
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Say what the device has seen of its server's log, or compare it with another's, offline. --json exports it.

    Exit code 1 if the server has told two stories.

    Example:
      fedveil client log hearts/clients/cleveland --json > cleveland.json
      fedveil client log hearts/clients/hungary --against cleveland.json
    """
    require_extra("client", "fedveil client")
    from .log import of_client

    return of_client(folder, against, as_json=as_json)


@_verb(client, "explain", "Say why the model says it.")
def client_explain(
    folder: Bundle,
    data: Annotated[Path, Argument(metavar="DATA", help="A table, or .npy of inputs, of the owner.")],
    row: Annotated[int, Option(metavar="N", help="Which row is explained, from 1.")] = 1,
    explain: Annotated[
        str, Option("--method", metavar="METHOD", help="How: integrated_gradients.")
    ] = "integrated_gradients",
    as_json: Json = False,
) -> int:
    """Say on the device what each column adds to one prediction of the model that it keeps. Nothing leaves; it costs nothing.

    Example:
      fedveil client explain hearts/clients/cleveland patients.csv --row 2
    """
    require_extra("client", "fedveil client")
    from .explain import explain_row

    _own_modules()
    return explain_row(folder, data, row, explain, as_json=as_json)


@_verb(client, "forget", "Remove what the device remembers.")
def client_forget(folder: Bundle, ledgers: Ledgers = False) -> int:
    """Remove what the device remembers.

    Example:
      fedveil client forget hearts/clients/cleveland
    """
    require_extra("client", "fedveil client")
    from .client import forget

    return forget(folder, ledgers)


@_verb(client, "uninstall", "Remove all of it.")
def client_uninstall(
    folder: Bundle,
    yes: Annotated[bool, Option("--yes", help="Really; without it nothing is removed.")] = False,
    ledgers: Ledgers = False,
) -> int:
    """Stop the agent; remove its unit, its bundle and what it remembers.

    Example:
      fedveil client uninstall hearts/clients/cleveland --yes
    """
    require_extra("client", "fedveil client")
    from .client import uninstall

    return uninstall(folder, yes, ledgers)
