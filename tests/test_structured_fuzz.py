"""Input aimed at structure: whatever another sends or leaves in a file is read, or refused by name, and nothing else."""

import json
import runpy
from pathlib import Path

import pytest

FUZZ = runpy.run_path(str(Path(__file__).parent / "faults" / "structured_fuzz.py"))
SEED, FEW, MANY = 20261126, 4_000, 1_000_000


def test_thousands_of_inputs_are_read_or_refused_by_name(tmp_path: Path) -> None:
    seen, wrong = FUZZ["fuzzed"](tmp_path, FEW, SEED)
    assert not wrong, wrong[:20]
    assert seen.total() >= FEW


@pytest.mark.campaign
def test_a_million_inputs_are_read_or_refused_by_name(tmp_path: Path) -> None:
    seen, wrong = FUZZ["fuzzed"](tmp_path, MANY, SEED + 1)
    print(json.dumps({"inputs": seen.total(), **dict(sorted(seen.items())), "wrong": wrong[:20]}, indent=1))
    assert not wrong, wrong[:20]
    assert seen.total() >= MANY
