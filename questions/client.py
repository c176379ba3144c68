"""Answer of a client's app to a question: from its columns, or by measuring a model on its held-out records."""

from __future__ import annotations

from dataclasses import replace

from flwr.app import Error, Message, RecordDict

from ..base.extensions import extension
from ..base.refusal import Refusal
from ..client.workbench import Workbench
from ..messages import wire
from ..privacy.accounting.events import gaussian_event
from ..privacy.budget import Adversary, Release, Unit
from ..privacy.ledger.ledger import BudgetExhausted
from ..privacy.ledger.question_caps import QUESTION
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.statistics.columns import Table
from ..privacy.statistics.evaluation import Evaluation, HeldOutMeans
from ..privacy.statistics.inquiry import Inquiry
from ..server.query_rows import NAME, round_number
from ..tasks.arrays import load_arrays, own_names
from ..tasks.columns import columns_of
from ..tasks.data import data_of
from ..tasks.hardware import on_cpu, placed
from ..tasks.held_back import held_back_of
from .answers import Measured, answer_evaluation, answer_inquiry
from .measurements import measure_means, measure_rows
from .wire import client_noise_of, question_of, released_of


def answer(message: Message, client: int, bench: Workbench) -> Message:
    """Return one client's answer to a question or an evaluation, or an error if its ledger does not allow it.

    Args:
      message: the instruction.
      client: number of the client in the task, from 0.
      bench: task and model.

    Raises:
      Refusal: the question cannot be read or answered.
    """
    request = question_of(message.content)
    if isinstance(request, Evaluation):
        measured = measured_at(bench, client, message.content, request)
        if request.own and isinstance(measured, HeldOutMeans):
            gains = extension("personal", "gains", "personal", request.own)
            measured = replace(measured, gains=gains(bench, client, message.content, request))
        return answer_evaluation(message, request, measured)
    assert request is not None
    return _answer_inquiry(message, client, bench, request)


def measured_at(
    bench: Workbench, client: int, content: RecordDict, evaluation: Evaluation
) -> Measured | None:
    """Load an instruction's model into `bench` and measure it on a client's held-out records; None if it has none."""
    held_out = held_back_of(bench.task, client)
    if held_out is None:
        raise Refusal("evaluate.clients", evaluation.name, "this client trains on all of its records")
    if not len(held_out):
        return None
    bench.forget()
    device_data, limit = placed(held_out, bench.device), bench.settings.examples_at_once
    released = released_of(content)
    if released is None:
        load_arrays(bench.model, wire.views(wire.only_arrays(content)))
        if own_names(bench.model):
            name, row = wire.read_round(content)
            bench.load_own(client, name.removesuffix(f" {NAME}"), round_number(row) + 1)
        return measure_means(device_data, bench.task, bench.model, bench.precision, evaluation, limit)
    from ..tasks.model_columns import read_released  # tables, not needed for training

    read_released(bench.private_model(held_out, evaluated=True), released)
    return measure_rows(device_data, bench.task, bench.model, bench.precision, evaluation, limit)


def table_of(bench: Workbench, client: int, content: RecordDict, inquiry: Inquiry) -> Table:
    """Return a client's columns, and those of a question's released model; refuse a model that does not fit."""
    released = released_of(content)
    if released is None:
        return columns_of(bench.task, client)
    from ..tasks.model_columns import columns_with, read_released  # tables, not needed for training

    bench.forget()
    if inquiry.unit is Unit.RECORD:  # its output for a row must then not depend on other rows
        bench.private_model(data_of(bench.task, client), evaluated=True)
    read_released(bench.model, released)
    model, limit = on_cpu(bench.model).eval(), bench.settings.examples_at_once
    return columns_with(bench.task, client, model, inquiry.attributed, limit)


def _answer_inquiry(message: Message, client: int, bench: Workbench, inquiry: Inquiry) -> Message:
    """Return one client's answer to an inquiry; where it adds its own noise, it reserves on its own ledger first."""
    settings = bench.settings
    table = table_of(bench, client, message.content, inquiry)
    run, number = wire.read_round(message.content)
    randomness = Randomness(settings.seed)
    stream = randomness.stream("question noise", number, client)
    noise = client_noise_of(message.content)
    if noise is None:  # the server charges the question
        return answer_inquiry(message, inquiry, table, stream)
    assert settings.record is not None
    release = Release(
        settings.record.terms.budget.unit,
        run=run,
        round=number,
        mechanism=f"{QUESTION} {client}",
        events=dict.fromkeys(Adversary, gaussian_event(noise)),
        rng=randomness.kind,
        segments=inquiry.purposes,
        kind=QUESTION,
    )
    try:
        name = bench.ledger_name(client, settings, settings.record)
        with bench.open_ledger(name, settings, settings.record) as ledger:
            ledger.purpose = inquiry.why or None
            ledger.reserve_new(release)
            reply = answer_inquiry(message, inquiry, table, stream)
            ledger.commit(release.key)
    except BudgetExhausted:
        return Message(Error(wire.BUDGET_SPENT, "this client's budget is spent"), reply_to=message)
    return reply
