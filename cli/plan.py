"""``fedveil plan``: what a budget affords, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..configs.schema import SimulationSettings
from ..privacy.budget import Adversary, Budget
from ..privacy.plan import Plan
from ..server.run.build import build
from ..server.run.client_instructions import client_settings
from ..server.run.client_plan import client_plan, metrics_share_of
from ..server.run.display import console_for
from ..server.run.federation import EVERYBODY, UNLIMITED_EPSILON, Federation
from ..strategies.cohorts import likely_participations
from ..strategies.record_plan import record_plan

STEPS = 10  # epsilon is shown after every tenth of the rounds
VACUOUS_CLIENTS = 30  # below, hiding one client leaves little of what a mean can say
VACUOUS_NOISE = 0.5  # noise on the mean, in clipping norms, beyond which an update drowns
WEAK_EPSILON = 10.0  # e^10: one person changes the odds of a conclusion up to 22 000 times


def show_plan(settings: SimulationSettings) -> int:
    """Print the plan and return the exit code."""
    federation = build(settings)
    console = console_for(100)
    plans = list(plans_of(federation))
    if not plans:
        console.print("privacy=none: nothing is hidden from anybody; epsilon is infinite.", style="red")
    for number, (plan, budget, rounds) in enumerate(plans):
        if number:
            console.print()
        _show(console, federation, plan, budget, rounds)
    return 0


def plans_of(federation: Federation) -> Iterator[tuple[Plan, Budget, int]]:
    """Yield each unit's calibrated plan, its budget, and how many rounds of the run one unit pays for."""
    num_rounds = federation.settings.num_rounds
    client = client_plan(federation)
    if client is not None:
        assert federation.client_budget is not None
        yield client, federation.client_budget, num_rounds
    if federation.record is not None:
        assert federation.record_budget is not None
        told = client_settings(federation, Path())
        assert told.record is not None
        most = likely_participations(federation.cohort, federation.num_clients, num_rounds)
        plan = record_plan(told.record, federation.sizes[0], told)
        yield replace(plan, num_rounds=most), federation.record_budget, most


def curve(plan: Plan, delta: float, rounds: int) -> list[tuple[int, float]]:
    """Return (round, epsilon) after every tenth of the rounds."""
    marks = sorted({max(1, round(rounds * k / STEPS)) for k in range(1, STEPS + 1)})
    return [(mark, plan.epsilon(delta, mark)) for mark in marks]


def _show(console: Console, federation: Federation, plan: Plan, budget: Budget, rounds: int) -> None:
    unlimited = budget.target_epsilon >= UNLIMITED_EPSILON
    target = "no target" if unlimited else f"epsilon {budget.target_epsilon:g}"
    console.print(
        f"[bold]Unit: one {plan.unit}[/bold]   {target} at delta {budget.target_delta:g}, {plan.adjacency}"
    )
    console.print(
        f"noise_multiplier {plan.noise_multiplier:.4f} (noise / sensitivity), clip {plan.clipping_norm:g}, "
        f"sampling: {plan.sampling.name}"
    )
    console.print(_how_counted(federation, plan, budget))
    if plan.mechanism.described:
        console.print(plan.mechanism.described)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rounds", justify="right")
    for adversary in EVERYBODY:
        table.add_column(f"epsilon to {adversary}", justify="right")
    for mark, value in curve(plan, budget.target_delta, rounds):
        table.add_row(str(mark), *(_cell(plan, adversary, value) for adversary in EVERYBODY))
    console.print(table)
    if plan.unit == "record":
        console.print(
            f"Rounds are those that one client takes part in, likely at most {rounds} of the run's "
            f"{federation.settings.num_rounds}."
        )
    if not unlimited:
        affordable = plan.affordable_rounds(budget)
        ends = "; the run ends there" if affordable < rounds else ""
        console.print(f"At this noise the budget affords {affordable} rounds{ends}.")
    if plan.unit == "client":
        console.print(_metrics(federation, plan))
    for sentence in warnings_for(federation, plan, budget):
        console.print(sentence, style="yellow")


def _how_counted(federation: Federation, plan: Plan, budget: Budget) -> str:
    accountant = plan.accountant(budget.target_delta)
    if plan.filter_order is not None:
        return f"Noise is chosen as rounds are released: {accountant}. It promises the whole budget."
    client = federation.client if plan.unit == "client" else None
    clip = "; the clip moves, and the noise with it" if client and client.clipping == "adaptive" else ""
    return f"Fixed in advance{clip}: {accountant}."


def _metrics(federation: Federation, plan: Plan) -> str:
    share = metrics_share_of(federation, plan)
    if share == 0:
        return "No metrics leave a client."
    cost = 1 - math.sqrt(1 - share)
    return f"Loss and count travel in the sum, under the same noise: they cost the update {cost:.1%} of its norm."


def _cell(plan: Plan, adversary: Adversary, value: float) -> str:
    return f"{value:.3f}" if adversary in plan.adversaries else "infinite"


def warnings_for(federation: Federation, plan: Plan, budget: Budget) -> list[str]:
    """Return in words what the numbers do not say by themselves."""
    sentences: list[str] = []
    clients = federation.num_clients
    if plan.unit == "client":
        sentences.append(_trust(federation, clients))
        noise = plan.noise_std / plan.clipping_norm / federation.cohort.expected_size(clients)
        if clients < VACUOUS_CLIENTS or noise > VACUOUS_NOISE:
            sentences.append(
                f"This guarantee is vacuous in practice: with {clients} clients the noise on the mean is {noise:.2g} "
                "clipping norms, so hiding a whole client hides what there is to learn. Use privacy=record."
            )
    else:
        sentences.append("Client sampling hides no record: it shows in messages and models who took part.")
        sentences.append("A person whose records are at two clients is outside this promise.")
    if WEAK_EPSILON < budget.target_epsilon < UNLIMITED_EPSILON:
        odds = math.exp(min(budget.target_epsilon, 700))
        sentences.append(
            f"Epsilon {budget.target_epsilon:g} is weak: the odds of any conclusion may change {odds:.2g} times."
        )
    return sentences


def _trust(federation: Federation, clients: int) -> str:
    masking = federation.masking
    if masking is None:
        return (
            "The server is trusted in this mode: it sees single updates, so against it epsilon is infinite."
        )
    expected = round(federation.cohort.expected_size(clients))
    attendance = masking.attendance(expected)
    return (
        f"The server sees sums alone: of {expected} clients at least {attendance.least} must answer, or nothing is "
        f"released. The noise of {attendance.colluders} of them is not counted: they may work for the server."
    )


def as_json(federation: Federation) -> list[dict[str, Any]]:
    """Return the plans as plain data."""
    return [
        {
            "unit": str(plan.unit),
            "noise_multiplier": plan.noise_multiplier,
            "accountant": plan.accountant(budget.target_delta),
            "epsilon": curve(plan, budget.target_delta, rounds),
            "affordable_rounds": plan.affordable_rounds(budget),
            "warnings": warnings_for(federation, plan, budget),
        }
        for plan, budget, rounds in plans_of(federation)
    ]
