"""Question to a federation's clients, from settings to a stored answer: planned, refused or charged, asked, recorded.

A question that was answered under a name is answered from its record at no cost. A new answer needs a new name, fresh
noise and a new charge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from ..base.durable_files import append_line, make_folder, replace_file
from ..base.notice import warn
from ..base.refusal import Refusal
from ..messages.traffic import Tally
from ..modes.federation import Federation
from ..privacy.accounting.epsilon import PUBLISH_INTERVAL
from ..privacy.accounting.renyi_filter import spent_epsilon
from ..privacy.budget import Unit
from ..privacy.ledger.ledger import Ledger, LedgerUnavailable
from ..privacy.plan import Plan
from ..privacy.statistics.inquiry import Inquiry
from ..run.acts import write_accepted
from ..run.client_instructions import task_options
from ..run.files import OF_RECORDS, OPERATOR
from ..run.opening import close_ledger, lock_records, open_ledger
from ..run.origin import origin_of
from ..run.queries import Reach
from ..server.participants import Participants
from .question_plan import Spend, budget_of, check_resolution, question_plan, require_answer
from .question_rounds import Outcome, QuestionRounds, require_all_rounds

# Default mode of privacy of a question, by the unit that it hides.
PRIVACY_OF_QUESTIONS = {Unit.CLIENT: "client_central", Unit.RECORD: "record_distributed"}
TABLES = "csv"  # task whose clients are few, with many rows each


def with_unit(keys: dict[str, Any], task: object, privacy: object) -> dict[str, Any]:
    """Return an inquiry's keys with the unit that is hidden by default: of tables a row, unless the mode hides clients.

    Args:
      keys: of the inquiry; their own unit stays.
      task: its name; an object of another class has no default.
      privacy: name of the mode; None for the default.
    """
    if task == TABLES and not str(privacy).startswith("client"):
        return {"unit": str(Unit.RECORD), **keys}
    return keys


def ask(
    federation: Federation,
    inquiry: Inquiry,
    spend: Spend,
    folder: Path,
    open_grid: Callable[[], AbstractContextManager[tuple[Grid, Tally]]],
    reach: Reach,
) -> dict[str, Any]:
    """Ask a federation's clients, and return the record of the answer, which is stored in `folder`.

    Args:
      federation: of the clients.
      inquiry: the questions, and the unit that is hidden.
      spend: cost of the inquiry.
      folder: of records; in a simulation its ledger lies there too.
      open_grid: opens a context with the grid and the tally of its bytes.
      reach: how the clients answer.

    Raises:
      Refusal: nothing was charged.
      BudgetExhausted: it does not fit; nothing was charged.
    """
    path = record_path(folder, inquiry)
    if path.exists():
        return _stored_record(path, federation, inquiry)
    plan = question_plan(federation, inquiry, spend)
    check_resolution(federation, inquiry, plan)
    require_answer(federation, inquiry, spend, plan)
    federation.check_cohort()
    make_folder("into", folder)
    with lock_records(federation):
        if path.exists():  # another process asked before the lock was free
            return _stored_record(path, federation, inquiry)
        return _ask(federation, inquiry, plan, folder, open_grid, reach)


def _ask(
    federation: Federation,
    inquiry: Inquiry,
    plan: Plan,
    folder: Path,
    open_grid: Callable[[], AbstractContextManager[tuple[Grid, Tally]]],
    reach: Reach,
) -> dict[str, Any]:
    """Ask by a checked plan, store the record of the answer, and return it; the caller holds the lock of the records."""
    path = record_path(folder, inquiry)
    with _ledger(federation, inquiry, plan, folder) as ledger:
        epsilon_before = ledger_epsilon(ledger)
        with open_grid() as (grid, tally):
            participants = Participants(
                grid,
                federation.cohort,
                federation.num_clients,
                reach.answers,
                population=federation.declared_clients,
            )
            participants.first_nodes(1)  # waits until clients are connected
            rounds = QuestionRounds(federation, plan, ledger, participants, reach)
            outcome = rounds.search(inquiry) if inquiry.levels > 1 else rounds.ask_once(inquiry)
        traffic = {"source": federation.population.words.traffic, **tally.total().to_json()}
        hides_counts = federation.mode.hides_counts  # bytes would tell the number of messages
        record = answer_record(rounds, inquiry, epsilon_before, outcome)
        record["bytes"] = None if hides_counts else traffic
        try:
            # A reservation is spent in any case; it is committed once the answer is stored.
            if outcome.answers:
                replace_file(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
                outcome.charge.settle()  # marks the release as made, and changes no epsilon
            if hides_counts:
                counts = {"question": inquiry.name, "bytes": traffic, "dropped": dict(outcome.dropped)}
                append_line(folder / OPERATOR, counts)
        except (OSError, LedgerUnavailable) as problem:
            warn(f"{path}: {problem}; the answer is charged, and may not be stored: keep what is printed")
        return record


@contextmanager
def _ledger(federation: Federation, inquiry: Inquiry, plan: Plan, folder: Path) -> Generator[Ledger | None]:
    """Open the ledger that pays for a question, and keep its head; None where each client charges its own."""
    budget = federation.mode.budget
    if budget is None:
        yield None
        return
    home = folder / OF_RECORDS if inquiry.unit is Unit.RECORD else folder  # a ledger is of one unit
    ledger = open_ledger(federation, home, budget)
    try:
        ledger.purpose, ledger.origin = inquiry.why or None, origin_of(federation)
        require_all_rounds(ledger, plan, inquiry)
        write_accepted(federation, inquiry.name, ledger)
        yield ledger
    finally:
        close_ledger(federation, ledger)
        federation.population.keep_answer(folder, inquiry.name, ledger.head)


def ledger_epsilon(ledger: Ledger | None) -> float | None:
    """Return the epsilon of the ledger that pays for a question; None where each client charges its own."""
    return None if ledger is None else ledger.epsilon()


def record_path(folder: Path, inquiry: Inquiry) -> Path:
    """Return the path of the answer under an inquiry's name; refuse a name that is no file name."""
    letters = inquiry.name.replace("-", "").replace("_", "").replace(".", "")
    if not letters.isalnum() or inquiry.name[0] == ".":
        remedy = "use letters, digits, '-', '_' and '.': the answer's file has this name"
        raise Refusal("name", inquiry.name, remedy)
    return folder / f"{inquiry.name}.json"


def _stored_record(path: Path, federation: Federation, inquiry: Inquiry) -> dict[str, Any]:
    """Return the record in a file; refuse that of another question or of other clients."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        other_owner = record["owner"] != _owner(federation)
        same_question = record["question"] == json.loads(inquiry.text)
    except (OSError, ValueError, LookupError, TypeError) as problem:
        raise Refusal("name", inquiry.name, f"has a record that cannot be read ({problem})") from problem
    if not same_question:
        raise Refusal("name", inquiry.name, f"belongs to another question ({path}); use a new name")
    if other_owner:
        raise Refusal("name", inquiry.name, f"was asked of other clients ({path}); use a new name or folder")
    return {**record, "from_record": True}


def _owner(federation: Federation) -> str:
    """Return the clients' identity: their ledger's, and for simulated ones also the parameters of their data."""
    if not federation.simulated:
        return federation.population.owner
    task = federation.settings.task
    data_parameters = [task.option, task.own or None, task_options(federation.settings, federation.seed)]
    return hashlib.sha256(json.dumps(data_parameters, sort_keys=True, default=repr).encode()).hexdigest()


def answer_record(
    rounds: QuestionRounds, inquiry: Inquiry, epsilon_before: float | None, outcome: Outcome
) -> dict[str, Any]:
    """Return the record of an answer in the form of its file.

    Args:
      rounds: of the question.
      inquiry: the questions.
      epsilon_before: of the ledger before the first round; None where each client charged its own.
      outcome: of the rounds.
    """
    federation, plan = rounds.federation, rounds.plan
    events = [plan.event()] * outcome.rounds
    sizes = outcome.message_bytes
    budget = budget_of(federation, inquiry)
    fields = {
        "name": inquiry.name,
        "question": json.loads(inquiry.text),
        "purpose": inquiry.purpose,
        "from_record": False,
        "released": bool(outcome.answers),
        "unit": str(plan.unit),
        "adjacency": str(plan.adjacency),
        "adversaries": [str(each) for each in plan.adversaries],
        "noise_multiplier": plan.noise_multiplier,
        "epsilon": spent_epsilon(events, budget.target_delta, plan.adjacency, None, PUBLISH_INTERVAL),
        "epsilon_before": epsilon_before,
        "epsilon_after": ledger_epsilon(rounds.ledger),
        "target_epsilon": budget.target_epsilon,
        "delta": budget.target_delta,
        "rounds": outcome.rounds,
        "rng": rounds.reach.randomness.kind,
        "cohort": federation.cohort.name,
        "owner": _owner(federation),
        "clients": federation.declared_clients,
        "confidence": 0.95,
        "message_bytes": sizes and {"down": sizes[0], "up": sizes[1]},
    }
    if not outcome.answers:
        return {**fields, "reason": outcome.cause, "answers": []}
    answers = [
        {"name": each.name, "clipped": each.clipped.plain, "figures": [one.plain for one in each.figures]}
        for each in outcome.answers
    ]
    return {**fields, "answers": answers}
