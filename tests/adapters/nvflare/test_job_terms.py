"""Terms of a job: the refusals of the command line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shared.nvflare_jobs import TERMS

from fedveil.base.refusal import Refusal


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target_delta": 0.5}, r"target_delta=0\.5: with 3 clients"),
        ({"adjacency": "add-or-remove-one"}, "use zero-out"),
        ({"accept_vacuous": False}, "population=3: this guarantee is vacuous"),
        ({"clients": 4}, "population=3: a round has 4 clients"),
        ({"parameters": 0}, "parameters=0"),
        ({"clipping_norm": -1.0}, r"clipping_norm=-1\.0"),
        ({"data_id": "no name"}, "data_id='no name'"),
        ({"ledger_dir": "here"}, "ledger_dir='here'"),
        ({"target_epsilon": -1.0}, r"target_epsilon=-1\.0"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_a_job_has_the_refusals_of_the_command_line(
    changes: dict[str, Any], sentence: str, home: Path
) -> None:
    with pytest.raises(Refusal, match=sentence):
        replace(TERMS, **changes).plan()
    assert not list(home.rglob("*.ledger"))
