"""Who may take part, what an attempt is about, and what a client's own policy makes of it."""

import re
from dataclasses import fields, replace

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.privacy.secagg.graph import smallest_shape
from fedveil.privacy.secagg.policy import Policy, check
from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.roster import Member, Roster, read_roster, write_roster
from fedveil.privacy.secagg.roster_change import change_between
from fedveil.privacy.secagg.suite import SUITES, public_of, sign
from fedveil.privacy.secagg.transcript import (
    PROTOCOL_VERSION,
    AttemptTerms,
    Profile,
    Purpose,
    digest,
    frame,
    round_context,
    setup_context,
)

AUTHORITY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
MEMBERS = (Member(3, "north", b"a" * 32, 1_800_000_000), Member(2**64 - 1, "sued", b"b" * 32, 1_900_000_000))
ROSTER = Roster(7, MEMBERS)
WRITTEN = write_roster(ROSTER, AUTHORITY)

POLICY = Policy(
    authority=public_of(AUTHORITY),
    minimum_roster_version=5,
    minimum_cohort=30,
    collusion=0.1,
    dropout=0.2,
    maximum_clipping_norm=1.0,
    minimum_noise_multiplier=0.8,
)
TERMS = AttemptTerms(
    protocol_version=PROTOCOL_VERSION,
    suite=1,
    run=2**64 - 1,
    round=4,
    attempt=0,
    roster_version=7,
    roster_hash=ROSTER.hash,
    cohort_size=40,
    threshold=22,
    neighbours=39,
    bits=16,
    step=2**-10,
    clipping_norm=1.0,
    noise_multiplier=0.8,
    minimum_survivors=32,
    profile=Profile.MALICIOUS,
    task_hash=b"t" * 32,
)


def refusal_of(data: bytes, authority: Ed25519PrivateKey = AUTHORITY) -> Reason:
    with pytest.raises(Refused) as caught:
        read_roster(data, public_of(authority))
    return caught.value.reason


def signed(body: object, authority: Ed25519PrivateKey = AUTHORITY) -> bytes:
    packed = msgpack.packb(body)
    return msgpack.packb((packed, sign(authority, digest(Purpose.ROSTER), packed)))


def test_a_roster_is_read_as_it_was_written() -> None:
    assert read_roster(WRITTEN, public_of(AUTHORITY)) == ROSTER
    assert read_roster(WRITTEN, public_of(AUTHORITY)).hash == ROSTER.hash


@pytest.mark.parametrize("name", ["north " + "5f" * 32, "no\u0440th", "sued\x1b[2K", "", "a" * 49, "north"])
def test_a_name_that_deceives_an_owner_is_in_no_roster(name: str) -> None:
    """The authority may be the adversary: of a change its owner reads names and digits of fingerprints."""
    entries = [MEMBERS[0].parts, replace(MEMBERS[1], name=name).parts]
    assert refusal_of(signed((2, 7, (), entries))) is Reason.MALFORMED
    entries[1] = replace(MEMBERS[1], name="s-1_d").parts
    assert read_roster(signed((2, 7, (), entries)), public_of(AUTHORITY)).members[1].name == "s-1_d"


def test_a_change_shows_digits_that_nobody_finds_another_key_with() -> None:
    shown = re.findall(r"(\S+) \(([0-9a-f]+)\)", change_between(None, ROSTER).summary)
    assert shown == [(each.name, each.fingerprint[:32]) for each in MEMBERS]


def test_member_is_valid_until_its_last_second() -> None:
    assert ROSTER.member(3, 1_800_000_000) == MEMBERS[0]
    for node, now, reason in ((4, 0, Reason.UNKNOWN_MEMBER), (3, 1_800_000_001, Reason.EXPIRED)):
        with pytest.raises(Refused) as caught:
            ROSTER.member(node, now)
        assert caught.value.reason is reason


def test_another_signer_is_refused() -> None:
    stranger = Ed25519PrivateKey.generate()
    assert refusal_of(WRITTEN, stranger) is Reason.BAD_SIGNATURE
    assert refusal_of(write_roster(ROSTER, stranger)) is Reason.BAD_SIGNATURE


def test_a_flipped_bit_is_refused_wherever_it_is() -> None:
    for place in range(len(WRITTEN)):
        flipped = WRITTEN[:place] + bytes([WRITTEN[place] ^ 1]) + WRITTEN[place + 1 :]
        assert refusal_of(flipped) in (Reason.BAD_SIGNATURE, Reason.MALFORMED)


@given(st.binary(max_size=200) | st.integers(0, len(WRITTEN) - 1).map(lambda end: WRITTEN[:end]))
@settings(max_examples=150)
def test_any_other_bytes_are_refused(data: bytes) -> None:
    assert refusal_of(data) in (Reason.BAD_SIGNATURE, Reason.MALFORMED)


@pytest.mark.parametrize(
    "body",
    [
        None,
        (2, 7, ()),
        (1, 7),
        (1, 7, (), 0),
        (1, True, ()),
        (1, 7.0, ()),
        (1, 7, {}),
        (1, 7, ((3, "north", b"a" * 32),)),
        (1, 7, ((3, "north", "a" * 32, 9),)),
        (1, 7, ((3, "north", b"a" * 31, 9),)),
        (1, 7, ((3, b"north", b"a" * 32, 9),)),
        (1, 7, ((4, "x", b"a" * 32, 9), (3, "y", b"b" * 32, 9))),
        (1, 7, ((3, "x", b"a" * 32, 9), (3, "y", b"b" * 32, 9))),
        (1, 7, ((3, "x", b"a" * 32, 9), (4, "y", b"a" * 32, 9))),
        (1, 7, (3,)),
    ],
)
def test_a_signed_roster_is_still_read_strictly(body: object) -> None:
    assert refusal_of(signed(body)) is Reason.MALFORMED


@pytest.mark.parametrize(
    "data", [msgpack.packb((b"x",)), msgpack.packb((b"x", bytes(63))), WRITTEN + b"\x00"]
)
def test_a_roster_without_its_frame_is_refused(data: bytes) -> None:
    assert refusal_of(data) is Reason.MALFORMED


def test_the_hash_is_over_every_field() -> None:
    others = [
        Roster(8, MEMBERS),
        Roster(7, MEMBERS[:1]),
        *(
            Roster(7, (replace(MEMBERS[0], **change), MEMBERS[1]))
            for change in ({"node": 4}, {"name": "x"}, {"public": b"c" * 32}, {"not_after": 1})
        ),
    ]
    assert len({ROSTER.hash, *(other.hash for other in others)}) == 7


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


CHANGES = {
    "protocol_version": 5,
    "suite": 4,
    "run": 1,
    "round": 5,
    "attempt": 1,
    "roster_version": 6,
    "roster_hash": b"r" * 32,
    "cohort_size": 41,
    "threshold": 23,
    "neighbours": 38,
    "bits": 32,
    "step": 2**-11,
    "clipping_norm": 0.5,
    "noise_multiplier": 0.9,
    "minimum_survivors": 33,
    "profile": Profile.SEMI_HONEST,
    "task_hash": b"u" * 32,
}


def test_the_setup_context_is_over_every_term() -> None:
    assert CHANGES.keys() == {field.name for field in fields(AttemptTerms)}
    contexts = {setup_context(replace(TERMS, **{name: value})) for name, value in CHANGES.items()}
    assert len(contexts | {setup_context(TERMS)}) == len(CHANGES) + 1


def test_the_round_context_is_over_setup_cohort_and_model() -> None:
    usual = round_context(b"s" * 32, [1, 2, 3], b"m" * 32)
    assert round_context(b"s" * 32, [3, 1, 2], b"m" * 32) == usual
    others = {
        round_context(b"t" * 32, [1, 2, 3], b"m" * 32),
        round_context(b"s" * 32, [1, 2], b"m" * 32),
        round_context(b"s" * 32, [1, 2, 4], b"m" * 32),
        round_context(b"s" * 32, [1, 2, 3], b"n" * 32),
    }
    assert len(others) == 4 and usual not in others
    with pytest.raises(Refused) as caught:
        round_context(b"s" * 32, [1, 2, 2], b"m" * 32)
    assert caught.value.reason is Reason.WRONG_COHORT


def test_terms_at_the_floors_are_accepted() -> None:
    check(POLICY, TERMS)
    check(replace(POLICY, profile=Profile.SEMI_HONEST), TERMS)
    check(replace(POLICY, minimum_cohort=2), replace(TERMS, minimum_survivors=6))
    check(POLICY, replace(TERMS, bits=32, suite=4, noise_multiplier=1.5, clipping_norm=0.1, threshold=30))


def test_sum_of_one_honest_client_is_refused_by_any_policy() -> None:
    # Of 40, four may collude: of five survivors, one may be honest.
    with pytest.raises(Refused, match="minimum_survivors"):
        check(replace(POLICY, minimum_cohort=2), replace(TERMS, minimum_survivors=5))


@pytest.mark.parametrize("clients", [30, 60, 200])
def test_computed_parameters_pass_and_a_lower_threshold_does_not(clients: int) -> None:
    shape = smallest_shape(clients, POLICY.dropout, POLICY.collusion, Profile.MALICIOUS)
    terms = replace(
        TERMS,
        cohort_size=clients,
        minimum_survivors=30,
        neighbours=shape.neighbours,
        threshold=shape.threshold,
    )
    check(POLICY, terms)
    with pytest.raises(Refused, match="threshold"):
        check(POLICY, replace(terms, threshold=shape.threshold - 1))


@pytest.mark.parametrize(("neighbours", "threshold"), [(39, 0), (39, 40), (38, 21)])
def test_a_shape_that_shares_nothing_or_too_little_is_refused(neighbours: int, threshold: int) -> None:
    with pytest.raises(Refused, match=r"neighbours|threshold"):
        check(POLICY, replace(TERMS, neighbours=neighbours, threshold=threshold))


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_version_three_is_spoken_where_it_promised_as_much(suite: int) -> None:
    policy = replace(POLICY, authority=POLICY.authority + bytes(32))
    check(policy, replace(TERMS, suite=suite))
    old = replace(TERMS, protocol_version=3, suite=suite)
    if suite in (1, 4):
        check(policy, old)
    else:
        with pytest.raises(
            Refused, match=rf"protocol_version=3 with suite={suite} is .* another release; install one"
        ):
            check(policy, old)


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol_version", 0),
        ("protocol_version", 1),
        ("protocol_version", 2),
        ("protocol_version", 5),
        ("suite", 5),
        ("profile", Profile.SEMI_HONEST),
        ("roster_version", 4),
        ("bits", 8),
        ("step", 0.0),
        ("step", NAN),
        ("step", float("inf")),
        ("clipping_norm", 1.01),
        ("clipping_norm", 0.0),
        ("clipping_norm", NAN),
        ("noise_multiplier", 0.79),
        ("noise_multiplier", NAN),
        ("noise_multiplier", float("inf")),
        ("cohort_size", 10**6 + 1),
        ("minimum_survivors", 29),
        ("minimum_survivors", 41),
        ("threshold", 1),
        ("threshold", 21),
        ("neighbours", 40),
        ("neighbours", 37),
        ("neighbours", 2),
    ],
)
def test_terms_below_a_floor_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(Refused) as caught:
        check(POLICY, replace(TERMS, **{field: value}))
    assert caught.value.reason is Reason.POLICY
    assert caught.value.detail.split("=")[0] in (
        field,
        *("neighbours",) * (value == 40 or field == "threshold"),
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("authority", b"short"),
        ("minimum_cohort", 1),
        ("collusion", 1.0),
        ("collusion", NAN),
        ("dropout", -0.1),
        ("maximum_clipping_norm", 0.0),
        ("minimum_noise_multiplier", -1.0),
        ("minimum_noise_multiplier", NAN),
        ("suites", (1, 5)),
    ],
)
def test_a_policy_that_protects_nothing_is_refused(field: str, value: object) -> None:
    with pytest.raises(Refusal) as caught:
        replace(POLICY, **{field: value})
    assert caught.value.field == field
