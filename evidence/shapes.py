"""Shapes of an additive model for a report: the contributions of bins of numbers and words of categories."""

from __future__ import annotations

from typing import Any

from ..run.run_files import Fields

DIGITS = 6  # of a value; float32 has no more


def told_shapes(shapes: Fields | None) -> dict[str, Any] | None:
    """Return the shapes of a model, one for each column and score, those that reach furthest first; None without any."""
    if shapes is None:
        return None
    found = [
        _shape(shape, score, place)
        for shape in shapes["shapes"]
        for place, score in enumerate(shapes["scores"])
    ]
    found.sort(key=lambda each: each["lowest"] - each["highest"])
    return {"intercept": [_rounded(each) for each in shapes["intercept"]], "shapes": found}


def _shape(shape: Fields, score: str, place: int) -> dict[str, Any]:
    values = [_rounded(each) for each in shape["values"][place]]
    return {
        "column": shape["column"],
        "score": score,
        "edges": shape.get("edges"),
        "words": shape.get("words"),
        "values": values,
        "lowest": min(values),
        "highest": max(values),
        "missing": _rounded(shape["missing"][place]) if "missing" in shape else None,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
