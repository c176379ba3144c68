"""Compression before the clip: one matrix a round for all, what it keeps of a vector, and what one client moves."""

import math
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.bounded_decoding import build
from fedveil.privacy.mechanisms import compression
from fedveil.privacy.mechanisms.compression import (
    COMPRESSED,
    Compression,
    Sketch,
    compress,
    compressed_layout,
    expand,
    sketch_of,
)
from fedveil.privacy.mechanisms.private_sum import add_noise, decode, encode
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec, compressed_spec

KINDS = pytest.mark.parametrize("kind", ["mask", "project"])
LAYOUT = {"w": (7, 5), "b": (6,), "beside": (3,)}
SIZE, KEPT = 41, 11


def drawn(kind: str, row: int = 1, run: str = "run") -> Any:
    return sketch_of(Compression(kind, SIZE, KEPT, run), row)


def update(seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in LAYOUT.items()}


def flat(arrays: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(arrays[name]) for name in ("w", "b")])


@KINDS
@given(st.integers(1, 70), st.data())
@settings(max_examples=40)
def test_the_rows_of_a_round_are_orthonormal(kind: str, size: int, data: Any) -> None:
    kept = data.draw(st.integers(1, size))
    sketch = sketch_of(Compression(kind, size, kept), data.draw(st.integers(1, 1 << 40)))
    matrix = sketch.of(np.eye(size)).T
    assert matrix.shape == (kept, size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(kept), atol=1e-12)
    values = np.arange(1.0, kept + 1)
    np.testing.assert_allclose(sketch.back(values), matrix.T @ values, atol=1e-12)


@KINDS
def test_each_round_has_its_matrix_and_all_clients_the_same(kind: str) -> None:
    vector = np.arange(1.0, SIZE + 1)
    one, again = drawn(kind).of(vector), drawn(kind).of(vector)
    assert np.array_equal(one, again)
    for other in (drawn(kind, row=2), drawn(kind, run="other")):
        assert not np.array_equal(one, other.of(vector))


def test_coordinates_of_a_round_are_the_same_with_every_numpy() -> None:
    """A device draws them by itself: they follow from AES and SHA-256 alone."""
    sketch = sketch_of(Compression("mask", 20, 5, "run-1"), 3)
    assert sketch.of(np.arange(20)).tolist() == [0, 4, 8, 12, 15]


def test_equal_words_leave_no_choice_of_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy's partition leaves one open, and a device may have another release of it than the server."""
    words = np.random.default_rng(0).integers(0, 4, 1000).astype(np.uint64)
    monkeypatch.setattr(compression, "keyed_stream", lambda *_: SimpleNamespace(uint64=lambda _: words))
    for kept in (1, 300, 1000):
        sketch = Sketch(Compression("mask", 1000, kept), b"equal words")
        small = np.flatnonzero(words <= np.sort(words)[kept - 1])
        assert sketch.of(np.arange(1000)).tolist() == small[:kept].tolist()


@KINDS
def test_average_over_rounds_is_the_update(kind: str) -> None:
    rounds = 4000
    total = sum(
        flat(expand(compress(update(), sketch), LAYOUT, sketch))
        for sketch in (drawn(kind, row) for row in range(1, rounds + 1))
    )
    error = np.linalg.norm(total / rounds - flat(update())) / np.linalg.norm(flat(update()))
    assert error < 4 * math.sqrt(SIZE / KEPT / rounds)


@KINDS
def test_arrays_behind_the_update_travel_as_they_are(kind: str) -> None:
    sketch, given_ = drawn(kind), update()
    sent = compress(given_, sketch)
    assert list(sent) == [COMPRESSED, "beside"] and sent[COMPRESSED].shape == (KEPT,)
    assert compressed_layout(LAYOUT, sketch.compression) == {name: a.shape for name, a in sent.items()}
    assert np.array_equal(expand(sent, LAYOUT, sketch)["beside"], given_["beside"])
    with pytest.raises(ValueError, match="40 coordinates"):
        compress(given_, sketch_of(Compression(kind, 40, 4), 1))


@KINDS
@given(st.integers(0, 1 << 30), st.sampled_from([1e-3, 1.0, 1e6]))
@settings(max_examples=40)
def test_client_moves_the_sum_by_no_more_than_the_projected_norm(kind: str, seed: int, scale: float) -> None:
    clip, compression = 2.0, Compression(kind, SIZE, KEPT)
    spec = compressed_spec(SumSpec(clip, (Segment("loss", 5.0),), 0.02), compression)
    assert spec.clipping_norm == clip * math.sqrt(KEPT / SIZE)
    vector, _ = encode(compress(update(seed, scale), drawn(kind)), {"loss": 1.0}, spec)
    assert np.linalg.norm(vector.astype(float)) * spec.step <= spec.clipping_norm * (1 + 1e-12)


@KINDS
def test_signal_over_noise_is_that_of_a_whole_update(kind: str) -> None:
    """A long update in every round, and noise at one multiplier: as much of each is in the sum of all rounds."""
    clip, multiplier, rounds = 2.0, 0.5, 300
    long = update(scale=100.0) | {"beside": np.zeros(3, np.float32)}
    whole, noised = np.zeros(SIZE), np.zeros(SIZE)
    spec = compressed_spec(SumSpec(clip), Compression(kind, SIZE, KEPT))
    for row in range(1, rounds + 1):
        sketch = drawn(kind, row)
        sent, _ = encode(compress(long, sketch), {}, spec)
        noisy, event = add_noise(sent.astype(float), multiplier, spec, Randomness(1).stream("noise", row))
        assert event.noise_multiplier == multiplier
        inner = compressed_layout(LAYOUT, spec.compression)  # pyright: ignore[reportArgumentType]
        means = [decode(each, inner, spec, 1.0)[0] for each in (sent.astype(float), noisy)]
        clean, full = (flat(expand(mean, LAYOUT, sketch)) for mean in means)
        whole, noised = whole + clean, noised + full - clean
    direction = flat(long) / np.linalg.norm(flat(long))
    assert whole @ direction / rounds == pytest.approx(clip, rel=0.15)
    deviation = math.sqrt(float((noised**2).mean()) / rounds)
    assert deviation == pytest.approx(multiplier * clip, rel=0.3)


@pytest.mark.parametrize("broken", [{"kind": "top_k"}, {"kept": 0}, {"kept": SIZE + 1}, {"coordinates": 0}])
def test_a_spec_from_elsewhere_that_is_none_is_refused(broken: dict[str, Any]) -> None:
    plain = asdict(compressed_spec(SumSpec(1.0), Compression("mask", SIZE, KEPT)))
    plain["segments"] = []
    assert build(SumSpec, plain).compression == Compression("mask", SIZE, KEPT)
    with pytest.raises(ValueError):
        build(SumSpec, plain | {"compression": plain["compression"] | broken})
