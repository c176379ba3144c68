"""Recomputation of a ledger without fedveil."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from shared.bundles import Signed


def test_the_bundle_recomputes_its_ledger_without_fedveil(signed: Signed) -> None:
    script = runpy.run_path(str(signed.bundle / "recompute_ledger.py"))
    assert "fedveil" not in re.sub(
        '""".*?"""', "", (signed.bundle / "recompute_ledger.py").read_text(), flags=re.DOTALL
    )
    found = script["main"](str(signed.bundle / "ledger.json"))
    result = json.loads((signed.bundle / "result.json").read_text())
    claimed = {row["adversary"]: row["epsilon"] for row in result["privacy"] if row["sampling"] != "none"}
    assert {who: each["epsilon"] for who, each in found.items()} == pytest.approx(claimed, rel=0.02)


def test_the_program_that_recomputes_prints_epsilon_alone(signed: Signed) -> None:
    program = Path(__file__).parents[3] / "evidence" / "binding" / "recompute_ledger.py"
    command = [sys.executable, str(program), str(signed.bundle / "ledger.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "clients" in json.loads(done.stdout) and done.stderr == ""
