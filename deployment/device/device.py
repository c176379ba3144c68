"""Deployed client: its owner's task, policy and ledgers, and one answer to each message of the server.

This module is independent of the transport. Before an answer is sent, the node's memory is on disk, sealed: a node that
forgot its answer could be asked again, and two vectors under one mask reveal their difference.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

from ...base.durable_files import replace_file
from ...base.refusal import Refusal, disk_failed, disk_remedy
from ...client.private_update import NotTrained, or_unchanged, private_update
from ...client.secure_update import STATE, STATE_RECORD, secure_update
from ...links.attestation import with_nonce
from ...links.log_wire import log_of
from ...messages import wire
from ...messages.client_settings import ClientSettings
from ...messages.flower_adapter import config_of, records_of
from ...messages.local_training import LocalTraining
from ...messages.secure_wire import read_position, roster_of
from ...messages.training_order import ENCRYPTED_MODES, TrainingOrder, display_name, read_order
from ...messages.wire import SECURE_RECORD, Exchange
from ...privacy.mechanisms.randomness import Randomness
from ...privacy.secagg.transcript import AttemptTerms
from ...privacy.statistics.evaluation import GAINS, Evaluation, HeldOutMeans
from ...questions.answers import Measured, answer_evaluation, answer_inquiry
from ...questions.wire import question_of, released_of
from .approvals import Approvals
from .client_bundle import OWN_FILES, ClientBundle, DeviceFile, renew_roster
from .device_ledger import DeviceLedger
from .eligibility import ROOT, obstacle
from .last_model import FILE, LastModel
from .ledger_heads import LEDGERS, LedgerHeads
from .log_copy import Forked, LogCopy, expected_entries
from .order_policy import Instruction, accept_instruction, cost_of, require_arm, require_cohorts_roster
from .owner_query import require_listed
from .owner_requests import OwnerRequest, agreed_terms, request_of
from .record_privacy import RecordPlanner
from .run_end import PERSONAL
from .run_rows import note_rows, rows_of
from .server_quotes import ServerQuotes

if TYPE_CHECKING:  # a linear model needs no torch
    from .linear import LinearTask
    from .own_models import OwnModels
    from .torch_task import TorchTask

logger = logging.getLogger("fedveil.client")

ACCELERATOR = "FEDVEIL_DEVICE"  # environment variable: device of the training, such as cuda; default cpu
EXAMPLES_AT_ONCE = (
    "FEDVEIL_EXAMPLES_AT_ONCE"  # environment variable: as engine.examples_at_once; default auto
)


@dataclass
class Device:
    """One node of a federation, which answers one message at a time.

    Attributes:
      bundle: the node's identity and its owner's policy.
      settings: the owner's, before an order is applied.
      task: the owner's, loaded once for all messages.
      root: of the system's files, which tell whether the device may train now.
    """

    bundle: ClientBundle
    settings: ClientSettings
    task: TorchTask | LinearTask
    root: Path = ROOT
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def _log(self) -> LogCopy:
        return LogCopy(self.bundle.state, self.bundle.settings.federation, self.bundle.roots)

    @cached_property
    def _heads(self) -> LedgerHeads:
        return LedgerHeads(self.bundle.state)

    @cached_property
    def server_quotes(self) -> ServerQuotes:
        """The owner's requirement of the server's quotes, and the last accepted one."""
        return ServerQuotes(self.bundle.policy.attest, self.bundle.settings.federation)

    @cached_property
    def _approvals(self) -> Approvals:
        return Approvals(self.bundle.state, self.bundle.policy, self.ledger)

    @cached_property
    def _records(self) -> RecordPlanner:
        return RecordPlanner(self.ledger, self.bundle.policy.minimum_noise_multiplier, self.task.count)

    @property
    def ledgers(self) -> Path:
        """Folder of the device's ledgers."""
        return self.bundle.state / LEDGERS

    @property
    def ledger(self) -> DeviceLedger:
        """Ledger of the device's releases as a client."""
        roster = self.bundle.identity.roster
        in_force = {"version": roster.version, "hash": roster.hash.hex()}
        origin = {"who": f"server of {self.bundle.settings.federation}", "roster": in_force}
        return DeviceLedger(self.ledgers, self.settings.device or "", self.bundle.policy.cap, origin)

    @property
    def memory(self) -> Path:
        """File of the node's memory between messages, sealed under its key."""
        return self.bundle.state / "node"

    @cached_property
    def own_models(self) -> OwnModels:
        """Maker of the owner's own models."""
        from .own_models import OwnModels  # no device without an own model needs it

        return OwnModels(self.bundle, self.task)

    @property
    def last_model(self) -> LastModel:
        """Last received model, from which the server may send differences."""
        return LastModel(self.bundle.state / FILE)

    def answer(self, message: Message) -> Message:
        """Return the reply to one message; a failure sends only a code, and the device's log has the reason."""
        with self._one_at_a_time:
            try:
                return self._answer(message)
            except NotTrained as refusal:
                return Message(Error(refusal.code, "the client did not train"), reply_to=message)
            except Exception as error:
                if isinstance(error, OSError) or disk_failed(error):
                    mend = disk_remedy(error) or "mend it"
                    logger.error("%s cannot be used now (%s); %s", self.bundle.state, error, mend)
                    return Message(Error(wire.NOT_READY, "the client cannot write"), reply_to=message)
                logger.exception("a message could not be answered")
                return Message(Error(wire.FAILED, "the client failed"), reply_to=message)

    def ineligibility(self) -> str:
        """Return a short reason why the device does not train now; empty if it does."""
        early = clock_fault(self.bundle)
        return early or obstacle(self.bundle.settings.eligibility, datetime.now(), self.root)

    def _answer(self, message: Message) -> Message:
        """Return the reply to an instruction; all that a later answer depends on is on disk before it leaves."""
        if message.metadata.message_type != "train" or wire.SPEC_RECORD not in message.content:
            raise NotTrained(wire.FAILED)
        if clock_fault(self.bundle):
            raise NotTrained(wire.NOT_READY)
        message, statement = self.last_model.with_whole_model(message)
        content = message.content
        # New work, or a commitment to it: existing commitments are always kept.
        is_new = (
            bool(records_of(content, ArrayRecord)) or read_position(content).exchange is Exchange.PROPOSAL
        )
        if is_new and self.ineligibility():
            raise NotTrained(wire.NOT_ELIGIBLE)
        self.check_log(content)
        with _declining(wire.OWNERS_POLICY, level=logging.ERROR):
            self.server_quotes.check(content, self.bundle.roots)
        self._renew_roster(content)
        # No ledger that was deleted or rolled back is charged, and new heads are on disk before the answer leaves.
        with _declining(wire.RESTORED, level=logging.ERROR):
            self._heads.require()
        if is_new:
            self._require_approval(content)
        reply = self._update(message)
        with _declining(wire.NOT_READY, level=logging.ERROR):
            self._heads.keep()
        if reply.has_error():
            return reply
        if nonce := self.server_quotes.nonce(content):
            reply = Message(with_nonce(reply.content, nonce), reply_to=message)
        return reply if statement is None else self.last_model.keep(message, statement, reply)

    def _require_approval(self, content: RecordDict) -> None:
        """Require the owner's approval before anything is begun, so that the same instruction may be sent again later.

        Raises:
          NotTrained: as of `Approvals`.
        """
        if not self._approvals.apply:
            return
        run, _ = wire.read_round(content)
        self._approvals.require_activity(run)
        if SECURE_RECORD in content and not records_of(content, ArrayRecord):
            return self._approvals.require_name(run)
        memory = self.memory.read_bytes() if self.memory.exists() else b""
        terms = agreed_terms(memory, self.bundle.identity, content)
        if terms or SECURE_RECORD not in content:
            self._approvals.require(self._request(self._accepted(content, terms)))

    def _accepted(self, content: RecordDict, terms: AttemptTerms | None) -> Instruction:
        return accept_instruction(content, terms, self.bundle.policy, self.task.can_protect_records)

    def _request(self, instruction: Instruction) -> OwnerRequest:
        """Return an instruction as its owner sees it."""
        choice = self.bundle.settings.task
        task = choice.target or choice.name or choice.kind or ""
        return request_of(instruction, self.bundle.policy.target_delta, task)

    def _update(self, message: Message) -> Message:
        """Return the client's vector, or its step in a masked sum, and store the memory that the next step needs."""
        self.ledgers.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = self.memory.read_bytes() if self.memory.exists() else b""
        state = RecordDict({STATE_RECORD: ConfigRecord({STATE: before})} if before else {})
        context = Context(0, self.bundle.identity.node, {}, state, {})
        identity, trained = self.bundle.identity, self._trained
        if SECURE_RECORD in message.content:
            reply = secure_update(identity, Randomness(None), message, context, trained, self._charged)
        else:
            reply = private_update(message, context, trained, self._charged)
        after = config_of(context.state, STATE_RECORD).get(STATE, b"")
        if isinstance(after, bytes) and after != before:
            replace_file(self.memory, after)
        return reply

    def check_log(self, content: RecordDict) -> None:
        """Compare the server's log in an instruction with this device's copy, and store it.

        Raises:
          NotTrained: FORKED if it contradicts the copy; FAILED if it lacks the instruction's entries, too few of the
            owner's witnesses co-signed its head, or there is no log and the owner or the copy requires one.
        """
        bundle, policy = self.bundle, self.bundle.policy
        with _declining(wire.FAILED, level=logging.ERROR):
            self._log.ca = bundle.roots  # which change when a rollover is followed, and when its overlap ends
            statement = log_of(content)
            if statement is not None:
                model, roster = expected_entries(content, *bundle.authority.keys(time.time()))
                self._log.check(statement, model, roster, policy)
            elif policy.require_log or policy.witnessed_by_at_least or self._log.head is not None:
                remedy = "the server sent no log; update the server, or ask its operator why there is none"
                raise Refusal("require_log", policy.require_log, remedy)

    def _renew_roster(self, content: RecordDict) -> None:
        """Adopt a proposal's roster if the authority signed it and it is newer than the device's."""
        if (signed := roster_of(content)) is not None:
            with _declining(wire.FAILED):
                self.bundle = renew_roster(self.bundle, signed)

    @contextmanager
    def _charged(self, content: RecordDict, terms: AttemptTerms | None) -> Generator[None]:
        """Check an instruction, and charge its cost to the device's ledger while its vector is computed.

        `client.private_update.Charge` says what the arguments are.
        """
        bundle, instruction = self.bundle, self._accepted(content, terms)
        self._approvals.require(self._request(instruction))
        with _declining(wire.NOT_READY):
            self._approvals.record_acts()
        order, cost = instruction.order, cost_of(instruction)
        run, number = wire.read_round(content)
        if order.arm is not None:
            with _declining(wire.OWNERS_POLICY, "an order is not followed: "):
                require_arm(order.arm, bundle.settings.name, display_name(run), bundle.state)
        require_cohorts_roster(order, terms, bundle.identity.roster)
        with _declining(wire.FAILED, "an order cannot be followed: "):
            self.task.check_order(order, released_of(content))
        if question_of(content):  # whose cost later noise must include
            self._records.forget()
        if cost is None:  # the records' own ledger is charged where DP-SGD draws them
            yield
            return
        with self.ledger.charged(run, number, wire.read_attempt(content), cost):
            yield

    def _trained(self, message: Message, context: Context) -> Message:
        """Return the task's reply, as Flower's app would; `_charged` has accepted the order and reserved its cost."""
        order = read_order(message.content)
        assert order is not None
        return or_unchanged(message, lambda: self._computed(message, order), order.privacy in ENCRYPTED_MODES)

    def _computed(self, message: Message, order: TrainingOrder) -> Message:
        """Return the task's reply: to an evaluation, to a question, or to a round of training."""
        request = question_of(message.content)
        if isinstance(request, Evaluation):
            return answer_evaluation(message, request, self._measured(message, order, request))
        if request is not None:
            table = self.task.columns(message.content, request)
            return answer_inquiry(message, request, table, Randomness(None).stream("question noise"))
        settings = self.merged(order)
        if self.bundle.settings.personal.trains and (rows := rows_of(settings)):
            note_rows(self.bundle.state, rows)
        return self.task.train(message, settings)

    def _measured(self, message: Message, order: TrainingOrder, evaluation: Evaluation) -> Measured | None:
        """Return the measurement of a model on held-out records, None without any, and what the own model gains."""
        measured = self.task.evaluate(message, order, evaluation)
        if not isinstance(measured, HeldOutMeans) or not {*GAINS} & {*evaluation.figures}:
            return measured
        if not self.bundle.settings.personal.trains:
            return measured
        shared = wire.views(wire.only_arrays(message.content))
        return replace(measured, gains=self.own_models.gains(shared, order, evaluation.metric))

    def merged(self, order: TrainingOrder) -> ClientSettings:
        """Return the owner's settings merged with the order, and the privacy of the owner's records that it demands.

        Where the order holds no record out, those stay out of training on which the owner's own model is chosen.

        Raises:
          NotTrained: as of `RecordPlanner.protected`.
        """
        settings = replace(
            self.settings,
            training=order.training,
            # Rows on which the own model is chosen have trained no model.
            held_out=order.held_out or self.bundle.settings.personal.held_out,
            group_equal_rows=order.group_equal_rows,
            task_options={**self.settings.task_options, **order.task_options},
        )
        return self._records.protected(settings, order, self.bundle.identity)


@contextmanager
def _declining(code: int, what: str = "", level: int = logging.WARNING) -> Generator[None]:
    """Turn a refusal into `NotTrained`, so that only a code is sent; the device's log has the sentence.

    Args:
      code: is sent; where the disk or the system failed, or the log forks, it is NOT_READY or FORKED instead.
      what: stands in the log before the sentence.
      level: of the log's line.
    """
    try:
        yield
    except Refusal as refusal:
        logger.log(level, "%s%s", what, refusal)
        if isinstance(refusal, Forked):
            code = wire.FORKED
        raise NotTrained(wire.NOT_READY if disk_failed(refusal) else code) from refusal


def read_device(bundle: ClientBundle) -> Device:
    """Return the device of a bundle, with task and model loaded once for all messages.

    Raises:
      Refusal: the task cannot be loaded, or does not have this client.
    """
    choice, client, own_options = bundle.settings.task, bundle.settings.task.client, dict[str, str]()
    require_listed(choice, bundle.policy)
    if choice.name in OWN_FILES:  # each device has one file, or one folder of files, of its own
        own_options = {**choice.rows(bundle.folder), **choice.shared(bundle.folder)}
        client = 0
    settings = ClientSettings(
        choice.target or choice.name or choice.kind or "",
        LocalTraining(),  # each order has its own
        task_options={**choice.options, **choice.args, **own_options},
        allow_modules=choice.allow_modules,
        device=device_name(bundle.settings),
        accelerator=os.environ.get(ACCELERATOR, "cpu"),
        examples_at_once=os.environ.get(EXAMPLES_AT_ONCE, "auto"),
        own_folder=str(bundle.state / PERSONAL),
    )
    if choice.kind is None:
        from ...tasks.batch_memory import check_at_once  # torch, not needed by a linear model
        from ...tasks.hardware import check_device
        from .torch_task import TorchTask

        check_device(settings.accelerator, ACCELERATOR)
        check_at_once(settings.examples_at_once, EXAMPLES_AT_ONCE)
        return Device(bundle, settings, TorchTask(settings, client))
    from .linear import LinearTask, read_table

    return Device(bundle, settings, LinearTask(read_table(bundle.folder / str(choice.data)), client))


def device_name(device: DeviceFile) -> str:
    """Return the device's name on its ledgers: SHA-256 of the federation's name and its own, in hexadecimal."""
    return hashlib.sha256(f"{device.federation}/{device.name}".encode()).hexdigest()


def clock_fault(bundle: ClientBundle) -> str:
    """Return a sentence if the clock is before the issue date of this node's certificate; else nothing."""
    valid_from = _valid_from(bundle.credentials.certificate)
    if time.time() >= valid_from.timestamp():
        return ""
    return f"the clock says {datetime.now():%Y-%m-%d %H:%M}, before {valid_from:%Y-%m-%d %H:%M}"


@lru_cache(maxsize=4)  # called for every message
def _valid_from(certificate: bytes) -> datetime:
    return x509.load_pem_x509_certificate(certificate).not_valid_before_utc
