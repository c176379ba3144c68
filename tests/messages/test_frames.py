"""The stream's frames: written, read back, and refused by name when they are none."""

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.messages.frames import (
    CHUNK_BYTES,
    MAX_FRAME_BYTES,
    Ack,
    BadFrame,
    Begin,
    Chunk,
    Frame,
    Hello,
    MessageBuffer,
    frames_of,
    read,
    write,
)

FRAMES = [
    Hello(1, 7, ["run/1/0/0/7"]),
    Hello(1, 7, []),
    Begin("run/1/0/0/7", 12),
    Ack("run/1/0/0/7"),
    Chunk(b"abc"),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_frame_is_read_as_it_was_written(frame: Frame) -> None:
    assert read(write(frame)) == frame


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x09abc",
        b"\x01",
        b"\x01" + msgpack.packb([1]),
        b"\x01" + msgpack.packb([1, True, []]),
        b"\x01" + msgpack.packb([1, -2, []]),
        b"\x01" + msgpack.packb([1, 2, 3]),
        b"\x01" + msgpack.packb([1, 2, [3]]),
        b"\x01" + msgpack.packb([1, 2, ["x"] * 9]),
        b"\x02" + msgpack.packb(["a\nb", 1]),
        b"\x02" + msgpack.packb(["", 1]),
        b"\x02" + msgpack.packb({"id": 1}),
        b"\x02" + msgpack.packb(["x" * 257, 1]),
        b"\x02" + msgpack.packb([b"x", 1]),
        b"\x02" + bytes(600),
        b"\x03" + msgpack.packb(["x"]) + b"more",
        b"\x04" + bytes(MAX_FRAME_BYTES),
    ],
)
def test_invalid_frame_is_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        read(data)


@settings(max_examples=200)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_frame_or_refused(data: bytes) -> None:
    try:
        assert isinstance(read(data), Frame)
    except BadFrame as error:
        assert str(error)


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from([0, 1, 7, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES]), max_size=5
    )
)
def test_a_message_arrives_in_chunks_as_it_was(sizes: list[int]) -> None:
    parts = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    if not sum(sizes):
        return
    begin, *chunks = [read(data) for data in frames_of("a", parts)]
    assert isinstance(begin, Begin) and begin == Begin("a", sum(sizes))
    assert len(chunks) == -(-sum(sizes) // CHUNK_BYTES)
    gathering = MessageBuffer(begin, sum(sizes))
    done = [isinstance(chunk, Chunk) and gathering.add(chunk) for chunk in chunks]
    assert done == [False] * (len(done) - 1) + [True] * bool(done)
    assert bytes(gathering.data) == b"".join(parts)


def test_bytes_beyond_the_limit_or_the_announcement_are_refused() -> None:
    for size in (0, 11):
        with pytest.raises(BadFrame, match="at most 10"):
            MessageBuffer(Begin("a", size), 10)
    gathering = MessageBuffer(Begin("a", 3), 10)
    for data in (b"", b"four"):
        with pytest.raises(BadFrame):
            gathering.add(Chunk(data))
