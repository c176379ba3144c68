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
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from ...base.durable_files import replace_file
from ...base.refusal import Refusal, disk_failed, disk_remedy
from ...client.private_update import NotTrained, or_unchanged, private_update
from ...client.secure_update import STATE, STATE_RECORD, secure_update
from ...configs.bundle_files import SCHEMA
from ...links.attestation import with_nonce
from ...links.log_wire import log_of
from ...messages import wire
from ...messages.client_settings import ClientSettings
from ...messages.flower_adapter import config_of, records_of
from ...messages.local_training import LocalTraining
from ...messages.record_settings import RecordPrivacy, StepTerms
from ...messages.secure_wire import read_position, roster_of
from ...messages.training_order import (
    ENCRYPTED_MODES,
    ModeName,
    RecordTerms,
    TrainingOrder,
    display_name,
    read_order,
)
from ...messages.wire import SECURE_RECORD, Exchange
from ...privacy.budget import Adversary, Unit
from ...privacy.ledger.caps import CapEnded, lowered
from ...privacy.ledger.ledger_state import LedgerRelease, run_of, state_at
from ...privacy.ledger.question_caps import is_question
from ...privacy.mechanisms.randomness import Randomness
from ...privacy.secagg.transcript import AttemptTerms
from ...privacy.statistics.columns import LABEL, Table
from ...privacy.statistics.evaluation import Evaluation, HeldOutMeans
from ...privacy.statistics.inquiry import Inquiry
from ...questions.answers import Measured, answer_evaluation, answer_inquiry
from ...questions.wire import question_of, released_of
from .client_bundle import TABLES, ClientBundle, DeviceFile, renew_roster
from .device_ledger import DeviceLedger
from .eligibility import ROOT, obstacle
from .last_model import FILE, LastModel
from .ledger_heads import LedgerHeads
from .log_copy import Forked, LogCopy, expected_entries
from .order_policy import accept_order
from .receipts import LEDGERS
from .run_arms import require_arm
from .server_quotes import ServerQuotes

if TYPE_CHECKING:  # a linear model needs no torch
    from ...tasks.protocol import Task

logger = logging.getLogger("fedveil.client")

Trainer = Callable[[Message, ClientSettings], Message]
ACCELERATOR = "FEDVEIL_DEVICE"  # environment variable: device of the training, such as cuda; default cpu


@dataclass
class Device:
    """One node of a federation, which answers one message at a time.

    Attributes:
      bundle: the node's identity and its owner's policy.
      settings: the owner's task, before an order is applied.
      train: trains on the owner's data with the settings.
      count: returns the number of the owner's records, with at most the given number per person; None on a device
        without record-level privacy.
      prepare: refuses an order or a question about a model that this device cannot follow, before any charge.
      columns: returns the owner's columns for a question.
      evaluate: measures the model of an instruction on the owner's held-out records; None where there are too few.
      root: of the system's files.
    """

    bundle: ClientBundle
    settings: ClientSettings
    train: Trainer
    count: Callable[[int | None], int] | None
    prepare: Callable[[TrainingOrder, bytes | None], None]
    columns: Callable[[RecordDict, Inquiry], Table]
    evaluate: Callable[[Message, Evaluation], Measured | None]
    root: Path = ROOT
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    _noise: dict[tuple[object, ...], float] = field(default_factory=dict[tuple[object, ...], float])

    @cached_property
    def _log(self) -> LogCopy:
        return LogCopy(self.bundle.state, self.bundle.settings.federation, self.bundle.roots)

    @cached_property
    def _heads(self) -> LedgerHeads:
        return LedgerHeads(self.bundle.state)

    @cached_property
    def _quotes(self) -> ServerQuotes:
        bundle = self.bundle
        return ServerQuotes(bundle.policy.attest, bundle.roots, bundle.settings.federation)

    @property
    def ledgers(self) -> Path:
        """Folder of the device's ledgers."""
        return self.bundle.state / LEDGERS

    @property
    def ledger(self) -> DeviceLedger:
        """Ledger of the device's releases as a client."""
        return DeviceLedger(self.ledgers, self.settings.device or "", self.bundle.policy.cap)

    @property
    def memory(self) -> Path:
        """File of the node's memory between messages, sealed under its key."""
        return self.bundle.state / "node"

    @property
    def last_model(self) -> LastModel:
        """Last received model, from which the server may send differences."""
        return LastModel(self.bundle.state / FILE)

    def answer(self, message: Message) -> Message:
        """Return the reply to one message; a failure sends only a code."""
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
        if message.metadata.message_type != "train" or wire.SPEC_RECORD not in message.content:
            raise NotTrained(wire.FAILED)
        if clock_fault(self.bundle):
            raise NotTrained(wire.NOT_READY)
        message, statement = self.last_model.with_whole_model(message)
        # New work, or a commitment to it: existing commitments are always kept.
        work = records_of(message.content, ArrayRecord)
        if (work or read_position(message.content).exchange is Exchange.PROPOSAL) and self.ineligibility():
            raise NotTrained(wire.NOT_ELIGIBLE)
        self.check_log(message.content)
        with _declining(wire.OWNERS_POLICY, level=logging.ERROR):
            self.server_quotes.check(message.content)
        self._renew_roster(message.content)
        with _declining(wire.RESTORED, level=logging.ERROR):
            self._heads.require()
        self.ledgers.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = self.memory.read_bytes() if self.memory.exists() else b""
        state = RecordDict({STATE_RECORD: ConfigRecord({STATE: before})} if before else {})
        context = Context(0, self.bundle.identity.node, {}, state, {})
        reply = self._update(message, context)
        after = config_of(context.state, STATE_RECORD).get(STATE, b"")
        if isinstance(after, bytes) and after != before:
            replace_file(self.memory, after)
        with _declining(wire.NOT_READY, level=logging.ERROR):
            self._heads.keep()
        reply = self._asking_for_quote(message, reply)
        return reply if statement is None else self.last_model.keep(message, statement, reply)

    def check_log(self, content: RecordDict) -> None:
        """Compare the server's log in an instruction with this device's copy, and store it.

        Raises:
          NotTrained: FORKED if it is another log; FAILED if it does not contain the instruction's entries, too few of
            the owner's witnesses co-signed its head, or there is none.
        """
        bundle, policy = self.bundle, self.bundle.policy
        with _declining(wire.FAILED, level=logging.ERROR):
            self._log.ca = bundle.roots  # which change when a rollover is followed, and when its overlap ends
            statement = log_of(content)
            if statement is not None:
                entries = expected_entries(content, *bundle.authority.keys(time.time()))
                self._log.check(statement, *entries, policy)
            elif policy.require_log or policy.witnessed_by_at_least or self._log.head is not None:
                remedy = "the server sent no log; update the server, or ask its operator why there is none"
                raise Refusal("require_log", policy.require_log, remedy)

    @property
    def server_quotes(self) -> ServerQuotes:
        """The owner's requirements on the server's quotes."""
        self._quotes.ca = self.bundle.roots  # as of `check_log`
        return self._quotes

    def _asking_for_quote(self, message: Message, reply: Message) -> Message:
        """Return the reply, with a nonce if the owner requires a quote and none was accepted recently."""
        if reply.has_error() or not (nonce := self.server_quotes.nonce(message.content)):
            return reply
        return Message(with_nonce(reply.content, nonce), reply_to=message)

    def _renew_roster(self, content: RecordDict) -> None:
        """Adopt a proposal's roster if the authority signed it and it is newer than the device's."""
        if (signed := roster_of(content)) is not None:
            with _declining(wire.FAILED):
                self.bundle = renew_roster(self.bundle, signed)

    def _update(self, message: Message, context: Context) -> Message:
        trained: ClientAppCallable = self._trained
        if SECURE_RECORD not in message.content:
            return private_update(message, context, trained, self._charged)
        identity, system = self.bundle.identity, Randomness(None)
        return secure_update(identity, system, message, context, trained, self._charged)

    @contextmanager
    def _charged(self, content: RecordDict, terms: AttemptTerms | None) -> Generator[None]:
        order, cost = accept_order(content, terms, self.bundle.policy, self.count is not None)
        if order.arm is not None:
            bundle = self.bundle
            with _declining(wire.OWNERS_POLICY, "an order is not followed: "):
                require_arm(order.arm, bundle.settings.name, display_name(order.run), bundle.state)
        if terms is not None and self._roster_changed(order, terms):
            logger.warning("an order cannot be followed: the roster has changed since the cohort agreed")
            raise NotTrained(wire.FAILED)
        with _declining(wire.FAILED, "an order cannot be followed: "):
            self.prepare(order, released_of(content))
        _, number = wire.read_round(content)
        if question_of(content):
            self._noise.clear()  # the plan did not include the answer
        attempt = wire.read_attempt(content)
        with nullcontext() if cost is None else self.ledger.charged(order.run, number, attempt, cost):
            yield

    def _roster_changed(self, order: TrainingOrder, terms: AttemptTerms) -> bool:
        """Return whether roster and terms disagree on which clients may train on a person."""
        chooses = order.record and order.record.clients_per_person is not None
        return bool(chooses) and terms.roster_hash != self.bundle.identity.roster.hash

    def _trained(self, message: Message, context: Context) -> Message:
        order = read_order(message.content)
        assert order is not None  # otherwise the charge would have failed
        return or_unchanged(message, lambda: self._computed(message, order), order.privacy in ENCRYPTED_MODES)

    def _computed(self, message: Message, order: TrainingOrder) -> Message:
        request = question_of(message.content)
        if isinstance(request, Evaluation):
            return answer_evaluation(message, request, self.evaluate(message, request))
        if request is not None:
            table = self.columns(message.content, request)
            return answer_inquiry(message, request, table, Randomness(None).stream("question noise"))
        return self.train(message, self.merged(order))

    def merged(self, order: TrainingOrder) -> ClientSettings:
        """Return the owner's settings merged with the order, and record-level noise planned from the owner's records.

        Raises:
          NotTrained: BUDGET_SPENT if the owner's cap has expired, or too little of the budget is left; NOT_READY if the
            ledger cannot be read; NO_EXAMPLES if the owner has none.
        """
        options = {**self.settings.task_options, **order.task_options}
        settings = replace(
            self.settings,
            training=order.training,
            held_out=order.held_out,
            group_equal_rows=order.group_equal_rows,
            task_options=options,
        )
        terms = order.record
        if terms is None:
            return settings
        if terms.sample_rate is not None:
            identity = self.bundle.identity
            nodes = tuple(member.node for member in identity.roster.members)
            return replace(settings, step=StepTerms(terms, identity.node, nodes))
        assert self.count is not None  # otherwise the owner's policy would have refused
        records = self.count(terms.per_person)
        if not records:
            if order.privacy is ModeName.RECORD:
                raise NotTrained(wire.NO_EXAMPLES)
            return settings  # it answers with a zero update
        return replace(settings, record=self._record(terms, records, settings, display_name(order.run)))

    def _record(self, order: RecordTerms, records: int, settings: ClientSettings, run: str) -> RecordPrivacy:
        try:
            budget = lowered(order.budget, [self.bundle.policy.cap])
        except CapEnded as ended:
            logger.warning("%s", ended)
            raise NotTrained(wire.BUDGET_SPENT) from ended
        limits = {"target_epsilon": budget.target_epsilon, "target_delta": budget.target_delta}
        record = RecordPrivacy(replace(order, **limits), (), str(self.ledgers))
        try:
            self.ledger.charge_records(record.terms.budget)
        except Refusal as refusal:
            logger.warning("%s", refusal)
            raise NotTrained(wire.NOT_READY) from refusal
        plan = (record, records, settings.training, order.participations, run)
        if plan not in self._noise:
            self._noise[plan] = self._planned(record, records, settings, order.participations, run)
        min_noise = self.bundle.policy.minimum_noise_multiplier / order.adjacency.distance
        return replace(record, noise_by_records=((0, max(self._noise[plan], min_noise)),))

    def _planned(
        self, record: RecordPrivacy, records: int, settings: ClientSettings, participations: int, run: str
    ) -> float:
        """Return the noise for a run, planned from the budget that earlier runs left.

        The plan includes the rounds that this run has already spent, so that the noise is the same after a restart; its
        earlier questions are charged in addition.
        """
        from ...strategies.record_plan import calibrated_noise

        def is_of_run(booked: LedgerRelease) -> bool:
            return booked.source is None and display_name(run_of(booked.entry)) == run

        try:
            book = state_at(record.ledger_path(settings.device or ""))
            # The model is all releases; of sums of whole clients a trusted server is charged nothing.
            prior = book.events(Adversary.MODEL, lambda each: not is_of_run(each))
            questions = book.events(Adversary.MODEL, lambda each: is_of_run(each) and is_question(each))
            return calibrated_noise(record, records, settings, participations, prior, other_events=questions)
        except Refusal as refusal:
            if refusal.field not in ("ledger", "target_epsilon"):
                raise
            logger.warning("%s", refusal)
            raise NotTrained(wire.NOT_READY if refusal.field == "ledger" else wire.BUDGET_SPENT) from refusal


@contextmanager
def _declining(code: int, what: str = "", level: int = logging.WARNING) -> Generator[None]:
    """Log a refusal, of which only a code is sent; behind one of the disk or the system the device is not ready."""
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
    choice = bundle.settings.task
    settings = ClientSettings(
        choice.target or choice.name or choice.kind or "",
        LocalTraining(),  # each order has its own
        task_options={**choice.options, **choice.args},
        allow_modules=choice.allow_modules,
        device=device_name(bundle.settings),
        accelerator=os.environ.get(ACCELERATOR, "cpu"),
    )
    make = _of_task if choice.kind is None else _of_linear_model
    return make(bundle, settings)


def _of_linear_model(bundle: ClientBundle, settings: ClientSettings) -> Device:
    from . import linear

    choice = bundle.settings.task
    table = linear.read_table(bundle.folder / (choice.data or ""))

    def train(message: Message, settings: ClientSettings) -> Message:
        rows, _ = linear.parts_of(table, settings.held_out, settings.group_equal_rows)
        return linear.train_round(message, choice.client, rows, settings)

    def evaluate(message: Message, evaluation: Evaluation) -> HeldOutMeans | None:
        order = read_order(message.content)
        assert order is not None
        _, held_out = linear.parts_of(table, evaluation.share, order.group_equal_rows)
        return linear.measure(message, held_out, evaluation)

    def columns(content: RecordDict, inquiry: Inquiry) -> Table:
        return {LABEL: table.targets}

    return Device(bundle, settings, train, None, linear.check_order, columns, evaluate)


def _of_task(bundle: ClientBundle, settings: ClientSettings) -> Device:
    from ...client.app import train_round  # torch, not needed by a linear model
    from ...questions.client import measured_at, table_of
    from ...tasks.data import data_of
    from ...tasks.hardware import check_device
    from ...tasks.memory import give_back
    from ...tasks.optimizers import check_optimizer
    from ...tasks.persons import limit_per_person, names_of
    from .order_contexts import create_contexts, key_of

    check_device(settings.accelerator, ACCELERATOR)
    choice = bundle.settings.task
    if choice.name == TABLES:
        schema = bundle.folder / str(choice.options.get("schema", SCHEMA))
        table_paths = {"data": str(bundle.folder / str(choice.data)), "schema": str(schema)}
        settings = replace(settings, task_options={**choice.options, **table_paths})
        choice = replace(choice, client=0)
    bench, context_for, agreement = create_contexts(settings)
    if not 0 <= choice.client < bench.task.num_clients:
        raise Refusal("task.client", choice.client, f"the task has clients 0 to {bench.task.num_clients - 1}")
    bench.require_base()  # creates the model, or refuses it now

    def train(message: Message, settings: ClientSettings) -> Message:
        per_record, scaling = settings.step is not None, key_of(settings.task_options)
        context = context_for(settings.held_out, per_record, settings.group_equal_rows, scaling)
        reply = train_round(message, choice.client, context, settings)
        give_back()  # frees the gradients before the vector is computed
        return reply

    def evaluate(message: Message, evaluation: Evaluation) -> Measured | None:
        order = read_order(message.content)
        assert order is not None
        per_record, scaling = evaluation.unit is Unit.RECORD, key_of(order.task_options)
        context = context_for(evaluation.share, per_record, order.group_equal_rows, scaling)
        return measured_at(context, choice.client, message.content, evaluation)

    _check_data(bench.task, choice.client)

    def prepare(order: TrainingOrder, released: bytes | None = None) -> None:
        if order.agreement != agreement(key_of(order.task_options)):
            remedy = "the server has another schema or model; take both from the same fedveil provision"
            raise Refusal("schema", str(choice.options.get("schema")), remedy)
        level = order.record
        if level is not None and level.per_person is not None:
            names_of(data_of(bench.task, choice.client), f"client {choice.client}")  # or refuses
        check_optimizer(bench.task, order.training, None if order.record is None else 1.0)
        if released is not None:
            from ...tasks.model_columns import read_released  # tables, not needed for training

            read_released(bench.model, released)

    return Device(
        bundle,
        settings,
        train,
        lambda most: len(limit_per_person(data_of(bench.task, choice.client), most)),
        prepare,
        partial(table_of, bench, choice.client),
        evaluate,
    )


def _check_data(task: Task, client: int) -> None:
    """Refuse unusable data of the owner, when the client starts and before any charge."""
    from ...tasks.data import check_data, check_taken, data_of, data_of_all
    from ...tasks.own_scale import WARNING, own_scale
    from ...tasks.protocol import own_training

    data, client_name = data_of(task, client), f"client {client}"
    check_data(data, client_name)
    if scale := own_scale(lambda: [data_of_all(task, client)]):  # in the device's own log alone
        logger.warning("columns of this device's data %s", WARNING.format(scale))
    if own_training(task) is None:
        check_taken(data, client_name, task.model().eval(), task.loss)


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
