"""Checks of a server's order by a device: its owner's policy, its arm and its roster; and the cost of following the order."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import RecordDict

from ...base.bounded_decoding import Undecodable, read_json
from ...base.durable_files import replace_file
from ...base.refusal import Refusal
from ...client.private_update import NotTrained
from ...messages.training_order import (
    CENTRAL_MODES,
    STEP_MODES,
    ClientClaim,
    ModeName,
    TrainingOrder,
    display_name,
    read_order,
)
from ...messages.wire import FAILED, OWNERS_POLICY, read_attempt, read_round, sum_spec_of
from ...privacy.accounting.events import Gaussian, gaussian_event
from ...privacy.arms import Arm
from ...privacy.budget import Adjacency, Adversary, Budget, Unit
from ...privacy.mechanisms.sum_spec import TRAINING, SumSpec
from ...privacy.secagg.roster import Roster
from ...privacy.secagg.transcript import AttemptTerms, run_number
from ...privacy.statistics.evaluation import Evaluation
from ...questions.wire import Request, client_noise_of, question_of
from .owner_policy import OwnerPolicy

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

logger = logging.getLogger("fedveil.client")

MODES_OF_QUESTIONS = {  # modes that protect the unit of a question
    Unit.CLIENT: (ModeName.CLIENT_CENTRAL, ModeName.CLIENT_DISTRIBUTED),
    Unit.RECORD: (ModeName.RECORD, ModeName.RECORD_DISTRIBUTED),
}
TRUSTED = (Adversary.CLIENTS, Adversary.MODEL)  # without the server, which sees this client's update
DEALS = (
    "deals.json"  # in the state folder: by run the deal's key, its number of arms, and the device's own arm
)
MAX_RUNS = 1000  # stored runs; the oldest are dropped


@dataclass(frozen=True)
class Cost:
    """Cost of one vector to the client, or to each of its records.

    Attributes:
      event: privacy event of the sum that the vector is part of.
      adversaries: that see that sum; the cost is charged against each.
      budget: of the records; None if the client is charged, within the owner's cap.
      inquiry: that the vector answers; None for training.
      is_of_records: whether the vector comes from steps for which the records have paid, so that they pay only once.
    """

    event: Gaussian | DpEvent
    adversaries: tuple[Adversary, ...]
    budget: Budget | None = None
    inquiry: Request | None = None
    is_of_records: bool = False


@dataclass(frozen=True)
class Instruction:
    """Instruction of a server, as a device reads it.

    Attributes:
      content: as it came.
      terms: of the attempt, as its cohort signed them and the owner's policy for secure aggregation accepted them; None
        if the vector is not masked.
      order: of the training.
      spec: of the sum.
      inquiry: that is to be answered; None for training.
      client_noise: std of noise that the client itself adds, over a record's norm; None where the sum has the noise.
    """

    content: RecordDict
    terms: AttemptTerms | None
    order: TrainingOrder
    spec: SumSpec
    inquiry: Request | None
    client_noise: float | None


def accept_order(
    content: RecordDict, terms: AttemptTerms | None, policy: OwnerPolicy, can_protect_records: bool
) -> tuple[TrainingOrder, Cost | None]:
    """Return an instruction's order and its cost to the client; arguments and errors as of `accept_instruction`.

    The cost is None if records are protected instead of the client.
    """
    instruction = accept_instruction(content, terms, policy, can_protect_records)
    return instruction.order, cost_of(instruction)


def accept_instruction(
    content: RecordDict, terms: AttemptTerms | None, policy: OwnerPolicy, can_protect_records: bool
) -> Instruction:
    """Return an instruction that the owner's policy allows.

    Args:
      content: the instruction.
      terms: as in `Instruction`.
      policy: the owner's.
      can_protect_records: whether this device can train by DP-SGD.

    Raises:
      NotTrained: OWNERS_POLICY. Only the device's log gives the reason.
    """
    try:
        order = read_order(content)
        if order is None:
            raise Refusal("order", None, "this server sent no training order")
        spec, inquiry, client_noise = sum_spec_of(content), question_of(content), client_noise_of(content)
        instruction = Instruction(content, terms, order, spec, inquiry, client_noise)
        for field, value, limit in _violations(instruction, policy, can_protect_records):
            raise Refusal(field, value, f"the owner's policy does not allow it: {limit}")
        _check_purposes(instruction, policy)
    except (Refusal, ValueError, KeyError, TypeError) as error:
        logger.warning("an order is not followed: %s", error)
        raise NotTrained(OWNERS_POLICY) from error
    return instruction


def require_cohorts_roster(order: TrainingOrder, terms: AttemptTerms | None, roster: Roster) -> None:
    """Check that the roster is that of the attempt's terms if it decides which clients train on each person.

    Raises:
      NotTrained: FAILED; the device has adopted a newer one since the cohort agreed.
    """
    is_chosen = order.record is not None and order.record.clients_per_person is not None
    if terms and is_chosen and terms.roster_hash != roster.hash:
        logger.warning("an order cannot be followed: the roster has changed since the cohort agreed")
        raise NotTrained(FAILED)


def cost_of(instruction: Instruction) -> Cost | None:
    """Return what an instruction costs the client; None if records are protected instead of it."""
    order, terms, inquiry = instruction.order, instruction.terms, instruction.inquiry
    record = order.record
    if terms and record and record.sample_rate is not None:
        from ...strategies.record_plan import PoissonBatches  # dp_accounting, not needed by other modes

        sampling = PoissonBatches(record.sample_rate, 1, of_unit=record.records_of_unit)
        event = sampling.event(gaussian_event(terms.noise_multiplier))
        return Cost(event, tuple(Adversary), record.budget, inquiry)
    if terms and order.privacy is ModeName.CLIENT_DISTRIBUTED:
        return Cost(Gaussian(terms.noise_multiplier), tuple(Adversary), inquiry=inquiry)
    if inquiry and record and instruction.client_noise is not None:  # 0 as well, which costs without end
        return Cost(Gaussian(instruction.client_noise), tuple(Adversary), record.budget, inquiry)
    if order.client is None:
        return None
    is_of_records = bool(record) and not inquiry  # records pay for their own steps, before those are summed
    return Cost(Gaussian(noise_over_clip(order.client)), TRUSTED, None, inquiry, is_of_records)


def _check_purposes(instruction: Instruction, policy: OwnerPolicy) -> None:
    """Refuse a vector with a segment for a forbidden purpose, or a question that differs from its description.

    Raises:
      Refusal: naming the purpose, or the part that does not belong to the question.
    """
    order, spec, inquiry = instruction.order, instruction.spec, instruction.inquiry
    purposes = [each.purpose for each in spec.segments if each.purpose != TRAINING]
    for purpose in purposes if inquiry is None else [*purposes, inquiry.purpose]:
        if purpose not in policy.purposes:
            allowed = ", ".join(policy.purposes) or "none"
            raise Refusal("purpose", purpose, f"the owner's policy allows questions for: {allowed}")
    if inquiry is None:
        return
    if order.privacy not in MODES_OF_QUESTIONS[inquiry.unit]:
        raise Refusal("privacy", str(order.privacy), f"does not protect a {inquiry.unit}, as asked for")
    if order.record and order.record.budget.unit is not inquiry.unit:
        remedy = "a question counts rows, and a person may have more rows than the order charges"
        raise Refusal("per_person", order.record.per_person, remedy)
    if isinstance(inquiry, Evaluation) and order.held_out != inquiry.share:
        raise Refusal("held_out", order.held_out, "is not the share of the evaluation")
    if not _is_vector_of(spec, inquiry, order, instruction.client_noise) or order.run != inquiry.name:
        raise Refusal("question", inquiry.name, "its vector and run are not those of the question")


def _is_vector_of(spec: SumSpec, inquiry: Request, order: TrainingOrder, client_noise: float | None) -> bool:
    """Return whether a sum's parameters match a question, and its noise is at the place that the privacy mode requires.

    If clients are protected, the sum has the noise and the question's segments. If records are, each client adds noise
    to its answer under `record`, and the sum does not clip it; under `record_distributed` the sum has the noise.
    """
    if inquiry.unit is Unit.CLIENT:
        return spec.segments == inquiry.segments and client_noise is None
    if order.privacy is ModeName.RECORD:
        if isinstance(inquiry, Evaluation):
            return False  # no client adds its own noise to a model's outputs on its records
        return client_noise is not None and spec.clipping_norm is None and spec.unit_norm is None
    if client_noise is not None or spec.unit_norm is None or spec.clipping_norm is None:
        return False
    expected = inquiry.spec_of_records(spec.unit_norm)
    return order.sample_rate == 1 and math.isclose(spec.clipping_norm, expected.clipping_norm or 0.0)


def noise_over_clip(claim: ClientClaim) -> float:
    """Return the claimed noise std over the clipping norm; replacing a client changes a sum by two norms."""
    return claim.noise_multiplier * claim.adjacency.distance


def _violations(
    instruction: Instruction, policy: OwnerPolicy, can_protect_records: bool
) -> Iterator[tuple[str, object, str]]:
    """Yield the field, its value and the policy's limit, for each limit that an order violates."""
    order, terms, spec = instruction.order, instruction.terms, instruction.spec
    noise = instruction.client_noise  # or that of the sum, where the server claims one; masks check their own
    run, number = read_round(instruction.content)
    epochs = order.training.local_epochs
    if run != order.run or (policy.runs and display_name(run) not in policy.runs):
        yield "run", run, f"runs = {list(policy.runs)}"
    if epochs > policy.maximum_local_epochs:
        yield "local_epochs", epochs, f"maximum_local_epochs = {policy.maximum_local_epochs}"
    if order.own_layers and not policy.own_layers:
        yield "own_layers", list(order.own_layers.patterns), "own_layers = false"
    if not _allowed(order.privacy, terms, policy):
        trusted = str(policy.trust_server).lower()
        limit = f"trust_server = {trusted}" if terms is None else "masks require shares of noise, or records"
        yield "privacy", str(order.privacy), limit
    if order.record and not can_protect_records and not instruction.inquiry:
        yield "record", None, "this client's task cannot protect single records"
    if order.record and order.record.adjacency is Adjacency.ADD_OR_REMOVE_ONE:
        # A client's sampling rate reveals its number of records.
        yield "record.adjacency", str(order.record.adjacency), "the number of records is public"
    if terms is not None:
        attempt = (run_number(run), number, read_attempt(instruction.content))
        if attempt != (terms.run, terms.round, terms.attempt):
            yield "terms", attempt, "the cohort signed other terms"
        sums_records = spec.unit_norm is not None
        if sums_records != (order.privacy in STEP_MODES):
            yield "unit_norm", spec.unit_norm, f"is not of privacy={order.privacy}"
        yield from _too_long(spec, policy)
    elif order.client:
        yield from _too_long(spec, policy)
        noise = noise_over_clip(order.client)
    if noise is not None and not noise >= policy.minimum_noise_multiplier:
        yield "noise_multiplier", noise, f"minimum_noise_multiplier = {policy.minimum_noise_multiplier:g}"


def _too_long(spec: SumSpec, policy: OwnerPolicy) -> Iterator[tuple[str, object, str]]:
    """Yield the clipping norm of a record, or of a client, if it is missing, not positive, or above the policy's."""
    norm = spec.unit_norm or spec.clipping_norm
    if norm is None or not 0 < norm <= policy.maximum_clipping_norm:
        yield "clipping_norm", norm, f"maximum_clipping_norm = {policy.maximum_clipping_norm:g}"


def _allowed(mode: ModeName, terms: AttemptTerms | None, policy: OwnerPolicy) -> bool:
    """Return whether the policy allows a mode: never without privacy, and shares of noise only with masks."""
    if terms:
        return mode in (ModeName.CLIENT_DISTRIBUTED, ModeName.RECORD, *STEP_MODES)
    return mode is ModeName.RECORD or (policy.trust_server and mode in CENTRAL_MODES)


def require_arm(arm: Arm, name: str, run: str, state: Path) -> None:
    """Refuse a round of another arm than this device's, or of a second one in its run, and record the first.

    A device in one arm loses only that arm's releases. A second deal of a run, or a new name, would put it into two.

    Args:
      arm: of the round, from the order.
      name: of the device in the roster.
      run: its name, the same after a resume.
      state: the device's folder.

    Raises:
      Refusal: the arm or the deal is another; the sentence names it.
    """
    if not arm.holds(name):
        remedy = f"this client is in arm {arm.deal.arm_of(name)} of that deal"
        raise Refusal("arm", arm.number, remedy)
    stored_deals, deal = _read_deals(state), [arm.deal.key, arm.deal.arms, arm.number]
    if stored_deals.get(run) == deal:
        return
    if stored_deals.setdefault(run, deal) != deal:
        raise Refusal("deal", arm.deal.key, f"run {run} already dealt its clients, and each has one arm")
    newest = dict(list(stored_deals.items())[-MAX_RUNS:])
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(state / DEALS, json.dumps(newest).encode())


def _read_deals(state: Path) -> dict[str, list[str | int]]:
    """Return the stored deals by run; see `DEALS`."""
    path = state / DEALS
    if not path.exists():
        return {}
    try:
        deals = read_json(path.read_text(encoding="utf-8"))
    except (Undecodable, UnicodeDecodeError) as error:
        raise Refusal("file", str(path), "cannot be read; restore it, or refuse runs that tune") from error
    if not isinstance(deals, dict):
        raise Refusal("file", str(path), "is not a list of deals; restore it")
    return deals
