"""Limits of a run's guarantee, with the run's values."""

from __future__ import annotations

from collections.abc import Sequence

from ..configs.round_line import main_metric
from ..messages.training_order import CENTRAL_MODES, ENCRYPTED_MODES, RECORD_MODES, ModeName
from ..privacy.ledger.question_caps import QUESTION
from ..run.run_files import Fields, RunFiles

ACCEPTED, NOT, NO_STAKE, DONE = STATES = "accepted", "not covered", "not at stake", "covered"


def not_covered(run: RunFiles, rows: Sequence[Fields], ledger: Fields | None) -> list[dict[str, str]]:
    """Return the limits of the guarantee, each with this run's measure against it.

    Args:
      run: its files.
      rows: as of `promise_rows`.
      ledger: as of `ledger_history`.
    """
    real = run.result.get("data") == "real" or run.deployed
    if rows and all(row["epsilon"] == "infinity" for row in rows):
        said = "There is no guarantee, so nothing is covered."
        return [{"limit": "Everything", "state": NOT, "said": said}]
    found = [
        _tuning(run, ledger, real),
        _held_out(run),
        _two_places(run, rows),
        _several_records(run, rows),
        _questions(ledger),
        _server(run),
        _draws(run),
        _names(real),
        _floats(run),
        (
            "Timing and answering",
            NOT,
            "Whether and when a client answers is assumed not to depend on its data.",
        ),
    ]
    if run.said("accept_vacuous"):
        said = "The plan found the guarantee vacuous in practice, and the run was accepted nevertheless (accept_vacuous)."
        found.insert(0, ("A vacuous promise", ACCEPTED, said))
    found.sort(key=lambda each: STATES.index(each[1]))
    return [{"limit": limit, "state": state, "said": said} for limit, state, said in found]


Limit = tuple[str, str, str]


def _tuning(run: RunFiles, ledger: Fields | None, real: bool) -> Limit:
    title = "Choices made on the same data"
    others = 0 if ledger is None else sum(not each["question"] for each in ledger["runs"]) - 1
    asked = run.result.get("budget_runs") or 1
    if not real:
        said = "The data are declared simulated or public: each run has its own ledger, and runs are not composed."
        return title, NO_STAKE, said
    if ledger is None:
        said = "The ledgers of the owners are not in this folder. Only the owners know their other entries."
        return title, NOT, said
    said = "It is the only run on its ledger."
    if others:
        said = f"Its ledger holds {others + 1} runs, including this one, and all of them are composed."
    if asked > 1:
        said += f" It was planned as one of {asked}."
    return title, NOT, f"{said} Choices made outside of runs are not charged."


def _held_out(run: RunFiles) -> Limit:
    title = "Held-out data"
    if main_metric([run.result.get("metrics") or {}, *run.rounds]) is None:
        return title, DONE, "No metric was computed on held-out data."
    declared = run.said("task", "held_out")
    who = "the run (task.held_out=public)" if declared == "public" else "the task"
    if run.deployed and declared is None:
        who = "the operator, whose they are"
    elif run.result.get("data") != "real" and declared is None:
        who = "the task, whose data are simulated or public"
    said = f"Metrics on them are exact and public, and not charged. They were declared public by {who}."
    return title, NOT, said


def _two_places(run: RunFiles, rows: Sequence[Fields]) -> Limit:
    several = run.said("privacy", "clients_per_person") or 1
    if any(row["unit"] == "client" and row["epsilon"] != "infinity" for row in rows):
        said = "A person with two devices is two clients: both epsilons add up."
        return "One person behind two clients", NOT, said
    if several > 1:
        said = f"A person may have examples at {several} clients, which count as one unit."
        return "One person at two clients", DONE, said
    said = "A person with records at two clients loses up to the sum of both epsilons: clients cannot detect that they share a person."
    return "One person at two clients", NOT, said


def _several_records(run: RunFiles, rows: Sequence[Fields]) -> Limit:
    title = "Several records of one person"
    per_person = run.said("privacy", "per_person") or run.said("privacy", "record", "per_person")
    if per_person:
        said = f"Each client trains on at most {per_person} of one person's examples, and the unit is the person."
        return title, DONE, said + " The guarantee relies on the owner to name persons correctly."
    if not any(row["unit"] == "record" and row["epsilon"] != "infinity" for row in rows):
        return title, DONE, "The unit is the whole client, so all records of one person there count together."
    groups = next((row["groups"] for row in rows if row["unit"] == "record" and row["groups"]), [])
    if not groups:
        return title, NOT, "A person with several records loses more than one record does."
    told = ", ".join(f"{records} records {_spelled(size)}" for records, size in groups)
    return title, NOT, f"A person with several records loses more than one record does: epsilon with {told}."


def _spelled(size: float | str) -> str:
    return "without bound" if isinstance(size, str) else f"{size:.2f}"


def _questions(ledger: Fields | None) -> Limit:
    title = "Questions asked beside the training"
    if ledger is None:
        return title, NOT, "The folder holds no ledger of all clients, so questions cannot be listed."
    asked = [_asked(each) for each in ledger["questions"]]
    asked += [
        f"{each['mechanism']}, {each['releases']} times, for {each['purpose'] or 'a purpose that was not recorded'}"
        for each in ledger["releases"]
        if each["what"] == QUESTION != each["mechanism"]  # of an older release
    ]
    if not asked:
        return title, DONE, "The ledger holds rounds of training and no other question."
    return title, DONE, f"The ledger holds them, and they are charged: {'; '.join(asked)}."


def _asked(question: Fields) -> str:
    """Return a question with its purpose, as a clause."""
    often = f", {question['times']} times" if question["times"] > 1 else ""
    why = "" if question["why"] is None else f" ({question['why']})"
    return f"{question['name']}{often}, for {question['purposes']}{why}"


def _server(run: RunFiles) -> Limit:
    trusted = NOT, "It sees single updates of clients. Clients must trust it not to disclose them."
    blind = DONE, "It sees sums with the clients' noise, and no single update."
    known = DONE, "Each client adds its noise before it sends. The server learns the participants."
    # A central mode may hide records too: the first that holds counts.
    sees = {CENTRAL_MODES: trusted, ENCRYPTED_MODES: blind, RECORD_MODES: known}
    mode, nothing = run.said("privacy", "name"), (NOT, "Nothing is hidden from it.")
    state, said = next((sight for modes, sight in sees.items() if mode in modes), nothing)
    return "The server", state, said


def _draws(run: RunFiles) -> Limit:
    title = "Noise that can be repeated"
    if run.result.get("rng") == "seeded":
        said = "This is a declared simulation: noise derives from the seed, and anyone who knows the seed can subtract it."
        return title, NOT, said
    if not run.result and not run.deployed:
        return title, NOT, "The run has not ended, and has not recorded the source of its noise."
    return title, DONE, "Noise came from the system's generator and cannot be drawn again."


def _names(real: bool) -> Limit:
    title = "The same people under another name"
    if not real:
        return title, NO_STAKE, "Ledgers of simulations belong to no people."
    said = "A ledger belongs to the name of its data. The same people under two names have two budgets."
    return title, NOT, said


def _floats(run: RunFiles) -> Limit:
    title, mode = "Floating-point noise", run.said("privacy", "name")
    if mode in RECORD_MODES:
        said = (
            "Gradients are clipped and summed in float32 before noise is added: the rounding is not counted."
        )
        return title, NOT, said
    if mode == ModeName.NONE:
        return title, DONE, "There is no noise."
    return title, DONE, "The noise is an exact discrete Gaussian on whole numbers."
