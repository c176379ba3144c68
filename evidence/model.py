"""Model of a run for its page and its card: its title, inputs, classes and confusion matrix."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

from ..base.extensions import TABLE
from ..configs.bundle_files import SCHEMA
from ..run.run_files import Fields, RunFiles

CHOSEN_BY_RUN = "auto"  # of task.model, as in configs.task_settings, which takes pydantic
INTENDED = "ai_annex_iv_1"  # item of the forms whose answer states the intended purpose
PACKAGE_FOLDER = Path(__file__).parents[1]
MAX_LAYERS, MAX_WORDS = 24, 12  # of a model, and of a column's words, that are listed


def model_of(run: RunFiles) -> dict[str, Any]:
    """Return a description of a run's model without its weights; a value is None where the folder does not say it."""
    schema = _schema(run)
    columns: Fields = schema.get("columns", {})
    targets = _targets(schema)
    label = _label(schema, targets)
    classes = _words(columns[targets[0]]) if len(targets) == 1 else []
    return {
        "title": _title(run, label),
        "data": _data(run),
        "about": _about(run),
        "reads": _reads([str(name) for name in columns if name not in targets]),
        "predicts": _predicts(run, label, classes),
        "architecture": _architecture(run),
        "layers": [
            {"name": name, "shape": " x ".join(map(str, shape)) or "1"}
            for name, shape in list(run.shapes.items())[:MAX_LAYERS]
        ],
        "inputs": [
            {"column": str(name), "values": _domain(column)}
            for name, column in columns.items()
            if name not in targets
        ],
        "label": label,
        "classes": classes or None,
        "intended": run.assessment.answers.get(INTENDED),
        "max_grad_norm": run.result.get("max_grad_norm")
        or run.setting("privacy", "max_grad_norm")  # of a run that has not ended, or of an earlier release
        or run.setting("privacy", "record", "max_grad_norm"),
        "confusion": _confusion(run, classes),
    }


def _schema(run: RunFiles) -> Fields:
    """Return the schema of a table in a run folder; empty for any other task."""
    path = run.folder / SCHEMA
    if not path.is_file():
        return {}
    import yaml

    from ..configs.yaml_guard import check_file

    check_file(path)
    # BaseLoader leaves words as they are spelled.
    return cast("Fields", yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader))


def _targets(schema: Fields) -> list[str]:
    """Return the columns of a schema's label; several where it is declared by its kind."""
    declared = schema.get("label")
    values: list[Any] = [*declared.values()] if isinstance(declared, dict) else [declared]
    names = chain.from_iterable(each if isinstance(each, list) else [each] for each in values)
    return [str(name) for name in names if name in schema.get("columns", ())]


def _label(schema: Fields, targets: Sequence[str]) -> str | None:
    """Return what a model of tables predicts in words: the label's columns and its kind; None for other models."""
    declared = schema.get("label")
    kind = f" ({declared['kind']})" if isinstance(declared, dict) else ""
    return f"{', '.join(targets)}{kind}" if targets else None


def _title(run: RunFiles, label: str | None) -> str:
    """Return the title of a model: label and data of a table, or the name of the task's class."""
    target = run.setting("task", "target")
    if label is None:
        return str(target).rpartition(":")[2] if target else str(run.setting("task", "name"))
    folder = run.setting("task", "folder")
    data = run.setting("task", "data_id") or (folder and Path(str(folder)).name)
    return f"{label} of {data}" if data else label


def _data(run: RunFiles) -> str:
    """Return the name of a run's data: its task, and the folder or the data set that it reads."""
    name, target = str(run.setting("task", "name")), run.setting("task", "target")
    folder, data_id = run.setting("task", "folder"), run.setting("task", "data_id")
    sources = (folder and f"folder {Path(str(folder)).name}", data_id and f"data set {data_id}")
    return ", ".join([str(target or f"task {name}"), *filter(None, sources)])


def _about(run: RunFiles) -> str | None:
    """Return what the data of a shipped task are, the first sentence of its module; None of a user's own data."""
    if run.setting("task", "folder") or run.setting("task", "target"):
        return None
    module = TABLE.get(("task", str(run.setting("task", "name"))), "")
    path = PACKAGE_FOLDER / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        return None
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _reads(columns: Sequence[str]) -> str | None:
    """Return what a model of tables reads in words; None for other models."""
    if not columns:
        return None
    return f"{len(columns)} column{'s' * (len(columns) > 1)}: {_first(columns)}"


def _predicts(run: RunFiles, label: str | None, classes: Sequence[str]) -> str | None:
    """Return what a model predicts in words; None where the folder does not say it."""
    if label and classes:
        return f"{label}: {_first(classes)}"
    counts: list[list[int]] = run.result.get("confusion") or []
    if counts:
        return f"one of {len(counts)} classes"
    return label


def _first(words: Sequence[str]) -> str:
    """Return the first `MAX_WORDS` words, and how many more there are."""
    return ", ".join(words[:MAX_WORDS]) + f" and {len(words) - MAX_WORDS} more" * (len(words) > MAX_WORDS)


def _architecture(run: RunFiles) -> str | None:
    """Return the model's kind in words; None of a user's own task."""
    kind, sizes = run.setting("task", "model"), run.setting("task", "hidden")
    if kind is None or run.setting("task", "target"):
        return None
    if kind == CHOSEN_BY_RUN and (schema := run.folder / SCHEMA).is_file():
        from ..tasks.table_schema import model_of_stored

        return model_of_stored(schema)
    if kind == "mlp" and sizes:
        return f"{kind}, hidden layers of {', '.join(map(str, sizes))}"
    return str(kind)


def _words(column: Fields) -> list[str]:
    return [str(each) for each in column.get("categories", ())]


def _domain(column: Fields) -> str:
    """Return the declared values of a column: two bounds, or its words."""
    words = _words(column)
    if not words:
        return f"{column.get('low', -1)} to {column.get('high', 1)}"
    return _first(words)


def _confusion(run: RunFiles, classes: list[str]) -> list[dict[str, Any]] | None:
    """Return a row for each class of the public held-out examples: how many of it the model calls each class."""
    counts: list[list[int]] | None = run.result.get("confusion")
    if counts is None:
        return None
    names = classes if len(classes) == len(counts) else list(map(str, range(len(counts))))
    return [{"class": name, "counts": row} for name, row in zip(names, counts, strict=True)]
