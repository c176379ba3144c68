"""Packed numbers are unpacked bit for bit, in blocks of any size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.mechanisms import packing
from fedveil.privacy.mechanisms.packing import Packed, pack, packed_size
from fedveil.privacy.mechanisms.private_sum import CohortSum, add_packed
from fedveil.privacy.mechanisms.sum_spec import SumSpec


@given(st.integers(1, 31), st.data())
@settings(max_examples=100)
def test_packing_round_trips_bit_for_bit(width: int, data: st.DataObject) -> None:
    bound = 1 << (width - 1)
    numbers = np.array(data.draw(st.lists(st.integers(-bound, bound - 1), max_size=40)), np.int32)
    packed = pack(numbers, width)
    assert packed.shape == (packed_size(len(numbers), width),) and packed.dtype == np.uint8
    assert np.array_equal(Packed(packed, len(numbers), width).numbers(), numbers)
    if width < 31:
        with pytest.raises(ValueError, match=f"more than {width} bits"):
            pack(np.array([bound], np.int32), width)
    with pytest.raises(ValueError, match="are not"):
        Packed(packed, len(numbers) + 8, width).numbers()


@pytest.mark.parametrize("width", [3, 8, 18, 31])
def test_packing_in_several_blocks_gives_the_same_bytes(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(width).integers(-(1 << width - 1), 1 << width - 1, 27, dtype=np.int32)
    whole = pack(numbers, width)
    monkeypatch.setattr(packing, "BLOCK", 8)
    assert np.array_equal(pack(numbers, width), whole)
    assert np.array_equal(Packed(whole, 27, width).numbers(), numbers)
    spec = SumSpec(1.0, cells=1 << 29)
    total = CohortSum(np.zeros(27))
    add_packed(total, Packed(whole, 27, width), spec)
    assert np.array_equal(total.total, numbers) or (total.clipped_again and width == 31)
