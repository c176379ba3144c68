"""Verb `fedveil new`: projects from templates, each of which runs and has a test that passes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..base.refusal import Refusal, refusing
from .grammar import app, argument, option, verb
from .table_source import Encoding, Query, sources_at

if TYPE_CHECKING:
    from ..tasks.table_files import RowSource

TEMPLATES = Path(__file__).parent / "templates"
SCHEMA, PROJECT = "schema.yaml", "project.yaml"
DRAFT_HEAD = """\
# Draft schema of the tables in {}, derived from their rows. It reveals their content.
# Before you share it:
# - low and high are rounded from the rows: replace them by a plausible range, from a form or a textbook.
# - categories are the words in the rows: remove names of persons, and add words that may occur. If owners
#   spell a word in several ways, list them: categories: {{female: [f, w, "0"], male: [m, "1"]}}
# - remove columns that the model must not see, such as patient numbers; columns of a table that are not listed
#   here are not read.
# - since counts a date in days, hours or years; name a column of dates to count from it, such as since: admission.
# - missing: ["-9", unknown] are words for a missing value besides NA, none and the like; those found here are guesses.
#   A missing number is the middle of low and high, or what `missing: {{words: ["-9"], value: 120}}` says; required: true
#   refuses it.
# - classes of the label may have weights: weights: {{healthy: 1, ill: 4}}. Use public numbers; do not count rows.
# - a time until an event is a label: {{kind: survival, time: weeks, event: relapse}}, and the event has categories: ["0", "1"].
"""
OWNERS, ROWS, COLUMNS = 8, 120, 6  # of the made-up tables
HELD_OUT_ROWS = 400
SIMULATE = "fedveil simulate --config-dir . --config-name project"
COMMANDS = {"csv": SIMULATE, "torch": SIMULATE, "sklearn": SIMULATE, "flower": "python run.py"}


@verb(app, "new", "Create a project from a template.", panel="Run")
def new(
    folder: Annotated[Path, argument("FOLDER", "Folder to create.")],
    data: Annotated[
        list[str] | None,
        argument("DATA", "Your tables, with --from csv: a folder, files of one folder, or a database."),
    ] = None,
    source: Annotated[str, option("KIND", "", "--from", words=("csv", "torch", "sklearn", "flower"))] = "csv",
    label: Annotated[
        str | None, option("COLUMN", "Column of your tables to predict; the last by default.")
    ] = None,
    query: Query = None,
    encoding: Encoding = None,
) -> int:
    """Create a small project that runs and has a passing test. With your tables, draft their schema.

    Example:
      fedveil new shops --from csv
      fedveil new draft --from csv hospitals --label diagnosis
      fedveil new draft --from csv ward.duckdb --query "SELECT * FROM stays"
    """
    if source not in COMMANDS:
        raise Refusal("--from", source, f"choose one of {', '.join(COMMANDS)}")
    if (data or label) and source != "csv":
        remedy = f"are tables, for --from csv; {source} takes none"
        raise Refusal("DATA", data[0] if data else label, remedy)
    if (query or encoding) and not data:
        raise Refusal("DATA", None, "name the tables that --query or --encoding is about")
    keys = _keys_of(data, query, encoding) if data else {}
    draft, doubts = _draft(data, label, sources_at(data, query, encoding)) if data else ("", [])
    with refusing("folder", folder, "cannot be made"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise Refusal("folder", str(folder), "is not empty; name a new folder")
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(TEMPLATES / source, folder, dirs_exist_ok=True, ignore=ignored)
        _name_data(folder)
        if data:
            _write_project(folder, keys, draft)
        elif source == "csv":
            _write_tables(folder)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    enter = f"cd {shlex.quote(str(folder))}"
    if data:
        schema = folder / SCHEMA
        print(f"Check each line of {schema}: it was derived from these tables and reveals their content.")
        for each in doubts:
            print(each)
        print("A first run that spends no budget of these tables; without its last word it does:")
        print(f"  {enter} && {COMMANDS[source]} task.simulated=true")
    else:
        print(f"  {enter} && {COMMANDS[source]}")
        install = "" if find_spec("pytest") else "pip install pytest && "
        print(f"  {install}{enter} && python -m pytest")
    return 0


def _name_data(folder: Path) -> None:
    """Set the project's data_id to the name of its folder."""
    project = folder / PROJECT
    if project.exists():
        name = re.sub("[^A-Za-z0-9]+", "-", folder.resolve().name).strip("-")[:64] or "data"
        text = project.read_text(encoding="utf-8").replace("data_id: data", f"data_id: {json.dumps(name)}")
        project.write_text(text, encoding="utf-8")


def _draft(data: Sequence[str], label: str | None, sources: Sequence[RowSource]) -> tuple[str, list[str]]:
    """Return a first schema of tables, with comments on what to check, and a sentence on each doubtful column.

    If the label is doubtful, its line is a comment: no run shall train on several spellings as several classes.

    Args:
      data: names of the tables.
      label: column to predict; None for the last.
      sources: the tables.
    """
    from ..base.extensions import extension
    from ..tasks.table_schema import column_line

    draft_of = extension("tables", "draft", "DATA", ", ".join(data))
    schema, omissions, doubtful_columns = draft_of(sources, label)
    text, doubts = schema.text(), list[str]()
    for name, doubt in doubtful_columns.items():
        line, sentence = column_line(doubt.column), f"{name} {doubt.fault} ({doubt})."
        lines = [f"  # {sentence} If they mean the same, list them as spellings:"]
        if doubt.guess is not None:
            lines.append(f"#{column_line(doubt.guess)}  # a guess, check it")
            sentence += f" Proposed as one: {doubt.mapping}."
        if name == schema.label and doubt.doubtful:
            lines.append("  # Else they are classes of their own. Choose one line, and delete its first #:")
            lines.append(f"#{line}")
            sentence += f" Choose its line in {SCHEMA}: before that, every run is refused."
        else:
            lines.append(line)
        text = text.replace(line, "\n".join(lines))
        doubts.append(sentence)
    lines = [DRAFT_HEAD.format(", ".join(data)), text]
    lines += [f"# left out: {name} ({reason})\n" for name, reason in omissions.items()]
    return "".join(lines), doubts


def _keys_of(data: Sequence[str], query: str | None, encoding: str | None) -> dict[str, str]:
    """Return the keys of the task that say where tables are; refuse those that no one key can name."""
    paths = [Path(each) for each in data]
    if query is not None:
        if len(data) > 1:
            remedy = "are several databases; put them into one folder, and name that"
            raise Refusal("DATA", ", ".join(data), remedy)
        return {"query": query, "database": data[0] if "://" in data[0] else str(paths[0].resolve())}
    if len({each.parent.resolve() for each in paths}) > 1:
        raise Refusal("DATA", ", ".join(data), "are in several folders; put them into one")
    keys = {"folder": str((paths[0] if len(paths) == 1 else paths[0].parent).resolve())}
    return keys if encoding is None else {**keys, "encoding": encoding}


def _write_project(folder: Path, keys: Mapping[str, str], draft: str) -> None:
    """Change the template's project to the user's tables, which stay where they are, and their schema; remove its test.

    Args:
      folder: of the project.
      keys: of the task, that say where the tables are.
      draft: the schema.
    """
    (folder / SCHEMA).write_text(draft, encoding="utf-8")
    (folder / "test_project.py").unlink()
    lines = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in keys.items())
    project = folder / PROJECT
    text = re.sub("  folder: data.*\n", lambda _: lines, project.read_text(encoding="utf-8"))
    text = re.sub("  held_out_file: .*\n", "", text)
    text = re.sub("simulated: true.*", "simulated: false  # true if the tables are public or made up", text)
    project.write_text(text, encoding="utf-8")


def _write_tables(folder: Path) -> None:
    """Write made-up tables for `OWNERS` owners, and a held-out one; labels follow a logistic model."""
    import numpy as np

    (folder / "data").mkdir()
    stream = np.random.default_rng(0)
    weights = np.linspace(-4, 4, COLUMNS)
    header = ",".join([*(f"column_{number}" for number in range(COLUMNS)), "label"])
    names = [*(f"data/owner_{number}.csv" for number in range(OWNERS)), "held_out.csv"]
    for name in names:
        rows = stream.standard_normal((HELD_OUT_ROWS if name == "held_out.csv" else ROWS, COLUMNS))
        labels = stream.random(len(rows)) < 1 / (1 + np.exp(-rows @ weights))
        table = np.column_stack([rows.round(3), labels])
        lines = [",".join([*(f"{cell:g}" for cell in row[:-1]), str(int(row[-1]))]) for row in table]
        (folder / name).write_text("\n".join([header, *lines]) + "\n")
