"""Known answers of the standards, and what masks and shares must do for every key and size."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from scipy import stats

from fedveil.privacy.secagg import masks
from fedveil.privacy.secagg.masks import CHUNK_BYTES, add_masks
from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.shamir import PRIME, SECRET_BYTES, combine, new_secret, polynomial, values
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
WORDS = 65_536  # of 32 bits in a chunk
KEYS = st.binary(min_size=32, max_size=32)


def number(value: int) -> bytes:
    return value.to_bytes(32, "big")


def mask(key: bytes, size: int, suite: int = 1, dtype: DTypeLike = np.uint32) -> NDArray[np.unsignedinteger]:
    vector = np.zeros(size, dtype)
    add_masks(vector, [(key, 1)], SUITES[suite])
    return vector


@pytest.fixture
def built(compiled_package: Any) -> Callable[..., None]:
    return compiled_package.add_masks


@pytest.fixture(params=["cryptography", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Masks of AES as either way adds them."""
    add = request.getfixturevalue("built") if request.param == "compiled" else None
    monkeypatch.setattr(masks, "_add_compiled", add)
    masks.compiled.cache_clear()
    assert masks.compiled() is add
    yield
    masks.compiled.cache_clear()


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


def test_the_chacha_mask_is_rfc_8439() -> None:
    # Appendix A.1, test vector 2: zero key and nonce, block 1.
    block = (
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert mask(bytes(32), 16, suite=4).tobytes().hex() == block


@pytest.mark.usefixtures("way")
def test_the_aes_mask_is_the_published_one() -> None:
    drawn = mask(bytes(range(32)), WORDS + 2)
    assert [f"{word:08x}" for word in drawn[:4]] == ["deb5bc0e", "bd832cb5", "35a9a808", "99912c18"]
    assert [f"{word:08x}" for word in drawn[WORDS:]] == ["fcbfd615", "1e30f444"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_aes_mask_is_plain_counter_mode(dtype: type[np.unsignedinteger]) -> None:
    key, size = bytes(range(32)), 2 * CHUNK_BYTES // np.dtype(dtype).itemsize + 5
    drawn = mask(key, size, dtype=dtype).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    for chunk in range(3):
        counter = chunk.to_bytes(12, "big") + (2).to_bytes(4, "big")
        expected = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(CHUNK_BYTES))
        part = drawn[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
        assert part == expected[: len(part)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("width", ["u2", "u4"])
@pytest.mark.parametrize("suite", [1, 4])
def test_mask_has_the_same_values_in_any_byte_order(width: str, suite: int) -> None:
    little, big = (mask(bytes(32), 1000, suite, order + width) for order in "<>")
    assert little.tobytes() != big.tobytes()
    assert (little == big).all()


@given(
    clients=st.integers(2, 6),
    size=st.integers(0, 40),
    dtype=st.sampled_from([np.uint16, np.uint32]),
    suite=st.sampled_from([AES, CHACHA]),
    seed=KEYS,
)
@settings(max_examples=60)
def test_masks_of_pairs_cancel(clients, size, dtype, suite, seed) -> None:  # type: ignore[no-untyped-def]
    pair_key = {
        (i, j): derive(seed, frame(Purpose.PAIR_MASK, i, j))
        for i in range(clients)
        for j in range(i + 1, clients)
    }
    values = np.random.default_rng(list(seed)).integers(0, np.iinfo(dtype).max, (clients, size), dtype, True)
    total = np.zeros(size, dtype)
    for i in range(clients):
        vector = values[i].copy()
        others = [j for j in range(clients) if j != i]
        add_masks(vector, [(pair_key[min(i, j), max(i, j)], 1 if i < j else -1) for j in others], suite)
        assert size < 8 or (vector != values[i]).any()
        total += vector
    assert (total == values.sum(axis=0, dtype=dtype)).all()


@pytest.mark.usefixtures("way")
def test_masks_cancel_over_chunks() -> None:
    vector = np.arange(3 * WORDS + 7, dtype=np.uint32)
    add_masks(vector, [(b"a" * 32, 1), (b"b" * 32, -1)], AES)
    assert (vector != np.arange(vector.size)).mean() > 0.999
    add_masks(vector, [(b"b" * 32, 1), (b"a" * 32, -1)], AES)
    assert (vector == np.arange(vector.size)).all()


@given(size=st.integers(0, 2000), places=st.integers(0, 1500), width=st.sampled_from([2, 4]), seed=KEYS)
@settings(max_examples=60)
def test_compiled_masks_are_those_of_cryptography(compiled_package, size, places, width, seed) -> None:  # type: ignore[no-untyped-def]
    """Of every size, also behind a chunk's end, of every place in memory, and for nothing beside the vector."""
    size += CHUNK_BYTES // width if seed[0] < 32 else 0
    drawn = np.random.default_rng(list(seed)).integers(0, 256, places + width * size + 64, np.uint8)
    words = drawn[places : places + width * size].view(f"<u{width}")
    keys = [(derive(seed, frame(Purpose.PAIR_MASK, each)), 1 if each % 3 else -1) for each in range(3)]
    expected, before, behind = words.copy(), drawn[:places].copy(), drawn[places + width * size :].copy()
    masks._add_streams(expected, keys, AES)
    compiled_package.add_masks(
        words, width, b"".join(key for key, _ in keys), bytes(sign > 0 for _, sign in keys)
    )
    assert (words == expected).all()
    assert (drawn[:places] == before).all() and (drawn[places + width * size :] == behind).all()


def test_the_compiled_addition_takes_whole_words_and_keys(built: Callable[..., None]) -> None:
    for words, width, keys, adds in [
        (bytearray(6), 4, bytes(32), b"\1"),
        (bytearray(8), 8, bytes(32), b"\1"),
        (bytearray(8), 4, bytes(31), b"\1"),
        (bytearray(8), 4, bytes(32), b"\1\1"),
    ]:
        with pytest.raises(ValueError, match="whole words of 2 or 4 bytes"):
            built(words, width, keys, adds)
        assert not any(words)
    for words in (bytes(8), np.zeros(8, np.uint32)[::2]):  # not writable; not in one piece
        with pytest.raises((TypeError, BufferError, ValueError)):
            built(words, 4, bytes(32), b"\1")


@pytest.mark.parametrize("wrong", [(0, 0), (2, 0), (4, 1)])
def test_a_compiled_addition_that_masks_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, wrong: tuple[int, int]
) -> None:
    """One that adds nothing, or for one width the mask of one sign only."""

    def add(words: NDArray[np.uint32], width: int, keys: bytes, adds: bytes) -> None:
        rows = [(keys[32 * place :][:32], 1 if sign else -1) for place, sign in enumerate(adds)]
        left = [row for place, row in enumerate(rows) if wrong[0] and (width, place) != wrong]
        masks._add_streams(words, left, AES)

    monkeypatch.setattr(masks, "_add_compiled", add)
    masks.compiled.cache_clear()
    assert masks.compiled() is None
    assert mask(bytes(range(32)), 1)[0] == 0xDEB5BC0E
    masks.compiled.cache_clear()


@pytest.mark.parametrize(
    "vector", [np.zeros(3), np.zeros(3, np.int32), np.zeros((2, 2), np.uint32), np.zeros(3, "u8")]
)
def test_masks_go_on_words_only(vector: NDArray[np.uint32]) -> None:
    with pytest.raises(ValueError, match="unsigned words"):
        add_masks(vector, [], AES)


@pytest.mark.parametrize("wrong", [(bytes(32), 0), (bytes(16), 1), (b"", 1)])
def test_a_mask_has_a_key_of_32_bytes_and_a_sign(wrong: tuple[bytes, int]) -> None:
    with pytest.raises(ValueError, match="a key of 32 bytes, and a sign of 1 or -1"):
        add_masks(np.zeros(3, np.uint32), [(bytes(32), 1), wrong], AES)


def split(secret: bytes, threshold: int, points: list[int]) -> list[bytes]:
    """Return a share of the secret for each point."""
    (shares,) = values([polynomial(secret, threshold)], points)
    return [share.to_bytes(SECRET_BYTES, "big") for share in shares]


def test_shares_of_the_published_polynomial(monkeypatch: pytest.MonkeyPatch) -> None:
    coefficients = iter([number(7), number(11)])
    monkeypatch.setattr("fedveil.privacy.secagg.shamir.new_secret", lambda: next(coefficients))
    shares = split(number(12345), 3, [1, 2, 3])
    assert [int.from_bytes(share, "big") for share in shares] == [12363, 12403, 12465]
    assert combine(dict(zip([1, 2, 3], shares, strict=True)), 3) == number(12345)


@given(data=st.data(), secret=st.integers(0, PRIME - 1).map(number))
@settings(max_examples=60)
def test_any_threshold_of_shares_gives_the_secret(data: st.DataObject, secret: bytes) -> None:
    points = data.draw(st.lists(st.integers(1, 2**64), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = dict(zip(points, split(secret, threshold, points), strict=True))
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, len(points)))]
    assert combine({point: shares[point] for point in chosen}, threshold) == secret
    with pytest.raises(Refused) as caught:
        combine({point: shares[point] for point in chosen[: threshold - 1]}, threshold)
    assert caught.value.reason is Reason.TOO_FEW


@pytest.mark.parametrize("secret", [number(0), number(PRIME - 1)])
def test_fewer_shares_say_nothing(secret: bytes) -> None:
    # Two of three needed: together as uniform as noise, whatever the secret.
    drawn = [split(secret, 3, [1, 2, 3])[:2] for _ in range(1600)]
    cells = [
        (4 * int.from_bytes(a, "big") // PRIME) * 4 + 4 * int.from_bytes(b, "big") // PRIME for a, b in drawn
    ]
    assert stats.chisquare(np.bincount(cells, minlength=16)).pvalue > 1e-6
    wrong = {combine(dict(zip([1, 2], pair, strict=True)), 2) for pair in drawn[:50]}
    assert len(wrong) == 50 and secret not in wrong


@pytest.mark.parametrize("share", [number(PRIME), b"\xff" * 32, b"", bytes(31), bytes(33)])
def test_invalid_share_is_refused(share: bytes) -> None:
    with pytest.raises(Refused) as caught:
        combine({1: share, 2: number(1)}, 2)
    assert caught.value.reason is Reason.BAD_SHARE


@pytest.mark.parametrize(("secret", "threshold"), [(number(PRIME), 1), (bytes(31), 1), (number(1), 0)])
def test_unshareable_value_is_an_error(secret: bytes, threshold: int) -> None:
    with pytest.raises(ValueError):
        polynomial(secret, threshold)


def test_a_new_secret_is_a_field_element_and_new() -> None:
    drawn = {new_secret() for _ in range(200)}
    assert len(drawn) == 200 and all(int.from_bytes(secret, "big") < PRIME for secret in drawn)
    assert any(secret[0] & 0x40 for secret in drawn)


def test_a_secret_too_large_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([b"\xff" * 32, number(8)])
    monkeypatch.setattr("os.urandom", lambda n: next(draws))
    assert new_secret() == number(4)


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
    assert public_of(key_from_seed(bytes(32))) != public_of(key_from_seed(number(1)))
    assert suite_of(4) is CHACHA
    with pytest.raises(Refused, match="suite 5 is not known"):
        suite_of(5)
