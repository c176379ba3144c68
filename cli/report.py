"""``fedveil report RUN``: the page of a run, its JSON, its model card and its bill of materials, made from the run's folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.durable_files import replace_file
from ..base.refusal import Refusal
from ..configs.bundle_files import SCHEMA
from ..evidence.asked import report_of_answers
from ..evidence.card import card_of
from ..evidence.commands import commands_of
from ..evidence.content import report_of, to_json
from ..evidence.forms import empty_assessment, read_assessment
from ..evidence.materials import materials_of
from ..evidence.page import page_of
from ..run.files import (
    ASSESSMENT,
    CARD,
    CONFIG,
    FOR_OPERATOR,
    MATERIALS,
    MODEL,
    OF_ANSWERS,
    OPERATOR,
    PAGE,
    REPORT,
)
from ..run.run_files import as_a_run_wrote, read_run

READABLE, PRIVATE = 0o644, 0o600  # readable like the run itself, and by its owner alone


def report(
    folder: Path,
    out: Path | None = None,
    assessment: Path | None = None,
    questions: Path | None = None,
    *,
    operator: bool = False,
    as_json: bool = False,
) -> int:
    """Write the report of a run, or of the answers in a folder of them, and return the exit code.

    Arguments as of `fedveil report`.

    Raises:
      Refusal: there is no run, a file of it or an answer cannot be read, or the report cannot be written.
    """
    if not (folder / CONFIG).is_file() and any(folder.glob("*.json")):
        for option, given in (
            ("--assessment", assessment),
            ("--answers", questions),
            ("--operator", operator),
        ):
            if given:
                raise Refusal(option, str(given), "belongs to the report of a run")
        return _of_answers(folder, out, as_json=as_json)
    answers = folder / ASSESSMENT if assessment is None else assessment
    if assessment is not None and not assessment.is_file():
        remedy = f"does not exist; start from the {ASSESSMENT} of a report"
        raise Refusal("--assessment", str(assessment), remedy)
    if questions is not None and not questions.is_dir():
        raise Refusal("--answers", str(questions), "does not exist; name the folder of the answers")
    if operator and not (folder / OPERATOR).is_file():
        remedy = f"has no {OPERATOR}: all that is known of the run is public; leave --operator out"
        raise Refusal("RUN", str(folder), remedy)
    with as_a_run_wrote(folder):
        run = read_run(folder, read_assessment(answers), questions, operator)
        made = report_of(run, commands_of(run), _shapes(folder))
        text = to_json(made)
        files = {REPORT: text, PAGE: page_of(made), CARD: card_of(made), MATERIALS: materials_of(made)}
    if as_json:
        print(text, end="")
        return 0
    if operator:
        target = folder / FOR_OPERATOR if out is None else out
        _write(target, {REPORT: text, PAGE: files[PAGE]}, PRIVATE)
        print(f"{target / PAGE}: {run.result.get('status', 'not ended')}; for the operator alone")
        return 0
    target = folder if out is None else out
    if assessment is None and not answers.is_file():
        files[ASSESSMENT] = empty_assessment()
    _write(target, files)
    empty = made["forms_counted"]["empty"]
    print(
        f"{target / PAGE}: {run.result.get('status', 'not ended')}; {empty} fields of {ASSESSMENT} are empty"
    )
    return 0


def _shapes(folder: Path) -> dict[str, Any] | None:
    """Return the shapes of a run's additive model; None for any other."""
    if not (folder / SCHEMA).is_file():  # of no table
        return None
    from ..tasks.shapes import read_shapes

    return read_shapes(folder / SCHEMA, folder / MODEL)


def _of_answers(folder: Path, out: Path | None, *, as_json: bool) -> int:
    made = report_of_answers(folder)
    text = to_json(made)
    if as_json:
        print(text, end="")
        return 0
    target = folder / OF_ANSWERS if out is None else out
    _write(target, {REPORT: text, PAGE: page_of(made)})
    print(f"{target / PAGE}: {made['answered']} answer{'' if made['answered'] == 1 else 's'}")
    return 0


def _write(target: Path, files: Mapping[str, str], mode: int = READABLE) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace_file(target / name, text.encode(), mode)
    except OSError as problem:
        remedy = f"cannot be written ({problem.strerror}); choose another with --out"
        raise Refusal("--out", str(target), remedy) from None
