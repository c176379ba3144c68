"""Explanation of one prediction to its owner, on the owner's device."""

from __future__ import annotations

import json
from pathlib import Path

from ..base.refusal import Refusal
from .predict import explanation

LEAST = 5e-5  # of an addition that is shown, in the unit of the score


def explain_row(folder: Path, data: Path, row: int, method: str, *, as_json: bool) -> int:
    """Print the prediction of a device's model for one row, and each input's contribution, the largest first.

    Arguments as of `fedveil client explain`.

    Returns:
      The exit code.

    Raises:
      Refusal: the device keeps no model, or there is no such row.
    """
    if not data.exists():
        raise Refusal("DATA", str(data), "does not exist; name a table or a .npy file")
    columns = explanation(folder, data, (), method)
    count = len(columns["score"])
    if not 1 <= row <= count:
        raise Refusal("--row", row, f"{data} has rows 1 to {count}")
    found = {name: each[row - 1].item() for name, each in columns.items()}
    if as_json:
        print(json.dumps(found))
        return 0
    names = [*found]
    said, parts = names[: names.index("score")], names[names.index("at_baseline") + 1 :]
    print(f"row {row}: {', '.join(f'{name} {_shown(found[name])}' for name in said)}")
    print(f"  {found['at_baseline']:+8.4f}  baseline: midpoint of each number, no bin, no category")
    for name in sorted(parts, key=lambda each: -abs(found[each])):
        if abs(found[name]) >= LEAST:
            print(f"  {found[name]:+8.4f}  {name}")
    print(f"  {found['score']:+8.4f}  score. Nothing was sent from this device, and nothing was charged.")
    return 0


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
