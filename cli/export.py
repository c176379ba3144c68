"""Verb `fedveil export`: a run's model in the format of a runtime, and its card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from ..base.bounded_decoding import format_number
from .grammar import Json, MovedBase, allow_local_modules, app, argument, flag, option, task_keys, verb

TUNED = {True: "on public data", False: "no; public data of --public tune it"}


@verb(app, "export", "Convert a run's model for a device.", needs="client", panel="Run")
def export(
    run: Annotated[Path, argument("RUN", "Folder of an ended run, or a client's bundle.", file_okay=False)],
    to: Annotated[
        str, option("FORMAT", "", words=("safetensors", "onnx", "torchscript", "int8", "peft", "merged"))
    ],
    student: Annotated[
        str | None, option("MODULE:CLASS", "Smaller model to distil the model into; needs --public.")
    ] = None,
    prune: Annotated[
        str, option("SHARE", "Share of channels to cut out; weights:SHARE sets weights to zero.")
    ] = "",
    public: Annotated[
        Path | None, option("DATA", "Public inputs to train a student or a pruned model: tables or .npy.")
    ] = None,
    out: Annotated[
        Path | None, option("FOLDER", "Output folder; RUN/export/FORMAT by default.", file_okay=False)
    ] = None,
    allow_module: Annotated[list[str] | None, option("MODULE", "Module of the run's own task.")] = None,
    base: MovedBase = "",
    personal: Annotated[
        bool, flag("--personal", "Export a client's own model, which has no privacy from whoever gets it.")
    ] = False,
    client: Annotated[
        int | None, option("NUMBER", "Number of the simulated client whose own model --personal exports.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Write a run's model, a smaller student or a pruned one, in the format of a runtime. Epsilon does not change.

    Example:
      fedveil export runs/first --to int8
      fedveil export runs/first --to onnx --student small:Net --public pictures.npy
      fedveil export runs/first --to onnx --prune 0.5 --public pictures.npy
      fedveil export runs/letters --to peft
      fedveil export hearts/clients/cleveland --to int8 --personal
    """
    from ..deployment.device import saved_model
    from ..export import export as exports
    from ..export.prune import pruning_of
    from ..tasks.exported import FILES

    allow_local_modules()
    modules = tuple(allow_module or ())
    pruning = exports.NO_PRUNING
    if prune:
        pruning = pruning_of(prune)
    order = exports.Order(to, student, public, out, modules, task_keys(base), personal, client, pruning)
    if bundle := saved_model.bundle_of(run):
        folder, card = saved_model.export_saved(bundle, order)
    else:
        folder, card = exports.export(run, order)
    first = folder / (card["file"] if card["to"] in FILES else "")
    print(json.dumps(card, indent=1) if as_json else "\n".join([str(first), *_lines(card)]))
    return 0


def _lines(card: Mapping[str, Any]) -> list[str]:
    """Return a card in two columns."""
    facts = list(_facts(card))
    width = max(len(name) for name, _ in facts)
    return [f"  {name:{width}}  {value}" for name, value in facts]


def _facts(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each fact: size, latency, agreement, metrics, epsilon."""
    if "files" in card:
        yield "size", f"{card['bytes']} bytes in {len(card['files'])} files"
        if "largest_difference" in card:
            yield (
                "logits",
                f"those of the run within {card['largest_difference']:.2%} of the largest, on a public sentence",
            )
    else:
        yield from _comparison(card)
    if not card["privacy"]:  # of a device, which does not know the whole run
        yield "privacy", card["privacy_said"]
    for row in card["privacy"]:
        if row["adversary"] == "model":
            spent = f"{format_number(row['epsilon'], '.4g')} of a {row['unit']} at delta {row['delta']:g}"
            yield from (
                [("privacy", row["said"])] if "said" in row else [("epsilon", f"{spent}, that of the run")]
            )


def _removed(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the facts on what pruning removed, and on whether the rest was tuned."""
    pruning = card["pruned"]
    if pruning["what"] == "weights":
        yield (
            "zeros",
            f"{pruning['zeros']:.1%} of the numbers; {card['compressed_bytes']} bytes once compressed",
        )
    else:
        sizes = [
            f"{after} of {before} of layer {name}" for name, (before, after) in pruning["layers"].items()
        ]
        yield "channels", ", ".join(sizes)
    yield "tuned", TUNED[pruning["tuned"]]


def _comparison(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the facts that compare an export of one file with the released model."""
    from ..evidence.page_text import text_of

    share = card["bytes"] / card["released_bytes"]
    larger = ": the program of so small a model outweighs its numbers" if share > 1 else ""
    yield "size", f"{card['bytes']} bytes, {share:.3g} of the released model's{larger}"
    if card["pruned"]:
        yield from _removed(card)
    yield "latency", f"{card['milliseconds_a_row']:.3g} ms per row, on one thread here"
    if card["measured_on"] is None:
        yield "agreement", "not measured: there are no public data; name some with --public"
    else:
        same = "" if card["agreement"] is None else f"{card['agreement']:.2%}, "
        where = f"on {card['rows']} rows of {card['measured_on']}"
        yield "agreement", f"{same}outputs within {card['largest_difference']:.2g}, {where}"
    metrics = card["metrics"] or {}
    for name, value in metrics.get("exported", {}).items():
        before = text_of(metrics["released"][name], "metric")
        yield text_of(name, "word"), f"{text_of(value, 'metric')}, and {before} of the released model"
