"""Signatures of simulated nodes: checked in full, unless this process made them for exactly these bytes."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.privacy.secagg import own_signatures
from fedveil.privacy.secagg.double_signature import post_quantum_public, sign_by
from fedveil.privacy.secagg.own_signatures import OwnSignatures, SimulatedMember
from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.roster import Member
from fedveil.privacy.secagg.suite import SUITES, public_of

CONTEXT, OTHER = b"c" * 32, b"d" * 32


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Bodies of signatures that were checked in full."""
    bodies, check = list[bytes](), Member.check

    def counted(self: Member, *args: object) -> None:
        bodies.append(args[2])
        check(self, *args)

    monkeypatch.setattr(Member, "check", counted)
    return bodies


def member_of(key: Ed25519PrivateKey, own: OwnSignatures) -> SimulatedMember:
    return SimulatedMember(2, "simulated client 0", public_of(key), 9, post_quantum_public(key), own)


@pytest.mark.parametrize("number", [1, 3])
def test_a_node_skips_the_check_of_its_own_process_signature(number: int, checked: list[bytes]) -> None:
    key, own, suite = Ed25519PrivateKey.generate(), OwnSignatures(), SUITES[number]
    signature = own.sign_by(suite, key, CONTEXT, b"body")
    member_of(key, own).check(suite, CONTEXT, b"body", signature)
    assert not checked
    member_of(key, OwnSignatures()).check(suite, CONTEXT, b"body", signature)  # as of another process
    assert checked == [b"body"]


@pytest.mark.parametrize("changed", ["suite", "key", "context", "body", "signature"])
def test_a_signature_counts_only_for_its_own_bytes(changed: str, checked: list[bytes]) -> None:
    key, own = Ed25519PrivateKey.generate(), OwnSignatures()
    signature = own.sign_by(SUITES[1], key, CONTEXT, b"body")
    with pytest.raises(Refused) as refused:
        member_of(Ed25519PrivateKey.generate() if changed == "key" else key, own).check(
            SUITES[3 if changed == "suite" else 1],
            OTHER if changed == "context" else CONTEXT,
            b"another" if changed == "body" else b"body",
            bytes(64) if changed == "signature" else signature,
        )
    assert refused.value.reason is Reason.BAD_SIGNATURE and len(checked) == 1


def test_a_node_checks_the_signature_of_another_process(checked: list[bytes]) -> None:
    key = Ed25519PrivateKey.generate()
    signature = sign_by(SUITES[1], key, CONTEXT, b"body")
    member_of(key, OwnSignatures()).check(SUITES[1], CONTEXT, b"body", signature)
    assert checked == [b"body"]


def test_a_node_checks_a_signature_that_it_forgot(
    monkeypatch: pytest.MonkeyPatch, checked: list[bytes]
) -> None:
    monkeypatch.setattr(own_signatures, "MAX_KEPT", 1)
    key, own = Ed25519PrivateKey.generate(), OwnSignatures()
    first, last = (own.sign_by(SUITES[1], key, CONTEXT, body) for body in (b"first", b"last"))
    for body, signature in ((b"first", first), (b"last", last)):
        member_of(key, own).check(SUITES[1], CONTEXT, body, signature)
    assert checked == [b"first"]
