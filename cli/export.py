"""Export of a run's model: the folder is made, and its card is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..export.export import Order
from ..export.export import export as made


def export(
    run: Path, asked: tuple[str, str | None, Path | None, Path | None, tuple[str, ...]], *, as_json: bool
) -> int:
    """Export a run's model and print its card.

    Args:
      run: folder of the run.
      asked: the fields of an `Order`.
      as_json: whether the card is printed as JSON.

    Returns:
      The exit code.
    """
    folder, card = made(run, Order(*asked))
    print(json.dumps(card, indent=1) if as_json else "\n".join([f"{folder}/{card['file']}", *told(card)]))
    return 0


def told(card: Mapping[str, Any]) -> list[str]:
    """Return the lines of a card."""
    facts = list(_facts(card))
    width = max(len(name) for name, _ in facts)
    return [f"  {name:{width}}  {said}" for name, said in facts]


def _facts(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    share = card["bytes"] / card["released_bytes"]
    larger = ": the program of so small a model outweighs its numbers" if share > 1 else ""
    yield "size", f"{card['bytes']} bytes, {share:.3g} of the released model's{larger}"
    yield "latency", f"{card['milliseconds_a_row']:.3g} ms per row, on one thread here"
    if card["measured_on"] is None:
        yield "agreement", "not measured: there are no public data; name some with --public"
    else:
        same = "" if card["agreement"] is None else f"{card['agreement']:.2%}, "
        where = f"on {card['rows']} rows of {card['measured_on']}"
        yield "agreement", f"{same}outputs within {card['largest_difference']:.2g}, {where}"
    for name, now in (card["metrics"] or {}).get("exported", {}).items():
        yield name, f"{now:.4g}, and {card['metrics']['released'][name]:.4g} of the released model"
    for row in card["privacy"]:
        if row["adversary"] == "model":
            spent = f"{_number(row['epsilon'])} of a {row['unit']} at delta {row['delta']:g}"
            yield "epsilon", f"{spent}, that of the run"


def _number(epsilon: Any) -> str:
    return f"{epsilon:.4g}" if isinstance(epsilon, float | int) else str(epsilon)
