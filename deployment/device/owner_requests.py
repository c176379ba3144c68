"""Requests of a server that the device's owner sees: what is trained or asked here, on which terms, and since when.

A request has an identity: kind, name, noise, and a hash of all else that an order fixes for a whole run. Another epoch,
another purpose or another question is another request. Less noise is not covered by a decision on more of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

from flwr.app import RecordDict

from ...base.bounded_decoding import plain_of, read_json_file
from ...base.durable_files import replace_file
from ...base.refusal import OneOf
from ...messages.training_order import NEW, TrainingOrder
from ...messages.wire import SECURE_RECORD, read_attempt, read_round
from ...privacy.accounting.gaussian import gaussian_epsilon
from ...privacy.budget import Unit
from ...privacy.mechanisms.sum_spec import TRAINING
from ...privacy.secagg.client import read_state
from ...privacy.secagg.roster_change import RosterChange
from ...privacy.secagg.transcript import AttemptTerms, run_number
from ...privacy.statistics.evaluation import Evaluation
from ...privacy.statistics.inquiry import Inquiry
from ...questions.wire import Request as Question
from ...strategies.identity import Identity
from .order_policy import Instruction

FILE = "requests.json"  # in the state folder; written by the agent alone
RUN, QUESTION, ROSTER = KINDS = ("run", "question", "roster")
MAX_REQUESTS = 100  # stored; the oldest are dropped, and wait anew where they come again
ID_LENGTH = 12  # characters
HIDDEN = {Unit.CLIENT: "this whole client", Unit.RECORD: "each single row"}
# Keys of an order that arms of one run try, or that its rounds change, at no cost to privacy.
VARYING = ("learning_rate", "schedule", "optimizer", "arm", "moments")


@dataclass(frozen=True)
class OwnerRequest:
    """Request as its owner decides on it. All of it is public.

    Attributes:
      kind: of `KINDS`.
      name: of the run or the question, without the part that a resumed run adds; of a roster its version.
      digest: SHA-256 of its terms except the noise, in hexadecimal.
      noise: standard deviation of the noise over the clipping norm; 0 where the device plans its own within a budget.
      terms: what the owner reads, by the name of the term.
      at: time at which the device saw it first, UTC in ISO 8601.
    """

    kind: Annotated[str, OneOf(KINDS)]
    name: str
    digest: str
    noise: float
    terms: Mapping[str, str]
    at: str

    @property
    def id(self) -> str:
        """Characters by which its owner names it."""
        identity = json.dumps([self.kind, self.name, self.digest, self.noise])
        return hashlib.sha256(identity.encode()).hexdigest()[:ID_LENGTH]


@dataclass(frozen=True)
class StoredRequests:
    """Content of the file `FILE`, oldest first."""

    requests: tuple[OwnerRequest, ...] = ()


def request_name(run: str) -> str:
    """Return the name of a run or question for its owner, without the parts that a server adds for fresh noise."""
    return " ".join(word.partition(NEW)[0] for word in run.split(" "))


def request_of(instruction: Instruction, delta: float, task: str) -> OwnerRequest:
    """Return the request in an instruction that the policy allows.

    Args:
      instruction: of a server.
      delta: of the owner's budget, at which the cost is shown.
      task: name of the owner's task.
    """
    order, inquiry = instruction.order, instruction.inquiry
    noise = noise_of(instruction)
    purposes = sorted({f"{each.name}: {each.purpose}" for each in instruction.spec.segments})
    fixed = {name: value for name, value in json.loads(order.to_json()).items() if name not in VARYING}
    fixed["run"] = request_name(order.run)
    if order.client is not None:
        fixed["client"] = str(order.client.adjacency)
    is_masked = instruction.terms is not None
    content = [fixed, purposes, is_masked, [] if inquiry is None else _of_all_rounds(inquiry)]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    terms = dict(_terms(instruction, noise, delta, task))
    return OwnerRequest(RUN if inquiry is None else QUESTION, fixed["run"], digest, noise, terms, _now())


def noise_of(instruction: Instruction) -> float:
    """Return the noise that an instruction promises, over the clipping norm; 0 where the device plans its own."""
    order, terms = instruction.order, instruction.terms
    if terms is not None:
        return terms.noise_multiplier
    if instruction.client_noise is not None:
        return instruction.client_noise
    return order.client.noise_multiplier * order.client.adjacency.distance if order.client else 0.0


def _of_all_rounds(question: Question) -> Any:
    """Return a question as plain data, the same in all rounds of a search for words, and in a resumed run."""
    plain = json.loads(question.text)
    plain["name"] = request_name(str(plain.get("name", "")))
    for each in plain.get("ask", ()):
        each.pop("prefixes", None)
    return plain


def _terms(instruction: Instruction, noise: float, delta: float, task: str) -> Iterator[tuple[str, str]]:
    """Yield what the owner reads, each with its name; arguments as of `request_of`."""
    order, spec, terms, inquiry = instruction.order, instruction.spec, instruction.terms, instruction.inquiry
    if inquiry is not None:
        yield from _question_terms(inquiry)
    yield "task", task
    yield "privacy", str(order.privacy)
    if noise:
        yield "noise multiplier", f"{noise:.4g}"
        epsilon = gaussian_epsilon(1 / noise, delta)
        yield "cost of one answer", f"at most epsilon {epsilon:.3g} at delta {delta:g}"
    if order.record is not None:
        budget = order.record.budget
        yield "budget of records", f"epsilon {budget.target_epsilon:g} at delta {budget.target_delta:g}"
    norm = spec.unit_norm or spec.clipping_norm
    yield "clipping norm", "none" if norm is None else f"{norm:.4g}"
    if terms is not None:
        yield "cohort", f"{terms.cohort_size} members, of whom {terms.minimum_survivors} must stay; masked"
    if inquiry is None:
        yield from _training_terms(order)
    purposes = {each.purpose for each in spec.segments if each.purpose != TRAINING}
    purposes |= set() if inquiry is None else {inquiry.purpose}
    yield "purposes beside training" if inquiry is None else "purposes", ", ".join(sorted(purposes)) or "none"


def _training_terms(order: TrainingOrder) -> Iterator[tuple[str, str]]:
    """Yield the terms of training, each with its name."""
    training = order.training
    yield "epochs in a round", str(training.local_epochs)
    yield "batch size", str(training.batch_size)
    if order.held_out is not None:
        yield "held out for evaluation", f"{order.held_out:g}"
    if order.own_layers is not None:
        yield "layers that stay here", ", ".join(order.own_layers.patterns)


def _question_terms(question: Question) -> Iterator[tuple[str, str]]:
    """Yield the terms of a question, each with its name."""
    yield "why it is asked", question.why or "no reason was given"
    yield "hides", HIDDEN.get(question.unit, f"a {question.unit}")
    match question:
        case Inquiry():
            for each in json.loads(question.text)["ask"]:
                details = {key: value for key, value in each.items() if key not in ("kind", "name")}
                plain = "; ".join(f"{key}: {_joined(value)}" for key, value in details.items())
                yield (
                    f"asks {each.get('name', '')}".rstrip(),
                    "; ".join(filter(None, (str(each.get("kind")), plain))),
                )
        case Evaluation():
            yield "asks", f"{', '.join(question.figures)} of the model, by {question.metric}"


def _joined(value: object) -> str:
    """Return a value of a question as text, a list without brackets."""
    return ", ".join(map(str, cast(list[object], value))) if isinstance(value, list) else str(value)


def roster_request(change: RosterChange) -> OwnerRequest:
    """Return a change of the roster that waits, as a request."""
    terms = {
        "members": str(change.members),
        "added": _listed(change.added),
        "removed": _listed(change.removed),
    }
    return OwnerRequest(ROSTER, f"version {change.version}", change.hash, 0.0, terms, change.at)


def _listed(members: tuple[str, ...]) -> str:
    return "; ".join(members) or "nobody"


def read_requests(state: Path) -> tuple[OwnerRequest, ...]:
    """Return the stored requests, oldest first; none if they cannot be read, so that each waits anew."""
    stored = read_json_file(StoredRequests, state / FILE) or StoredRequests()
    return stored.requests


def store_request(state: Path, request: OwnerRequest) -> OwnerRequest:
    """Store a request unless it is; return the stored one, which has the time of its first sight.

    Raises:
      OSError: it cannot be written.
    """
    earlier = read_requests(state)
    for each in earlier:
        if each.id == request.id:  # without a write, which each round would repeat
            return each
    stored = StoredRequests((*earlier, request)[-MAX_REQUESTS:])
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(state / FILE, (json.dumps(plain_of(stored)) + "\n").encode())
    return request


def agreed_terms(memory: bytes, identity: Identity, content: RecordDict) -> AttemptTerms | None:
    """Return the terms that a node agreed to in the attempt of an instruction; None for a sum in the clear, or without memory.

    Args:
      memory: of the node, sealed.
      identity: of the node.
      content: of the instruction.
    """
    if SECURE_RECORD not in content or not memory:
        return None
    (run, number), node = read_round(content), identity.participant()
    read_state(node, memory, identity.node_key)
    attempt = (run_number(run), number, read_attempt(content))
    agreed = (each.terms for each in node.attempts.values())
    return next((each for each in agreed if (each.run, each.round, each.attempt) == attempt), None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
