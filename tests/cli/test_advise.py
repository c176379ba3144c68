"""Advice on `privacy=`: the questions of the page, in a terminal."""

import io
import sys
from pathlib import Path

import pytest

from fedveil.base.refusal import Refusal
from fedveil.cli.advise import OTHERWISE, QUESTIONS, advise
from fedveil.messages.training_order import ModeName

PAGE = Path(__file__).parents[2] / "docs" / "choose.md"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("at", range(len(QUESTIONS)), ids=[each.privacy for each in QUESTIONS])
def test_the_first_yes_decides(
    at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("n\n" * at + "perhaps\nYes\n"))
    assert advise(["task=heart"]) == 0
    text = capsys.readouterr().out
    assert (
        f"fedveil plan task=heart privacy={QUESTIONS[at].privacy}\n" in text and text.count("[y/n]") == at + 2
    )


def test_without_a_yes_records_are_hidden_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("n\n" * len(QUESTIONS)))
    assert advise([]) == 0
    assert f"privacy={OTHERWISE.privacy}:" in capsys.readouterr().out


def test_advice_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(Refusal, match="is no terminal; read"):
        advise([])


def test_the_page_has_the_same_questions_and_every_mode() -> None:
    rows = [f"| {each.text} | `privacy={each.privacy}` | {each.reason} |" for each in QUESTIONS]
    assert "\n".join(rows) in PAGE.read_text()
    assert {each.privacy for each in QUESTIONS} == {str(mode) for mode in ModeName}
