"""Charts as SVG: nothing lies outside its axes."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from fedveil.base.charts import bar


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.sampled_from([[0.0, 1.0], [-1.0, 1.0]]))
def test_a_bar_stays_within_its_axis(values: Sequence[float], ends: list[float]) -> None:
    import re

    low, value, high = sorted(values)
    drawn = bar(value, low, high, ends)
    numbers = [float(each) for each in re.findall(r'[xMH"]=?"?(-?\d+\.\d)', drawn)]
    assert numbers and all(0 <= each <= 180 for each in numbers) and 'width="-' not in drawn
