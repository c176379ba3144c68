import os

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedveil.privacy.mechanisms.randomness import Randomness, Stream


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
