"""A server's order: read back as it was written, and refused by name when anything in it is off."""

import json
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.configs.group import schema_of
from fedveil.configs.schema import SimulationSettings
from fedveil.messages import training_order
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.training_order import (
    ORDER_KEY,
    ClientClaim,
    ModeName,
    RecordTerms,
    TrainingOrder,
    read_order,
)
from fedveil.privacy.budget import Adjacency, Unit

CLAIM = ClientClaim(1.5, Adjacency.ZERO_OUT)
RECORD = RecordTerms(8.0, 1e-5, 1.0, Adjacency.ZERO_OUT, 10, "auto")
BOTH = TrainingOrder("run 1", ModeName.RECORD_AND_CLIENT, LocalTraining(0.1, 2, 32), CLAIM, RECORD)
ORDERS = (
    BOTH,
    TrainingOrder("r", ModeName.NONE, LocalTraining(0.1, 1, 10)),
    TrainingOrder("r", ModeName.CLIENT_DISTRIBUTED, LocalTraining(0.1, 1, 10), client=CLAIM),
    TrainingOrder("r", ModeName.NONE, LocalTraining(0.1, 1, 10), held_out=0.2),
    TrainingOrder("r", ModeName.NONE, LocalTraining(0.1, 1, 10), held_out=0.2, group_equal_rows=True),
    TrainingOrder("r", ModeName.RECORD, LocalTraining(0.1, 1, 10), record=RECORD),
    TrainingOrder(
        "r", ModeName.RECORD_DISTRIBUTED, LocalTraining(0.1, 1, 10), record=replace(RECORD, sample_rate=0.1)
    ),
    TrainingOrder(
        "r",
        ModeName.RECORD_DISTRIBUTED,
        LocalTraining(0.1, 1, 10),
        record=replace(RECORD, sample_rate=0.1, per_person=3, clients_per_person=2),
    ),
)


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_is_read_back_as_it_was_written(order):
    text = order.to_json()
    again = TrainingOrder.from_json(text)
    assert again == order and again.to_json() == text
    assert read_order(RecordDict({"config": ConfigRecord({ORDER_KEY: text, "lr": 1.0})})) == order


def test_order_of_an_earlier_release_holds_equal_records_out_together():
    order = replace(ORDERS[3], held_out=0.2)
    plain = json.loads(order.to_json())
    assert plain.pop("singly") is True
    assert TrainingOrder.from_json(json.dumps(plain)) == replace(order, group_equal_rows=True)
    assert "singly" not in json.loads(BOTH.to_json())  # so that devices of earlier releases read it


def test_a_person_at_several_clients_is_one_unit_of_their_sum_alone():
    wide = replace(RECORD, sample_rate=0.1, per_person=3, clients_per_person=2)
    assert (wide.budget.unit, wide.records_of_unit) == (Unit.PERSON_EVERYWHERE, 6)
    for change in ({"sample_rate": None}, {"per_person": None}):
        with pytest.raises(Refusal, match="clients_per_person=2: requires per_person and a sampling rate"):
            replace(wide, **change)


def test_the_words_are_those_of_the_configuration():
    schema = schema_of(SimulationSettings)
    assert {str(mode) for mode in ModeName} == set(
        schema["properties"]["privacy"]["discriminator"]["mapping"]
    )
    assert list(training_order.GRADIENTS) == schema["$defs"]["Record"]["properties"]["gradients"]["enum"]


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (None, "learning_rate", 0.0),
        (None, "learning_rate", True),
        (None, "learning_rate", float("nan")),
        (None, "learning_rate", "0.1"),
        (None, "learning_rate", 10**400),
        (None, "local_epochs", 0),
        (None, "local_epochs", 2.0),
        (None, "local_epochs", True),
        (None, "batch_size", 10**7),
        (None, "run", ""),
        (None, "run", 7),
        (None, "run", "a\nb"),
        (None, "run", "\ud800"),
        (None, "run", "x" * 201),
        (None, "privacy", "everything"),
        (None, "privacy", ["none"]),
        (None, "client", None),
        (None, "record", None),
        (None, "record", []),
        (None, "held_out", 1.0),
        (None, "held_out", 0.2),  # of records that are hidden
        (None, "singly", False),
        (None, "singly", 1),
        (None, "together", True),
        (None, "unknown", 1),
        ("client", "noise_multiplier", 0.0),
        ("client", "noise_multiplier", float("inf")),
        ("client", "adjacency", "same"),
        ("client", "unknown", 1),
        ("record", "target_epsilon", -1.0),
        ("record", "target_delta", 1.0),
        ("record", "max_grad_norm", 1e-10),  # float32 would lose digits of a record's part, or of its bound
        ("record", "max_grad_norm", 1e10),
        ("record", "participations", 0),
        ("record", "participations", 1.5),
        ("record", "gradients", "fast"),
        ("record", "sample_rate", 1.01),
        ("record", "sample_rate", 0.1),  # of a step that all clients take together, which is another mode
    ],
)
def test_out_of_range_value_is_refused_by_name(part, key, value):
    plain = json.loads(BOTH.to_json())
    (plain if part is None else plain[part])[key] = value
    with pytest.raises(Refusal):
        TrainingOrder.from_json(json.dumps(plain))


def test_a_step_of_all_clients_has_a_rate():
    with pytest.raises(Refusal, match="sample_rate"):
        replace(ORDERS[-1], record=RECORD)


@pytest.mark.parametrize("text", ["", "null", "[]", "[" * 4000, "{}", '"x"', "x" * 5000])
def test_invalid_order_is_refused(text):
    with pytest.raises(Refusal):
        TrainingOrder.from_json(text)


def test_a_key_that_is_missing_is_refused():
    for key in json.loads(BOTH.to_json()):
        plain = json.loads(BOTH.to_json())
        del plain[key]
        with pytest.raises(Refusal):
            TrainingOrder.from_json(json.dumps(plain))


def test_instruction_has_one_order_or_none_and_two_are_refused():
    assert read_order(RecordDict({"config": ConfigRecord({"lr": 1.0})})) is None
    record = ConfigRecord({ORDER_KEY: BOTH.to_json()})
    with pytest.raises(Refusal):
        read_order(RecordDict({"a": record, "b": record}))
    with pytest.raises(Refusal):
        read_order(RecordDict({"a": ConfigRecord({ORDER_KEY: b"x"})}))


@given(
    st.floats(1e-3, 1e3),
    st.integers(1, 10_000),
    st.integers(1, 1_000_000),
    st.text(min_size=1, max_size=50).filter(str.isprintable),
)
def test_any_order_in_range_survives_the_journey(rate, epochs, batch, run):
    order = replace(BOTH, training=LocalTraining(rate, epochs, batch), run=run)
    assert TrainingOrder.from_json(order.to_json()) == order
