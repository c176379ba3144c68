"""Suite 3: every signature of an attempt and of a roster is Ed25519's and ML-DSA-65's, and one of the two is none."""

import hashlib
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PublicKey

from fedveil.base.refusal import Refusal
from fedveil.deployment.device.client_bundle import read_client_bundle, renew_roster
from fedveil.deployment.device.enrolment import read_request, write_request
from fedveil.deployment.provision import provision, revoke
from fedveil.links.server_bundle import read_server_bundle
from fedveil.privacy.secagg.double_signature import (
    BOTH_BYTES,
    ML_DSA_KEY_BYTES,
    both_of,
    post_quantum_public,
    sign_by,
    verify_by,
)
from fedveil.privacy.secagg.policy import check
from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.roster import Member, Roster, read_roster, write_roster
from fedveil.privacy.secagg.server import OpenedSum
from fedveil.privacy.secagg.suite import ML_DSA_SIGNATURE_BYTES, SIGNATURE_BYTES, SUITES, public_of
from fedveil.privacy.secagg.transcript import Purpose, frame

COHORT: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "secagg_cohort.py"))
Cohort = COHORT["Cohort"]
DEVICES: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "devices.py"))
KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
KEYS = public_of(KEY), post_quantum_public(KEY)


def test_both_signatures_are_over_the_same_bytes_and_both_must_hold() -> None:
    signature = sign_by(SUITES[3], KEY, bytes(32), b"body")
    assert len(signature) == SIGNATURE_BYTES + ML_DSA_SIGNATURE_BYTES == SUITES[3].signature_bytes
    verify_by(SUITES[3], *KEYS, bytes(32), b"body", signature)
    framed = frame(Purpose.SIGNATURE, bytes(32), b"body")
    KEY.public_key().verify(signature[:SIGNATURE_BYTES], framed)  # by the library alone
    MLDSA65PublicKey.from_public_bytes(KEYS[1]).verify(signature[SIGNATURE_BYTES:], framed)
    other = sign_by(SUITES[3], OTHER, bytes(32), b"body")
    halves = [
        signature[:SIGNATURE_BYTES] + other[SIGNATURE_BYTES:],  # who has broken Ed25519
        other[:SIGNATURE_BYTES] + signature[SIGNATURE_BYTES:],  # who has broken ML-DSA
        signature[:SIGNATURE_BYTES],
        signature[SIGNATURE_BYTES:],
        signature + b"0",
    ]
    for wrong in halves:
        with pytest.raises(Refused) as raised:
            verify_by(SUITES[3], *KEYS, bytes(32), b"body", wrong)
        assert raised.value.reason is Reason.BAD_SIGNATURE
    for keys in ((KEYS[0], b""), (KEYS[0], post_quantum_public(OTHER)), (public_of(OTHER), KEYS[1])):
        with pytest.raises(Refused):
            verify_by(SUITES[3], *keys, bytes(32), b"body", signature)
    with pytest.raises(Refused):
        verify_by(SUITES[2], *KEYS, bytes(32), b"body", signature)
    verify_by(SUITES[2], *KEYS, bytes(32), b"body", signature[:SIGNATURE_BYTES])


def test_sum_by_suite_3_is_exact_and_every_signature_is_double(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[tuple[int, int]] = []
    real = Member.check
    monkeypatch.setattr(
        Member,
        "check",
        lambda self, suite, *rest: looked.append((suite.number, len(rest[-1]))) or real(self, suite, *rest),
    )
    cohort = Cohort(5, 3, suite=3)
    vectors = cohort.vectors(40)
    outcome = cohort.run(vectors)
    assert isinstance(outcome, OpenedSum) and not cohort.refusals and not cohort.dropped
    assert (outcome.total == sum(vectors.values())).all()
    assert set(looked) == {(3, SIGNATURE_BYTES + ML_DSA_SIGNATURE_BYTES)}
    # Each node's advert at the server and at four neighbours, its confirmation at the server, and a quorum's at each node.
    assert len(looked) >= 5 * (1 + 4 + 1 + 3)


@pytest.mark.parametrize("half", [slice(SIGNATURE_BYTES, None), slice(0, SIGNATURE_BYTES)])
@pytest.mark.parametrize("call", [1, 3], ids=["advert", "confirmation"])
def test_half_a_signature_is_none(half: slice, call: int) -> None:
    cohort = Cohort(5, 3, suite=3)
    victim, calls = min(cohort.nodes), [0]

    def half_signed(suite: Any, identity: Ed25519PrivateKey, context: bytes, body: bytes) -> bytes:
        signature = bytearray(sign_by(suite, identity, context, body))
        calls[0] += 1
        if calls[0] == call:
            signature[half] = bytes(len(signature[half]))
        return bytes(signature)

    cohort.nodes[victim].sign = half_signed
    outcome = cohort.run(cohort.vectors(8))
    assert cohort.dropped == {victim: Reason.BAD_SIGNATURE} and isinstance(outcome, OpenedSum)
    assert (victim in outcome.survivors) == (call == 3)


def test_policy_of_a_single_signature_takes_no_suite_3() -> None:
    cohort = Cohort(5, 3, suite=3)
    policy, terms = next(iter(cohort.nodes.values())).policy, cohort.terms()
    check(policy, terms)
    with pytest.raises(Refused, match="suite=3"):
        check(replace(policy, authority=policy.authority[:32]), terms)
    check(replace(policy, authority=policy.authority[:32]), replace(terms, suite=2))


def test_roster_needs_both_signatures_under_a_policy_of_both_keys() -> None:
    members = (
        Member(2, "a", KEYS[0], 2_000_000_000, KEYS[1]),
        Member(3, "b", public_of(OTHER), 2_000_000_000),
    )
    roster, both = Roster(1, members), both_of(KEY)
    assert len(both) == BOTH_BYTES and both[32:] == hashlib.sha256(KEYS[1]).digest()
    doubly, once = write_roster(roster, KEY, doubly=True), write_roster(roster, KEY)
    for signed, authority in ((doubly, both), (doubly, both[:32]), (once, both[:32])):
        found = read_roster(signed, authority)
        assert (
            found == roster
            and found.hash == roster.hash
            and len(found.members[0].post_quantum) == ML_DSA_KEY_BYTES
        )
    assert replace(roster, members=(replace(members[0], post_quantum=b""), members[1])).hash != roster.hash
    forged = write_roster(replace(roster, version=2, earlier=(roster.hash,)), OTHER, doubly=True)
    for signed in (once, forged, doubly[:-1] + bytes([doubly[-1] ^ 1])):
        with pytest.raises(Refused):
            read_roster(signed, both)
    with pytest.raises(Refused, match="ML-DSA key is not"):
        Roster(1, (replace(members[0], post_quantum=b"1"),))


# --- provisioned ---------------------------------------------------------------------------------------------------


def test_federation_becomes_post_quantum_and_sums_by_suite_3(tmp_path: Path) -> None:
    made = DEVICES["make_federation"](tmp_path)
    devices = Path(shutil.copytree(made / "clients", tmp_path / "devices"))
    before = read_server_bundle(made / "server")
    file = tmp_path / "federation.yaml"
    file.write_text(f"{file.read_text()}post_quantum: true\n")
    provision(file, made, None)
    after = read_server_bundle(made / "server")
    assert after.authority[:32] == before.authority and after.roster.follows(before.roster)
    old = renew_roster(read_client_bundle(devices / "c0"), after.signed_roster)  # knows the Ed25519 key alone
    assert old.identity.roster.version == 2
    assert revoke(made, ["c4"]).register.version == 3
    grid = DEVICES["Devices"](
        {2 + n: DEVICES["device_of"](made / "clients" / f"c{n}", suites=(3,)) for n in range(4)}
    )
    roster = read_server_bundle(made / "server").roster
    masking = DEVICES["Masking"](roster, dropout=0.4, collusion=0.1, suite=3)
    size = DEVICES["CLASSES"] * (DEVICES["FEATURES"] + 1)
    wanted = DEVICES["Sum"]("spring", 1, DEVICES["content"](), "train", DEVICES["SPEC"], {"w": (size,)}, 3.0)
    opened = DEVICES["SecureSums"](grid, masking).sum(grid.get_node_ids(), wanted, None)
    assert opened.survivors == 4 and not opened.dropped
    weaker = DEVICES["SecureSums"](grid, replace(masking, suite=2)).sum(
        grid.get_node_ids(), replace(wanted, number=2, row=2), None
    )
    assert weaker.survivors == 0 and weaker.dropped == {"declined: policy": 4}


def test_a_member_of_before_there_were_such_keys_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fedveil.deployment.device.enrolment.post_quantum_public", lambda _: b"")
        made = DEVICES["make_federation"](tmp_path)
        old = read_request(write_request(tmp_path / "old", "old"))
    assert old.post_quantum == b""
    assert len(read_request(write_request(tmp_path / "new", "new")).post_quantum) == ML_DSA_KEY_BYTES
    file = tmp_path / "federation.yaml"
    file.write_text(f"{file.read_text()}post_quantum: true\n")
    kept = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    with pytest.raises(Refusal, match="post_quantum='c0': has no ML-DSA key"):
        provision(file, made, None)
    file.write_text(file.read_text().replace("name: c0", "name: old, request: old/request.toml"))
    with pytest.raises(Refusal, match=r"request='old': has no ML-DSA key.*update fedveil on the device"):
        provision(file, tmp_path / "another", None)
    assert not (tmp_path / "another").exists()
    assert kept == {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
