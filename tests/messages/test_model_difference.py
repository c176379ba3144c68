"""Difference of two models: few bytes, from which the new model's bits follow, and none for which a reader fails."""

import math
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedveil.messages.model_difference import NoDifference, apply, bytes_of, difference, hash_of
from fedveil.strategies.shared_model import shared, steps_after

Arrays = dict[str, NDArray[Any]]


numbers = st.lists(st.floats(width=32), min_size=3, max_size=3)


@given(numbers, numbers)
def test_difference_gives_the_very_bits_of_any_numbers(old: list[float], new: list[float]) -> None:
    before: Arrays = {"w": np.array(old, np.float32), "n": np.array([1, 2])}
    after: Arrays = {"w": np.array(new, np.float32), "n": np.array([1, 3])}
    told = difference(before, after)
    assert told is None or hash_of(apply(before, told)) == hash_of(after)


@given(st.integers(2, 16), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=30)
def test_models_on_a_grid_differ_by_few_bytes_however_far_apart(bits: int, apart: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    sent: list[Arrays] = [{"w": np.zeros(4000, np.float32)}]
    steps: dict[str, int] = {}
    model = sent[0]
    for _ in range(apart + 1):
        after = {"w": model["w"] + draw.normal(size=4000).astype(np.float32)}
        steps, model = steps_after(model, after, bits, steps), after
        sent.append(shared(model, steps))
        assert np.abs(sent[-1]["w"] - model["w"]).max() <= math.ldexp(0.501, steps["w"])
    told = difference(sent[1], sent[-1])
    assert told is not None and hash_of(apply(sent[1], told)) == hash_of(sent[-1])
    assert 8 * len(told) / 4000 < max(2, bits) + math.log2(apart) / 2 + 2


def test_changed_coordinates_alone_are_sent() -> None:
    """Plain averaging of masked updates moves those that were sent, and no other."""
    draw = np.random.default_rng(0)
    old = {"w": draw.normal(size=10_000).astype(np.float32)}
    new = {"w": old["w"].copy()}
    new["w"][draw.permutation(10_000)[:1000]] += 0.1
    told = difference(old, new)
    assert told is not None and len(told) < 1000 * 4 + 10_000 / 8 + 100
    other = np.frombuffer(draw.bytes(40_000), np.float32)
    assert difference(old, {"w": other}) is None
    assert difference(old, {"w": new["w"].astype(np.float64)}) is None
    assert difference(old, {"v": new["w"]}) is None


@given(st.binary(max_size=200))
def test_invalid_difference_is_refused(told: bytes) -> None:
    held: Arrays = {"w": np.ones(30, np.float32)}
    with suppress(NoDifference):
        assert apply(held, told)["w"].shape == (30,)


def test_too_large_difference_is_refused_before_it_unpacks() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(1 << 26)) + packer.flush()
    payload = len(bomb).to_bytes(4, "little") + bomb
    told = bytes([17]) + (0).to_bytes(2, "little") + len(payload).to_bytes(4, "little") + payload
    held: Arrays = {"w": np.ones(30, np.float32)}
    tracemalloc.start()
    with pytest.raises(NoDifference):
        apply(held, told)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 20


def test_difference_needs_no_arrays_in_double_precision() -> None:
    draw = np.random.default_rng(0)
    old: Arrays = {"w": draw.integers(-9999, 9999, 1 << 20).astype(np.float32)}
    new: Arrays = {"w": old["w"] + draw.integers(-9, 9, 1 << 20).astype(np.float32)}
    held: list[float] = []

    def counted(work: Callable[[], Any]) -> Any:
        tracemalloc.start()
        made = work()
        held.append(tracemalloc.get_traced_memory()[1] / bytes_of(new))
        tracemalloc.stop()
        return made

    told = counted(lambda: difference(old, new))
    assert hash_of(counted(lambda: apply(old, told))) == hash_of(new)
    assert max(held) < 2.5, held


def test_a_model_is_as_many_bytes_as_its_arrays() -> None:
    assert bytes_of({"a": np.zeros(3, np.float32), "b": np.zeros(2)}) == 28
