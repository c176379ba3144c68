"""Runs and answers that reports are made of in tests, and what a report must be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedveil.evidence.page import PAGE
from fedveil.evidence.page_text import references

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEPT, ASKED, OLD = (FIXTURES / name for name in ("reported_run", "asked_questions", "before_the_rooms"))
GOLDEN = KEPT / "golden" / "report.json"


def edited(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the object in a JSON file."""
    fields = json.loads((folder / name).read_text())
    change(fields)
    (folder / name).write_text(json.dumps(fields))


def set_fields(path: Path, **fields: Any) -> None:
    """Set keys of the object in a JSON file."""
    edited(path.parent, path.name, lambda content: content.update(fields))


def texts_of(page: str) -> dict[str, str]:
    """Return the texts of a page that refer to its report, by pointer."""
    return {each.pointer: each.text for each in references(page)}


def validated(report: dict[str, Any], schema: str = "report") -> dict[str, Any]:
    """Return a report that its own published schema accepts."""
    jsonschema = pytest.importorskip("jsonschema")
    published = json.loads((PAGE / f"{schema}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(published)
    validator = jsonschema.Draft202012Validator(published)
    assert [error.message for error in validator.iter_errors(report)] == []
    return report
