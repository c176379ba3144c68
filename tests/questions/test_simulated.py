"""Questions to clients on this machine: their columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from shared.questions import FREE, ROWS, Ages, federation, inquiry

from fedveil.base.refusal import Refusal
from fedveil.privacy.statistics.columns import Numbers
from fedveil.questions.simulated import ask_here, require_columns


class Words(Ages):
    """The same, whose ages are words."""

    def columns(self, client: int) -> Mapping[str, np.ndarray]:
        return {"age": np.array(["old"] * ROWS)}


def test_a_column_that_nobody_has_is_refused_before_it_is_charged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Refusal, match=re.escape("of='agee': is no column; there are age")):
        ask_here(federation(), inquiry(of="agee"), FREE, tmp_path / "into")
    assert not (tmp_path / "into").exists() and not caplog.records


def test_only_the_names_of_columns_are_looked_at() -> None:
    """A refusal for what a row holds would tell it."""
    with patch.object(Numbers, "read", autospec=True, side_effect=Numbers.read) as read:
        require_columns(Words(), inquiry(), None)
    assert read.call_count and all(not len(call.args[1]["age"]) for call in read.call_args_list)
