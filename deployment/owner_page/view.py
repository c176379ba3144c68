"""Values of the owner's page, from the files of a device, and the templates that show them."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ...base.refusal import Refusal
from ...evidence.page import template_of
from ...privacy.accounting.gaussian import exact_epsilon
from ...privacy.accounting.renyi_filter import spent_epsilon
from ...privacy.budget import OF_CLIENT, Adjacency, Adversary
from ...privacy.ledger.ledger_state import LedgerRelease, ReleaseState, event_of, read_ledger, run_of
from ..device import agent
from ..device.commands import own_model_text
from ..device.device_ledger import questions_of, spent_on
from ..device.ledger_heads import LEDGERS
from ..device.owner_decisions import OwnerDecision, Standing
from ..device.owner_desk import OwnerDesk
from ..device.owner_policy import OwnerPolicy
from ..device.owner_requests import ROSTER, RUN, OwnerRequest, request_name
from ..device.run_end import read_ended

HERE = Path(__file__).parent
STYLE = "owner.css"
MAX_ROWS = 12  # of settled requests, decisions, runs and questions, each
REFRESH_SECONDS = 10


class Term(NamedTuple):
    """Term of a request, and the limit of the owner's policy for it; empty where there is none."""

    name: str
    value: str
    limit: str


class RunCost(NamedTuple):
    """Releases of one run or question on a ledger, and what they cost together."""

    name: str
    releases: int
    epsilon: str


@dataclass(frozen=True)
class LedgerSpend:
    """Spending of one ledger.

    Attributes:
      name: of what the ledger counts.
      spent, remaining: epsilon; what remains is at least 0.
      limit, delta: of the owner's budget.
      share: spent part of the budget, in percent, at most 100.
      runs: with the last one first.
    """

    name: str
    spent: float
    remaining: float
    limit: float
    delta: float
    share: float
    runs: Sequence[RunCost]


def overview(desk: OwnerDesk, role: str, csrf: str, *, watches: bool = False) -> str:
    """Return the page of a desk.

    Args:
      desk: of the device.
      role: of whoever signed in.
      csrf: token of its form.
      watches: whether the browser asks for it again and again, which takes a screen reader back to its top.
    """
    health = agent.read_health(desk.state)
    ended = read_ended(desk.state)
    requests = [request for request, _ in desk.requests if request.kind != ROSTER]
    run = "" if health is None else request_name(health.run)
    newest = ([each for each in requests if each.name == run] or requests)[:1]
    standings = {request.id: standing for request, standing in desk.requests}
    settled = [request for request, standing in desk.requests if standing is not Standing.WAITING]
    spending, questions, fault = list[LedgerSpend](), list[tuple[str, str, str, str]](), ""
    try:
        spending, questions = list(data_sets(desk)), answered_questions(desk)
    except Refusal as refusal:
        fault = str(refusal)
    return _rendered(
        "overview.html.jinja",
        desk=desk,
        role=role,
        csrf=csrf,
        watches=watches,
        activity="not running" if agent.running(desk.state) is None or health is None else health.state,
        current=[(each, standings[each.id], terms_of(each, desk.policy)) for each in newest],
        settled=settled[:MAX_ROWS],
        standings=standings,
        ends={each.id: desk.end(each) for each in desk.waiting},
        data_sets=spending,
        questions=questions,
        fault=fault,
        ended=[] if ended is None else [ended],
        own_model=own_model_text(desk.state),
        decisions=decision_rows(desk.decisions),
    )


def decision_page(desk: OwnerDesk, request: OwnerRequest, csrf: str) -> str:
    """Return the page on which a request is decided, with the token of its form."""
    (standing,) = [standing for each, standing in desk.requests if each.id == request.id]
    return _rendered(
        "decide.html.jinja",
        desk=desk,
        request=request,
        standing=standing,
        terms=terms_of(request, desk.policy),
        end=desk.end(request),
        earlier=decision_rows([each for each in desk.decisions if each.name == request.name]),
        csrf=csrf,
    )


def pause_page(desk: OwnerDesk, csrf: str) -> str:
    """Return the page on which a device is paused, or goes on."""
    return _rendered("pause.html.jinja", desk=desk, csrf=csrf)


def sign_in_page(name: str, fault: str = "") -> str:
    """Return the page that asks for a role's passphrase; `fault` says why an earlier one was not taken."""
    return _rendered("sign_in.html.jinja", name=name, fault=fault)


def message_page(title: str, text: str, back: str) -> str:
    """Return a page with one sentence and a link back."""
    return _rendered("message.html.jinja", title=title, text=text, back=back)


def terms_of(request: OwnerRequest, policy: OwnerPolicy) -> list[Term]:
    """Return a request's terms beside the limits of the owner's policy."""
    trusted = "any mode" if policy.trust_server else "no single update for the server"
    budget = f"epsilon {policy.target_epsilon:g} at delta {policy.target_delta:g}"
    limits = {
        "privacy": trusted,
        "noise multiplier": f"at least {policy.minimum_noise_multiplier:g}",
        "clipping norm": f"at most {policy.maximum_clipping_norm:g}",
        "cohort": f"at least {policy.minimum_cohort} members",
        "epochs in a round": f"at most {policy.maximum_local_epochs}",
        "purposes": ", ".join(policy.purposes) or "none",
        "purposes beside training": ", ".join(policy.purposes) or "none",
        "budget of records": budget,
        "cost of one answer": f"all answers together: {budget}",
        "layers that stay here": "allowed" if policy.own_layers else "not allowed",
    }
    return [Term(name, value, limits.get(name, "")) for name, value in request.terms.items()]


def data_sets(desk: OwnerDesk) -> Iterator[LedgerSpend]:
    """Yield what each ledger of the device has spent.

    Raises:
      Refusal: a ledger is damaged.
    """
    limit, delta = desk.policy.target_epsilon, desk.policy.target_delta
    for name, spending in spent_on(desk.state / LEDGERS).items():
        spent = spending.spent.epsilon if spending.spent else 0.0
        # Records without a ledger of their own pay for what their client released.
        paths = (desk.state / LEDGERS).glob(f"{name}.ledger")
        runs = [cost for path in paths for cost in run_costs(path, delta)]
        title = "the whole client" if name.startswith("client-") else "its records"
        share = min(100.0, 100 * spent / limit)
        yield LedgerSpend(title, spent, max(0.0, limit - spent), limit, delta, share, runs)


def run_costs(path: Path, delta: float) -> list[RunCost]:
    """Return the runs and questions on a ledger, the last first, with the cost of each by itself."""
    book, groups = read_ledger(path), dict[str, list[LedgerRelease]]()
    for booked in book.releases.values():
        if booked.state is not ReleaseState.VOID and booked.source != OF_CLIENT:
            groups.setdefault(request_name(run_of(booked.entry)), []).append(booked)
    adjacency = Adjacency(book.identity["adjacency"])
    newest = list(groups.items())[: -MAX_ROWS - 1 : -1]
    return [RunCost(name, len(each), _cost(each, delta, adjacency)) for name, each in newest]


def _cost(releases: Sequence[LedgerRelease], delta: float, adjacency: Adjacency) -> str:
    """Return the epsilon of releases together, against the adversary with the largest loss."""
    counts: dict[Adversary, Counter[str]] = {}
    for booked in releases:
        for adversary, text in booked.events.items():
            counts.setdefault(adversary, Counter())[text] += 1
    epsilons: list[float] = []
    for each in counts.values():
        exact = exact_epsilon(each, delta, adjacency)
        events = [event_of(text) for text in each.elements()] if exact is None else []
        epsilons.append(spent_epsilon(events, delta, adjacency, None) if exact is None else exact)
    return f"{max(epsilons, default=0.0):.3g}"


def answered_questions(desk: OwnerDesk) -> list[tuple[str, str, str, str]]:
    """Return name, purposes, reason and cost of the questions that the device has answered, the last first."""
    rows: list[tuple[str, str, str, str]] = []
    for path in sorted((desk.state / LEDGERS).glob("*.ledger")):
        rows += [
            (each.name, ", ".join(each.purposes), each.reason, f"{each.epsilon:.3g}")
            for each in questions_of(path)
            if each.state != "void"
        ]
    return rows[: -MAX_ROWS - 1 : -1]


def decision_rows(decisions: Sequence[OwnerDecision]) -> list[OwnerDecision]:
    """Return the last decisions, newest first."""
    return list(decisions[: -MAX_ROWS - 1 : -1])


def style() -> str:
    """Return the style of all pages."""
    return (HERE / STYLE).read_text(encoding="utf-8")


@cache
def style_hash() -> str:
    """Return the hash by which a content security policy allows the style: SHA-256 in base64."""
    return base64.b64encode(hashlib.sha256(style().encode()).digest()).decode()


def _rendered(template: str, **values: object) -> str:
    """Return the text of a template; every value is escaped."""
    from markupsafe import Markup

    return template_of(HERE, template).render(style=Markup(style()), RUN=RUN, ROSTER=ROSTER, **values)
