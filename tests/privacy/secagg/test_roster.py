"""The signed list of members: how it is read, and what is refused."""

import re
from dataclasses import replace

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.roster import Member, Roster, read_roster, write_roster
from fedveil.privacy.secagg.roster_change import change_between
from fedveil.privacy.secagg.suite import public_of, sign
from fedveil.privacy.secagg.transcript import (
    Purpose,
    digest,
)

AUTHORITY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
MEMBERS = (Member(3, "north", b"a" * 32, 1_800_000_000), Member(2**64 - 1, "sued", b"b" * 32, 1_900_000_000))
ROSTER = Roster(7, MEMBERS)
WRITTEN = write_roster(ROSTER, AUTHORITY)


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
