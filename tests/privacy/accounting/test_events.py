"""Privacy events as JSON: what survives exactly, and what is refused."""

import json

import pytest
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    RandomizedResponseDpEvent,
    SelfComposedDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    ZCDpEvent,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.events import event_from_json, event_to_json

EVENTS = st.recursive(
    st.one_of(
        st.just(NoOpDpEvent()),
        st.just(NonPrivateDpEvent()),
        st.builds(GaussianDpEvent, st.floats(0, 1e6)),
        st.builds(LaplaceDpEvent, st.floats(0, 1e6)),
        st.builds(RandomizedResponseDpEvent, st.floats(0, 1), st.integers(1, 9)),
        st.builds(ZCDpEvent, st.floats(0, 9), st.floats(0, 9)),
        st.builds(
            TruncatedSubsampledGaussianDpEvent,
            st.integers(0, 99),
            st.floats(0, 1),
            st.integers(0, 99),
            st.floats(0, 9),
        ),
    ),
    lambda inner: st.one_of(
        st.builds(PoissonSampledDpEvent, st.floats(0, 1), inner),
        st.builds(SelfComposedDpEvent, inner, st.integers(0, 10**6)),
        st.builds(ComposedDpEvent, st.lists(inner, max_size=3)),
    ),
    max_leaves=5,
)


@settings(max_examples=60)
@given(EVENTS)
def test_events_survive_json_exactly(event: DpEvent) -> None:
    assert event_from_json(json.loads(json.dumps(event_to_json(event), allow_nan=False))) == event


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "os.system"},
        {"kind": "Unsupported"},
        {"kind": ["Gaussian"]},
        {"kind": "Gaussian"},
        {"kind": "Gaussian", "noise_multiplier": "1.0"},
        {"kind": "Gaussian", "noise_multiplier": -1.0},
        {"kind": "Gaussian", "noise_multiplier": 1.0, "module_name": "os"},
        {"kind": "SelfComposed", "event": {"kind": "Evil"}, "count": 1},
        {"kind": "SelfComposed", "event": {"kind": "NoOp"}, "count": 1.5},
        {"kind": "PoissonSampled", "sampling_probability": 1.1, "event": {"kind": "NoOp"}},
        {"kind": "PoissonSampled", "sampling_probability": 0.5, "event": 3},
        {"kind": "Composed", "events": "NoOp"},
    ],
    ids=str,
)
def test_unknown_kinds_and_bad_fields_are_refused(data: dict) -> None:
    with pytest.raises(Refusal):
        event_from_json(data)


def test_class_with_a_borrowed_name_is_refused() -> None:
    impostor = type("GaussianDpEvent", (), {"noise_multiplier": 100.0})()
    with pytest.raises(Refusal):
        event_to_json(impostor)
