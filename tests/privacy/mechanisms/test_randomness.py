import copy
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.mechanisms import randomness
from fedveil.privacy.mechanisms.randomness import Randomness, Stream


@pytest.fixture(params=["cryptography", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streams as either way makes their bytes."""
    package = request.getfixturevalue("compiled_package") if request.param == "compiled" else None
    key_stream = package and package.key_stream
    monkeypatch.setattr(randomness, "_key_stream", key_stream)
    randomness.compiled.cache_clear()
    assert randomness.compiled() is key_stream
    yield
    randomness.compiled.cache_clear()


@pytest.mark.usefixtures("way")
def test_the_stream_is_aes_in_counter_mode() -> None:
    # NIST SP 800-38A, F.5.5 gives AES-256-CTR for its own counter; the same primitive from a zero counter here.
    key = bytes(range(32))
    expected = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(bytes(16))
    assert Stream(key).bytes(16) == expected


def test_same_seed_same_bytes_and_distinct_purposes_differ() -> None:
    one, again = Randomness(1).stream("noise", 3), Randomness(1).stream("noise", 3)
    assert one.bytes(64) == again.bytes(64)
    others = [("noise", 4), ("noise", "3"), ("cohort", 3), ("noise", 3, 0)]
    drawn = {Randomness(1).stream(*purpose).bytes(32) for purpose in others}
    assert len(drawn) == len(others)
    assert Randomness(1).stream("noise", 3).bytes(32) not in drawn
    assert Randomness(2).stream("noise", 3).bytes(32) != Randomness(1).stream("noise", 3).bytes(32)


def test_system_streams_never_repeat() -> None:
    assert Randomness().kind == "system"
    assert Randomness().stream("noise", 1).bytes(32) != Randomness().stream("noise", 1).bytes(32)


@pytest.mark.usefixtures("way")
def test_a_stream_is_not_copied() -> None:
    """Two of them would draw the same noise."""
    with pytest.raises(TypeError):
        copy.deepcopy(Randomness().stream("noise"))


@pytest.mark.usefixtures("way")
def test_a_forked_process_draws_noise_of_its_own() -> None:
    stream = Randomness().stream("noise")
    stream.bytes(16)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, stream.bytes(32))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 32) != stream.bytes(32)
    os.close(read)
    os.close(write)


@given(
    key=st.binary(min_size=32, max_size=32),
    pieces=st.lists(st.integers(0, 1500), max_size=8),
    words=st.sampled_from(["bytes", "uint32", "uint64"]),
)
@settings(max_examples=60)
def test_compiled_streams_are_those_of_cryptography(compiled_package, key, pieces, words) -> None:  # type: ignore[no-untyped-def]
    """Whatever was drawn before, of any size."""
    ours, theirs = Stream(key), Stream(key)
    ours._compiled, theirs._compiled = compiled_package.key_stream, None
    for count in [*pieces, 70_000]:
        drawn, expected = (getattr(each, words)(count) for each in (ours, theirs))
        assert bytes(drawn) == bytes(expected)


@pytest.mark.parametrize("wrong", [None, "nothing", "begins anew", "32 bits of counter"])
def test_a_compiled_key_stream_that_is_another_is_not_used(
    wrong: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key_stream(out: bytearray, key: bytes, place: int) -> None:
        for at in range(len(out)):
            block, inside = divmod(place + at, 16)
            block = block % 2**32 if wrong == "32 bits of counter" else block
            block = at // 16 if wrong == "begins anew" else block
            if wrong != "nothing":
                out[at] = blocks(key, block)[inside]

    @cache
    def blocks(key: bytes, block: int) -> bytes:
        return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block.to_bytes(16, "big"))

    monkeypatch.setattr(randomness, "_key_stream", key_stream)
    randomness.compiled.cache_clear()
    assert randomness.compiled() is (key_stream if wrong is None else None)
    randomness.compiled.cache_clear()


def test_the_compiled_key_stream_takes_a_whole_key(compiled_package: Any) -> None:
    out = bytearray(64)
    with pytest.raises(ValueError, match="32 bytes"):
        compiled_package.key_stream(out, bytes(31), 0)
    assert not any(out)
