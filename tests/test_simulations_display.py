"""What a person sees of a run that is no terminal's."""

import pytest

from fedveil.server.run.display import Display, ShownRound


def test_a_round_that_released_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("title", 2, {"client": 3.0}) as display:
        display.show(ShownRound(1, {"accuracy": 0.5}, 1.0, None, 4, 5, 1))
        display.show(ShownRound(2, {"accuracy": 0.5}, 2.0, None, 0, 5, 5, abandoned=True))
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.endswith("4 of 5 clients")
    assert second.endswith("0 of 5 clients  abandoned: nothing was released")
