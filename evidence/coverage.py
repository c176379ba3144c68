"""Limits of a run's guarantee, with the run's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..configs.round_line import main_metric
from ..messages.training_order import CENTRAL_MODES, ENCRYPTED_MODES, RECORD_MODES, ModeName
from ..privacy.ledger.question_caps import QUESTION
from ..run.run_files import Fields, RunFiles

# States of a limit, in the order in which the page lists them.
ACCEPTED, NOT, NO_STAKE, COVERED = STATES = "accepted", "not covered", "not at stake", "covered"


@dataclass(frozen=True)
class Limit:
    """Limit of a guarantee."""

    title: str  # of the limit
    state: str  # one of `STATES`
    text: str  # what this run does about it, a sentence or two


def not_covered(run: RunFiles, rows: Sequence[Fields], ledger: Fields | None) -> list[dict[str, str]]:
    """Return the limits of the guarantee, each with this run's measure against it.

    Args:
      run: its files.
      rows: the run's guarantees, by `promise_rows`; empty before the first release.
      ledger: by `ledger_history`; None if the folder has no ledger of all clients.
    """
    is_real = run.result.get("data") == "real" or run.deployed
    if rows and all(row["epsilon"] == "infinity" for row in rows):
        text = "There is no guarantee, so nothing is covered."
        return [{"limit": "Everything", "state": NOT, "said": text}]
    limits = [
        _tuning(run, ledger, is_real),
        _held_out(run),
        _shared_person(run, rows),
        _several_records(run, rows),
        *_personal(run),
        _questions(ledger),
        _server(run),
        _noise(run),
        _names(is_real),
        _floats(run),
        Limit("Timing and answering", NOT, _answering(run)),
    ]
    if run.setting("accept_vacuous"):
        text = "The plan found the guarantee vacuous in practice, and the run was accepted nevertheless (accept_vacuous)."
        limits.insert(0, Limit("A vacuous promise", ACCEPTED, text))
    limits.sort(key=lambda each: STATES.index(each.state))
    return [{"limit": each.title, "state": each.state, "said": each.text} for each in limits]


def _answering(run: RunFiles) -> str:
    """Return the assumption on whether and when clients answer."""
    text = "Whether and when a client answers is assumed not to depend on its data."
    if run.setting("cohort", "name") == "first":
        text += " It decides who is in a sum: the cohorts are whoever answered first, and are on the server's ledger."
    return text


def _tuning(run: RunFiles, ledger: Fields | None, is_real: bool) -> Limit:
    """Return the limit on choices by several runs: a ledger composes those on it, and knows of no others."""
    title = "Choices made on the same data"
    if not is_real:
        text = "The data are declared simulated or public: each run has its own ledger, and runs are not composed."
        return Limit(title, NO_STAKE, text)
    if ledger is None:
        text = "The ledgers of the owners are not in this folder. Only the owners know their other entries."
        return Limit(title, NOT, text)
    num_runs = sum(not each["question"] for each in ledger["runs"])
    num_planned = run.result.get("budget_runs") or 1
    text = "It is the only run on its ledger."
    if num_runs != 1:
        text = f"Its ledger holds {num_runs} runs, including this one, and all of them are composed."
    if num_planned > 1:
        text += f" It was planned as one of {num_planned}."
    return Limit(title, NOT, f"{text} Choices made outside of runs are not charged.")


def _held_out(run: RunFiles) -> Limit:
    """Return the limit on metrics of held-out data, which are released without noise and without a charge."""
    title = "Held-out data"
    if main_metric([run.result.get("metrics") or {}, *run.rounds]) is None:
        return Limit(title, COVERED, "No metric was computed on held-out data.")
    declared = run.setting("task", "held_out")
    actor = "the run (task.held_out=public)" if declared == "public" else "the task"
    if run.deployed and declared is None:
        actor = "the operator, whose they are"
    elif run.result.get("data") != "real" and declared is None:
        actor = "the task, whose data are simulated or public"
    text = f"Metrics on them are exact and public, and not charged. They were declared public by {actor}."
    return Limit(title, NOT, text)


def _personal(run: RunFiles) -> list[Limit]:
    """Return the limit on personal models, if the run has some."""
    if run.setting("personal", "name") in (None, "none"):
        return []
    text = "A personal model has no privacy towards whoever gets it: epsilon is infinite for that client's data. No guarantee of this run covers it."
    return [Limit("Personal models", NOT, text)]


def _shared_person(run: RunFiles, rows: Sequence[Fields]) -> Limit:
    """Return the limit on a person at several clients, who loses the sum unless the unit covers all of them."""
    several = run.setting("privacy", "clients_per_person") or 1
    if any(row["unit"] == "client" and row["epsilon"] != "infinity" for row in rows):
        text = "A person with two devices is two clients: both epsilons add up."
        return Limit("One person behind two clients", NOT, text)
    if several > 1:
        text = f"A person may have examples at {several} clients, which count as one unit."
        return Limit("One person at two clients", COVERED, text)
    text = "A person with records at two clients loses up to the sum of both epsilons: clients cannot detect that they share a person."
    return Limit("One person at two clients", NOT, text)


def _several_records(run: RunFiles, rows: Sequence[Fields]) -> Limit:
    """Return the limit on several records of a person at one client; covered if the unit is the person or client."""
    title = "Several records of one person"
    per_person = run.setting("privacy", "per_person") or run.setting("privacy", "record", "per_person")
    if per_person:
        text = f"Each client trains on at most {per_person} of one person's examples, and the unit is the person."
        return Limit(title, COVERED, text + " The guarantee relies on the owner to name persons correctly.")
    if not any(row["unit"] == "record" and row["epsilon"] != "infinity" for row in rows):
        text = "The unit is the whole client, so all records of one person there count together."
        return Limit(title, COVERED, text)
    groups = next((row["groups"] for row in rows if row["unit"] == "record" and row["groups"]), [])
    if not groups:
        return Limit(title, NOT, "A person with several records loses more than one record does.")
    epsilons = ", ".join(f"{records} records {_format_epsilon(epsilon)}" for records, epsilon in groups)
    text = f"A person with several records loses more than one record does: epsilon with {epsilons}."
    return Limit(title, NOT, text)


def _format_epsilon(epsilon: float | str) -> str:
    return "without bound" if isinstance(epsilon, str) else f"{epsilon:.2f}"


def _questions(ledger: Fields | None) -> Limit:
    title = "Questions asked beside the training"
    if ledger is None:
        return Limit(title, NOT, "The folder holds no ledger of all clients, so questions cannot be listed.")
    questions = [_describe_question(each) for each in ledger["questions"]]
    questions += [
        f"{each['mechanism']}, {each['releases']} times, for {each['purpose'] or 'a purpose that was not recorded'}"
        for each in ledger["releases"]
        if each["what"] == QUESTION != each["mechanism"]  # of an older release
    ]
    if not questions:
        return Limit(title, COVERED, "The ledger holds rounds of training and no other question.")
    return Limit(title, COVERED, f"The ledger holds them, and they are charged: {'; '.join(questions)}.")


def _describe_question(question: Fields) -> str:
    """Return a question of the ledger with its purposes, as a clause."""
    often = f", {question['times']} times" if question["times"] > 1 else ""
    reason = "" if question["why"] is None else f" ({question['why']})"
    return f"{question['name']}{often}, for {question['purposes']}{reason}"


def _server(run: RunFiles) -> Limit:
    """Return the limit on what the server sees, by the mode of privacy."""
    title, mode = "The server", run.setting("privacy", "name")
    if mode in CENTRAL_MODES:  # some of them hide records too
        text = "It sees single updates of clients. Clients must trust it not to disclose them."
        return Limit(title, NOT, text)
    if mode in ENCRYPTED_MODES:
        return Limit(title, COVERED, "It sees sums with the clients' noise, and no single update.")
    if mode in RECORD_MODES:
        text = "Each client adds its noise before it sends. The server learns the participants."
        return Limit(title, COVERED, text)
    return Limit(title, NOT, "Nothing is hidden from it.")


def _noise(run: RunFiles) -> Limit:
    title = "Noise that can be repeated"
    if run.result.get("rng") == "seeded":
        text = "This is a declared simulation: noise derives from the seed, and anyone who knows the seed can subtract it."
        return Limit(title, NOT, text)
    if not run.result and not run.deployed:
        return Limit(title, NOT, "The run has not ended, and has not recorded the source of its noise.")
    return Limit(title, COVERED, "Noise came from the system's generator and cannot be drawn again.")


def _names(is_real: bool) -> Limit:
    title = "The same people under another name"
    if not is_real:
        return Limit(title, NO_STAKE, "Ledgers of simulations belong to no people.")
    text = "A ledger belongs to the name of its data. The same people under two names have two budgets."
    return Limit(title, NOT, text)


def _floats(run: RunFiles) -> Limit:
    title, mode = "Floating-point noise", run.setting("privacy", "name")
    if mode in RECORD_MODES:
        text = (
            "Gradients are clipped and summed in float32 before noise is added: the rounding is not counted."
        )
        return Limit(title, NOT, text)
    if mode == ModeName.NONE:
        return Limit(title, COVERED, "There is no noise.")
    return Limit(title, COVERED, "The noise is an exact discrete Gaussian on whole numbers.")
