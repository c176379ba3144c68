"""Pictures of a report: exposure of secrets, and survival curves of answers."""

import re
from pathlib import Path
from typing import Any

from shared.reports import edited, texts_of, validated

from fedveil.evidence.content import report_of
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences
from fedveil.evidence.pictures import exposed
from fedveil.run.run_files import read_run


def test_exposure_of_secrets_is_drawn_with_its_control(kept: Path) -> None:
    def with_secrets(fields: dict[str, Any]) -> None:
        figures = {"unplanted": 1.31, "limit": 9.966}
        bits = {16: 7.25, 1: 1.5}
        fields["audit"]["memorisation"] = [
            {"name": f"exposure_x{copies}", "p_value": 0.01, "shown": {"bits": each, **figures}}
            for copies, each in bits.items()
        ]

    plain = page_of(report_of(read_run(kept)))
    edited(kept, "result.json", with_secrets)
    report = validated(report_of(read_run(kept)))
    assert [(row.copies, row.bits) for row in exposed(report)] == [(1, 1.5), (16, 7.25)]
    page = page_of(report)
    assert 'id="chart-exposure-title"' in page and "chart-exposure" not in plain
    shown = texts_of(page)
    assert shown["/audit/by_heart/0/shown/bits"] == "7.25"
    text = re.sub(r"<[^>]*>", "", page)
    assert "Secrets that 16 clients hold: exposure 7.25 of 9.97 bits" in text
    assert "p-value 0.01, bits 7.25, unplanted 1.31, limit 9.966." in text
    assert differences(page, report) == []
