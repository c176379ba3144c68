"""Every mutation of tests/test_mutations.py: what an audit of a whole run says of it, or why no audit can say anything.

`python tests/oracles/audit_mutations.py [NAME ...]` prints the rows of the table in docs/audit-evidence.md; about ten
minutes. A run that does not end within ten is a row too.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MOST_SECONDS, TIMED_OUT = 600, 124
MADE: dict[str, Any] = runpy.run_path(str(ROOT / "tests" / "test_mutations.py"))
ALL = ("cohort=all", "num_rounds=20")
SEPARATED = ("cohort=min_separation", "cohort.size=40")
MASKED = ("task=digits", "task.num_clients=40", "cohort=all", "num_rounds=8", "privacy=client_distributed",
          "privacy.noise_multiplier=2", "privacy.target_epsilon=null", "privacy.target_delta=0.005")  # fmt: skip
RECORD = ("task=digits", "task.num_clients=20", "privacy=record", "num_rounds=10", "audit.looks=2")
RUNS: dict[str, tuple[str, ...]] = {
    "noise removed": (),
    "noise forgets what its table drew": (),
    "noise scaled by a wrong clip": (),
    "noise scaled by the next round's clip": (),
    "same noise in two rounds": (),
    "sampling fixed while accounted as Poisson": (),
    "composition dropped": (),
    "composition of plain noise dropped": ALL,
    "wrong adjacency": (*ALL, "privacy.adjacency=replace-one"),
    "clip skipped at the client": (),
    "clip skipped at the server": (),
    "separation not enforced": SEPARATED,
    "sensitivity forgets how often a client takes part": SEPARATED,
    "adaptive clipping in the wrong direction": ("privacy.clipping=adaptive",),
    "adaptive noise gated by PLD": ("privacy.noise_schedule=adaptive",),
    "metrics uncharged": (),
    "what was added in place stays though it is too long": (),
    "mask skipped": MASKED,
    "a client's share of the noise dropped": MASKED,
    "layers of noise that nobody adds": MASKED,
    "clip skipped in book-keeping": RECORD,
    "Poisson batches drawn with a fixed size": RECORD,
    "RNG reused across clients": RECORD,
    "a canary record that is out trains": RECORD,
}
BEYOND: dict[str, str] = {}


def row(name: str, tree: Path) -> str:
    """Apply one mutation to the copy, run it, and say what its audit says."""
    if name in BEYOND:
        return f"| {name} | - | {BEYOND[name]} |"
    mutation = MADE["MUTATIONS"][name]
    file = tree / mutation.file
    source = file.read_text()
    if source.count(mutation.before) != 1:
        return f"| {name} | - | the mutation no longer fits the code |"
    file.write_text(source.replace(mutation.before, mutation.after))
    command = ["timeout", "-k", "10", str(MOST_SECONDS), sys.executable, "-B", "-m", "fedveil", "simulate"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            ran = subprocess.run(
                [*command, "--json", "audit=full", f"hydra.run.dir={folder}/run", *RUNS[name]],
                env={**os.environ, "PYTHONPATH": str(tree.parent)},
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
    finally:
        file.write_text(source)
    return f"| {name} | {ran.returncode} | {_said(ran)} |"


def _said(ran: subprocess.CompletedProcess[str]) -> str:
    if ran.returncode == TIMED_OUT:
        return f"did not end within {MOST_SECONDS} s"
    said = ran.stdout.strip().splitlines()[-1:] or [""]
    if not said[0].startswith("{"):
        return (ran.stderr.strip().splitlines() or ["?"])[-1]
    result = json.loads(said[0])
    if (audit := result.get("audit")) is None:
        return result["reason"]
    alarms = [f"{a['level']} {a['test']} round {a['round']} ({a['p_value']:.1g})" for a in audit["alarms"]]
    return ", ".join(alarms) or audit["verdict"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        copied = Path(made) / "fedveil"
        for room in MADE["ROOMS"]:
            shutil.copytree(ROOT / room, copied / room, ignore=shutil.ignore_patterns("__pycache__"))
        for each in ("__init__.py", "__main__.py", "py.typed"):
            shutil.copy(ROOT / each, copied / each)
        print("| mutation | exit code | alarms, or the verdict |\n|---|---|---|")
        for each in sys.argv[1:] or (*RUNS, *BEYOND):
            print(row(each, copied), flush=True)
