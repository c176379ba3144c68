"""Client's half of secure aggregation, as a Flower mod: it sends a masked vector, or the code of a reason.

It answers the protocol's messages for one node and calls the app once in an attempt, for the message with the model.
Between messages the node's memory is in Flower's context, sealed under a key that is never sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from ..base.refusal import Refusal
from ..messages.flower_adapter import config_of, records_of
from ..messages.secure_wire import answer, messages_of, model_hash, read_share_spec, rotation_seed, task_hash
from ..messages.wire import FAILED, only_arrays, sum_spec_of
from ..privacy.mechanisms.distributed import add_grid_noise, encode_share, openings
from ..privacy.mechanisms.randomness import KEY_BYTES, Randomness
from ..privacy.mechanisms.sizing import ShareSpec
from ..privacy.secagg.attempt import Openings, Work
from ..privacy.secagg.client import Participant, declined, read_state, write_state
from ..privacy.secagg.graph import colluders
from ..privacy.secagg.masks import Vector
from ..privacy.secagg.pair_keys import PairKeys
from ..privacy.secagg.refusal import Reason, Refused
from ..privacy.secagg.transcript import AttemptTerms
from ..strategies.identity import Identity
from .private_update import (
    Charge,
    NotTrained,
    answer_of,
    or_of_zeros,
    uncharged,
    update_of,
    values_of,
    without_error,
)

logger = logging.getLogger("fedveil.client")

STATE_RECORD, STATE = "fedveil.node", "sealed"  # of Flower's context: the node's encrypted memory
NOISE_TOLERANCE = 1e-9  # relative, between two ways to compute one ratio in floating point


class NodeMemory(Protocol):
    """Memory of a node between two messages of the protocol."""

    def restore(self, identity: Identity, context: Context) -> Participant:
        """Return the protocol's participant for this node, with its memory of earlier messages."""
        ...

    def store(self, node: Participant, identity: Identity, context: Context) -> None:
        """Store the memory of a node in Flower's context."""
        ...


class SealedMemory:
    """Memory of a node in Flower's context, sealed under a key that is never sent."""

    def restore(self, identity: Identity, context: Context) -> Participant:
        """Return the participant, as `NodeMemory`."""
        node = identity.participant()
        if record := config_of(context.state, STATE_RECORD):
            sealed = record[STATE]
            assert isinstance(sealed, bytes)
            read_state(node, sealed, identity.node_key)
        return node

    def store(self, node: Participant, identity: Identity, context: Context) -> None:
        """Store the memory, as `NodeMemory`."""
        context.state[STATE_RECORD] = ConfigRecord({STATE: write_state(node, identity.node_key)})


class SharedMemory:
    """Memory of nodes that this process simulates: their participants, which share the keys of their pairs.

    The context says only that its node keeps state here, so that an engine sends the node's messages to this process.
    """

    def __init__(self) -> None:
        self._nodes: dict[int, Participant] = {}
        self._pairs = PairKeys()

    def restore(self, identity: Identity, context: Context) -> Participant:
        """Return the participant, as `NodeMemory`; a context without state is of a node that has forgotten."""
        if not config_of(context.state, STATE_RECORD):
            self._nodes[identity.node] = identity.participant()
        node = self._nodes[identity.node]
        node.policy, node.agree = identity.policy, self._pairs.agree
        return node

    def store(self, node: Participant, identity: Identity, context: Context) -> None:
        """Note in the context that the node keeps state."""
        context.state[STATE_RECORD] = ConfigRecord({STATE: b""})


SEALED_MEMORY = SealedMemory()


def secure_update(
    identity: Identity,
    randomness: Randomness,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
    charge: Charge = uncharged,
    memory: NodeMemory = SEALED_MEMORY,
) -> Message:
    """Answer one exchange of secure aggregation; refuse any other instruction.

    Args:
      identity: of the node.
      randomness: source of the noise shares.
      message: the instruction.
      context: Flower's, of this node; holds its encrypted state.
      call_next: the app, or the next mod.
      charge: charges the device's own ledger.
      memory: of the node between messages.

    Returns:
      The reply: the protocol's messages, or an error with a code and no detail.
    """
    requests = messages_of(message.content)
    if requests is None:
        return Message(Error(FAILED, "this client answers secure aggregation only"), reply_to=message)
    job = TrainingJob(identity, randomness, message, context, call_next, charge)
    return answer_of(message, lambda: _answered(job, requests, memory))


def _answered(job: TrainingJob, requests: Sequence[bytes], memory: NodeMemory) -> Message:
    """Return the reply to `requests`, an instruction's protocol messages; store the node's memory, even after a failure."""
    identity, message, context = job.identity, job.message, job.context
    node = memory.restore(_for_vectors(identity, message.content), context)
    try:
        work = job.work(node) if records_of(message.content, ArrayRecord) else None
        replies = [_handled(node, each, work) for each in requests]
    finally:
        memory.store(node, identity, context)
    codes = [reply for reply in replies if isinstance(reply, int)]  # of messages that failed
    if codes and len(requests) == 1:
        return Message(Error(codes[0], "the client did not train"), reply_to=message)
    messages = [b"" if isinstance(reply, int) else reply for reply in replies]
    return Message(answer(messages, *codes[:1]), reply_to=message)


def _for_vectors(identity: Identity, content: RecordDict) -> Identity:
    """Return the identity with a policy that bounds a whole vector, where a vector is the sum of several records' parts.

    The owner's policy then bounds the norm of one record's part (`unit_norm`), and the clipping norm in the terms is only
    the range of a vector. `_agreed_spec` later ensures that the vector is made for the spec that is read here.
    """
    try:
        spec = sum_spec_of(content)
    except (ValueError, KeyError):  # refused with a reason when a vector is requested
        return identity
    if spec.unit_norm is None or spec.clipping_norm is None:
        return identity
    # In this order the norm of a part that is exactly the policy's largest is not rounded above it.
    max_norm = spec.clipping_norm * (identity.policy.maximum_clipping_norm / spec.unit_norm)
    return replace(identity, policy=replace(identity.policy, maximum_clipping_norm=max_norm))


def _handled(node: Participant, message: bytes, work: Work | None) -> bytes | int:
    """Return the reply to one message, or the code of the reason; other messages of the instruction are still answered."""
    try:
        return node.handle(message, int(time.time()), work)
    except Refused as refused:
        logger.warning("node %s stops: %s", node.node, refused)
        return declined(refused)
    except NotTrained as error:
        return error.code
    except Exception:
        # What failed may depend on the data: nobody but the owner may read it.
        logger.exception("round failed at this client")
        return FAILED


@dataclass(frozen=True)
class OwnNoise:
    """Noise of a vector if only peers that the owner trusts count as honest.

    Attributes:
      sigma: standard deviation of this node's own noise in addition to its share, in grid units.
      multiplier: noise of the sum over the sensitivity that is guaranteed, and charged.
    """

    sigma: int
    multiplier: float


@dataclass(frozen=True)
class TrainingJob:
    """Arguments of `secure_update` for one instruction: training runs once the protocol asks for the vector."""

    identity: Identity
    randomness: Randomness
    message: Message
    context: Context
    call_next: ClientAppCallable
    charge: Charge

    def work(self, node: Participant) -> Work:
        """Return what the protocol computes or calls for a node in a round; the cohort of the sum is in the node's memory."""
        return Work(
            model_hash(self.message.content),
            lambda terms: self._vector(terms, node),
            lambda terms: self._noise(self._spec(terms), terms, node).sigma,
        )

    def _spec(self, terms: AttemptTerms) -> ShareSpec:
        return _agreed_spec(self.message.content, terms, self.identity.policy.collusion)

    def _noise(self, spec: ShareSpec, terms: AttemptTerms, node: Participant) -> OwnNoise:
        """Return the node's own noise that guarantees the promised noise even if all members that it does not trust collude.

        If the grid has no room for it, none is added, and the node is charged for the noise that its share guarantees.

        Raises:
          Refused: POLICY; that noise is below the owner's minimum.
        """
        policy = self.identity.policy
        if not policy.peers:
            return OwnNoise(0, terms.noise_multiplier)
        cohort = next(each.candidates for each in node.attempts.values() if each.terms == terms)
        others = [each for each in cohort if each != self.identity.node]
        trusted = self.identity.roster.holders(policy.peers, others)
        outsiders = len(others) - len(trusted)
        if outsiders >= terms.threshold:  # they open this vector alone, without the noise of its peers
            outsiders = len(others)
        sigma = spec.missing_sigma(outsiders, terms.noise_multiplier)  # below 0 if the grid has no room
        multiplier = spec.single_noise(outsiders) if sigma < 0 else terms.noise_multiplier
        if multiplier < policy.minimum_noise_multiplier:
            reason = "minimum_noise_multiplier is not met without the noise of untrusted members"
            raise Refused(Reason.POLICY, reason)
        return OwnNoise(max(sigma, 0), multiplier)

    def _vector(self, terms: AttemptTerms, node: Participant) -> tuple[Vector, Openings]:
        """Charge the device's ledger, train, and return the noised vector, with the seeds of its layers, opened if many survive."""
        content = self.message.content
        spec = self._spec(terms)
        noise = self._noise(spec, terms, node)
        received = dict(only_arrays(content).items())  # the app may modify its input
        seed = rotation_seed(model_hash(content), terms.round)
        with self.charge(content, replace(terms, noise_multiplier=noise.multiplier)):
            reply = without_error(self.call_next(self.message, self.context))
            update = update_of(reply, received, content, spec.sum)
            values = values_of(reply)
            stream = self.randomness.stream("share", terms.round, terms.attempt, self.identity.node)
            layers = [stream.bytes(KEY_BYTES) for _ in spec.layers]
            words = or_of_zeros(
                lambda arrays: encode_share(arrays, values, spec, stream, seed, layers)[0], update
            )
            del reply, update
            if noise.sigma:
                add_grid_noise(words, noise.sigma, [stream])
            return cast(Vector, words), openings(spec, layers)


def _agreed_spec(content: RecordDict, terms: AttemptTerms, collusion: float) -> ShareSpec:
    """Return the spec in the model's message, if the cohort agreed on it and it gives the promised noise.

    The spec must give that noise even if as many nodes collude as the owner or the server, whoever fears more, assumes.

    Raises:
      Refused: POLICY; the spec is missing, unsafe, or other than the terms.
    """
    try:
        spec = read_share_spec(content)
    except (Refusal, ValueError, KeyError) as error:
        raise Refused(Reason.POLICY, "the vector's spec is missing or unsafe") from error
    _check_spec(spec, terms, collusion)
    return spec


@lru_cache(maxsize=16)  # asked twice for a vector, and by all nodes of one process
def _check_spec(spec: ShareSpec, terms: AttemptTerms, collusion: float) -> None:
    """Refuse a spec as `_agreed_spec` does."""
    attendance = spec.attendance
    assumed = max(colluders(terms.cohort_size, collusion), attendance.colluders)
    promised = terms.noise_multiplier * (1 - NOISE_TOLERANCE)
    demands = {
        "task_hash": task_hash(spec) == terms.task_hash,
        "bits": spec.bits == terms.bits,
        "step": spec.sum.step == terms.step,
        "clipping_norm": spec.sum.clipping_norm == terms.clipping_norm,
        "most": attendance.most >= terms.cohort_size,
        "minimum_survivors": attendance.least <= terms.minimum_survivors,
        "noise_multiplier": attendance.least > assumed and spec.min_noise(assumed) >= promised,
    }
    for name, met in demands.items():
        if not met:
            raise Refused(Reason.POLICY, f"{name} of the spec differs from the terms")
