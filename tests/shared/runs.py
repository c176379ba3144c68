"""Runs of tests, and what they leave: lines of JSON and the reservations of a ledger."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.run.run import RunResult
from fedveil.simulations.simulate import simulate


def run_quietly(overrides: Iterable[str], folder: Path) -> RunResult:
    """Run what `fedveil simulate *overrides` runs."""
    return simulate(settings_from_overrides(list(overrides)), folder, quiet=True)


def resume(folder: Path) -> RunResult:
    """Go on with a run."""
    return run_quietly([f"resume={folder}"], folder)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, such as the rounds in metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def reservations(ledger: Path | str) -> list[dict[str, Any]]:
    """Return the payloads of what was reserved on a ledger."""
    return [json.loads(entry.payload) for entry in read_entries(ledger) if entry.kind == "reserve"]
