"""Input aimed at structure: whatever another sends or leaves in a file is read, or refused by name, and nothing else."""

import json
import runpy
from pathlib import Path

import msgpack
import pytest

from fedveil.privacy.secagg.client import Participant, read_state
from fedveil.privacy.secagg.refusal import Refused
from fedveil.privacy.secagg.suite import SUITES, seal
from fedveil.privacy.secagg.transcript import Purpose, frame

FUZZ = runpy.run_path(str(Path(__file__).parent / "faults" / "structured_fuzz.py"))
SEED, FEW, MANY = 20261126, 2_000, 1_000_000


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


@pytest.mark.parametrize(
    "body",
    [[3, [[float("inf"), 0, 0]], []], [3, [[[], 0, 0]], []], [4, [], [{}]], [4, [], [[]]], [[], [], []], {}],
)
def test_a_memory_of_other_types_is_refused_by_name(body: object) -> None:
    [[node, old]] = list(FUZZ["COHORT"]["Cohort"](2, 1).nodes.items())[:1]
    sealed = seal(SUITES[1], bytes(32), msgpack.packb(body), frame(Purpose.STATE, node))
    with pytest.raises(Refused):
        read_state(Participant(node, old.key, old.policy, old.roster), sealed, bytes(32))
