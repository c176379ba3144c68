"""``fedveil ledger show|verify``: read a ledger that may be in use, or not trusted at all."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..privacy.ledger import read_entries
from ..privacy.ledger import verify as verify_ledger
from ..privacy.refusal import Refusal
from .display import console_for

DAMAGED = 1


def show(path: str) -> int:
    """Print every entry of a ledger; return the exit code."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("seq", "kind", "run", "round", "what", "hash"):
        table.add_column(
            column, no_wrap=column != "what", justify="right" if column in ("seq", "round") else "left"
        )
    for entry in read_entries(Path(path)):
        run, number, mechanism = json.loads(entry.key) if entry.key else ("", "", "")
        what = _what(entry.kind, mechanism, json.loads(entry.payload))
        cells = (str(entry.seq), entry.kind, str(run)[:8], str(number), what, entry.hash[:12])
        table.add_row(*map(Text, cells))  # as it stands: a ledger's text is nobody's markup
    console_for(120).print(table)
    return 0


def _what(kind: str, mechanism: str, payload: dict[str, Any]) -> str:
    if kind == "open":
        return f"{payload['unit']} level, {payload['adjacency']}, owner {str(payload['owner'])[:24]}"
    if kind == "reserve":
        seen_by: dict[str, list[str]] = {}
        for adversary, event in payload["events"].items():
            seen_by.setdefault(in_words(event), []).append(adversary)
        costs = "; ".join(f"{event} to {', '.join(who)}" for event, who in seen_by.items())
        return f"{mechanism}: {costs}; rng {payload['rng']}"
    return str(payload.get("proof", ""))


def in_words(event: dict[str, Any]) -> str:
    """Return an event of a ledger as short text, such as ``Poisson(0.25, Gaussian(3.2192))``."""
    kind, inner = str(event["kind"]), event.get("event")
    numbers = [f"{v:.5g}" for v in event.values() if isinstance(v, int | float) and not isinstance(v, bool)]
    parts = numbers + ([in_words(inner)] if isinstance(inner, dict) else [])
    return f"{kind.removesuffix('Sampled')}({', '.join(parts)})"


def verify(path: str) -> int:
    """Check every entry's hash and recompute epsilon with two accountants; return the exit code."""
    if not Path(path).exists():
        raise Refusal("ledger", path, "there is none; give the path of a ledger")
    # The accountant logs a line for every order of RDP that it leaves out; its bound is valid without them.
    logging.getLogger("absl").setLevel(logging.ERROR)
    found = verify_ledger(Path(path))
    console = console_for(120)
    if not found.ok:
        console.print(f"{path}: DAMAGED: {found.problem}", style="bold red", markup=False)
        return DAMAGED
    head = f"head {found.head.seq} {found.head.hash[:16]}"
    console.print(f"{path}: {found.entries} entries, every hash holds; {head}", markup=False)
    if found.delta is None:
        console.print("nothing was released")
        return 0
    for name, value in (("PLD", found.epsilon_pld), ("RDP", found.epsilon_rdp)):
        if value is not None:
            console.print(f"epsilon by {name}: {value:.4f} at delta {found.delta:g}")
    return 0
