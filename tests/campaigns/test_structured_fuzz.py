"""Input aimed at structure: whatever another sends or leaves in a file is read, or refused by name, and nothing else."""

import io
import json
import random
import runpy
from contextlib import suppress
from pathlib import Path

import msgpack
import numpy as np
import pytest

from fedveil.base.refusal import Refusal
from fedveil.cli.audit import _read_both_scores, _read_scores
from fedveil.deployment.device.linear import read_table
from fedveil.privacy.audit import round_rows
from fedveil.privacy.audit.client_rows import arrays_of
from fedveil.privacy.secagg.client import Participant, read_state
from fedveil.privacy.secagg.refusal import Refused
from fedveil.privacy.secagg.suite import SUITES, seal
from fedveil.privacy.secagg.transcript import Purpose, frame
from fedveil.tasks.exported import read_array

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "structured_fuzz.py"))
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


def saved(*arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, *arrays) if len(arrays) == 1 else np.savez(file, inputs=arrays[0], targets=arrays[1])
    return file.getvalue()


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Return bytes with an edit of where a header is."""
    at = draw.randrange(min(len(whole), 400))
    kind = draw.choice(("flip", "cut", "end", "add"))
    if kind == "flip":
        return whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
    more = draw.choice((b"(", b"'", b"{", b"0", b"99999", b"\0", b"\n")) if kind == "add" else b""
    return whole[:at] + more + {"cut": whole[at + 3 :], "add": whole[at:]}.get(kind, b"")


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # which Python 2 would have written
def test_a_damaged_array_is_refused_by_name_or_ends_its_file(tmp_path: Path) -> None:
    draw, path = random.Random(SEED), tmp_path / "x.npy"
    wholes = [
        saved(np.zeros((), round_rows.row_type(4))),
        saved(np.arange(12.0)),
        saved(np.eye(3, dtype=np.float32), np.arange(3)),
    ]
    for _ in range(FEW):
        path.write_bytes(damaged(draw.choice(wholes), draw))
        arrays_of(path)
        for read in (lambda: round_rows.read(path, 4), lambda: read_array(path), lambda: read_table(path)):
            with suppress(Refusal):
                read()
        with suppress(Refusal):
            _read_scores(path)
        with suppress(Refusal):
            _read_both_scores(path.replace(tmp_path / "x.npz"))
