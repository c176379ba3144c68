"""``fedveil report RUN``: the page of a run, its JSON, its model card and its bill of materials, made from the run's folder alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..privacy.ledger.durable_files import replace_file
from ..privacy.refusal import Refusal
from ..reports.card import card_of
from ..reports.content import report_of, to_json
from ..reports.files import ASSESSMENT, CARD, MATERIALS, PAGE, REPORT
from ..reports.forms import empty_assessment, read_assessment
from ..reports.materials import materials_of
from ..reports.page import page_of
from ..reports.run_files import RunFiles, flat, read_run, resolved

READABLE = 0o644  # whoever may see the run may see its report
NOT_REPEATED = ("resume", "optimize", "run")  # keys that name a run, and change nothing in it


def report(
    folder: Path, out: Path | None = None, assessment: Path | None = None, *, as_json: bool = False
) -> int:
    """Write the report of a run, and return the exit code.

    Args:
      folder: of the run.
      out: folder to write to; the run's by default.
      assessment: answers of the organisation; `assessment.yaml` of the run's folder by default, which is made, empty,
        where there is none.
      as_json: print report.json and write nothing.

    Raises:
      Refusal: there is no run, a file of it or an answer cannot be read, or the report cannot be written.
    """
    answers = folder / ASSESSMENT if assessment is None else assessment
    if assessment is not None and not assessment.is_file():
        raise Refusal(
            "--assessment", str(assessment), f"is not there; begin with the {ASSESSMENT} of a report"
        )
    run = read_run(folder, read_assessment(answers))
    made = report_of(run, commands(run))
    text = to_json(made)
    if as_json:
        print(text, end="")
        return 0
    target = folder if out is None else out
    files = {REPORT: text, PAGE: page_of(made), CARD: card_of(made), MATERIALS: materials_of(made)}
    if assessment is None and not answers.is_file():
        files[ASSESSMENT] = empty_assessment()
    _write(target, files)
    empty = made["forms_counted"]["empty"]
    print(
        f"{target / PAGE}: {run.result.get('status', 'not ended')}; {empty} fields of {ASSESSMENT} are empty"
    )
    return 0


def _write(target: Path, files: Mapping[str, str]) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace_file(target / name, text.encode(), READABLE)
    except OSError as problem:
        remedy = f"cannot be written ({problem.strerror}); choose another with --out"
        raise Refusal("--out", str(target), remedy) from None


def commands(run: RunFiles) -> list[str]:
    """Return the commands that make a run again and check it.

    Args:
      run: its files.
    """
    groups = [
        f"{name}={value['name']}"
        for name, value in run.config.items()
        if isinstance(value, Mapping) and "name" in value
    ]
    verb = ["fedveil", "server", "FOLDER"] if run.deployed else ["fedveil", "simulate"]
    words = [*groups, *([] if run.deployed else _differences(run, groups))]
    found = [shlex.join([*verb, *words])]
    if run.ledger is not None:
        head = run.result.get("ledger_head")
        known = ["--head", *map(str, head)] if head else []
        found.append(shlex.join(["fedveil", "ledger", "verify", f"RUN/{run.ledger.name}", *known]))
    if run.audit:
        found.append("fedveil audit RUN")
    return [*found, "fedveil report RUN"]


def _differences(run: RunFiles, groups: list[str]) -> list[str]:
    """Return the overrides without which these groups would make another configuration; none where they make none."""
    from ..configs.compose import compose_overrides

    try:
        usual: dict[str, Any] = dict(flat(resolved(compose_overrides(groups).config)))
    except Refusal:  # groups of an older release, or of somebody's own folder
        usual = {}
    keys = {name.partition("=")[0] + ".name" for name in groups}
    return [
        f"{key}={value}"
        for key, value in flat(run.config)
        if key not in keys and key not in NOT_REPEATED and usual.get(key) != value
    ]
