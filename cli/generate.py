"""Verb `fedveil generate`: text that the language model of a run writes."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Annotated

from ..base.extras import require_extra
from .grammar import MovedBase, app, argument, option, task_keys, verb

INFINITE = "infinity"  # epsilon without privacy, in a run's result
WARNING = (
    "warning: no epsilon is known for this model: what it writes may repeat clients' texts word by word; "
    "share it with nobody who may not read those"
)


@verb(app, "generate", "Let a run's language model write.", panel="Run")
def generate(
    run: Annotated[Path, argument("RUN", "Folder of an ended run, or a client's bundle.", file_okay=False)],
    text: Annotated[str, argument("TEXT", "Beginning of the text.")],
    tokens: Annotated[int, option("N", "Largest number of tokens that are added.")] = 64,
    temperature: Annotated[
        float, option("T", "Randomness of the choice of a token; 0: the likeliest one.")
    ] = 0.8,
    seed: Annotated[int, option("N", "Number that the choices follow from; another gives another text.")] = 0,
    base: MovedBase = "",
) -> int:
    """Write on from a text by the language model of a run with task=text, up to the end that the model gives it.

    Example:
      fedveil generate runs/first "Dear friend,"
      fedveil generate runs/first "Dear friend," --tokens 200 --temperature 0
    """
    require_extra("text", "fedveil generate")
    from ..text.generate import Decoding, continuation, lines_of
    from .predict import load_model

    loaded = load_model(run, (), task_keys(base))
    pieces = continuation(loaded.model, loaded.task, text, Decoding(tokens, temperature, seed))
    if not _has_promise(run):
        print(WARNING, file=sys.stderr)
    for word in lines_of(chain([text], pieces)):
        print(word, end="", flush=True)
    return 0


def _has_promise(run: Path) -> bool:
    """Return whether a run's result states a finite epsilon against whoever has the model; a client's bundle has none."""
    from ..run.files import RESULT
    from ..run.run_files import read_object

    rows = read_object(run / RESULT).get("privacy", [])
    return any(row["adversary"] == "model" and row["epsilon"] != INFINITE for row in rows)
