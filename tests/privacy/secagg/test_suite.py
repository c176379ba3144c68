"""Known answers of the standards for keys, ciphers and signatures."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.suite import (
    SUITES,
    agree,
    derive,
    key_from_seed,
    new_key,
    public_of,
    seal,
    sign,
    suite_of,
    unseal,
    verify,
)
from fedveil.privacy.secagg.transcript import Purpose, frame

AES, CHACHA = SUITES[1], SUITES[4]


def test_aes_256_in_counter_mode() -> None:
    # NIST SP 800-38A, F.5.5.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    coded = bytes.fromhex("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5")
    assert Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(plain) == coded


def test_key_agreement_is_rfc_7748() -> None:
    # Section 6.1.
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    publics = [
        bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"),
        bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"),
    ]
    secret = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    keys = [X25519PrivateKey.from_private_bytes(private) for private in (alice, bob)]
    assert [public_of(key) for key in keys] == publics
    expected = derive(secret, frame(Purpose.PAIR, b"info", *sorted(publics)))
    assert agree(keys[0], publics[1], b"info") == agree(keys[1], publics[0], b"info") == expected


def test_key_derivation_is_rfc_5869() -> None:
    # Appendix A.3: no salt, no info.
    expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    assert derive(bytes([0x0B]) * 22, b"").hex() == expected


def test_signatures_are_rfc_8032() -> None:
    # Section 7.1, test 2.
    key = Ed25519PrivateKey.from_private_bytes(
        bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    )
    assert public_of(key).hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert key.sign(b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert sign(key, b"context", b"body") == key.sign(frame(Purpose.SIGNATURE, b"context", b"body"))


@pytest.mark.parametrize("suite", [AES, CHACHA])
def test_sealed_bytes_open_only_whole_and_in_place(suite) -> None:  # type: ignore[no-untyped-def]
    key, sealed = bytes(range(32)), seal(suite, bytes(range(32)), b"two shares", b"i to j")
    assert len(sealed) == len(b"two shares") + 28
    assert unseal(suite, key, sealed, b"i to j") == b"two shares"
    assert seal(suite, key, b"two shares", b"i to j") != sealed
    flipped = [
        sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :] for place in range(len(sealed))
    ]
    other = CHACHA if suite is AES else AES
    attempts = [(suite, key, wrong, b"i to j") for wrong in (*flipped, sealed[:-1], sealed[:11], b"")]
    attempts += [
        (suite, key, sealed, b"j to i"),
        (suite, bytes(32), sealed, b"i to j"),
        (other, key, sealed, b"i to j"),
    ]
    for attempt in attempts:
        with pytest.raises(Refused) as caught:
            unseal(*attempt)
        assert caught.value.reason is Reason.BAD_SHARE


def test_a_signature_holds_for_one_key_context_and_body() -> None:
    key = Ed25519PrivateKey.generate()
    signature, public = sign(key, b"round 1", b"body"), public_of(key)
    verify(public, b"round 1", b"body", signature)
    wrong = [
        (public_of(Ed25519PrivateKey.generate()), b"round 1", b"body", signature),
        (public, b"round 2", b"body", signature),
        (public, b"round 1b", b"ody", signature),
        (public, b"round 1", b"body", bytes(64)),
        (public, b"round 1", b"body", b""),
        (public[:31], b"round 1", b"body", signature),
    ]
    for attempt in wrong:
        with pytest.raises(Refused) as caught:
            verify(*attempt)
        assert caught.value.reason is Reason.BAD_SIGNATURE


def test_agreed_keys_differ_by_info_and_pair() -> None:
    a, b, c = new_key(), new_key(), new_key()
    keys = {agree(a, public_of(b), b"1"), agree(a, public_of(b), b"2"), agree(a, public_of(c), b"1")}
    assert len(keys) == 3
    # The same agreement with other public halves must not give the same key.
    secret = a.exchange(X25519PublicKey.from_public_bytes(public_of(b)))
    assert derive(secret, frame(Purpose.PAIR, b"1")) not in keys


@pytest.mark.parametrize("peer", [bytes(32), (1).to_bytes(32, "little"), b"", bytes(31)])
def test_a_key_that_forces_the_secret_is_refused(peer: bytes) -> None:
    with pytest.raises(Refused) as caught:
        agree(new_key(), peer, b"info")
    assert caught.value.reason is Reason.MALFORMED


def test_a_seed_is_one_key_and_an_unknown_suite_is_refused() -> None:
    assert public_of(key_from_seed(bytes(32))) == public_of(key_from_seed(bytes(32)))
    assert public_of(key_from_seed(bytes(32))) != public_of(key_from_seed((1).to_bytes(32, "big")))
    assert suite_of(4) is CHACHA
    with pytest.raises(Refused, match="suite 5 is not known"):
        suite_of(5)
