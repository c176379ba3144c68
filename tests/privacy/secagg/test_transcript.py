"""Frames and contexts: every part, type and boundary counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.transcript import (
    Purpose,
    digest,
    frame,
    round_context,
)

PARTS = st.lists(
    st.binary(max_size=5) | st.text("ab", max_size=5) | st.integers(-9, 2**64) | st.floats(allow_nan=False),
    max_size=4,
)


@given(PARTS, PARTS, st.sampled_from(Purpose), st.sampled_from(Purpose))
@settings(max_examples=100)
def test_frames_of_different_parts_differ(a, b, one: Purpose, other: Purpose) -> None:  # type: ignore[no-untyped-def]
    same = one is other and repr(a) == repr(b)
    assert (frame(one, *a) == frame(other, *b)) == same


def test_a_type_and_a_boundary_are_part_of_the_hash() -> None:
    lists = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), ("ab", b"c"), (1,), (1.0,), ("1",), (b"1",), ()]
    assert len({digest(Purpose.ROUND, *parts) for parts in lists}) == len(lists)


def test_the_round_context_is_over_setup_cohort_and_model() -> None:
    usual = round_context(b"s" * 32, (1, 2, 3), b"m" * 32)
    assert round_context(b"s" * 32, (3, 1, 2), b"m" * 32) == usual
    others = {
        round_context(b"t" * 32, (1, 2, 3), b"m" * 32),
        round_context(b"s" * 32, (1, 2), b"m" * 32),
        round_context(b"s" * 32, (1, 2, 4), b"m" * 32),
        round_context(b"s" * 32, (1, 2, 3), b"n" * 32),
    }
    assert len(others) == 4 and usual not in others
    with pytest.raises(Refused) as caught:
        round_context(b"s" * 32, (1, 2, 2), b"m" * 32)
    assert caught.value.reason is Reason.WRONG_COHORT
