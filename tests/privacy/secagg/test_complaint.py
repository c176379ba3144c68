"""Arithmetic of complaints against published vectors and `cryptography`; proofs of secrets that X25519 agrees on."""

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.secagg import complaint
from fedveil.privacy.secagg.complaint import ORDER, on_curve, open_proof, prove
from fedveil.privacy.secagg.shamir import PRIME

CONTEXT = bytes(range(32))
SECRETS = st.binary(min_size=32, max_size=32)
SCALARS = st.integers(1, 2**256)
# RFC 8032, section 7.1, tests 1 to 3: secret and public keys.
ED25519 = (
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
    ),
)
# RFC 7748, section 6.1: two private keys, their public keys, and the secret that they agree on.
ALICE, BOB, ALICE_PUBLIC, BOB_PUBLIC, AGREED = (
    bytes.fromhex(text)
    for text in (
        "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
        "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
    )
)


def clamped(secret: bytes) -> int:
    """Return the scalar of RFC 7748, section 5, and of RFC 8032, section 5.1.5."""
    return int.from_bytes(secret, "little") & ~7 & (1 << 255) - 1 | 1 << 254


def ed25519_public(secret: bytes) -> bytes:
    scalar = clamped(hashlib.sha512(secret).digest()[:32])
    return complaint._packed(complaint._times(scalar, complaint._BASE))


@pytest.mark.parametrize(("secret", "public"), ED25519)
def test_multiples_of_the_base_point_are_the_published_keys(secret: str, public: str) -> None:
    assert ed25519_public(bytes.fromhex(secret)).hex() == public


@given(SECRETS)
@settings(max_examples=25)
def test_multiples_of_the_base_point_are_those_of_the_library(secret: bytes) -> None:
    own = Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    assert ed25519_public(secret) == own
    point = complaint._unpacked(own)
    assert complaint._packed(point) == own


@given(SECRETS, SECRETS)
@settings(max_examples=25)
def test_multiples_of_any_point_are_those_of_the_library(secret: bytes, other: bytes) -> None:
    peer = X25519PrivateKey.from_private_bytes(other).public_key()
    agreed = X25519PrivateKey.from_private_bytes(secret).exchange(peer)
    point = complaint._lifted(peer.public_bytes_raw())
    assert complaint._montgomery(complaint._times(clamped(secret), point)) == agreed


@given(SCALARS, SCALARS)
@settings(max_examples=15)
def test_points_add_as_their_scalars_do(left: int, right: int) -> None:
    times, plus, minus, base = complaint._times, complaint._plus, complaint._minus, complaint._BASE
    assert complaint._packed(plus(times(left, base), times(right, base))) == complaint._packed(
        times((left + right) % ORDER, base)
    )
    assert complaint._packed(plus(times(left, base), minus(times(left, base)))) == complaint._packed(
        complaint._NEUTRAL
    )


@pytest.mark.parametrize(
    ("own", "public", "peer"), [(ALICE, ALICE_PUBLIC, BOB_PUBLIC), (BOB, BOB_PUBLIC, ALICE_PUBLIC)]
)
def test_a_proof_discloses_the_published_secret(own: bytes, public: bytes, peer: bytes) -> None:
    proof = prove(X25519PrivateKey.from_private_bytes(own), peer, CONTEXT)
    assert open_proof(proof, public, peer, CONTEXT) == AGREED


@given(SECRETS)
@settings(max_examples=40)
def test_a_key_is_a_point_of_the_curve_where_its_equation_holds(key: bytes) -> None:
    """RFC 7748, section 4.1: v^2 = u^3 + 486662 u^2 + u has a root, by Euler's criterion."""
    u = int.from_bytes(key, "little") & (1 << 255) - 1
    square = (u**3 + 486662 * u**2 + u) % PRIME
    root = square == 0 or pow(square, (PRIME - 1) // 2, PRIME) == 1
    assert on_curve(key) == (root and (u + 1) % PRIME != 0)


def test_blinded_product_is_the_same_by_scalars_of_one_length() -> None:
    base = complaint._times(8, complaint._BASE)
    scalars = [complaint._blinded(7) for _ in range(50)]
    assert len(set(scalars)) == 50 and len({each.bit_length() for each in scalars}) == 1
    assert {complaint._packed(complaint._times(each, base)) for each in scalars[:5]} == {
        complaint._packed(complaint._times(7, base))
    }


def test_the_library_agrees_that_the_vectors_are_right() -> None:
    assert (
        X25519PrivateKey.from_private_bytes(ALICE).exchange(X25519PublicKey.from_public_bytes(BOB_PUBLIC))
        == AGREED
    )
