"""Masks: known answers, cancellation for every size and order of bytes, and the compiled addition."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from fedveil.privacy.secagg import masks
from fedveil.privacy.secagg.masks import CHUNK_BYTES, add_masks
from fedveil.privacy.secagg.suite import (
    SUITES,
    derive,
)
from fedveil.privacy.secagg.transcript import Purpose, frame

AES, CHACHA = SUITES[1], SUITES[4]


WORDS = 65_536  # of 32 bits in a chunk


KEYS = st.binary(min_size=32, max_size=32)


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
